"""Mamba with parts of its design undone, for the ablations of its paper (Gu and Dao 2023, section 4.6).

What is undone: the gate; the dependence of Δ, B or C on the input; the initialisation of A, which may also be
complex. A complex A has no op of its own. In a frame that turns with the state, it is real:

    h_t = exp(dt_t (a + i w)) h_{t-1} + dt_t B_t x_t,                    y_t = 2 Re(C_t h_t)
    g_t = exp(dt_t a) g_{t-1} + dt_t exp(-i theta_t) B_t x_t,            theta_t = w (dt_1 + ... + dt_t)
    h_t = exp(i theta_t) g_t

So `ops.selective_scan` computes real and imaginary part of g as two states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.layers import linear
from longscan.models.common.mixer import Block
from longscan.models.mamba import Mamba, MambaConfig, MambaMixer, MambaState
from longscan.ops import causal_conv1d, selective_scan

__all__ = ["Variant", "VariantConfig", "VariantMixer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantConfig(MambaConfig):
    """The configuration of a Mamba with parts undone; the defaults undo nothing.

    Raises:
        LongscanError: a value is out of range.
    """

    gate: bool = True
    select_dt: bool = True  # whether dt depends on the input; B and C likewise
    select_B: bool = True
    select_C: bool = True
    # A_n is -(n + 1), -1/2, -exp(e) with a normal e, or -1/2 + n i, with half as many n
    A_init: Literal["linear", "half", "random", "complex"] = "linear"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.A_init == "complex" and self.d_state % 2:
            raise LongscanError(f"d_state: expected an even number for a complex A, got {self.d_state}.")
        if self.inner_norms != "none":
            raise LongscanError(f"inner_norms: expected 'none' in a variant, got {self.inner_norms!r}.")


class VariantMixer(MambaMixer):
    """Mamba's block with parts undone.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: VariantConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        d_inner, d_state = config.d_inner, config.d_state
        self.gate = config.gate
        self.widths = (
            config.rank * config.select_dt,
            d_state * config.select_B,
            d_state * config.select_C,
        )
        if not config.gate:
            self.in_proj = linear(config.d_model, d_inner, config.bias, generator)
        if not config.select_dt:
            self.dt_proj.register_parameter("weight", None)  # dt is its bias
        if any(self.widths):
            self.x_proj = linear(d_inner, sum(self.widths), False, generator)
        else:
            del self.x_proj
        B, C = torch.ones(d_inner, d_state), torch.empty(d_inner, d_state).normal_(generator=generator)
        self.B = None if config.select_B else nn.Parameter(B)
        self.C = None if config.select_C else nn.Parameter(C / math.sqrt(d_state))
        self.A_imag = None
        if config.A_init == "complex":
            self.A_log = nn.Parameter(torch.full((d_inner, d_state // 2), math.log(0.5)))
            self.A_imag = nn.Parameter(torch.arange(d_state // 2).float().repeat(d_inner, 1))
        elif config.A_init == "half":
            nn.init.constant_(self.A_log, math.log(0.5))
        elif config.A_init == "random":
            nn.init.normal_(self.A_log, generator=generator)
        constant = [name for name in ("A_imag", "B", "C") if getattr(self, name) is not None]
        self.recurrence = (*MambaMixer.recurrence, *constant)  # type: ignore[assignment]

    def forward(
        self, x: Tensor, state: MambaState | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, MambaState]:
        """Mix along time; see `Mixer.forward`. With a complex A, rows are neither packed nor padded."""
        x = self.in_proj(x)
        x, z = x.chunk(2, dim=-1) if self.gate else (x, None)  # (batch, seq_len, d_inner) each
        conv, ssm = (None, None) if state is None else state
        x, conv = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", conv, seq_idx)
        (dt, B, C), A = self._select(x), -torch.exp(self.A_log)
        if self.A_imag is None:
            y, ssm = selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, True, ssm, seq_idx)
        else:
            if seq_idx is not None:
                raise ValueError("seq_idx: expected None with a complex A, got packed or padded rows")
            dt = F.softplus(dt + self.dt_proj.bias)
            B, C, turned = in_turning_frame(dt, self.A_imag, B, C)
            y, ssm = selective_scan(x, dt, A.repeat(1, 2), B, C, self.D, z, initial_state=ssm)
            ssm = torch.cat(_times(ssm.chunk(2, -1), (turned.cos(), turned.sin())), -1)
        return self.out_proj(y), MambaState(conv, ssm)

    def init_state(self, batch_size: int) -> MambaState:
        """Return zeros; see `MambaMixer.init_state`. Of complex numbers, the real parts come first."""
        state = super().init_state(batch_size)
        return state if self.A_imag is None else state._replace(ssm=state.ssm.repeat(1, 1, 2))

    def step(self, x: Tensor, state: MambaState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        y, after = self.forward(x[:, None], state)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)
        return y[:, 0]

    def native(self, layer: int, norm: Tensor | None) -> None:
        """Return None: the native decoder has no variants."""

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dt (..., d_inner), without its bias, and B and C, (..., d_state) or (d_inner, d_state)."""
        if not any(self.widths):
            return torch.zeros_like(x), cast(Tensor, self.B), cast(Tensor, self.C)
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)
        dt = self.dt_proj(dt) if self.widths[0] else torch.zeros_like(x)
        return dt, B if self.B is None else self.B, C if self.C is None else self.C


def in_turning_frame(dt: Tensor, frequency: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input and output matrices in the frame that turns with the state.

    The frame has a matrix per channel and token: this is for the short sequences of an experiment.

    Args:
        dt: (batch, seq_len, d_inner) step sizes.
        frequency: (d_inner, n) imaginary part of A.
        B: (batch, seq_len, 2 n) or (d_inner, 2 n), real parts first.
        C: likewise.

    Returns:
        B, C: (batch, seq_len, d_inner, 2 n), a group for each channel, real.
        turned: (batch, d_inner, n) the last angle.
    """
    angle = (dt.double().cumsum(1)[..., None] * frequency).remainder(2 * math.pi).to(dt.dtype)
    cos, sin = angle.cos(), angle.sin()
    B, C = (M[:, :, None] if M.dim() == 3 else M for M in (B, C))
    into = torch.cat(_times(B.chunk(2, -1), (cos, -sin)), -1)
    real, imaginary = _times(C.chunk(2, -1), (cos, sin))
    return into, torch.cat([2 * real, -2 * imaginary], -1), angle[:, -1]


def _times(a: tuple[Tensor, ...], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the product of two complex numbers, each as real and imaginary part."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


class Variant(Mamba):
    """A language model of Mamba's blocks with parts undone.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: VariantConfig
    decodable = ()  # type: ignore[assignment]

    @staticmethod
    def block(config: MambaConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, VariantMixer(cast(VariantConfig, config), generator))
