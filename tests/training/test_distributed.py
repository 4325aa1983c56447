"""Several processes train the model of one, whatever happens to them: DDP and FSDP2 over gloo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longscan.errors import LongscanError
from longscan.training.config import TrainConfig
from longscan.training.launch import command, launch
from longscan.training.train import train
from processes import Parent, until_step
from replica_gradients import MODELS_AND_SETTINGS
from tiny_runs import assert_close, assert_same, flags, metrics, slowly

AGAIN = "torchrun --standalone --nproc-per-node 2 -m longscan train --resume"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parent]:
    parent = Parent(tmp_path_factory.mktemp("processes"))
    yield parent
    parent.close()


@pytest.fixture
def start(config: TrainConfig) -> list[str]:
    """The command that starts the run `whole`."""
    return ["train", *config.data, *flags(config)]


def test_fifty_steps(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    """Two processes do the two passes of one, and add up their gradients in its order: not a bit differs."""
    config = config.replace(steps=50, save_every=25, eval_every=20, sample_every=0)
    train(config, tmp_path / "one", figures=False)
    start = ["train", *config.data, *flags(config)]
    for name, more in (("ddp", []), ("fsdp", ["--shard"]), ("context", ["--context-parallel", "2"])):
        said = parent.run(*start, "--out", str(tmp_path / name), *more).said()
        assert "processes  2, each with " in said
        assert said.count("trained 50 steps") == 1
    assert metrics(tmp_path / "ddp") == metrics(tmp_path / "one")
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("ddp", "one"))
    assert one.read_bytes() == other.read_bytes()
    for name in ("fsdp", "context"):
        assert_close(tmp_path / name, tmp_path / "one")


def test_the_gradients_of_every_model(parent: Parent) -> None:
    """Also of blocks that share weights, and of experts that only one process uses."""
    ranks = parent.start(
        "--version", first=dict.fromkeys(range(2), "import replica_gradients as r; r.compare()")
    )
    assert ranks.wait() == [0, 0], ranks.said()
    assert ranks.said().count(" agrees\n") == len(MODELS_AND_SETTINGS)


def test_sequences_in_chunks(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    """Their gradients do not come through DDP, and are added up all the same."""
    config = config.replace(backward_chunk=7, save_every=4)
    train(config, tmp_path / "one", figures=False)
    said = parent.run("train", *config.data, *flags(config), "--out", str(tmp_path / "two")).said()
    assert "in chunks of 7" in said
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


def test_three_processes(start: list[str], whole: Path, parent: Parent, tmp_path: Path) -> None:
    """They take 1, 1 and 2 of the 4 sequences of a step, the last in one pass where one process takes two."""
    for name, more in (("ddp", []), ("fsdp", ["--shard"])):
        parent.run(*start, "--out", str(tmp_path / name), *more, size=3)
        assert_close(tmp_path / name, whole)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_any_number_of_processes_resumes(
    sharded: bool, start: list[str], whole: Path, parent: Parent, tmp_path: Path
) -> None:
    """A signal to one process stops all after the same step, with one checkpoint."""
    run, more = tmp_path / "run", ["--shard"] if sharded else []
    ranks = parent.start(*start, "--out", str(run), *more, first={0: slowly(5)})
    until_step(run, 4)
    ranks.kill(1, signal.SIGTERM)
    assert ranks.wait() == [143, 143]
    step = metrics(run)[-1]["step"]
    assert step in (4, 5)
    assert f"stopped after step {step}; continue with: {AGAIN} {run}" in ranks.said()
    assert not ranks.said(1)
    for size, flag in ((1, []), (2, []), (4, ["--no-shard" if sharded else "--shard"])):
        copy = tmp_path / str(size)
        shutil.copytree(run, copy)
        said = parent.run("train", "--resume", str(copy), *flag, size=size).said()
        assert f"resumed    after step {step}" in said
        assert_close(copy, whole)
    if sharded:  # the same bits as without an interruption
        parent.run(*start, "--out", str(tmp_path / "whole"), *more)
        whole = tmp_path / "whole"
    assert_same(tmp_path / "2", whole)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_during_a_step(
    rank: int, sharded: bool, start: list[str], whole: Path, parent: Parent, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["--shard"] if sharded else []
    ranks = parent.start(*start, "--out", str(run), *more, first={0: slowly(5)})
    until_step(run, 4)
    ranks.kill(rank, signal.SIGKILL)
    codes = ranks.wait()
    assert (codes[rank], codes[1 - rank]) == (-9, 1)
    said = ranks.said(1 - rank)
    assert "another of the 2 processes ended, or its connection broke" in said
    assert "Traceback" not in said
    assert rank == 0 or f"The last intact checkpoint is {run}/checkpoints/step-00000" in said
    parent.run("train", "--resume", str(run), *more)
    (assert_close if sharded else assert_same)(run, whole)


@pytest.mark.parametrize("moment", [60, 90])
def test_kill_9_during_a_save(
    moment: int, start: list[str], whole: Path, parent: Parent, tmp_path: Path
) -> None:
    """Of the first process, when it opens, renames or removes a file of the run."""
    run = tmp_path / "run"
    watch = f"""
