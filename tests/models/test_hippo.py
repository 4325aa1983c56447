"""HiPPO: the equations, the op that follows them, what it remembers, and the cell around it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.data.signals import white_noise
from longscan.errors import LongscanError
from longscan.models import HippoConfig, HippoRNN
from longscan.models.hippo import MEASURES, SPANS, HippoMixer, HippoState, held, transition
from longscan.models.hippo_memory import Memory, basis, compress
from longscan.ops import legendre, legs_matrices, legs_scan, legs_scan_ref

METHODS = ("bilinear", "forward", "backward", "zoh")
# relative to the largest value; forward Euler blows rounding up before it calms down
TOLERANCE = {"bilinear": 1e-12, "forward": 1e-9, "backward": 1e-12, "zoh": 1e-11}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) if a.numel() else 0.0


# the matrices


def test_matrices_are_those_of_the_papers() -> None:
    n = 6
    entries = {
        "legs": lambda i, k: -math.sqrt((2 * i + 1) * (2 * k + 1)) if i > k else -(i + 1.0) * (i == k),
        "legt": lambda i, k: -math.sqrt((2 * i + 1) * (2 * k + 1)) * (1 if k <= i else (-1) ** (i - k)),
        "lmu": lambda i, k: (2 * i + 1) * (-1 if i < k else (-1) ** (i - k + 1)),
        "lagt": lambda i, k: -1.0 if i > k else -0.5 * (i == k),
        "tlagt": lambda i, k: -1.0 * (i >= k),
    }
    inputs = {
        "legs": lambda i: math.sqrt(2 * i + 1),
        "legt": lambda i: math.sqrt(2 * i + 1),
        "lmu": lambda i: (2 * i + 1) * (-1) ** i,
        "lagt": lambda i: 1.0,
        "tlagt": lambda i: 1.0,
    }
    for measure, entry in entries.items():
        A, B = transition(measure, n)
        rows = [[float(entry(i, k)) for k in range(n)] for i in range(n)]
        assert torch.allclose(A, torch.tensor(rows, dtype=torch.float64))
        expected = [float(inputs[measure](i)) for i in range(n)]
        assert torch.allclose(B, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_is_stable(measure: str) -> None:
    A, B = transition(measure, 32)
    assert (A.shape, B.shape, A.dtype) == ((32, 32), (32,), torch.float64)
    assert torch.linalg.eigvals(A).real.max() < 1e-9  # "fourier" has a sine of frequency 0 that stays 0
    if measure == "legs":
        assert sorted(torch.linalg.eigvals(A).real.round().tolist()) == [-k for k in range(32, 0, -1)]


def response(measure: str, n: int, t: float) -> Tensor:
    A, B = transition(measure, n)
    return torch.matrix_exp(A * t) @ B


def test_impulse_responses_are_the_functions_of_the_measures() -> None:
    """Exactly where the space of functions is closed under shifts, up to Gibbs for windows."""
    for t in (0.0, 0.3, 2.0):
        age = torch.tensor([t], dtype=torch.float64)
        assert difference(response("lagt", 8, t), basis("lagt", 8, age)[:, 0]) < 1e-12
        warped = 1 - torch.exp(-age)  # LegS without its 1/t is Legendre in the logarithm of time
        expected = math.exp(-t) * basis("legs", 8, warped)[:, 0]
        assert difference(response("legs", 8, t), expected) < 1e-12
    for measure, weight, t in (("legt", 1.0, 0.4), ("fourier", 0.5, 0.7)):
        age = torch.tensor([t], dtype=torch.float64)
        close = (response(measure, 64, t)[:4] - weight * basis(measure, 64, age)[:4, 0]).abs().max()
        assert close < 0.15  # of curves that reach 1 and more
        assert response(measure, 64, 1.3 * SPANS[measure](64))[:4].abs().max() < 0.02  # behind the window


def test_orthonormal_functions_are_orthonormal() -> None:
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(200))
    ends = {"legs": (1.0, 1.0), "legt": (1.0, 1.0), "fourier": (2.0, 0.5), "lagt": (80.0, 1.0)}
    for measure, (end, weight) in ends.items():
        functions = basis(measure, 8, (x + 1) / 2 * end)
        gram = (functions * w * end / 2 * weight) @ functions.mT
        expected = torch.eye(8, dtype=torch.float64)
        expected[1, 1] = measure != "fourier"  # the sine of frequency 0
        assert (gram - expected).abs().max() < 1e-9, measure


def test_legendre_is_that_of_numpy() -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    rows = torch.stack(list(legendre(x, 120)))
    expected = np.polynomial.legendre.legvander(x.numpy(), 119).T
    assert np.abs(rows.numpy() - expected).max() < 1e-12


# the op


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["reference", "avx2"], indirect=True)
@pytest.mark.parametrize(("n", "length"), [(1, 9), (5, 1), (7, 40), (20, 90)])
def test_the_op_is_the_equation(backend: str, method: Any, n: int, length: int) -> None:
    for start, every in ((0, None), (0, 7), (13, 4), (500, 1)):
        f, state = draw(2, length), draw(2, n, seed=1) if start else torch.zeros(2, n, dtype=torch.float64)
        got, wanted = (op(f, state, start, method, every) for op in (legs_scan, legs_scan_ref))
        assert max(map(difference, got, wanted)) < TOLERANCE[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [None, 5])
def test_gradients(method: Any, every: int | None) -> None:
    f, state = draw(2, 23).requires_grad_(), draw(2, 6, seed=1).requires_grad_()
    found = []
    for op in (legs_scan, legs_scan_ref):
        outputs = op(f, state, 9, method, every)
        loss = sum((out * draw(*out.shape, seed=2)).sum() for out in outputs)
        found.append(torch.autograd.grad(loss, [f, state]))
    for got, wanted in zip(*found, strict=True):
        assert difference(got, wanted) < 1e-11


def test_the_op_passes_torchs_own_check() -> None:
    f, state = draw(1, 12).requires_grad_(), draw(1, 3, seed=1).requires_grad_()
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.longscan.legs_scan, (f, state, 2, "bilinear", 5), test_utils=tests)


def test_shapes_without_numbers() -> None:
    f, state = torch.zeros(2, 12, device="meta"), torch.zeros(2, 3, device="meta", requires_grad=True)
    final, history = legs_scan(f, state, 2, "zoh", 5)
    assert (final.shape, history.shape) == ((2, 3), (2, 2, 3))
    assert torch.autograd.grad(history.sum(), state)[0].shape == (2, 3)


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
@pytest.mark.parametrize("backend", ["reference", "avx2"], indirect=True)
def test_pieces_are_the_whole(backend: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the torch path changes from one scan to the other, and cuts into chunks."""
    monkeypatch.setattr("longscan.ops.legs._CHUNK", 256)
    f, state = draw(1, 1500), torch.zeros(1, 16, dtype=torch.float64)
    whole, _ = legs_scan(f, state, 0, method)
    place = 0
    for size in (1, 2, 31, 400, 1066):
        state, _ = legs_scan(f[:, place : place + size], state, place, method)
        place += size
    assert difference(state, whole) < 1e-11
    assert difference(whole, legs_scan_ref(f, torch.zeros_like(state), 0, method)[0]) < 1e-9


