"""What a request may ask for: choices, log-probabilities, constraints, penalties; and fairness."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import PromptLookup
from longscan.inference.engine import Engine
from longscan.inference.request import Request
from longscan.inference.sampling import Event, SamplingConfig, log_probabilities
from longscan.models import LanguageModel
from small_models import NAMES, build

PROMPT = list(range(40, 90))


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(name=request.param)


@pytest.fixture(scope="module")
def mamba() -> LanguageModel:
    return build(sharpness=1)


def config(**fields: Any) -> SamplingConfig:
    return SamplingConfig.from_dict(
        {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "seed": 3, **fields}
    )


def texts(engine: Engine) -> dict[int, list[Event]]:
    rows: dict[int, list[Event]] = {}
    for event in engine.run():
        rows.setdefault(event.row, []).append(event)
    return rows


def ids(events: list[Event]) -> list[int]:
    return [event.token for event in events]


def alone(model: LanguageModel, request: Request) -> list[int]:
    engine = Engine(model, slots=1)
    engine.submit(request)
    return ids(texts(engine)[0])


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_choices_share_one_prefill_and_equal_those_of_single_requests(
    model: LanguageModel, slots: int
) -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine(model, slots=slots, progress=lambda done, total: seen.append((done, total)))
    numbers = engine.submit_copies(Request(ids=PROMPT, config=config()), 5)
    other = engine.submit(Request(ids=PROMPT[:7], config=config(seed=9)))
    rows = texts(engine)
    assert seen[-1] == (57, 57)  # 50 once, and 7
    for i, number in enumerate(numbers):
        assert ids(rows[number]) == alone(model, Request(ids=PROMPT, config=config(seed=3 + i)))
    assert ids(rows[other]) == alone(model, Request(ids=PROMPT[:7], config=config(seed=9)))
    assert len({tuple(ids(rows[number])) for number in numbers}) > 1


def test_choices_can_be_cancelled_one_by_one(mamba: LanguageModel) -> None:
    engine = Engine(mamba, slots=2, read_tokens=1)
    numbers = engine.submit_copies(Request(ids=PROMPT * 40, config=config()), 4)
    engine.step()  # a part of the prompt
    assert engine.cancel(numbers[0])
    assert engine.cancel(numbers[2])
    rows = texts(engine)
    assert set(rows) == {numbers[1], numbers[3]}
    assert ids(rows[numbers[3]]) == alone(mamba, Request(ids=PROMPT * 40, config=config(seed=6)))
    for number in engine.submit_copies(Request(ids=PROMPT, config=config()), 3):
        engine.cancel(number)
    assert engine.waiting == engine.running == 0
    assert engine.step() == []


def test_n_is_checked(mamba: LanguageModel) -> None:
    with pytest.raises(LongscanError, match="n: expected 1 or more"):
        Engine(mamba).submit_copies(Request(ids=PROMPT), 0)


@pytest.mark.parametrize("drafts", [False, True])
def test_log_probabilities_are_the_models(model: LanguageModel, drafts: bool) -> None:
    prompt = [5, 6, 7] * 10
    engine = Engine(model, slots=1, drafter=PromptLookup() if drafts else None)
    engine.submit(Request(ids=prompt, config=config(logprobs=3, temperature=0.5, repetition_penalty=1.3)))
    events = texts(engine)[0]
    whole = torch.tensor([prompt + ids(events)])
    with torch.no_grad():
        expected = model(whole).logits[0, len(prompt) - 1 : -1, :257].double().log_softmax(-1)
    for event, row in zip(events, expected, strict=True):
        assert event.logprob == pytest.approx(row[event.token].item(), abs=1e-4)
        assert [value for _, value in event.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [row[index].item() for index, _ in event.top] == pytest.approx(
            [value for _, value in event.top], abs=1e-4
        )


def test_log_probabilities_of_ties_and_of_impossible_tokens() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf, 3.0], np.float32)
    logprob, top = log_probabilities(logits, 3, 2)
    assert logprob == -np.inf
    assert [index for index, _ in top] == [1, 2]
    assert top[0][1] == pytest.approx(-np.log(3 + np.exp(-2)))
    assert log_probabilities(logits, 1, 0)[1] == ()
    assert len(log_probabilities(logits, 1, 99)[1]) == 5


class Even:
    """Allows even ids below 100, and records what is accepted."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(100) % 2 == 0

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_constraints(model: LanguageModel, temperature: float, drafts: bool) -> None:
    made: list[Even] = []

    def make() -> Even:
        made.append(Even())
        return made[-1]

    engine = Engine(model, slots=1 if drafts else 4, drafter=PromptLookup() if drafts else None)
    request = Request(ids=[2, 4] * 20, config=config(temperature=temperature), constraint=make)
    numbers = engine.submit_copies(request, 2)
    rows = texts(engine)
    for constraint, number in zip(made, numbers, strict=True):
        assert constraint.accepted == ids(rows[number])
        assert all(token % 2 == 0 and token < 100 for token in constraint.accepted)


