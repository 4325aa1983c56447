"""Whatever happens to a run, it ends as if nothing had: kill -9, signals, a closed terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from longscan.checkpoints.load import load
from longscan.core.progress import Terminal
from longscan.errors import LongscanError
from longscan.training.config import TrainConfig
from longscan.training.language_model import LanguageRun
from longscan.training.translation import TranslateConfig, TranslateRun
from tiny_runs import Recorder, assert_same, interrupt, metrics, resume, train

# Whatever happens

KILLER = """
import os, signal, sys
from pathlib import Path
import torch._dynamo  # what the first optimizer imports: once here instead of in every child
from longscan.core.files import read_json
from longscan.training.config import TrainConfig
from longscan.training.train import resume, train

config, root = TrainConfig.from_dict(read_json(sys.argv[1])), sys.argv[2]
moments = 0

def watch(event, arguments):
    # every opening, renaming and removing of a file in the run's directory is a moment to die at
    global moments
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and root in str(arguments[0]):
        moments += 1
        if moments == deadline:
            os.kill(os.getpid(), signal.SIGKILL)

def child(work):
    if (pid := os.fork()) == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def victim():
    sys.addaudithook(watch)
    train(config, run, figures=False)

deadline = int(sys.argv[3])
while True:
    run = f"{root}/{deadline}"
    status = child(victim)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    if Path(run, "train.json").exists():
        assert child(lambda: resume(run, figures=False)) == 0
    else:
        assert child(lambda: train(config, run, figures=False)) == 0
    deadline += int(sys.argv[4])
print(deadline)
"""


def test_kill_9_at_any_moment(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.to_dict()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    (tmp_path / "runs").mkdir()
    arguments = [str(settings), str(tmp_path / "runs"), "1", "19"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) > 5
    for run in runs:
        assert_same(run, whole)


@pytest.mark.parametrize("model", ["transformer", "linear_attention"])
def test_a_run_killed_before_its_first_checkpoint(model: str, config: TrainConfig, tmp_path: Path) -> None:
    """Dropout draws the same, whatever torch's random state was before."""
    kind = "translation" if model == "transformer" else "language"
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"a {n}\tb {n}\n" for n in range(60)))
    if kind == "translation":
        fields = {"source": str(pairs), "preset": "tiny", "dropout": 0.2, "vocab_size": 270, "threads": 1}
        run: Any = TranslateRun
        settings: Any = TranslateConfig.from_dict({**fields, "steps": 5, "bleu_sentences": 0})
    else:
        run, settings = LanguageRun, config.replace(model=model, d_state=None, save_every=100)
    for name, seed in (("whole", 1), ("run", 2)):
        torch.manual_seed(seed)
        display = Recorder(3, interrupt(signal.SIGINT) if name == "run" else lambda: None)
        run.begin(settings, tmp_path / name, display, figures=False)
    shutil.rmtree(tmp_path / "run/checkpoints")  # as if it had been killed
    torch.manual_seed(3)
    run.resume(tmp_path / "run", figures=False)
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_signals_wait_for_the_step(
    config: TrainConfig, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    random_state = torch.get_rng_state()
    stopped = train(config, run, Recorder(3, interrupt(number)))
    assert (stopped.step, stopped.stopped_by) == (3, number)
    assert load(run / "model")[0].config.d_model == 16
    assert metrics(run) == [record for record in metrics(whole) if record["step"] <= 3 and "loss" in record]
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert resume(run, {"log_every": 1}).stopped_by is None
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's
    assert_same(run, whole)


def test_what_is_ignored_goes_on_being_ignored(config: TrainConfig, tmp_path: Path) -> None:
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(config, tmp_path / "run", Recorder(3, interrupt(signal.SIGHUP)))
        assert (result.step, result.stopped_by) == (8, None)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_says_what_is_there_and_how_to_go_on(
    config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    def twice() -> None:
        interrupt(signal.SIGINT)()
        interrupt(signal.SIGINT)()

    run = tmp_path / "run"
    display = Recorder(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, run, display)
    assert display.lines[-1] == (
        f"step 3: stopped immediately. The last intact checkpoint is {run}/checkpoints/step-000002. "
        f"Resume with: longscan train --resume {run}"
    )
    resume(run)
    assert_same(run, whole)


def test_a_terminal_that_is_closed_does_not_end_a_run(config: TrainConfig, tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    for terminal in (False, True):
        display = Terminal(1, Console(file=Gone(), force_terminal=terminal))
        assert train(config, tmp_path / str(terminal), display).step == 8


def test_memory_runs_out(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    """The error says so, and how to go on."""
    run = tmp_path / "run"
    greedy = Recorder(after=5, action=lambda: torch.empty(10**15))
    with pytest.raises(LongscanError) as caught:
        train(config, run, greedy)
    what, remedy = str(caught.value).splitlines()
    assert what.startswith("memory ran out: 4,000,000.0 GB more could not be allocated")
    assert remedy == (
        f"The last intact checkpoint is {run}/checkpoints/step-000004. "
        f"Then resume with: longscan train --resume {run}"
    )
    resume(run)
    assert_same(run, whole)
