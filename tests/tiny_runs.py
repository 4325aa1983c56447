"""Training runs of a few steps: their settings, and what is compared of them."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_tensors

from longscan.core.progress import Display, Snapshot
from longscan.training.config import TrainConfig
from longscan.training.train import resume as resume_with_figures
from longscan.training.train import train as train_with_figures

# of losses and weights, after steps whose sums were added in another order
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}

TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "preset": "tiny",
    "d_model": 16,
    "n_layers": 1,
    "d_state": 4,
    "seq_len": 16,
    "batch_size": 2,
    "accumulate": 2,
    "steps": 8,
    "lr": 1e-2,
    "save_every": 2,
    "eval_every": 3,
    "eval_windows": 2,
    "sample_every": 4,
    "sample_tokens": 4,
    "threads": 1,
}


# drawing takes longer than these runs
train, resume = (partial(call, figures=False) for call in (train_with_figures, resume_with_figures))
TEXT = "".join(f"{n} and {n} are {2 * n}.\n" for n in range(60))


class Recorder(Display):
    """Keeps what a run says, and does something after a given step."""

    def __init__(self, after: int = 0, action: Callable[[], object] = lambda: None) -> None:
        self.lines: list[str] = []
        self.after, self.action = after, action

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.step == self.after:
            self.action()


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Everything that was recorded but the time it took."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same(directory: Path, whole: Path) -> None:
    """The two runs ended with the same bits and recorded the same."""
    weights = "model/model.safetensors"
    assert (directory / weights).read_bytes() == (whole / weights).read_bytes()
    one, other = (
        load_tensors(run / "checkpoints/step-000008/optimizer.safetensors") for run in (directory, whole)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(directory) == metrics(whole)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
    ]


def interrupt(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def flags(config: TrainConfig) -> list[str]:
    usual, given = TrainConfig().to_dict(), config.to_dict()
    names = [name for name in given if given[name] != usual[name] and name != "data"]
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(given[name]))]


def assert_close(directory: Path, whole: Path) -> None:
    """The two runs recorded the same numbers and ended with the same weights, up to rounding."""
    one, other = metrics(directory), metrics(whole)
    assert [record.keys() for record in one] == [record.keys() for record in other]
    for mine, theirs in zip(one, other, strict=True):
        for key, value in theirs.items():
            if key != "sample":
                assert math.isclose(mine[key], value, rel_tol=ROUNDING["rtol"]), (key, mine, theirs)
    weights, others = (load_tensors(run / "model/model.safetensors") for run in (directory, whole))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, **ROUNDING)


def slowly(step: int) -> str:
    """Let the first process wait before it writes down a step, so that a test can act before it."""
    return f"""
import time
from longscan.training.metrics import Metrics
write = Metrics.write
def slow(self, record):
    if record["step"] == {step}:
        time.sleep(1)
    write(self, record)
Metrics.write = slow
"""
