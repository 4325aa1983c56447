"""The weights of the sublayers that the native decoder knows, and their C structs (csrc/longscan.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from longscan.ops import _native

__all__ = ["AttentionWeights", "MLPWeights", "Mamba2Weights", "MambaWeights", "Matrix", "Weights"]

MAX_STATE, MAX_CONV = 256, 8  # of the native library


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

    @property
    def sizes(self) -> tuple[int, int]:
        """n_out and n_in, also of a matrix packed to two values per byte."""
        n_out, width = self.weight.shape
        return n_out, 2 * width if self.weight.dtype == torch.uint8 else width

    @property
    def fields(self) -> tuple[int, ...]:
        """The C struct ``ls_matrix``."""
        return _native.matrix_fields(self.weight, self.scale, self.bias)

    @property
    def format(self) -> int:
        """Its first field."""
        return self.fields[0]


@dataclass(frozen=True)
class MambaWeights:
    """The weights of a Mamba mixer, all float32 but for the matrices.

    Attributes:
        in_proj: (2 d_inner, d_model).
        x_proj: (dt_rank + 2 d_state, d_inner).
        dt_proj: (d_inner, dt_rank); its bias enters the softplus.
        out_proj: (d_model, d_inner).
        conv_weight: (d_conv, d_inner), oldest tap first.
        conv_bias: (d_inner,), or None.
        A: (d_inner, d_state) for powers of two: -exp(A_log) log2(e).
        D: (d_inner,).
        inner_norms: (dt_rank,), (d_state,) and (d_state,), weights of the norms of dt, B and C; None is 1.
        inner_eps: of these norms; None: there are none.
    """

    in_proj: Matrix
    x_proj: Matrix
    dt_proj: Matrix
    out_proj: Matrix
    conv_weight: Tensor
    conv_bias: Tensor | None
    A: Tensor
    D: Tensor
    inner_norms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    inner_eps: float | None = None

    kind: ClassVar[int] = 0

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_mamba``; None if the shapes are no Mamba's, as after pruning."""
        (d_conv, d_inner), d_state = self.conv_weight.shape, self.A.shape[1]
        rank = self.dt_proj.sizes[1]
        matrices = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        expected = (
            *((2 * d_inner, d_model), (rank + 2 * d_state, d_inner)),
            *((d_inner, rank), (d_model, d_inner)),
        )
        vectors = (self.A.shape, self.D.shape) == ((d_inner, d_state), (d_inner,))
        if _sizes(matrices) != expected or not vectors or d_state > MAX_STATE or d_conv > MAX_CONV:
            return None
        ends = (self.conv_weight, self.conv_bias, self.A, self.D, *self.inner_norms)
        eps = -1.0 if self.inner_eps is None else self.inner_eps
        return _pack((d_inner, d_state, d_conv, rank, eps), matrices, ends)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each state, without batch."""
        (d_conv, d_inner), d_state = self.conv_weight.shape, self.A.shape[1]
        return {"conv": (d_conv - 1, d_inner), "ssm": (d_inner, d_state)}


@dataclass(frozen=True)
class Mamba2Weights:
    """The weights of a Mamba-2 mixer, all float32 but for the matrices.

    Attributes:
        in_proj: (2 d_ssm + 2 n_groups d_state + n_heads, d_model), rows of z, x, B, C and dt.
        out_proj: (d_model, d_ssm).
        factors: of the outputs of in_proj, as many; None: all are 1.
        conv_weight: (d_conv, d_ssm + 2 n_groups d_state), oldest tap first.
        conv_bias: one per channel, or None.
        dt_bias: (n_heads,).
        A: (n_heads,) for powers of two: -exp(A_log) log2(e).
        D: (n_heads,) or (n_heads d_head,).
        norm: (d_ssm,) weight of the gated norm, or None.
        norm_first: whether the gate comes after the norm.
        eps: of that norm.
        d_head: channels of a head.
        n_groups: of B and C.
        dt_limit: least and largest dt.
    """

    in_proj: Matrix
    out_proj: Matrix
    factors: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm: Tensor | None
    norm_first: bool
    eps: float
    d_head: int
    n_groups: int
    dt_limit: tuple[float, float]

    kind: ClassVar[int] = 1

    @property
    def d_state(self) -> int:
        """N."""
        return (self.conv_weight.shape[1] - self.A.shape[0] * self.d_head) // (2 * self.n_groups)

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_mamba2``; None if the shapes do not fit, as after pruning."""
        n_heads, (d_conv, channels) = self.A.shape[0], self.conv_weight.shape
        d_ssm, d_state = n_heads * self.d_head, self.d_state
        expected = ((d_ssm + channels + n_heads, d_model), (d_model, d_ssm))
        vectors = (
            channels == d_ssm + 2 * self.n_groups * d_state
            and self.dt_bias.shape == self.A.shape
            and self.D.shape in ((n_heads,), (d_ssm,))
            and (self.norm is None or self.norm.shape == (d_ssm,))
        )
        if _sizes((self.in_proj, self.out_proj)) != expected or not vectors or d_conv > MAX_CONV:
            return None
        order = 0 if self.norm is None else 2 if self.norm_first else 1
        per_channel = int(self.D.shape[0] != n_heads or self.d_head == 1)
        sizes = (n_heads, self.d_head, self.n_groups, d_state, d_conv, order, per_channel)
        ends = (self.factors, self.conv_weight, self.conv_bias, self.dt_bias, self.A, self.D, self.norm)
        return _pack((*sizes, self.eps, *self.dt_limit), (self.in_proj, self.out_proj), ends)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each state, without batch."""
        d_conv, channels = self.conv_weight.shape
        return {"conv": (d_conv - 1, channels), "ssm": (self.A.shape[0], self.d_head, self.d_state)}


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
    """

    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    o_proj: Matrix
    d_head: int
    scale: float
    key_scale: float = 1.0
    frequencies: Tensor | None = None

    kind: ClassVar[int] = 2

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_attention``; None if the shapes do not fit, as after pruning."""
        d_q, d_kv = self.q_proj.sizes[0], self.k_proj.sizes[0]
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        expected = ((d_q, d_model), (d_kv, d_model), (d_kv, d_model), (d_model, d_q))
        if _sizes(matrices) != expected or d_q % self.d_head or d_kv % self.d_head or d_q % d_kv:
            return None
        if len({matrix.format for matrix in matrices[:3]}) > 1:  # they share their prepared inputs
            return None
        rotated = 0 if self.frequencies is None else 2 * len(self.frequencies)
        sizes = (d_q // self.d_head, d_kv // self.d_head, self.d_head, rotated)
        return _pack((*sizes, float(self.scale), float(self.key_scale)), matrices, (self.frequencies,))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each state, without batch and capacity."""
        shape = (self.k_proj.sizes[0] // self.d_head, self.d_head)
        return {"k": shape, "v": shape}


@dataclass(frozen=True)
class MLPWeights:
    """The weights of an MLP.

    Attributes:
        gate_proj: (d_ff, d_model); None: there is no gate.
        up_proj: (d_ff, d_model), of the format of gate_proj.
        down_proj: (d_model, d_ff).
        activation: of the gate, or of up_proj where there is none.
        gate_scale: of the gate, before the activation.
    """

    gate_proj: Matrix | None
    up_proj: Matrix
    down_proj: Matrix
    activation: Literal["silu", "relu2"] = "silu"
    gate_scale: float = 1.0

    kind: ClassVar[int] = 3

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_mlp``; None if the shapes do not fit, as after pruning."""
        gate, d_ff = self.gate_proj or self.up_proj, self.up_proj.sizes[0]
        matrices = (gate, self.up_proj, self.down_proj)
        if _sizes(matrices) != ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff)):
            return None
        if gate.format != self.up_proj.format:  # they share their prepared inputs
            return None
        flags = (int(self.activation == "relu2"), int(self.gate_proj is not None))
        return _pack((*flags, float(self.gate_scale)), matrices, ())

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return nothing: an MLP has no state."""
        return {}


Weights: TypeAlias = MambaWeights | Mamba2Weights | AttentionWeights | MLPWeights


def _sizes(matrices: Sequence[Matrix]) -> tuple[tuple[int, int], ...]:
    return tuple(matrix.sizes for matrix in matrices)


def _pack(
    numbers: Sequence[int | float], matrices: Sequence[Matrix], pointers: Sequence[Tensor | None]
) -> bytes:
    """Return a C struct of numbers, matrices and pointers, all fields of 8 bytes."""
    form = "".join("q" if isinstance(number, int) else "d" for number in numbers)
    fields = [field for matrix in matrices for field in matrix.fields]
    fields += [_native.pointer(tensor) for tensor in pointers]
    return struct.pack(form, *numbers) + struct.pack(f"{len(fields)}q", *fields)