def test_a_narrow_state_is_computed_in_wide() -> None:
    f, state = draw(1, 300), torch.zeros(1, 8)
    got, _ = legs_scan(f, state)
    assert got.dtype == torch.float32
    assert torch.equal(got, legs_scan(f, state.double())[0].float())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"f": torch.zeros(3)}, ValueError, "f: expected"),
        ({"f": torch.zeros(1, 0)}, ValueError, "f: expected"),
        ({"state": torch.zeros(2, 4)}, ValueError, "state: expected"),
        ({"state": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "state: expected float"),
        ({"method": "euler"}, ValueError, "method: expected"),
        ({"start": -1}, ValueError, "start: expected"),
        ({"every": 0}, ValueError, "every: expected"),
    ],
    ids=["flat", "empty", "rows", "type", "method", "start", "every"],
)
def test_the_op_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        legs_scan(**{"f": torch.zeros(1, 5), "state": torch.zeros(1, 4), **change})


# what is remembered


def test_the_first_coefficient_is_the_running_mean() -> None:
    f = draw(1, 50)
    state, history = legs_scan(f, torch.zeros(1, 4, dtype=torch.float64), 0, "zoh", 1)
    assert difference(history[0, :, 0], f[0].cumsum(0) / torch.arange(1, 51)) < 1e-13
    assert torch.equal(state, history[:, -1])


