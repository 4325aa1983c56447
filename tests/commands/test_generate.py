"""`longscan generate`: prompts, states, drafts, Ctrl-C, and what is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from generating import generate_batch
from longscan import save
from longscan.inference.generate import generate
from longscan.models import LanguageModel
from longscan.models.s4d import S4DConfig
from longscan.models.sequence_classifier import SequenceConfig, SequenceModel
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe
from small_models import build
from stand_ins import ctrl_c

Cli = Callable[..., Any]
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save(build(), path, BYTES)
    return path


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
        (["--precision", "int3"], "'--precision': 'int3' is not one of"),
        (["--stop", ""], "stop: expected strings that are not empty"),
        (["--threads", "0"], "threads: expected 1 to 1,024, got 0."),
    ],
)
def test_misuse_exits_with_2(cli: Cli, flags: list[str], words: str) -> None:
    done = cli("generate", "a", "--model", "/nowhere", *flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_the_command_writes_what_the_library_writes(cli: Cli, directory: Path, model: LanguageModel) -> None:
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


def test_several_prompts_are_printed_whole_and_in_order(
    cli: Cli, directory: Path, model: LanguageModel
) -> None:
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


def test_states_that_cannot_be_used(cli: Cli, directory: Path, tmp_path: Path, model: LanguageModel) -> None:
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
        assert "expected a new or another file, in a directory that exists" in done.err


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
