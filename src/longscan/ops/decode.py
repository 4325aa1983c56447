"""Decoding in one native call: a few tokens per row of a batch, through all layers of a model and the head.

The reference is the model's own `step`, which computes the same op by op, and which decodes without the
native library. There are no gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops.decode_mixers import Mamba2Weights, Mamba3Weights, MambaWeights
from longscan.ops.decode_weights import AttentionWeights, ExpertsWeights, Matrix, MLPWeights

__all__ = ["Stack", "States", "Sublayer", "Weights", "decodes"]

Weights: TypeAlias = (
    MambaWeights | Mamba2Weights | Mamba3Weights | AttentionWeights | MLPWeights | ExpertsWeights
)


def decodes() -> bool:
    """Return whether the native decoder is available."""
    return _native.available()


class Sublayer(NamedTuple):
    """One term of the residual stream: residual += out_scale f(in_scale norm(residual)).

    A side stream carries what does not enter the residual stream.

    Attributes:
        weights: of f.
        layer: index of the layer whose state it has.
        norm: (d_model,), or None where the input is that of the sublayer before.
        in_scale: of the input.
        out_scale: of the output; 1 where the last projection has a bias.
        reads: the residual stream, that joined with the embedded tokens (attention only), or the side stream.
        writes: residual += f, side = f, or side = residual + f ("sum").
    """

    weights: Weights
    layer: int
    norm: Tensor | None
    in_scale: float = 1.0
    out_scale: float = 1.0
    reads: Literal["residual", "joined", "side"] = "residual"
    writes: Literal["residual", "side", "sum"] = "residual"


class Stack:
    """All weights of a language model for the native decoder, used in place and held alive.

    Args:
        sublayers: in order.
        embedding: (vocab_size, d_model), without bias.
        head: likewise.
        norm: (d_model,), before the head.
        eps: of all norms along the residual stream.
        embedding_scale: of the embedded tokens.
        head_scale: of the logits.

    Raises:
        ValueError: the decoder does not support these shapes.
    """

    def __init__(
        self,
        sublayers: Sequence[Sublayer],
        embedding: Matrix,
        head: Matrix,
        norm: Tensor,
        eps: float,
        embedding_scale: float = 1.0,
        head_scale: float = 1.0,
    ) -> None:
        self._alive = (sublayers, embedding, head, norm)  # the native decoder points to these
        self.vocab_size, self.ids = head.sizes[0], embedding.sizes[0]
        d_model = norm.shape[0]
        packed = [sublayer.weights.pack(d_model) for sublayer in sublayers]
        scaled = any(s.out_scale != 1 and s.weights.last.bias is not None for s in sublayers)
        wide = any((s.reads == "joined") != _doubled(s.weights, d_model) for s in sublayers)
        if None in packed or scaled or wide or {head.sizes[1], embedding.sizes[1]} != {d_model}:
            raise ValueError("the native decoder does not support these shapes")
        self._weights = [weights for weights in packed if weights is not None]
        self._shapes = {s.layer: s.weights.state_shapes() for s in sublayers}
        for sublayer in sublayers:  # several sublayers may share the state of one layer
            self._shapes[sublayer.layer] = self._shapes[sublayer.layer] | sublayer.weights.state_shapes()
        self._layers = b"".join(
            struct.pack("4q2d2q", s.weights.kind, s.layer, *_streams(s), s.in_scale, s.out_scale, *pointers)
            for s, *pointers in zip(
                sublayers,
                (_native.pointer(s.norm) for s in sublayers),
                map(_native.address, self._weights),
                strict=True,
            )
        )
        self._sizes = struct.pack("2q", len(sublayers), d_model)
        self._scales = struct.pack("3d", eps, embedding_scale, head_scale)
        self._matrices = struct.pack("14q", *embedding.fields, *head.fields)
        self._norm = norm.data_ptr()

    def states(self, layers: Sequence[Any]) -> States | None:
        """Return the addresses of states, for `run`, valid while these tensors are alive.

        Args:
            layers: the named tuple of each layer, with what its sublayers need of conv, ssm, angle, k, v and
                length.

        Returns:
            None if a tensor is not contiguous float32 on the CPU, or has another shape.
        """
        batch, records, lengths = len(next(layer[0] for layer in layers if layer)), [], []
        for index, layer in enumerate(layers):
            pointers, capacity = dict.fromkeys(("conv", "ssm", "angle", "k", "v", "length"), 0), 0
            shapes = self._shapes.get(index, {})
            for name, shape in shapes.items():
                tensor: Tensor = getattr(layer, name)
                if None in shape:
                    capacity = tensor.shape[1]
                    shape = (capacity, *shape[1:])
                if tensor.shape != (batch, *shape) or not _native.plain(tensor):
                    return None
                pointers[name] = tensor.data_ptr()
            if any(None in shape for shape in shapes.values()):
                length: Tensor = layer.length
                if length.dtype != torch.int64 or not length.is_contiguous() or length.device.type != "cpu":
                    return None
                pointers["length"] = length.data_ptr()
                lengths.append(length)
            records.append(struct.pack("7q", *pointers.values(), capacity))
        return States(b"".join(records), len(records), lengths)

    def run(self, ids: Tensor, states: States) -> Tensor:
        """Return the logits after each token, updating the states in place.

        Args:
            ids: (batch, steps) int64, contiguous on the CPU.
            states: addresses of states with as many rows, and capacity for as many tokens.

        Returns:
            (batch, steps, vocab_size) float32.

        Raises:
            ValueError: an id is out of range.
        """
        batch, steps = ids.shape
        logits = torch.empty(batch, steps, self.vocab_size, dtype=torch.float32, device="cpu")
        head = struct.pack("3q", batch, steps, torch.get_num_threads()) + self._sizes
        rest = struct.pack("2q", _native.address(self._layers), _native.address(states.records))
        tail = struct.pack("3q", self._norm, ids.data_ptr(), logits.data_ptr())
        count = struct.pack("q", states.n_layers)
        if not _native.decode(head + count + self._scales + rest + self._matrices + tail):
            bad = [i for i in ids.flatten().tolist() if not 0 <= i < self.ids]
            if not bad:
                raise RuntimeError("ls_decode_tokens refused its arguments; please report this defect")
            raise ValueError(f"ids: expected 0 to {self.ids - 1:,}, got {bad[0]:,}")
        for length in states.lengths:
            length.add_(steps)
        return logits


class States(NamedTuple):
    """The addresses of a model's states.

    Attributes:
        records: the C structs ``ls_state``.
        n_layers: how many.
        lengths: of the KV caches.
    """

    records: bytes
    n_layers: int
    lengths: list[Tensor]


def _streams(sublayer: Sublayer) -> tuple[int, int]:
    """Return the library's numbers for what a sublayer reads and writes."""
    numbers = {"residual": 0, "joined": 1, "side": 2, "sum": 3}
    return numbers[sublayer.reads], numbers[sublayer.writes]


def _doubled(weights: Weights, d_model: int) -> bool:
    """Return whether a sublayer has inputs of another width than d_model."""
    return isinstance(weights, AttentionWeights) and weights.d_input != d_model
