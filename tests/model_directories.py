"""A small Mamba in a directory: made, changed, compared, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.checkpoints.load import load
from longscan.core.files import read_json, write_json
from longscan.errors import LongscanError
from longscan.models import LanguageModel, Mamba, MambaConfig

EMBEDDING = "backbone.embeddings.weight"
IDS = torch.tensor([[72, 101, 108, 108, 111], [0, 255, 256, 1, 2]])


def make(**fields: Any) -> Mamba:
    sizes = {"d_model": 16, "n_layers": 2, "vocab_size": 257, "d_state": 4}
    return Mamba(MambaConfig.from_dict(sizes | fields), torch.Generator().manual_seed(0)).eval()


def edit(directory: Path, **changes: Any) -> None:
    """Set fields of config.json; ... removes one."""
    raw = read_json(directory / "config.json") | changes
    write_json(directory / "config.json", {name: value for name, value in raw.items() if value is not ...})


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def assert_same(a: LanguageModel, b: LanguageModel) -> None:
    assert a.config == b.config
    assert a.fingerprint() == b.fingerprint()


def refusal(directory: Path | str, **options: Any) -> str:
    with pytest.raises(LongscanError) as caught:
        load(directory, **options)
    return str(caught.value)
