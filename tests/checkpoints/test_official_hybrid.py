"""Hybrids in the authors' layout: the numbers of the equations, and files that round-trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import load
from longscan.checkpoints.save import convert
from longscan.errors import LongscanError

ATTENTION = {
    **{"causal": True, "d_conv": 4, "head_dim": 6, "num_heads": 4, "num_heads_kv": 2},
    **{"qkv_proj_bias": False, "out_proj_bias": False, "rotary_emb_dim": 4},
}
CONFIG: dict[str, Any] = {
    **{"d_model": 16, "d_intermediate": 64, "n_layer": 3, "vocab_size": 23, "attn_layer_idx": [1]},
    **{"ssm_cfg": {"layer": "Mamba2", "d_state": 5, "headdim": 8, "ngroups": 2}, "attn_cfg": ATTENTION},
    **{"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True},
}


def write(directory: Path, **change: Any) -> dict[str, Tensor]:
    """A directory as the authors publish it; returns its tensors."""
    config = {**CONFIG, **change}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    d_model, draw, tensors = config["d_model"], torch.Generator().manual_seed(0), {}
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (24, d_model), "norm_f.weight": (d_model,)}
    for number in range(config["n_layer"]):
        layer = f"layers.{number}."
        shapes[f"{layer}norm.weight"] = (d_model,)
        if config["d_intermediate"]:
            shapes[f"{layer}norm2.weight"] = (d_model,)
            shapes[f"{layer}mlp.fc1.weight"] = (256, d_model)
            shapes[f"{layer}mlp.fc2.weight"] = (d_model, 128)
        mixer = mixer_shapes(config, number in config["attn_layer_idx"])
        shapes |= {f"{layer}mixer.{name}": shape for name, shape in mixer.items()}
    for name, shape in shapes.items():
        centre = 1.0 if "norm" in name or name.endswith(".D") else 0.0
        tensors[f"backbone.{name}"] = centre + 0.3 * torch.randn(shape, generator=draw)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, directory / "pytorch_model.bin")
    return tensors


def mixer_shapes(config: dict[str, Any], attends: bool) -> dict[str, tuple[int, ...]]:
    d_model = config["d_model"]
    if attends:
        cfg = config["attn_cfg"]
        width = cfg["head_dim"] * (cfg["num_heads"] + 2 * cfg.get("num_heads_kv", cfg["num_heads"]))
        shapes = {
            "in_proj.weight": (width, d_model),
            "out_proj.weight": (d_model, cfg["head_dim"] * cfg["num_heads"]),
        }
        if cfg.get("d_conv"):
            shapes |= {"conv1d.weight": (width, 1, cfg["d_conv"]), "conv1d.bias": (width,)}
        if cfg["qkv_proj_bias"]:
            shapes |= {"in_proj.bias": (width,), "out_proj.bias": (d_model,)}
        return shapes
    ssm, inner = config["ssm_cfg"], 2 * d_model
    if ssm.get("layer") == "Mamba2":
        heads, channels = inner // ssm["headdim"], inner + 2 * ssm["ngroups"] * ssm["d_state"]
        return {
            **{"in_proj.weight": (inner + channels + heads, d_model), "out_proj.weight": (d_model, inner)},
            **{"conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,), "norm.weight": (inner,)},
            **{"dt_bias": (heads,), "A_log": (heads,), "D": (heads,)},
        }
    return {
        **{"in_proj.weight": (2 * inner, d_model), "out_proj.weight": (d_model, inner), "D": (inner,)},
        **{"conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,), "A_log": (inner, ssm["d_state"])},
        **{"x_proj.weight": (1 + 2 * ssm["d_state"], inner), "dt_proj.weight": (inner, 1)},
        "dt_proj.bias": (inner,),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "with an mlp": {},
    "no mlp": {"d_intermediate": 0},
    "mamba-1 with an mlp": {"ssm_cfg": {"d_state": 5}, "attn_layer_idx": [], "attn_cfg": {}},
    "mamba-1 and attention": {
        "ssm_cfg": {"d_state": 5},
        "attn_cfg": {**ATTENTION, "d_conv": 0, "qkv_proj_bias": True, "out_proj_bias": True},
    },
    "attention alone": {
        **{"attn_layer_idx": [0, 1, 2], "attn_cfg": {**ATTENTION, "rotary_emb_dim": 0}},
        "ssm_cfg": {},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_the_equations(variant: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "model", **VARIANTS[variant])
    model = load(tmp_path / "model")[0].double()
    ids = torch.randint(0, 23, (1, 19), generator=torch.Generator().manual_seed(1))
    expected = literal({**CONFIG, **VARIANTS[variant]}, tensors, ids[0])
    got = model(ids).logits[0]
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()
    state = model.init_state(1)
    steps = torch.stack([model.step(column, state)[0][0].clone() for column in ids.T])
    assert (steps - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_authors_layout_round_trips(variant: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "theirs", **VARIANTS[variant])
    model = convert(tmp_path / "theirs", tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "again", layout="official")
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert load(tmp_path / "again")[0].config == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [3]}, "attn_layer_idx: expected numbers below 3"),
        ({"attn_layer_idx": 1}, "attn_layer_idx: expected numbers"),
        ({"d_intermediate": -1}, "d_intermediate: expected"),
        ({"n_layer": 10**9}, "n_layer: expected"),
        ({"attn_cfg": {**ATTENTION, "causal": False}}, "causal"),
        ({"attn_cfg": {**ATTENTION, "mlp_dim": 256}}, "mlp_dim"),
        ({"attn_cfg": {**ATTENTION, "rotary_emb_dim": 8}}, "rotary_emb_dim: expected 0 to 6"),
        ({"attn_cfg": {**ATTENTION, "out_proj_bias": True}}, "one value of qkv_proj_bias"),
        ({"attn_cfg": {**ATTENTION, "num_heads": 0}}, "whole numbers from 1 on"),
        ({"attn_cfg": {**ATTENTION, "alibi": True}}, "unknown field 'alibi'"),
        ({"attn_cfg": []}, "attn_cfg: expected an object"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "attention beside Mamba-3"),
        ({"ssm_cfg": {**CONFIG["ssm_cfg"], "D_has_hdim": True}}, "D_has_hdim"),
        ({"window": 5}, "unknown field 'window'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(LongscanError, match=message):
        load(tmp_path / "model")


def literal(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The logits (seq_len, vocabulary), layer by layer and token by token, from nothing but the equations."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in tensors.items()}
    x = w["embedding.weight"][ids]
    for number in range(config["n_layer"]):
        layer = {n.split(".", 2)[2]: t for n, t in w.items() if n.startswith(f"layers.{number}.")}
        u = rms(x, layer["norm.weight"])
        mixer = {n.removeprefix("mixer."): t for n, t in layer.items() if n.startswith("mixer.")}
        if number in config["attn_layer_idx"]:
            x = x + attention(mixer, config["attn_cfg"], u)
        elif config["ssm_cfg"].get("layer") == "Mamba2":
            x = x + mamba2(mixer, config["ssm_cfg"], u)
        else:
            x = x + mamba1(mixer, config["ssm_cfg"], u)
        if config["d_intermediate"]:
            up, gate = (rms(x, layer["norm2.weight"]) @ layer["mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (up * F.silu(gate)) @ layer["mlp.fc2.weight"].T
    return rms(x, w["norm_f.weight"]) @ w["embedding.weight"].T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def convolved(w: dict[str, Tensor], x: Tensor) -> Tensor:
    padded = torch.cat([x.new_zeros(3, x.shape[1]), x])
    taps = [padded[tap : tap + len(x)] * w["conv1d.weight"][:, 0, tap] for tap in range(4)]
    return sum(taps) + w["conv1d.bias"]


def attention(w: dict[str, Tensor], cfg: dict[str, Any], u: Tensor) -> Tensor:
    d_head, heads, shared, turns = (
        cfg["head_dim"],
        cfg["num_heads"],
        cfg["num_heads_kv"],
        cfg["rotary_emb_dim"],
    )
    qkv = u @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    qkv = convolved(w, qkv) if cfg["d_conv"] else qkv
    qkv = qkv.view(len(u), heads + 2 * shared, d_head)
    angles = torch.zeros(len(u), turns // 2, dtype=torch.float64)
    for pair in range(turns // 2):
        angles[:, pair] = (torch.arange(len(u)) * torch.tensor(1e4) ** (-2 * pair / turns)).float()
    cos, sin = angles.float().cos().double()[:, None], angles.float().sin().double()[:, None]
    turned = qkv.clone()
    a, b = qkv[..., : turns // 2], qkv[..., turns // 2 : turns]
    turned[..., : turns // 2], turned[..., turns // 2 : turns] = a * cos - b * sin, a * sin + b * cos
    turned[:, heads + shared :] = qkv[:, heads + shared :]  # not the values
    out = torch.zeros(len(u), heads, d_head, dtype=torch.float64)
    for t in range(len(u)):
        for head in range(heads):
            group = head // (heads // shared)
            k, v = turned[: t + 1, heads + group], turned[: t + 1, heads + shared + group]
            out[t, head] = torch.softmax(k @ turned[t, head] / d_head**0.5, 0) @ v
    return out.flatten(1) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


def mamba2(w: dict[str, Tensor], cfg: dict[str, Any], u: Tensor) -> Tensor:
    d_state, d_head, groups = cfg["d_state"], cfg["headdim"], cfg["ngroups"]
    inner, heads = 2 * u.shape[1], 2 * u.shape[1] // d_head
    z, xbc, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * groups * d_state, heads], -1)
    x, b, c = F.silu(convolved(w, xbc)).split([inner, groups * d_state, groups * d_state], -1)
    dt, decay = F.softplus(dt + w["dt_bias"]), -torch.exp(w["A_log"])
    out = torch.zeros(len(u), heads, d_head, dtype=torch.float64)
    for head in range(heads):
        state, group = torch.zeros(d_head, d_state, dtype=torch.float64), head // (heads // groups)
        channels, of_group = (
            slice(head * d_head, (head + 1) * d_head),
            slice(group * d_state, (group + 1) * d_state),
        )
        for t in range(len(u)):
            added = dt[t, head] * torch.outer(x[t, channels], b[t, of_group])
            state = torch.exp(dt[t, head] * decay[head]) * state + added
            out[t, head] = state @ c[t, of_group] + w["D"][head] * x[t, channels]
    gated = (out.flatten(1) * F.silu(z)).view(len(u), groups, -1)
    return rms(gated, 1.0).flatten(1) * w["norm.weight"] @ w["out_proj.weight"].T


def mamba1(w: dict[str, Tensor], cfg: dict[str, Any], u: Tensor) -> Tensor:
    x, z = (u @ w["in_proj.weight"].T).chunk(2, -1)
    x = F.silu(convolved(w, x))
    dt, b, c = (x @ w["x_proj.weight"].T).split([1, cfg["d_state"], cfg["d_state"]], -1)
    dt = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    state, out = torch.zeros_like(w["A_log"]), []
    for t in range(len(u)):
        decay = torch.exp(dt[t, :, None] * -torch.exp(w["A_log"]))
        state = decay * state + (dt[t] * x[t])[:, None] * b[t]
        out.append(state @ c[t] + w["D"] * x[t])
    return (torch.stack(out) * F.silu(z)) @ w["out_proj.weight"].T
