"""What time-invariant state spaces share as layers: a convolution to train by, a recurrence to run by.

A `System` is a bank of x' = A x + B u, y = C x + D u, one per channel, sampled at steps dt. Its output is the
convolution of its input with a kernel that does not depend on the input, so a whole sequence is read at once;
and it is a recurrence of constant state, so the next token is read alone. Between the two lies the text that
continues a state or is packed: it is read in chunks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
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
from longscan.ops._chunks import Chunks
from longscan.ops._derivatives import composed

CHUNK = 64

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpaceConfig(LanguageModelConfig):
    """The sizes of a model of state spaces.

    Attributes:
        d_state: real numbers in the state of each channel.
        dt_min: the time steps of a fresh model lie in [dt_min, dt_max], evenly on a log scale.
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
        self.check_count("d_state")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            got = f"{self.dt_min} and {self.dt_max}"
            raise LongscanError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {got}.")

    def check_pairs(self) -> None:
        """Insist on a state of conjugate pairs.

        Raises:
            LongscanError: d_state is odd.
        """
        if self.d_state % 2:
            raise LongscanError(f"d_state: expected an even number, for pairs, got {self.d_state}.")


class SSMState(NamedTuple):
    """What one layer remembers.

    Attributes:
        ssm: (batch, channels, ...) the state of each channel's system.
    """

    ssm: Tensor


