"""Generation: which tokens may be drawn, who ends when, and what text the ids become."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generating import generate_batch
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate, generate_ids
from longscan.inference.prefill import CHUNK, encode
from longscan.inference.sampling import SamplingConfig
from longscan.inference.text_writer import TextWriter
from longscan.models import LanguageModel, State
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import train_bpe
from small_models import build
from stand_ins import watched

BYTES = ByteTokenizer()
EOS = BYTES.eos_id


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


class Clock(NamedTuple):
    script: Tensor  # (batch,)
    time: Tensor  # (batch,)


class Parrot:
    """Says what scripts[last token of the prompt] says, and counts the rows of each step."""

    def __init__(self, scripts: dict[int, list[int]], vocab_size: int = 257) -> None:
        self.scripts, self.rows = scripts, []
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.device = torch.device("cpu")

    def init_state(self, batch_size: int) -> State:
        return State([Clock(*torch.zeros(2, batch_size, dtype=torch.long))])

    def prefill(self, ids: Tensor, state: State, *_: Any) -> tuple[Tensor, State]:
        state = State([Clock(ids[:, -1], torch.zeros_like(ids[:, -1]))])
        return self._logits(state), state

    def step(self, ids: Tensor, state: State, unchanged: bool = False) -> tuple[Tensor, State]:
        clock = state.layers[0]
        said = [self.scripts[int(s)][int(t)] for s, t in zip(*clock, strict=True)]
        assert ids.tolist() == said, "the model must read what was drawn for the same row"
        clock.time.add_(1)
        self.rows.append(len(ids))
        return self._logits(state), state

    def _logits(self, state: State) -> Tensor:
        logits = torch.zeros(state.batch_size, self.config.vocab_size + 7)
        for row, (script, time) in enumerate(zip(*state.layers[0], strict=True)):
            logits[row, self.scripts[int(script)][int(time)]] = 50.0
        return logits


def say(scripts: dict[int, list[int]], **sampling: Any) -> tuple[list[list[Any]], Parrot]:
    """Let a parrot say its scripts in one batch; return the events of each row."""
    parrot = Parrot(scripts)
    config = SamplingConfig.from_dict({"temperature": 0, **sampling})
    prompts = [[script] for script in scripts]
    events = generate_ids(as_model(parrot), prompts, config, eos_id=EOS, tokenizer=BYTES)
    rows: list[list[Any]] = [[] for _ in scripts]
    for event in events:
        rows[event.row].append(event)
    return rows, parrot


def as_model(thing: Any) -> LanguageModel:
    return thing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 3.0),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_impossible_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: expected .*, got "):
        SamplingConfig(**{field: value})


def test_an_unknown_field_is_named(model: LanguageModel) -> None:
    with pytest.raises(LongscanError, match="did you mean 'temperature'"):
        generate(model, BYTES, "a", temprature=1.0)


# --- batches

PROMPTS = ["Once", "", "a", "The captain, who had not spoken since the morning, looked up.", "ab" * 20]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "repetition_penalty": 1.1}])
def test_a_row_writes_what_it_writes_alone(model: LanguageModel, sampling: dict[str, Any]) -> None:
    alone = [
        "".join(generate(model, BYTES, prompt, max_new_tokens=30, seed=7 + row, **sampling))
        for row, prompt in enumerate(PROMPTS)
    ]
    assert generate_batch(model, BYTES, PROMPTS, max_new_tokens=30, seed=7, **sampling) == alone
    assert len(set(alone)) == len(alone)


def test_more_prompts_than_slots_wait(model: LanguageModel) -> None:
    together = generate_batch(model, BYTES, PROMPTS, max_new_tokens=20, seed=7)
    assert generate_batch(model, BYTES, PROMPTS, slots=2, max_new_tokens=20, seed=7) == together


def test_prefill_reports_progress(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    prompts = [[1] * (CHUNK + 44), [2] * 10]
    config = SamplingConfig(max_new_tokens=1)
    list(generate_ids(model, prompts, config, eos_id=None, progress=lambda *now: seen.append(now)))
    assert seen == [(CHUNK, CHUNK + 54), (CHUNK + 44, CHUNK + 54), (CHUNK + 54, CHUNK + 54)]


def test_finished_rows_leave_the_batch() -> None:
    rows, parrot = say({1: [*b"ab", EOS], 2: [*b"cdefgh"], 3: [EOS]}, max_new_tokens=5)
    assert [row[-1].finish for row in rows] == ["eos", "length", "eos"]
    assert [len(row) for row in rows] == [3, 5, 1]
    assert ["".join(event.text for event in row) for row in rows] == ["ab", "cdefg", ""]
    assert parrot.rows == [2, 2, 1, 1]  # and none for the token after the last


def test_no_prompts_are_no_events(model: LanguageModel) -> None:
    assert list(generate_ids(model, [], SamplingConfig(), eos_id=EOS)) == []
    assert generate_batch(model, BYTES, []) == []


def test_an_empty_prompt_begins_a_document(model: LanguageModel) -> None:
    config = SamplingConfig(max_new_tokens=10, seed=0)
    empty = list(generate_ids(model, [[]], config, eos_id=EOS))
    assert empty == list(generate_ids(model, [[EOS]], config, eos_id=EOS))
    assert len(empty) > 1


def test_a_seed_decides_and_leaves_the_global_generator_alone(model: LanguageModel) -> None:
    before = torch.get_rng_state()
    texts = ["".join(generate(model, BYTES, "a", max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    free = ["".join(generate(model, BYTES, "a", max_new_tokens=20)) for _ in range(2)]
    torch.manual_seed(0)
    assert free[0] == "".join(generate(model, BYTES, "a", max_new_tokens=20)) != free[1]


@pytest.mark.parametrize(
    ("prompt", "eos_id", "words"),
    [
        ([257], EOS, "token id: expected 0 to 256, got 257"),
        ([-1], EOS, "got -1"),
        ([], None, "a prompt is empty"),
    ],
)
def test_ids_that_are_none_are_refused(
    model: LanguageModel, prompt: list[int], eos_id: int, words: str
) -> None:
    with pytest.raises(LongscanError, match=words):
        generate_ids(model, [[1], prompt], SamplingConfig(), eos_id=eos_id)


def test_what_does_not_belong_together_is_refused(model: LanguageModel) -> None:
    with pytest.raises(LongscanError, match="the tokenizer has 257 ids, the model 100"):
        generate(build(100), BYTES, "a")
    with pytest.raises(UsageError, match="the engine needs a tokenizer"):
        generate_ids(model, [[1]], SamplingConfig(stop=("x",)), eos_id=EOS)


# --- text


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["the cat sat on the mat and the naïve café 猫 was there. "] * 20, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_pieces_are_the_text_of_the_ids(kind: str, bpe: Tokenizer) -> None:
    tokenizer = BYTES if kind == "bytes" else bpe
    model = build(tokenizer.vocab_size)
    config = SamplingConfig(max_new_tokens=60, temperature=1.5, seed=1)
    events = list(generate_ids(model, [[5]], config, eos_id=None, tokenizer=tokenizer))
    assert "".join(event.text for event in events) == tokenizer.decode(event.token for event in events)


def cut_by_hand(text: str, stops: tuple[str, ...]) -> str:
    """Read letter by letter and end as soon as a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abé", max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_a_stop_string_however_it_arrives(text: str, stops: list[str]) -> None:
    pieces = train_bpe(["ab abab bé béab aéb abé ab bé "] * 4, 270)
    for tokenizer in (BYTES, pieces):
        writer = TextWriter(tokenizer, [], tuple(stops))
        out, finish, begins, stream, decoded = "", None, list[int](), tokenizer.stream(), 0
        for token in [*tokenizer.encode(text), tokenizer.eos_id]:
            begins.append(decoded)
            decoded += len(stream.push(token))
            piece, finish = writer.push(token, is_eos=token == tokenizer.eos_id, is_last=False)
            out += piece
            if finish == "eos" or not stops:
                assert writer.settled == len(begins)
            else:  # those that begin within what is shown
                assert writer.settled == sum(begin < len(out) for begin in begins)
            if finish:
                break
            rest = cut_by_hand(text, tuple(stops))
            assert rest.startswith(out)  # nothing is printed that would have to be taken back
        assert out == cut_by_hand(text, tuple(stops))
        assert finish == ("eos" if out == text else "stop")


