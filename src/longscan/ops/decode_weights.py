"""The weights of attention, MLPs and experts for the native decoder: C structs of csrc/longscan.h."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from longscan.ops import _native

__all__ = [
    "Adapter",
    "AttentionWeights",
    "ExpertsWeights",
    "MLPWeights",
    "Matrix",
    "Router",
    "Shapes",
    "pack_struct",
    "sizes_of",
]


MAX_CONV, MAX_ADAPTER = 8, 256  # of the native library

# of each state by its name, without batch; None is the capacity of a cache
Shapes: TypeAlias = dict[str, tuple[int | None, ...]]


class Adapter:
    """What LoRA adds to a product with a matrix: scale B A x.

    Args:
        A: (rank, n_in) float32, contiguous on the CPU, used in place.
        B: (n_out, rank), likewise.
        scale: of their product.

    Raises:
        ValueError: the rank is larger than the decoder supports.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        if not 1 <= len(A) <= MAX_ADAPTER:
            raise ValueError(f"rank: expected 1 to {MAX_ADAPTER}, got {len(A)}")
        self.A, self.B, self.scale = A, B, scale
        fields = (*_native.matrix_fields(A, None, None), *_native.matrix_fields(B, None, None))
        self.packed = struct.pack("14qd", *fields, scale)  # the C struct ``ls_adapter``

    def rows(self, which: slice) -> Adapter:
        """Return the adapter of some rows of the matrix.

        Args:
            which: of them, adjacent.
        """
        return Adapter(self.A, self.B[which], self.scale)


