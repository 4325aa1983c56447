"""Rotation by sums of angles against its equations: values, angles, gradients, at odd sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from op_checks import check
from op_inputs import packed, tensor

# (batch, seq_len, rank, n_heads, n_groups, d_state, n_angles), halves
CASES = {
    "tiny": ((1, 1, 1, 1, 1, 2, 1), False),
    "odd": ((2, 37, 1, 6, 2, 7, 3), False),
    "half": ((2, 40, 1, 3, 1, 64, 16), False),
    "mimo": ((2, 35, 3, 4, 2, 10, 4), True),
    "mimo-odd": ((1, 20, 2, 2, 2, 9, 2), True),
    "mimo-all": ((1, 130, 4, 2, 1, 16, 8), True),
    "long": ((1, 1100, 1, 2, 1, 6, 2), False),  # units of more than 16 tokens
    "many-rows": ((70, 19, 1, 2, 1, 4, 1), False),
    "beyond-native": ((1, 9, 17, 1, 1, 258, 64), True),
}


def inputs_of(case: str, extras: bool) -> dict[str, Any]:
    (batch, seq_len, rank, n_heads, n_groups, d_state, n_angles), halves = CASES[case]
    g = torch.Generator().manual_seed(seq_len)
    inputs = {
        "C": tensor(g, batch, seq_len, rank, n_groups, d_state),
        "B": tensor(g, batch, seq_len, rank, n_groups, d_state),
        "rate": tensor(g, batch, seq_len, n_angles),
        "dt": tensor(g, batch, seq_len, n_heads).abs(),
        "C_bias": tensor(g, rank, n_heads, d_state),
        "B_bias": tensor(g, rank, n_heads, d_state),
        "initial_angle": tensor(g, batch, n_heads, n_angles)
        if extras
        else torch.zeros(batch, n_heads, n_angles),
        "seq_idx": packed(g, batch, seq_len) if extras else None,
        "halves": halves,
    }
    return inputs


def joined(function: Any) -> Any:
    """Return the function with two outputs, as `check` expects; an angle as its point on the circle."""

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, products, angle = function(**inputs)
        return torch.cat([t.flatten(2) for t in (q, k, products)], 2), torch.stack([angle.cos(), angle.sin()])

    return run


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_equations(backend: str, case: str, extras: bool, dtype: torch.dtype) -> None:
    check(joined(ops.rotary), joined(ops.rotary_ref), inputs_of(case, extras), dtype)


@pytest.mark.parametrize("case", ["odd", "mimo", "long"])
def test_pieces_equal_the_whole(backend: str, case: str) -> None:
    inputs = inputs_of(case, True)
    inputs["seq_idx"] = None
    whole = ops.rotary(**inputs)
    pieces, angle, cut = [], inputs["initial_angle"], inputs["C"].shape[1] // 3
    for piece in (slice(0, cut), slice(cut, None)):
        along = {n: inputs[n][:, piece] for n in ("C", "B", "rate", "dt")}
        *outputs, angle = ops.rotary(**inputs | along | {"initial_angle": angle})
        pieces.append(outputs)
    for i, parts in enumerate(zip(*pieces, strict=True)):
        torch.testing.assert_close(torch.cat(parts, 1), whole[i], rtol=0, atol=2e-5)
    torch.testing.assert_close(angle, whole[3], rtol=0, atol=1e-5)


def test_a_long_sum_is_exact(backend: str) -> None:
    """A sum in float32 would be off by more than a thousandth after as many tokens."""
    n = 200_000
    C = torch.tensor([1.0, 0.0]).expand(1, n, 1, 1, 2)
    rate, dt, zero = torch.full((1, n, 1), 0.3), torch.ones(1, n, 1), torch.zeros(1, 1, 2)
    q, _, _, angle = ops.rotary(C, C, rate, dt, zero, zero, torch.zeros(1, 1, 1))
    exact = torch.arange(1, n + 1, dtype=torch.float64) * float(rate[0, 0, 0])
    expected = torch.stack([exact.cos(), exact.sin()], -1)
    torch.testing.assert_close(q[0, :, 0, 0].double(), expected, rtol=0, atol=1e-6)
    assert abs(float(angle)) <= math.pi + 1e-6


def test_padding_may_hold_anything(backend: str) -> None:
    inputs = inputs_of("odd", True)
    padding = inputs["seq_idx"] < 0
    names = ("C", "B", "rate", "dt")
    spoilt = {n: inputs[n].clone() for n in names}
    for tensor_ in spoilt.values():
        tensor_[padding] = math.nan
    leaves = {n: t.requires_grad_() for n, t in spoilt.items()}
    ours, expected = ops.rotary(**inputs | leaves), ops.rotary(**inputs)
    assert all(map(torch.equal, ours, expected))
    gradients = torch.autograd.grad(sum(t.square().sum() for t in ours), list(leaves.values()))
    for gradient in gradients[:2]:
        assert torch.isfinite(gradient).all()
        assert not gradient[padding].any()


def test_bits_do_not_depend_on_threads(backend: str) -> None:
    inputs = inputs_of("long", True)
    leaves = [t.requires_grad_() for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            outputs = ops.rotary(**inputs)
            loss = sum(t.square().sum() for t in outputs[:2]) + outputs[3].sum()
            results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":
        assert all(map(torch.equal, *results))


def test_second_derivatives() -> None:
    inputs = inputs_of("tiny", True) | {"seq_idx": None}
    names = [n for n, t in inputs.items() if isinstance(t, Tensor)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return ops.rotary(**inputs | dict(zip(names, tensors, strict=True)))[:3]

    assert torch.autograd.gradgradcheck(run, tuple(inputs[n].double().requires_grad_() for n in names))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C": torch.ones(2, 37, 7)}, "C: expected a non-empty"),
        ({"B": torch.ones(2, 37, 1, 2, 6)}, "B: expected shape"),
        ({"dt": torch.ones(2, 37, 5)}, "dt: expected"),
        ({"rate": torch.ones(2, 37, 4)}, "1 to 3 angles"),
        ({"C_bias": torch.ones(1, 6, 6)}, "C_bias: expected shape"),
        ({"initial_angle": torch.ones(2, 6, 2)}, "initial_angle: expected shape"),
    ],
    ids=["C", "B", "dt", "rate", "bias", "angle"],
)
def test_wrong_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rotary(**inputs_of("odd", False) | changes)
