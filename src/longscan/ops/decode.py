"""Decoding in one native call: a few tokens per row of a batch, through all Mamba blocks and the head.

The reference is the model's own `step`, which computes the same op by op, and which decodes without the
native library. There are no gradients.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.ops import _native

MAX_STATE, MAX_CONV = 256, 8  # of the native library


def decodes(d_state: int, d_conv: int) -> bool:
    """Return whether the native decoder is available and supports a Mamba of these sizes."""
    return _native.available() and d_state <= MAX_STATE and d_conv <= MAX_CONV


class Matrix(NamedTuple):
    """The weight of a Linear: float32, or in a quantised format of quant.py.

    Attributes:
        weight: (n_out, n_in), or packed.
        scale: of a quantised format, or None.
        bias: (n_out,) float32, or None.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


class MambaBlock(NamedTuple):
    """The weights of a Mamba block and its norm, all float32 but for the matrices.

    Attributes:
        norm: (d_model,).
        in_proj: (2 d_inner, d_model).
        x_proj: (dt_rank + 2 d_state, d_inner).
        dt_proj: (d_inner, dt_rank); its bias enters the softplus.
        out_proj: (d_model, d_inner).
        conv_weight: (d_conv, d_inner), oldest tap first.
        conv_bias: (d_inner,), or None.
        A: (d_inner, d_state) for powers of two: -exp(A_log) log2(e).
        D: (d_inner,).
        inner_norms: (dt_rank,), (d_state,) and (d_state,), weights of the norms of dt, B and C; None is 1.
    """

    norm: Tensor
    in_proj: Matrix
    x_proj: Matrix
    dt_proj: Matrix
    out_proj: Matrix
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    inner_norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


class MambaStack:
    """All weights of a Mamba for the native decoder, used in place and kept alive.

    Args:
        blocks: in order.
        embedding: (vocab_size, d_model), without bias.
        head: likewise.
        norm: (d_model,), before the head.
        eps: of all norms along the residual stream.
        inner_eps: of the norms of dt, B and C; None: there are none.
    """

    def __init__(
        self,
        blocks: Sequence[MambaBlock],
        embedding: Matrix,
        head: Matrix,
        norm: Tensor,
        eps: float,
        inner_eps: float | None = None,
    ) -> None:
        self._alive = (blocks, embedding, head, norm)  # the native decoder points to these
        first = blocks[0]
        self.vocab_size, self.ids = head.weight.shape[0], embedding.weight.shape[0]
        (d_conv, d_inner), d_state = first.conv_weight.shape, first.A.shape[1]
        rank = first.x_proj.weight.shape[0] - 2 * d_state
        self._shapes = (d_conv - 1, d_inner), (d_inner, d_state)
        layers = [value for block in blocks for value in _block_fields(block)]
        self._layers = struct.pack(f"{len(layers)}q", *layers)
        self._sizes = struct.pack("6q", len(blocks), norm.shape[0], d_inner, d_state, d_conv, rank)
        self._sizes += struct.pack("2d", eps, -1.0 if inner_eps is None else inner_eps)
        self._matrices = struct.pack("12q", *_matrix_fields(embedding), *_matrix_fields(head))
        self._norm = norm.data_ptr()

    def states(self, layers: Sequence[tuple[Tensor, Tensor]]) -> bytes | None:
        """Return the addresses of states, for `run`, valid while these tensors are alive.

        Args:
            layers: conv (batch, d_conv - 1, d_inner) and ssm (batch, d_inner, d_state) of each block.

        Returns:
            None if a tensor is not contiguous float32 on the CPU, or has another shape.
        """
        batch = layers[0][0].shape[0]
        for layer in layers:
            for tensor, shape in zip(layer, self._shapes, strict=True):
                if tensor.shape != (batch, *shape) or not _native.plain(tensor):
                    return None
        return struct.pack(f"{2 * len(layers)}q", *(layer[i].data_ptr() for i in (0, 1) for layer in layers))

    def run(self, ids: Tensor, states: bytes) -> Tensor:
        """Return the logits after each token, updating the states in place.

        Args:
            ids: (batch, steps) int64, contiguous on the CPU.
            states: addresses of states with as many rows.

        Returns:
            (batch, steps, vocab_size) float32.

        Raises:
            ValueError: an id is out of range.
        """
        batch, steps = ids.shape
        logits = torch.empty(batch, steps, self.vocab_size, dtype=torch.float32, device="cpu")
        pointers = _native.address(states)
        head = struct.pack("3q", batch, steps, torch.get_num_threads())
        rest = struct.pack("3q", _native.address(self._layers), pointers, pointers + len(states) // 2)
        tail = struct.pack("3q", self._norm, ids.data_ptr(), logits.data_ptr())
        if not _native.decode(head + self._sizes + rest + self._matrices + tail):
            bad = [i for i in ids.flatten().tolist() if not 0 <= i < self.ids]
            if not bad:
                raise RuntimeError("ls_decode_tokens refused its arguments; please report this defect")
            raise ValueError(f"ids: expected 0 to {self.ids - 1:,}, got {bad[0]:,}")
        return logits


def _block_fields(block: MambaBlock) -> list[int]:
    """Return the C struct ls_layer."""
    fields = [block.norm.data_ptr()]
    for matrix in (block.in_proj, block.x_proj, block.dt_proj, block.out_proj):
        fields += _matrix_fields(matrix)
    ends = (block.conv_weight, block.conv_bias, block.A, block.D, *block.inner_norms)
    return fields + [_native.pointer(tensor) for tensor in ends]


def _matrix_fields(matrix: Matrix) -> tuple[int, ...]:
    return _native.matrix_fields(matrix.weight, matrix.scale, matrix.bias)
