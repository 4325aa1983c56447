"""Hybrids as the authors of Mamba publish them: attention in some layers, and an MLP behind each mixer.

Their layer is one or two of ours: mixer and feed-forward layer. Queries, keys and values are one matrix
there, and so are up and gate projections, up first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.formats import mamba2
from longscan.checkpoints.formats.base import TIED_HEAD, Format, build, check_fields
from longscan.checkpoints.formats.mamba import build_mamba, usual_rank
from longscan.checkpoints.formats.official import FIELDS, NORM_EPS, SSM_CFG, layer_of, to_authors
from longscan.errors import LongscanError
from longscan.models import HybridConfig, Mamba2Config
from longscan.models.common.gated_mlp import MULTIPLE, rounded

__all__ = ["OFFICIAL"]

# of attn_cfg, theirs -> ours
ATTENTION = {
    "num_heads": "n_heads",
    "num_heads_kv": "n_kv_heads",
    "head_dim": "d_head",
    "d_conv": "attention_conv",
    "softmax_scale": "attention_multiplier",
    "qkv_proj_bias": "attention_bias",
}
MISSING = {"qkv_proj_bias": True, "out_proj_bias": True, "d_conv": 0, "rotary_emb_dim": 0}
ONLY: dict[str, tuple[Any, ...]] = {
    "causal": (True,),
    "mlp_dim": (0,),
    "rotary_emb_interleaved": (False,),
}


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> HybridConfig:
    """Return the Config of the authors' fields."""
    around = (*FIELDS, "d_intermediate", "attn_layer_idx", "attn_cfg")
    check_fields(raw, around, {"rms_norm": (True,)}, {"ssm_cfg", "fused_add_norm"})
    layer, n_layers, width = layer_of(raw), raw.get("n_layer", 64), raw.get("d_intermediate", 0)
    if layer == "Mamba3":
        raise LongscanError("attn_layer_idx: expected [], got attention beside Mamba-3: not computed here.")
    if type(n_layers) is not int or not 1 <= n_layers <= 10_000:
        raise LongscanError(f"n_layer: expected a whole number from 1 to 10,000, got {n_layers!r}.")
    if type(width) is not int or width < 0:
        raise LongscanError(f"d_intermediate: expected a whole number from 0 on, got {width!r}.")
    indices = raw.get("attn_layer_idx", [])
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < n_layers for i in indices):
        raise LongscanError(f"attn_layer_idx: expected numbers below {n_layers}, got {indices!r}.")
    letter = "m" if layer == "Mamba1" else "M"
    mixers = ["*" if number in indices else letter for number in range(n_layers)]
    fields = {ours: raw[theirs] for theirs, ours in FIELDS.items() if theirs in raw and ours != "n_layers"}
    behind = "-" if width else ""
    fields |= {"pattern": "".join(f"{mixer}{behind}" for mixer in mixers), "norm_eps": NORM_EPS}
    fields |= {"d_ff": rounded(width)} if width else {}
    if set(mixers) != {"*"}:
        fields |= _ssm({**raw, **raw.get("ssm_cfg", {})}, raw.get("ssm_cfg", {}), layer)
    if "*" in mixers:
        fields |= _attention(raw.get("attn_cfg", {}), fields)
    theirs = {name: name for name in fields} | {ours: name for name, ours in FIELDS.items()}
    names = {name: ours for ours, name in theirs.items()}
    return build(HybridConfig, {theirs[ours]: value for ours, value in fields.items()}, names)


