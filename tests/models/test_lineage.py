"""The history as theorems: each step from one model to the next is an identity, here in float64."""

import math

import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.models import S4Config, S4DConfig
from longscan.models.common import state_space as ssm
from longscan.models.common.trapezoid import Tokens, trapezoid
from longscan.models.hippo import transition
from longscan.models.hippo_memory import compress
from longscan.models.linear_attention import accumulate
from longscan.models.s4 import DPLR, nplr
from longscan.models.s4d import DiagonalSSM
from longscan.ops.rotary import rotate

TOLERANCE = 1e-10
SIZES = {"d_model": 2, "n_layers": 1, "vocab_size": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def same(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    assert (got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


# HiPPO


def test_the_first_coefficient_of_legs_is_a_gate() -> None:
    """With N = 1 memory is the running mean, c <- (1 - g) c + g f, as an RNN's gate has it."""
    f = randn(1, 50)
    c, _ = ops.legs_scan(f, torch.zeros(1, 1, dtype=torch.float64), 0, "forward")
    same(c[0], f.mean(1))
    gated = torch.zeros(1, dtype=torch.float64)
    for k, now in enumerate(f[0], 1):
        gated = (1 - 1 / (k + 1)) * gated + now / (k + 1)
    c, _ = ops.legs_scan(f, torch.zeros(1, 1, dtype=torch.float64), 0, "backward")
    same(c[0], gated)


def test_hippo_reconstructs_what_it_was_told() -> None:
    t = torch.linspace(0, 1, 20_000, dtype=torch.float64)
    f = torch.sin(9 * t) + t**2
    told = compress(f, 24).reconstruct(torch.arange(0, 20_000, 7))
    assert (told[0] - f[::7]).abs().max() < 1e-3


def test_the_matrix_of_legs_remembers_legendre_polynomials_of_the_logarithm_of_time() -> None:
    """Without the 1 / t, c' = A c + B f answers an impulse by e^-t sqrt(2n+1) P_n(2 e^-t - 1)."""
    A, B = transition("legs", 12)
    for t in (0.0, 0.1, 1.0, 3.0):
        x = torch.tensor([2 * math.exp(-t) - 1], dtype=torch.float64)
        basis = torch.stack([p[0] for p in ops.legendre(x, 12)])
        expected = math.exp(-t) * (2 * torch.arange(12.0, dtype=torch.float64) + 1).sqrt() * basis
        same(torch.matrix_exp(A * t) @ B, expected)


# LSSL


def test_the_gate_of_an_rnn_is_a_step_of_backward_euler() -> None:
    """LSSL, lemma 3.1: A = -1 and dt = exp(z) give h = (1 - sigmoid(z)) h + sigmoid(z) u."""
    z, A, B = randn(40), -torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    A_bar, B_bar = ssm.discretize(A.expand(40, 1, 1), B.expand(40, 1), z.exp(), "backward")
    same(A_bar[:, 0, 0], 1 - z.sigmoid(), 1e-15)
    same(B_bar[:, 0], z.sigmoid(), 1e-15)


# S4


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("length", [63, 64, 1000])
def test_the_kernel_of_s4_is_that_of_the_dense_matrix(measure: str, length: int) -> None:
    """Cauchy sums at the roots of unity, against powers of HiPPO's own matrix."""
    n, dt = 16, 0.03
    system = DPLR(S4Config(**SIZES, d_state=n, init=measure), 2, seeded()).double()
    poles, P, B, V = nplr(measure, n)
    with torch.no_grad():  # what was stored in float32, again in float64
        system.log_dt.fill_(math.log(dt))
        system.log_A_real.copy_((-poles.real).clamp(min=1e-12).log())
        system.A_imag.copy_(poles.imag)
        system.P.copy_(torch.view_as_real(P))
        system.B.copy_(torch.view_as_real(B))
    C = torch.view_as_complex(system.C.detach())
    dense = ssm.discretize(*transition(measure, n), dt, "bilinear")
    for channel, K in enumerate(system.kernel(length)):
        row = 2 * (C[channel] @ V.conj().T).real  # y = 2 Re C V* x in the basis of the polynomials
        same(K, ssm.kernel(*dense, row, length))


def test_without_its_low_rank_s4_is_s4d() -> None:
    s4 = DPLR(S4Config(**SIZES, d_state=16), 2, seeded()).double()
    s4d = DiagonalSSM(S4DConfig(**SIZES, d_state=16, discretization="bilinear"), 2, seeded()).double()
    with torch.no_grad():
        s4.P.zero_()
        for name in ("log_dt", "log_A_real", "A_imag", "D"):
            s4d.get_parameter(name).copy_(s4.get_parameter(name))
        C, B = (torch.view_as_complex(x) for x in (s4.C, s4.B))
        s4d.C.copy_(torch.view_as_real(C * B))  # there B is folded into C
    same(s4.kernel(100), s4d.kernel(100))
    u = randn(3, 50, 2)
    same(s4.eval()(u, None, None)[0], s4d(u, None, None)[0])


# S4D and DSS


def test_a_diagonal_kernel_is_that_of_the_dense_matrix() -> None:
    """Zero-order hold of a rotation that fades, as real numbers in a dense matrix."""
    system = DiagonalSSM(S4DConfig(**SIZES, d_state=2), 1, seeded()).double()
    A, C, dt = system.A[0, 0], system.C[0, 0], system.dt[0]
    rotation = torch.stack([torch.stack([A.real, -A.imag]), torch.stack([A.imag, A.real])])
    B = torch.tensor([1.0, 0.0], dtype=torch.float64)
    K = ssm.kernel(*ssm.discretize(rotation, B, dt), 2 * torch.stack([C[0], -C[1]]), 60)
    same(system.kernel(60)[0], K)


def test_the_softmax_of_dss_is_a_zero_order_hold() -> None:
    """Sum_n w_n / lambda_n softmax(lambda_n dt l) over l < L, where `discrete` puts the sum into C."""
    length = 32
    config = S4DConfig(**SIZES, d_state=8, discretization="softmax", l_max=length)
    system = DiagonalSSM(config, 2, seeded()).double()
    A, w = system.A, torch.view_as_complex(system.C)
    powers = (system.dt[:, None, None] * A[..., None] * torch.arange(length)).exp()
    rows = powers / powers.sum(-1, keepdim=True)
    same(system.kernel(length), 2 * torch.einsum("cn,cnl->cl", w / A, rows).real)


def test_the_recurrence_of_s4d_is_its_convolution() -> None:
    system, u = DiagonalSSM(S4DConfig(**SIZES, d_state=16), 2, seeded()).double(), randn(3, 101, 2)
    y, _ = system(u, None, None)
    same(y, ops.long_conv(u, system.kernel(101), system.D))


# Mamba


def scan_inputs(length: int, channels: int, n: int) -> dict[str, Tensor]:
    """A selective scan that selects nothing: dt, B and C are the same at every token."""
    dt = randn(channels, seed=1).exp() / 10
    return {
        "u": randn(2, length, channels),
        "dt": dt.expand(2, length, channels),
        "A": -randn(channels, n, seed=2).exp(),
        "B": randn(n, seed=3).expand(2, length, n),
        "C": randn(n, seed=4).expand(2, length, n),
    }


def test_a_selective_scan_that_does_not_select_is_a_convolution() -> None:
    inputs = scan_inputs(77, 3, 4)
    dt, A, B, C = inputs["dt"][0, 0], inputs["A"], inputs["B"][0, 0], inputs["C"][0, 0]
    powers = (dt[:, None, None] * A[..., None] * torch.arange(77)).exp()
    K = torch.einsum("n,cn,cnl->cl", C, dt[:, None] * B, powers)  # Euler on B, as in Mamba
    same(ops.selective_scan(**inputs)[0], ops.long_conv(inputs["u"], K))


def test_it_is_a_bank_of_s4d_with_real_numbers() -> None:
    inputs = scan_inputs(77, 3, 4)
    dt, A, B, C = inputs["dt"][0, 0], inputs["A"], inputs["B"][0, 0], inputs["C"][0, 0]
    z = (dt[:, None] * A).to(torch.complex128)
    y, _ = ops.diagonal_ssm(inputs["u"], z, (C * dt[:, None] * B / 2).to(torch.complex128))
    same(ops.selective_scan(**inputs)[0], y)


def test_a_scan_that_forgets_nothing_is_linear_attention() -> None:
    """A = 0 and dt = 1: the state is the sum of k v, with k = B, q = C, v = u, and nothing to divide by."""
    length, channels, n = 50, 3, 4
    u, B, C = (randn(2, length, width, seed=seed) for seed, width in enumerate((channels, n, n)))
    y, state = ops.selective_scan(u, torch.ones_like(u), torch.zeros(channels, n, dtype=torch.float64), B, C)
    one_head = (x[:, :, None] for x in (C, B, u))
    attended, kv = accumulate(*one_head, torch.zeros(2, 1, n, channels, dtype=torch.float64))
    same(y, attended[:, :, 0])
    same(state, kv[:, 0].mT)


def gate(z: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mamba, theorem 1: what state and input are multiplied by, for N = 1, A = -1, dt = softplus(z)."""
    dt = torch.nn.functional.softplus(z)
    A_bar, B_bar = ssm.discretize(
        -torch.ones(len(z), 1, 1, dtype=z.dtype), torch.ones(len(z), 1, dtype=z.dtype), dt
    )
    return A_bar[:, 0, 0], B_bar[:, 0] if exact else dt


def test_selection_is_the_gate_of_an_rnn() -> None:
    """h = (1 - g) h + g u with g = sigmoid(z); with Mamba's own dt B in place of the hold, not at all."""
    z = randn(100)
    keep, take = gate(z, exact=True)
    same(keep, 1 - z.sigmoid(), 1e-14)
    same(take, z.sigmoid(), 1e-14)
    _, simplified = gate(z, exact=False)
    assert (simplified - z.sigmoid()).abs().max() > 0.5


def mixing(system: object, u: Tensor) -> Tensor:
    """The matrix that turns the input into the output, linearised where the input is u: d y_t / d u_s."""
    read = system  # any function of (1, length, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: read(x)[0, :, 0], u)  # type: ignore[operator]
    return jacobian[:, 0, :, 0]


def test_a_fixed_system_cannot_choose() -> None:
    """Its matrix has one number per lag, whatever the input; that of a selective scan is neither."""
    system = DiagonalSSM(S4DConfig(**SIZES, d_state=4), 1, seeded()).double()
    A, weights = -torch.ones(1, 1, dtype=torch.float64), randn(2, seed=5)

    def fixed(u: Tensor) -> Tensor:
        return system(u, None, None)[0]

    def selective(u: Tensor) -> Tensor:
        dt = torch.nn.functional.softplus(3 * u.detach())
        B, C = (1 + weight * u.detach() for weight in weights)
        return ops.selective_scan(u, dt, A, B, C)[0]

    def is_toeplitz(matrix: Tensor) -> bool:
        return bool((matrix[1:, 1:] - matrix[:-1, :-1]).abs().max() < TOLERANCE)

    u, other = randn(1, 12, 1), randn(1, 12, 1, seed=1)
    assert is_toeplitz(mixing(fixed, u))
    same(mixing(fixed, u), mixing(fixed, other))
    assert not is_toeplitz(mixing(selective, u))
    assert (mixing(selective, u) - mixing(selective, other)).abs().max() > 0.1


# Mamba-3


def tokens(length: int, heads: int = 2, n: int = 6, p: int = 3) -> Tokens:
    """Two rows of tokens of rank one."""
    q, k, v = (randn(2, length, 1, heads, width, seed=seed) for seed, width in enumerate((n, n, p)))
    log_decay, early, late = (-randn(2, length, heads, seed=seed).abs() for seed in (3, 4, 5))
    return Tokens(q, k, v, log_decay, -early, -late)


def from_nothing(given: Tokens, D: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (batch, length, heads, p) and final state of the recurrence from zero."""
    k, v = torch.zeros_like(given.k[:, 0]), torch.zeros_like(given.v[:, 0])
    state = (v[:, 0, ..., None] * k[:, 0, :, None]).contiguous()
    y, state = trapezoid(given, k, v, D, state, None)
    return y[:, :, 0], state


def test_mamba_3_without_its_past_and_its_angles_is_mamba_2() -> None:
    """lambda = 1 leaves the input of the token itself, weighted with dt; theta = 0 rotates nothing."""
    D, given = randn(2, seed=6), tokens(150)
    angle = torch.zeros(2, 150, 2, 3, dtype=torch.float64)
    for halves in (False, True):
        assert all(map(torch.equal, rotate((given.q, given.k), angle, halves), (given.q, given.k)))
    still = given._replace(early=torch.zeros_like(given.early))
    y, state = from_nothing(still, D)
    x, B, C = given.v[:, :, 0], given.k[:, :, 0], given.q[:, :, 0]
    expected, expected_state = ops.ssd(x, given.late, given.log_decay, B, C, D)
    same(y, expected, 1e-14)
    same(state, expected_state, 1e-14)


def test_it_is_the_trapezoidal_rule() -> None:
    """lambda = 1/2 and A = 0: the state is the integral of v k' over the times of the tokens."""
    length, given = 90, tokens(90)
    time = randn(2, length, 2, seed=7).abs().cumsum(1)
    half = torch.nn.functional.pad(time.diff(dim=1), (0, 0, 1, 0)) / 2
    still = given._replace(log_decay=torch.zeros_like(half), early=half, late=half)
    _, state = from_nothing(still, torch.zeros(2, dtype=torch.float64))
    products = given.v[:, :, 0, ..., None] * given.k[:, :, 0, :, None]  # (2, length, heads, p, n)
    same(state, torch.trapezoid(products, time[..., None, None], dim=1), 1e-13)


def test_rotations_make_a_real_state_complex() -> None:
    """Pairs of channels, rotated by a sum of angles, are a complex state whose decay has a phase."""
    length, given = 70, tokens(70)
    turn = randn(2, length, 2, 3, seed=8)
    theta = turn.cumsum(1)
    q, k = rotate((given.q, given.k), theta, halves=False)
    y, _ = from_nothing(given._replace(q=q, k=k), torch.zeros(2, dtype=torch.float64))

    def pairs(x: Tensor) -> Tensor:
        return torch.view_as_complex(x[:, :, 0].unflatten(-1, (-1, 2)).contiguous())  # (2, length, heads, 3)

    B, C, v = pairs(given.k), pairs(given.q), given.v[:, :, 0]
    decay = torch.exp(given.log_decay[..., None] - 1j * turn)
    h, previous, ys = torch.zeros(2, 2, 3, 3, dtype=torch.complex128), 0.0, []
    for t in range(length):
        now = v[:, t, ..., None] * B[:, t, :, None]
        h = decay[:, t, :, None] * (h + given.early[:, t, :, None, None] * previous)
        h = h + given.late[:, t, :, None, None] * now
        ys.append((h * C[:, t, :, None].conj()).sum(-1).real)
        previous = now
    same(y, torch.stack(ys, 1), 1e-13)
