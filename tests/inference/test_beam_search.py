"""Beam search: against all sentences there are, against a beam that keeps no state, alone and in company."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.inference.beam_search import Hypothesis, translate_ids
from longscan.models import Translator
from translation import NAMES, build, rows

CLOSE = 1e-10  # float64
SOURCES = [[3, 4, 3, 4, 4], [4, 4], [3], [4, 3, 3]]
MORE = [*SOURCES, [5, 6], [7, 8, 9], [10], [11, 12]]
SEED = 8  # its models end their sentences at different lengths


@torch.no_grad()
def log_p(model: Translator, source: list[int], sentences: list[list[int]]) -> Tensor:
    """Compute log p of whole sentences and their ends, (n,), in one pass."""
    target = rows(*sentences, bos=True)
    scores = model(rows(*[source] * len(sentences)), target[:, :-1]).logits.log_softmax(-1)
    scores = scores.gather(2, target[:, 1:, None]).squeeze(2)
    return scores.masked_fill(target[:, 1:] == 0, 0.0).sum(1)


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_beam_wide_enough_finds_the_best_of_all_sentences(name: str, alpha: float) -> None:
    model = build(name, SEED, vocab_size=5)
    found = translate_ids(model, rows(*SOURCES), beam_size=64, max_len=4, length_penalty=alpha)
    everything = [list(ids) for n in range(5) for ids in itertools.product((3, 4), repeat=n)]
    penalties = torch.tensor([penalty(len(ids) + 1, alpha) for ids in everything], dtype=torch.float64)
    for source, hypothesis in zip(SOURCES, found, strict=True):
        best, index = (log_p(model, source, everything) / penalties).max(0)
        assert hypothesis.ids == everything[index]
        assert math.isclose(hypothesis.score, best, abs_tol=CLOSE)


@torch.no_grad()
def plain_beam(model: Translator, source: list[int], size: int, max_len: int, alpha: float) -> Hypothesis:
    """Search by the rules of `translate_ids`, one sentence in plain lists, every pass from the start."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Hypothesis] = []
    for length in range(max_len + 1):
        ways = []
        for score, ids in live:
            target = torch.tensor([[1, *ids]])
            next_log_p = model(rows(source), target).logits[0, -1].log_softmax(-1).tolist()
            allowed = range(2, len(next_log_p)) if length < max_len else [2]
            ways += [(score + next_log_p[token], [*ids, token]) for token in allowed]
        ways.sort(reverse=True)
        for score, ids in ways[:size]:
            if ids[-1] == 2:
                finished.append(Hypothesis(ids[:-1], score / penalty(len(ids), alpha)))
        live = [way for way in ways[: 2 * size] if way[1][-1] != 2][:size]
        best = max((hypothesis.score for hypothesis in finished), default=-math.inf)
        if len(finished) >= size or not live or live[0][0] / penalty(max_len + 1, alpha) <= best:
            break
    return max(finished, key=lambda hypothesis: hypothesis.score)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_and_the_neighbours_change_nothing(name: str) -> None:
    model, lengths = build(name, SEED), set()
    for beam_size in (1, 2, 5):
        together = translate_ids(model, rows(*MORE), beam_size=beam_size, max_len=7)
        for source, hypothesis in zip(MORE, together, strict=True):
            expected = plain_beam(model, source, beam_size, 7, 0.6)
            assert hypothesis.ids == expected.ids
            assert math.isclose(hypothesis.score, expected.score, abs_tol=CLOSE)
            lengths.add(len(hypothesis.ids))
    assert len(lengths) > 1  # they left at different times


def test_one_beam_is_greedy() -> None:
    model = build("bahdanau", SEED)
    found = translate_ids(model, rows(*MORE), beam_size=1, max_len=7)
    for source, hypothesis in zip(MORE, found, strict=True):
        ids: list[int] = []
        while len(ids) < 7:
            logits = model(rows(source), torch.tensor([[1, *ids]])).logits[0, -1]
            logits[:2] = -torch.inf
            if (token := int(logits.argmax())) == 2:
                break
            ids.append(token)
        assert hypothesis.ids == ids


def test_a_translation_may_have_fifty_tokens_more_than_its_source() -> None:
    model = build("transformer")
    with torch.no_grad():
        last = model.decoder[-1].norm3  # its output is all ones, whatever was read
        last.weight.zero_()
        last.bias.fill_(1.0)
        model.target_embedding.weight[2] = -10.0
    found = translate_ids(model, rows(*SOURCES), beam_size=2)
    assert max(len(h.ids) - len(source) for h, source in zip(found, SOURCES, strict=True)) == 50


def test_no_hypothesis_holds_padding_or_a_second_start() -> None:
    model = build("bahdanau")
    with torch.no_grad():
        model.head.weight[:2] *= 10.0
    for hypothesis in translate_ids(model, rows(*SOURCES), max_len=6):
        assert min(hypothesis.ids, default=3) > 2


def broken(model: Translator) -> None:
    with torch.no_grad():
        model.table("source").weight.fill_(torch.nan)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (Translator.eval, {"beam_size": 0}, "beam_size: expected 1 or more, got 0"),
        (Translator.eval, {"max_len": 0}, "max_len: expected 1 or more, got 0"),
        (Translator.eval, {"length_penalty": -1.0}, "length_penalty: expected 0 or more"),
        (Translator.train, {}, "training mode"),
        (broken, {}, "NaN"),
    ],
    ids=["beam", "length", "penalty", "training", "nan"],
)
def test_what_cannot_be_searched_is_refused(change, arguments, message) -> None:  # type: ignore[no-untyped-def]
    model = build("luong")
    change(model)
    with pytest.raises(LongscanError, match=message):
        translate_ids(model, rows(*SOURCES), **arguments)


def test_the_end_alone_is_a_translation() -> None:
    model = build("seq2seq", vocab_size=3)  # there is no other token
    source: Tensor = torch.tensor([[2], [2]])
    assert [h.ids for h in translate_ids(model, source)] == [[], []]
