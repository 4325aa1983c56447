"""Experiments: they train what isn't trained, find what is, and say what they are."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
import lzma
import sys
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longscan.checkpoints.save import save
from longscan.commands.reproduce import EXPERIMENTS
from longscan.data.labeled_sequences import read_sequences
from longscan.errors import LongscanError
from longscan.models import Bert, BertConfig
from longscan.reproduce import accuracy_table as accuracies
from longscan.reproduce import bert, multi30k
from longscan.reproduce.bleu_table import QUICK_SENTENCES, summary
from longscan.reproduce.experiment import Plan
from longscan.reproduce.synthetic import SyntheticConfig, SyntheticRun
from longscan.tokenizers.wordpiece import train_wordpiece
from longscan.training.config import TrainConfig, read_recipe
from longscan.training.translation import TranslateConfig
from stand_ins import PowerCut, ctrl_c

Cli = Callable[..., Any]
RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = {"one": "eins", "two": "zwei", "red": "rot", "dog": "Hund", "cat": "Katze"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of both experiments, with a few sentences."""
    directory, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def sentences(n: int) -> list[list[str]]:
        return [random.choice(list(WORDS), random.integers(2, 9)).tolist() for _ in range(n)]

    for part, n in (("train", 60), ("val", 10), ("test_2016_flickr", 15)):
        rows = sentences(n)
        for side, table in (("en", {word: word for word in WORDS}), ("de", WORDS)):
            text = "".join(" ".join(table[word] for word in row) + "\n" for row in rows)
            (directory / f"{part}.{side}.gz").write_bytes(gzip.compress(text.encode()))
    for part, n in (("train", 60), ("valid", 10), ("test", 15)):
        lines = [f"{' '.join(row)}\t{'狗' * len(row)}\tgame\n" for row in sentences(n)]
        lines += [f"{'dog ' * 21}\t狗\tgame\n", "secret\t猫\tmediawiki\n"]
        (directory / f"{part}.tsv.xz").write_bytes(lzma.compress("".join(lines).encode()))
    return directory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: it is about what happens around them."""
    monkeypatch.delitem(multi30k.SYSTEMS, "seq2seq")
    monkeypatch.delitem(multi30k.SYSTEMS, "bahdanau")
    monkeypatch.setitem(multi30k.SHARED, "preset", "tiny")
    monkeypatch.setitem(multi30k.SHARED, "vocab_size", 290)
    en_zh = importlib.import_module("longscan.reproduce.en_zh")
    monkeypatch.setitem(en_zh.SETTINGS, "preset", "tiny")
    monkeypatch.setitem(en_zh.SETTINGS, "vocab_size", 290)


def test_multi30k(cli: Cli, data: Path, tmp_path: Path) -> None:
    arguments = ("reproduce", "multi30k", "--data", data, "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    for name in multi30k.SYSTEMS:
        assert f"\n{name} " in done.out
    assert "36.52 (a)" in done.out
    assert "reduced: a few steps only" in done.out
    report = json.loads((tmp_path / "multi30k.json").read_text())
    assert list(report["systems"]) == list(multi30k.SYSTEMS)
    assert report["reduced"]
    assert report["published"]["transformer"].startswith("36.52")
    for name, (found,) in report["runs"].items():
        assert sum(row["sentences"] for row in found["by_length"]) == found["sentences"] == QUICK_SENTENCES
        assert {"source", "reference", "translation"} == set(found["samples"][0])
        assert report["systems"][name]["bleu_range"] == [found["bleu"], found["bleu"]]

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/state.json")}
    again = cli(*arguments, "--json")
    assert json.loads(again.out)["runs"] == report["runs"]
    assert len(times) == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained again


def test_a_run_with_other_settings_is_not_taken_for_ours(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("reproduce", "en-zh", "--data", data, "--out", tmp_path, "--quick")
    assert cli(*arguments).code == 0
    monkeypatch.setitem(importlib.import_module("longscan.reproduce.en_zh").SETTINGS, "lr", 0.5)
    done = cli(*arguments)
    assert done.code == 1
    assert (
        "quick-en-zh-short was trained with lr = 0.001, this experiment has 0.5. Name another --out."
        in done.err
    )


def test_authors(cli: Cli, tmp_path: Path) -> None:
    authors = importlib.import_module("longscan.reproduce.authors")
    for number, file in enumerate(authors.FILES):
        paragraphs = [" ".join(f"w{number}{i}{j}" for j in range(45)) for i in range(40)]
        with lzma.open(tmp_path / file, "wt") as text:
            text.write("\n\n".join(["too short", *paragraphs]))
    arguments = ("reproduce", "authors", "--data", tmp_path, "--out", tmp_path / "runs", "--quick")
    done = cli(*arguments, "--threads", 1)
    assert done.code == 0, done.err
    assert "reduced: a few steps only" in done.out
    folder = tmp_path / "runs"
    report = json.loads((folder / "authors.json").read_text())
    assert [rows[0]["before"] for name, rows in report["runs"].items() if name != "tf-idf"] == [0.0, 0.0]
    assert report["runs"]["LoRA"][0]["parameters"] < report["runs"]["all weights"][0]["parameters"]
    learnt, asked = (
        [json.loads(line)["messages"] for line in (folder / f"authors-{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    )
    assert not {one[0]["content"] for one in learnt} & {one[0]["content"] for one in asked}
    assert {one[1]["content"] for one in asked} == {f"{name}." for name in authors.AUTHORS.values()}
    assert cli(*arguments, "--json").code == 0  # nothing is trained again


def test_en_zh_chooses_its_sentences(cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli("reproduce", "en-zh", "--data", data, "--out", tmp_path, "--quick", "--threads", 1)
    assert done.code == 0, done.err
    assert "tok:zh" in done.out
    rows = (tmp_path / "en-zh-short-train.tsv").read_text().splitlines()
    assert len(rows) == 60  # neither the long one nor the one that keeps a model from being shared
    report = json.loads((tmp_path / "en-zh.json").read_text())
    assert report["reduced"].startswith("a few steps")
    assert report["published"] == {}


@pytest.mark.parametrize("model", ["seq2seq", "bahdanau", "luong", "transformer"])
def test_the_recipes_say_the_same(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    recipe = read_recipe(RECIPES / f"multi30k-{model}.toml", {}, TranslateConfig)
    config = multi30k.settings(model, Plan(name="multi30k", data=tmp_path, out=tmp_path), seed=0)
    paths = {"source", "target", "valid_source", "valid_target"}
    assert set(config.changed(recipe)) <= paths
    assert (config.average, config.save_every) == (recipe.average, recipe.save_every)


def test_the_recipe_of_bert_says_the_same(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "tiny-bert.toml", {}, TrainConfig)
    config = bert.settings(Plan(name="bert", data=tmp_path, out=tmp_path), seed=0)
    assert set(config.changed(recipe)) <= {"data", "valid"}


def test_bert(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "valid"):
        sentences = [" ".join(draw.choice(list(WORDS), 9)) + "." for _ in range(90)]
        text = "\n\n\n".join(" ".join(sentences[n : n + 30]) for n in range(0, 90, 30))
        (tmp_path / f"{part}.txt.xz").write_bytes(lzma.compress(text.encode()))
    for field, value in {"vocab_size": 90, "d_model": 16, "n_layers": 1, "batch_size": 4}.items():
        monkeypatch.setitem(bert.SHARED, field, value)
    arguments = (
        "reproduce",
        "bert",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--quick",
        "--threads",
        1,
    )
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "reduced: a few steps only" in done.out
    runs = json.loads((tmp_path / "out/bert.json").read_text())["runs"]
    (one,), (guess,) = runs["bert"], runs["guess"]
    assert one["words"] == pytest.approx(100 * one["valid_word_accuracy"])
    assert guess["next"] == pytest.approx(100 * one["valid_next_baseline"])
    assert 0 < guess["words"] < 50 <= guess["next"]
    assert json.loads(cli(*arguments, "--json").out)["runs"] == runs


def test_movie_snippets(cli: Cli, tmp_path: Path) -> None:
    films = [("pos", "a fine warm lovely film"), ("neg", "a poor cold dreadful film")]
    rows = [
        f"{part}\t{label}\t1.5\t{text} number {n}\n"
        for part, count in (("train", 12), ("valid", 2), ("test", 5))
        for n in range(count)
        for label, text in films
    ]
    (tmp_path / "movie_snippets.tsv.xz").write_bytes(lzma.compress("".join(rows).encode()))
    tokenizer = train_wordpiece([row.split("\t")[3] for row in rows], 120)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 64, "head": "none"}
    config = BertConfig.from_dict({**sizes, "vocab_size": tokenizer.vocab_size})
    save(Bert(config, torch.Generator().manual_seed(0)), tmp_path / "start", tokenizer)
    place = ("--data", tmp_path, "--out", tmp_path / "out", "--model", tmp_path / "start")
    arguments = ("reproduce", "movie-snippets", *place, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    runs = json.loads((tmp_path / "out/movie-snippets.json").read_text())["runs"]
    assert runs["minilm"][0]["accuracy"] % 10 == 0  # of ten sentences
    assert ("tf-idf" in runs) == (importlib.util.find_spec("sklearn") is not None)
    assert runs.get("tf-idf", [{"accuracy": 100.0}])[0]["accuracy"] == 100.0
    assert json.loads(cli(*arguments, "--json").out)["runs"]["minilm"] == runs["minilm"]


def test_a_ragged_table_of_snippets(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "movie_snippets.tsv.xz").write_bytes(lzma.compress(b"train\tpos\t1.5\tfine\ntrain\n"))
    done = cli("reproduce", "movie-snippets", "--data", tmp_path, "--out", tmp_path / "out", "--quick")
    assert done.code == 1
    assert "line 2: expected 4 columns, got 1" in done.err


def test_seeds_have_a_spread() -> None:
    one: dict[str, Any] = {
        "bleu": 30.0,
        "chrf": 50.0,
        "perplexity": 6.0,
        "parameters": 5,
        "minutes": 9.0,
        "seed": 0,
    }
    found = summary([one, {**one, "bleu": 31.0, "seed": 1}])
    assert (found["bleu"], found["bleu_range"], found["seeds"]) == (30.5, [30.0, 31.0], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["multi31k"], 2, "did you mean 'multi30k'"),
        (["multi30k"], 2, "--data: expected the directory with train.en.gz"),
        (["multi30k", "--data", "{empty}"], 1, "expected train.en.gz"),
        (["en-zh", "--data", "{empty}"], 1, "expected train.tsv.xz"),
        (["en-zh", "--data", "{data}", "--full", "--quick"], 2, "--full and --quick"),
        (["en-zh", "--data", "{data}", "--model", "x"], 2, "--model: en-zh trains its models from scratch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(cli: Cli, data: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"data": data, "empty": tmp_path / "empty"}
    done = cli("reproduce", *(argument.format(**places) for argument in arguments), "--out", tmp_path / "out")
    assert done.code == code
    assert words in done.err
    assert not (tmp_path / "out").exists()


def test_without_a_name_they_are_listed(cli: Cli) -> None:
    done = cli("reproduce")
    assert [line.split()[0] for line in done.out.splitlines()] == list(EXPERIMENTS)


# experiments with right answers


def write_digits(directory: Path) -> None:
    draw = np.random.default_rng(0)
    with tarfile.open(directory / "fsdd.tar.xz", "w:xz") as tar:
        for name in (f"{digit}_{who}_{n}.wav" for digit in range(3) for who in "ab" for n in range(4, 7)):
            file = io.BytesIO()
            with wave.open(file, "wb") as sound:
                sound.setparams((1, 2, 8000, 0, "NONE", ""))
                sound.writeframes(draw.integers(-99, 99, 60 + 4 * len(name), np.int16).tobytes())
            entry = tarfile.TarInfo(f"fsdd/recordings/{name}")
            entry.size = len(file.getvalue())
            tar.addfile(entry, io.BytesIO(file.getvalue()))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, draw = tmp_path_factory.mktemp("sequences"), np.random.default_rng(0)
    y = np.arange(24) % 3
    images = draw.integers(0, 255, (24, 4, 4), np.uint8)
    np.savez(directory / "mnist_5k.npz", x_train=images, y_train=y, x_test=images, y_test=y)
    x, n = draw.standard_normal((24, 9, 2)).astype(np.float32), draw.integers(4, 10, 24)
    parts = {
        f"{name}_{part}": a for part in ("train", "test") for name, a in {"x": x, "y": y, "len": n}.items()
    }
    np.savez(directory / "japanese_vowels.npz", **parts)
    write_digits(directory)
    return directory


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Make an experiment tiny: two systems, narrow, few sequences."""

    def shrink(name: str) -> Any:
        module = importlib.import_module(f"longscan.reproduce.{name.replace('-', '_')}")
        if name != "hippo-ablation":
            for system in [
                system for system in module.SYSTEMS if system.split("-")[0] not in ("mamba", "s4d", "h3")
            ]:
                monkeypatch.delitem(module.SYSTEMS, system)
        wanted = {"d_model": 8, "n_layers": 1, "train_examples": 20, "test_examples": 10, "batch_size": 4}
        for field, value in wanted.items():
            if field in module.SHARED:
                monkeypatch.setitem(module.SHARED, field, value)
        return module

    return shrink


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h3-recall", ["published", "induction", "recall", "35.6", "99.8", "by chance 5.0 and 25.0"]),
        ("selective-copying", ["selective copying", "plain copying", "99.8", "4,096"]),
        ("induction", ["4,096", "80.9", "parameters", "the state carried"]),
        ("state-tracking", ["parity", "brackets", "320", "chance is 0"]),
        ("mqar", ["width 16", "width 64", "4 pairs"]),
        ("vowels", ["half, dt doubled", "370 held-out"]),
        ("digits", ["half, as it is", "low-passed", "98.32"]),
        ("hippo-ablation", ["random", "spread", "84.27"]),
    ],
)
def test_right_answers(
    name: str, words: list[str], cli: Cli, sequences: Path, tmp_path: Path, tiny: Callable[[str], Any]
) -> None:
    module = tiny(name)
    data = ("--data", sequences) if module.FILES else ()
    arguments = ("reproduce", name, *data, "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "reduced: a few steps only: no result" in done.out
    for word in (*words, *module.SYSTEMS):
        assert word in done.out
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(report["runs"]) == list(module.SYSTEMS)
    assert (tmp_path / f"{name}.png").stat().st_size > 1000

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert json.loads(cli(*arguments, "--json").out)["runs"] == report["runs"]
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained or measured again


def test_ablations(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("longscan.reproduce.ablations")
    used = {name for rows in module.TABLES.values() for name, _ in rows.values()}
    assert used == set(module.VARIANTS)  # nothing is trained in vain
    monkeypatch.setitem(module.SHARED, "d_model", 8)
    monkeypatch.setitem(module.SHARED, "n_layers", 1)
    rows = {"all": ("mamba", 8.71), "none": ("none", 10.93), "half": ("half", None)}
    monkeypatch.setattr(module, "TABLES", {"some (table 0)": rows})
    monkeypatch.setattr(module, "VARIANTS", {name: module.VARIANTS[name] for name, _ in rows.values()})
    arguments = ("reproduce", "ablations", "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    for word in (
        "some (table 0)",
        "10.93",
        "reduced: a few steps only: no result",
        "bits per byte",
        "seeds:",
    ):
        assert word in done.out
    report = json.loads((tmp_path / "ablations.json").read_text())
    (whole,), (none,), (half,) = (report["runs"][name] for name, _ in rows.values())
    assert whole["parameters"] == half["parameters"] != none["parameters"]
    assert all(5 < row["bits_per_byte"] < 9 for row in (whole, none, half))
    assert (tmp_path / "ablations.png").stat().st_size > 1000

    train, valid = ((tmp_path / f"ablations-{part}.txt").read_text() for part in ("train", "valid"))
    assert 8 < len(train) / len(valid) < 11
    paragraphs = [part for part in (train + "\n" + valid).split("\n\n") if part.strip()]
    assert len(set(paragraphs)) == len(paragraphs) > 1000  # what is held out occurs nowhere else

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/state.json")}
    assert json.loads(cli(*arguments, "--json").out)["runs"] == report["runs"]
    assert len(times) == 3
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained again


def test_half_the_rate_is_measured_where_there_is_time(
    cli: Cli, sequences: Path, tmp_path: Path, tiny: Callable[[str], Any]
) -> None:
    tiny("vowels")
    done = cli("reproduce", "vowels", "--data", sequences, "--out", tmp_path, "--quick", "--threads", 1)
    assert done.code == 0, done.err
    runs = json.loads((tmp_path / "vowels.json").read_text())["runs"]
    assert runs["mamba"][0]["half"] is None
    for name in ("s4d", "mamba"):
        assert all(0 <= runs[name][0][measure] <= 100 for measure in ("accuracy", "half_plain"))
    assert 0 <= runs["s4d"][0]["half"] <= 100


@pytest.mark.parametrize("installed", [True, False], ids=["ode", "no-ode"])
def test_irregular(
    installed: bool, cli: Cli, sequences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("longscan.reproduce.irregular")
    if installed:
        pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
        monkeypatch.delitem(module.SYSTEMS, "s4d")
    else:
        monkeypatch.setitem(sys.modules, "torchdiffeq", None)
        monkeypatch.delitem(module.SYSTEMS, "lstm")
        monkeypatch.delitem(module.SYSTEMS, "lstm+gaps")
    for field in ("d_model", "n_layers"):
        monkeypatch.setitem(module.SHARED, field, 4 // module.SHARED[field] or 1)
    arguments = ("reproduce", "irregular", "--data", sequences, "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "irregular.json").read_text())
    assert list(report["runs"]) == (["neural_ode", "lstm", "lstm+gaps"] if installed else ["s4d"])
    assert (module.WITHOUT in done.out) != installed
    for rows in report["runs"].values():
        assert all(0 <= rows[0][measure] <= 100 for measure in module.MEASURES)
    whole, half, gaps = (
        read_sequences([tmp_path / f"irregular-{n}.npz"]) for n in ("all", "half", "half+gaps")
    )
    assert half.lengths.tolist() == [-(-n // 2) for n in whole.lengths]
    for before, after, times, told in zip(
        whole.rows, half.rows, half._split(half.times), gaps.rows, strict=True
    ):
        steps = np.rint(times / module.FRAME).astype(int)
        assert np.array_equal(after, before[steps])
        assert told[:, -1] == pytest.approx(np.diff(times, prepend=times[0]), abs=1e-8)
        assert np.array_equal(told[:, :-1], after)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert json.loads(cli(*arguments, "--json").out)["runs"] == report["runs"]
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained or measured again


def test_the_division_of_the_digits_is_their_own(
    cli: Cli, sequences: Path, tmp_path: Path, tiny: Callable[[str], Any]
) -> None:
    tiny("digits")
    assert cli("reproduce", "digits", "--data", sequences, "--out", tmp_path, "--quick").code == 0
    numbers = {
        part: {name[-5] for name in read_sequences([tmp_path / f"digits-{part}.npz"]).names}
        for part in ("train", "test")
    }
    assert numbers == {"train": {"5", "6"}, "test": {"4"}}


def test_what_a_measure_says_of_seeds() -> None:
    rows = [
        {"a": value, "parameters": 7, "minutes": 1.0, "seed": seed} for seed, value in enumerate((90.0, 92.0))
    ]
    report = {
        "measures": {"a": "accuracy", "b": "other"},
        "published": {"a": {"x": 99.5}},
        "systems": {"x": accuracies.summary(rows, {"a": "accuracy", "b": "other"})},
        "reduced": None,
        "notes": [],
    }
    head, row = accuracies.show(report).splitlines()
    assert head.split() == ["system", "published", "accuracy", "other", "seeds", "parameters", "minutes"]
    assert row.split() == ["x", "99.5", "91.0", "(90.0-92.0)", "-", "2", "7", "1.0"]


def test_a_synthetic_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    fields = {
        "model": "mamba",
        "d_model": 8,
        "n_layers": 1,
        "embed_dropout": 0.2,
        "threads": 1,
        "save_every": 2,
    }
    for name, more in {"new": {}, "fixed": {"train_examples": 30, "everywhere": True}}.items():
        config = SyntheticConfig.from_dict(
            {**fields, **more, "steps": 8, "batch_size": 8, "test_examples": 10}
        )
        SyntheticRun.begin(config, tmp_path / name)
        with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)resume with: the same command"):
            SyntheticRun.begin(config, tmp_path / f"{name}-stopped", PowerCut(5))
        SyntheticRun.resume(tmp_path / f"{name}-stopped")
        whole, again = (tmp_path / place / "model/model.safetensors" for place in (name, f"{name}-stopped"))
        assert whole.read_bytes() == again.read_bytes()


def test_a_synthetic_run_ends_when_it_has_learnt_enough(tmp_path: Path) -> None:
    sizes = {"model": "mamba", "d_model": 8, "n_layers": 1, "threads": 1, "batch_size": 2, "test_examples": 4}
    for enough, steps in ((0.0, 6), (1.1, 8)):
        config = SyntheticConfig.from_dict({**sizes, "steps": 8, "eval_every": 2, "enough": enough})
        torch.manual_seed(0)
        assert SyntheticRun.begin(config, tmp_path / str(steps)).step == steps
        result = SyntheticRun.resume(tmp_path / str(steps))
        assert result.step == steps
        assert result.stopped_by is None


def test_a_signal_stops_an_experiment_with_its_code(
    cli: Cli, sequences: Path, tmp_path: Path, tiny: Callable[[str], Any]
) -> None:
    tiny("vowels")
    arguments = ("reproduce", "vowels", "--data", sequences, "--out", tmp_path, "--quick", "--threads", 1)
    with ctrl_c("stderr", "step 1/"):
        done = cli(*arguments)
    assert (done.code, done.out) == (130, "")
    assert done.err.endswith("stopped after step 1; the same command resumes\n")
    assert cli(*arguments).code == 0


def test_an_experiment_as_a_library_is_silent(
    sequences: Path, tmp_path: Path, tiny: Callable[[str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    module, lines = tiny("vowels"), list[str]()
    plan = Plan(name="vowels", data=sequences, out=tmp_path, quick=True, threads=1, notify=lines.append)
    assert "half, dt doubled" in module.show(module.run(plan))
    assert lines == [f"── quick-vowels-{system} ──" for system in module.SYSTEMS]
    assert capfd.readouterr() == ("", "")
