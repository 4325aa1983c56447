"""causal_conv1d.cpp_functions and the C module causal_conv1d_cuda: positional functions of several versions.

The versions of a function differ in their number of arguments, which distinguishes them.
"""

import torch
from torch import Tensor

from longscan.compat.checks import expect, requires_tensors
from longscan.compat.conv import causal_conv1d_update, check_convolution, convolve

__all__ = [
    "causal_conv1d_bwd",
    "causal_conv1d_bwd_function",
    "causal_conv1d_fwd",
    "causal_conv1d_fwd_function",
    "causal_conv1d_update_function",
    "causal_conv1d_update_kernel",
]

Argument = Tensor | bool | None
BUFFERS = ("dx", "dweight", "dbias", "dinitial_states")


@requires_tensors
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """Return the convolution (batch, channels, seq_len), and write the final states, if requested."""
    shape = check_convolution(x, weight, bias, seq_idx, initial_states)
    expect({}, final_states_out=(final_states_out, shape))
    with torch.no_grad():
        y, states = convolve(x, weight, bias, seq_idx, initial_states, silu_activation)
        if final_states_out is not None:
            final_states_out.copy_(states)
    return y


@requires_tensors
def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and the initial states; dx is written in place if given."""
    states = check_convolution(x, weight, bias, seq_idx, initial_states)
    expect({}, dout=(dout, x.shape), dfinal_states=(dfinal_states, states), dx=(dx, x.shape))
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_states)
        ]
        x_leaf, weight_leaf, bias_leaf, initial = leaves
        assert x_leaf is not None
        assert weight_leaf is not None
        outputs = convolve(x_leaf, weight_leaf, bias_leaf, seq_idx, initial, silu_activation)
    pairs = [
        (y, dy.to(y.dtype)) for y, dy in zip(outputs, (dout, dfinal_states), strict=True) if dy is not None
    ]
    present = [t for t in leaves if t is not None]
    found = torch.autograd.grad([y for y, _ in pairs], present, [dy for _, dy in pairs], allow_unused=True)
    gradients = iter(found)
    new_dx, dweight, dbias, dinitial = (None if t is None else next(gradients) for t in leaves)
    assert new_dx is not None
    assert dweight is not None
    dx = new_dx if dx is None else dx.copy_(new_dx)
    return dx, dweight, dbias, dinitial if return_dinitial_states else None


@requires_tensors
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Return the outputs for the next inputs; see `causal_conv1d_update`."""
    activation = "silu" if silu_activation else None
    with torch.no_grad():
        return causal_conv1d_update(
            x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )


def causal_conv1d_fwd(*arguments: Argument) -> Tensor | None:
    """Return the convolution, or with 8 arguments write it into the sixth.

    Args:
        *arguments: x, weight, bias[, seq_idx[, initial_states[, out], final_states_out]], silu.
    """
    x, weight, bias, *rest, silu = arguments
    if len(rest) not in (0, 1, 3, 4):
        raise _wrong_count("causal_conv1d_fwd", "4, 5, 7 or 8", len(arguments))
    out = rest.pop(2) if len(rest) == 4 else None
    seq_idx, initial, final = [*rest, None, None, None][:3]
    if isinstance(out, Tensor):
        expect({}, x=(x, "batch channels seq_len"), out=(out, x.shape))  # type: ignore[arg-type, union-attr]
    y = causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, final, silu)  # type: ignore[arg-type]
    if not isinstance(out, Tensor):
        return y
    out.copy_(y)
    return None


def causal_conv1d_bwd(*arguments: Argument) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of x, weight and bias, since 1.2 of the initial states too.

    Args:
        *arguments: x, weight, bias, dout, and then dx, silu, with or without seq_idx before dx (1.0, 1.1);
            seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu (1.2 to 1.5); or seq_idx,
            initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu, which fills these four.
    """
    x, weight, bias, dout, *rest, silu = arguments
    if len(rest) not in (1, 2, 5, 7):
        raise _wrong_count("causal_conv1d_bwd", "6, 7, 10 or 12", len(arguments))
    if len(rest) <= 2:
        seq_idx, dx = [None, *rest][-2:]
        rest = [seq_idx, None, None, dx, False]
    buffers = rest[3:] if len(rest) == 7 else None
    seq_idx, initial, dfinal, dx = rest[:4]
    wants = initial is not None if buffers else bool(rest[4])
    for name, buffer, like in zip(BUFFERS, buffers or (), (x, weight, bias, initial), strict=False):
        if isinstance(buffer, Tensor) and isinstance(like, Tensor):
            expect({}, **{name: (buffer, like.shape)})
    gradients = causal_conv1d_bwd_function(
        *(x, weight, bias, dout, seq_idx, initial, dfinal, dx, wants, silu)  # type: ignore[arg-type]
    )
    if buffers is None:
        return gradients if len(arguments) == 10 else gradients[:3]
    for buffer, gradient in zip(buffers, gradients, strict=True):
        if isinstance(buffer, Tensor) and gradient is not None:
            buffer.copy_(gradient)
    return None


def causal_conv1d_update_kernel(*arguments: Argument) -> Tensor | None:
    """Return the outputs for the next inputs, or with 8 arguments write them into the fifth.

    Args:
        *arguments: x, conv_state, weight, bias[, out], silu[, cache_seqlens[, conv_state_indices]].
    """
    if not 5 <= len(arguments) <= 8:
        raise _wrong_count("causal_conv1d_update", "5 to 8", len(arguments))
    rest = list(arguments)
    out = rest.pop(4) if len(rest) == 8 else None
    if isinstance(out, Tensor):
        expect({}, out=(out, rest[0].shape))  # type: ignore[union-attr]
    y = causal_conv1d_update_function(*rest)  # type: ignore[arg-type]
    if not isinstance(out, Tensor):
        return y
    out.copy_(y)
    return None


def _wrong_count(name: str, expected: str, got: int) -> TypeError:
    return TypeError(f"causal_conv1d_cuda.{name}: expected {expected} arguments, got {got}")
