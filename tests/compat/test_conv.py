"""causal_conv1d and its C functions against the definition, token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat import conv_kernels
from longscan.compat.conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

BATCH, CHANNELS, WIDTH, SEQ_LEN = 2, 5, 4, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def inputs() -> dict[str, Tensor]:
    return {
        "x": normal(BATCH, CHANNELS, SEQ_LEN, seed=1),
        "weight": normal(CHANNELS, WIDTH, seed=2),
        "bias": normal(CHANNELS, seed=3),
        "initial_states": normal(BATCH, CHANNELS, WIDTH - 1, seed=4),
    }


def literal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """The outputs and the last inputs, tap by tap."""
    past = x.new_zeros(*x.shape[:2], WIDTH - 1) if initial_states is None else initial_states
    line = torch.cat([past, x], -1)
    ys = []
    for t in range(x.shape[-1]):
        y = sum(weight[:, k] * line[..., t + k] for k in range(WIDTH))
        y = y if bias is None else y + bias
        ys.append(F.silu(y) if activation else y)
    return torch.stack(ys, -1), line[..., -(WIDTH - 1) :]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("seq_len", [1, 2, SEQ_LEN])
def test_conv_states_and_gradients(activation: str | None, seq_len: int) -> None:
    named = inputs() | {"x": normal(BATCH, CHANNELS, seq_len, seed=5)}
    results = []
    for function, settings in ((causal_conv1d_fn, {"return_final_states": True}), (literal, {})):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in named.items()}
        y, states = function(**leaves, activation=activation, **settings)  # type: ignore[operator]
        loss = (y * torch.arange(y.numel()).view_as(y)).sum() + states.square().sum()
        results.append((y, states, *torch.autograd.grad(loss, list(leaves.values()))))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected)


def test_conv_writes_final_states_where_it_is_told() -> None:
    out = torch.full((BATCH, CHANNELS, WIDTH - 1), torch.nan, dtype=torch.float64)
    _, states = causal_conv1d_fn(
        **inputs(), return_final_states=True, final_states_out=out, activation="silu"
    )
    assert states is out
    close(out, literal(**inputs())[1])


def test_conv_keeps_packed_sequences_apart() -> None:
    named = inputs()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [4, 4, 5, 5, 5, 6, 6, 6, 6]], dtype=torch.int32)
    y = causal_conv1d_fn(named["x"], named["weight"], named["bias"], seq_idx=seq_idx, activation="silu")
    for row in range(BATCH):
        for value in seq_idx[row].unique():
            own = seq_idx[row] == value
            expected, _ = literal(named["x"][row : row + 1, :, own], named["weight"], named["bias"])
            close(y[row : row + 1, :, own], expected)


def test_conv_keeps_the_order_in_memory_and_the_dtype() -> None:
    named = inputs()
    weights = named["weight"].float(), named["bias"].float()
    x = named["x"].bfloat16()
    assert causal_conv1d_fn(x, *weights).is_contiguous()
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = causal_conv1d_fn(last, *weights)
    assert (y.stride(1), y.dtype) == (1, torch.bfloat16)


def test_conv_takes_the_activation_fourth() -> None:
    named = inputs()
    arguments = named["x"], named["weight"], named["bias"]
    close(causal_conv1d_fn(*arguments, "silu"), literal(*arguments)[0])


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_update])
def test_conv_refuses_other_activations(function: Any) -> None:
    named = inputs()
    with pytest.raises(NotImplementedError, match="expected None, 'silu' or 'swish', got 'gelu'"):
        function(named["x"], named["weight"].new_zeros(BATCH, CHANNELS, 3), named["bias"], activation="gelu")


@pytest.mark.parametrize("state_len", [WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_update_continues_a_sequence(state_len: int, n: int) -> None:
    """n tokens at a time; 0 means one token without an axis for it."""
    named = inputs()
    past = normal(BATCH, CHANNELS, state_len, seed=6)
    state = past.clone()
    initial = past[..., state_len - (WIDTH - 1) :]
    expected, _ = literal(named["x"], named["weight"], named["bias"], initial)
    step = max(n, 1)
    for start in range(0, SEQ_LEN, step):
        x = named["x"][..., start : start + step] if n else named["x"][..., start]
        y = causal_conv1d_update(x, state, named["weight"], named["bias"], "silu")
        assert y.shape == x.shape
        close(y.view(BATCH, CHANNELS, -1), expected[..., start : start + step])
    close(state, torch.cat([past, named["x"]], -1)[..., -state_len:])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_update_of_a_ring(n: int) -> None:
    """The state as a ring whose rows are at different positions."""
    named, state_len, offset = inputs(), 5, torch.tensor([7, 11], dtype=torch.int32)
    line = normal(BATCH, CHANNELS, 20, seed=7)
    ring = torch.zeros(BATCH, CHANNELS, state_len, dtype=torch.float64)
    for row in range(BATCH):
        for t in range(int(offset[row]) - state_len, int(offset[row])):
            ring[row, :, t % state_len] = line[row, :, t]
    x = torch.stack([line[row, :, offset[row] : offset[row] + n] for row in range(BATCH)])
    y = causal_conv1d_update(x, ring, named["weight"], named["bias"], None, cache_seqlens=offset)
    for row in range(BATCH):
        start = int(offset[row])
        past = line[row : row + 1, :, start - (WIDTH - 1) : start]
        expected, _ = literal(x[row : row + 1], named["weight"], named["bias"], past, None)
        close(y[row : row + 1], expected)
        for t in range(start + n - state_len, start + n):
            close(ring[row, :, t % state_len], line[row, :, t])


def test_update_of_chosen_rows() -> None:
    named = inputs()
    states, rows = normal(4, CHANNELS, WIDTH, seed=8), torch.tensor([2, 0], dtype=torch.int32)
    before = states.clone()
    y = causal_conv1d_update(
        named["x"], states, named["weight"], named["bias"], "silu", conv_state_indices=rows
    )
    close(y, literal(named["x"], named["weight"], named["bias"], before[[2, 0], :, 1:])[0])
    close(states[[2, 0]], named["x"][..., -WIDTH:])
    assert torch.equal(states[[1, 3]], before[[1, 3]])


def test_update_refuses_a_short_state() -> None:
    named = inputs()
    with pytest.raises(ValueError, match=r"conv_state: expected .*at least 3.*, got"):
        causal_conv1d_update(named["x"], named["x"][..., :2], named["weight"])


def test_varlen_states() -> None:
    x, bounds = normal(9, CHANNELS), torch.tensor([0, 2, 8, 9])
    states = causal_conv1d_varlen_states(x, bounds, 4)
    assert states.shape == (3, CHANNELS, 4)
    for index, (a, b) in enumerate([(0, 2), (2, 8), (8, 9)]):
        own = x[a:b].T[:, -4:]
        close(states[index], F.pad(own, (4 - own.shape[1], 0)))


# the C functions


def expected_gradients(dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor, ...]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs().items()}
    y, states = literal(**leaves)
    outputs, weights = ([y], [dout]) if dfinal is None else ([y, states], [dout, dfinal])
    return torch.autograd.grad(outputs, list(leaves.values()), weights)


def test_forward_of_every_version() -> None:
    x, weight, bias, initial = inputs().values()
    plain, (continued, states) = literal(x, weight, bias)[0], literal(x, weight, bias, initial)
    forward = conv_kernels.causal_conv1d_fwd
    close(forward(x, weight, bias, True), plain)
    close(forward(x, weight, bias, None, True), plain)
    final, out = torch.empty_like(initial), torch.empty_like(x)
    close(forward(x, weight, bias, None, initial, final, True), continued)
    close(final, states)
    assert forward(x, weight, bias, None, initial, out, None, True) is None
    close(out, continued)
    with pytest.raises(TypeError, match="expected 4, 5, 7 or 8 arguments, got 6"):
        forward(x, weight, bias, None, None, True)


def test_backward_of_every_version() -> None:
    x, weight, bias, initial = inputs().values()
    dout, dfinal = normal(*x.shape, seed=9), normal(*initial.shape, seed=10)
    backward, dx = conv_kernels.causal_conv1d_bwd, torch.empty_like(x)
    expected = expected_gradients(dout, dfinal)
    found = backward(x, weight, bias, dout, None, initial, dfinal, dx, True, True)
    assert found[0] is dx
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    buffers = [torch.empty_like(tensor) for tensor in (x, weight, bias, initial)]
    assert backward(x, weight, bias, dout, None, initial, dfinal, *buffers, True) is None
    for ours, theirs in zip(buffers, expected, strict=True):
        close(ours, theirs)
    older = backward(x, weight, bias, dout, None, torch.empty_like(x), True)
    oldest = backward(x, weight, bias, dout, None, True)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    plain = torch.autograd.grad(literal(*leaves)[0], leaves, dout)
    for gradients in (older, oldest):
        for ours, theirs in zip(gradients, plain, strict=True):
            close(ours, theirs)
    with pytest.raises(TypeError, match="expected 6, 7, 10 or 12 arguments, got 8"):
        backward(x, weight, bias, dout, None, None, None, True)


def test_update_of_every_version() -> None:
    x, weight, bias, _ = inputs().values()
    states = [normal(BATCH, CHANNELS, WIDTH, seed=11) for _ in range(3)]
    expected = literal(x, weight, bias, states[0][..., 1:])[0]
    update, out = conv_kernels.causal_conv1d_update_kernel, torch.empty_like(x)
    close(update(x, states[0], weight, bias, True), expected)
    close(update(x, states[1], weight, bias, True, None, None), expected)
    assert update(x, states[2], weight, bias, out, True, None, None) is None
    close(out, expected)
    with pytest.raises(TypeError, match="expected 5 to 8 arguments, got 4"):
        update(x, states[0], weight, True)


def test_functions_for_extensions() -> None:
    x, weight, bias, initial = inputs().values()
    final, dout = torch.empty_like(initial), normal(*x.shape, seed=12)
    y = conv_kernels.causal_conv1d_fwd_function(x, weight, bias, None, initial, final, True)
    expected, states = literal(x, weight, bias, initial)
    close(y, expected)
    close(final, states)
    found = conv_kernels.causal_conv1d_bwd_function(
        x, weight, bias, dout, None, initial, None, None, False, True
    )
    assert found[3] is None
    for ours, theirs in zip(found[:3], expected_gradients(dout, None)[:3], strict=True):
        close(ours, theirs)
    state = initial.clone()
    close(conv_kernels.causal_conv1d_update_function(x, state, weight, bias, True), expected)
