"""`longscan plot delta`, `state` and `attention` for language models on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from longscan.checkpoints.save import save
from longscan.models import MODELS
from longscan.tokenizers.base import ByteTokenizer

pytest.importorskip("matplotlib")
Cli = Callable[..., Any]

TEXT = "The map? 'No', he said."


def texts_in(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    nodes = root.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(node.itertext()).replace("\u00a0", " ") for node in nodes]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of several kinds, and one without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "mamba2": ("mamba2", {}),
        "mamba3": ("mamba3", {}),
        "hybrid": ("hybrid", {"pattern": "m-P*", "n_layers": 4}),
        "llama": ("llama", {}),
        "s4d": ("s4d", {}),
        "bare": ("mamba", {}),
    }
    for name, (kind, fields) in variants.items():
        entry = MODELS[kind]
        config = entry.config.from_dict({**entry.presets["tiny"], **fields})
        model = entry.cls(config, generator=torch.Generator().manual_seed(0)).eval()
        save(model, root / name, None if name == "bare" else ByteTokenizer())
    return root


def test_delta_of_the_shipped_model(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "delta.svg"
    done = cli("plot", "delta", TEXT, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"wrote {out}\n", "")
    shown = texts_in(out)
    assert TEXT in shown  # the text, in one piece
    assert "Δ of longscan-tiny-en: how far each token opens the state" in shown
    assert {"Δ, mean over channels", "Δ, mean over channels and layers", "layer", "token"} <= set(shown)
    assert {"The", "m", "ap", "said"} <= set(shown)  # labels of tokens
    assert {str(layer) for layer in range(8)} <= set(shown)


def test_delta_of_a_layer(cli: Cli, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "delta.svg"
    done = cli("plot", "delta", TEXT, "--model", models / "hybrid", "--layer", 2, "--out", out)
    assert done.code == 0, done.err
    shown = texts_in(out)
    assert "Δ of layer 2, mean over channels or heads" in shown
    assert "Δ of hybrid: how far each token opens the state" in shown
    assert {"0", "2"} <= set(shown)
    assert "3" not in shown  # attention has no Δ
    done = cli("plot", "delta", TEXT, "--model", models / "hybrid", "--layer", -2, "--out", out)
    assert "Δ of layer 2, mean over channels or heads" in texts_in(out)


def test_delta_of_a_pipe(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "delta.svg"
    done = cli("plot", "delta", "--out", out, stdin="one\ntwo\n")
    assert done.code == 0, done.err
    shown = texts_in(out)
    assert {"one↵", "two", "↵ line break"} <= set(shown)  # the last line break is not of the text
    assert cli("plot", "delta", "-", "--out", out, stdin=b"\xff").code == 1


def test_state(cli: Cli, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "state.svg"
    done = cli("plot", "state", TEXT, "--model", models / "hybrid", "--out", out)
    assert (done.code, done.err) == (0, "")
    head, *rows, last = done.out.splitlines()
    assert head.split() == ["layer", "norm", "half-life", "25", "%", "75", "%"]
    assert [row.split()[0] for row in rows] == ["0", "2"]
    for row in rows:
        _, norm, middle, low, high = row.split()
        assert float(norm) > 0
        assert 1 <= int(low) <= int(middle) <= int(high)
    assert last == f"wrote {out}"
    shown = texts_in(out)
    assert f"state of hybrid over {len(TEXT)} tokens" in shown
    assert {"norm of the state after each token", "half-life: median and quartiles", "tokens"} <= set(shown)
    assert any(
        text.startswith("Half-life of what is stored at a token: the further tokens") for text in shown
    )


def test_attention_of_a_scan(cli: Cli, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "attention.svg"
    done = cli("plot", "attention", "longscan-tiny-en", TEXT, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"wrote {out}\n", "")
    expected = {
        *("longscan-tiny-en, layer 7", "hidden attention of the scan", "|α|, mean over 512 channels"),
        *("keys: tokens attended to", "queries: tokens that attend"),
    }
    shown = texts_in(out)
    assert expected <= set(shown)
    assert shown.count("said") == 2
    done = cli("plot", "attention", "longscan-tiny-en", TEXT, "--layer", 3, "--channel", 9, "--out", out)
    assert {"longscan-tiny-en, layer 3", "α of channel 9"} <= set(texts_in(out))
    done = cli("plot", "attention", models / "mamba3", TEXT, "--head", 1, "--out", out)
    assert {"mamba3, layer 1", "α of head 1"} <= set(texts_in(out))


def test_attention_of_attention(cli: Cli, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "attention.svg"
    assert cli("plot", "attention", models / "llama", TEXT, "--layer", 0, "--out", out).code == 0
    assert {"llama, layer 0", "attention", "weight, mean over 4 heads"} <= set(texts_in(out))
    assert cli("plot", "attention", models / "hybrid", TEXT, "--layer", 2, "--out", out).code == 0
    both = {
        "hidden attention of the scan",
        "attention",
        "|α|, mean over 8 heads",
        "weight, mean over 4 heads",
    }
    assert both <= set(texts_in(out))
    assert cli("plot", "attention", models / "hybrid", TEXT, "--head", 3, "--out", out).code == 0
    shown = texts_in(out)
    assert "weight of head 3" in shown  # of the last layer
    assert not [text for text in shown if "α" in text]


def test_a_head_that_only_the_scan_has(cli: Cli, models: Path, tmp_path: Path) -> None:
    argv = ("plot", "attention", models / "hybrid", TEXT, "--layer", 2, "--out", tmp_path / "a.svg")
    for head, titles in ((3, {"hidden attention of the scan", "attention"}), (7, set())):
        done = cli(*argv, "--head", head)  # 8 heads of the scan, 4 of attention
        assert done.code == 0, done.err
        assert titles <= set(texts_in(tmp_path / "a.svg"))
    assert "attention" not in texts_in(tmp_path / "a.svg")
    assert "--head: expected 0 to 7, got 8" in cli(*argv, "--head", 8).err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["delta", ""], 2, "TEXT: expected some text, got none"),
        (["delta", " \n"], 2, "TEXT: expected some text, got none"),
        (["state"], 2, "TEXT: expected some text, got none"),
        (["delta", "a" * 5000, "--model", "MAMBA2"], 2, "TEXT: expected at most 2,048 tokens, got 5,000"),
        (["state", "a" * 2049, "--model", "MAMBA2"], 2, "TEXT: expected at most 2,048 tokens, got 2,049"),
        (["attention", "MAMBA2", "a" * 513], 2, "TEXT: expected at most 512 tokens, got 513"),
        (["delta", "a", "--layer", "8"], 2, "--layer: expected 0 to 7, got 8"),
        (["delta", "a", "--layer", "-9"], 2, "--layer: expected 0 to 7, got -9"),
        (
            ["delta", "a", "--model", "HYBRID", "--layer", "1"],
            2,
            "--layer: expected one with a selective state: 0, 2; got 1",
        ),
        (
            ["attention", "HYBRID", "a", "--layer", "1"],
            2,
            "expected one with a selective state or attention: 0, 2, 3; got 1",
        ),
        (["attention", "MAMBA2", "a", "--head", "8"], 2, "--head: expected 0 to 7, got 8"),
        (["attention", "MAMBA2", "a", "--seed", "1"], 2, "--seed: these are for models of images"),
        (
            ["attention", "longscan-tiny-en", "a", "--channel", "-1"],
            2,
            "--channel: expected 0 to 511, got -1",
        ),
        (
            ["delta", "a", "--model", "LLAMA"],
            1,
            "llama: expected a model with a selective state, such as mamba",
        ),
        (["state", "a", "--model", "S4D"], 1, "got S4D, which has no Δ"),
        (["attention", "S4D", "a"], 1, "expected a model with a selective state or attention"),
        (["delta", "a", "--model", "BARE"], 1, "bare has no tokenizer"),
        (["attention", "BARE", "a"], 1, "or name one with --tokenizer"),
        (["delta", "a", "--model", "BARE", "--tokenizer", "longscan-tiny-en"], 1, "257"),
        (["delta", "a\udcff"], 1, "TEXT is not UTF-8"),
        (["state", "a", "--model", "no-such-model"], 1, "no-such-model"),
        (
            ["attention", "MAMBA2", "a", "--part", "cross"],
            2,
            "--target, --part, --pieces: these are for transl",
        ),
        (
            ["attention", "vim", "a.png", "--head", "1"],
            2,
            "--head, --channel, --tokenizer: these are for langu",
        ),
        (["delta", "a", "--out", "x.bmp"], 2, "--out: expected a name that ends in .png, .svg or .pdf"),
        (["state", "a", "--out", "no/x.png"], 1, "--out: there is no directory"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else ""
    ),
)
def test_misuse(cli: Cli, models: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    given = [models / argument.lower() if argument.isupper() else argument for argument in arguments]
    out = () if "--out" in arguments else ("--out", tmp_path / "x.png")
    done = cli("plot", *given, *out)
    assert (done.code, words in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "x.png").exists()


def test_a_tokenizer_may_be_named(cli: Cli, models: Path, tmp_path: Path) -> None:
    named = ("--tokenizer", models / "mamba2", "--out", tmp_path / "x.svg")
    assert cli("plot", "state", "a", "--model", models / "bare", *named).code == 0
    assert cli("plot", "attention", models / "bare", "a", *named).code == 0


def test_without_matplotlib(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for verb in (("delta", TEXT), ("state", TEXT), ("attention", "longscan-tiny-en", TEXT)):
        done = cli("plot", *verb, "--out", tmp_path / "x.png")
        assert (done.code, "figures need matplotlib: pip install 'longscan[plot]'" in done.err) == (1, True)
