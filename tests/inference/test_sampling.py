"""Drawing: who may be drawn, how often, and that numbers that are none are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from longscan.errors import LongscanError
from longscan.inference.sampling import Sampler, SamplingConfig, _invert, candidates, to_array


def row(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, np.float32)


def shares(logits: np.ndarray, config: SamplingConfig) -> list[float]:
    """The probability of every token."""
    ids, weights = candidates(logits, config)
    probs = np.zeros(len(logits))
    probs[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return probs.tolist()


def draws(logits: np.ndarray, n: int, vocab_size: int | None = None, **sampling: Any) -> list[int]:
    sampler = Sampler(SamplingConfig.from_dict({"seed": 3, **sampling}), vocab_size or len(logits))
    return [sampler.draw(logits) for _ in range(n)]


def by_the_book(row: list[float], config: SamplingConfig) -> list[float]:
    """The filters one after another, each as its paper says it, on a row without ties."""
    weights = torch.tensor(row, dtype=torch.float64).div(config.temperature).softmax(0).tolist()
    order = sorted(range(len(row)), key=lambda i: -weights[i])
    kept = order[: config.top_k] if config.top_k else order
    total = sum(weights[i] for i in kept)
    if config.top_p < 1:
        mass, n = 0.0, 0
        while n < len(kept) and mass < config.top_p:
            mass += weights[kept[n]] / total
            n += 1
        kept = kept[:n]
    kept = [i for i in kept if weights[i] >= config.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(row))]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([1, 2, 5, 63, 257, 700]),
    spread=st.sampled_from([0.01, 1.0, 10.0, 40.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 64, 10_000]),
    top_p=st.sampled_from([1e-6, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_the_filters_do_what_their_papers_say(
    seed: int, vocab_size: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    logits = row(order * spread / vocab_size - 5)
    expected = by_the_book(logits.tolist(), config)
    np.testing.assert_allclose(shares(logits, config), expected, rtol=2e-4, atol=1e-6)


def test_top_p_keeps_just_enough() -> None:
    for seed in range(30):
        logits = row(np.random.default_rng(seed).normal(size=2000) * (1 + seed % 4))
        full = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
        kept = full[np.array(shares(logits, SamplingConfig(temperature=1, top_p=0.8))) > 0]
        assert kept.sum() >= 0.8 - 1e-6
        assert kept.sum() - kept.min() < 0.8 + 1e-6


def test_ties_stay_together() -> None:
    config = SamplingConfig(temperature=1, top_k=2, top_p=1.0)
    assert [share > 0 for share in shares(row([1, 2, 1, 0]), config)] == [True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-300])
@pytest.mark.parametrize("logits", [[3.0, 3.1, -900.0], [-1e31, -1e30, -1e32], [-3e38, 3e38, -np.inf]])
def test_next_to_no_temperature_is_greedy(temperature: float, logits: list[float]) -> None:
    for config in (SamplingConfig(temperature=temperature), SamplingConfig(temperature=temperature, top_k=2)):
        assert shares(row(logits), config) == [0, 1, 0]


def test_draws_follow_the_distribution() -> None:
    logits = row([0.5, -np.inf, 2.0, 1.0, -np.inf])
    counts = np.bincount(draws(logits, 3000, temperature=1, top_p=1.0), minlength=5) / 3000
    np.testing.assert_allclose(counts, torch.tensor(logits).softmax(0), atol=0.03)
    assert counts[[1, 4]].tolist() == [0, 0]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 0.3, 1.0]), max_size=700),
    place=st.integers(0, 700),
    u=st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53]),
)
def test_a_random_number_falls_on_its_weight(weights: list[float], place: int, u: float) -> None:
    array = row([*weights[:place], 1.0, *weights[place:]])
    drawn = _invert(array, u)
    below = array.astype(np.float64).cumsum()
    assert array[drawn] > 0
    assert below[drawn] >= u * below[-1] * (1 - 1e-12)
    assert below[drawn] - array[drawn] <= u * below[-1] * (1 + 1e-12)


def test_a_draw_takes_one_random_number_whatever_the_settings() -> None:
    logits = row(np.random.default_rng(0).normal(size=300))
    for settings_ in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.5, "top_p": 1.0}):
        sampler = Sampler(SamplingConfig(seed=5, **settings_), 300)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            sampler.draw(logits)
            torch.rand((), generator=generator, dtype=torch.float64)
        assert torch.equal(sampler._generator.get_state(), generator.get_state())


@pytest.mark.parametrize("temperature", [0, 5.0])
def test_ids_that_pad_the_vocabulary_are_never_drawn(temperature: float) -> None:
    logits = np.zeros(264, np.float32)
    logits[257:] = 99
    assert max(draws(logits, 500, 257, temperature=temperature, top_p=1.0)) < 257


def test_repetition_counts_prompt_and_new_text() -> None:
    config = SamplingConfig(temperature=0, repetition_penalty=4.0)
    first, second = Sampler(config, 3, [0]), Sampler(config, 3, [2])
    high, low = row([2.0, 1.0, -1.0]), row([-1.0, -1.5, -0.5])
    assert (first.draw(high), second.draw(low)) == (1, 0)  # 2/4 < 1; -0.5*4 < -1
    assert (first.draw(high), second.draw(low)) == (0, 1)  # 2/4 > 1/4; -1.5 > -2
    assert second.draw(low) == 2  # all seen: the likeliest again
    assert high.tolist() == [2.0, 1.0, -1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"repetition_penalty": 2.0}])
def test_logits_that_are_no_numbers_are_an_error(bad: float, sampling: dict[str, Any]) -> None:
    logits = row([bad] * 5 if bad == -np.inf else [0, 0, bad, 0, 0])
    with pytest.raises(LongscanError, match="NaN or infinite"):
        draws(logits, 1, **sampling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_of_any_type_can_be_drawn_from(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -2.5]], dtype=dtype, requires_grad=True)
    assert to_array(logits).tolist() == [[1.0, -2.5]]
    assert to_array(logits).dtype == np.float32
