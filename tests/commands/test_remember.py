"""`longscan remember` and the figures of memories."""

from __future__ import annotations

import json
import math
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from longscan.checkpoints.save import save
from longscan.data.signals import Signal, Trace, make_signal
from longscan.inference.remember import remember
from longscan.models import MODELS
from longscan.models.hippo_memory import Memory
from longscan.tokenizers.base import ByteTokenizer

pytest.importorskip("matplotlib")
Cli = Callable[..., Any]


def words_in(path: Path) -> set[str]:
    root = ElementTree.parse(path).getroot()
    return {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}


def test_a_wav_file(cli: Cli, tmp_path: Path) -> None:
    path, out = tmp_path / "tone.wav", tmp_path / "tone.svg"
    t = np.arange(4000) / 8000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((12000 * np.sin(2 * np.pi * 20 * t)).astype("<i2").tobytes())
    done = cli("remember", path, "--n", 8, "--n", 48, "--out", out)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"{path} · 4,000 samples, 8,000 per second, 0.50 s"
    assert lines[1].startswith("legs N = 8")
    assert lines[2].startswith("legs N = 48")
    assert "× real time" in lines[2]
    assert lines[3] == f"wrote {out}"
    assert {"seconds", "size of coefficient n", "signal", "N = 8", "N = 48"} <= words_in(out)

    done = cli("remember", path, "--n", 48, "--out", out, "--json")
    (row,) = json.loads(done.out)
    assert (row["samples"], row["rate"], row["n"], row["measure"]) == (4000, 8000, 48, "legs")
    assert row["energy"] == pytest.approx((12000 / 32768) ** 2 / 2, rel=1e-3)
    assert row["mse"] < 1e-4 * row["energy"]
    assert len(row["coefficients"]) == 48


@pytest.mark.parametrize("measure", ["legt", "lagt", "fourier"])
def test_a_window(cli: Cli, tmp_path: Path, measure: str) -> None:
    done = cli(
        "remember", "chirp", "--measure", measure, "--window", 2.5, "--out", tmp_path / "a.png", "--json"
    )
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    assert row["told_from"] == 7.5
    assert row["mse"] < 0.05 * row["energy"]


def test_the_error_is_that_of_what_is_told() -> None:
    """However the signal is cut into pieces; and there is never more than a piece of it in memory."""
    signal, asked = make_signal("noise", 3000, 10.0), []

    def read(begin: int, end: int) -> Any:
        asked.append(end - begin)
        return signal.read(begin, end)

    found = remember(Signal("it", 10.0, 3000, read, piece_size=128), Memory(32))
    f = signal.piece(0, 3000).double()
    told = found.memory.reconstruct(torch.arange(3000))[0]
    assert found.error == pytest.approx(float((told - f).square().mean()), rel=1e-9)
    assert found.energy == pytest.approx(float(f.square().mean()), rel=1e-6)
    assert max(asked) == 128