def test_a_constraint_without_a_way_out_ends_only_its_own_text(mamba: LanguageModel) -> None:
    class Never(Even):
        def allowed(self) -> np.ndarray:
            return np.zeros(300, bool) if len(self.accepted) == 3 else np.ones(300, bool)

    engine = Engine(mamba, slots=2)
    stuck = engine.submit(Request(ids=PROMPT, config=config(), constraint=Never))
    free = engine.submit(Request(ids=PROMPT, config=config()))
    rows = texts(engine)
    assert len(rows[stuck]) == 4
    assert rows[stuck][-1].finish == "error"
    assert "no token is allowed" in str(rows[stuck][-1].error)
    assert ids(rows[free]) == alone(mamba, Request(ids=PROMPT, config=config()))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda: 1 / 0, "the constraint failed: ZeroDivisionError"),
        (lambda: np.ones(257, np.int64), "expected a row of truth values, got int64"),
        (lambda: np.ones((257, 1), bool), "expected a row of truth values"),
    ],
)
def test_a_constraint_that_fails_ends_only_its_own_text(mamba: LanguageModel, mask: Any, words: str) -> None:
    class Failing(Even):
        def allowed(self) -> Any:
            return mask() if len(self.accepted) == 2 else None

    engine = Engine(mamba, slots=2)
    free = engine.submit(Request(ids=PROMPT, config=config()))
    stuck = engine.submit(Request(ids=PROMPT, config=config(), constraint=Failing))
    rows = texts(engine)
    assert words in str(rows[stuck][-1].error)
    assert ids(rows[free]) == alone(mamba, Request(ids=PROMPT, config=config()))


@pytest.mark.parametrize("penalty", [1e-38, 1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_extreme_penalties_stop_nobody(mamba: LanguageModel, penalty: float, temperature: float) -> None:
    fields = {"repetition_penalty": penalty, "temperature": temperature, "top_p": 0.9}
    assert len(alone(mamba, Request(ids=PROMPT, config=config(**fields)))) == 20


def test_progress_may_cancel_the_request_it_reports(mamba: LanguageModel) -> None:
    engine = Engine(mamba, slots=1, progress=lambda done, total: engine.cancel(0) and None)
    engine.submit(Request(ids=PROMPT, config=config()))
    other = engine.submit(Request(ids=PROMPT, config=config()))
    assert set(texts(engine)) == {other}


def test_a_constraint_that_allows_all_changes_nothing(mamba: LanguageModel) -> None:
    class All(Even):
        def allowed(self) -> Any:
            return None

    assert alone(mamba, Request(ids=PROMPT, config=config(), constraint=All)) == alone(
        mamba, Request(ids=PROMPT, config=config())
    )


def test_penalties_and_bias(mamba: LanguageModel) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 60}
    usual = Counter(alone(mamba, Request(ids=PROMPT, config=config(**greedy))))
    assert max(usual.values()) > 3
    never_again = alone(mamba, Request(ids=PROMPT, config=config(**greedy, presence_penalty=2.0)))
    often = alone(mamba, Request(ids=PROMPT, config=config(**greedy, frequency_penalty=2.0)))
    assert max(Counter(never_again).values()) < max(usual.values())
    assert max(Counter(often).values()) < max(usual.values())
    assert set(alone(mamba, Request(ids=PROMPT, config=config(**greedy), logit_bias={11: 100.0}))) == {11}
    first = alone(mamba, Request(ids=PROMPT, config=config(**greedy)))[0]
    assert first not in alone(mamba, Request(ids=PROMPT, config=config(), logit_bias={first: -100.0}))


@pytest.mark.parametrize(
    ("fields", "bias", "words"),
    [
        ({"presence_penalty": 3.0}, {}, "presence_penalty: expected"),
        ({"frequency_penalty": float("nan")}, {}, "frequency_penalty: expected"),
        ({"logprobs": -1}, {}, "logprobs: expected 0 or more"),
        ({}, {257: 1.0}, "logit_bias: expected ids from 0 to 256, got 257"),
        ({}, {-1: 1.0}, "logit_bias: expected 0 or more"),
        ({}, {1: float("nan")}, "logit_bias: expected"),
        ({}, {1: 1e9}, "logit_bias: expected"),
        ({}, None, "logit_bias: expected ids with numbers, got NoneType"),
    ],
)
def test_numbers_out_of_range(mamba: LanguageModel, fields: Any, bias: Any, words: str) -> None:
    with pytest.raises(LongscanError, match=words):
        Engine(mamba).submit(Request(ids=PROMPT, config=config(**fields), logit_bias=bias))


def test_a_long_prompt_takes_turns_with_short_ones(mamba: LanguageModel) -> None:
    engine = Engine(mamba, slots=4, read_tokens=512)
    long = engine.submit(Request(ids=PROMPT * 400, config=config()))  # 20,000 tokens
    short = [engine.submit(Request(ids=PROMPT, config=config(seed=i))) for i in range(3)]
    steps, ended = 0, {}
    while engine.running or engine.waiting:
        steps += 1
        ended |= {event.row: steps for event in engine.step() if event.finish}
    assert all(ended[number] < 30 for number in short)
    assert ended[long] > 39
    rows = {number: i for i, number in enumerate(short)}
    again = Engine(mamba, slots=4, read_tokens=512)
    again.submit(Request(ids=PROMPT * 400, config=config()))
    for i in rows.values():
        again.submit(Request(ids=PROMPT, config=config(seed=i)))
    found = texts(again)
    assert ids(found[0]) == alone(mamba, Request(ids=PROMPT * 400, config=config()))
    assert ids(found[1]) == alone(mamba, Request(ids=PROMPT, config=config(seed=0)))


def test_rows_free_their_prompt(mamba: LanguageModel) -> None:
    engine = Engine(mamba, slots=2)
    engine.submit_copies(Request(ids=PROMPT, config=config()), 3)
    engine.step()
    prompt = engine._rows[0].prompt
    assert prompt.state is not None  # one still waits for it
    list(engine.run())
    assert prompt.state is None
    assert prompt.logits is None


def test_stop_strings_need_a_tokenizer(mamba: LanguageModel) -> None:
    with pytest.raises(UsageError, match="needs a tokenizer"):
        Engine(mamba).submit_copies(Request(ids=PROMPT, config=config(stop=["x"])), 2)