def test_a_stop_string_ends_its_own_row_only() -> None:
    rows, parrot = say(
        {1: [*b"one. two"], 2: [*b"no dots here"], 3: [*"né".encode(), EOS]},
        max_new_tokens=7,
        stop=[". t", "hm"],
    )
    assert ["".join(event.text for event in row) for row in rows] == ["one", "no dots", "né"]
    assert [row[-1].finish for row in rows] == ["stop", "length", "eos"]
    assert parrot.rows == [3, 3, 3, 2, 2, 1]


def test_a_character_cut_short_is_replaced() -> None:
    rows, _ = say({1: [*b"a", 0xC3, EOS]})
    assert [event.text for event in rows[0]] == ["a", "", "\ufffd"]


def test_a_prompt_that_ends_inside_a_character_goes_on() -> None:
    rows, _ = say({0xC3: [0xA9, EOS]})
    assert rows[0][0].text == "é"


def test_a_giant_prompt_is_tokenized_in_pieces(bpe: Tokenizer) -> None:
    texts = ["the cat sat on the mat.\n" * 30, "", "a café"]
    whole = bpe.encode_batch(texts)
    spy, lengths = watched(bpe)
    assert [list(ids) for ids in encode(spy, texts, piece_size=100)] == whole
    assert max(lengths) <= 200
