"""Translators learn from pairs, go on as if nothing had happened, and are measured as sacrebleu does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longscan.checkpoints.load import load_translator
from longscan.checkpoints.save import save
from longscan.core.progress import Display, Snapshot
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.bleu import by_length, score
from longscan.evaluation.translation import mean_loss
from longscan.inference.translate import translate
from longscan.models import MODELS
from longscan.tokenizers.base import ByteTokenizer
from longscan.training.config import read_recipe
from longscan.training.translation import TranslateConfig, TranslateRun
from stand_ins import instead

Cli = Callable[..., Any]

WORDS = {"one": "eins", "two": "zwei", "red": "rot", "blue": "blau", "dog": "Hund", "cat": "Katze"}
TINY: dict[str, Any] = {
    "preset": "tiny",
    "vocab_size": 300,
    "batch_tokens": 120,
    "steps": 8,
    "lr": 5e-3,
    "dropout": 0.1,
    "save_every": 2,
    "eval_every": 3,
    "bleu_sentences": 3,
    "average": 2,
    "threads": 1,
}
TRANSLATORS = [name for name, entry in MODELS.items() if entry.kind == "translation"]


class Stop(Display):
    """Sends a signal after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of two to six words, and the same word by word in German."""
    directory, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name, n in (("train", 300), ("valid", 20)):
        rows = [random.choice(list(WORDS), random.integers(2, 7)).tolist() for _ in range(n)]
        (directory / f"{name}.en").write_text("".join(" ".join(row) + "\n" for row in rows))
        (directory / f"{name}.de").write_text(
            "".join(" ".join(WORDS[word] for word in row) + "\n" for row in rows)
        )
    return directory


@pytest.fixture(scope="module")
def settings(files: Path) -> dict[str, Any]:
    names = {
        "source": "train.en",
        "target": "train.de",
        "valid_source": "valid.en",
        "valid_target": "valid.de",
    }
    return {**TINY, **{key: str(files / name) for key, name in names.items()}}


def begin(settings: dict[str, Any], out: Path, display: Display | None = None, **changes: Any) -> Any:
    config = TranslateConfig.from_dict({**settings, **changes})
    return TranslateRun.begin(config, out, display, figures=False)


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    begin(settings, directory)
    return directory


def metrics(directory: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_run_in_the_order_of_an_earlier_version_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    changed = 0
    for path in (tmp_path / "run").rglob("*.json"):  # the hash of the data holds the version of their order
        text = re.sub(r'"data": "[0-9a-f]{64}"', f'"data": "{0:064x}"', path.read_text())
        changed += text != path.read_text()
        path.write_text(text)
    assert changed
    with pytest.raises(LongscanError, match="shuffled it into another order"):
        TranslateRun.resume(tmp_path / "run")


def assert_same(directory: Path, whole: Path) -> None:
    weights = "model/model.safetensors"
    assert (directory / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(directory) == metrics(whole)


# Training


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_stopped_run_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    quick = {"model": name, "steps": 4, "eval_every": 0, "bleu_sentences": 0}
    begin(settings, tmp_path / "whole", **quick)
    stopped = begin(settings, tmp_path / "run", Stop(3), **quick)
    assert (stopped.step, stopped.stopped_by) == (3, signal.SIGTERM)
    assert TranslateRun.resume(tmp_path / "run").stopped_by is None
    losses = [[r["loss"] for r in metrics(tmp_path / run) if "loss" in r] for run in ("run", "whole")]
    assert losses[0] == losses[1]
    states = [tmp_path / run / "checkpoints/step-000004/optimizer.safetensors" for run in ("run", "whole")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_the_seed_decides_every_bit(settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    begin(settings, tmp_path / "same")
    assert_same(tmp_path / "same", whole)


def test_the_records(whole: Path) -> None:
    records = metrics(whole)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
    validations = [record for record in records if "valid_perplexity" in record]
    assert [record["step"] for record in validations] == [3, 6, 8]
    for record in validations:
        assert record["valid_perplexity"] == pytest.approx(np.exp(record["valid_loss"]))
        assert set(record["sample"]) == {"source", "translation"}
    tokens = [record["tokens"] for record in records if "tokens" in record]
    assert tokens == sorted(tokens)


def test_the_exported_model_is_the_mean_of_the_last_checkpoints(whole: Path) -> None:
    parts = [load_file(whole / f"checkpoints/step-00000{step}/model.safetensors") for step in (6, 8)]
    model, tokenizer = load_translator(whole / "model")
    for name, parameter in model.named_parameters():
        mean = (parts[0][name].double() + parts[1][name].double()) / 2
        torch.testing.assert_close(parameter.double(), mean, rtol=0, atol=1e-7)
    assert tokenizer.vocab_size == model.config.to_dict()["vocab_size"]


def test_it_learns(settings: dict[str, Any], files: Path, tmp_path: Path) -> None:
    quiet = {"eval_every": 0, "save_every": 1000, "dropout": 0.0, "label_smoothing": 0.0, "vocab_size": 330}
    begin(settings, tmp_path / "run", steps=150, batch_tokens=400, average=1, **quiet)
    last = metrics(tmp_path / "run")[-1]
    assert last["valid_perplexity"] < 2  # 330 before, about 4 for one who knows how frequent each word is
    model, tokenizer = load_translator(tmp_path / "run/model")
    assert translate(model, tokenizer, ["one red dog", "", "blue cat"])[0].text == "eins rot Hund"


def test_a_table_and_a_part_held_out(files: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = zip(
        (files / "train.en").read_text().split(), (files / "train.de").read_text().split(), strict=True
    )
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    without = {"source": str(table), "target": None, "valid_source": None, "valid_target": None, "steps": 1}
    begin(settings, tmp_path / "run", **without)
    run = TranslateRun(tmp_path / "run", TranslateConfig.from_dict({**settings, **without}), Display())
    run.metrics.close()
    assert len(run.valid) == int(0.05 * (len(run.valid) + len(run.pairs)))


def test_word_vectors_are_where_training_starts(settings: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []

    class Say(Display):
        def line(self, text: str) -> None:
            lines.append(text)

    vectors = tmp_path / "glove.txt"
    vectors.write_text("".join(f"{w} {' '.join(['0.25'] * 24)}\n" for w in ("one", "dog", "zeppelin")))
    begin(settings, tmp_path / "run", Say(), model="luong", embeddings=str(vectors), steps=1, lr=1e-9)
    said = next(line for line in lines if line.startswith("vectors"))
    assert "initialised from" in said
    assert "(GloVe, 3 words)" in said
    model, tokenizer = load_translator(tmp_path / "run/model")
    token = tokenizer.encode(" dog")
    assert len(token) == 1
    table = dict(model.named_parameters())["source_embedding.weight"]
    torch.testing.assert_close(table[token[0]], torch.full((24,), 0.25), rtol=0, atol=1e-6)
    vectors.write_text("one 1.0 2.0\ndog 1.0 2.0\n")
    with pytest.raises(LongscanError, match="expected a width of 24, got 2"):
        begin(settings, tmp_path / "other", model="luong", embeddings=str(vectors))
    vectors.write_text("zeppelin 1.0 2.0\n")
    with pytest.raises(LongscanError, match="none of its 1 words"):
        begin(settings, tmp_path / "other", model="luong", embeddings=str(vectors))


def test_what_may_change_and_what_may_not(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    TranslateRun.resume(tmp_path / "run", {"average": 1, "log_every": 5})
    with pytest.raises(UsageError, match="label_smoothing cannot change"):
        TranslateRun.resume(tmp_path / "run", {"label_smoothing": 0.2})


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"max_len": 1}, "--max-len"),
        ({"batch_tokens": 0}, "--batch-tokens"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"dropout": -0.1}, "--dropout"),
        ({"average": 0}, "--average"),
        ({"valid_target": "x"}, "--valid-source"),
        ({"schedule": "sqrt"}, "--schedule"),
        ({"d_hidden": 0}, "--d-hidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_settings_are_misuse(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=f"^{word}: "):
        read_recipe(None, flags, TranslateConfig)


# Measuring


def test_scores_are_those_of_sacrebleu() -> None:
    perfect = score(["Ein Hund läuft schnell."], ["Ein Hund läuft schnell."])
    assert (perfect["bleu"], perfect["chrf"]) == (100.0, 100.0)
    assert "tok:13a" in perfect["bleu_signature"]
    assert "tok:zh" in score(["一只狗"], ["一只狗"], "zh")["bleu_signature"]
    # three of four words, two of three pairs, one of two triples, no four in a row: smoothed to 1/2
    measured = score(["a b c x"], ["a b c d"])["bleu"]
    assert measured == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25, abs=0.01)


def test_scores_by_length() -> None:
    sources = ["a b", "a b c d e", "a b c d e f", " ".join("x" * 40)]
    references = ["one two three four"] * 4
    rows = by_length(sources, [*references[:2], "five six seven eight", references[3]], references)
    assert [(row["words"], row["sentences"]) for row in rows] == [("0-5", 2), ("6-10", 1), ("31+", 1)]
    assert [row["bleu"] for row in rows] == [100.0, pytest.approx(0, abs=20), 100.0]
    assert rows[0]["mean_words"] == 3.5


def test_without_sacrebleu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(LongscanError, match=r"need sacrebleu: pip install 'longscan\[translate\]'"):
        score(["a"], ["a"])


def test_perplexity_does_not_depend_on_the_batches(whole: Path) -> None:
    run = TranslateRun(whole, TranslateConfig.from_dict(read_settings(whole)), Display())
    run.metrics.close()
    run.model.eval()
    losses = [mean_loss(run.model, run.valid, batch_tokens) for batch_tokens in (1, 50, 10_000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def read_settings(directory: Path) -> dict[str, Any]:
    settings = json.loads((directory / "train.json").read_text())
    assert settings.pop("verb") == "translate train"
    return settings


def test_neighbours_do_not_change_a_translation(whole: Path) -> None:
    model, tokenizer = load_translator(whole / "model")
    sentences = ["one two red blue dog cat", "dog", "", "red cat"]
    together = translate(model, tokenizer, sentences, beam_size=3)
    alone = [translate(model, tokenizer, [sentence], beam_size=3)[0] for sentence in sentences]
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.score for each in together] == pytest.approx([each.score for each in alone], rel=1e-4)


def test_limits_of_the_model(whole: Path) -> None:
    model, tokenizer = load_translator(whole / "model")
    with pytest.raises(LongscanError, match=r"a sentence of .* tokens .* longer than the 4 positions"):
        translate(instead(model, max_positions=4), tokenizer, ["dog", "one two red blue dog cat"])
    with pytest.raises(LongscanError, match="Use its own tokenizer"):
        translate(model, ByteTokenizer(), ["dog"])


# The commands


def test_train_and_evaluate_and_text(
    cli: Cli, files: Path, settings: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    run = tmp_path / "run"
    done = cli("translate", "train", *flags, "--out", run)
    assert done.code == 0, done.err
    assert "try: longscan translate text" in done.out
    assert_same(run, whole)

    scores = cli("translate", "evaluate", run / "model", files / "valid.en", files / "valid.de", "--json")
    assert scores.code == 0, scores.err
    report = json.loads(scores.out)
    assert report["sentences"] == 20
    assert sum(row["sentences"] for row in report["by_length"]) == 20
    written = tmp_path / "out.de"
    arguments = (run / "model", files / "valid.en", files / "valid.de", "--beam", 1, "--out", written)
    shown = cli("translate", "evaluate", *arguments)
    assert shown.out.startswith("BLEU ")
    assert len(written.read_text().splitlines()) == 20

    one = cli("translate", "text", run / "model", "one dog", "two cats")
    piped = cli("translate", "text", run / "model", stdin="one dog\ntwo cats\n")
    assert one.code == piped.code == 0
    assert one.out == piped.out
    rows = [
        json.loads(line) for line in cli("translate", "text", run / "model", "a", "--json").out.splitlines()
    ]
    assert [row["source"] for row in rows] == ["a"]
    assert cli("translate", "text", run / "model", stdin="\n").out == "\n"


def test_no_translator_has_a_learning_rate_of_state_spaces(cli: Cli, files: Path, tmp_path: Path) -> None:
    assert "--ssm-lr" in cli("train", "--help").out
    assert "--ssm-lr" not in cli("translate", "train", "--help").out
    flags = ("--source", files / "valid.en", "--target", files / "valid.de", "--out", tmp_path / "run")
    done = cli("translate", "train", *flags, "--ssm-lr", "0.001")
    assert (done.code, done.out) == (2, "")
    assert "No such option: --ssm-lr" in done.err


def test_a_prompt_on_a_terminal(cli: Cli, whole: Path) -> None:
    done = cli("translate", "text", whole / "model", stdin="one dog\n\nred", terminal=True)
    assert done.code == 0
    assert len(done.out.splitlines()) == 3
    assert done.err.count("> ") == 4  # the last one is left with Ctrl-D


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "--out"),
        (["train", "--out", "{new}"], 2, "nothing to train on"),
        (["train", "--out", "{new}", "--source", "{en}"], 1, "expected source and target with a tab"),
        (["train", "--out", "{new}", "--source", "{en}", "--target", "{short}"], 1, "has 300 lines and"),
        (["train", "--out", "{new}", "--source", "{gone}", "--target", "{de}"], 1, "No such file"),
        (["train", "--out", "{new}", *"--source {en} --target {de} --model momba".split()], 2, "momba"),
        (
            ["train", "--out", "{new}", *"--source {en} --target {de} --model mamba".split()],
            2,
            "language model",
        ),
        (["train", "--out", "{new}", *"--source {en} --target {de} --d-hidden 9".split()], 2, "d_hidden"),
        (["train", "--out", "{new}", *"--source {en} --target {de} --max-len 2".split()], 1, "--max-len"),
        (["train", "--out", "{new}", *"--source {en} --target {de} --vocab-size 9".split()], 2, "vocab_size"),
        (
            ["train", "--out", "{new}", *"--source {en} --target {de} --tokenizer {bytes}".split()],
            1,
            "no transl",
        ),
        (["train", "--resume", "{new}"], 1, "no run to resume"),
        (["evaluate", "{model}", "{en}", "{short}"], 1, "has 300 lines and"),
        (["evaluate", "{model}", "{en}", "{de}", "--beam", "0"], 2, "--beam"),
        (["evaluate", "{model}", "{en}", "{de}", "--tokenize", "x"], 2, "--tokenize"),
        (["text", "{new}", "hello"], 1, "{new}"),
        (["text", "{model}", "hello", "--length-penalty", "-1"], 2, "--length-penalty"),
        (["txt"], 2, "Did you mean 'text'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(
    cli: Cli, files: Path, whole: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "short").write_text("eins\n")
    ByteTokenizer().save(tmp_path / "bytes")
    places = {"en": files / "train.en", "de": files / "train.de", "model": whole / "model"}
    places |= {name: tmp_path / name for name in ("new", "gone", "short", "bytes")}
    done = cli("translate", *(argument.format(**places) for argument in arguments))
    assert done.code == code, done.err
    assert words.format(**places) in done.err
    assert "not foreseen" not in done.err
    assert not (tmp_path / "new").exists()


def test_train_sends_runs_to_their_own_verb(cli: Cli, whole: Path) -> None:
    done = cli("train", "--resume", whole)
    assert done.code == 1
    assert f"longscan translate train --resume {whole}" in done.err


def test_a_tokenizer_of_another_model_is_refused(cli: Cli, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "model", tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    done = cli("translate", "text", tmp_path / "model", "one")
    assert done.code == 1
    assert "tokenizer" in done.err


def test_translators_travel_through_files(tmp_path: Path, whole: Path) -> None:
    model, tokenizer = load_translator(whole / "model")
    save(model, tmp_path / "again", tokenizer)
    again, _ = load_translator(tmp_path / "again")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
