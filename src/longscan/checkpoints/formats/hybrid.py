"""Hybrids: what the layouts of the published families share, and longscan's own for all others.

A family is a table of fields and a table of names per letter of the pattern. Most have two of our layers in
one of theirs: mixer and feed-forward layer, each with its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.formats.base import (
    IDLE,
    QUANTIZATION,
    TIED_HEAD,
    Format,
    build,
    check_fields,
    unpadded,
)
from longscan.checkpoints.formats.own import own
from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = [
    "FORMAT",
    "LAYERS",
    "MAMBA",
    "MAMBA_MISSING",
    "Family",
    "dt_limit",
    "layer_letters",
    "layout",
    "rotation",
    "ssm_widths",
    "whole",
    "written_limit",
]

MAX_LAYERS = 10_000
LARGEST = torch.finfo(torch.float32).max  # stands for infinity, which JSON has no number for

# their name -> ours, in every family
SHARED = {
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_positions",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
}
# what a missing field means; none of them is a size
SHARED_MISSING: dict[str, Any] = {
    "pad_vocab_size_multiple": 1,
    "num_key_value_heads": None,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
}
SHARED_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, 0),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
}
# of Mamba-2, in most families
MAMBA = {
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_n_groups": "n_ssm_groups",
    "mamba_conv_bias": "conv_bias",
}
MAMBA_MISSING: dict[str, Any] = {"mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False}
LAYERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}


def _same(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors that have our shapes."""
    return tensors


@dataclass(frozen=True)
class Family:
    """How the models of one family stand in files.

    Attributes:
        name: their model_type.
        architecture: their class.
        fields: of config.json, theirs -> ours, beside those of all families.
        missing: what a field means that is not there; all others have to be.
        derived: the fields that `derive` reads.
        derive: our fields that several of theirs give.
        express: the inverse of `derive`.
        only: the fields with which one model is meant: name -> the values that mean it.
        idle: those that leave the numbers alone.
        outer: beginnings of the names of tensors outside of layers, theirs -> ours.
        inner: the same after the number of a layer, by the letter of our layer.
        layers: what is before the number.
        per_layer: our layers in one of theirs.
        split: tensors by our names, with theirs of another shape cut into ours.
        fuse: the inverse of `split`.
        dropped: beginnings of names that say nothing.
        older: names of fields in older files -> names.
    """

    name: str
    architecture: str
    fields: Mapping[str, str]
    missing: Mapping[str, Any]
    derived: Collection[str]
    derive: Callable[[Mapping[str, Any]], dict[str, Any]]
    express: Callable[[HybridConfig], dict[str, Any]]
    only: Mapping[str, tuple[Any, ...]]
    idle: Collection[str]
    outer: Mapping[str, str]
    inner: Mapping[str, Mapping[str, str]]
    layers: str = "model.layers."
    per_layer: int = 2
    split: Callable[[dict[str, Tensor], HybridConfig], dict[str, Tensor]] = _same
    fuse: Callable[[dict[str, Tensor], HybridConfig], dict[str, Tensor]] = _same
    dropped: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)

    def names(self, config: HybridConfig) -> dict[str, str]:
        """Return the beginnings of all names, theirs -> ours."""
        names = dict(self.outer)
        for number, letter in enumerate(config.pattern):
            for theirs, ours in self.inner.get(letter, {}).items():
                start = f"{self.layers}{number // self.per_layer}.{theirs}"
                names[start] = f"backbone.layers.{number}.{ours}"
        return names


