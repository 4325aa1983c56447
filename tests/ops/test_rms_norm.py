"""RMSNorm and its gate against torch's own operations: values and gradients, at odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from op_checks import TOLERANCE, check
from op_inputs import tensor

KINDS = {
    "plain": {"gated": False},
    "no-weight": {"gated": False, "weight": False},
    "gate-first": {"gated": True},
    "gate-last": {"gated": True, "norm_first": True},
    "groups": {"gated": True, "n_groups": 3},
    "groups-gate-last": {"gated": True, "n_groups": 3, "norm_first": True},
    "gate-last-no-weight": {"gated": True, "norm_first": True, "weight": False},
}


def inputs_of(shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    g, settings = torch.Generator().manual_seed(sum(shape)), dict(KINDS[kind])
    inputs: dict[str, Any] = {"x": tensor(g, *shape), "weight": None, "eps": 1e-3}
    if settings.pop("weight", True):
        inputs["weight"] = tensor(g, shape[-1])
    if settings.pop("gated"):
        inputs["z"] = tensor(g, *shape)
    return inputs | settings


def paired(function: Any) -> Any:
    """Return the function with a second output, as `check` expects."""
    return lambda **inputs: (function(**inputs), inputs["x"].new_zeros(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 18), (2, 37, 48), (1, 2, 1500, 33), (70, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_values_and_gradients(backend: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check(paired(ops.rms_norm), paired(ops.rms_norm_ref), inputs_of(shape, kind), dtype)


@pytest.mark.parametrize("kind", ["plain", "gate-last"])
def test_strided_rows_give_the_same_bits(backend: str, kind: str) -> None:
    inputs = inputs_of((2, 9, 33), kind)
    wide = {n: torch.cat([t, t], -1)[..., :33] for n, t in inputs.items() if n in "xz"}
    assert not any(t.is_contiguous() for t in wide.values())
    exact = 0.0 if backend != "reference" else 1e-6  # torch may sum in another order
    torch.testing.assert_close(ops.rms_norm(**inputs | wide), ops.rms_norm(**inputs), rtol=0, atol=exact)
    swapped = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in inputs.items() if n in "xz"}
    torch.testing.assert_close(ops.rms_norm(**inputs | swapped), ops.rms_norm(**inputs), rtol=0, atol=exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    inputs = inputs_of((4, 200), "gate-first")
    inputs |= {n: inputs[n].to(dtype) for n in "xz"}
    y = ops.rms_norm(**inputs)
    assert y.dtype == dtype
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    expected = ops.rms_norm_ref(**wide)
    scale = float(expected.abs().max())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_second_derivatives() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, z = (tensor(g, *s, dtype=torch.float64).requires_grad_() for s in ((2, 6), (6,), (2, 6)))
    for first in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda x, w, z, first=first: ops.rms_norm(x, w, 0.1, z, 2, first), (x, weight, z)
        )


def test_bits_do_not_depend_on_threads_or_neighbours(backend: str) -> None:
    inputs = inputs_of((1, 2, 1500, 33), "gate-first")
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "z")]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y = ops.rms_norm(**inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":
        assert all(map(torch.equal, *results))
        alone = ops.rms_norm(**inputs | {n: inputs[n][:, 1, 7:8] for n in "xz"})
        assert torch.equal(alone, results[0][0][:, 1, 7:8])


def test_nothing_to_normalise() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(4), 1e-5)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(3)}, "weight: expected shape"),
        ({"z": torch.ones(2, 5)}, "z: expected shape"),
        ({"n_groups": 4}, "a multiple of 4"),
        ({"x": torch.ones(())}, "x: expected"),
    ],
    ids=["weight", "gate", "groups", "scalar"],
)
def test_wrong_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**inputs_of((2, 6), "plain") | changes)
