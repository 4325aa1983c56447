"""Every op against its literal reference in float64: forward, gradients, states, at odd sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from op_checks import TOLERANCE, check, run
from op_inputs import conv_inputs, scan_inputs

SCANS = {
    "tiny": ((1, 1, 1, 1), 0),
    "odd": ((2, 37, 7, 5), 0),
    "tiles": ((1, 97, 67, 16), 0),
    "blocks": ((2, 33, 200, 3), 0),
    "groups": ((2, 40, 12, 17), 3),
    "wide-state": ((1, 35, 3, 256), 0),
    "beyond-native": ((1, 9, 3, 257), 0),
    "constant": ((2, 65, 5, 6), "constant"),
}


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", SCANS, ids=list(SCANS))
def test_scan(backend: str, case: str, extras: bool) -> None:
    sizes, groups = SCANS[case]
    check(ops.selective_scan, ops.selective_scan_ref, scan_inputs(sizes, groups, extras), torch.float32)


@pytest.mark.parametrize("case", ["odd", "tiles", "groups", "constant"])
def test_scan_f64(case: str) -> None:
    sizes, groups = SCANS[case]
    check(ops.selective_scan, ops.selective_scan_ref, scan_inputs(sizes, groups, True), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scan_half_inputs_keep_a_float32_state(backend: str, dtype: torch.dtype) -> None:
    inputs = scan_inputs((2, 70, 9, 8), 0, True, dtype)
    y, state = ops.selective_scan(**inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    y_ref, state_ref = ops.selective_scan_ref(**exact)
    torch.testing.assert_close(state.double(), state_ref, rtol=0, atol=1e-5 * float(state_ref.abs().max()))
    torch.testing.assert_close(y.double(), y_ref, rtol=0, atol=TOLERANCE[dtype] * float(y_ref.abs().max()))


CONVS = {
    "tiny": (1, 1, 1, 1),
    "odd": (2, 19, 7, 4),
    "wide": (1, 33, 259, 3),
    "eight": (2, 11, 130, 8),
    "nine": (2, 11, 5, 9),
}


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", CONVS, ids=list(CONVS))
def test_conv(backend: str, case: str, extras: bool) -> None:
    check(ops.causal_conv1d, ops.causal_conv1d_ref, conv_inputs(CONVS[case], extras), torch.float32)


def test_conv_f64() -> None:
    check(ops.causal_conv1d, ops.causal_conv1d_ref, conv_inputs((2, 19, 7, 4), True), torch.float64)


def test_strided_inputs_need_no_copy(backend: str) -> None:
    """Slices of a wider projection give the same bits as contiguous tensors in the kernels."""
    inputs = scan_inputs((2, 40, 24, 8), 0, True)
    wide = torch.cat([inputs["u"], inputs["z"], inputs["B"], inputs["C"]], -1)
    u, z, B, C = wide.split([24, 24, 8, 8], -1)
    y, state = ops.selective_scan(**inputs)
    y_strided, state_strided = ops.selective_scan(**{**inputs, "u": u, "z": z, "B": B, "C": C})
    exact = 0.0 if backend != "reference" else 1e-6  # torch may sum in another order
    torch.testing.assert_close(y_strided, y, rtol=0, atol=exact * 10)
    torch.testing.assert_close(state_strided, state, rtol=0, atol=exact)


def test_steps_equal_the_scan(backend: str) -> None:
    inputs = scan_inputs((3, 12, 20, 7), 0, True)
    del inputs["seq_idx"]
    conv = conv_inputs((3, 12, 20, 4), True)
    del conv["seq_idx"]
    y, final = ops.selective_scan(**inputs)
    c, conv_final = ops.causal_conv1d(**conv)
    state, window = inputs.pop("initial_state").clone(), conv.pop("initial_state").clone()
    for t in range(12):
        now = {k: v[:, t] if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        torch.testing.assert_close(ops.selective_scan_step(state, **now), y[:, t], rtol=1e-5, atol=1e-5)
        now = {k: v[:, t] if k == "x" else v for k, v in conv.items()}
        torch.testing.assert_close(ops.causal_conv1d_step(window, **now), c[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)
    assert torch.equal(window, conv_final)


def test_step_with_constant_matrices() -> None:
    inputs = scan_inputs((5, 1, 5, 3), "constant", False)
    y, final = ops.selective_scan(**inputs)
    state = torch.zeros(5, 5, 3)
    B, C = (inputs[name].expand(5, 5, 3) for name in "BC")
    now = {**inputs, "u": inputs["u"][:, 0], "dt": inputs["dt"][:, 0], "B": B, "C": C}
    torch.testing.assert_close(ops.selective_scan_step(state, **now), y[:, 0])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_threads_do_not_change_a_bit(grad: bool) -> None:
    inputs, conv = scan_inputs((3, 130, 300, 16), 0, True), conv_inputs((3, 130, 300, 4), True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            if grad:
                results.append([*run(ops.selective_scan, inputs, False).values()])
                results[-1] += run(ops.causal_conv1d, conv, False).values()
            else:
                results.append([*ops.selective_scan(**inputs), *ops.causal_conv1d(**conv)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def leaves(inputs: dict[str, Any]) -> list[Any]:
    """The op's positional arguments, gradients wanted, in the order of its schema."""
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "seq_idx")
    values = [inputs.get(name) for name in names]
    values[3], values[4] = (M.unsqueeze(2) if M.dim() == 3 else M for M in values[3:5])
    values = [v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    return [*values[:-1], None if values[-1] is None else values[-1].to(torch.int32)]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
def test_opcheck(backend: str, extras: bool) -> None:
    for groups in (0, 2, "constant"):
        arguments = leaves(scan_inputs((2, 35, 6, 3), groups, extras))
        torch.library.opcheck(torch.ops.longscan.selective_scan.default, (*arguments, True, True))
    inputs = conv_inputs((2, 9, 5, 4), extras)
    x, weight, bias, state = (inputs.get(n) for n in ("x", "weight", "bias", "initial_state"))
    wanted = [None if v is None else v.requires_grad_() for v in (x, weight, bias, state)]
    seq_idx = inputs["seq_idx"].to(torch.int32) if extras else None
    torch.library.opcheck(torch.ops.longscan.causal_conv1d.default, (*wanted, seq_idx, extras))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])
