"""A run that tests of training compare theirs with."""

from __future__ import annotations

from pathlib import Path

import pytest

from longscan.training.config import TrainConfig
from longscan.training.train import train as train_with_figures
from tiny_runs import TEXT, TINY


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sums.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def config(text: Path) -> TrainConfig:
    return TrainConfig.from_dict({**TINY, "data": [str(text)]})


@pytest.fixture(scope="session")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole")
    result = train_with_figures(config, directory)
    assert (result.step, result.total, result.stopped_by) == (8, 8, None)
    return directory
