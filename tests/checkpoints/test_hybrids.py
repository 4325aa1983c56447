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
from longscan import load, quantize, save
from longscan.checkpoints.formats import HYBRIDS, read_config
from longscan.errors import LongscanError
from longscan.models import HybridConfig
from longscan.models.hybrid_config import PRESETS

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


PUBLISHED: dict[str, dict[str, Any]] = {  # as in the files, but for what leaves the numbers alone
    "falcon-h1-0.5b": {
        **{"attention_bias": False, "attention_dropout": 0.0, "attention_in_multiplier": 1.0},
        **{"attention_out_multiplier": 0.9375, "attn_layer_indices": None, "head_dim": 64},
        **{"embedding_multiplier": 5.656854249492381, "hidden_act": "silu", "hidden_size": 1024},
        **{"intermediate_size": 2048, "key_multiplier": 0.39062499999999994},
        **{"lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128, "mamba_conv_bias": True},
        **{"mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_ssm": 1536, "mamba_d_state": 128},
        **{"mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_rms_norm": False},
        **{"mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_use_mlp": True},
        **{"max_position_embeddings": 16384, "mlp_bias": False, "model_type": "falcon_h1"},
        **{"mlp_multipliers": [0.8838834764831844, 0.5859375], "num_attention_heads": 8},
        **{"num_hidden_layers": 36, "num_key_value_heads": 2, "projectors_bias": False},
        **{"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 100000000000.0},
        **{"ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587},
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32784},
    },
    "nemotron-h-8b": {
        **{"attention_bias": False, "attention_head_dim": 128, "chunk_size": 256, "conv_kernel": 4},
        **{"expand": 2, "hidden_dropout": 0.0, "hidden_size": 4096, "intermediate_size": 21504},
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        **{"layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5, "mamba_head_dim": 64, "n_groups": 8},
        **{"mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_proj_bias": False},
        **{"max_position_embeddings": 8192, "mlp_bias": False, "mlp_hidden_act": "relu2"},
        **{"model_type": "nemotron_h", "num_attention_heads": 32, "num_hidden_layers": 52},
        **{"num_key_value_heads": 8, "rescale_prenorm_residual": True, "residual_in_fp32": False},
        **{"sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False},
        **{"use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072},
        "time_step_limit": [0.0, float("inf")],
    },
    "jamba-v0.1": {
        **{"attn_layer_offset": 4, "attn_layer_period": 8, "expert_layer_offset": 1},
        **{"expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096},
        **{"intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16},
        **{"mamba_dt_rank": 256, "mamba_expand": 2, "mamba_proj_bias": False, "model_type": "jamba"},
        **{"max_position_embeddings": 262144, "num_attention_heads": 32, "num_experts": 16},
        **{"num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"num_logits_to_keep": 1, "rms_norm_eps": 1e-6, "sliding_window": None},
        **{"tie_word_embeddings": False, "use_mamba_kernels": False, "vocab_size": 65536},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_the_preset(name: str) -> None:
    config = read_config(PUBLISHED[name])[1]
    expected = HybridConfig.from_dict(PRESETS[name])
    multiple = {"pad_vocab_size_multiple": config.pad_vocab_size_multiple}
    assert config == expected.replace(**multiple)


PRESETS_OF_FAMILIES = [name for name, fields in PRESETS.items() if "family" in fields]


@pytest.mark.parametrize("name", PRESETS_OF_FAMILIES)
def test_a_preset_round_trips_in_the_layout_of_its_family(name: str) -> None:
    config = HybridConfig.from_dict(PRESETS[name])
    fields = HYBRIDS[config.family].write(config)
    again = read_config(json.loads(json.dumps(fields, allow_nan=False)))
    assert again == ("hybrid", config)


@torch.no_grad()
def test_the_only_expert_of_an_old_jamba_is_its_feed_forward_layer(tmp_path: Path) -> None:
    peer = saved("jamba dense", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("feed_forward.", "feed_forward.experts.0."): t for name, t in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    ids = draw_ids()
    assert_close(load(tmp_path)[0](ids).logits, peer(ids).logits)


@every
@torch.no_grad()
def test_pieces_padding_and_packing_are_one_pass(variant: str, tmp_path: Path) -> None:
    """In float64, from an own reference: transformers corrupts states under right padding."""
    saved(variant, tmp_path)
    model, [first, second] = load(tmp_path)[0].double(), draw_ids(3)
    second = second[:13]
    expected = [model(row[None]) for row in (first, second)]
    state, pieces = None, []
    for piece in first.split([5, 1, 11, 12]):
        output = model(piece[None], state=state)
        state = output.state
        pieces.append(output.logits[0])
    assert_equal(torch.cat(pieces), expected[0].logits[0])
    for pad in ("left", "right"):
        ids, seq_idx = torch.zeros(2, 29, dtype=torch.long), torch.full((2, 29), -1)
        for number, row in enumerate((first, second)):
            where = slice(29 - len(row), 29) if pad == "left" else slice(len(row))
            ids[number, where], seq_idx[number, where] = row, 0
        output = model(ids, seq_idx=seq_idx)
        state = output.state
        for number in range(2):
            assert_equal(output.logits[number][seq_idx[number] == 0], expected[number].logits[0])
            after, _ = model.step(torch.tensor([7]), state.select([number]))
            assert_equal(after, model.step(torch.tensor([7]), expected[number].state.clone())[0])
    packed = torch.cat([first, second])[None]
    seq_idx = torch.tensor([0] * len(first) + [1] * len(second))[None]
    both = torch.cat([output.logits[0] for output in expected])
    assert_equal(model(packed, seq_idx=seq_idx).logits[0], both)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("variant", ["granite experts", "nemotron_h experts", "zamba2 two blocks"])
@torch.no_grad()
def test_quantised_models_round_trip(variant: str, kind: str, tmp_path: Path) -> None:
    saved(variant, tmp_path / "theirs")
    model, ids = quantize(tmp_path / "theirs", tmp_path / "ours", kind), draw_ids()
    again = load(tmp_path / "ours")[0]
    assert torch.equal(again(ids).logits, model(ids).logits)
