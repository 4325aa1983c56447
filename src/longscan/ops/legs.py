"""HiPPO-LegS: the whole past of a signal as Legendre coefficients, updated sample by sample.

    c' = (A c + B f) / t,  A[n, m] = -sqrt((2n+1)(2m+1)) below the diagonal, -(n+1) on it,  B[n] = sqrt(2n+1)

The step size cancels: sample k takes the state from k - 1 to k, whatever the sampling rate.

    forward    c_k = c_{k-1} + (A c_{k-1} + B f_k) / k                          "backward": A c_k instead,
                                                                                "bilinear": the mean of both
    zoh        c_k = exp(A ln(k / (k-1))) c_{k-1} + A^-1 (exp(...) - I) B f_k   exact, if piecewise constant

A is lower triangular and, below its diagonal, of rank 1, hence O(n) per step: with m the mean that A is
applied to, the coefficients are a chain of filters, each of whose input is the residual of those before it:

    c_n += ((-(n+1) m_n + sqrt(2n+1) e_n) / k,    e_0 = f_k,    e_{n+1} = e_n - sqrt(2n+1) m_n

The zero-order hold has no such chain but a closed form: the coefficients of a piecewise constant signal are
differences of the integrals of Legendre polynomials.
"""

import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops._derivatives import composed
from longscan.ops._legs_hold import hold, hold_adjoint, stretch

LegsMethod: TypeAlias = Literal["bilinear", "forward", "backward", "zoh"]

# the weight of c_k, against c_{k-1}, in the mean that A is applied to
_IMPLICIT = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}
_CHUNK = 1 << 16  # samples processed at a time, so that the row of a coefficient fits into the cache

# --- 1. the equation ----------------------------------------------------------------------------------------


def legs_matrices(n: int) -> tuple[Tensor, Tensor]:
    """Return A (n, n) and B (n,) of c' = (A c + B f) / t in float64."""
    norm = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    return -torch.outer(norm, norm).tril(-1) - torch.arange(1.0, n + 1, dtype=torch.float64).diag(), norm


def legs_scan_ref(
    f: Tensor, state: Tensor, start: int = 0, method: LegsMethod = "bilinear", every: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`legs_scan`, sample by sample with dense matrices: the definition."""
    A, B = (matrix.to(state) for matrix in legs_matrices(state.shape[1]))
    unit, history = torch.eye(len(B)).to(state), []
    for t, sample in enumerate(f.mT):
        k = start + t + 1
        if method == "zoh":
            A_bar = torch.matrix_exp(A * math.log(k / (k - 1))) if k > 1 else torch.zeros_like(A)
            B_bar = torch.linalg.solve(A, (A_bar - unit) @ B)
        else:
            implicit = _IMPLICIT[method]
            left = unit - implicit / k * A
            A_bar = torch.linalg.solve(left, unit + (1 - implicit) / k * A)
            B_bar = torch.linalg.solve(left, B / k)
        state = state @ A_bar.mT + sample[:, None] * B_bar
        if every and (t + 1) % every == 0:
            history.append(state)
    return state, torch.stack(history, 1) if history else state.new_empty(len(state), 0, len(B))


# --- 2. the op ----------------------------------------------------------------------------------------------


def legs_scan(
    f: Tensor, state: Tensor, start: int = 0, method: LegsMethod = "bilinear", every: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the coefficients after more samples, in O(n) time per sample.

    Memory is that of the signal and of the requested states.

    Args:
        f: (channels, seq_len), the samples.
        state: (channels, n) float32 or float64, the coefficients before them; zeros before the first sample.
            The computation is in float64, where the device supports it; float64 is best for long signals too.
        start: number of samples before these.
        method: of discretisation.
        every: also return the coefficients after every `every` samples.

    Returns:
        state: (channels, n) after the last sample, in its dtype.
        history: (channels, seq_len // every, n) likewise; (channels, 0, n) if not requested.

    Raises:
        ValueError: shapes do not fit, or a value is out of range.
        TypeError: the state is neither float32 nor float64.
    """
    if f.dim() != 2 or 0 in f.shape:
        raise ValueError(f"f: expected a non-empty (channels, seq_len), got {tuple(f.shape)}")
    if state.dim() != 2 or len(state) != len(f) or not state.shape[1]:
        raise ValueError(f"state: expected (channels={len(f)}, n), got {tuple(state.shape)}")
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state: expected float32 or float64, got {state.dtype}")
    if method not in ("zoh", *_IMPLICIT):
        raise ValueError(f"method: expected zoh, {', '.join(_IMPLICIT)}, got {method!r}")
    if start < 0:
        raise ValueError(f"start: expected 0 or more samples, got {start}")
    if every is not None and every < 1:
        raise ValueError(f"every: expected at least 1 sample, got {every}")
    wide = torch.float32 if f.device.type == "mps" else torch.float64
    scan: Any = _forward_torch if composed() else torch.ops.longscan.legs_scan
    final, history = scan(f.to(wide), state.to(wide), start, method, every or 0)
    return final.to(state.dtype), history.to(state.dtype)


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "legs_scan(Tensor f, Tensor state, int start, str method, int every) -> (Tensor final, Tensor history)"
)
_lib.define(
    "legs_scan_backward(Tensor dfinal, Tensor dhistory, int seq_len, int start, str method, int every) -> "
    "(Tensor df, Tensor dstate)"
)

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::legs_scan", lib=_lib)
def _(f, state, start, method, every):  # type: ignore[no-untyped-def]
    n_saved = f.shape[1] // every if every else 0
    return state.new_empty(state.shape), state.new_empty(state.shape[0], n_saved, state.shape[1])


