"""Hybrids of published families: the numbers of transformers, and files that round-trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_families import FAMILIES, build, draw_ids, saved
from longscan import load, save
from longscan.errors import LongscanError

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest logit

every = pytest.mark.parametrize("variant", FAMILIES)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def load_peer(directory: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    return model.eval()


@every
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_logits_are_those_of_transformers(variant: str, seed: int, tmp_path: Path) -> None:
    peer = saved(variant, tmp_path, seed)
    model, ids = load(tmp_path)[0], draw_ids(seed)
    expected = peer(ids).logits
    assert_close(model(ids).logits, expected)
    state = model.init_state(len(ids))
    assert_close(torch.stack([model.step(column, state)[0].clone() for column in ids.T], 1), expected)


@every
@torch.no_grad()
def test_a_saved_model_is_the_file_it_was_loaded_from(variant: str, tmp_path: Path) -> None:
    peer = saved(variant, tmp_path / "theirs")
    model = load(tmp_path / "theirs")[0]
    save(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    again = load(tmp_path / "ours")[0]
    assert again.config == model.config
    ids = draw_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert_close(load_peer(tmp_path / "ours")(ids).logits, peer(ids).logits)


MULTIPLIERS = {
    "falcon_h1": [
        *("embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier"),
        *("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
        *("ssm_multipliers", "mlp_multipliers"),
    ],
    "granite": [
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ],
}


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant, names in MULTIPLIERS.items() for name in names]
)
@torch.no_grad()
def test_each_multiplier_acts_alone(variant: str, name: str, tmp_path: Path) -> None:
    fields, ids = FAMILIES[variant][1], draw_ids()
    ones = {
        each: [1.0] * len(fields[each]) if isinstance(fields[each], list) else 1.0
        for each in MULTIPLIERS[variant]
    }
    plain = saved(variant, tmp_path / "ones", **ones)(ids).logits
    size = len(fields[name]) if isinstance(fields[name], list) else 0
    for number in range(max(size, 1)):  # each of several alone
        value = [1.0] * number + [1.9] + [1.0] * (size - number - 1) if size else 1.9
        directory = tmp_path / str(number)
        expected = saved(variant, directory, **{**ones, name: value})(ids).logits
        assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
        assert_close(load(directory)[0](ids).logits, expected)


def change(directory: Path, without: str | None = None, **fields: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw.update(fields)
    raw.pop(without, None)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("variant", "name"), [(variant, name) for variant, names in MULTIPLIERS.items() for name in names]
)
def test_a_missing_multiplier_is_refused(variant: str, name: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    change(tmp_path, without=name)
    with pytest.raises(LongscanError, match=rf"needs '{name}'"):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["falcon_h1", "granite"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma_multiplier": 2.0}, "unknown field 'gamma_multiplier'"),
        ({"mamba_n_heads": 7}, "mamba_n_heads"),
        ({"mamba_n_groups": 4}, "n_groups: expected a divisor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"time_step_limit": [1.0]}, "time_step_limit: expected two numbers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "factor|rope_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_another_model_is_refused(
    variant: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(variant, tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(LongscanError, match=message):
        load(tmp_path)


def test_a_layout_without_a_field_is_refused(tmp_path: Path) -> None:
    saved("granite", tmp_path / "theirs")
    model = load(tmp_path / "theirs")[0]
    model.config = model.config.replace(key_multiplier=0.5)
    with pytest.raises(LongscanError, match=r"no field for key_multiplier = 0\.5"):
        save(model, tmp_path / "ours")
    model.config = model.config.replace(family="own")
    save(model, tmp_path / "ours")
    assert load(tmp_path / "ours")[0].config == model.config


@pytest.mark.parametrize("variant", ["falcon_h1 gate first", "granite", "bamba"])
@torch.no_grad()
def test_steps_are_clamped_as_a_pass_is(variant: str, tmp_path: Path) -> None:
    """time_step_limit: transformers applies it in a pass only, so its own steps are another model."""
    peer, ids = saved(variant, tmp_path, time_step_limit=(0.5, 0.6)), draw_ids()
    model, expected = load(tmp_path)[0], peer(ids).logits
    assert_close(model(ids).logits, expected)
    state = model.init_state(len(ids))
    assert_close(torch.stack([model.step(column, state)[0].clone() for column in ids.T], 1), expected)
    unlimited = saved(variant, tmp_path / "unlimited")(ids).logits
    assert (unlimited - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("variant", ["nemotron_h", "zamba2"])
@torch.no_grad()
def test_time_steps_have_no_floor(variant: str, tmp_path: Path) -> None:
    """time_step_min: transformers clamps with it in a pass, not in steps; Nemotron was not so trained."""
    peer, ids = build(variant), draw_ids()
    for name, parameter in peer.named_parameters():
        if name.endswith("dt_bias"):
            parameter -= 12
    expected = peer(ids).logits  # its time_step_min is 1e-9
    peer.config.time_step_min = 0.05
    peer.save_pretrained(tmp_path)
    assert_close(load(tmp_path)[0](ids).logits, expected)
    floored = load_peer(tmp_path)(ids).logits
    assert (floored - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_older_fields_of_nemotron(tmp_path: Path) -> None:
    saved("nemotron_h", tmp_path)
    config = load(tmp_path)[0].config
    raw = json.loads((tmp_path / "config.json").read_text())
    pattern = {"layers_block_type": None, "hybrid_override_pattern": "M-*M", "num_hidden_layers": 99}
    older = {"mamba_n_groups": raw.pop("n_groups"), "mamba_d_conv": raw.pop("conv_kernel")}
    limit = {"mamba_dt_limit": raw.pop("time_step_limit"), "rope_theta": 10000, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **pattern, **older, **limit}))
    assert load(tmp_path)[0].config == config
    change(tmp_path, hybrid_override_pattern="M?*M")
    with pytest.raises(LongscanError, match="hybrid_override_pattern: expected letters"):
        load(tmp_path)


@torch.no_grad()
def test_the_only_expert_of_an_old_jamba_is_its_feed_forward_layer(tmp_path: Path) -> None:
    peer = saved("jamba dense", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("feed_forward.", "feed_forward.experts.0."): t for name, t in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    ids = draw_ids()
    assert_close(load(tmp_path)[0](ids).logits, peer(ids).logits)
