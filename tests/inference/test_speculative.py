"""Drafts change how fast a text is written, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import Drafter, DraftModel, PromptLookup
from longscan.inference.engine import Engine
from longscan.inference.request import Request
from longscan.inference.row import MAX_PENDING, RowProgress
from longscan.inference.sampling import Event, SamplingConfig
from longscan.inference.speculative import Pace, Speculator
from longscan.models import LanguageModel
from longscan.tokenizers.base import ByteTokenizer
from small_models import NAMES, build

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(name=getattr(request, "param", "mamba"))


each_model = pytest.mark.parametrize("model", NAMES, indirect=True)


class Oracle:
    """Knows the text, but errs at some places."""

    def __init__(self, text: Sequence[int], wrong: Sequence[int] = (), k: int = 6) -> None:
        self.text, self.wrong, self.k = list(text), set(wrong), k
        self.calls = 0

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        self.calls += 1
        assert list(ids) == self.text[: len(ids)], "a drafter is shown the whole text"
        places = range(len(ids), min(len(ids) + k, len(self.text)))
        return [(self.text[i] + (i in self.wrong)) % 257 for i in places]


class Babbler:
    """Guesses nonsense, also more than was asked for and ids that are none."""

    k = 5

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        return [[7] * 9, [], [-1], [256, 5_000, 1], [int(ids[-1])] * k][len(ids) % 5]


class Eager(Pace):
    """Drafts whether or not it pays."""

    def drafts(self, pending: int, limit: int) -> int:
        return limit if pending <= MAX_PENDING else 0


def eager(model: LanguageModel, drafter: Any) -> Speculator:
    return Speculator(model, drafter, Eager())


def write(
    model: LanguageModel,
    prompt: Sequence[int],
    drafter: Drafter | Speculator | None,
    slots: int = 1,
    **sampling: Any,
) -> tuple[list[Event], Engine]:
    config = SamplingConfig.from_dict({"seed": 1, "max_new_tokens": 60, **sampling})
    engine = Engine(model, BYTES, slots=slots, drafter=drafter)
    engine.submit(Request(ids=prompt, config=config, keep=True))
    return list(engine.run()), engine


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.2, "repetition_penalty": 1.3},
    {"temperature": 0, "max_new_tokens": 1},
]


WHO = ["right", "errs", "wrong", "babbler", "lookup", "same-model", "other-model"]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["greedy", "sampled", "penalized", "one-token"])
@pytest.mark.parametrize(
    ("model", "who"),
    [
        *(("mamba", who) for who in WHO),
        *(("llama", who) for who in ("errs", "babbler", "same-model")),
    ],
    indirect=["model"],
)
def test_the_text_is_the_same_with_drafts(model: LanguageModel, sampling: dict[str, Any], who: str) -> None:
    prompt = [*range(40), *range(20)]
    plain, _ = write(model, prompt, None, **sampling)
    text = prompt + [event.token for event in plain]
    drafter: Any = {
        "right": Oracle(text),
        "errs": Oracle(text, wrong=[*range(63, 200, 4), 80, 81, 82]),
        "wrong": Oracle(text, wrong=range(200)),
        "babbler": Babbler(),
        "lookup": PromptLookup(),
        "same-model": DraftModel(model),
        "other-model": DraftModel(build(sharpness=4)),
    }[who]
    drafted, engine = write(model, prompt, eager(model, drafter), **sampling)
    assert drafted == plain
    if who == "right":
        assert engine.drafted == engine.accepted == len(plain) - 1 - (len(plain) - 1 + 6) // 7
    if who == "wrong":
        assert engine.accepted == 0
        assert engine.drafted >= len(plain) // 2
    if who == "same-model" and sampling["temperature"] == 0:
        assert engine.accepted == engine.drafted


@pytest.mark.parametrize("wrong", [(), range(0, 200, 3)], ids=["right", "errs"])
def test_a_text_ends_inside_a_draft(model: LanguageModel, wrong: Sequence[int]) -> None:
    plain, _ = write(model, [1], None, max_new_tokens=200, temperature=1.0)
    text = [1] + [event.token for event in plain]
    eos, stop = text[30], BYTES.decode(text[1:])[22:24]
    for fields, config in (({"eos_id": eos}, {}), ({}, {"stop": [stop]}), ({}, {"max_new_tokens": 25})):
        settings_ = SamplingConfig.from_dict({"seed": 1, "temperature": 1.0, "max_new_tokens": 200, **config})
        request = Request(ids=[1], config=settings_, keep=True, **fields)
        without, drafted = (
            Engine(model, BYTES),
            Engine(model, BYTES, drafter=eager(model, Oracle(text, wrong))),
        )
        for engine in (without, drafted):
            engine.submit(request)
        events = list(without.run())
        assert list(drafted.run()) == events
        assert len(events) < 200
        one, other = without.saved(0), drafted.saved(0)
        assert other.position + len(other.pending) == one.position + len(one.pending) == len(events) + 1
        # both go on alike: what was drafted beyond the end left no trace
        ends = []
        for saved in (one, other):
            saved_tokens = torch.tensor([saved.pending])
            logits, _ = model.advance(saved_tokens, saved.state)
            ends.append(logits[0, -1])
        assert torch.equal(*ends)


@each_model
def test_drafts_rest_while_there_is_company(model: LanguageModel) -> None:
    plain, _ = write(model, [1], None, temperature=0)
    text = [1] + [event.token for event in plain]
    oracle = Oracle(text, wrong=range(3, 200, 5))
    config = SamplingConfig(temperature=0, max_new_tokens=60)
    engine = Engine(model, BYTES, drafter=eager(model, oracle), slots=2)
    engine.submit(Request(ids=[1], config=config))
    events = [event for _ in range(4) for event in engine.step()]
    assert len(engine._rows[0].progress.pending) > 1  # some tokens are pending
    engine.submit(Request(ids=[9], config=SamplingConfig(max_new_tokens=3)))
    calls = oracle.calls
    for _ in range(3):
        events += engine.step()
    assert oracle.calls == calls
    events += engine.run()
    assert oracle.calls > calls
    assert [event for event in events if event.row == 0] == plain


def test_one_slot_drafts_though_others_wait(model: LanguageModel) -> None:
    drafter = DraftModel(model)
    engine = Engine(model, BYTES, drafter=drafter, slots=1)
    for _ in range(2):
        engine.submit(Request(ids=[1], config=SamplingConfig(temperature=0, max_new_tokens=40)))
    events = list(engine.run())
    first, second = ([event._replace(row=0) for event in events if event.row == row] for row in (0, 1))
    assert first == second


# drafters


def last_match(ids: list[int], ngram: int, k: int) -> list[int]:
    """Look for the end of a text in the text, from the right, without an index."""
    for n in range(min(ngram, len(ids)), 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                period = len(ids) - end
                return [ids[end + i % period] for i in range(k)]
    return []


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 7), max_size=12),
    ngram=st.integers(2, 4),
    k=st.integers(1, 9),
)
def test_a_lookup_finds_the_last_match(ids: list[int], cuts: list[int], ngram: int, k: int) -> None:
    lookup, end = PromptLookup(ngram, k=9), 1
    for cut in cuts:
        assert lookup.propose(ids[:end], k) == last_match(ids[:end], ngram, k)
        end += cut
    assert lookup.propose(ids, k) == last_match(ids, ngram, k)
    assert lookup.propose([1, 2, 3, 1, 2], k) == last_match([1, 2, 3, 1, 2], ngram, k)  # another text


def test_a_lookup_looks_at_the_end_of_a_long_prompt() -> None:
    assert PromptLookup(window=10).propose([1, 2, 3, *[0] * 10, 1, 2], 3) == []
    assert PromptLookup(window=10).propose([1, 2, 3, *[0] * 5, 1, 2], 3) == [3, 0, 0]


def greedy(model: LanguageModel, ids: list[int], n: int) -> list[int]:
    out = list(ids)
    for _ in range(n):
        out.append(int(model(torch.tensor([out])).logits[0, -1, :257].argmax()))
    return out[len(ids) :]


@each_model
def test_a_draft_model_writes_what_it_finds_likeliest(model: LanguageModel) -> None:
    drafter, ids = DraftModel(model, k=4), list(range(30))
    for kept, then in ((4, 0), (2, 9), (0, 8), (4, 7), (1, 6)):
        guess = drafter.propose(ids, 9)
        assert guess == greedy(model, ids, 4)
        ids += [*guess[:kept], then]  # some of the guesses come true, then another token
    other = list(range(100, 228))
    assert drafter.propose(other, 3) == greedy(model, other, 3)
    assert drafter.propose(ids, 1) == greedy(model, ids, 1)
    assert drafter.propose(ids, 2) == greedy(model, ids, 2)  # asked again


def test_a_draft_model_of_another_vocabulary_is_refused(model: LanguageModel) -> None:
    with pytest.raises(LongscanError, match="the draft model has 300 ids, the model 257"):
        Engine(model, drafter=DraftModel(build(300)))
    with pytest.raises(LongscanError, match="decodes with another model"):
        Engine(model, drafter=Speculator(build(), PromptLookup()))


@pytest.mark.parametrize(
    "make", [lambda: PromptLookup(1), lambda: PromptLookup(k=0), lambda: DraftModel(build(), 0)]
)
def test_impossible_drafters_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        make()


# the pace


def paced(slope: float, hits: float, propose: float = 0.0) -> Pace:
    """A pace that has measured: a step takes 1 ms, each further token `slope` of it."""
    pace = Pace()
    for _ in range(50):
        pace.measured(1, 1e-3)
        pace.measured(5, 1e-3 * (1 + 4 * slope))
        pace.judged(1, int(torch.rand(()) < hits) if 0 < hits < 1 else int(hits))
        pace.proposed(1, propose * 1e-3)
    if 0 < hits < 1:
        pace._hits, pace._tries = hits * 10, 10.0
    return pace


def test_drafts_are_longer_where_they_are_better_and_cheaper() -> None:
    lengths = [paced(0.1, hits).drafts(1, 8) for hits in (0, 0.05, 0.5, 0.8, 1)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 8)
    lengths = [paced(slope, 0.8).drafts(1, 8) for slope in (1, 0.3, 0.1, 0.01)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 8)
    assert paced(0.1, 0.9, propose=0.05).drafts(1, 8) > paced(0.1, 0.9, propose=0.3).drafts(1, 8)
    assert paced(0.1, 0.9, propose=2).drafts(1, 8) == 0


def test_no_drafts_before_anything_is_known_or_while_much_waits() -> None:
    assert Pace().drafts(1, 8) == 0
    assert paced(0.01, 1).drafts(MAX_PENDING + 1, 8) == 0


def test_bad_news_is_forgotten() -> None:
    pace = paced(0.9, 0.9)
    assert pace.drafts(1, 8) == 0
    for _ in range(200):
        pace.idle()
    assert pace.drafts(1, 8) > 0


def test_useless_drafts_are_given_up(model: LanguageModel) -> None:
    plain, _ = write(model, [1], None, temperature=1.0, max_new_tokens=300)
    text = [1] + [event.token for event in plain]
    drafted, engine = write(model, [1], Oracle(text, wrong=range(400)), temperature=1.0, max_new_tokens=300)
    assert drafted == plain
    assert engine.drafted < 60


def test_good_drafts_are_noticed_without_reading_them(model: LanguageModel) -> None:
    text = RowProgress(pending=[1], ids=[1])
    engine = Engine(model, drafter=Oracle([1, 2, 3, 4], k=3))
    speculator = engine._speculator
    assert speculator is not None
    speculator._pace = paced(1.0, 0)
    state = model.init_state(1)
    hits = []
    for token in (2, 3, 4):
        speculator.round(state, text, 50, lambda _, token=token: (token, False))
        hits.append(round(speculator._pace._hits, 2))
    assert hits == pytest.approx([1.0, 1.9, 2.71], abs=0.02)
    assert (text.position, text.pending, speculator.drafted) == (3, [4], 0)
