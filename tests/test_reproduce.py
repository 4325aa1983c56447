"""Experiments: they train what isn't trained, find what is, and say what they are."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longscan.recipe import read_recipe
from longscan.reproduce import EXPERIMENTS, multi30k
from longscan.reproduce.systems import Plan, summary
from longscan.translate import TranslateConfig

Cli = Callable[..., Any]
RECIPES = Path(__file__).parents[1] / "recipes"
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
    """Tiny models and no curves: it is about what happens around them."""
    monkeypatch.setattr(importlib.import_module("longscan.run"), "plot_losses", lambda *_: None)
    monkeypatch.setattr(importlib.import_module("longscan.reproduce.systems"), "QUICK_SENTENCES", 4)
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
        assert sum(row["sentences"] for row in found["by_length"]) == found["sentences"] == 4
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
