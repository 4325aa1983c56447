"""causal_conv1d, computed by longscan's convolution; its layout is (batch, channels, seq_len)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import INTEGER, Shape, check_boundaries, check_rows, expect, requires_tensors

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
]


@requires_tensors
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the causal depthwise convolution, and on request its final states.

    Args:
        x: (batch, channels, seq_len).
        weight: (channels, width).
        bias: (channels,).
        seq_idx: (batch, seq_len), for packed rows. A string is the activation, which versions before 1.1 have
            in this position.
        initial_states: (batch, channels, width - 1).
        return_final_states: whether to return the last width - 1 inputs.
        final_states_out: (batch, channels, width - 1), receives them.
        activation: None, "silu" or "swish".

    Returns:
        (batch, channels, seq_len) in x's dtype and memory order; the final states are (batch, channels,
        width - 1) in x's dtype.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    with_silu = silu(activation)
    shape = check_convolution(x, weight, bias, seq_idx, initial_states)
    expect({}, final_states_out=(final_states_out, shape))
    y, states = convolve(x, weight, bias, seq_idx, initial_states, with_silu)
    if not return_final_states:
        return y
    if final_states_out is None:
        return y, states
    with torch.no_grad():
        final_states_out.copy_(states)
    return y, final_states_out


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    with_silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the final states of `causal_conv1d_fn`."""
    check_convolution(x, weight, bias, seq_idx, initial_states)
    past = None if initial_states is None else initial_states.transpose(1, 2)
    activation = "silu" if with_silu else None
    y, states = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation, past, seq_idx)
    y = y.transpose(1, 2)
    if x.is_contiguous() or x.stride(1) != 1:
        y = y.contiguous()  # the order of x in memory: callers take views
    return y, states.transpose(1, 2).to(x.dtype)


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None
) -> Shape:
    """Return the shape of the final states; the arguments are those of `causal_conv1d_fn`.

    Raises:
        ValueError: a shape doesn't fit.
        TypeError: a dtype doesn't.
    """
    sizes: dict[str, int] = {}
    expect(sizes, x=(x, "batch channels seq_len"), weight=(weight, "channels width"), bias=(bias, "channels"))
    states = (sizes["batch"], sizes["channels"], sizes["width"] - 1)
    expect(sizes, initial_states=(initial_states, states))
    expect(sizes, INTEGER, seq_idx=(seq_idx, "batch seq_len"))
    return states


def silu(activation: str | None) -> bool:
    """Return whether an activation is SiLU.

    Raises:
        NotImplementedError: it is none of None, "silu" and "swish".
    """
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


@requires_tensors
def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the result of `causal_conv1d_fn`; this one has no seq_idx."""
    return causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
    )


@requires_tensors
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Return the outputs for the next inputs, updating the state in place; without gradients of the state.

    Args:
        x: (batch, channels) or (batch, channels, seq_len).
        conv_state: (batch, channels, state_len), the last inputs, with state_len >= width - 1.
        weight: (channels, width).
        bias: (channels,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,), with which the state is a ring: the next input goes to this index modulo
            state_len.
        conv_state_indices: (batch,), the rows of a larger conv_state that belong to this batch, each once. A
            negative one is padding: no state changes, and the output is zero.

    Returns:
        Of x's shape and dtype.
    """
    with_silu = silu(activation)
    _check_update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    if conv_state_indices is not None:
        own = check_rows("conv_state_indices", conv_state_indices, x.shape[0], conv_state.shape[0])
        if not own.all():
            y = torch.zeros_like(x)
            seqlens = None if cache_seqlens is None else cache_seqlens[own]
            y[own] = causal_conv1d_update(
                x[own], conv_state, weight, bias, activation, seqlens, conv_state_indices[own]
            )
            return y
    inputs, width = x if x.dim() == 3 else x.unsqueeze(-1), weight.shape[1]
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    state_len = state.shape[-1]
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if cache_seqlens is None:
        window = torch.cat([state, inputs.to(state.dtype)], -1)
        past, new_state = window[..., :state_len], window[..., -state_len:]
    else:
        past, new_state = _ring(state, inputs.to(state.dtype), cache_seqlens.long(), width)
    past = past[..., past.shape[-1] - (width - 1) :]
    taps = torch.cat([past.to(dtype), inputs.to(dtype)], -1).unfold(-1, width, 1)
    y = (taps * weight.to(dtype)[:, None]).sum(-1)  # (batch, channels, seq_len)
    y = y if bias is None else y + bias.to(dtype)[:, None]
    y = (F.silu(y) if with_silu else y).to(x.dtype)
    with torch.no_grad():
        if conv_state_indices is None:
            conv_state.copy_(new_state)
        else:
            conv_state[conv_state_indices.long()] = new_state
    return y.view(x.shape)


causal_conv1d_update_ref = causal_conv1d_update


def _check_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    expect(sizes, x=(x, "batch channels | batch channels seq_len"))
    rows = "batch" if conv_state_indices is None else "rows"
    expect(
        sizes,
        weight=(weight, "channels width"),
        bias=(bias, "channels"),
        conv_state=(conv_state, f"{rows} channels state_len"),
    )
    if sizes["state_len"] < sizes["width"] - 1:
        raise ValueError(
            f"conv_state: expected a length of at least {sizes['width'] - 1}, got {sizes['state_len']}"
        )
    expect(sizes, INTEGER, cache_seqlens=(cache_seqlens, "batch"))


def _ring(state: Tensor, x: Tensor, position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the last width - 1 inputs, oldest first, and the ring with x in it."""
    state_len, seq_len = state.shape[-1], x.shape[-1]

    def at(steps: Tensor) -> Tensor:
        return ((position[:, None] + steps) % state_len)[:, None].expand(-1, state.shape[1], -1)

    past = state.gather(2, at(torch.arange(1 - width, 0, device=x.device)))
    n = min(seq_len, state_len)  # earlier ones would be overwritten
    last = torch.arange(seq_len - n, seq_len, device=x.device)
    return past, state.scatter(2, at(last), x[..., seq_len - n :])


@requires_tensors
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Return the last state_len inputs of each sequence of a packed row, after zeros if it is shorter.

    Args:
        x: (total_len, channels).
        cu_seqlens: (n_sequences + 1,) the boundaries, from 0.
        state_len: inputs per sequence.

    Returns:
        (n_sequences, channels, state_len).
    """
    expect({}, x=(x, "total_len channels"))
    check_boundaries("cu_seqlens", cu_seqlens, x.shape[0])
    ends = cu_seqlens.long()
    index = ends[1:, None] + torch.arange(-state_len, 0, device=x.device)  # (n_sequences, state_len)
    own = index >= ends[:-1, None]
    return x[index.clamp(min=0)].masked_fill(~own[..., None], 0.0).transpose(1, 2)
