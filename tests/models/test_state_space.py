"""State space basics against scipy, closed forms and one another, in float64."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common import state_space as ssm

METHODS = ("zoh", "euler", "bilinear", "backward", "gbt")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def system(n: int = 4, seed: int = 0) -> ssm.StateSpace:
    """A stable one: what is skew turns, what is negative fades."""
    g = torch.Generator().manual_seed(seed)
    S, B, C, D = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, n), (n,), (n,), ()))
    return ssm.StateSpace(S - S.T - 0.3 * torch.eye(n, dtype=torch.float64), B, C, D)


def signal(length: int, *rows: int) -> Tensor:
    return torch.randn(*rows, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_discretisations_are_those_of_scipy(method: str) -> None:
    """Only A and B: scipy changes C and D too, to undo the half step of the others."""
    cont2discrete = pytest.importorskip("scipy.signal").cont2discrete
    A, B, C, D = system()
    alpha = 0.3 if method == "gbt" else None
    theirs = cont2discrete(
        (A.numpy(), B[:, None].numpy(), C[None].numpy(), D.numpy()),
        0.1,
        method={"backward": "backward_diff"}.get(method, method),
        alpha=alpha,
    )
    A_bar, B_bar = ssm.discretize(A, B, 0.1, method, alpha)
    close(A_bar, torch.tensor(theirs[0]))
    close(B_bar, torch.tensor(theirs[1])[:, 0])


def test_the_bilinear_family_is_one_formula() -> None:
    A, B, *_ = system()
    for name, alpha in ssm.ALPHA.items():
        for got, expected in zip(
            ssm.discretize(A, B, 0.2, name), ssm.discretize(A, B, 0.2, "gbt", alpha), strict=True
        ):
            assert torch.equal(got, expected)


def test_discretising_takes_many_systems_and_steps_at_once() -> None:
    pairs = [system(3, seed) for seed in range(2)]
    A, B = torch.stack([s.A for s in pairs]), torch.stack([s.B for s in pairs])
    dt = torch.tensor([0.1, 0.7], dtype=torch.float64)
    for method in ("zoh", "bilinear"):
        together = ssm.discretize(A, B, dt, method)
        for i in range(2):
            alone = ssm.discretize(A[i], B[i], float(dt[i]), method)
            for got, expected in zip(together, alone, strict=True):
                close(got[i], expected)


def test_zoh_needs_no_inverse() -> None:
    """A = 0 integrates; the formula A^-1 (e^A - 1) B would divide by zero."""
    A, B = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    A_bar, B_bar = ssm.discretize(A, B, 0.25)
    close(torch.cat([A_bar[0], B_bar]), torch.tensor([1.0, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 101])
def test_the_recurrence_is_a_convolution(length: int) -> None:
    """Odd, prime and even lengths; the kernel by doubling is the kernel by powers."""
    A, B, C, D = system()
    A_bar, B_bar = ssm.discretize(A, B, 0.1)
    u = signal(length, 3)
    y, _ = ssm.recurrence(A_bar, B_bar, C, u, D)
    K = ssm.kernel(A_bar, B_bar, C, length)
    close(K, ssm.kernel_powers(A_bar, B_bar, C, length))
    close(K[-1], C @ torch.linalg.matrix_power(A_bar, length - 1) @ B_bar)
    close(ops.long_conv(u[..., None], K[None], D[None])[..., 0], y)


def test_an_initial_state_adds_its_own_response() -> None:
    A, B, C, D = system()
    A_bar, B_bar = ssm.discretize(A, B, 0.1)
    u, start = signal(9), signal(4)
    y, end = ssm.recurrence(A_bar, B_bar, C, u, D, start)
    fresh, fresh_end = ssm.recurrence(A_bar, B_bar, C, u, D)
    free = torch.stack([C @ torch.linalg.matrix_power(A_bar, k + 1) @ start for k in range(9)])
    close(y, fresh + free)
    close(end, fresh_end + torch.linalg.matrix_power(A_bar, 9) @ start)


def test_a_mass_on_a_spring_swings_as_the_formula_says() -> None:
    m, c, k, dt = 2.0, 0.4, 3.0, 0.05
    y = ssm.simulate(ssm.mass_spring(m, c, k), torch.ones(400, dtype=torch.float64), dt)
    t = dt * torch.arange(1, 401, dtype=torch.float64)  # y_k has seen all of step k
    fade = c / (2 * m)
    omega = math.sqrt(k / m - fade**2)
    swing = torch.exp(-fade * t) * (torch.cos(omega * t) + fade / omega * torch.sin(omega * t))
    close(y, (1 - swing) / k, 1e-10)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("backward", 1), ("bilinear", 2)])
def test_methods_converge_at_their_order(method: str, order: int) -> None:
    """On the response to a state let go, at the time 1: halving dt divides the error by 2^order."""
    A, B, *_ = system()
    start = signal(4)
    exact = torch.matrix_exp(A) @ start
    errors = []
    for n in (256, 512):
        A_bar, _ = ssm.discretize(A, B, 1 / n, method)
        errors.append(float((torch.linalg.matrix_power(A_bar, n) @ start - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_another_basis_is_the_same_system() -> None:
    A, B, C, D = system()
    T = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    other = ssm.StateSpace(T @ A @ T.inverse(), T @ B, C @ T.inverse(), D)
    u = signal(50)
    close(ssm.simulate(other, u, 0.1), ssm.simulate(ssm.StateSpace(A, B, C, D), u, 0.1), 1e-10)


def test_d_is_what_comes_at_once() -> None:
    """Of an impulse's first output, all but C B_bar; and what is left of the highest frequencies."""
    A, B, C, D = model = system()
    impulse = torch.zeros(3, dtype=torch.float64)
    impulse[0] = 1
    _, B_bar = ssm.discretize(A, B, 0.1)
    close(ssm.simulate(model, impulse, 0.1)[0] - C @ B_bar, D)
    far = ssm.transfer(model, torch.tensor([1e12j], dtype=torch.complex128))
    close(far.real, D[None], 1e-10)


