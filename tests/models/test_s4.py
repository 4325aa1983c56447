"""S4, S4D and LSSL: kernels against dense oracles, other lengths, other rates, the start, bad input."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models import LSSL, S4, S4D, LSSLConfig, S4Config, S4DConfig
from longscan.models.common import state_space as ssm
from longscan.models.common.lti import System
from longscan.models.hippo import transition
from longscan.models.lssl import DenseSSM
from longscan.models.s4 import DPLR, clipped, nplr
from longscan.models.s4d import DiagonalSSM, spectrum
from longscan.ops import long_conv

SIZES = {"d_model": 3, "n_layers": 2, "vocab_size": 11, "d_state": 8}
SYSTEMS: dict[str, tuple[type[System], Any]] = {
    "s4": (DPLR, S4Config(**SIZES)),
    "s4-legt": (DPLR, S4Config(**SIZES, init="legt")),
    "s4-fourier": (DPLR, S4Config(**SIZES, init="fourier")),
    "s4-l_max": (DPLR, S4Config(**SIZES, l_max=16)),
    "s4-random": (DPLR, S4Config(**SIZES, init="random")),
    "s4-spread": (DPLR, S4Config(**SIZES, init="spread")),
    "s4d": (DiagonalSSM, S4DConfig(**SIZES)),
    "s4d-bilinear": (DiagonalSSM, S4DConfig(**SIZES, init="legs", discretization="bilinear")),
    "s4d-real": (DiagonalSSM, S4DConfig(**SIZES, init="real")),
    "dss": (DiagonalSSM, S4DConfig(**SIZES, init="inv", discretization="softmax", l_max=20)),
    "lssl": (DenseSSM, LSSLConfig(**SIZES, n_outputs=2)),
    "lssl-backward": (DenseSSM, LSSLConfig(**SIZES, init="lagt", alpha=1.0)),
}
each = pytest.mark.parametrize("name", SYSTEMS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, channels: int = 3) -> System:
    cls, config = SYSTEMS[name]
    return cls(config, channels, seeded()).double()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    assert (got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def signal(batch: int, length: int, channels: int) -> Tensor:
    return torch.randn(batch, length, channels, generator=seeded(length), dtype=torch.float64)


@each
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40, 97])
def test_the_kernel_is_the_response_to_an_impulse(name: str, length: int) -> None:
    """Even and odd lengths, shorter and longer than l_max, against steps from a zero state."""
    system = build(name)
    state = system.init_state(1)
    outputs = []
    for t in range(length):
        u = torch.full((1, 3), float(t == 0), dtype=torch.float64)
        outputs.append(system.advance(u, state.ssm)[0])
    close(system.kernel(length), torch.stack(outputs, 1))


@each
def test_training_reads_what_evaluation_reads(name: str) -> None:
    """The convolution and the recurrence, with their gradients."""
    system, u = build(name), signal(2, 37, 3).requires_grad_()
    system.convolves = True  # S4D too
    results = []
    for training in (True, False):
        system.train(training)
        y, state = system(u, None, None)
        assert (state is None) == training
        loss = (y * signal(2, 37, y.shape[2])).sum()
        results.append([y, *torch.autograd.grad(loss, [u, *system.parameters()])])
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-10)


@each
def test_half_the_rate_is_twice_the_step(name: str) -> None:
    """Going to the slower rate and back returns."""
    system, other = build(name), build(name)
    before = system.kernel(24)
    system.rescale_time(2)
    with torch.no_grad():
        assert torch.allclose(system.dt, 2 * other.dt, rtol=1e-14)
    assert (system.kernel(24) - before).abs().max() > 1e-3 * before.abs().max()
    system.rescale_time(0.5)
    close(system.kernel(24), before, 1e-10)


@pytest.mark.parametrize("name", ["s4", "s4-l_max", "s4d", "s4d-bilinear", "dss", "lssl"])
def test_a_slow_signal_sounds_the_same_at_half_the_rate(name: str) -> None:
    """The response at every second moment, to a signal that changes little between two."""
    system = build(name)
    with torch.no_grad():
        system.log_dt.fill_(-5.0)
    t = torch.linspace(0, 1, 800, dtype=torch.float64)
    u = torch.sin(4 * t)[None, :, None].expand(1, -1, 3).contiguous()
    with torch.no_grad():
        full = system.eval()(u, None, None)[0]
        system.rescale_time(2)
        half = system(u[:, ::2].contiguous(), None, None)[0]
    assert (half - full[:, ::2]).norm() < 0.05 * full.norm()


def test_kernels_of_different_l_max_are_one_system() -> None:
    """Learning C or C~, for any L: the same start gives the same kernel at every length."""
    systems = [DPLR(S4Config(**SIZES, l_max=l_max), 3, seeded()).double() for l_max in (None, 8, 30)]
    for length in (5, 8, 30, 100):
        kernels = [system.kernel(length) for system in systems]
        for other in kernels[1:]:
            close(other, kernels[0], 1e-6)  # what is stored started as float32


def test_the_kernel_in_float32_is_within_1e_6() -> None:
    """N = 64, L = 16384, against powers of the dense matrix in float64."""
    config = S4Config(d_model=2, n_layers=1, vocab_size=2, d_state=64)
    system = DPLR(config, 2, seeded())
    K = system.kernel(16384)
    assert K.dtype == torch.float32
    A_bar, B_bar, C = system.dense()
    exact = ssm.kernel(A_bar, B_bar, C[:, 0], 16384)
    assert ((K - exact).abs().amax(1) / exact.abs().amax(1)).max() <= 1e-6


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "tlagt", "fourier"])
@pytest.mark.parametrize("n", [2, 8, 64])
def test_hippo_matrices_are_normal_plus_low_rank(measure: str, n: int) -> None:
    A, B = transition(measure, n)
    half, P, B_, V = nplr(measure, n)
    full = torch.cat([V, V.conj()], 1)
    poles, low = torch.cat([half, half.conj()]), torch.cat([P, P.conj()], 1)
    rebuilt = full @ (torch.diag(poles) - low.T @ low.conj()) @ full.conj().T
    close(rebuilt, A.to(rebuilt.dtype), 1e-12)
    close(full.conj().T @ full, torch.eye(n, dtype=full.dtype), 1e-12)
    close(full @ torch.cat([B_, B_.conj()]), B.to(full.dtype), 1e-12)


def test_diagonalising_hippo_itself_is_hopeless() -> None:
    """Lemma 3.2: its own eigenvectors are as far from orthogonal as float64 can tell; those of S4 are not."""
    _, vectors = torch.linalg.eig(transition("legs", 64)[0])
    assert torch.linalg.cond(vectors) > 1e12
    V = nplr("legs", 64).V
    assert torch.linalg.cond(torch.cat([V, V.conj()], 1)) < 1 + 1e-9


def test_spectra_of_s4d() -> None:
    """The fastest wave of LegS turns at about N^2 / pi; S4D-Inv says so by a formula."""
    legs, inv = spectrum("legs", 64), spectrum("inv", 64)
    assert legs.imag.max() == pytest.approx(1303.27, abs=0.01)
    assert inv.imag.max() == pytest.approx(1283, abs=1)
    assert torch.equal(spectrum("lin", 6).imag, torch.pi * torch.arange(3, dtype=torch.float64))
    assert torch.equal(spectrum("real", 6).real, -torch.arange(1.0, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("cls", "config"),
    [(S4, S4Config(**SIZES)), (S4D, S4DConfig(**SIZES)), (LSSL, LSSLConfig(**SIZES))],
    ids=["s4", "s4d", "lssl"],
)
def test_models_start_alike_and_keep_the_recurrence_wide(cls: Any, config: Any) -> None:
    model, again = cls(config, seeded()), cls(config, seeded())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.bfloat16()
    system = model.backbone.layers[0].mixer.ssm
    assert {system.get_parameter(name).dtype for name in system.recurrence} == {torch.float32}
    assert system.C.dtype == torch.bfloat16
    no_decay_parameters = {id(p) for p in model.no_decay_parameters()}
    assert {id(system.get_parameter(name)) for name in system.recurrence} <= no_decay_parameters
    ids = torch.zeros(2, 5, dtype=torch.long)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert model.eval()(ids).state.layers[0].ssm.dtype == torch.float32


def test_a_step_sees_new_weights() -> None:
    """What a step multiplies by is kept, until the parameters change."""
    system = build("s4")
    u, state = signal(1, 1, 3)[0], system.init_state(1)
    first = system.advance(u, state.ssm)
    with torch.no_grad():
        system.B.mul_(2)
    close(system.advance(u, system.init_state(1).ssm), 2 * first)


def test_lssl_can_leave_its_matrices_fixed() -> None:
    system = DenseSSM(LSSLConfig(**SIZES, fixed=True), 3, seeded())
    learned = {name for name, parameter in system.named_parameters() if parameter.requires_grad}
    assert learned == {"C", "D"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: S4Config(**{**SIZES, "d_state": 7}),
            "d_state: expected an even number, for conjugate pairs",
        ),
        (lambda: S4DConfig(**{**SIZES, "d_state": 0}), "d_state: expected 1 or more, got 0"),
        (lambda: S4Config(**SIZES, dt_min=0.0), "dt_min, dt_max: expected 0 < dt_min <= dt_max"),
        (lambda: S4Config(**SIZES, dt_min=0.2), "got 0.2 and 0.1"),
        (lambda: S4Config(**SIZES, l_max=0), "l_max: expected 1 or more, got 0"),
        (
            lambda: S4DConfig(**SIZES, discretization="softmax"),
            "l_max: expected a number of steps for 'softmax'",
        ),
        (
            lambda: S4DConfig(**SIZES, l_max=5),
            "l_max: expected a number of steps for 'softmax'",
        ),
        (lambda: LSSLConfig(**SIZES, alpha=2.0), "alpha: expected 0 to 1, got 2.0"),
        (lambda: S4Config.from_dict({**SIZES, "init": "lin"}), "init"),
        (lambda: nplr("foud", 4), "measure: expected legs, legt, lagt, tlagt or fourier, got 'foud'"),
        (lambda: nplr("legs", 5), "n: expected an even number"),
        (lambda: build("s4").rescale_time(0), "factor: expected old rate / new rate"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        make()


@each
def test_a_state_of_other_rows_is_refused(name: str) -> None:
    system = build(name)
    with pytest.raises(ValueError, match="state: expected 2 rows, got 3"):
        system(signal(2, 4, 3), system.init_state(3), None)


def test_d_reaches_every_output() -> None:
    system = build("lssl")
    with torch.no_grad():
        system.C.zero_()
    u = signal(1, 4, 3)
    close(system.eval()(u, None, None)[0], system.D * u.repeat_interleave(2, 2))
    close(system.train()(u, None, None)[0], long_conv(u.repeat_interleave(2, 2), torch.zeros(6, 4), system.D))


def test_the_cost_is_measured_once(cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("reproduce", "s4-cost", "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    for word in ("published, table 2", "5.19", "S4 layer", "LSSL kernel, naive / S4 kernel", "reduced:"):
        assert word in done.out
    report = json.loads((tmp_path / "s4-cost.json").read_text())
    assert all(row["ms"] > 0 for found in report["rows"].values() for row in found.values())
    assert (tmp_path / "s4-cost.png").stat().st_size > 1000
    assert json.loads(cli(*arguments, "--json").out)["rows"] == report["rows"]


def test_b_starts_as_in_the_official_code() -> None:
    """S4: V* B with |Im B| at most 2. S4D-LegS: the same B, folded into C; the other starts: 1."""
    n, draw = 64, lambda: torch.Generator().manual_seed(0)
    B = nplr("legs", n).B
    assert float(B.imag.abs().max()) > 40
    wanted = torch.complex(B.real, B.imag.clamp(-2, 2))
    sizes = {"d_model": 3, "n_layers": 1, "vocab_size": 5, "d_state": n}
    s4 = S4(S4Config(**sizes), draw()).backbone.layers[0].mixer.ssm
    assert torch.allclose(torch.view_as_complex(s4.B.detach().double()), wanted.expand(3, -1), rtol=1e-6)
    legs, lin = (
        S4D(S4DConfig(**sizes, init=init), draw()).backbone.layers[0].mixer.ssm.C.detach().double()
        for init in ("legs", "lin")
    )
    ratio = torch.view_as_complex(legs) / torch.view_as_complex(lin)
    assert torch.allclose(ratio, wanted.expand(3, -1), rtol=1e-4)


def test_the_first_b_is_that_of_the_official_code() -> None:
    """There of negative frequencies and clipped at 2, in an eigenbasis whose vectors may differ in sign."""
    for n in (4, 16, 64):
        A, B = transition("legs", n)
        P = B / math.sqrt(2)
        frequency, V = torch.linalg.eigh(-1j * (A + torch.outer(P, P)))
        frequency, V = frequency[: n // 2].flip(0), V[:, : n // 2].flip(1)
        B_there, P_there = (V.conj().mT @ x.to(V.dtype) for x in (B, P))
        B_there = torch.complex(B_there.real, B_there.imag.clamp(-2, 2))
        form = nplr("legs", n)
        assert (form.Lambda.imag + frequency).abs().max() < 1e-9 * n * n
        ours, theirs = clipped(form.B) * form.P[0].conj(), (B_there * P_there.conj()).conj()
        assert (ours - theirs).abs().max() < 1e-9
        assert clipped(form.B).imag.abs().max() <= 2