def test_polynomials_are_remembered_exactly_in_the_limit() -> None:
    errors = []
    for length in (1000, 4000):
        x = (torch.arange(length, dtype=torch.float64) + 0.5) / length * 2 - 1
        f = x**3 - 0.5 * x + 0.2
        memory = compress(f, 4)
        errors.append(float((memory.reconstruct(torch.arange(length))[0] - f).abs().max()))
    assert errors[1] < 1e-2
    assert errors[1] < errors[0] / 3.5  # what is left is the step, and shrinks with it


def test_time_does_not_matter_to_legs() -> None:
    """Played at half the speed a signal leaves the same coefficients, up to the error of a step."""
    f = white_noise(8000, 5, generator=seeded()).double()
    fast, slow = compress(f[::2], 32), compress(f, 32)
    assert (fast.coefficients - slow.coefficients).abs().max() < 2e-3
    assert slow.coefficients.abs().max() > 0.1


def test_an_early_sample_counts_as_much_as_a_late_one() -> None:
    """The gradient of the coefficients falls as 1 / t, not exponentially (proposition 6)."""
    sizes = []
    for length in (1000, 4000):
        f = torch.zeros(1, length, dtype=torch.float64, requires_grad=True)
        state, _ = legs_scan(f, torch.zeros(1, 8, dtype=torch.float64), 0, "zoh")
        (gradient,) = torch.autograd.grad(state[0, 2], f)
        sizes.append(gradient[0, length // 10].abs())
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.02)


def test_smoother_signals_need_fewer_coefficients() -> None:
    f = white_noise(10_000, 10, generator=seeded(1)).double()
    errors = [
        float((compress(f, n).reconstruct(torch.arange(10_000))[0] - f).square().mean()) for n in (8, 16, 64)
    ]
    assert errors[0] > errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize(
    ("measure", "error"),
    [("legs", 1e-5), ("legt", 2e-5), ("lmu", 2e-5), ("lagt", 3e-4), ("fourier", 3e-3), ("foud", 1e-4)],
)
def test_every_memory_tells_its_signal(measure: str, error: float) -> None:
    f = white_noise(4000, 10, generator=seeded()).double()
    memory = compress(f, 64, measure)
    assert float((memory.reconstruct(torch.arange(4000))[0] - f).square().mean()) < error
    assert f.square().mean() > 0.2


def test_a_window_forgets_what_left_it() -> None:
    f = torch.cat([100 * draw(3000).double(), white_noise(1000, 4, generator=seeded()).double()])
    memory = Memory(48, "legt", window=800)
    memory.write(f)
    assert (memory.oldest, memory.length) == (3200, 4000)
    told = memory.reconstruct(torch.arange(3200, 4000))[0]
    assert float((told - f[3200:])[20:-20].square().mean()) < 1e-2 * float(f[3200:].square().mean())
    with pytest.raises(LongscanError, match="expected samples in memory, 3,200 to 3,999"):
        memory.reconstruct(torch.tensor([3199]))


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_any_number_of_samples_at_a_time(measure: str) -> None:
    f = draw(2, 3000)
    whole, pieces = (Memory(12, measure, channels=2, window=500) for _ in range(2))
    whole.write(f)
    for piece in f.split([1, 0, 1023, 1, 1025, 950], 1):
        pieces.write(piece)
    assert difference(pieces.coefficients, whole.coefficients) < 1e-11
    assert pieces.length == 3000
    if measure != "legs":
        A_bar, B_bar = (torch.from_numpy(matrix) for matrix in held(measure, 12, SPANS[measure](12) / 500))
        c = torch.zeros(12, dtype=torch.float64)
        for sample in f[1]:
            c = A_bar @ c + B_bar * sample
        assert difference(whole.coefficients[1], c) < 1e-11


def test_the_sum_of_functions_is_that_of_the_basis() -> None:
    memory = compress(draw(1, 700), 20)
    age = (700 - 0.5 - torch.arange(700).double()) / 700
    expected = memory.coefficients @ basis("legs", 20, age)
    assert difference(memory.reconstruct(torch.arange(700)), expected) < 1e-12


def test_a_memory_refuses() -> None:
    for arguments, words in (
        ((0,), "n: expected at least 1"),
        ((4, "legss"), "did you mean 'legs'"),
        ((5, "fourier"), "n: expected an even number"),
        ((4, "legt"), "window: expected 1 or more samples for 'legt'"),
    ):
        with pytest.raises(LongscanError, match=words):
            Memory(*arguments)
    with pytest.raises(LongscanError, match="expected samples, got none"):
        compress(torch.zeros(0), 4)


# the cell


def mixer(**fields: Any) -> HippoMixer:
    sizes = {"d_model": 5, "n_layers": 1, "vocab_size": 7, "d_state": 4, "d_memory": 2, "d_hidden": 3}
    return HippoMixer(HippoConfig(**{**sizes, **fields}), seeded()).double()


ORDERS = ("hidden-first", "memory-first")


def steps_of(measure: str, seen: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """A_bar and B_bar (4, 4), (4,) of each token after `seen` ones, written out with dense matrices."""
    A, B = transition(measure, 4)
    eye, steps = torch.eye(4, dtype=torch.float64), []
    for k in range(seen + 1, seen + length + 1):
        if measure == "legs":
            left = eye - A / (2 * k)
            steps.append((torch.linalg.solve(left, eye + A / (2 * k)), torch.linalg.solve(left, B / k)))
        else:
            A_bar = torch.matrix_exp(A * SPANS[measure](4) / 10.0)
            steps.append((A_bar, torch.linalg.solve(A, (A_bar - eye) @ B)))
    return steps


def literal(
    cell: HippoMixer, order: str, measure: str, x: Tensor, h: Tensor, c: Tensor, seen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One row of the cell, equation by equation: x (length, 5), h (3,), c (2, 4) -> outputs, h, c."""
    W_f, W_x, b = cell.memory_weight, cell.in_proj.weight, cell.in_proj.bias
    outputs = []

    def gated(past: Tensor, x_part: Tensor, h: Tensor) -> Tensor:
        g = torch.sigmoid(x_part[:3] + cell.state_weight[:3] @ past)
        v = torch.tanh(x_part[3:] + cell.state_weight[3:] @ past)
        return (1 - g) * h + g * v

    for token, (A_bar, B_bar) in zip(x, steps_of(measure, seen, len(x)), strict=True):
        from_x = W_x @ token + b
        if order == "hidden-first":  # the paper's appendix
            h = gated(torch.cat([h, c.flatten()]), from_x, h)
            f = W_f @ h + cell.memory_bias
            c = torch.stack([A_bar @ c[i] + B_bar * f[i] for i in range(2)])
        else:  # hippo-code's MemoryCell
            f = from_x[:2] + W_f @ h
            c = torch.stack([A_bar @ c[i] + B_bar * f[i] for i in range(2)])
            h = gated(c.flatten(), from_x[2:], h)
        outputs.append(cell.out_proj.weight @ h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("measure", ["legs", "lagt"])
def test_the_cell_is_the_equations(measure: str, order: Any) -> None:
    """Outputs, state and every gradient, of rows that have read different numbers of tokens."""
    cell, seen = mixer(measure=measure, window=10.0, order=order), [0, 70]
    with torch.no_grad():
        cell.in_proj.bias.copy_(draw(*cell.in_proj.bias.shape, seed=3))
        if order == "hidden-first":
            cell.memory_bias.copy_(draw(2, seed=4))
    x, h, c = draw(2, 6, 5), draw(2, 3, seed=1), draw(2, 2, 4, seed=2)
    leaves = [*(tensor.requires_grad_() for tensor in (x, h, c)), *cell.parameters()]
    got, state = cell(x, HippoState(h, c, torch.tensor(seen)), None)
    rows = [literal(cell, order, measure, x[i], h[i], c[i], seen[i]) for i in range(2)]
    wanted = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
    found = [got, state.h, state.c]
    for ours, theirs in zip(found, wanted, strict=True):
        assert difference(ours.detach(), theirs.detach()) < 1e-12
    assert state.length.tolist() == [6, 76]
    weights = [draw(*tensor.shape, seed=5 + i) for i, tensor in enumerate(found)]
    ours, theirs = (
        torch.autograd.grad([(a * b).sum() for a, b in zip(outputs, weights, strict=True)], leaves)
        for outputs in (found, wanted)
    )
    for mine, right in zip(ours, theirs, strict=True):
        assert difference(mine, right) < 1e-11


@pytest.mark.parametrize("order", ORDERS)
def test_steps_of_the_cell_are_the_whole(order: Any) -> None:
    cell, x = mixer(order=order), draw(2, 6, 5)
    with torch.no_grad():
        whole, after = cell(x, None, None)
        state = cell.init_state(2)
        steps = torch.stack([cell.step(x[:, t], state) for t in range(6)], 1)
    assert difference(steps, whole) < 1e-13
    assert difference(state.h, after.h) < 1e-13
    assert difference(state.c, after.c) < 1e-13
    assert torch.equal(state.length, after.length)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_cells_own_way_back_is_right(measure: str, order: Any) -> None:
    """Also twice over, and of rows that end before the others."""
    cell, x = mixer(measure=measure, order=order), draw(2, 5, 5).requires_grad_()
    h, c = draw(2, 3, seed=1).requires_grad_(), draw(2, 2, 4, seed=2).requires_grad_()

    def read(x: Tensor, h: Tensor, c: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        y, state = cell.mix(x, HippoState(h, c, torch.tensor([0, 3])), torch.tensor([5, 2]))
        return y, state.h, state.c

    assert torch.autograd.gradcheck(read, (x, h, c, *cell.parameters()))
    assert torch.autograd.gradgradcheck(read, (x, h, c, *cell.parameters()))


def test_the_paper_reads_f_from_the_new_h_and_the_code_from_the_old() -> None:
    """What is remembered of a first token shows the order."""
    for order in ORDERS:
        cell, x = mixer(order=order), draw(1, 1, 5)
        _, state = cell(x, None, None)
        f = cell.memory_weight @ state.h[0] if order == "hidden-first" else cell.in_proj(x)[0, 0, :2]
        _, B_bar = steps_of("legs", 0, 1)[0]
        assert difference(state.c[0].detach(), (f[:, None] * B_bar).detach()) < 1e-12


def test_a_gate_is_a_memory_of_one_number() -> None:
    """With N = 1 and a step of softplus(z) the held memory is the gate of a GRU."""
    for z in (-2.0, 0.0, 3.0):
        gate = torch.tensor(z).double().sigmoid().item()
        A_bar, B_bar = held("tlagt", 1, math.log1p(math.exp(z)))
        assert A_bar.item() == pytest.approx(1 - gate, abs=1e-14)
        assert B_bar.item() == pytest.approx(gate, abs=1e-14)


def test_legs_knows_no_time_and_windows_do() -> None:
    model = HippoRNN(HippoConfig(d_model=8, n_layers=1, vocab_size=7, measure="legt", window=100.0), seeded())
    cell = model.backbone.layers[0].mixer
    cell.rescale_time(2.0)
    assert cell.dt == pytest.approx(2 * SPANS["legt"](64) / 100)
    other = mixer()
    x = draw(1, 4, 5)
    before = other(x, None, None)[0]
    other.rescale_time(2.0)
    assert torch.equal(before, other(x, None, None)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": "lego"}, "measure"),
        ({"measure": "fourier", "d_state": 5}, "d_state"),
        ({"d_memory": 0}, "d_memory"),
        ({"d_hidden": 0}, "d_hidden"),
        ({"window": 0.5}, "window"),
        ({"order": "h-first"}, "order"),
    ],
    ids=["measure", "odd", "memory", "hidden", "window", "order"],
)
def test_misuse(change: dict[str, Any], words: str) -> None:
    with pytest.raises(LongscanError, match=words):
        mixer(**change)


def test_exports() -> None:
    A, B = legs_matrices(3)
    assert torch.equal(A, transition("legs", 3)[0])
    assert torch.equal(B, transition("legs", 3)[1])
    assert ops.legs_scan is legs_scan