class Matrix(NamedTuple):
    """The weight of a Linear: float32, or in a quantised format of quant.py.

    Attributes:
        weight: (n_out, n_in), or packed.
        scale: of a quantised format, or None.
        bias: (n_out,) float32, or None.
        adapter: beside it, or None.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    adapter: Adapter | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """n_out and n_in, also of a matrix packed to two values per byte."""
        n_out, width = self.weight.shape
        return n_out, 2 * width if self.weight.dtype == torch.uint8 else width

    @property
    def fields(self) -> tuple[int, ...]:
        """The C struct ``ls_matrix``."""
        packed = None if self.adapter is None else self.adapter.packed
        return _native.matrix_fields(self.weight, self.scale, self.bias, packed)

    @property
    def format(self) -> int:
        """Its first field."""
        return self.fields[0]

    @property
    def halves(self) -> tuple[Matrix, Matrix]:
        """The first and the second half of the rows."""
        half = self.sizes[0] // 2
        first, second = (
            Matrix(
                self.weight[rows],
                None if self.scale is None else self.scale[rows],
                None if self.bias is None else self.bias[rows],
                None if self.adapter is None else self.adapter.rows(rows),
            )
            for rows in (slice(half), slice(half, None))
        )
        return first, second


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of causal attention.

    Attributes:
        q_proj: (n_heads d_head, d_model).
        k_proj: (n_kv_heads d_head, d_model), of the format of q_proj.
        v_proj: likewise.
        o_proj: (d_model, n_heads d_head).
        d_head: width of a head.
        scale: of the products of queries and keys.
        key_scale: of the keys, before they turn.
        frequencies: (n_rotated / 2,) float32: radians per position of each pair; None: nothing turns.
        conv_weight: (d_conv, (n_heads + 2 n_kv_heads) d_head) of the convolution that queries, keys and
            values pass through, oldest tap first; None: there is none.
        conv_bias: one per channel, or None.
        adapters: of queries, keys and values: (rank, d_input), of the format of q_proj, and (n_out, rank),
            whose product is added to each projection; or none. Not beside a convolution.
    """

    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    o_proj: Matrix
    d_head: int
    scale: float
    key_scale: float = 1.0
    frequencies: Tensor | None = None
    conv_weight: Tensor | None = None
    conv_bias: Tensor | None = None
    adapters: tuple[tuple[Matrix, Matrix], ...] = ()

    kind: ClassVar[int] = 2

    @property
    def d_input(self) -> int:
        """Width of the input: d_model, or twice that beside the embedded tokens."""
        return self.q_proj.sizes[1]

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_attention``; None if the shapes do not fit, as after pruning."""
        low = tuple(matrix for pair in self.adapters for matrix in pair)
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if not self._fits(d_model, low) or len({m.format for m in (*matrices[:3], *low[::2])}) > 1:
            return None  # one prepared input is for matrices of one format
        d_q, d_kv = self.q_proj.sizes[0], self.k_proj.sizes[0]
        d_conv = 0 if self.conv_weight is None else self.conv_weight.shape[0]
        rank = low[0].sizes[0] if low else 0
        rotated = 0 if self.frequencies is None else 2 * len(self.frequencies)
        sizes = (d_q // self.d_head, d_kv // self.d_head, self.d_head, rotated, d_conv, rank)
        numbers = (*sizes, float(self.scale), float(self.key_scale))
        ends = (self.frequencies, self.conv_weight, self.conv_bias)
        return pack_struct(numbers, (*matrices, *(low or (self.q_proj,) * 6)), ends)

    def _fits(self, d_model: int, low: tuple[Matrix, ...]) -> bool:
        """Return whether the shapes are those of attention, low being the matrices of the adapters."""
        d_q, d_kv, d_input = self.q_proj.sizes[0], self.k_proj.sizes[0], self.d_input
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        expected = ((d_q, d_input), (d_kv, d_input), (d_kv, d_input), (d_model, d_q))
        heads = d_q % self.d_head == d_kv % self.d_head == d_q % d_kv == 0
        if d_input not in (d_model, 2 * d_model) or sizes_of(projections) != expected or not heads:
            return False
        if low:
            rank = low[0].sizes[0]
            pairs = (((rank, d_input), (n_out, rank)) for n_out in (d_q, d_kv, d_kv))
            return self.conv_weight is None and sizes_of(low) == tuple(
                size for pair in pairs for size in pair
            )
        if self.conv_weight is None:
            return True
        return self.conv_weight.shape[0] <= MAX_CONV and self.conv_weight.shape[1] == d_q + 2 * d_kv

    @property
    def last(self) -> Matrix:
        """The projection at the end."""
        return self.o_proj

    def state_shapes(self) -> Shapes:
        """Return the shape of each state, without batch."""
        shape = (None, self.k_proj.sizes[0] // self.d_head, self.d_head)
        cache: Shapes = {"k": shape, "v": shape}
        if self.conv_weight is None:
            return cache
        d_conv, channels = self.conv_weight.shape
        return {"conv": (d_conv - 1, channels), **cache}


@dataclass(frozen=True)
class MLPWeights:
    """The weights of an MLP.

    Attributes:
        gate_proj: (d_ff, d_model); None: there is no gate.
        up_proj: (d_ff, d_model), of the format of gate_proj.
        down_proj: (d_model, d_ff).
        activation: of the gate, or of up_proj where there is none.
        gate_scale: of the gate, before the activation.
        adapter: (rank, d_model), of the format of gate_proj, and (2 d_ff, rank), whose product is added to
            gate and up; or None.
        after: (d_model, d_model) maps the result; or None.
    """

    gate_proj: Matrix | None
    up_proj: Matrix
    down_proj: Matrix
    activation: Literal["silu", "relu2", "gelu"] = "silu"
    gate_scale: float = 1.0
    adapter: tuple[Matrix, Matrix] | None = None
    after: Matrix | None = None

    kind: ClassVar[int] = 3

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_mlp``; None if the shapes do not fit, as after pruning."""
        gate, d_ff = self.gate_proj or self.up_proj, self.up_proj.sizes[0]
        matrices = (gate, self.up_proj, self.down_proj)
        if sizes_of(matrices) != ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff)):
            return None
        rank = self.adapter[0].sizes[0] if self.adapter else 0
        low = self.adapter or (gate, gate)
        if self.adapter and (self.gate_proj is None or sizes_of(low) != ((rank, d_model), (2 * d_ff, rank))):
            return None
        if len({gate.format, self.up_proj.format, low[0].format}) > 1:  # they share their prepared inputs
            return None
        if self.after is not None and self.after.sizes != (d_model, d_model):
            return None
        activation = ("silu", "relu2", "gelu").index(self.activation)
        flags = (activation, int(self.gate_proj is not None), rank, int(self.after is not None))
        return pack_struct((*flags, float(self.gate_scale)), (*matrices, *low, self.after or gate), ())

    @property
    def last(self) -> Matrix:
        """The projection at the end."""
        return self.after or self.down_proj

    def state_shapes(self) -> Shapes:
        """Return nothing: an MLP has no state."""
        return {}


