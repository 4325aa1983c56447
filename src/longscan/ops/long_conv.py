"""Convolution along time with a filter as long as the sequence, one per channel.

    y_t = D u_t + sum_{s <= t} kernel_{t-s} u_s  ( + sum_{s > t} back_{s-t-1} u_s )

The convolutional form of a time-invariant state space: O(L log L) by the fast Fourier transform, zero-padded
against circular wrap-around.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._chunks import causal_parts
from longscan.ops._derivatives import composed, register_second

# --- 1. the equation ----------------------------------------------------------------------------------------


def long_conv_ref(u: Tensor, kernel: Tensor, D: Tensor | None = None, back: Tensor | None = None) -> Tensor:
    """Return the result of :func:`long_conv`, by the sums, with a (channels, seq_len, seq_len) matrix."""
    time = torch.arange(u.shape[1], device=u.device)
    lag = time[:, None] - time
    matrix = _entries(kernel, lag)
    if back is not None:
        matrix = matrix + _entries(back, -lag - 1)
    y = torch.einsum("cts,bsc->btc", matrix, u)
    return y if D is None else y + D * u


def _entries(kernel: Tensor, lag: Tensor) -> Tensor:
    """Return the kernel's values (channels, ...) at each lag, zero outside it."""
    inside = (lag >= 0) & (lag < kernel.shape[1])
    return kernel[:, lag.clamp(0, kernel.shape[1] - 1)] * inside


# --- 2. the op ----------------------------------------------------------------------------------------------


def long_conv(u: Tensor, kernel: Tensor, D: Tensor | None = None, back: Tensor | None = None) -> Tensor:
    """Return the convolution of each channel with its own causal filter, and with an anticausal one if given.

    Args:
        u: (batch, seq_len, channels), any float type.
        kernel: (channels, k_len); the first column is the tap of the current step.
        D: (channels,) added to the first column, the direct path.
        back: (channels, k_len) for later steps; the first column is the tap of the next one.

    Returns:
        y: (batch, seq_len, channels) in u's dtype; computed in float32, or in float64 for float64. NaN or
            infinity in u makes its channel of the row NaN from there on, all of it if there is `back`.

    Raises:
        ValueError: shapes do not fit.
    """
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u: expected a non-empty (batch, seq_len, channels), got {tuple(u.shape)}")
    channels = u.shape[2]
    for name, filters in (("kernel", kernel), ("back", back)):
        if filters is not None and (filters.dim() != 2 or len(filters) != channels or 0 in filters.shape):
            got = tuple(filters.shape)
            raise ValueError(f"{name}: expected a non-empty (channels={channels}, k_len), got {got}")
    if D is not None and D.shape != (channels,):
        raise ValueError(f"D: expected shape {(channels,)}, got {tuple(D.shape)}")
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    convolve: Any = _forward if composed() else torch.ops.longscan.long_conv
    y: Tensor = convolve(*(None if t is None else t.to(dtype) for t in (u, kernel, D, back)))
    return y.to(u.dtype)


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor u, Tensor kernel, Tensor? D, Tensor? back"
_lib.define(f"long_conv({_INPUTS}) -> Tensor")
_lib.define(
    f"long_conv_backward({_INPUTS}, Tensor dy) -> (Tensor du, Tensor dkernel, Tensor dD, Tensor dback)"
)

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::long_conv", lib=_lib)
def _(u, kernel, D, back):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape)


@torch.library.register_fake("longscan::long_conv_backward", lib=_lib)
def _(u, kernel, D, back, dy):  # type: ignore[no-untyped-def]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, kernel, D, back))


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):  # type: ignore[no-untyped-def]
    inputs = ctx.saved_tensors
    gradients = torch.ops.longscan.long_conv_backward(*inputs, dy)
    return tuple(g if t is not None else None for g, t in zip(gradients, inputs, strict=True))


def _composite(*inputs: Tensor | None) -> tuple[Tensor]:
    return (_forward(*inputs),)  # type: ignore[arg-type]


torch.library.register_autograd("longscan::long_conv", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::long_conv_backward", _lib, _composite, n_inputs=4)

# --- 5. the implementation ----------------------------------------------------------------------------------


def _transform_length(n: int) -> int:
    """Return the smallest even 2^a 3^b 5^c that is at least n, a length at which the FFT is fast."""
    best = 2 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three * max(2, 1 << (-(-n // three) - 1).bit_length()))
            three *= 3
        five *= 5
    return best


def _spectrum(kernel: Tensor, D: Tensor | None, back: Tensor | None, seq_len: int, n: int) -> Tensor:
    """Return the transform of both filters and D, (channels, n / 2 + 1); later steps are negative lags."""
    ahead = kernel[:, :seq_len]
    if back is None or seq_len == 1:
        both = F.pad(ahead, (0, n - ahead.shape[1]))
    else:
        behind = back[:, : seq_len - 1].flip(1)
        both = torch.cat([F.pad(ahead, (0, n - ahead.shape[1] - behind.shape[1])), behind], 1)
    spectrum: Tensor = torch.fft.rfft(both)
    return spectrum if D is None else spectrum + D[:, None]


def _forward(u: Tensor, kernel: Tensor, D: Tensor | None, back: Tensor | None) -> Tensor:
    seq_len = u.shape[1]
    n = _transform_length(2 * seq_len - 1)
    finite, after = (u, None) if back is not None else causal_parts(u, 1)
    spectrum = torch.fft.rfft(finite.transpose(1, 2), n=n) * _spectrum(kernel, D, back, seq_len, n)
    y: Tensor = torch.fft.irfft(spectrum, n=n)[..., :seq_len].transpose(1, 2)
    return y.contiguous() if after is None else y + after


def _backward(
    u: Tensor, kernel: Tensor, D: Tensor | None, back: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients: dy correlated with the filters, and with u."""
    seq_len = u.shape[1]
    n = _transform_length(2 * seq_len - 1)
    dY = torch.fft.rfft(dy.transpose(1, 2), n=n)
    du = torch.fft.irfft(dY * _spectrum(kernel, D, back, seq_len, n).conj(), n=n)[..., :seq_len]
    U = torch.fft.rfft(u.transpose(1, 2), n=n)
    lags = torch.fft.irfft(
        (dY * U.conj()).sum(0), n=n
    )  # (channels, n): of each lag, negative ones at the end
    empty = u.new_empty(0)
    dkernel = F.pad(lags[:, : min(seq_len, kernel.shape[1])], (0, max(0, kernel.shape[1] - seq_len)))
    dback = empty
    if back is not None:
        width = min(seq_len - 1, back.shape[1])
        dback = F.pad(lags[:, n - width :].flip(1), (0, back.shape[1] - width))
    return du.transpose(1, 2).contiguous(), dkernel, empty if D is None else lags[:, 0].clone(), dback


_lib.impl("long_conv", _forward, "CompositeExplicitAutograd")
_lib.impl("long_conv_backward", _backward, "CompositeExplicitAutograd")
