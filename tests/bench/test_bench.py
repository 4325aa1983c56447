"""`longscan bench`: the harness on contenders of a few milliseconds, and the command."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import longscan
from longscan.bench import figure, report, runner, worker
from longscan.bench.measure import Contender, Measurement, Settings, compare
from longscan.bench.suites import ops, train_long

JOBS = """
import os

def write(path, word):
    with open(path, "a") as file:
        file.write(word)

def note(path, word):
    return lambda: write(path, word)

def slow(path, word):
    def run():
        write(path, word)
        return {"seconds": 99.0}
    return run

def noisy():
    print("hello from a peer", flush=True)
    return lambda: {"seconds": 7.0, "detail": "kept"}

def broken():
    def run():
        raise ArithmeticError("no more numbers")
    return run

def killed():
    return lambda: os.kill(os.getpid(), 9)

def hungry(megabytes):
    def run():
        bytearray(b"x" * (megabytes << 20))
    return run

def environment():
    return lambda: {"threads": os.environ["OMP_NUM_THREADS"]}
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of jobs that the workers find, and a log that these write to."""
    (tmp_path / "toy_jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "log"


def contender(name: str, job: str, **more: Any) -> Contender:
    settings = {key: more.pop(key) for key in tuple(more) if key in Contender.__dataclass_fields__}
    return Contender(name=name, job=f"toy_jobs:{job}", arguments=more, **settings)


def test_contenders_take_turns(jobs: Path) -> None:
    log = str(jobs)
    both = [contender("a", "note", path=log, word="a"), contender("b", "note", path=log, word="b")]
    found = compare("letters", both, Settings(repeats=3, budget=0.0))
    assert jobs.read_text() == "ab" + "ab" * 3
    assert list(found) == ["a", "b"]
    assert all(len(m.seconds) == 3 and m.warm and m.median > 0 for m in found.values())
    assert found["a"].peak_bytes > 1e6


def test_what_is_slow_runs_once(jobs: Path) -> None:
    log = str(jobs)
    slow = contender("slow", "slow", path=log, word="s", patience=98.0)
    found = compare(
        "letters", [slow, contender("a", "note", path=log, word="a")], Settings(repeats=2, budget=0.0)
    )
    assert jobs.read_text() == "sa" + "aa"
    assert found["slow"].seconds == (99.0,)
    assert not found["slow"].warm


def test_one_failure_does_not_stop_the_others(jobs: Path) -> None:
    three = [contender(name, name) for name in ("broken", "noisy", "killed")]
    found = compare("mixed", three, Settings(repeats=1, budget=0.0))
    assert found["broken"].note == "failed: ArithmeticError: no more numbers"
    assert "killed it" in found["killed"].note
    assert math.isnan(found["broken"].median)
    assert found["broken"].as_row()["seconds"] is None
    assert found["noisy"].seconds == (7.0,)
    assert found["noisy"].as_row()["detail"] == "kept"


def test_who_is_left_out(jobs: Path) -> None:
    everyone = [
        contender("ours", "noisy"),
        contender("peer", "noisy", peer=True),
        contender("absent", "noisy", packages=("no-such-package",)),
        contender("huge", "noisy", needs_bytes=10**18),
    ]
    found = compare("few", everyone, Settings(repeats=1, budget=0.0, peers=False))
    assert list(found) == ["ours", "huge"]
    assert found["huge"].note.startswith("not run: needs about 1000000000 GB")
    assert not found["huge"].seconds


def test_extra_memory_is_that_of_one_run_and_of_one_contender(jobs: Path) -> None:
    both = [contender("much", "hungry", megabytes=96), contender("little", "hungry", megabytes=1)]
    found = compare("memory", both, Settings(repeats=1, budget=0.0), memory=True)
    assert 90 < found["much"].extra_bytes / 2**20 < 250  # the constant and the array may overlap
    assert found["little"].extra_bytes / 2**20 < 10


def test_threads_reach_the_worker(jobs: Path) -> None:
    found = compare("threads", [contender("a", "environment")], Settings(repeats=1, budget=0.0, threads=3))
    assert found["a"].details == {"threads": "3"}


def clock(*ticks: float) -> Callable[[], float]:
    """A clock that shows these times, and then goes on in steps of the last one."""
    return itertools.chain(ticks, itertools.count(2 * ticks[-1], ticks[-1])).__next__


def test_a_turn_of_something_short_is_a_median() -> None:
    ticks = clock(0.001)
    seconds = itertools.chain([9.0, 1.0, 5.0], itertools.repeat(2.0))
    assert worker.turn(lambda: {"seconds": next(seconds)}, 0.05, ticks)["seconds"] == 2.0
    assert worker.turn(lambda: {"seconds": 7.0}, 0.002, ticks) == {"seconds": 7.0}  # no time for more


# --- the contenders, in this process ------------------------------------------------------------------------


def prepare(job: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    module, name = job.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def run_here(
    title: str, contenders: Sequence[Contender], settings: Settings, *, memory: bool = False
) -> dict[str, Measurement]:
    """Stand in for `compare`: run each contender that needs no package once, in this process."""
    found = {}
    for one in contenders:
        if one.packages or (one.peer and not settings.peers):
            continue
        begin = time.perf_counter()
        details = prepare(one.job, one.arguments)() or {}
        seconds = details.pop("seconds", time.perf_counter() - begin)
        extra = 4096 if memory else None
        found[one.name] = Measurement(
            name=one.name, seconds=(seconds,), peak_bytes=10**8, extra_bytes=extra, details=details
        )
    return found


@pytest.fixture(scope="module")
def reports() -> Iterator[list[report.Report]]:
    """The quick report of every suite, measured in this process, where no peer is installed."""
    settings = Settings(compare=run_here, installed=lambda _: False)
    with pytest.MonkeyPatch.context() as patch:
        # for the processes that a suite starts to time them
        patch.setenv("PYTHONPATH", str(Path(longscan.__file__).parent.parent))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sizes this small only wait for a second
        yield [runner.run(suite, settings, quick=True) for suite in runner.SUITES]
        torch.set_num_threads(threads)


# --- the command --------------------------------------------------------------------------------------------


def test_ops_for_real_as_json(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--json", "--no-peers", "--repeats", 1, "--threads", 1, "--figure", tmp_path / "ops.png")
    done = cli("bench", "ops", "--quick", *flags)
    assert done.code == 0, done.err
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(done.out)
    assert found["machine"]["threads"] == 1
    assert {"torch", "longscan", "python"} <= set(found["versions"])
    assert found["repeats"] == 1
    assert found["quick"] is True
    (suite,) = found["suites"]
    assert suite["suite"] == "ops"
    ours = [row for row in suite["rows"] if row["contender"] == ops.OURS]
    assert len(ours) == 12  # scan, ssd, convolution, three ops of state spaces, forward and with backward
    for row in ours:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["rate"] > 0
        floor = (
            1 if row["case"].startswith(("selective", "causal")) else 0
        )  # a tiny kernel may fit in what is there
        assert row["peak_bytes"] > row["extra_bytes"] >= floor
        assert row["note"] == ""
    assert {"case", "unit", "warm", "repeats", "shape", "backward", "u_bytes"} <= set(ours[0])
    assert all({"what", "measured", "goal"} == set(ratio) for ratio in suite["ratios"])
    assert "selective_scan forward" in done.err


def test_everything_prints_without_peers(reports: list[report.Report]) -> None:
    text = "\n".join(found.text() for found in reports)
    for title in (
        "selective_scan forward",
        "causal_conv1d",
        "training: tokens/s",
        "prefill: tokens/s",
        "decode, by batch size",
        "seconds from the start of the process",
        "decoding after a prompt",
        "fine-tuning: tokens/s",
        "training a translator",
        "evaluate: 20,000 tokens",
        "decode, by position",
        "Llama 130m: speed at 64, share of that at 8",
        "concurrent streams: tokens/s in all",
        "first token by turn of a conversation",
    ):
        assert title in text
    assert "longscan" in text
    assert "\x1b" not in text


def test_training_on_long_sequences(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--quick", "--repeats", 1, "--threads", 1, "--figure", tmp_path / "long.png", "--json")
    done = cli("bench", "train", "--long", *flags)
    assert done.code == 0, done.err
    (suite,) = json.loads(done.out)["suites"]
    steps = [row for row in suite["rows"] if not row["case"].startswith("gradient")]
    rates = {(row["contender"], row["seq_len"]): row["rate"] for row in steps}
    assert {name for name, _ in rates} == {train_long.CHUNKS, train_long.WHOLE, train_long.GPT}
    assert all(rates.values())
    assert (tmp_path / "long.png").exists()
    differences = {row["contender"]: row["difference"] for row in suite["rows"] if row not in steps}
    assert len(differences) == 2
    for name, difference in differences.items():
        assert 0 < difference <= float(train_long.DIFFERENCES[name.split(", ")[1]])
    done = cli("bench", "ops", "--long")
    assert done.code == 2
    assert "--long: is for the suite train" in done.err


def test_a_suite_for_real_as_text(cli: Any) -> None:
    done = cli("bench", "stream", "--quick", "--repeats", 1, "--threads", 1)
    assert done.code == 0, done.err
    assert "medians (lowest–highest)" in done.out
    assert "evaluate: 20,000 tokens" in done.out
    absent = runner.missing_peers(Settings())
    assert ("not installed" in done.out) == bool(absent)
    assert not absent or runner.install_peers(absent) in done.out


def test_peers_that_are_not_installed() -> None:
    absent = runner.missing_peers(Settings(installed=lambda package: package == "transformers"))
    assert absent == ["mambapy", "peft", "llama-cpp-python"]
    assert runner.missing_peers(Settings(installed=lambda _: False, peers=False)) == []
    assert runner.install_peers(runner.missing_peers(Settings(installed=lambda _: False))) == (
        "not installed: mambapy, transformers, peft, llama-cpp-python; to compare with them: "
        "pip install 'longscan[peers,llama]'"
    )


def test_figure(reports: list[report.Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    figure.draw(reports, runner.heading(runner.about(Settings(), quick=True)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("opps",), 2, "did you mean 'ops'"),
        (("ops", "--repeats", 0), 2, "--repeats: expected 1 or more, got 0"),
        (("generate", "--shape", "131m"), 2, "131m"),
        (("generate", "--model", "mamba3"), 2, "generate has no 'mamba3'; known: falcon-h1"),
        (("generate", "--model", "mamba2", "--shape", "370m"), 2, "--shape 370m: is for --model mamba"),
        (("ops", "--shape", "370m"), 2, "--shape 370m: is for the suite generate"),
        (("ops", "--model", "mamba2"), 2, "--model: expected the suite generate, text or quality"),
        (("ops", "--threads", -1), 2, "--threads: expected 1 or more, got -1"),
        (("ops", "--figure", "bench.txt"), 2, "ends in .png, .svg or .pdf"),
        (("ops", "--figure", "nowhere/bench.png"), 1, "there is no directory"),
    ],
    ids="suite repeats shape model size no-shape other-suite threads suffix directory".split(),
)
def test_misuse(cli: Any, argv: tuple[object, ...], code: int, words: str) -> None:
    done = cli("bench", *argv)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
