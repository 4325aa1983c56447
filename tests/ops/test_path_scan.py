"""The scan along paths against its reference: forward, gradients, odd sizes, any paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from op_inputs import path_inputs

SIZES = {
    "one": (1, 1, 1, 1, 1),
    "odd": (2, 37, 4, 5, 1),
    "tiles": (1, 70, 2, 100, 16),
    "odd-state": (3, 33, 3, 17, 11),
    "beyond-native": (1, 5, 2, 3, 260),
}


def run(op: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs all of it."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    y = op(**{**inputs, **leaves})
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), list(leaves.values()))]


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("case", SIZES)
def test_reference(backend: str, case: str, shared: bool, extras: bool) -> None:
    inputs = path_inputs(SIZES[case], shared, extras)
    expected = run(ops.path_scan_ref, wide(inputs))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        ours = run(ops.path_scan, wide(inputs) if dtype == torch.float64 else inputs)
        for got, truth in zip(ours, expected, strict=True):
            assert got.dtype == dtype
            assert (got.double() - truth).abs().max() <= tolerance * max(1.0, float(truth.abs().max()))


def test_one_straight_path_is_the_selective_scan(backend: str) -> None:
    inputs = path_inputs((2, 45, 1, 9, 3), True, True)
    inputs["paths"] = torch.arange(45)[None]
    y, _ = ops.selective_scan(
        inputs["u"],
        inputs["dt"][:, :, 0],
        inputs["A"][0],
        inputs["B"],
        inputs["C"],
        inputs["D"][0],
        None,
        inputs["dt_bias"][0],
        True,
    )
    torch.testing.assert_close(ops.path_scan(**inputs), y, rtol=1e-6, atol=1e-6)


def test_strides_do_not_matter() -> None:
    inputs = path_inputs((2, 45, 3, 9, 2), True, True)
    strided = {
        "u": inputs["u"].repeat_interleave(2, 2)[..., ::2],
        "dt": inputs["dt"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        **{name: torch.cat([inputs[name], inputs[name]], 3)[..., 2:] for name in ("B", "C")},
    }
    assert not any(x.is_contiguous() for x in strided.values())
    ours, expected = run(ops.path_scan, {**inputs, **strided}), run(ops.path_scan, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_moving_positions_and_paths_together_changes_nothing(backend: str) -> None:
    inputs = path_inputs((2, 45, 3, 9, 3), False, True)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    moved = {name: inputs[name][:, order] for name in ("u", "dt", "B", "C")}
    moved["paths"] = torch.argsort(order)[inputs["paths"]]
    torch.testing.assert_close(ops.path_scan(**{**inputs, **moved}), ops.path_scan(**inputs)[:, order])


def test_threads_do_not_change_bits() -> None:
    inputs = path_inputs((2, 67, 4, 130, 2), True, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(ops.path_scan, inputs)
        torch.set_num_threads(3)
        three = run(ops.path_scan, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_half_inputs_keep_a_float32_state(backend: str) -> None:
    inputs = path_inputs((1, 70, 2, 8, 4), True, True)
    half = {**inputs, **{name: inputs[name].bfloat16() for name in ("u", "dt", "B", "C")}}
    rounded = {**inputs, **{name: half[name].float() for name in ("u", "dt", "B", "C")}}
    y = ops.path_scan(**half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.path_scan(**rounded).bfloat16())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_second_derivatives_and_forward_mode() -> None:
    inputs = wide(path_inputs((1, 5, 2, 2, 2), True, True))
    names = [name for name in inputs if name != "paths"]

    def op(*tensors: Tensor) -> Tensor:
        return ops.path_scan(**dict(zip(names, tensors, strict=True)), paths=inputs["paths"])

    leaves = tuple(inputs[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_second_derivatives_of_the_kernel() -> None:
    inputs = path_inputs((1, 6, 2, 3, 2), True, True)

    def second(inputs: dict[str, Any]) -> Tensor:
        u = inputs["u"].clone().requires_grad_()
        y = ops.path_scan(**{**inputs, "u": u})
        (first,) = torch.autograd.grad((y**2).sum(), u, create_graph=True)
        (grad,) = torch.autograd.grad((first**2).sum(), u)
        return grad

    exact = second(wide(inputs))
    assert (second(inputs).double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_opcheck() -> None:
    inputs = path_inputs((2, 35, 2, 5, 3), True, True)
    tensors = [x.clone().requires_grad_() for name, x in inputs.items() if name != "paths"]
    arguments = (*tensors, inputs["paths"].int(), True)
    torch.library.opcheck(torch.ops.longscan.path_scan.default, arguments)


def test_compile() -> None:
    inputs = path_inputs((1, 33, 2, 4, 1), True, True)
    compiled = torch.compile(ops.path_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), run(ops.path_scan, inputs))


def test_refusals() -> None:
    good = path_inputs((2, 6, 2, 3, 4), True, True)
    for name, bad in (
        ("u", torch.zeros(2, 6, 4)),
        ("dt", torch.zeros(2, 6, 3)),
        ("A", torch.zeros(2, 4, 4)),
        ("B", torch.zeros(2, 6, 4)),
        ("paths", torch.arange(6)[None]),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ops.path_scan(**{**good, name: bad})
    with pytest.raises(TypeError, match="paths: expected int32 or int64"):
        ops.path_scan(**{**good, "paths": good["paths"].float()})
    with pytest.raises(TypeError, match="B: expected real floating point"):
        ops.path_scan(**{**good, "B": good["B"].long()})


@pytest.mark.parametrize("path", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_a_path_must_be_a_permutation(backend: str, path: list[int]) -> None:
    inputs = path_inputs((1, 3, 1, 2, 2), True, True)
    with pytest.raises(ValueError, match="permutations of 0"):
        ops.path_scan(**{**inputs, "paths": torch.tensor([path])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_code_checks_paths_too(dtype: torch.dtype) -> None:
    inputs = path_inputs((1, 4, 2, 3, 2), True, True)
    inputs |= {name: x.to(dtype) for name, x in inputs.items() if name != "paths"}
    compiled = torch.compile(ops.path_scan, backend="aot_eager", fullgraph=True)
    compiled(**inputs)
    for path in ([0, 0, 1, 2], [0, 1, 2, 50_000_000]):
        with pytest.raises(ValueError, match="permutations of 0"):
            compiled(**{**inputs, "paths": torch.tensor([path, path])})