import os, signal, sys
moments = []
def watch(event, arguments, events=("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")):
    if event in events and {str(run)!r} in str(arguments[0]):
        moments.append(event)
        if len(moments) == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""
    ranks = parent.start(*start, "--out", str(run), first={0: watch})
    assert ranks.wait() == [-9, 1]
    parent.run("train", "--resume", str(run))
    assert_same(run, whole)


def test_a_validation_before_the_first_step(
    start: list[str], whole: Path, parent: Parent, tmp_path: Path
) -> None:
    """A run that was killed before it begins with it; tensors made for inference can't be trained."""
    run = tmp_path / "run"
    parent.run(*start, "--shard", "--out", str(run))
    shutil.rmtree(run / "checkpoints/step-000008")
    step = next(i for i, each in enumerate(metrics(run)) if each["step"] == 6 and "valid_loss" in each)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:step]))
    parent.run("train", "--resume", str(run))
    assert_close(run, whole)


def test_a_process_that_hangs(start: list[str], whole: Path, parent: Parent, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = parent.start(*start, "--out", str(run), "--timeout", "3", first={0: slowly(5)})
    until_step(run, 4)
    ranks.kill(1, signal.SIGSTOP)
    first = parent.ask({"wait": ranks.pids.pop(0)})
    assert first == 1
    assert "another of the 2 processes did not answer within 3 s (--timeout)" in ranks.said()
    assert f"Fix that and resume with: {AGAIN} {run}" in ranks.said()
    ranks.kill(0, signal.SIGKILL)  # the other, now that the first is out of the list
    ranks.wait()
    parent.run("train", "--resume", str(run))
    assert_same(run, whole)


def test_a_full_disk(start: list[str], whole: Path, parent: Parent, tmp_path: Path) -> None:
    """Of the first process, the only one that writes; nothing that was saved before is lost."""
    run = tmp_path / "run"
    parent.run(*start, "--out", str(run))
    shutil.rmtree(run / "checkpoints/step-000008")
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""
    ranks = parent.start("train", "--resume", str(run), first={0: limit})
    assert ranks.wait() == [1, 1]
    assert "File too large" in ranks.said()
    assert f"The last intact checkpoint is {run}/checkpoints/step-000006" in ranks.said()
    assert "process 1 of 2: another of the 2 processes ended" in ranks.said(1)
    parent.run("train", "--resume", str(run))
    assert_same(run, whole)


def test_a_damaged_checkpoint(start: list[str], whole: Path, parent: Parent, tmp_path: Path) -> None:
    """The one before is resumed from, in all processes."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints/step-000008/optimizer.safetensors").unlink()
    said = parent.run("train", "--resume", str(run)).said()
    assert "skipping checkpoint" in said
    assert "resumed    after step 6" in said
    assert_same(run, whole)


@pytest.mark.parametrize(
    ("more", "other", "size", "message"),
    [
        ([], ["--lr", "0.02"], 2, "settings: process 1 has lr = 0.02, process 0 0.01"),
        ([], ["--save-every", "3"], 2, "settings: process 1 has save_every = 3, process 0 2"),
        (
            ["--accumulate", "1"],
            [],
            3,
            "expected at least one sequence of a step for each of 3 processes, got 2",
        ),
        (["--batch-size", "1", "--accumulate", "5"], [], 2, "5 passes of one sequence do not divide among 2"),
        (["--shard", "--backward-chunk", "7"], [], 2, "--shard: expected sequences of one pass"),
        (["--carry-state"], [], 2, "--carry-state: expected one process"),
        (["--model", "bert", "--tokenizer", "bpe"], [], 2, "train: expected one process, got 2"),
        (["--device", "cuda:0"], [], 2, "--device: expected cuda, as each process takes a device of its own"),
    ],
    ids=["settings", "harmless", "rows", "passes", "chunks", "state", "bert", "device"],
)
def test_what_is_refused(
    more: list[str],
    other: list[str],
    size: int,
    message: str,
    start: list[str],
    parent: Parent,
    tmp_path: Path,
) -> None:
    ranks = parent.start(
        *start, *more, "--out", str(tmp_path / "run"), size=size, of={1: other} if other else {}
    )
    codes = ranks.wait()
    assert codes[0] == 2, ranks.said()
    assert 0 not in codes
    assert message in ranks.said()
    assert "Traceback" not in "".join(ranks.said(rank) for rank in range(size))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide(config: TrainConfig, parent: Parent, tmp_path: Path) -> None:
    """Two processes take 2 and 3 of 5 sequences; each counts as much as in one process."""
    config = config.replace(batch_size=5, accumulate=1)
    train(config, tmp_path / "one", figures=False)
    for name, more in (("ddp", []), ("fsdp", ["--shard"])):
        parent.run("train", *config.data, *flags(config), "--out", str(tmp_path / name), *more)
        assert_close(tmp_path / name, tmp_path / "one")


@pytest.mark.parametrize(
    "more",
    [{"RANK": "2", "MASTER_PORT": "29555"}, {"RANK": "1"}, {"WORLD_SIZE": "0", "MASTER_PORT": "29555"}],
    ids=["rank", "port", "size"],
)
def test_an_environment_that_is_none_of_torchruns(
    more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    monkeypatch.delenv("MASTER_PORT", raising=False)
    for name, value in (usual | more).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongscanError, match="RANK and MASTER_PORT: expected a rank below WORLD_SIZE"):
        launch()


def test_how_to_resume_on_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {"MASTER_ADDR": "node0", "MASTER_PORT": "29555", **place}.items():
        monkeypatch.setenv(name, value)
    assert command("train --resume run") == (
        "torchrun --nnodes 3 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 2 "
        "-m longscan train --resume run"
    )


def test_other_verbs(parent: Parent) -> None:
    """They would do the same in each process."""
    ranks = parent.start("generate", "Call me", "--max-new-tokens", "1")
    assert ranks.wait() == [2, 2]
    assert "generate: expected one process, got 2: only longscan train works in several" in ranks.said()
    assert not ranks.said(1)


def test_torchrun_restarts(config: TrainConfig, tmp_path: Path) -> None:
    """After kill -9 of a worker the same command goes on, though its --out now holds a run: its own."""
    config = config.replace(steps=24, save_every=4, eval_every=0, sample_every=0)
    train(config, tmp_path / "one", figures=False)
    run = tmp_path / "run"
    agent_command = [*"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()]
    agent_command += [*"-m longscan train".split(), *config.data, *flags(config), "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *agent_command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as agent:
        try:
            until_step(run, 5)
            victim = next(pid for pid in children(agent.pid) if environment_of(pid).get("RANK") == "1")
            os.kill(victim, signal.SIGKILL)
            said, _ = agent.communicate(timeout=120)
        finally:
            agent.terminate()  # also its workers; if it has ended, nothing
    assert agent.returncode == 0, said
    assert "resumed    after step" in said
    assert metrics(run) == metrics(tmp_path / "one")


def test_a_run_of_another_command(whole: Path, start: list[str], parent: Parent) -> None:
    ranks = parent.start(*start, "--out", str(whole))
    assert ranks.wait() == [1, 1]
    assert "already holds a run. Resume it with: longscan train --resume" in ranks.said()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
