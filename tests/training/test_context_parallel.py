"""Processes that share a sequence train the model of one: every model whose state has a constant size."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from longscan.training.config import TrainConfig
from longscan.training.train import train
from parted_gradients import constant
from processes import Parent, until_step
from tiny_runs import assert_close, assert_same, flags, slowly


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    parent = Parent(tmp_path_factory.mktemp("parts"))
    yield parent
    parent.close()


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in constant()), ("mamba", 3), ("mamba2", 3), ("mamba3", 3)]
)
def test_the_gradients_of_every_model(name: str, size: int, parent: Parent) -> None:
    """Of plain rows, of packed and padded ones whose sequences end anywhere, and of a token per process."""
    first = dict.fromkeys(range(size), f"import parted_gradients as p; p.compare({name!r}, {size})")
    ranks = parent.start("--version", size=size, first=first)
    assert ranks.wait() == [0] * size, "".join(ranks.said(rank) for rank in range(size))
    assert f"{name} agrees\n" in ranks.said()


def test_which_models_can() -> None:
    others = {"mamba", "mamba2", "mamba3", "lstm", "cnn", "linear_attention", "hippo", "lssl", "s4", "s4d"}
    assert set(constant()) == others | {"h3"}


def test_what_is_sent(parent: Parent) -> None:
    """The states of all layers forward, their gradients back: as many bytes for any length."""
    for seq_len in (4, 64, 257):
        first = dict.fromkeys(range(2), f"import parted_gradients as p; p.count_bytes({seq_len})")
        ranks = parent.start("--version", first=first)
        assert ranks.wait() == [0, 0], ranks.said()
        assert "sent 1 and 0 states" in ranks.said(0)
        assert "sent 0 and 1 states" in ranks.said(1)


def test_the_size_that_is_printed(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    printed = set()
    for seq_len in ("8", "32"):
        more = ["--seq-len", seq_len, "--context-parallel", "2", "--out", str(tmp_path / seq_len)]
        said = parent.run("train", *config.data, *flags(config.replace(steps=1)), *more).said()
        line = re.search(r"a layer sends (.* kB) in each direction", said)
        assert line, said
        printed.add(line[1])
    # 2 rows of float32: 3 x 32 inputs of the convolution, 32 x 4 numbers of the state
    assert printed == {f"{2 * 4 * (3 * 32 + 32 * 4) / 1000:.1f} kB"}


@pytest.mark.parametrize(("size", "context"), [(3, 3), (4, 2)])
def test_parts_of_any_size(
    size: int, context: int, config: TrainConfig, parent: Parent, tmp_path: Path
) -> None:
    """17 tokens do not divide; where processes are left, they share other sequences."""
    config = config.replace(seq_len=17, n_layers=3)
    train(config, tmp_path / "one", figures=False)
    more = ["--context-parallel", str(context), "--out", str(tmp_path / "run")]
    said = parent.run("train", *config.data, *flags(config), *more, size=size).said()
    assert f"context    {context} processes share a sequence, at most {-(-17 // context)} tokens" in said
    assert_close(tmp_path / "run", tmp_path / "one")


def test_resume(config: TrainConfig, whole: Path, parent: Parent, tmp_path: Path) -> None:
    """After kill -9 with as many bits; also in one process."""
    start = ["train", *config.data, *flags(config), "--context-parallel", "2"]
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    parent.run(*start, "--out", str(undisturbed))
    ranks = parent.start(*start, "--out", str(run), first={0: slowly(5)})
    until_step(run, 4)
    ranks.kill(1, signal.SIGKILL)
    assert ranks.wait() == [1, -9]
    assert "another of the 2 processes ended, or its connection broke" in ranks.said()
    assert "Traceback" not in ranks.said()
    for size, more in ((1, ["--context-parallel", "1"]), (2, [])):
        copy = tmp_path / str(size)
        shutil.copytree(run, copy)
        parent.run("train", "--resume", str(copy), *more, size=size)
        assert_close(copy, whole)
    assert_same(tmp_path / "2", undisturbed)


def test_a_process_that_hangs(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    start = ["train", *config.data, *flags(config), "--context-parallel", "2", "--timeout", "3"]
    hang = """
import os, signal
from longscan.training.context_parallel import Neighbours
receive, count = Neighbours.receive, []
def stopped(self, state):
    count.append(1)
    if len(count) == 12:
        os.kill(os.getpid(), signal.SIGSTOP)
    return receive(self, state)
Neighbours.receive = stopped
"""
    ranks = parent.start(*start, "--out", str(tmp_path / "run"), first={1: hang})
    assert parent.ask({"wait": ranks.pids[0]}) == 1
    assert "another of the 2 processes did not answer within 3 s (--timeout)" in ranks.said()
    ranks.kill(1, signal.SIGKILL)
    del ranks.pids[0]
    ranks.wait()


@pytest.mark.parametrize(
    ("more", "size", "message"),
    [
        (["--context-parallel", "2"], 3, "expected a divisor of the number of processes, which is 3, got 2"),
        (["--context-parallel", "2"], 1, "start a multiple of 2 processes with torchrun"),
        (
            ["--context-parallel", "4", "--seq-len", "3"],
            4,
            "expected at least one token of a sequence for each",
        ),
        (["--context-parallel", "2", "--shard"], 2, "--context-parallel: expected no --shard"),
        (["--context-parallel", "2", "--backward-chunk", "4"], 2, "expected no --backward-chunk"),
        (
            ["--context-parallel", "2", "--accumulate", "1", "--batch-size", "1"],
            4,
            "at least one sequence of a step for each of 2 groups of 2 processes, got 1",
        ),
        (["--context-parallel", "0"], 1, "--context-parallel: expected 1 or more, got 0"),
    ],
    ids=["divisor", "alone", "tokens", "shard", "chunk", "rows", "zero"],
)
def test_what_is_refused(
    more: list[str], size: int, message: str, config: TrainConfig, parent: Parent, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = parent.start("train", *config.data, *flags(config), *more, "--out", str(run), size=size)
    codes = ranks.wait()  # 1 of a process that only sees the first one end
    assert codes[0] == 2, ranks.said()
    assert 0 not in codes
    assert message in ranks.said()
    assert "Traceback" not in "".join(ranks.said(rank) for rank in range(size))
    assert not run.exists()


def test_a_model_whose_state_grows(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    """It is refused by name, with the list of those that can."""
    given = config.replace(model="llama", d_state=None, d_model=None, n_layers=None)
    more = ["--context-parallel", "2", "--out", str(tmp_path / "run")]
    ranks = parent.start("train", *config.data, *flags(given), *more)
    assert ranks.wait()[0] == 2
    assert "that of Llama grows with every token" in ranks.said()
    assert ", ".join(constant()) in ranks.said()
    assert not (tmp_path / "run").exists()


def test_bert(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    text = flags(config.replace(model="bert", tokenizer="bpe", d_state=None, d_model=None, n_layers=None))
    more = ["--context-parallel", "2", "--out", str(tmp_path / "run")]
    ranks = parent.start("train", *config.data, *text, *more, size=1)
    assert ranks.wait() == [2]
    assert "--context-parallel: " in ranks.said()
