"""The ODE-RNN: a GRU between whose observations the state moves on by itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models.neural_ode import ODERNN, ODERNNConfig

# largest error of exp(-2), in 20 steps or as many as it takes
TOLERANCE = {"euler": 2e-2, "midpoint": 1e-3, "rk4": 1e-6, "dopri5": 1e-6}

pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")


def small(**fields: Any) -> ODERNN:
    config = ODERNNConfig(**{"d_input": 3, "d_hidden": 5, **fields})
    return ODERNN(config, torch.Generator().manual_seed(0)).double()


def series(batch: int = 2, seq_len: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, seq_len, 3, generator=draw, dtype=torch.float64)
    return x, torch.rand(batch, seq_len, generator=draw, dtype=torch.float64).cumsum(1)


class Decay(torch.nn.Module):
    """h' = -h."""

    def forward(self, h: Tensor) -> Tensor:
        return -h


@pytest.mark.parametrize("solver", TOLERANCE)
def test_decay_is_exponential(solver: str) -> None:
    model = small(solver=solver, n_steps=20, tolerance=1e-8)
    model.dynamics = Decay()
    h = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gap = torch.tensor([2.0, 0.5], dtype=torch.float64)  # each row its own
    got, expected = model.evolve(h, gap), h * torch.exp(-gap)[:, None]
    assert (got - expected).abs().max() < TOLERANCE[solver] * h.abs().max()


def test_without_time_it_is_a_gru() -> None:
    model = small()
    x, times = series()
    h, states = torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(6):
        h = model.cell(x[:, t], h)
        states.append(h)
    torch.testing.assert_close(model(x, torch.zeros_like(times)), torch.stack(states, 1))


@pytest.mark.parametrize("dynamics", ["mlp", "gated"])
def test_only_the_time_between_observations_counts(dynamics: str) -> None:
    model = small(dynamics=dynamics, n_steps=4)
    x, times = series()
    expected = model(x, times)
    torch.testing.assert_close(model(x, times + 100), expected)
    assert (model(x, 2 * times) - expected).abs().max() > 1e-3
    halves = model.evolve(model.evolve(expected[:, 0], times[:, 0]), times[:, 0])
    torch.testing.assert_close(model.evolve(expected[:, 0], 2 * times[:, 0]), halves, rtol=0, atol=1e-3)


def test_rows_do_not_touch_each_other_and_padding_nothing() -> None:
    model = small()
    x, times = series()
    lengths = torch.tensor([6, 3])
    x[1, 3:], times[1, 3:] = float("inf"), -1.0
    together = model(x, times, lengths)
    for row, length in enumerate(lengths):
        alone = model(x[row, None, :length], times[row, None, :length])
        torch.testing.assert_close(together[row, None, :length], alone)
    torch.testing.assert_close(together[1, 3:], together[1, 2].expand(3, -1))


def test_a_series_in_two_parts() -> None:
    model = small()
    x, times = series()
    whole = model(x, times)
    state = model.evolve(whole[:, 2], times[:, 3] - times[:, 2])
    torch.testing.assert_close(model(x[:, 3:], times[:, 3:], state=state), whole[:, 3:])


def test_gated_dynamics_keep_the_state_bounded() -> None:
    model = small(dynamics="gated", n_steps=50)
    h = torch.full((1, 5), 0.99, dtype=torch.float64)
    assert model.evolve(h, torch.tensor([20.0])).abs().max() < 1


@pytest.mark.parametrize("dynamics", ["mlp", "gated"])
def test_gradients_reach_everything(dynamics: str) -> None:
    model = small(dynamics=dynamics)
    x, times = series(1, 3)
    inputs = [x.requires_grad_(), times.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *inputs: model(*inputs), inputs)
    model(x, times).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_it_learns_a_phase_from_uneven_samples() -> None:
    """Two speeds of one wave, sampled at random times: only who knows the times can tell them apart."""
    draw = torch.Generator().manual_seed(0)
    times = torch.rand(32, 6, generator=draw).sort(1).values * 4
    fast = torch.arange(32) % 2
    x = torch.sin(times * (1 + fast[:, None]))[..., None]
    model = ODERNN(ODERNNConfig(d_input=1, d_hidden=16), draw)
    head = torch.nn.Linear(16, 2)
    torch.nn.init.normal_(head.weight, generator=draw)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.02)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(head(model(x, times)[:, -1]), fast)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # 0.69 by guessing


@pytest.mark.parametrize(
    "change",
    [{"d_input": 0}, {"d_ode": 0}, {"n_steps": 0}, {"dynamics": "x"}, {"solver": "x"}, {"tolerance": 0.0}],
    ids="-".join,
)
def test_impossible_fields_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(LongscanError, match=next(iter(change))):
        small(**change)


def test_wrong_arguments_say_what_was_expected() -> None:
    model, (x, times) = small(), series()
    with pytest.raises(ValueError, match=r"x: expected a non-empty \(batch, seq_len, 3\)"):
        model(x[..., :2], times)
    with pytest.raises(ValueError, match="times: expected shape"):
        model(x, times[:, 1:])
    with pytest.raises(ValueError, match="do not decrease"):
        model(x, -times)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(LongscanError, match=r"pip install 'longscan\[ode\]'"):
        small()(*series())
