"""Writing: who may be drawn, who ends when, and what is printed of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan import save
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate, generate_ids
from longscan.inference.prefill import CHUNK, encode
from longscan.inference.sampling import SamplingConfig, TextWriter
from longscan.models import LanguageModel, Mamba, MambaConfig, State
from longscan.models.s4d import S4DConfig
from longscan.models.sequence_classifier import SequenceConfig, SequenceModel
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import train_bpe
from stand_ins import ctrl_c, watched

Cli = Callable[..., Any]
BYTES = ByteTokenizer()
EOS = BYTES.eos_id


def generate_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], slots: int = 32, **sampling: Any
) -> list[str]:
    """Continue several texts at once."""
    texts = [""] * len(prompts)
    config = SamplingConfig.from_dict(sampling)
    ids = encode(tokenizer, prompts)
    ends = tokenizer.eos_id
    for event in generate_ids(model, ids, config, eos_id=ends, tokenizer=tokenizer, slots=slots):
        texts[event.row] += event.text
    return texts


def build(vocab_size: int = 257, seed: int = 0) -> Mamba:
    """A small random model that has opinions: fresh ones find all tokens equally likely."""
    config = MambaConfig(d_model=16, n_layers=2, d_state=4, vocab_size=vocab_size, tie_embeddings=False)
    model = Mamba(config, torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def model() -> Mamba:
    return build()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save(build(), path, BYTES)
    return path


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


def test_an_unknown_field_is_named(model: Mamba) -> None:
    with pytest.raises(LongscanError, match="did you mean 'temperature'"):
        generate(model, BYTES, "a", temprature=1.0)


# --- batches

PROMPTS = ["Once", "", "a", "The captain, who had not spoken since the morning, looked up.", "ab" * 20]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "repetition_penalty": 1.1}])
def test_a_row_writes_what_it_writes_alone(model: Mamba, sampling: dict[str, Any]) -> None:
    alone = [
        "".join(generate(model, BYTES, prompt, max_new_tokens=30, seed=7 + row, **sampling))
        for row, prompt in enumerate(PROMPTS)
    ]
    assert generate_batch(model, BYTES, PROMPTS, max_new_tokens=30, seed=7, **sampling) == alone
    assert len(set(alone)) == len(alone)


def test_more_prompts_than_slots_wait(model: Mamba) -> None:
    together = generate_batch(model, BYTES, PROMPTS, max_new_tokens=20, seed=7)
    assert generate_batch(model, BYTES, PROMPTS, slots=2, max_new_tokens=20, seed=7) == together


def test_prefill_reports_progress(model: Mamba) -> None:
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


def test_no_prompts_are_no_events(model: Mamba) -> None:
    assert list(generate_ids(model, [], SamplingConfig(), eos_id=EOS)) == []
    assert generate_batch(model, BYTES, []) == []


def test_an_empty_prompt_begins_a_document(model: Mamba) -> None:
    config = SamplingConfig(max_new_tokens=10, seed=0)
    empty = list(generate_ids(model, [[]], config, eos_id=EOS))
    assert empty == list(generate_ids(model, [[EOS]], config, eos_id=EOS))
    assert len(empty) > 1


def test_a_seed_decides_and_leaves_the_global_generator_alone(model: Mamba) -> None:
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
def test_ids_that_are_none_are_refused(model: Mamba, prompt: list[int], eos_id: int, words: str) -> None:
    with pytest.raises(LongscanError, match=words):
        generate_ids(model, [[1], prompt], SamplingConfig(), eos_id=eos_id)


def test_what_does_not_belong_together_is_refused(model: Mamba) -> None:
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
        out, finish = "", None
        for token in [*tokenizer.encode(text), tokenizer.eos_id]:
            piece, finish = writer.push(token, is_eos=token == tokenizer.eos_id, is_last=False)
            out += piece
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


# --- the command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature: expected 0 or more, got -1.0."),
        (["--temperature", "nan"], "temperature: expected a finite number, got nan"),
        (["--top-p", "3"], "top_p: expected more than 0 and at most 1, got 3.0."),
        (["--top-k", "-3"], "top_k: expected 0 or more, got -3."),
        (["--min-p", "1"], "min_p: expected at least 0 and below 1, got 1.0."),
        (["--max-new-tokens", "0"], "max_new_tokens: expected 1 or more, got 0."),
        (["--max-new-tokens", "many"], "Invalid value for '--max-new-tokens'"),
        (["--stop", ""], "stop: expected strings that are not empty"),
        (["--threads", "0"], "threads: expected 1 to 1,024, got 0."),
    ],
)
def test_misuse_exits_with_2(cli: Cli, flags: list[str], words: str) -> None:
    done = cli("generate", "a", "--model", "/nowhere", *flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_the_command_writes_what_the_library_writes(cli: Cli, directory: Path, model: Mamba) -> None:
    done = cli("generate", "Hello", "--model", directory, "--seed", 5, "--max-new-tokens", 25)
    text = "".join(generate(model, BYTES, "Hello", seed=5, max_new_tokens=25))
    assert (done.code, done.out) == (0, text + "\n")
    header, empty, footer = done.err.splitlines()
    assert header.startswith(f"{directory} · Mamba, 12.9 k parameters, 2 layers · state ")
    assert empty == ""
    assert footer.startswith("▏ 25 tokens · ")
    assert "tok/s · first token after" in footer
    assert "seed 5" in footer
    quiet = cli("generate", "Hello", "--model", directory, "--seed", 5, "--max-new-tokens", 25, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, done.out, "")


@pytest.mark.parametrize("argv", [[], ["-"]], ids=["nothing", "dash"])
def test_a_prompt_comes_from_stdin(cli: Cli, directory: Path, argv: list[str]) -> None:
    flags = ["--model", directory, "--seed", 4, "--max-new-tokens", 9, "-q"]
    expected = cli("generate", "Zoë\nsaid", *flags).out
    for end in ("", "\n", "\r\n"):
        assert cli("generate", *argv, *flags, stdin="Zoë\nsaid" + end).out == expected


def test_without_a_prompt_a_text_begins(cli: Cli, directory: Path) -> None:
    flags = ["--model", directory, "--seed", 4, "--max-new-tokens", 9, "-q"]
    assert cli("generate", *flags).out == cli("generate", "", *flags).out != ""


def test_a_prompt_that_is_not_unicode_is_an_error(cli: Cli, directory: Path) -> None:
    words = "is not UTF-8: byte 0xFF at offset 3 (invalid start byte)"
    done = cli("generate", "--model", directory, stdin=b"Zo\n\xff")
    assert (done.code, done.out) == (1, "")
    assert f"error: the prompt on stdin {words}" in done.err
    done = cli("generate", "Zo\n\udcff", "--model", directory)  # as Python passes such an argument on
    assert (done.code, done.out) == (1, "")
    assert f"error: the prompt {words}" in done.err


def test_several_prompts_are_printed_whole_and_in_order(cli: Cli, directory: Path, model: Mamba) -> None:
    flags = ["--model", directory, "--seed", 4, "--max-new-tokens", 9]
    texts = generate_batch(model, BYTES, ["one", "two, longer"], seed=4, max_new_tokens=9)
    done = cli("generate", "one", "two, longer", *flags)
    assert done.out == f"── 1 of 2 ──\n{texts[0]}\n\n── 2 of 2 ──\n{texts[1]}\n\n"
    report = json.loads(cli("generate", "one", "two, longer", *flags, "--json").out)
    assert [text["text"] for text in report["texts"]] == texts
    assert [text["finish"] for text in report["texts"]] == ["length", "length"]
    assert (report["tokens"], report["prompt_tokens"], report["seed"]) == (18, 14, 4)


def test_a_stop_string_at_the_command_line(cli: Cli, directory: Path) -> None:
    flags = ["--model", directory, "--seed", 4, "--max-new-tokens", 40]
    text = cli("generate", "a", *flags, "-q").out
    stop = text[4:6]
    done = cli("generate", "a", *flags, "--stop", "never", "--stop", stop)
    assert done.out == text[: text.index(stop)] + "\n"
    assert "· stop string ·" in done.err


def tokens_before_the_stop(done: Any) -> int:
    stopped = re.search(r"▏ stopped · (\d+) tokens", done.err)
    assert stopped is not None, done.err
    return int(stopped[1])


def test_interrupted_text_stays(cli: Cli, directory: Path) -> None:
    flags = ["--model", directory, "--seed", 4]
    with ctrl_c("stdout", at=5, times=2):  # the second one does not wait for the token
        done = cli("generate", "a", *flags)
    assert done.code == 130
    tokens = tokens_before_the_stop(done)
    assert 5 <= tokens < 100
    assert done.out == cli("generate", "a", *flags, "-q", "--max-new-tokens", tokens).out


def test_interrupted_texts_stay(cli: Cli, directory: Path) -> None:
    flags = ["--model", directory, "--seed", 4]
    text = cli("generate", "a", *flags, "-q", "--max-new-tokens", 40).out
    flags += ["--stop", text[4:6]]  # ends the first text, which is then printed
    with ctrl_c("stdout", "── 1 of 2 ──"):
        done = cli("generate", "a", "b", *flags)
    assert done.code == 130
    tokens = tokens_before_the_stop(done)
    short = cli("generate", "a", "b", *flags, "-q", "--max-new-tokens", tokens // 2).out
    assert done.out.replace("\ufffd", "") == short.replace("\ufffd", "")
    assert "── 2 of 2 ──" in done.out


def test_models_that_cannot_write(cli: Cli, tmp_path: Path) -> None:
    done = cli("generate", "a", "--model", tmp_path / "nowhere")
    assert done.code == 1
    assert "no model called" in done.err
    save(build(), tmp_path / "mute")
    done = cli("generate", "a", "--model", tmp_path / "mute")
    assert (done.code, done.out) == (1, "")
    assert "has no tokenizer" in done.err
    broken = build()
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(torch.nan)
    save(broken, tmp_path / "broken", BYTES)
    done = cli("generate", "a", "--model", tmp_path / "broken")
    assert (done.code, done.out) == (1, "")
    assert "error: the model computed NaN or infinite logits" in done.err


def test_a_giant_prompt_is_tokenized_in_pieces(bpe: Tokenizer) -> None:
    texts = ["the cat sat on the mat.\n" * 30, "", "a café"]
    whole = bpe.encode_batch(texts)
    spy, lengths = watched(bpe)
    assert [list(ids) for ids in encode(spy, texts, piece_size=100)] == whole
    assert max(lengths) <= 200


# --- states and drafts at the command line


def test_a_text_goes_on_where_its_state_was_saved(cli: Cli, directory: Path, tmp_path: Path) -> None:
    flags = ["--model", directory, "--temperature", 0, "-q"]
    whole = cli("generate", "Hello", *flags, "--max-new-tokens", 40).out
    path = tmp_path / "hello.state"
    done = cli("generate", "Hello", *flags, "--max-new-tokens", 15, "--save-state", path)
    assert (done.code, done.err) == (0, "")
    rest = cli("generate", *flags, "--max-new-tokens", 25, "--load-state", path)
    assert rest.code == 0
    assert (done.out[:-1] + rest.out).replace("\ufffd", "") == whole.replace("\ufffd", "")
    more = [cli("generate", *flags, *words, "--load-state", path, "--json") for words in (["a"], ["b", "a"])]
    first, second = (json.loads(report.out)["texts"] for report in more)
    assert first[0]["text"] == second[1]["text"] != second[0]["text"]  # one state, several ways to go on


def test_the_footer_says_how_to_go_on(cli: Cli, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    done = cli("generate", "a", "--model", directory, "--max-new-tokens", 2, "--save-state", path)
    assert done.err.splitlines()[-1].endswith(f"continue with: longscan generate --load-state {path}")


def test_states_that_cannot_be_used(cli: Cli, directory: Path, tmp_path: Path, model: Mamba) -> None:
    flags = ["--model", directory, "--load-state", tmp_path / "s"]
    (tmp_path / "s").write_text("no state")
    assert "is not a state file" in cli("generate", "a", *flags).err
    model.init_state(2).save(tmp_path / "s", model=model)
    assert "holds 2 states: expected one" in cli("generate", "a", *flags).err
    model.init_state(1).save(tmp_path / "s", model=model)
    assert "has no pending token to continue from: give a prompt" in cli("generate", *flags).err
    other = build(seed=1)
    other.init_state(1).save(tmp_path / "s", model=other)
    done = cli("generate", "a", *flags)
    assert (done.code, done.out) == (1, "")
    assert "error: " in done.err


def test_states_that_cannot_be_saved(cli: Cli, directory: Path, tmp_path: Path) -> None:
    done = cli("generate", "a", "b", "--model", directory, "--save-state", tmp_path / "s")
    assert (done.code, done.out) == (2, "")
    assert "--save-state: expected one prompt, got 2." in done.err
    for path in (tmp_path, tmp_path / "nowhere" / "s"):
        done = cli("generate", "a", "--model", directory, "--save-state", path)
        assert (done.code, done.out) == (1, "")
        assert "expected a file in a directory that exists" in done.err


def test_ctrl_c_ends_a_text_between_two_tokens(cli: Cli, directory: Path, tmp_path: Path) -> None:
    flags = ["--model", directory, "--temperature", 0]
    whole = cli("generate", "a", *flags, "-q", "--max-new-tokens", 30).out
    path = tmp_path / "s"
    with ctrl_c("stdout", at=4):
        done = cli("generate", "a", *flags, "--save-state", path)
    assert done.code == 130
    left = 30 - tokens_before_the_stop(done)
    rest = cli("generate", *flags, "-q", "--max-new-tokens", left, "--load-state", path)
    assert (done.out[:-1] + rest.out).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_ctrl_c_during_prefill_saves_nothing(cli: Cli, directory: Path, tmp_path: Path) -> None:
    flags = ["--model", directory, "--save-state", tmp_path / "s"]
    with ctrl_c("stderr", "prefill", terminal=True):
        done = cli("generate", *flags, stdin="a" * 3_000_000)  # a bar appears after half a second
    assert (done.code, done.out) == (1, "")
    assert "stopped before the prompt was processed" in done.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("flags", [["--speculate"], ["--draft"]], ids=["lookup", "model"])
def test_drafts_at_the_command_line(cli: Cli, directory: Path, flags: list[Any]) -> None:
    flags = [*flags, directory] if flags == ["--draft"] else flags
    argv = ["generate", "abcabcabc", "--model", directory, "--seed", 1, "--temperature", 0, "--json"]
    plain, drafted = cli(*argv), cli(*argv, *flags)
    assert (plain.code, drafted.code) == (0, 0)
    plain, drafted = json.loads(plain.out), json.loads(drafted.out)
    assert drafted["texts"] == plain["texts"]
    assert 0 <= drafted["accepted"] <= drafted["drafted"]
    assert "drafted" not in plain


def test_drafters_that_cannot_be_used(cli: Cli, directory: Path, tmp_path: Path) -> None:
    argv = ["generate", "a", "--model", directory]
    done = cli(*argv, "--speculate", "--draft", directory)
    assert (done.code, done.out) == (2, "")
    assert "expected one of them, got both" in done.err
    tokenizer = train_bpe(["a b c " * 20], 300)
    save(build(tokenizer.vocab_size), tmp_path / "other", tokenizer)
    done = cli(*argv, "--draft", tmp_path / "other")
    assert (done.code, done.out) == (1, "")
    assert "has another tokenizer than the model" in done.err


def test_a_precision_at_the_command_line(cli: Cli, directory: Path) -> None:
    done = cli("generate", "a", "--model", directory, "--precision", "int8", "--max-new-tokens", 3)
    assert done.code == 0
    assert " · int8 · " in done.err


def test_prompts_from_a_file(cli: Cli, directory: Path, tmp_path: Path) -> None:
    flags = ["--model", directory, "--max-new-tokens", 5, "--seed", 3, "-q"]
    expected = cli("generate", "one", "two, longer", *flags)
    assert expected.code == 0
    assert "── 2 of 2 ──" in expected.out
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_bytes(b"one\r\n\ntwo, longer\n")
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two, longer", "id": 7}\n')
    for path in (plain, lines):
        done = cli("generate", "--prompts", path, *flags, stdin="never read")
        assert (done.code, done.out) == (0, expected.out)
    several = tmp_path / "several.jsonl"
    several.write_text(json.dumps({"prompt": "a\nb"}))
    report = json.loads(cli("generate", "--prompts", several, *flags, "--json").out)
    assert [text["prompt"] for text in report["texts"]] == ["a\nb"]
    assert cli("generate", "--prompts", several, *flags).out.startswith("── 1 of 1 ──")


@pytest.mark.parametrize(
    ("name", "content", "arguments", "code", "words"),
    [
        ("a.txt", "one", ["two"], 2, "PROMPT and --prompts: expected one of them, got both"),
        ("a.txt", "\n \n", [], 1, "a.txt: expected one prompt per line, got none"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', [], 1, 'a.jsonl:2: expected {"prompt"'),
        ("a.jsonl", "no", [], 1, "a.jsonl:1: not JSON"),
        ("a.jsonl", '"no"', [], 1, "a.jsonl:1: expected"),
        ("a.txt", None, [], 1, "No such file"),
    ],
)
def test_bad_prompt_files(
    cli: Cli,
    directory: Path,
    tmp_path: Path,
    name: str,
    content: str | None,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = cli("generate", *arguments, "--prompts", tmp_path / name, "--model", directory)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_a_classifier_of_sequences_writes_no_text(cli: Cli, tmp_path: Path) -> None:
    config = SequenceConfig(
        body="s4d", body_config=S4DConfig(d_model=8, n_layers=1, vocab_size=1), n_outputs=1, d_input=1
    )
    save(SequenceModel(config), tmp_path / "model")
    done = cli("generate", "a", "--model", tmp_path / "model")
    assert done.code == 1
    assert "classifies whole sequences and predicts no tokens: expected a language model" in done.err
    assert f"longscan classify predict {tmp_path / 'model'}" in done.err
    out = tmp_path / "kernel.svg"
    done = cli("plot", "kernel", tmp_path / "model", "--out", out, "--length", 16)
    assert (done.code, done.err) == (0, "")
    assert "s4d, layer 0" in out.read_text()
    done = cli("plot", "kernel", "mamba", "--out", out)
    assert "a model of kind Mamba has no convolution kernels. Expected one of time-invariant" in done.err
