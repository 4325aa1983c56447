"""State space duality against its literal recurrence: forward, gradients, states, at odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from op_checks import TOLERANCE, check, run
from op_inputs import ssd_inputs

# (batch, seq_len, n_heads, d_head, n_groups, d_state), rank
CASES = {
    "tiny": ((1, 1, 1, 1, 1, 1), 1),
    "odd": ((2, 37, 6, 5, 2, 7), 1),
    "chunk": ((1, 64, 4, 16, 1, 16), 1),
    "beyond": ((1, 65, 4, 32, 4, 33), 1),
    "chunks": ((2, 203, 3, 9, 1, 20), 1),
    "usual": ((1, 150, 4, 64, 1, 128), 1),
    "heads": ((1, 70, 18, 3, 1, 4), 1),  # more than blocks of them
    "rank": ((2, 132, 4, 6, 2, 5), 4),
    "odd-rank": ((1, 69, 2, 8, 1, 16), 3),
    "beyond-native": ((1, 130, 1, 513, 1, 2), 65),
}


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_recurrence(backend: str, case: str, extras: bool) -> None:
    sizes, rank = CASES[case]
    check(ops.ssd, ops.ssd_ref, ssd_inputs(sizes, rank, extras), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_recurrence_f64(case: str) -> None:
    sizes, rank = CASES[case]
    check(ops.ssd, ops.ssd_ref, ssd_inputs(sizes, rank, True), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_keep_a_float32_state(backend: str, dtype: torch.dtype) -> None:
    inputs = ssd_inputs((2, 70, 4, 9, 2, 8), 1, True)
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C")}
    y, state = ops.ssd(**inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    y_ref, state_ref = ops.ssd_ref(**wide)
    torch.testing.assert_close(state.double(), state_ref, rtol=0, atol=1e-5 * float(state_ref.abs().max()))
    torch.testing.assert_close(y.double(), y_ref, rtol=0, atol=TOLERANCE[dtype] * float(y_ref.abs().max()))


def test_strided_inputs_need_no_copy(backend: str) -> None:
    """Slices of one projection give the same bits as contiguous tensors in the kernels."""
    inputs = ssd_inputs((2, 70, 4, 9, 2, 8), 1, True)
    names = ("x", "B", "C")
    wide = torch.cat([inputs[name].flatten(2) for name in names], -1)
    pieces = wide.split([36, 16, 16], -1)
    strided = {n: piece.view(inputs[n].shape) for n, piece in zip(names, pieces, strict=True)}
    assert not any(t.is_contiguous() for t in strided.values())
    y, state = ops.ssd(**inputs)
    y_strided, state_strided = ops.ssd(**{**inputs, **strided})
    exact = 0.0 if backend != "reference" else 1e-5  # torch may sum in another order
    torch.testing.assert_close(y_strided, y, rtol=0, atol=exact)
    torch.testing.assert_close(state_strided, state, rtol=0, atol=exact)


@pytest.mark.parametrize("sizes", [(3, 12, 4, 5, 2, 7), (2, 5, 3, 64, 1, 128)], ids=["odd", "usual"])
def test_steps_equal_the_op(backend: str, sizes: tuple[int, int, int, int, int, int]) -> None:
    inputs = ssd_inputs(sizes, 1, True)
    del inputs["seq_idx"], inputs["rank"]
    with torch.no_grad():
        y, final = ops.ssd(**inputs)
        state = inputs.pop("initial_state").clone()
        for t in range(sizes[1]):
            now = {k: v if k == "D" else v[:, t] for k, v in inputs.items()}
            torch.testing.assert_close(ops.ssd_step(state, **now), y[:, t], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_sequences_are_alone(backend: str) -> None:
    """NaN in one of several packed sequences, and in padding, changes no bit of another's results."""
    inputs = ssd_inputs((1, 150, 4, 9, 2, 8), 1, True)
    inputs["seq_idx"] = torch.tensor([0] * 37 + [-1] * 5 + [1] * 50 + [2] * 58)[None]
    bad = slice(37, 92)  # the padding and the sequence behind it
    poisoned = dict(inputs)
    for name in ("x", "dt", "log_decay", "B", "C"):
        poisoned[name] = inputs[name].clone()
        poisoned[name][:, bad] = torch.nan
    whole, part = (run(ops.ssd, i, double=False) for i in (inputs, poisoned))
    for name in ("y", "dx", "ddt", "dlog_decay", "dB", "dC"):
        assert part[name][:, 42:92].isnan().any(), name
        for rows in (slice(0, 37), slice(92, None)):
            assert torch.equal(part[name][:, rows], whole[name][:, rows]), name
        assert (part[name][:, 37:42] == 0).all(), name
    for name in ("state", "dinitial_state"):
        assert torch.equal(part[name], whole[name]), name


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_the_past_stays_finite(backend: str, value: float, rank: int) -> None:
    """What is not finite reaches its own step and later ones only."""
    inputs = ssd_inputs((1, 100, 2, 9, 1, 8), rank, False)
    whole, _ = ops.ssd(**inputs)
    for name in ("x", "dt", "B", "C", "log_decay"):
        changed = inputs[name].clone()
        changed[:, 52] = value
        y, _ = ops.ssd(**{**inputs, name: changed})
        torch.testing.assert_close(y[:, :52], whole[:, :52], msg=lambda m, n=name: f"{n}: {m}")
        assert not y[:, 52].isfinite().all(), name