def test_a_trace_holds_the_extremes() -> None:
    values = torch.arange(1000.0)
    trace = Trace.empty(1000, 10.0, columns=50)
    for begin in range(0, 900, 33):
        trace.add(begin, values[begin : min(begin + 33, 900)], 1000)
    assert trace.low[:3].tolist() == [0, 20, 40]
    assert trace.high[:3].tolist() == [19, 39, 59]
    assert trace.seconds[1] == 2.0
    assert np.isnan(trace.low[45:]).all()
    assert len(Trace.empty(7, 1.0).low) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["noize"], 1, "did you mean 'noise'"),
        (["noise", "--n", "0"], 2, "--n: expected 1 to 1,024"),
        (["noise", "--measure", "legz"], 2, "--measure: there is no 'legz'"),
        (["noise", "--measure", "fourier", "--n", "5"], 1, "expected an even number"),
        (["noise", "--measure", "legt", "--window", "0"], 2, "--window: expected at least one sample"),
        (["noise", "--measure", "legt", "--window", "nan"], 2, "--window"),
        (["noise", "--method", "euler"], 2, "--method: expected one of bilinear"),
        (["noise", "--samples", "0"], 2, "--samples: expected 1 to 100,000,000"),
        (["chirp", "--samples", "99999999999999"], 2, "--samples: expected 1 to 100,000,000"),
        (["noise", "--rate", "0"], 1, "expected a rate above 0"),
        (["noise", "--out", "{tmp}/a.gif"], 2, "--out: expected a name that ends in .png"),
        (["{tmp}/bad.csv"], 1, "sample 1 (1.000 s) is nan"),
        (["{tmp}/gone.wav"], 1, "No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(cli: Cli, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "bad.csv").write_text("1\nnan\n2\n")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "x.png")]
    done = cli("remember", *arguments)
    assert (done.code, words in done.err) == (code, True), done.err
    assert not (tmp_path / "x.png").exists()


def test_silence_is_remembered(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "silence.npy", np.zeros(100))
    done = cli("remember", tmp_path / "silence.npy", "--out", tmp_path / "a.png")
    assert done.code == 0, done.err
    assert "MSE 0 of 0" in done.out


def test_without_matplotlib_there_is_no_figure(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("remember", "steps", "--out", tmp_path / "a.png")
    assert done.code == 0
    assert "figures need matplotlib: pip install 'longscan[plot]'" in done.out
    assert not (tmp_path / "a.png").exists()


def test_plot_basis(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "basis.svg"
    done = cli("plot", "basis", "--n", 16, "--shown", 3, "--out", out)
    assert (done.code, done.out) == (0, f"wrote {out}\n"), done.err
    shown = words_in(out)
    assert {"legs", "legt", "lagt", "fourier", "n = 2", "weight in coefficient n"} <= shown
    assert "n = 3" not in shown
    done = cli("plot", "basis", "--measure", "foud", "--n", 8, "--out", out)
    assert "foud" in words_in(out)


def test_plot_kernel(cli: Cli, tmp_path: Path) -> None:
    out, entry = tmp_path / "kernel.svg", MODELS["s4d"]
    config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 257})
    save(entry.cls(config, generator=torch.Generator().manual_seed(0)), tmp_path / "model", ByteTokenizer())
    for model in ("s4d", tmp_path / "model"):
        done = cli("plot", "kernel", model, "--length", 64, "--channels", 2, "--layer", -1, "--out", out)
        assert (done.code, done.out) == (0, f"wrote {out}\n"), done.err
        assert {"channel 0", "channel 1", "steps ago", "S4D, layer 1"} <= words_in(out)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["basis", "--measure", "x"], 2, "--measure: there is no 'x'"),
        (["basis", "--n", "0"], 2, "--n: expected 1 to 512"),
        (["basis", "--shown", "0"], 2, "--shown"),
        (["kernel", "lstm"], 1, "has no convolution kernels. Expected one of time-invariant"),
        (["kernel", "s4d", "--layer", "9"], 2, "--layer: expected 0 to 1"),
        (["kernel", "s4d", "--length", "1"], 2, "--length"),
        (["kernel", "s4d", "--channels", "0"], 2, "--channels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_of_plots(cli: Cli, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    done = cli("plot", *arguments, "--out", tmp_path / "x.png")
    assert (done.code, words in done.err) == (code, True), done.err
    assert not (tmp_path / "x.png").exists()


# experiments


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_reproduce_hippo(cli: Cli, results: Path) -> None:
    done = cli("reproduce", "hippo", "--quick", "--out", results)
    assert done.code == 0, done.err
    assert "reduced: a short signal" in done.out
    assert "470,000" in done.out
    report = json.loads((results / "hippo.json").read_text())
    for row in report["runs"]:
        errors = row["mse"]
        assert errors["floor"] <= 1.01 * errors["legs"]
        assert errors["legs"] < errors["lmu"] < errors["mean"]
        assert math.isclose(errors["mean"], 0.25, rel_tol=1e-3)
    assert (results / "hippo.png").stat().st_size > 10_000
    again = cli("reproduce", "hippo", "--quick", "--out", results, "--json")
    assert json.loads(again.out)["runs"] == report["runs"]  # measured rates and all: nothing was done again


def test_reproduce_discretization(cli: Cli, results: Path) -> None:
    done = cli("reproduce", "discretization", "--quick", "--out", results)
    assert done.code == 0, done.err
    assert "reduced: short signals" in done.out
    report = json.loads((results / "discretization.json").read_text())
    for row in report["rows"]:
        assert row["mse"]["zoh"] <= row["mse"]["bilinear"] * 1.01
        assert row["mse"]["bilinear"] < row["mse"]["backward"]
    assert (results / "discretization.png").stat().st_size > 10_000


def test_a_loss_is_explained(cli: Cli, tmp_path: Path) -> None:
    """A memory of N coefficients holds some N / pi cycles: see docs/memory.md."""
    path = tmp_path / "tone.csv"
    t = np.arange(2000) / 8000
    np.savetxt(path, np.sin(2 * np.pi * 200 * t))  # 50 cycles
    done = cli("remember", path, "--rate", 8000, "--n", 32, "--n", 256, "--out", tmp_path / "a.svg")
    assert done.code == 0, done.err
    (line,) = done.err.splitlines()  # 256 are enough
    assert "% of the energy is lost. N = 32 resolves about 10 cycles" in line
    assert "frequencies up to 40.7 Hz in 0.25 s: use a larger --n" in line
