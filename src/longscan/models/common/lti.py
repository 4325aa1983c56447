"""Linear time-invariant state spaces as layers: trained as a convolution, decoded as a recurrence.

A `System` is a bank of x' = A x + B u, y = C x + D u, one per channel, sampled at steps dt. Its output is the
convolution of the input with a kernel that does not depend on the input, so a sequence is processed in
parallel; and it is a recurrence with a state of constant size, so decoding costs the same for every token.
Sequences that continue a state, or are packed, run the recurrence in chunks; see `dense_lti`.
"""

import dataclasses
import math
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.layers import Derived
from longscan.models.common.mixer import LanguageModelConfig, Mixer
from longscan.ops import long_conv
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpaceConfig(LanguageModelConfig):
    """The fields that state space models share.

    Attributes:
        d_state: real numbers in the state of each channel.
        dt_min: time steps are initialised log-uniformly in [dt_min, dt_max].
        dt_max: see dt_min.

    Raises:
        LongscanError: a value is out of range.
    """

    d_state: int = 64  # N
    dt_min: float = 1e-3  # Δ
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_state")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            got = f"{self.dt_min} and {self.dt_max}"
            raise LongscanError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {got}.")

    def check_pairs(self) -> None:
        """Raise LongscanError unless d_state is even, as a state of conjugate pairs needs."""
        if self.d_state % 2:
            raise LongscanError(f"d_state: expected an even number, for conjugate pairs, got {self.d_state}.")


class SSMState(NamedTuple):
    """The state of one layer.

    Attributes:
        ssm: (batch, channels, ...) the hidden state of each channel's system.
    """

    ssm: Tensor


class System(nn.Module):
    """A bank of linear time-invariant systems, one input and n_outputs outputs per channel.

    Attributes:
        recurrence: names of the parameters that set the time scales.
        convolves: whether training runs a convolution where a sequence starts from the initial state.
        log_dt: (channels,) logarithms of the time steps.
        D: (channels n_outputs,) the direct path from input to output.
    """

    recurrence: tuple[str, ...] = ()
    convolves = True
    log_dt: Tensor
    D: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._derived = Derived()

    def kernel(self, length: int) -> Tensor:
        """Return the kernel: the response to a unit impulse, without the direct path.

        Args:
            length: steps.

        Returns:
            (channels n_outputs, length).
        """
        raise NotImplementedError

    def scan(self, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the recurrence, without the direct path.

        Args:
            u: (batch, seq_len, channels) in `dtype`.
            state: before the first token; zeros if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.

        Returns:
            y: (batch, seq_len, channels n_outputs).
            state: after the last token.
        """
        raise NotImplementedError

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """Run one step of the recurrence in place, without the direct path.

        Args:
            u: (batch, channels) in `dtype`.
            state: overwritten.

        Returns:
            y: (batch, channels n_outputs).
        """
        raise NotImplementedError

    def init_state(self, batch_size: int) -> SSMState:
        """Return the initial state.

        Args:
            batch_size: rows.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation: at least float32."""
        return torch.promote_types(self.log_dt.dtype, torch.float32)

    @property
    def dt(self) -> Tensor:
        """The time steps (channels,)."""
        return self.log_dt.to(self.dtype).exp()

    @exact
    def forward(
        self, u: Tensor, state: SSMState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, SSMState | None]:
        """Return the outputs of a sequence, and the state.

        Args:
            u: (batch, seq_len, channels).
            state: before the first token; the initial state if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.

        Returns:
            y: (batch, seq_len, channels n_outputs) in u's dtype.
            state: after the last token; None after a convolution, which does not compute it.

        Raises:
            ValueError: the state has another number of rows.
        """
        if state is not None and len(state.ssm) != len(u):
            raise ValueError(f"state: expected {len(u)} rows, got {len(state.ssm)}")
        x, D = u.to(self.dtype), self.D.to(self.dtype)
        direct = x.repeat_interleave(len(D) // x.shape[2], 2)
        fresh = state is None and seq_idx is None
        if self.convolves and fresh and self.training and torch.is_grad_enabled():
            return long_conv(direct, self.kernel(u.shape[1]), D).to(u.dtype), None
        y, after = self.scan(x, None if state is None else state.ssm, seq_idx)
        y = y + D * direct
        y = y if seq_idx is None else y.masked_fill((seq_idx < 0)[..., None], 0)
        return y.to(u.dtype), SSMState(after)

    @exact
    def step(self, u: Tensor, state: SSMState) -> Tensor:
        """Return the outputs for one more token per row.

        Args:
            u: (batch, channels).
            state: overwritten.

        Returns:
            y: (batch, channels n_outputs) in u's dtype.
        """
        x, D = u.to(self.dtype), self.D.to(self.dtype)
        y = self.advance(x, state.ssm) + D * x.repeat_interleave(len(D) // x.shape[1], 1)
        return y.to(u.dtype)

    @torch.no_grad()
    def rescale_time(self, factor: float) -> None:
        """Scale every time step; see `Mixer.rescale_time`.

        Args:
            factor: old sampling rate / new one.

        Raises:
            LongscanError: it is not positive and finite.
        """
        if not 0 < factor < math.inf:
            raise LongscanError(f"factor: expected old rate / new rate, more than 0, got {factor}.")
        self.log_dt += math.log(factor)

    def cached(self, make: Callable[[], T]) -> T:
        """Return what `make` derives from the parameters, without gradients; recomputed once they change."""
        if composed():  # the parameters carry derivatives, which must not be cached
            return make()
        return self._derived.get(make.__name__, chain(self.parameters(), self.buffers()), make)


def start_log_dt(config: StateSpaceConfig, channels: int, generator: torch.Generator | None) -> nn.Parameter:
    """Return the initial logarithms of the time steps, (channels,).

    Args:
        config: their range.
        channels: number of systems.
        generator: randomness; torch's global one if None.
    """
    log_dt = nn.Parameter(torch.empty(channels))
    if not log_dt.is_meta:
        nn.init.uniform_(log_dt, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
    return log_dt


class StateSpaceMixer(Mixer[SSMState]):
    """out_proj(gelu(system(x))): only the system mixes along time.

    Args:
        system: of d_model channels.
        out_proj: from its outputs to d_model.
    """

    def __init__(self, system: System, out_proj: nn.Module) -> None:
        super().__init__()
        self.ssm = system
        self.out_proj = out_proj
        self.recurrence = self.slow = tuple(f"ssm.{name}" for name in system.recurrence)

    def forward(
        self, x: Tensor, state: SSMState | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, SSMState]:
        """Mix along time; see `Mixer.forward`. The state is None where training convolves."""
        y, after = self.ssm(x, state, seq_idx)
        return self.mix(y), cast(SSMState, after)

    def mix(self, y: Tensor) -> Tensor:
        """Return the outputs y (..., channels n_outputs) mixed across channels, (..., d_model)."""
        return cast(Tensor, self.out_proj(F.gelu(y)))

    def init_state(self, batch_size: int) -> SSMState:
        """Return zeros; see `Mixer.init_state`."""
        return self.ssm.init_state(batch_size)

    def step(self, x: Tensor, state: SSMState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        return self.mix(self.ssm.step(x, state))

    def rescale_time(self, factor: float) -> None:
        """Scale every time step; see `Mixer.rescale_time`."""
        self.ssm.rescale_time(factor)


class GatedMixer(StateSpaceMixer):
    """The layer of S4: half of out_proj's outputs gate the other half."""

    def mix(self, y: Tensor) -> Tensor:
        """Return the outputs y (..., channels) mixed across channels and gated, (..., d_model)."""
        return F.glu(super().mix(y), dim=-1)
