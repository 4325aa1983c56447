"""The weights of Mamba, Mamba-2 and Mamba-3 for the native decoder: C structs of csrc/longscan.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longscan.ops.decode_weights import MAX_CONV, Matrix, Shapes, pack_struct, sizes_of

__all__ = ["Mamba2Weights", "Mamba3Weights", "MambaWeights"]

MAX_STATE, MAX_HEAD, MAX_RANK = 256, 512, 16  # of the native library


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
        if sizes_of(matrices) != expected or not vectors or d_state > MAX_STATE or d_conv > MAX_CONV:
            return None
        ends = (self.conv_weight, self.conv_bias, self.A, self.D, *self.inner_norms)
        eps = -1.0 if self.inner_eps is None else self.inner_eps
        return pack_struct((d_inner, d_state, d_conv, rank, eps), matrices, ends)

    @property
    def last(self) -> Matrix:
        """The projection at the end."""
        return self.out_proj

    def state_shapes(self) -> Shapes:
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
        if sizes_of((self.in_proj, self.out_proj)) != expected or not vectors or d_conv > MAX_CONV:
            return None
        order = 0 if self.norm is None else 2 if self.norm_first else 1
        per_channel = int(self.D.shape[0] != n_heads or self.d_head == 1)
        sizes = (n_heads, self.d_head, self.n_groups, d_state, d_conv, order, per_channel)
        ends = (self.factors, self.conv_weight, self.conv_bias, self.dt_bias, self.A, self.D, self.norm)
        return pack_struct((*sizes, self.eps, *self.dt_limit), (self.in_proj, self.out_proj), ends)

    @property
    def last(self) -> Matrix:
        """The projection at the end."""
        return self.out_proj

    def state_shapes(self) -> Shapes:
        """Return the shape of each state, without batch."""
        d_conv, channels = self.conv_weight.shape
        return {"conv": (d_conv - 1, channels), "ssm": (self.A.shape[0], self.d_head, self.d_state)}


@dataclass(frozen=True)
class Mamba3Weights:
    """The weights of a Mamba-3 mixer, all float32 but for the matrices.

    Attributes:
        in_proj: (2 d_inner + 2 rank n_groups d_state + 3 n_heads + n_angles, d_model), rows of z, x, B, C,
            dt, A, trap and angle.
        out_proj: (d_model, d_inner).
        dt_bias: (n_heads,).
        D: (n_heads,).
        biases: (n_heads, rank, d_state) twice, of B and C.
        norms: (d_state,) twice, weights of the norms of B and C.
        eps: of these norms.
        mimo: (n_heads, rank, d_head) three times, factors of x, z and y; None is one input and one output.
        norm: (d_inner,) weight of the norm of y of each head, or None.
        norm_eps: of that norm.
        d_head: channels of a head.
        n_groups: of B and C.
        n_angles: pairs of channels of B and C that rotate.
        A_softplus: whether A is a softplus; else it has the heavy tail.
        A_floor: least -A.
    """

    in_proj: Matrix
    out_proj: Matrix
    dt_bias: Tensor
    D: Tensor
    biases: tuple[Tensor, Tensor]
    norms: tuple[Tensor, Tensor]
    eps: float
    mimo: tuple[Tensor, Tensor, Tensor] | None
    norm: Tensor | None
    norm_eps: float
    d_head: int
    n_groups: int
    n_angles: int
    A_softplus: bool
    A_floor: float

    kind: ClassVar[int] = 4

    def pack(self, d_model: int) -> bytes | None:
        """Return the C struct ``ls_mamba3``; None if the shapes do not fit, as after pruning."""
        n_heads, rank, d_state = self.biases[0].shape
        d_inner, d_groups = n_heads * self.d_head, rank * self.n_groups * d_state
        width = 2 * d_inner + 2 * d_groups + 3 * n_heads + self.n_angles
        vectors = (
            self.biases[1].shape == self.biases[0].shape
            and self.dt_bias.shape == self.D.shape == (n_heads,)
            and all(norm.shape == (d_state,) for norm in self.norms)
            and all(factor.shape == (n_heads, rank, self.d_head) for factor in self.mimo or ())
            and (self.norm is None or self.norm.shape == (d_inner,))
        )
        fits = d_state <= MAX_STATE and self.d_head <= MAX_HEAD and rank <= (MAX_RANK if self.mimo else 1)
        expected = ((width, d_model), (d_model, d_inner))
        if sizes_of((self.in_proj, self.out_proj)) != expected or not (vectors and fits):
            return None
        sizes = (n_heads, self.d_head, self.n_groups, d_state, rank, self.n_angles, int(self.A_softplus))
        numbers = (*sizes, float(self.eps), float(self.norm_eps), float(self.A_floor))
        mimo = self.mimo or (None, None, None)
        ends = (self.dt_bias, self.D, *self.biases, *self.norms, self.norm, *mimo)
        return pack_struct(numbers, (self.in_proj, self.out_proj), ends)

    @property
    def last(self) -> Matrix:
        """The projection at the end."""
        return self.out_proj

    def state_shapes(self) -> Shapes:
        """Return the shape of each state, without batch."""
        n_heads, rank, d_state = self.biases[0].shape
        return {
            "angle": (n_heads, self.n_angles),
            "ssm": (n_heads, self.d_head, d_state),
            "k": (rank, n_heads, d_state),
            "v": (n_heads, self.d_head),
        }
