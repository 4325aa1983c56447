"""The ops of state spaces against their literal references: forward, gradients, states, odd sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.ops.long_conv import _transform_length
from op_inputs import (
    Inputs,
    cauchy_inputs,
    diagonal_inputs,
    generator,
    long_conv_inputs,
    narrow,
    real,
    vandermonde_inputs,
)

# largest |ours - reference| / max(1, |reference|)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def run(op: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of a loss that weighs all of them."""
    leaves = {
        k: v.clone().requires_grad_()
        for k, v in inputs.items()
        if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) and k != "t"
    }
    outputs = op(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
    loss = sum((y.double() * real(generator(*y.shape), *y.shape)).sum() for y in parts)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    names = [f"d{name}" for name in leaves]
    return {
        **{f"output {i}": y.detach() for i, y in enumerate(parts)},
        **dict(zip(names, gradients, strict=True)),
    }


def check(op: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, dtype: torch.dtype) -> None:
    """Both read what is left of the inputs after rounding, the reference in float64."""
    inputs = narrow(inputs, dtype)
    ours, theirs = run(op, inputs), run(reference, narrow_back(inputs))
    for name, expected in theirs.items():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        error = (ours[name].to(expected.dtype) - expected).abs().max() / scale
        assert error <= TOLERANCE[dtype], f"{name}: {float(error):.2g}"


def narrow_back(inputs: Inputs) -> Inputs:
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return {k: v.to(wide.get(v.dtype, v.dtype)) if isinstance(v, Tensor) else v for k, v in inputs.items()}


DIAGONALS = {
    "tiny": (1, 1, 1, 1),
    "odd": (2, 37, 7, 5),
    "tiles": (1, 129, 67, 3),
    "wide-state": (1, 70, 3, 64),
    "beyond-native": (1, 9, 2, 300),
}
VANDERMONDES = {"one": (1, 1, 1, 1), "odd": (2, 3, 5, 37), "long": (1, 2, 32, 1000), "square": (3, 17, 4, 64)}
CAUCHYS = {"one": (1, 1, 1, 1), "odd": (4, 3, 5, 37), "wide": (2, 9, 33, 129)}
CONVS = {
    "one": (1, 1, 1, 1),
    "odd": (2, 37, 3, 37),
    "short-kernel": (1, 64, 2, 5),
    "long-kernel": (2, 9, 3, 20),
}

f32_f64 = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
extras = pytest.mark.parametrize("extras", [False, True], ids=["plain", "full"])


@f32_f64
@extras
@pytest.mark.parametrize("case", DIAGONALS)
def test_diagonal_ssm(backend: str, case: str, extras: bool, dtype: torch.dtype) -> None:
    check(ops.diagonal_ssm, ops.diagonal_ssm_ref, diagonal_inputs(DIAGONALS[case], extras), dtype)


@f32_f64
@pytest.mark.parametrize("case", VANDERMONDES)
def test_vandermonde(backend: str, case: str, dtype: torch.dtype) -> None:
    check(ops.vandermonde, ops.vandermonde_ref, vandermonde_inputs(*VANDERMONDES[case]), dtype)


@f32_f64
@pytest.mark.parametrize("case", CAUCHYS)
def test_cauchy(backend: str, case: str, dtype: torch.dtype) -> None:
    check(ops.cauchy, ops.cauchy_ref, cauchy_inputs(*CAUCHYS[case]), dtype)


@f32_f64
@extras
@pytest.mark.parametrize("case", CONVS)
def test_long_conv(case: str, extras: bool, dtype: torch.dtype) -> None:
    check(ops.long_conv, ops.long_conv_ref, long_conv_inputs(*CONVS[case], extras), dtype)


def test_half_inputs_keep_a_float32_state() -> None:
    inputs = diagonal_inputs((2, 70, 3, 4), True)
    exact, state = ops.diagonal_ssm(**inputs)
    y, after = ops.diagonal_ssm(**{**inputs, "u": inputs["u"].bfloat16()})
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    scale = TOLERANCE[torch.bfloat16]
    assert (y - exact).abs().max() <= scale * exact.abs().max()
    assert (after - state).abs().max() <= scale * state.abs().max()
    inputs = long_conv_inputs(2, 33, 3, 33, True)
    y, exact = ops.long_conv(**{**inputs, "u": inputs["u"].bfloat16()}), ops.long_conv(**inputs)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= scale * exact.abs().max()


def test_steps_equal_the_scan(backend: str) -> None:
    inputs = narrow(diagonal_inputs((3, 12, 5, 4), True), torch.float32)
    del inputs["seq_idx"]
    y, final = ops.diagonal_ssm(**inputs)
    state = inputs["state"].clone()
    for t in range(12):
        now = ops.diagonal_ssm_step(state, inputs["u"][:, t], inputs["z"], inputs["C"])
        torch.testing.assert_close(now, y[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_phases_of_a_fast_oscillation_stay_exact() -> None:
    """After 2^20 steps of 100 radians each, where float32 could not even say which turn it is."""
    z = torch.tensor([[complex(-1e-6, 100.0)]])
    C, length = torch.ones(1, 1, dtype=torch.complex64), 1 << 20
    K = ops.vandermonde(C, z, length)
    last = 2 * torch.exp(z.to(torch.complex128) * (length - 1)).real
    assert (K[:, -1] - last[:, 0]).abs() < 1e-5


def test_transforms_leave_room_and_are_fast() -> None:
    for n in (1, 2, 3, 7, 2047, 2049, 30_001, 99_999):
        length = _transform_length(n)
        assert n <= length <= 1.12 * n + 1
        assert length % 2 == 0
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        assert length == 1


def test_the_end_does_not_run_into_the_beginning() -> None:
    """A kernel that does not decay would show it: a transform of seq_len only wraps around."""
    u, kernel = torch.zeros(1, 32, 1, dtype=torch.float64), torch.ones(1, 32, dtype=torch.float64)
    u[0, -1] = 1
    assert ops.long_conv(u, kernel)[0, :-1].abs().max() < 1e-14
    wrapped = torch.fft.irfft(torch.fft.rfft(u[0, :, 0]) * torch.fft.rfft(kernel[0]), n=32)
    assert wrapped[:-1].abs().min() > 0.9


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_threads_do_not_change_a_bit(grad: bool) -> None:
    cases = [
        (ops.diagonal_ssm, diagonal_inputs((3, 130, 70, 8), True)),
        (ops.vandermonde, vandermonde_inputs(1, 70, 8, 500)),
        (ops.cauchy, cauchy_inputs(4, 70, 8, 257)),
    ]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            got: list[Tensor] = []
            for op, inputs in cases:
                inputs = narrow(inputs, torch.float32)
                if grad:
                    got += run(op, inputs).values()
                else:
                    outputs = op(**inputs)
                    got += outputs if isinstance(outputs, tuple) else (outputs,)
            results.append(got)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@f32_f64
def test_opcheck(dtype: torch.dtype) -> None:
    """In float32 of the kernels, in float64 of what stands in for them."""
    namespace = torch.ops.longscan
    inputs = narrow(diagonal_inputs((2, 35, 3, 2), True), dtype)
    a, c = (torch.view_as_real(inputs[name]).clone().requires_grad_() for name in ("z", "C"))
    state, seq_idx = inputs["state"].requires_grad_(), inputs["seq_idx"].to(torch.int32)
    arguments = (inputs["u"].requires_grad_(), (a / 4).detach().requires_grad_(), c, state, seq_idx, True)
    torch.library.opcheck(namespace.diagonal_ssm.default, arguments)
    conv = narrow(long_conv_inputs(2, 9, 3, 9, True), dtype)
    wanted = tuple(conv[name].requires_grad_() for name in ("u", "kernel", "D", "back"))
    torch.library.opcheck(namespace.long_conv.default, wanted)


@f32_f64
def test_opcheck_of_kernels(dtype: torch.dtype) -> None:
    namespace = torch.ops.longscan
    inputs = narrow(vandermonde_inputs(2, 3, 5, 37), dtype)
    z = inputs["z"].to(torch.complex128).requires_grad_()
    torch.library.opcheck(namespace.vandermonde.default, (inputs["C"].requires_grad_(), z, 37))
    inputs = narrow(cauchy_inputs(4, 3, 5, 9), dtype)
    v, lam = inputs["v"].requires_grad_(), inputs["lam"].requires_grad_()
    torch.library.opcheck(namespace.cauchy.default, (v, inputs["t"], lam))


def test_gradcheck() -> None:
    cases = [
        (ops.diagonal_ssm, diagonal_inputs((2, 5, 2, 3), True)),
        (ops.vandermonde, vandermonde_inputs(2, 2, 3, 7)),
        (ops.cauchy, cauchy_inputs(2, 2, 3, 5)),
        (ops.long_conv, long_conv_inputs(2, 6, 2, 6, True)),
    ]
    for op, inputs in cases:
        names = [k for k, v in inputs.items() if isinstance(v, Tensor) and k not in ("seq_idx", "t")]
        rest = {k: v for k, v in inputs.items() if k not in names}

        def call(
            *values: Tensor, op: Any = op, names: list[str] = names, rest: Inputs = rest
        ) -> Tensor | tuple[Tensor, ...]:
            return op(**dict(zip(names, values, strict=True)), **rest)

        assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


def test_meta_device() -> None:
    def to_meta(inputs: Inputs) -> Inputs:
        return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}

    y, state = ops.diagonal_ssm(**to_meta(diagonal_inputs((2, 9, 3, 4), True)))
    assert (y.device.type, y.shape, state.shape) == ("meta", (2, 9, 3), (2, 3, 4, 2))
    assert ops.vandermonde(**to_meta(vandermonde_inputs(2, 3, 4, 9))).shape == (2, 3, 9)
    assert ops.cauchy(**to_meta(cauchy_inputs(4, 3, 2, 9))).shape == (4, 3, 9)
    assert ops.long_conv(**to_meta(long_conv_inputs(2, 9, 3, 9, True))).shape == (2, 9, 3)


@pytest.mark.parametrize(
    ("op", "inputs", "change", "message"),
    [
        (ops.diagonal_ssm, diagonal_inputs((2, 5, 3, 2), True), {"u": torch.zeros(2, 0, 3)}, "u: expected a"),
        (
            ops.diagonal_ssm,
            diagonal_inputs((2, 5, 3, 2), True),
            {"u": torch.zeros(2, 5, 4)},
            "z, C: expected",
        ),
        (
            ops.diagonal_ssm,
            diagonal_inputs((2, 5, 3, 2), True),
            {"state": torch.zeros(2, 3, 2)},
            "state: exp",
        ),
        (
            ops.vandermonde,
            vandermonde_inputs(2, 3, 4, 5),
            {"length": 0},
            "length: expected at least 1, got 0",
        ),
        (ops.vandermonde, vandermonde_inputs(2, 3, 4, 5), {"z": torch.zeros(3, 5) * 1j}, "C, z: expected"),
        (ops.cauchy, cauchy_inputs(2, 3, 4, 5), {"t": torch.zeros(0).double()}, "v, t, lam: expected"),
        (
            ops.long_conv,
            long_conv_inputs(2, 5, 3, 5, True),
            {"kernel": torch.zeros(2, 5)},
            "kernel: expected",
        ),
        (ops.long_conv, long_conv_inputs(2, 5, 3, 5, True), {"back": torch.zeros(3, 0)}, "back: expected"),
        (
            ops.long_conv,
            long_conv_inputs(2, 5, 3, 5, True),
            {"D": torch.zeros(2)},
            r"D: expected shape \(3,\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_shapes_are_refused(
    op: Callable[..., Any], inputs: Inputs, change: Inputs, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{**inputs, **change})


def test_wrong_types_are_refused() -> None:
    inputs = diagonal_inputs((2, 5, 3, 2), True)
    for change, message in (
        ({"z": inputs["z"].real}, "z: expected complex"),
        ({"C": inputs["C"].real}, "C: expected complex"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx: expected"),
    ):
        with pytest.raises(TypeError, match=message):
            ops.diagonal_ssm(**{**inputs, **change})
    with pytest.raises(TypeError, match="z: expected complex"):
        ops.vandermonde(torch.ones(1, 1) * 1j, torch.ones(1, 1), 3)
    with pytest.raises(TypeError, match="expected complex, float64, complex128"):
        ops.cauchy(**{**cauchy_inputs(1, 2, 3, 4), "t": torch.ones(4)})
