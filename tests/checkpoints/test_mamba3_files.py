"""The official layout of Mamba-3: every option both ways, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.core.files import read_json, write_json
from longscan.errors import LongscanError
from longscan.models import Mamba3, Mamba3Config

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False, "vocab_size": 301, "pad_vocab_size_multiple": 16},
    "groups": {"n_groups": 2, "expand": 3, "residual_in_fp32": False},
    "mlp": {"d_intermediate": 130, "A_floor": 0.01, "dt_min": 0.01},
    "mimo": {"mimo_rank": 3, "rope_fraction": 1.0},
    "mimo-of-one": {"mimo_rank": 1, "outproj_norm": True},
}


def make(**fields: Any) -> Mamba3:
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 259, "d_state": 12, "d_head": 16}
    return Mamba3(Mamba3Config.from_dict({**sizes, **fields}), torch.Generator().manual_seed(0)).eval()


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


def publish(model: Mamba3, directory: Path) -> Path:
    """Save a model in the official layout."""
    save(model, directory / "own")
    convert(directory / "own", directory / "official", layout="official")
    return directory / "official"


def change(path: Path, changes: dict[str, Any], ssm_cfg: dict[str, Any]) -> None:
    fields = {**read_json(path), **changes}
    write_json(path, {**fields, "ssm_cfg": {**fields["ssm_cfg"], **ssm_cfg}})


def test_the_activation_of_a_is_stated(tmp_path: Path) -> None:
    """It is read where ssm_cfg has it, and not written: the official code knows one only."""
    path = publish(make(), tmp_path)
    assert load(path)[0].config.A_activation == "heavy-tail"
    change(path / "config.json", {}, {"A_activation": "softplus"})
    model, _ = load(path)
    assert model.config.A_activation == "softplus"
    save(model, tmp_path / "b")
    assert load(tmp_path / "b")[0].config == model.config
    with pytest.raises(LongscanError, match="no field for A_activation = 'softplus'"):
        convert(tmp_path / "b", tmp_path / "c", layout="official")


def test_idle_fields_are_read(tmp_path: Path) -> None:
    path = publish(make(), tmp_path)
    idle = {"chunk_size": 16, "fuse_pregate_headwise_norm": False, "is_mimo": False, "mimo_rank": 2}
    change(path / "config.json", {}, idle)
    assert load(path)[0].config == make().config


@pytest.mark.parametrize(
    ("changes", "ssm_cfg", "expected"),
    {
        "rank": ({}, {"is_mimo": True, "mimo_rank": 0}, "mimo_rank: expected 1 or more, got 0"),
        "idle-rank": ({}, {"mimo_rank": 0}, "mimo_rank: expected 1 or more, got 0"),
        "other-rank": ({}, {"is_mimo": True, "mimo_rank": 2}, r"instead of \("),
        "truth": ({}, {"is_mimo": 1}, "is_mimo: expected true or false, got 1"),
        "groups": ({}, {"ngroups": 3}, "ngroups: expected a divisor of 4 heads, got 3"),
        "heads": ({}, {"headdim": 24}, "headdim: expected a divisor of expand d_model = 64, got 24"),
        "rotation": ({}, {"rope_fraction": 0.25}, "rope_fraction: expected 0.5 or 1.0, got 0.25"),
        "activation": (
            {},
            {"A_activation": "relu"},
            "A_activation: expected one of 'heavy-tail', 'softplus'",
        ),
        "unknown": ({}, {"d_conv": 4}, "unknown field 'd_conv'"),
        "attention": ({"attn_layer_idx": [1]}, {}, r"attn_layer_idx: expected \[\], got attention"),
        "mlp": ({"d_intermediate": 64}, {}, "mlp"),
        "negative": ({"d_intermediate": -1}, {}, "d_intermediate: expected 0 or more, got -1"),
    }.values(),
    ids=lambda value: None,
)
def test_impossible_configs(
    tmp_path: Path, changes: dict[str, Any], ssm_cfg: dict[str, Any], expected: str
) -> None:
    path = publish(make(), tmp_path)
    change(path / "config.json", changes, ssm_cfg)
    with pytest.raises(LongscanError, match=expected):
        load(path)