@torch.library.register_fake("longscan::legs_scan_backward", lib=_lib)
def _(dfinal, dhistory, seq_len, start, method, every):  # type: ignore[no-untyped-def]
    return dfinal.new_empty(dfinal.shape[0], seq_len), dfinal.new_empty(dfinal.shape)


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    f, _, *ctx.rest = inputs
    ctx.seq_len = f.shape[1]


def _autograd(ctx, dfinal, dhistory):  # type: ignore[no-untyped-def]
    gradients = torch.ops.longscan.legs_scan_backward(dfinal, dhistory, ctx.seq_len, *ctx.rest)
    return *gradients, None, None, None


def _setup_second(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, _, *ctx.rest = inputs


def _second(ctx, df, dstate):  # type: ignore[no-untyped-def]
    """Return the scan itself, which is the adjoint of its adjoint: it is linear in signal and state."""
    return *torch.ops.longscan.legs_scan(df, dstate, *ctx.rest), None, None, None, None


torch.library.register_autograd("longscan::legs_scan", _autograd, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd(
    "longscan::legs_scan_backward", _second, setup_context=_setup_second, lib=_lib
)

# --- 5. the native kernel -----------------------------------------------------------------------------------

MAX_NATIVE_ORDER = 4096


def _forward(f: Tensor, state: Tensor, start: int, method: str, every: int) -> tuple[Tensor, Tensor]:
    n, seq_len = state.shape[1], f.shape[1]
    if method in _IMPLICIT and _native.available() and state.device.type == "cpu" and n <= MAX_NATIVE_ORDER:
        history = state.new_empty(len(state), seq_len // every if every else 0, n)
        f, state = f.contiguous(), state.clone(memory_format=torch.contiguous_format)
        (alpha,) = struct.unpack("q", struct.pack("d", _IMPLICIT[method]))
        sizes = [*f.shape, n, start, alpha, f.data_ptr(), state.data_ptr(), every]
        _native.call("ls_legs_scan", [*sizes, history.data_ptr()])
        return state, history
    return _forward_torch(f, state, start, method, every)


def _forward_torch(f: Tensor, state: Tensor, start: int, method: str, every: int) -> tuple[Tensor, Tensor]:
    """Run the op on any device; torch can differentiate it, though it is linear."""
    n, seq_len = state.shape[1], f.shape[1]
    pieces = [state.new_empty(len(state), 0, n)]  # of the history, (channels, some, n)
    if method == "zoh":
        for begin, end in _blocks(seq_len, every):
            state = hold(f[:, begin:end], state, start + begin)
            if every and end % every == 0:
                pieces.append(state[:, None])
        return state, torch.cat(pieces, 1)
    columns = list(state.unbind(1))
    for begin, end, scan in _chunks(seq_len, start, n, state.dtype):
        k = torch.arange(start + begin + 1, start + end + 1, dtype=state.dtype, device=state.device)
        e, saved = f[:, begin:end], slice(every - 1 - begin % every, None, every) if every else slice(0)
        rows = []
        for degree in range(n):
            stage = _Stage(degree, k, _IMPLICIT[method])
            after = scan(stage.keep, stage.gain * e, columns[degree])  # (channels, samples)
            before = torch.cat([columns[degree][:, None], after[:, :-1]], 1)
            e = stage.onward * e - stage.drawn * before
            columns[degree] = after[:, -1].clone()
            rows.append(after[:, saved].clone())  # a view would keep the whole chunk alive
        pieces.append(torch.stack(rows, 2))
    return torch.stack(columns, 1), torch.cat(pieces, 1)


def _backward(
    dfinal: Tensor, dhistory: Tensor, seq_len: int, start: int, method: str, every: int
) -> tuple[Tensor, Tensor]:
    """Run the chain backwards, from the last degree to the first and from the last sample to the first."""
    n, df = dfinal.shape[1], dfinal.new_empty(len(dfinal), seq_len)
    if method == "zoh":
        for begin, end in reversed(list(_blocks(seq_len, every))):
            if every and end % every == 0:
                dfinal = dfinal + dhistory[:, end // every - 1]
            df[:, begin:end] = hold_adjoint(dfinal, end - begin, start + begin)
            dfinal = dfinal @ stretch(n, start + begin, start + end).to(dfinal)
        return df, dfinal.clone()
    columns = list(dfinal.unbind(1))
    for begin, end, scan in reversed(list(_chunks(seq_len, start, n, dfinal.dtype))):
        k = torch.arange(start + begin + 1, start + end + 1, dtype=dfinal.dtype, device=dfinal.device)
        e, dsaved = torch.zeros_like(df[:, begin:end]), torch.zeros_like(df[:, begin:end])
        for degree in reversed(range(n)):
            stage = _Stage(degree, k, _IMPLICIT[method])
            if every:
                dsaved[:, every - 1 - begin % every :: every] = dhistory[
                    :, begin // every : end // every, degree
                ]
            # g_k is the gradient of c_n after sample k: g_{k-1} = keep_k g_k - drawn_k e_k + dsaved_{k-1}
            given = dsaved[:, :-1] - (stage.drawn * e)[:, 1:]
            last = (columns[degree] + dsaved[:, -1])[:, None]
            rest = scan(stage.keep[1:].flip(0), given.flip(1), last[:, 0])
            g = torch.cat([last, rest], 1).flip(1)
            columns[degree] = stage.keep[0] * g[:, 0] - stage.drawn[0] * e[:, 0]
            e = stage.onward * e + stage.gain * g
        df[:, begin:end] = e
    return df, torch.stack(columns, 1)


class _Stage:
    """One filter of the chain over samples k (samples,): c = keep c + gain e, then e = onward e - drawn c."""

    def __init__(self, degree: int, k: Tensor, implicit: float) -> None:
        norm, explicit = math.sqrt(2 * degree + 1), 1 - implicit
        below = k + implicit * (degree + 1)
        self.keep = (k - explicit * (degree + 1)) / below
        self.gain = norm / below
        self.onward = 1 - implicit * norm * self.gain
        self.drawn = norm * (explicit + implicit * self.keep)


Scan: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def _chunks(seq_len: int, start: int, n: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Scan]]:
    """Yield chunks of the samples in which products of `keep`, about (begin / end)^n, do not underflow.

    Among the first 2 n samples `keep` may be zero or negative, which only the scan by doubling supports.
    """
    growth = math.expm1(-math.log(torch.finfo(dtype).tiny) / (3 * n))
    begin = 0
    while begin < seq_len:
        k = start + begin
        first = k < 2 * n
        size = 2 * n - k if first else max(1, int(min(k * growth, _CHUNK)))
        end = min(begin + size, seq_len)
        yield begin, end, _scan_by_doubling if first else _scan_by_sums
        begin = end


def _scan_by_doubling(keep: Tensor, given: Tensor, state: Tensor) -> Tensor:
    """Return all c_k = keep_k c_{k-1} + given_k, (channels, samples), from state (channels,)."""
    if not len(keep):
        return given
    c = torch.cat([given[:, :1] + (keep[0] * state)[:, None], given[:, 1:]], 1)
    step = 1
    while step < len(keep):
        c = torch.cat([c[:, :step], c[:, step:] + keep[step:] * c[:, :-step]], 1)
        keep = torch.cat([keep[:step], keep[step:] * keep[:-step]])
        step *= 2
    return c


def _scan_by_sums(keep: Tensor, given: Tensor, state: Tensor) -> Tensor:
    """Return the same for keep > 0, as a cumulative sum of given / products of keep."""
    products = keep.cumprod(0)
    return ((given / products).cumsum(1) + state[:, None]) * products


def _blocks(seq_len: int, every: int) -> Iterator[tuple[int, int]]:
    """Yield chunks of the samples that end at multiples of `every`."""
    size = min(every or _CHUNK, _CHUNK)
    begin = 0
    while begin < seq_len:
        end = min(begin + size, seq_len)
        if every:
            end = min(end, (begin // every + 1) * every)
        yield begin, end
        begin = end


_lib.impl("legs_scan", _forward, "CompositeExplicitAutograd")
_lib.impl("legs_scan_backward", _backward, "CompositeExplicitAutograd")
