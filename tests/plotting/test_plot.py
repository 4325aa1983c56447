"""Figures: the right words on the axes, the right numbers between them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from longscan.bench import figure as bench_figure
from longscan.checkpoints.save import save
from longscan.data.sentence_pairs import SPECIAL
from longscan.models import MODELS
from longscan.plotting.attention import plot_weights
from longscan.plotting.bars import plot_bars
from longscan.plotting.style import line_style, new_figure, save_figure
from longscan.plotting.translation import plot_bleu
from longscan.tokenizers.bpe import BPETokenizer, train_bpe
from longscan.tokenizers.words import END, START, group

pytest.importorskip("matplotlib")
Cli = Callable[..., Any]

SENTENCE, TARGET = "A brown dog.", "Ein brauner Hund."


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["A brown dog. Ein brauner Hund."] * 3, 270, SPECIAL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: BPETokenizer) -> Path:
    """A tiny model of each kind, untrained."""
    root = tmp_path_factory.mktemp("models")
    for name in ("seq2seq", "bahdanau", "luong", "transformer"):
        entry = MODELS[name]
        config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": tokenizer.vocab_size})
        save(entry.cls(config, generator=torch.Generator().manual_seed(0)), root / name, tokenizer)
    return root


def words_in(path: Path) -> list[str]:
    """The texts of an SVG file, in order."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_tokens_become_words(tokenizer: BPETokenizer) -> None:
    ids = tokenizer.encode("A brown dog, 狗狗!")
    found = group(tokenizer, ids)
    assert found.words == ["A", "brown", "dog", ",", "狗", "狗", "!", END]
    assert len(found.word_of) == len(ids) + 1
    pieces = group(tokenizer, ids, pieces=True)
    assert "".join(pieces.words[:-1]) == "Abrowndog,狗狗!"
    assert len(pieces.words) > len(found.words)


def test_what_a_word_gets_is_what_its_tokens_get(tokenizer: BPETokenizer) -> None:
    found = group(tokenizer, tokenizer.encode("brown dog"))
    n_words, n_tokens = len(found.words), len(found.word_of)
    weights = torch.rand(n_tokens, n_tokens).softmax(-1)
    words = found.matrix(mean=True) @ weights @ found.matrix(mean=False).mT
    assert words.shape == (n_words, n_words)
    torch.testing.assert_close(words.sum(-1), torch.ones(n_words))


def test_a_decoder_has_read_one_word_less(tokenizer: BPETokenizer) -> None:
    found = group(tokenizer, tokenizer.encode("dog dog"))
    assert found.read().words == [START, "dog", "dog"]
    assert found.read().word_of == [0, *(word + 1 for word in found.word_of[:-1])]


