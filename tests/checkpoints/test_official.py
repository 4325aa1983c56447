"""Checkpoints of the official code, with the logits, loss and gradients it computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.core.files import read_json, write_json
from longscan.errors import LongscanError
from longscan.models import Mamba2, Mamba2Config

GOLDEN = Path(__file__).parent / "golden"
OF_THE_LARGEST = 1e-5  # of float32 sums in another order


def official_directory(values: Any, directory: Path) -> Path:
    """The model directory that these weights were published as."""
    directory.mkdir()
    weights = {name[2:]: torch.from_numpy(values[name]) for name in values.files if name.startswith("w:")}
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "config.json").write_text(str(values["config"]))
    return directory


def assert_close(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    difference = (got - expected).abs().max()
    assert difference <= OF_THE_LARGEST * expected.abs().max(), f"{name}: {difference}"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_logits_loss_and_gradients(path: Path, tmp_path: Path) -> None:
    values = np.load(path)
    model, _ = load(official_directory(values, tmp_path / "model"))
    ids = torch.from_numpy(values["ids"])
    # the loss counts ids of the padded vocabulary too
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert_close(logits.detach(), torch.from_numpy(values["logits"]), "logits")
    assert abs(loss.item() - values["loss"].item()) < 1e-5
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients.items():
        assert_close(gradient, torch.from_numpy(values[f"g:{name}"]), name)
    assert len(gradients) == len([name for name in values.files if name.startswith("g:")])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_there_and_back(path: Path, tmp_path: Path) -> None:
    """What we write in either layout is the model that we read, field by field."""
    source = official_directory(np.load(path), tmp_path / "model")
    convert(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "official", layout="official")
    model, _ = load(source)
    for name in ("hf", "official"):
        again, _ = load(tmp_path / name)
        assert again.config == model.config
        assert all(map(torch.equal, again.parameters(), model.parameters()))
    stated = json.loads(str(np.load(path)["config"]))
    written = read_json(tmp_path / "official" / "config.json")
    assert written["ssm_cfg"].items() <= stated["ssm_cfg"].items() | {("layer", "Mamba1")}


# ---- Mamba-2

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False, "vocab_size": 301, "pad_vocab_size_multiple": 16},
    "groups": {"n_groups": 2, "bias": True, "conv_bias": False, "residual_in_fp32": False},
    "limits": {"dt_limit": (0.01, 0.2), "A_init_range": (2.0, 3.0), "dt_min": 0.01},
    "least": {"dt_limit": (0.01, None)},
    "part": {"d_ssm": 32, "gated_norm": "none"},
    "norm-first": {"gated_norm": "norm-first", "D_per_channel": True, "d_conv": 3, "expand": 3},
}


def make(**fields: Any) -> Mamba2:
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 259, "d_state": 12, "d_head": 16}
    return Mamba2(Mamba2Config.from_dict({**sizes, **fields}), torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_option_survives_every_layout(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(**fields)
    save(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", layout="official")
    convert(tmp_path / "b", tmp_path / "c")
    for name in "abc":
        again, _ = load(tmp_path / name)
        assert again.config == model.config
        assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    {
        "missing": ({"n_groups": ...}, "needs n_groups"),
        "heads": ({"num_heads": 3}, "num_heads: expected 4"),
        "groups": ({"n_groups": 3}, "n_groups: expected a divisor of 4"),
        "unknown": ({"norm_before_gate": True}, "unknown field 'norm_before_gate'"),
        "limit": ({"time_step_limit": [0.2, 0.1]}, "time_step_limit: expected 0 <= least < largest"),
    }.values(),
    ids=lambda value: None,
)
def test_impossible_configs(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    save(make(), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    fields = {**read_json(path), **changes}
    write_json(path, {name: value for name, value in fields.items() if value is not ...})
    with pytest.raises(LongscanError, match=expected):
        load(tmp_path / "a")