def test_the_transfer_function_is_what_becomes_of_a_wave() -> None:
    """Of a slow one, sampled often, once the start is forgotten."""
    model, dt, omega = system(), 0.01, 3.0
    t = dt * torch.arange(4000, dtype=torch.float64)
    y = ssm.simulate(model, torch.sin(omega * t), dt, "bilinear")
    gain = ssm.transfer(model, torch.tensor([omega * 1j], dtype=torch.complex128))[0]
    expected = (gain * torch.exp(1j * omega * t)).imag
    assert (y - expected)[-400:].abs().max() < 0.03 * gain.abs()


def test_unstable_systems_are_named() -> None:
    grows = ssm.StateSpace(torch.diag(torch.tensor([-1.0, 0.5], dtype=torch.float64)), *system(2)[1:])
    with pytest.warns(UserWarning, match=r"eigenvalue 0\.5\+0j lies to the right of the imaginary axis"):
        ssm.simulate(grows, signal(4), 0.1)
    stiff = ssm.mass_spring(1, 0.1, 1e4)
    with pytest.warns(UserWarning, match="outside the unit circle"):
        ssm.simulate(stiff, signal(4), 0.1, "euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssm.simulate(stiff, signal(4), 0.1, "bilinear")
        assert ssm.check_stable(ssm.mass_spring(1, 0, 1).A)  # on the axis: it neither fades nor grows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ssm.discretize(s.A, s.B, 0.0), "dt: expected finite steps of more than 0, got 0"),
        (lambda s: ssm.discretize(s.A, s.B, math.nan), "dt: expected"),
        (lambda s: ssm.discretize(s.A, s.B, 0.1, "bilinaer"), "did you mean 'bilinear'"),
        (lambda s: ssm.discretize(s.A, s.B, 0.1, "gbt"), "alpha: expected a number from 0 to 1"),
        (lambda s: ssm.discretize(s.A, s.B, 0.1, "gbt", 1.5), "got 1.5"),
        (lambda s: ssm.discretize(s.A, s.B, 0.1, "zoh", 0.5), "alpha: expected none"),
        (
            lambda s: ssm.simulate(s, torch.tensor([0.0, math.nan]), 0.1),
            "expected finite samples, got nan at 1",
        ),
        (lambda s: ssm.mass_spring(0, 1, 1), "m: expected a positive mass"),
    ],
    ids=["zero-step", "nan-step", "typo", "no-alpha", "alpha-range", "alpha-unused", "nan-signal", "no-mass"],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        call(system())