@pytest.mark.parametrize("name", ["bahdanau", "luong", "transformer"])
def test_alignment(cli: Cli, models: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "alignment.svg"
    done = cli("plot", "alignment", models / name, SENTENCE, "--target", TARGET, "--out", out)
    assert (done.code, done.out) == (0, f"wrote {out}\n"), done.err
    shown = words_in(out)
    for word in ("A", "brown", "dog", "Ein", "brauner", "Hund", "attention weight", "keys", "queries"):
        assert word in shown


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_attention_of_each_head(cli: Cli, models: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "attention.svg"
    arguments = (
        models / "transformer",
        SENTENCE,
        "--target",
        TARGET,
        "--part",
        part,
        "--layer",
        0,
        "--out",
        out,
    )
    done = cli("plot", "attention", *arguments)
    assert done.code == 0, done.err
    shown = words_in(out)
    assert [f"head {number}" in shown for number in range(5)] == [True] * 4 + [False]
    assert ("Hund" in shown, "dog" in shown) == (part != "encoder", part != "decoder")
    assert (START in shown) == (part == "decoder")


def test_the_model_translates_if_nobody_else_does(cli: Cli, models: Path, tmp_path: Path) -> None:
    done = cli("plot", "alignment", models / "luong", "狗狗", "--pieces", "--out", tmp_path / "a.svg")
    assert (done.code, done.err) == (0, "")
    assert "狗" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    done = cli("plot", "alignment", models / "luong", "a dog", "--target", "x", "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_positions(cli: Cli, tmp_path: Path) -> None:
    done = cli("plot", "positions", "--d-model", 16, "--length", 30, "--out", tmp_path / "p.svg")
    assert done.code == 0, done.err
    assert {"position", "distance", "from position 15"} <= set(words_in(tmp_path / "p.svg"))


def test_weights_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    draw = Axes.imshow

    def watch(self: Axes, data: Any, **options: Any) -> Any:
        drawn.append(data)
        return draw(self, data, **options)

    monkeypatch.setattr(Axes, "imshow", watch)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    plot_weights({"cross": weights}, ["a", "b"], ["x", "y", "z"], tmp_path / "w.png")
    assert drawn[0].tolist() == weights.tolist()


@pytest.mark.parametrize("n_panels", [1, 8])
@pytest.mark.parametrize("letter", ["x", "W"])
def test_very_long_words_are_cut(tmp_path: Path, n_panels: int, letter: str) -> None:
    word, path = letter * 300, tmp_path / "w.svg"
    panels = {f"head {number}": torch.rand(3, 2) for number in range(n_panels)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a layout that collapses
        plot_weights(panels, ["a", word], ["b", word, "c"], path)
    shown = words_in(path)
    assert letter * 23 + "…" in shown
    assert word not in shown


def report(bleu: float) -> dict[str, Any]:
    rows = [("0-5", 4.0), ("6-10", 8.5), ("31+", 40.0)]
    by_length = [{"words": w, "mean_words": m, "sentences": 9, "bleu": bleu - m / 10} for w, m in rows]
    return {"bleu": bleu, "by_length": by_length}


def test_bleu_by_length(cli: Cli, tmp_path: Path) -> None:
    files = []
    for name, value in (("seq2seq", 20.0), ("luong", 31.25)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(report(value)))
    done = cli("plot", "bleu", *files, "--out", tmp_path / "b.svg")
    assert done.code == 0, done.err
    shown = words_in(tmp_path / "b.svg")
    assert {"seq2seq (20.0 on all)", "luong (31.2 on all)", "BLEU", "words in the source sentence"} <= set(
        shown
    )
    assert any("31+" in word for word in shown)
    plot_bleu({str(n): report(n) for n in range(8)}, tmp_path / "many.pdf")  # more than there are colours
    assert (tmp_path / "many.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["alignment", "{seq2seq}", "A dog."], 1, "has no attention to plot: it is a Seq2Seq"),
        (["alignment", "{luong}", "  "], 2, "expected some text"),
        (["alignment", "{gone}", "A dog."], 1, "gone"),
        (["alignment", "{transformer}", "A dog.", "--layer", "7"], 2, "--layer: expected 0 to 1, got 7"),
        (["attention", "{luong}", "A dog.", "--part", "encoder"], 2, "has cross attention, no encoder"),
        (
            ["attention", "{luong}", "A dog.", "--out", "{new}.gif"],
            2,
            "--out: expected a name that ends in .png",
        ),
        (["attention", "{luong}", "A dog.", "--out", "{gone}/a.png"], 1, "no directory"),
        (["positions", "--d-model", "15"], 2, "--d-model: expected an even number"),
        (["positions", "--length", "1"], 2, "--length"),
        (["bleu", "{config}"], 1, "expected what `longscan translate evaluate --json` prints"),
        (["bleu"], 2, "Missing argument"),
        (["pie"], 2, "No such command 'pie'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(cli: Cli, models: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    places = {name: models / name for name in ("seq2seq", "luong", "transformer")}
    places |= {"gone": tmp_path / "gone", "new": tmp_path / "new", "config": models / "luong/config.json"}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] != "pie" and "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "x.png")]
    done = cli("plot", *arguments)
    assert done.code == code, done.err
    assert words in done.err
    assert not (tmp_path / "x.png").exists()


def test_a_figure_says_what_its_reader_has_to_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {
        "reduced": "one seed",
        "measures": {"accuracy": "accuracy", "half": "half the rate"},
        "published": {},
        "systems": {"s4": {"accuracy": {"mean": 0.0, "range": [0.0, 0.0]}}, "lstm": {}},
    }
    plot_bars(report, tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text()
    assert "reduced: one seed" in drawn
    assert drawn.count(">not measured<") == 3
    assert drawn.count(">0.0<") == 1  # a bar of no height was measured
    plot_bars({**report, "reduced": None}, tmp_path / "bars.svg")
    assert "reduced" not in (tmp_path / "bars.svg").read_text()


def test_a_missing_font_is_a_warning(tmp_path: Path) -> None:
    for title, warned in (
        ("你好", pytest.warns(match="apt install fonts-noto-cjk")),
        ("hello", nullcontext()),
    ):
        figure = new_figure(2.0, 2.0)
        figure.suptitle(title)
        with warned:
            save_figure(figure, tmp_path / "a.png", fonts=())
        assert (tmp_path / "a.png").stat().st_size > 0


def test_lines_of_a_figure_differ() -> None:
    styles = [tuple(line_style(index).values()) for index in range(36)]
    assert len(set(styles)) == len(styles)
    assert len({colour for colour, _ in styles[:6]}) == len({marker for _, marker in styles[:6]}) == 6


def test_the_disc_is_ours_alone() -> None:
    names = ["longscan float32", "torch, the whole matrix", *(f"peer {n}" for n in range(9)), "longscan int4"]
    styles = bench_figure.styles([{"contender": name} for name in [*names, "ceiling: memory"]])
    assert len({styles[name] for name in names}) == len(names)
    assert {name for name, (_, marker) in styles.items() if marker == "o"} == {names[0], names[-1]}