class Router(NamedTuple):
    """How a mixture chooses the experts of a token, and weighs them; see `models.common.experts`.

    Of equal scores the first experts win.

    Attributes:
        weight: (n_experts, d_model) float32.
        correction: (n_experts,) float32, of a "sigmoid" router; else None.
        kind: how weights follow from scores.
        n_active: experts of a token.
        n_groups: of adjacent experts.
        n_active_groups: that the experts of a token are in.
        normalize: whether a "sigmoid" router divides the weights by their sum.
        scale: constant factor of its weights.
    """

    weight: Tensor
    correction: Tensor | None
    kind: Literal["topk-softmax", "softmax-topk", "sigmoid"]
    n_active: int
    n_groups: int = 1
    n_active_groups: int = 1
    normalize: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class ExpertsWeights:
    """The weights of a mixture of experts, without an expert that all tokens pass through.

    Attributes:
        router: chooses.
        experts: MLPs of one width and format, whose down_proj has no bias.
        latent: (d_latent, d_model) and (d_model, d_latent): the experts map the product with the first, and
            the second maps their sum; None: they map d_model.
    """

    router: Router
    experts: tuple[MLPWeights, ...]
    latent: tuple[Matrix, Matrix] | None = None

    kind: ClassVar[int] = 5

    def pack(self, d_model: int) -> bytes | None:
        """Return the C structs ``ls_experts`` and those of the experts; None if the shapes do not fit."""
        n, router = len(self.experts), self.router
        latent = self.latent or (Matrix(router.weight),) * 2
        d_latent = latent[0].sizes[0] if self.latent else 0
        experts = [expert.pack(d_latent or d_model) for expert in self.experts]
        if None in experts or any(e.adapter or e.after for e in self.experts):
            return None
        if len({(e.up_proj.format, e.up_proj.sizes) for e in self.experts}) > 1:
            return None
        if router.weight.shape != (n, d_model) or any(e.down_proj.bias is not None for e in self.experts):
            return None
        if self.latent and sizes_of(latent) != ((d_latent, d_model), (d_model, d_latent)):
            return None
        if router.kind == "sigmoid" and (router.correction is None or router.correction.shape != (n,)):
            return None
        kind = ("topk-softmax", "softmax-topk", "sigmoid").index(router.kind)
        groups = (router.n_groups, router.n_active_groups, int(router.normalize))
        numbers = (n, router.n_active, kind, *groups, d_latent, float(router.scale))
        head = pack_struct(numbers, (Matrix(router.weight), *latent), (router.correction,))
        return head + b"".join(expert for expert in experts if expert)

    @property
    def last(self) -> Matrix:
        """The projection at the end: of the first expert, if each has one."""
        return self.latent[1] if self.latent else self.experts[0].down_proj

    def state_shapes(self) -> Shapes:
        """Return nothing: experts have no state."""
        return {}


def sizes_of(matrices: Sequence[Matrix]) -> tuple[tuple[int, int], ...]:
    """Return n_out and n_in of each matrix.

    Args:
        matrices: any number.
    """
    return tuple(matrix.sizes for matrix in matrices)


def pack_struct(
    numbers: Sequence[int | float], matrices: Sequence[Matrix], pointers: Sequence[Tensor | None]
) -> bytes:
    """Return a C struct, all fields of which take 8 bytes.

    Args:
        numbers: its first fields.
        matrices: the next ones.
        pointers: the last ones, null for None.
    """
    form = "".join("q" if isinstance(number, int) else "d" for number in numbers)
    fields = [field for matrix in matrices for field in matrix.fields]
    fields += [_native.pointer(tensor) for tensor in pointers]
    return struct.pack(form, *numbers) + struct.pack(f"{len(fields)}q", *fields)
