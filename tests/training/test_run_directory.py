"""The directory of a run: links in it, its lock and its metrics."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from longscan.errors import LongscanError
from longscan.training.config import TrainConfig
from longscan.training.metrics import Metrics
from longscan.training.run_directory import empty, lock
from tiny_runs import resume, train

# A run that came from elsewhere


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "loss.png", "model", "checkpoints", "data"])
def test_links_in_a_run_are_refused(name: str, whole: Path, tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(whole, run)
    if (run / name).is_dir():
        (run / name).rename(precious)
    else:
        (run / name).unlink(missing_ok=True)
        precious.write_text("x")
    (run / name).symlink_to(precious)
    before = {path: path.read_bytes() for path in (precious, *precious.rglob("*")) if path.is_file()}
    with pytest.raises(
        LongscanError, match=rf"run/{name} is a link to .*precious: a run writes nothing outside"
    ):
        resume(run, {"steps": 9})
    assert before == {path: path.read_bytes() for path in (precious, *precious.rglob("*")) if path.is_file()}


def test_links_left_by_a_stranger_are_refused_in_a_new_run(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(LongscanError, match="is a link"):
        train(config, tmp_path / "run")
    (tmp_path / "run/.lock").unlink()
    os.link(tmp_path / "precious", tmp_path / "run/.lock")
    with pytest.raises(LongscanError, match="is not a regular file, or has several names"):
        train(config, tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "x"


def test_a_link_to_a_run_is_the_run(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    assert resume(tmp_path / "latest").step == 8


def test_a_failed_start_does_not_take_the_lock_of_the_next(tmp_path: Path) -> None:
    """Who waited with the old file open locks a file that nobody else sees."""
    with lock(tmp_path):
        empty(tmp_path, remove=False)
        with lock(tmp_path), pytest.raises(LongscanError, match="in use"), lock(tmp_path):
            pass


def test_metrics_lose_only_what_comes_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "valid": 1}\n{"step": 3, "lo'
    )
    log = Metrics(file)
    log.rewind(2)
    assert log.has(2, "valid")
    assert not log.has(1, "valid")
    assert not log.has(3, "loss")
    log.write({"step": 3, "loss": 1.0})
    assert log.last("loss") == 1.0
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 2, 3]
