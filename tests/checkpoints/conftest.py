"""A small Mamba, and the directory it is saved in."""

from __future__ import annotations

from pathlib import Path

import pytest

from longscan.checkpoints.save import save
from longscan.models import Mamba
from longscan.tokenizers.base import ByteTokenizer
from model_directories import make


@pytest.fixture
def model() -> Mamba:
    return make()


@pytest.fixture
def saved(model: Mamba, tmp_path: Path) -> Path:
    save(model, tmp_path / "saved", ByteTokenizer())
    return tmp_path / "saved"