def test_a_decay_of_zero_forgets(backend: str) -> None:
    """A log decay of -infinity starts anew, exactly as a new sequence does, and has a gradient of zero."""
    inputs = ssd_inputs((1, 90, 2, 5, 1, 8), 1, False) | {"initial_state": torch.randn(1, 2, 5, 8)}
    inputs["log_decay"][:, 37] = -torch.inf
    found = run(ops.ssd, inputs, double=False)
    inputs["log_decay"][:, 37] = -1.0
    inputs["seq_idx"] = (torch.arange(90) >= 37).long()[None]
    for name, expected in run(ops.ssd_ref, inputs, double=True).items():
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=2e-5 * scale)
    assert (found["dlog_decay"][:, 37] == 0).all()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_threads_do_not_change_a_bit(grad: bool) -> None:
    inputs = ssd_inputs((3, 150, 6, 20, 2, 24), 1, True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([*run(ops.ssd, inputs, False).values()] if grad else [*ops.ssd(**inputs)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives(backend: str) -> None:
    inputs = ssd_inputs((1, 70, 2, 3, 1, 4), 1, True)

    def second(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {
            k: v.to(dtype).requires_grad_()
            for k, v in inputs.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        y, state = function(**{**inputs, **leaves})
        first = torch.autograd.grad(y.square().mean() + state.sum(), list(leaves.values()), create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return list(torch.autograd.grad(total, list(leaves.values())))

    ours, theirs = second(ops.ssd, torch.float32), second(ops.ssd_ref, torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
def test_opcheck(backend: str, extras: bool) -> None:
    names = ("x", "dt", "log_decay", "B", "C", "D", "initial_state", "seq_idx")
    for sizes, rank in (CASES["odd"], CASES["rank"]):
        inputs = ssd_inputs(sizes, rank, extras)
        values = [inputs.get(name) for name in names]
        if extras:
            values[-1] = values[-1].to(torch.int32)
        leaves = [v.requires_grad_() if v is not None and v.is_floating_point() else v for v in values]
        torch.library.opcheck(torch.ops.longscan.ssd.default, (*leaves, rank, True))


def test_compile_fullgraph(backend: str) -> None:
    inputs = ssd_inputs((2, 70, 4, 6, 2, 5), 1, True)

    def loss(x: Tensor) -> Tensor:
        y, state = ops.ssd(**{**inputs, "x": x})
        return y.sum() + state.sum()

    x = inputs["x"].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        (gradient,) = torch.autograd.grad(function(x), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0])