def test_gradcheck(extras: bool) -> None:
    for groups in (0, 2, "constant"):
        inputs = scan_inputs((2, 5, 4, 3), groups, extras)
        names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
        rest = {k: v for k, v in inputs.items() if k not in names}

        def scan(
            *values: Tensor, names: list[str] = names, rest: dict[str, Any] = rest
        ) -> tuple[Tensor, Tensor]:
            return ops.selective_scan(**dict(zip(names, values, strict=True)), **rest)

        assert torch.autograd.gradcheck(scan, [inputs[n].double().requires_grad_() for n in names])
    inputs = conv_inputs((2, 6, 3, 4), extras)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def conv(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(**dict(zip(names, values, strict=True)), **rest)

    assert torch.autograd.gradcheck(conv, [inputs[n].double().requires_grad_() for n in names])


def test_compile_fullgraph() -> None:
    inputs, conv = scan_inputs((2, 40, 6, 4), 0, True), conv_inputs((2, 40, 6, 4), True)

    def both(scan: dict[str, Any], conv: dict[str, Any]) -> Tensor:
        x, _ = ops.causal_conv1d(**conv)
        y, state = ops.selective_scan(**{**scan, "u": x})
        return y.sum() + state.sum()

    inputs["dt"].requires_grad_()
    expected = both(inputs, conv)
    (gradient,) = torch.autograd.grad(expected, inputs["dt"])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    actual = compiled(inputs, conv)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs["dt"])[0], gradient)


def test_meta_device() -> None:
    """Shapes come out right where nothing is computed, so no op names a device."""
    inputs = {
        k: v.to("meta") if isinstance(v, Tensor) else v for k, v in scan_inputs((2, 9, 6, 4), 0, True).items()
    }
    y, state = ops.selective_scan(**inputs)
    assert (y.device.type, y.shape, state.shape) == ("meta", (2, 9, 6), (2, 6, 4))
    inputs = {
        k: v.to("meta") if isinstance(v, Tensor) else v for k, v in conv_inputs((2, 9, 6, 4), True).items()
    }
    y, state = ops.causal_conv1d(**inputs)
    assert (y.device.type, y.shape, state.shape) == ("meta", (2, 9, 6), (2, 3, 6))


def test_extreme_step_sizes(backend: str) -> None:
    """Decays that underflow, decays of exactly one, growth that overflows, NaN: all as exp says."""
    dt = torch.tensor([0.0, 1e-30, 1.0, 80.0, 200.0, 1e30, float("nan")]).expand(1, 1, 7).contiguous()
    u, A = torch.zeros_like(dt), torch.full((7, 2), -1.0)
    A[:, 1] = 1.0
    ones = torch.ones(1, 1, 2)
    _, state = ops.selective_scan(u, dt, A, ones, ones, initial_state=torch.ones(1, 7, 2))
    expected = torch.exp(dt[0, 0, :, None].double() * A)
    expected = torch.where(expected > 3.4e38, torch.inf, expected).float()
    torch.testing.assert_close(state[0], expected, rtol=2e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 0, 6)}, "u: expected a non-empty"),
        ({"dt": torch.zeros(2, 9, 5)}, r"dt: expected shape \(2, 9, 6\)"),
        ({"A": torch.zeros(5, 4)}, r"A: expected \(d_inner=6, d_state\)"),
        ({"B": torch.zeros(2, 9, 4, 4)}, "n_groups dividing 6"),
        ({"C": torch.zeros(2, 8, 4)}, "C: expected"),
        ({"D": torch.zeros(7)}, "D: expected"),
        ({"initial_state": torch.zeros(2, 6, 5)}, "initial_state: expected"),
        ({"seq_idx": torch.zeros(9, 2, dtype=torch.long)}, "seq_idx: expected"),
        ({"B": torch.zeros(2, 9, 2, 4), "C": torch.zeros(2, 9, 3, 4)}, "the same n_groups"),
        ({"B": torch.zeros(2, 9, 2, 4), "C": torch.zeros(2, 9, 4)}, "the same n_groups, got 2 and 1"),
    ],
)
def test_scan_refuses_wrong_shapes(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**{**scan_inputs((2, 9, 6, 4), 0, True), **change})


def test_wrong_types() -> None:
    inputs = scan_inputs((2, 9, 6, 4), 0, True)
    with pytest.raises(TypeError, match="seq_idx"):
        ops.selective_scan(**{**inputs, "seq_idx": torch.zeros(2, 9)})
    with pytest.raises(TypeError, match="u: expected real"):
        ops.selective_scan(**{**inputs, "u": torch.zeros(2, 9, 6, dtype=torch.long)})
    with pytest.raises(ValueError, match="activation"):
        ops.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="relu")
    with pytest.raises(ValueError, match="initial_state"):
        ops.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), initial_state=torch.zeros(1, 4, 3))