def layout(family: Family) -> Format:
    """Return the layout of a family.

    Args:
        family: its tables.
    """
    table = {**SHARED, **family.fields}
    missing = {**SHARED_MISSING, **family.missing}
    only = {**SHARED_ONLY, **family.only}

    def read(raw: Mapping[str, Any], tokenizer_size: int | None) -> HybridConfig:
        raw = {family.older.get(name, name): value for name, value in raw.items()}
        known_here = [*table, *family.derived, *only, *family.idle]
        check_fields(raw, known_here, only, IDLE.union(family.idle, [QUANTIZATION]))
        known = {**missing, **raw}
        if lacking := [name for name in (*table, *family.derived) if name not in known]:
            raise LongscanError(
                f"config.json of a {family.name} needs {', '.join(map(repr, lacking))}: without them it "
                "would be another model. Fetch the file again."
            )
        derived = {"family": family.name, **family.derive(known)}
        fields = {theirs: known[theirs] for theirs in table if table[theirs] not in derived}
        names = {**table, **{name: name for name in derived}}
        config = build(HybridConfig, {**fields, **derived}, names)
        multiple = config.pad_vocab_size_multiple
        return usual(config.replace(**unpadded(raw, config.vocab_size, multiple, tokenizer_size)))

    def write(config: HybridConfig) -> dict[str, Any]:
        fields = {
            "architectures": [family.architecture],
            "model_type": family.name,
            **{name: values[0] for name, values in only.items()},
            **{theirs: getattr(config, ours) for theirs, ours in table.items()},
            "vocab_size": config.padded_vocab_size,
            "unpadded_vocab_size": config.vocab_size,
            "num_key_value_heads": config.n_kv_heads or config.n_heads,
            **family.express(config),
            "initializer_range": 0.02,
            "use_cache": True,
        }
        again = read(fields, None).to_dict()
        for name, value in usual(config).to_dict().items():
            if again[name] != value:
                raise LongscanError(
                    f"the layout of {family.name} has no field for {name} = {value!r} (it means "
                    f"{again[name]!r}): set family to 'own'."
                )
        return fields

    def arrange(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        assert isinstance(config, HybridConfig)
        names = family.names(config)
        renamed = {
            _renamed(name, names): tensor
            for name, tensor in tensors.items()
            if not name.startswith(family.dropped)
        }
        if len(renamed) < sum(not name.startswith(family.dropped) for name in tensors):
            raise LongscanError("two tensors of the file are one under two names. Fetch it again.")
        return family.split(renamed, config)

    def restore(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        assert isinstance(config, HybridConfig)
        names = {ours: theirs for theirs, ours in family.names(config).items()}
        fused = family.fuse(dict(tensors), config)
        return {_renamed(name, names): tensor for name, tensor in fused.items()}

    return Format(read=read, write=write, copy=TIED_HEAD, arrange=arrange, restore=restore)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a name with its longest known beginning translated."""
    start = name
    while start and start not in names:
        start = start[: start[:-1].rfind(".") + 1]
    return names.get(start, "") + name.removeprefix(start)


def usual(config: HybridConfig) -> HybridConfig:
    """Return a Config with the usual sizes as None, so that it is equal to itself after a round trip.

    Args:
        config: any.
    """
    defaults = {"n_kv_heads": config.n_heads, "d_ssm": 2 * config.d_model}
    if config.n_heads and config.d_model % config.n_heads == 0:
        defaults["d_head"] = config.d_model // config.n_heads
    return config.replace(
        **{name: None for name, value in defaults.items() if getattr(config, name) == value}
    )


def whole(fields: Mapping[str, Any], name: str, most: int | None = None) -> int:
    """Return a number of theirs.

    Args:
        fields: theirs.
        name: of the number.
        most: the largest one that is possible.

    Raises:
        LongscanError: it is no whole number from 1 on.
    """
    value = fields[name]
    if type(value) is not int or value < 1 or (most and value > most):
        upper = f" to {most:,}" if most else " on"
        raise LongscanError(f"{name}: expected a whole number from 1{upper}, got {value!r}.")
    return value


def layer_letters(fields: Mapping[str, Any], name: str, letters: Mapping[str, str]) -> str:
    """Return the letters of a list of kinds of layers.

    Args:
        fields: theirs.
        name: of the list.
        letters: of each kind.

    Raises:
        LongscanError: it is no list, or has an unknown kind.
    """
    kinds = fields[name]
    if not isinstance(kinds, list) or not kinds:
        raise LongscanError(f"{name}: expected a list of kinds of layers, got {kinds!r}.")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in letters:
            raise LongscanError(f"{name}: expected {', '.join(letters)}, got {kind!r}.")
    return "".join(letters[kind] for kind in kinds)


def ssm_widths(fields: Mapping[str, Any], channels: int) -> dict[str, int]:
    """Return d_ssm and d_ssm_head.

    Args:
        fields: theirs; "auto" is a width of heads too.
        channels: of the recurrence.

    Raises:
        LongscanError: heads and channels do not fit.
    """
    n_heads = whole(fields, "mamba_n_heads")
    d_head = channels // n_heads if fields["mamba_d_head"] == "auto" else whole(fields, "mamba_d_head")
    if n_heads * d_head != channels:
        raise LongscanError(
            f"mamba_n_heads, mamba_d_head: expected {channels} channels, got {n_heads} heads of {d_head}."
        )
    return {"d_ssm": channels, "d_ssm_head": d_head}


def dt_limit(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the least and largest time step; None if that is no limit.

    Args:
        fields: theirs; infinity is written in several ways.

    Raises:
        LongscanError: they are no two numbers.
    """
    limit = fields.get("time_step_limit")
    if limit is None:
        return None
    numbers = []
    for value in limit if isinstance(limit, list) else []:
        value = value.get("__float__") if isinstance(value, dict) else value
        value = LARGEST if value in ("Infinity", "inf", float("inf")) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(min(float(value), LARGEST))
    if len(numbers) != 2:
        raise LongscanError(f"time_step_limit: expected two numbers, got {limit!r}.")
    return None if numbers == [0, LARGEST] else (numbers[0], numbers[1])


def written_limit(config: HybridConfig) -> dict[str, Any]:
    """Return the field of the time steps; missing, it is no limit.

    Args:
        config: ours.
    """
    return {} if config.dt_limit is None else {"time_step_limit": list(config.dt_limit)}


def rotation(fields: Mapping[str, Any], fraction: float = 1.0) -> float:
    """Return the base of the rotary embeddings, which stands in one of two places.

    Args:
        fields: theirs.
        fraction: of a head that rotates, where the file says it.

    Raises:
        LongscanError: positions are stretched, or the places disagree.
    """
    found = [fields["rope_theta"]] if "rope_theta" in fields else []
    for name in ("rope_parameters", "rope_scaling"):
        stated = fields.get(name) or {}
        if not isinstance(stated, dict):
            raise LongscanError(f"{name}: expected an object {{...}}, got {stated!r}.")
        only = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (fraction, None)}
        check_fields(stated, ["rope_theta", *only], only, ())
        found += [stated["rope_theta"]] if "rope_theta" in stated else []
    if any(value != found[0] for value in found):
        raise LongscanError(f"rope_theta: expected one value, got {found[0]!r} and {found[-1]!r}.")
    theta = found[0] if found else 10000.0
    if not isinstance(theta, int | float) or isinstance(theta, bool):
        raise LongscanError(f"rope_theta: expected a number, got {theta!r}.")
    return float(theta)


FORMAT = own("hybrid")
