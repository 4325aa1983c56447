"""Hybrids: what the layouts of the published families share, and longscan's own for all others.

A family is a table of fields and a table of names per letter of the pattern. Most have two of our layers in
one of theirs: mixer and feed-forward layer, each with its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

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
from longscan.models.hybrid_config import PatternConfig

__all__ = ["FORMAT", "Family", "layout"]

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


def _none(config: Any) -> dict[str, str]:
    """Return no names beside those of the tables."""
    return {}


def _same(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
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
        kind: our Config.
        others: beginnings of names that depend on more than the letter of a layer, theirs -> ours.
    """

    name: str
    architecture: str
    fields: Mapping[str, str]
    missing: Mapping[str, Any]
    derived: Collection[str]
    derive: Callable[[Mapping[str, Any]], dict[str, Any]]
    express: Callable[[Any], dict[str, Any]]
    only: Mapping[str, tuple[Any, ...]]
    idle: Collection[str]
    outer: Mapping[str, str]
    inner: Mapping[str, Mapping[str, str]]
    layers: str = "model.layers."
    per_layer: int = 2
    split: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = _same
    fuse: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = _same
    dropped: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    kind: type[PatternConfig] = HybridConfig
    others: Callable[[Any], dict[str, str]] = _none

    def names(self, config: PatternConfig) -> dict[str, str]:
        """Return the beginnings of all names, theirs -> ours."""
        names = {**self.outer, **self.others(config)}
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
    own_family = family.kind is HybridConfig  # which has a field for it

    def read(raw: Mapping[str, Any], tokenizer_size: int | None) -> PatternConfig:
        raw = _renewed(raw, family.older)
        known_here = [*table, *family.derived, *only, *family.idle]
        check_fields(raw, known_here, only, IDLE.union(family.idle, [QUANTIZATION]))
        known = {**missing, **raw}
        if lacking := [name for name in (*table, *family.derived) if name not in known]:
            raise LongscanError(
                f"config.json of a {family.name} needs {', '.join(map(repr, lacking))}: without them it "
                "would be another model. Fetch the file again."
            )
        derived = {**({"family": family.name} if own_family else {}), **family.derive(known)}
        fields = {theirs: known[theirs] for theirs in table if table[theirs] not in derived}
        names = {**table, **{name: name for name in derived}}
        config = build(family.kind, {**fields, **derived}, names)
        multiple = config.pad_vocab_size_multiple
        return usual(config.replace(**unpadded(raw, config.vocab_size, multiple, tokenizer_size)))

    def write(config: Any) -> dict[str, Any]:
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
                remedy = "set family to 'own' (--set family=own)" if own_family else "leave it at that"
                raise LongscanError(
                    f"the layout of {family.name} has no field for {name} = {value!r} (it means "
                    f"{again[name]!r}): {remedy}."
                )
        return fields

    def arrange(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        assert isinstance(config, PatternConfig)
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
        assert isinstance(config, PatternConfig)
        names = {ours: theirs for theirs, ours in family.names(config).items()}
        fused = family.fuse(dict(tensors), config)
        return {_renamed(name, names): tensor for name, tensor in fused.items()}

    return Format(read=read, write=write, copy=TIED_HEAD, arrange=arrange, restore=restore)


def _renewed(raw: Mapping[str, Any], older: Mapping[str, str]) -> dict[str, Any]:
    """Return fields under their present names; where both are there they have to agree."""
    fields = {name: value for name, value in raw.items() if name not in older}
    for name, present in older.items():
        if name in raw and fields.setdefault(present, raw[name]) != raw[name]:
            raise LongscanError(f"{name}: expected {fields[present]!r}, as {present}, got {raw[name]!r}.")
    return fields


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a name with its longest known beginning translated."""
    start = name
    while start and start not in names:
        start = start[: start[:-1].rfind(".") + 1]
    return names.get(start, "") + name.removeprefix(start)


def usual(config: PatternConfig) -> PatternConfig:
    """Return a Config with the usual sizes as None, so that it is equal to itself after a round trip.

    Args:
        config: any.
    """
    fields = config.to_dict()
    defaults = {"n_kv_heads": fields["n_heads"], "d_ssm": 2 * config.d_model}
    if fields["n_heads"] and config.d_model % fields["n_heads"] == 0:
        defaults["d_head"] = config.d_model // fields["n_heads"]
    return config.replace(**{name: None for name, value in defaults.items() if fields.get(name) == value})


FORMAT = own("hybrid")