def _ssm(raw: Mapping[str, Any], ssm_cfg: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Return our fields of the state spaces."""
    if layer == "Mamba1":
        check_fields(ssm_cfg, SSM_CFG, {"layer": (layer,)}, {"use_fast_path"})
        one = usual_rank(build_mamba(raw, {**FIELDS, **SSM_CFG}))
        return {
            "d_ssm": None if one.expand == 2 else one.d_inner,
            **{name: getattr(one, name) for name in ("d_state", "d_conv", "dt_rank", "conv_bias")},
            **dict.fromkeys(("ssm_in_bias", "ssm_out_bias"), one.bias),
        }
    known = (*mamba2.SSM_CFG, "rmsnorm", "norm_before_gate")
    check_fields(ssm_cfg, known, {"layer": (layer,)}, mamba2.IDLE_SSM_CFG)
    two = mamba2.from_authors(raw)
    if two.D_per_channel or two.channels != two.d_inner:
        raise LongscanError("d_ssm, D_has_hdim: expected the defaults in a hybrid; others aren't computed.")
    return {
        "d_ssm": None if two.expand == 2 else two.d_inner,
        "d_ssm_head": two.d_head,
        "n_ssm_groups": two.n_groups,
        **{name: getattr(two, name) for name in ("d_state", "d_conv", "gated_norm", "conv_bias", "dt_limit")},
        **dict.fromkeys(("ssm_in_bias", "ssm_out_bias"), two.bias),
    }


def _attention(stated: object, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields of attention."""
    if not isinstance(stated, dict):
        raise LongscanError(f"attn_cfg: expected an object {{...}}, got {stated!r}.")
    known = (*ATTENTION, "out_proj_bias", "rotary_emb_dim", "rotary_emb_base")
    check_fields(stated, known, ONLY, ())
    if "num_heads" not in stated or stated.get("causal") is not True:
        raise LongscanError(
            "attn_cfg: expected num_heads, and causal = true: without it tokens see later ones."
        )
    full = {**MISSING, **stated}
    if full["qkv_proj_bias"] != full["out_proj_bias"]:
        raise LongscanError("attn_cfg: expected one value of qkv_proj_bias and out_proj_bias.")
    ours = {name: full[theirs] for theirs, name in ATTENTION.items() if theirs in full}
    d_model, n_heads, d_head = fields.get("d_model"), ours["n_heads"], ours.get("d_head")
    if not all(type(n) is int and n > 0 for n in (d_model, n_heads, n_heads if d_head is None else d_head)):
        raise LongscanError("attn_cfg: expected whole numbers from 1 on, num_heads and head_dim.")
    assert isinstance(d_model, int)
    if d_head == d_model // n_heads and d_model % n_heads == 0:
        ours["d_head"] = None
    if ours.get("n_kv_heads") == n_heads:
        ours["n_kv_heads"] = None
    turns, width = full["rotary_emb_dim"], d_model // n_heads if d_head is None else d_head
    if type(turns) is not int or not 0 <= turns <= width:
        raise LongscanError(f"rotary_emb_dim: expected 0 to {width}, got {turns!r}.")
    if turns:
        ours |= {"rope_theta": full.get("rotary_emb_base", 10000.0), "rotary_fraction": turns / width}
    return ours


def _write(config: HybridConfig) -> dict[str, Any]:
    """Return the authors' config.json."""
    step = 2 if "-" in config.pattern else 1
    mixers, d_model = config.pattern[::step], config.d_model
    kinds = set(mixers) - {"*"}
    expressible = kinds in ({"m"}, {"M"}, set()) and set(config.pattern[1::2] if step == 2 else "-") == {"-"}
    if not expressible or (config.d_ff or 0) % MULTIPLE * (step == 2) or config.channels % d_model:
        raise LongscanError(
            f"the official layout has no field for this hybrid (pattern {config.pattern!r}, d_ff "
            f"{config.d_ff}, d_ssm {config.channels}): use the Hugging Face layout."
        )
    fields = {
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "n_layer": len(mixers),
        "d_intermediate": config.d_ff if step == 2 else 0,
        "ssm_cfg": _ssm_cfg(config, kinds),
        "attn_layer_idx": [number for number, letter in enumerate(mixers) if letter == "*"],
        "attn_cfg": _attn_cfg(config) if "*" in mixers else {},
        "rms_norm": True,
        "fused_add_norm": True,
    }
    again = _read(fields, None).to_dict()
    for name, value in config.replace(family="own").to_dict().items():
        if again[name] != value:
            raise LongscanError(
                f"the official layout has no field for {name} = {value!r} (it means {again[name]!r}): "
                "use the Hugging Face layout."
            )
    return fields


def _ssm_cfg(config: HybridConfig, kinds: set[str]) -> dict[str, Any]:
    """Return the fields of the state spaces."""
    if kinds != {"M"}:
        return to_authors(config.mamba) if kinds else {}
    two = Mamba2Config(
        d_model=config.d_model,
        n_layers=1,
        vocab_size=1,
        d_state=config.d_state,
        d_head=config.d_ssm_head,
        n_groups=config.n_ssm_groups,
        d_conv=config.d_conv,
        expand=config.channels // config.d_model,
        gated_norm=config.gated_norm,
        conv_bias=config.conv_bias,
        bias=config.ssm_in_bias,
        dt_limit=config.dt_limit,
    )
    return {"layer": "Mamba2", **mamba2.to_authors(two)}


def _attn_cfg(config: HybridConfig) -> dict[str, Any]:
    """Return the fields of attention."""
    layer = config.attention
    turns = 0 if config.rope_theta is None else layer.rotary_width
    return {
        "causal": True,
        "d_conv": config.attention_conv,
        "head_dim": layer.d_head,
        "num_heads": layer.n_heads,
        "num_heads_kv": layer.n_kv_heads,
        "qkv_proj_bias": config.attention_bias,
        "out_proj_bias": config.attention_bias,
        "rotary_emb_dim": turns,
        **({"rotary_emb_base": config.rope_theta} if turns else {}),
        **({} if config.attention_multiplier is None else {"softmax_scale": config.attention_multiplier}),
    }


def _arrange(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors with their layers as ours, and fused matrices apart."""
    step, ours = 2 if "-" in config.pattern else 1, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"backbone\.layers\.(\d{1,5})\.(\w+)\.(.+)", name)
        if match is None or int(match[1]) * step >= config.n_layers:
            ours[name] = tensor
            continue
        number, part, rest = int(match[1]) * step, match[2], match[3]
        here, behind = f"backbone.layers.{number}", f"backbone.layers.{number + 1}"
        if part == "norm2":
            ours[f"{behind}.norm.{rest}"] = tensor
        elif part == "mlp" and rest.startswith("fc1."):
            for end, piece in zip(("up_proj", "gate_proj"), tensor.chunk(2), strict=True):
                ours[f"{behind}.mixer.mlp.{end}.{rest.removeprefix('fc1.')}"] = piece
        elif part == "mlp":
            ours[f"{behind}.mixer.mlp.{rest.replace('fc2.', 'down_proj.')}"] = tensor
        elif part == "mixer" and config.pattern[number] == "*":
            ours |= _attention_tensors(f"{here}.mixer.", rest, tensor, config)
        else:
            ours[name.replace(match[1], str(number), 1)] = tensor
    return ours


def _attention_tensors(mixer: str, rest: str, tensor: Tensor, config: HybridConfig) -> dict[str, Tensor]:
    """Return a tensor of an attention layer under our names."""
    inner = f"{mixer}attention." if config.attention_conv else mixer
    matrix, _, end = rest.partition(".")
    if matrix == "in_proj":
        layer = config.attention
        widths = [layer.n_heads * layer.d_head, *[layer.n_kv_heads * layer.d_head] * 2]
        if sum(widths) != len(tensor):
            return {f"{inner}q_proj.{end}": tensor}  # of another shape, as the error will say
        pieces = zip("qkv", torch.split(tensor, widths), strict=True)
        return {f"{inner}{letter}_proj.{end}": piece for letter, piece in pieces}
    if rest == "rotary_emb.inv_freq":
        return {}
    return {f"{inner}o_proj.{end}" if matrix == "out_proj" else f"{mixer}{rest}": tensor}


def _restore(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors as the authors' files have them."""
    step, theirs = 2 if "-" in config.pattern else 1, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.+)", name)
        if match is None:
            theirs[name] = tensor
            continue
        number, part, rest = int(match[1]), match[2], match[3]
        start = f"backbone.layers.{number // step}"
        if config.pattern[number] == "-":
            rest = rest.removeprefix("mlp.")
            if part == "norm":
                theirs[f"{start}.norm2.{rest}"] = tensor
            elif rest.startswith("up_proj."):
                gate = tensors[name.replace(".up_proj.", ".gate_proj.")]
                theirs[f"{start}.mlp.fc1.{rest.removeprefix('up_proj.')}"] = torch.cat([tensor, gate])
            elif rest.startswith("down_proj."):
                theirs[f"{start}.mlp.fc2.{rest.removeprefix('down_proj.')}"] = tensor
        elif config.pattern[number] == "*" and part == "mixer":
            rest = rest.removeprefix("attention.")
            if rest.startswith("q_proj."):
                qkv = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
                theirs[f"{start}.mixer.in_proj.{rest.removeprefix('q_proj.')}"] = torch.cat(qkv)
            elif not rest.startswith(("k_proj.", "v_proj.")):
                theirs[f"{start}.mixer.{rest.replace('o_proj.', 'out_proj.')}"] = tensor
        else:
            theirs[f"{start}.{part}.{rest}"] = tensor
    return theirs


OFFICIAL = Format(read=_read, write=_write, copy=TIED_HEAD, arrange=_arrange, restore=_restore)
