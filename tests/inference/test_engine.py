"""The slot table: a text is the same in any company, and a bad request is its own problem."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import PromptLookup
from longscan.inference.engine import Engine
from longscan.inference.generate import generate_ids
from longscan.inference.prefill import CHUNK
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.request import Request
from longscan.inference.sampling import Event, SamplingConfig
from longscan.inference.snapshots import Snapshots
from longscan.models import LanguageModel, Mamba, MambaConfig, State
from longscan.tokenizers.base import ByteTokenizer
from small_models import NAMES, build
from stand_ins import instead

BYTES = ByteTokenizer()
EOS = BYTES.eos_id


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(name=getattr(request, "param", "mamba"))


each_model = pytest.mark.parametrize("model", NAMES, indirect=True)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(ids: Any, /, *, eos_id: int | None = EOS, **fields: Any) -> Request:
    """A request; fields that are not its own are those of its SamplingConfig."""
    own = {
        name: fields.pop(name)
        for name in ("state", "position", "pending", "keep", "before_stop")
        if name in fields
    }
    return Request(
        ids=ids,
        eos_id=eos_id,
        config=SamplingConfig.from_dict({"seed": 0, "max_new_tokens": 60, **fields}),
        **own,
    )


def tokens(events: list[Event], number: int) -> list[int]:
    return [event.token for event in events if event.row == number]


def flat(state: State) -> list[Tensor]:
    return [tensor for _, tensor in state.named_tensors()]


def alone(model: LanguageModel, request: Request) -> list[Event]:
    engine = Engine(model, BYTES, slots=1)
    engine.submit(request)
    return list(engine.run())


def requests(n: int) -> list[Request]:
    """Prompts of all lengths and settings of all kinds."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.3, "repetition_penalty": 1.2},
        {"temperature": 0.9, "top_p": 0.8, "stop": ["a", "the"]},
        {"temperature": 2.0, "top_p": 1.0, "min_p": 0.01},
    ]
    lengths = [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 30]
    return [
        ask(
            text(lengths[i % len(lengths)], seed=i % 4),
            seed=i,
            max_new_tokens=5 + 7 * (i % 5),
            **kinds[i % len(kinds)],
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> list[list[Event]]:
    return [alone(model, request) for request in requests(12)]


@pytest.mark.parametrize(
    ("model", "slots"),
    [("mamba", 1), ("mamba", 2), ("mamba", 5), ("mamba", 16), ("llama", 5)],
    indirect=["model"],
)
@pytest.mark.parametrize("read_tokens", [None, 1, 300])
@pytest.mark.parametrize("helped", [False, True], ids=["plain", "cached-and-drafted"])
def test_a_text_is_the_same_in_any_company(
    model: LanguageModel, expected: list[list[Event]], slots: int, read_tokens: int | None, helped: bool
) -> None:
    chance = random.Random(slots)
    engine = Engine(
        model,
        BYTES,
        slots=slots,
        read_tokens=read_tokens,
        prefix_cache=PrefixCache(model, 20_000) if helped else None,
        drafter=PromptLookup() if helped else None,
    )
    left, numbers = chance.sample(range(12), 12), dict[int, int]()
    wishes, events = requests(12), list[Event]()
    while left or engine.running or engine.waiting:
        for _ in range(chance.choice([0, 0, 1, 3])):
            if left:
                index = left.pop()
                numbers[engine.submit(wishes[index])] = index
        events += engine.step()
        assert engine.running <= slots
    for number, index in numbers.items():
        mine = [event._replace(row=0) for event in events if event.row == number]
        assert mine == expected[index], f"request {index}"


def test_rows_of_a_state_are_taken_over_and_left_alone(model: LanguageModel) -> None:
    engine = Engine(model, slots=3)
    for seed, length in enumerate((2, 9, 4, 6, 1)):
        engine.submit(ask([seed], temperature=1.0, max_new_tokens=length, eos_id=None, seed=seed))
    running = []
    while engine.running or engine.waiting:
        engine.step()
        running.append(engine.running)
    # 2, 9 and 4 tokens; as the first ends 6 begin, as the third ends 1 does
    assert running == [3, 2, 3, 2, 2, 2, 2, 1, 0]


def test_a_step_writes_a_token_of_each_text(model: LanguageModel) -> None:
    engine = Engine(model, slots=4)
    for seed in range(3):
        engine.submit(ask([1], eos_id=None, seed=seed, max_new_tokens=6))
    for _ in range(6):
        assert sorted(event.row for event in engine.step()) == [0, 1, 2]
    assert engine.step() == []


def test_a_long_prompt_does_not_stall_the_others(model: LanguageModel) -> None:
    engine = Engine(model, slots=2, read_tokens=CHUNK)
    first = engine.submit(ask([1], eos_id=None, max_new_tokens=50))
    engine.step()
    second = engine.submit(ask(text(4 * CHUNK), eos_id=None, max_new_tokens=5))
    rounds = [[event.row for event in engine.step()] for _ in range(4)]
    assert rounds == [[first], [first], [first], [first, second]]


@pytest.mark.parametrize(
    ("ids", "fields", "words"),
    [
        ([], {}, "a request has no tokens"),
        ([257], {}, "token id: expected 0 to 256, got 257"),
        ([3, -1], {}, "token id: expected 0 to 256, got -1"),
        ([2**70], {}, "expected one sequence of whole numbers"),
        ([], {"pending": [400]}, "token id: expected 0 to 256, got 400"),
        ([0.5], {}, "expected one sequence of whole numbers"),
        ([[1], [2, 3]], {}, "expected one sequence of whole numbers"),
        ([1] * 90, {"max_new_tokens": 11}, "90 tokens and 11 new ones: expected at most 100 together"),
        ([1], {"max_new_tokens": 10, "position": 90}, "91 tokens and 10 new ones: expected at most 100"),
        ([1], {"eos_id": 300}, "eos_id: expected 0 to 256, or None, got 300"),
        ([1], {"position": -1}, "position: expected 0 or more"),
        ([1], {"state": 2}, "expected 1 row, got 2"),
        (
            [1],
            {"state": Mamba(MambaConfig(d_model=8, n_layers=2, vocab_size=9)).init_state(1)},
            "another model",
        ),
        ([1], {"state": State([])}, "the state of another model"),
    ],
)
def test_a_bad_request_is_refused_and_hurts_nobody(
    model: LanguageModel, ids: Any, fields: Any, words: str
) -> None:
    engine = Engine(model, BYTES, slots=2, max_tokens=100)
    good = ask([1, 2, 3], max_new_tokens=8)
    engine.submit(good)
    events = engine.step()
    if fields.get("state") == 2:
        fields = {"state": model.init_state(2)}
    with pytest.raises(LongscanError, match=words):
        engine.submit(ask(ids, **{"max_new_tokens": 10, **fields}))
    assert [*events, *engine.run()] == alone(model, good)


@each_model
def test_a_text_that_fails_is_the_only_one(model: LanguageModel) -> None:
    _, state = model.prefill(torch.tensor([[1]]))
    sick = state.map(lambda tensor: tensor * torch.nan if tensor.is_floating_point() else tensor)
    good = ask([1, 2, 3], max_new_tokens=8)
    engine = Engine(model, BYTES, slots=3)
    bad = engine.submit(ask([1], state=sick, keep=True))
    number = engine.submit(good)
    events = list(engine.run())
    (last,) = (event for event in events if event.row == bad)
    assert (last.token, last.finish) == (-1, "error")
    assert "NaN or infinite logits" in str(last.error)
    assert tokens(events, number) == tokens(alone(model, good), 0)
    with pytest.raises(LongscanError, match="its state is not saved"):
        engine.saved(bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slots": 0}, "slots: expected 1 or more"),
        ({"read_tokens": 0}, "read_tokens"),
        ({"max_tokens": -1}, "max_t"),
    ],
)
def test_impossible_engines_are_refused(model: LanguageModel, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Engine(model, **arguments)


def test_what_belongs_to_another_model_is_refused(model: LanguageModel) -> None:
    with pytest.raises(LongscanError, match="the prefix cache holds the states of another model"):
        Engine(model, prefix_cache=PrefixCache(build(seed=1)))
    with pytest.raises(LongscanError, match="the tokenizer has 257 ids, the model 100"):
        Engine(build(100), BYTES)
    with pytest.raises(UsageError, match="the engine needs a tokenizer"):
        Engine(model).submit(ask([1], stop=["x"]))


@pytest.mark.parametrize("when", ["waiting", "reading", "running"])
def test_cancelled_requests_are_silent(model: LanguageModel, when: str) -> None:
    engine = Engine(model, BYTES, slots=2, read_tokens=1)
    numbers = [engine.submit(ask([seed], seed=seed, eos_id=None, max_new_tokens=9)) for seed in range(2)]
    events = engine.step() + engine.step()
    victim = {"waiting": 2, "reading": 2, "running": 0}[when]
    if when == "reading":
        engine.cancel(numbers.pop())
    assert engine.submit(ask(text(CHUNK + 9), max_new_tokens=3)) == 2
    later = engine.step()
    assert engine.cancel(victim)
    assert not engine.cancel(victim)
    rest = later + list(engine.run())
    assert victim not in [event.row for event in rest if event not in later]
    others = {"waiting": [0, 1], "reading": [0], "running": [1]}[when]
    for seed in others:
        mine = tokens(events + rest, seed)
        assert mine == tokens(alone(model, ask([seed], seed=seed, eos_id=None, max_new_tokens=9)), 0)


def test_a_step_that_was_interrupted_can_be_taken_again(model: LanguageModel) -> None:
    wishes = [ask([1], eos_id=None, max_new_tokens=9), ask(text(20), eos_id=None, max_new_tokens=9)]
    interrupts = list[KeyboardInterrupt]()

    def prefill(*args: Any) -> Any:
        if interrupts:
            raise interrupts.pop()
        return model.prefill(*args)

    engine = Engine(instead(model, prefill=prefill), BYTES)
    engine.submit(wishes[0])
    events = engine.step()
    engine.submit(wishes[1])
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not interrupts
    events += engine.run()
    for number, wish in enumerate(wishes):
        assert tokens(events, number) == tokens(alone(model, wish), 0)


@pytest.mark.parametrize("ids", [[5, 6], np.array([5, 6], np.uint16), torch.tensor([5, 6]), (5, 6)])
def test_ids_may_stand_in_anything(model: LanguageModel, ids: Any) -> None:
    assert alone(model, ask(ids)) == alone(model, ask([5, 6]))


@each_model
def test_the_state_before_a_stop_string(model: LanguageModel) -> None:
    """Whether it begins within a token or before one, and however often it seemed to begin earlier."""
    prompt, settings = text(CHUNK + 10), {"eos_id": None, "keep": True, "seed": 3, "temperature": 2.0}
    engine = Engine(model, BYTES)
    engine.submit(ask(prompt, **settings))
    written = tokens(list(engine.run()), 0)
    for length in (1, 4):
        stop = [bytes(written[i : i + length]) for i in range(len(written) - length)]
        at, found = next(
            (i, one) for i, one in enumerate(stop) if i > 20 and one.isascii() and stop.index(one) == i
        )
        engine = Engine(model, BYTES, slots=3)
        others = [engine.submit(ask([i], eos_id=None, max_new_tokens=8 + 90 * i)) for i in range(2)]
        number = engine.submit(ask(prompt, **settings, before_stop=True, stop=[found.decode()]))
        events = [event for event in engine.run() if event.row == number]
        assert events[-1].finish == "stop"
        assert others
        saved = engine.saved(number)
        assert (saved.position, list(saved.pending)) == (len(prompt) + at, [])
        plain = Engine(model, BYTES)
        plain.submit(ask(prompt, **settings, max_new_tokens=at + 1))
        list(plain.run())
        expected = plain.saved(0)
        assert expected.position == saved.position
        exact = {"rtol": 0, "atol": 0} if ops.backend() != "reference" and model.dtype.itemsize == 4 else {}
        torch.testing.assert_close(flat(saved.state), flat(expected.state), **exact)


@each_model
def test_a_text_goes_on_from_a_saved_state(model: LanguageModel) -> None:
    prompt = text(CHUNK + 10)
    engine = Engine(model)
    engine.submit(ask(prompt, eos_id=None, temperature=0, max_new_tokens=30, keep=True))
    whole, end = tokens(list(engine.run()), 0), engine.saved(0).state
    engine = Engine(model, slots=2)
    number = engine.submit(ask(prompt, eos_id=None, temperature=0, max_new_tokens=12, keep=True))
    other = engine.submit(ask([1], eos_id=None, max_new_tokens=30))
    for _ in range(5):
        engine.step()
    early = engine.saved(number)
    assert (early.position, early.pending) == (len(prompt) + 4, whole[4:5])
    list(engine.run())
    late = engine.saved(number)
    assert (late.position, late.pending) == (len(prompt) + 11, whole[11:12])
    for saved, before in ((early, 5), (late, 12)):
        request = ask(
            [], **saved._asdict(), eos_id=None, temperature=0, max_new_tokens=30 - before, keep=True
        )
        again = Engine(model)
        again.submit(request)
        assert tokens(list(again.run()), 0) == whole[before:]
        after = again.saved(0).state
        exact = {"rtol": 0, "atol": 0} if ops.backend() != "reference" and model.dtype.itemsize == 4 else {}
        torch.testing.assert_close(flat(after), flat(end), **exact)
    for wrong in (number, other, 99):  # given away, not kept, never there
        with pytest.raises(LongscanError, match=f"request {wrong} is not running"):
            engine.saved(wrong)


@each_model
def test_a_given_state_stays_as_it_is(model: LanguageModel) -> None:
    _, state = model.prefill(torch.tensor([text(9)]))
    before = state.clone()
    fork = [alone(model, ask([1], state=state, position=9, seed=seed)) for seed in (1, 1, 2)]
    assert fork[0] == fork[1] != fork[2]
    assert fork[0] != alone(model, ask([1], seed=1))
    assert all(map(torch.equal, flat(state), flat(before)))


@each_model
def test_a_prefix_is_read_once(model: LanguageModel) -> None:
    cache = PrefixCache(model)
    shared = text(2 * CHUNK)
    wishes = [ask(shared + text(20, seed), temperature=0, max_new_tokens=6) for seed in (1, 2)]
    read: list[tuple[int, int]] = []
    engine = Engine(model, BYTES, prefix_cache=cache, progress=lambda *now: read.append(now))
    for wish in wishes:
        engine.submit(wish)
    events = list(engine.run())
    total = 2 * (2 * CHUNK + 20)
    done = [CHUNK, 2 * CHUNK, total // 2, total]
    assert read == [(tokens_read, total) for tokens_read in done]
    assert cache.hit_tokens == 2 * CHUNK
    for number, wish in enumerate(wishes):
        assert tokens(events, number) == tokens(alone(model, wish), 0)


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn() -> None:
    events = generate_ids(build(400), [[1]], SamplingConfig(seed=0), eos_id=None, tokenizer=BYTES)
    assert max(event.token for event in events) < BYTES.vocab_size


def test_an_error_ends_generate_ids() -> None:
    broken = build()
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(torch.nan)
    with pytest.raises(LongscanError, match="NaN or infinite"):
        list(generate_ids(broken, [[1]], SamplingConfig(), eos_id=None))


@each_model
def test_the_state_stays_where_it_is(model: LanguageModel) -> None:
    """No step allocates states or gathers rows: every call gets a view of the same memory."""
    places: set[int] = set()

    def step(ids: Tensor, state: State, unchanged: bool = False) -> Any:
        places.add(state.layers[0][0].data_ptr())
        return model.step(ids, state, unchanged)

    engine = Engine(instead(model, step=step), BYTES, slots=3)
    for request in requests(6):
        engine.submit(request)
    list(engine.run())
    # room for the first text, and for the longest
    assert len(places) == (2 if model.init_state(1).growth else 1)


def test_a_second_thread_is_refused_and_spoils_nothing() -> None:
    model = build()
    inside, go = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        inside.set()
        go.wait(10)

    engine = Engine(model, BYTES, progress=progress)
    engine.submit(Request(ids=[1, 2, 3], config=SamplingConfig(max_new_tokens=4, seed=0)))
    events: list[Event] = []
    thread = threading.Thread(target=lambda: events.extend(engine.run()))
    thread.start()
    assert inside.wait(10)
    for call in (engine.step, lambda: engine.cancel(0), lambda: engine.submit(Request(ids=[1]))):
        with pytest.raises(LongscanError, match=r"another thread and is not thread-safe.*Let one thread"):
            call()
    go.set()
    thread.join()
    assert [event.finish for event in events] == [None, None, None, "length"]
    engine.submit(Request(ids=[4], config=SamplingConfig(max_new_tokens=2, seed=0)))  # between calls, any may
    assert len(list(engine.run())) == 2


def test_numbers_are_whole() -> None:
    model = build()
    for name, make in {
        "slots": lambda: Engine(model, slots=2.5),  # type: ignore[arg-type]
        "read_tokens": lambda: Engine(model, read_tokens=True),
        "max_tokens": lambda: Engine(model, max_tokens="9"),  # type: ignore[arg-type]
        "every": lambda: PrefixCache(model, every=512.0),  # type: ignore[arg-type]
        "max_bytes": lambda: Snapshots(model, max_bytes=1e6),  # type: ignore[arg-type]
        "k": lambda: PromptLookup(k=1.5),  # type: ignore[arg-type]
        "ngram": lambda: PromptLookup(ngram=None),  # type: ignore[arg-type]
        "position": lambda: Engine(model).submit(Request(ids=[1], position=0.5)),  # type: ignore[arg-type]
        "eos_id": lambda: Engine(model).submit(Request(ids=[1], eos_id=2.0)),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(LongscanError, match=f"{name}: expected a whole number"):
            make()