class System(nn.Module):
    """A bank of linear time-invariant systems, one input and n_outputs outputs per channel.

    Attributes:
        recurrence: names of the parameters that set the time scales.
        convolves: whether training reads a text from its start by a convolution with the kernel.
        log_dt: (channels,) the logarithm of the time steps.
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
        """Return the response to a unit impulse, without the direct path.

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
        """Return the state before any token.

        Args:
            batch_size: rows.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32 at least."""
        return torch.promote_types(self.log_dt.dtype, torch.float32)

    @property
    def dt(self) -> Tensor:
        """The time steps (channels,)."""
        return self.log_dt.to(self.dtype).exp()

    @exact
    def forward(
        self, u: Tensor, state: SSMState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, SSMState | None]:
        """Read a sequence.

        Args:
            u: (batch, seq_len, channels).
            state: what came before; nothing if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.

        Returns:
            y: (batch, seq_len, channels n_outputs) of u's type.
            state: after the last token; None after a convolution, which does not pass by it.

        Raises:
            ValueError: the state is of another number of rows.
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
        """Take in one token per row.

        Args:
            u: (batch, channels).
            state: overwritten.

        Returns:
            y: (batch, channels n_outputs) of u's type.
        """
        x, D = u.to(self.dtype), self.D.to(self.dtype)
        y = self.advance(x, state.ssm) + D * x.repeat_interleave(len(D) // x.shape[1], 1)
        return y.to(u.dtype)

    @torch.no_grad()
    def rescale_time(self, factor: float) -> None:
        """Make every time step longer.

        Args:
            factor: old sampling rate / new one.

        Raises:
            LongscanError: it is not positive.
        """
        if not 0 < factor < math.inf:
            raise LongscanError(f"factor: expected old rate / new rate, more than 0, got {factor}.")
        self.log_dt += math.log(factor)

    def unchanged(self, make: Callable[[], T]) -> T:
        """Return what `make` makes of the parameters, without gradients; made again once they changed."""
        if composed():  # the parameters carry derivatives that nothing may keep
            return make()
        return self._derived.get(make.__name__, chain(self.parameters(), self.buffers()), make)


def start_log_dt(config: StateSpaceConfig, channels: int, generator: torch.Generator | None) -> nn.Parameter:
    """Draw the logarithms of time steps, (channels,).

    Args:
        config: their range.
        channels: how many.
        generator: randomness; torch's global one if None.
    """
    log_dt = nn.Parameter(torch.empty(channels))
    if not log_dt.is_meta:
        nn.init.uniform_(log_dt, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
    return log_dt


class Tables(NamedTuple):
    """What a chunk of recurrences x = A x + B u, y = C x multiplies by, with dense matrices.

    Attributes:
        into: (channels, size, N) A^s B.
        K: (channels, n_outputs, size) C A^s B.
        out: (channels, size, n_outputs, N) C A^(t + 1).
        powers: (channels, N, N) each, A to the powers of two.
    """

    into: Tensor
    K: Tensor
    out: Tensor
    powers: tuple[Tensor, ...]

    @classmethod
    def of(cls, system: tuple[Tensor, Tensor, Tensor], size: int, dtype: torch.dtype) -> "Tables":
        """Find them by doubling: about N^3 log size.

        Args:
            system: A_bar (channels, N, N), B_bar (channels, N), C (channels, n_outputs, N), real.
            size: steps of a chunk, a power of two.
            dtype: of the result; float64 is computed in, whose errors all tokens would share.
        """
        A, B, C = (matrix.double() for matrix in system)
        squares, into, out = [A], B[:, None], (C @ A)[:, None]
        while into.shape[1] < size:
            into = torch.cat([into, into @ squares[-1].mT], 1)
            out = torch.cat([out, out @ squares[-1][:, None]], 1)
            squares.append(squares[-1] @ squares[-1])
        K = torch.einsum("cmn,csn->cms", C, into)
        return cls(into.to(dtype), K.to(dtype), out.to(dtype), tuple(square.to(dtype) for square in squares))

    def cut(self, size: int) -> "Tables":
        """Return those of shorter chunks.

        Args:
            size: a power of two.
        """
        powers = self.powers[: size.bit_length()]
        return Tables(self.into[:, :size], self.K[:, :, :size], self.out[:, :size], powers)


class DenseSystem(System):
    """A bank of systems whose recurrence is run in chunks, with dense matrices."""

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the discrete systems as real matrices.

        Returns:
            A_bar: (channels, N, N).
            B_bar: (channels, N).
            C: (channels, n_outputs, N).
        """
        raise NotImplementedError

    def scan(self, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `System.scan`."""
        size = min(CHUNK, 1 << (u.shape[1] - 1).bit_length())
        learning = torch.is_grad_enabled() or composed()
        tables = (
            Tables.of(self.dense(), size, u.dtype) if learning else self.unchanged(self._tables).cut(size)
        )
        y, after = chunked(tables, u, None if state is None else state.flatten(2), seq_idx)
        return y, after.view(self.init_state(len(u)).ssm.shape)

    def _tables(self) -> Tables:
        """Return the tables of whole chunks."""
        return Tables.of(self.dense(), CHUNK, self.dtype)


def chunked(tables: Tables, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a bank of recurrences in chunks.

    Args:
        tables: what a chunk multiplies by.
        u: (batch, seq_len, channels).
        state: (batch, channels, N); zeros if None.
        seq_idx: (batch, seq_len), see `Mixer.plan`.

    Returns:
        y: (batch, seq_len, channels n_outputs).
        state: (batch, channels, N) after the last token.
    """
    size = tables.into.shape[1]
    chunks = Chunks.of(u, seq_idx, size)
    t = torch.arange(size, device=u.device)
    lags = t[:, None] - t
    toeplitz = tables.K[:, :, lags.clamp(min=0)] * (lags >= 0)  # (channels, n_outputs, size, size)
    entering = torch.einsum("bjsc,csn->bjcn", chunks.take(u, chunks.right), tables.into.flip(1))
    x, before = u.new_zeros(entering[:, 0].shape) if state is None else state, []
    for index in range(entering.shape[1]):
        x = torch.where(chunks.fresh[:, index, None, None], 0, x)
        before.append(x)
        x = _after(x, tables.powers, chunks.lengths[:, index]) + entering[:, index]
    y = torch.einsum("cmts,bjsc->bjtcm", toeplitz, chunks.take(u, chunks.left))
    y = y + torch.einsum("ctmn,bjcn->bjtcm", tables.out, torch.stack(before, 1))
    return chunks.give(y.flatten(3), chunks.left), x


def _after(x: Tensor, powers: Sequence[Tensor], steps: Tensor) -> Tensor:
    """The states x (batch, channels, N) after steps (batch,) of silence, with A_bar to the powers of two."""
    for j, power in enumerate(powers):
        bit = (steps >> j) & 1 == 1
        if bool(bit.any()):
            x = torch.where(bit[:, None, None], torch.einsum("bcn,cmn->bcm", x, power), x)
    return x


class StateSpaceMixer(Mixer[SSMState]):
    """out_proj of the GELU of a system's output: everything but the system is of one time.

    Args:
        system: of as many channels as the model is wide.
        out_proj: from its outputs to the model's width.
    """

    def __init__(self, system: System, out_proj: nn.Module) -> None:
        super().__init__()
        self.ssm = system
        self.out_proj = out_proj
        self.recurrence = self.slow = tuple(f"ssm.{name}" for name in system.recurrence)

    def forward(
        self, x: Tensor, state: SSMState | None = None, seq_idx: Tensor | None = None, /
    ) -> tuple[Tensor, SSMState]:
        """Mix along time; in training from the start, of a system that convolves, no state is returned.

        Args:
            x: (batch, seq_len, d_model).
            state: what came before the first token; nothing if None.
            seq_idx: (batch, seq_len) integers: a new value starts a new sequence, negative means padding.

        Returns:
            y: (batch, seq_len, d_model).
            state: after the last token.
        """
        y, after = self.ssm(x, state, seq_idx)
        return self.mix(y), cast(SSMState, after)

    def mix(self, y: Tensor) -> Tensor:
        """Mix the outputs (..., channels n_outputs) of one time: (..., d_model)."""
        return cast(Tensor, self.out_proj(F.gelu(y)))

    def init_state(self, batch_size: int) -> SSMState:
        """Return the state before any token: zeros.

        Args:
            batch_size: rows.
        """
        return self.ssm.init_state(batch_size)

    def step(self, x: Tensor, state: SSMState, plan: None = None, /) -> Tensor:
        """Take in one token per row.

        Args:
            x: (batch, d_model).
            state: overwritten with the state after the token.
            plan: nothing.

        Returns:
            y: (batch, d_model).
        """
        return self.mix(self.ssm.step(x, state))

    def rescale_time(self, factor: float) -> None:
        """Make every time step longer; see `Mixer.rescale_time`."""
        self.ssm.rescale_time(factor)


class GatedMixer(StateSpaceMixer):
    """The layer of S4: half of out_proj's outputs gate the other half."""

    def mix(self, y: Tensor) -> Tensor:
        """Mix the outputs (..., channels) of one time: (..., d_model)."""
        return F.glu(super().mix(y), dim=-1)
