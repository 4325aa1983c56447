"""Models as the authors of Mamba publish them: config.json with the mixer's fields in ssm_cfg, and a pickle.

A head that is the embedding stands in the file all the same. ssm_cfg names the kind of mixer, Mamba-1 if it
does not; the models' own fields stand in their formats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from longscan.checkpoints.formats.base import TIED_HEAD, Format, check_fields
from longscan.checkpoints.formats.mamba import ONLY, build_mamba, ours, usual_rank
from longscan.errors import LongscanError
from longscan.models import LanguageModelConfig, MambaConfig

__all__ = ["FIELDS", "FORMAT", "LAYERS", "layer_of", "official"]

LAYERS = {
    "Mamba1": "mamba",
    "Mamba2": "mamba2",
    "Mamba3": "mamba3",
}  # their name of a mixer -> our name of the model
# their name -> ours, of the fields around the mixers
FIELDS = {
    "d_model": "d_model",
    "n_layer": "n_layers",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "tie_embeddings": "tie_embeddings",
}
NORM_EPS = 1e-5  # which has no field
SSM_CFG = {
    name: name
    for name in (
        *("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"),
        *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    )
}


def layer_of(raw: Mapping[str, Any]) -> str:
    """Return the name that an official config.json has for the kind of its mixers.

    Args:
        raw: its content.

    Raises:
        LongscanError: ssm_cfg is no object, or there is no such mixer here.
    """
    ssm_cfg = raw.get("ssm_cfg", {})
    if not isinstance(ssm_cfg, dict):
        raise LongscanError(f"ssm_cfg: expected an object {{...}}, got {ssm_cfg!r}.")
    layer = ssm_cfg.get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in LAYERS:
        raise LongscanError(
            f"ssm_cfg: layer: expected {', '.join(map(repr, LAYERS))}, got {layer!r}: not computed here."
        )
    return layer


def official(
    layer: str,
    read: Callable[[Mapping[str, Any]], LanguageModelConfig],
    write: Callable[[Any], dict[str, Any]],
    known: Collection[str],
    idle: Collection[str] = (),
    more: Mapping[str, str] | None = None,
) -> Format:
    """Return the authors' layout of a model.

    Args:
        layer: their name of its mixers.
        read: the Config, of all their fields, those of ssm_cfg among them.
        write: ssm_cfg, of the Config; only what is not the default, as in the published files.
        known: fields of ssm_cfg that are understood.
        idle: those that leave the numbers alone.
        more: fields beside those of FIELDS, their name -> ours.
    """
    fields = {**FIELDS, **(more or {})}
    only = {name: values for name, values in ONLY.items() if name not in fields}

    def read_config(raw: Mapping[str, Any], tokenizer_size: int | None) -> LanguageModelConfig:
        check_fields(raw, fields, only, {"ssm_cfg", "fused_add_norm"})
        assert layer_of(raw) == layer
        ssm_cfg = raw.get("ssm_cfg", {})
        check_fields(ssm_cfg, known, {"layer": (layer,)}, idle)
        return read({**raw, **ssm_cfg})

    def write_config(config: LanguageModelConfig) -> dict[str, Any]:
        if config.norm_eps != NORM_EPS:
            raise LongscanError(
                f"the official layout has no field for norm_eps = {config.norm_eps} (it means {NORM_EPS}): "
                "use the Hugging Face layout."
            )
        named = {} if layer == "Mamba1" else {"layer": layer}
        return {
            **{theirs: getattr(config, ours) for theirs, ours in fields.items()},
            "ssm_cfg": {**named, **write(config)},
            "rms_norm": True,
            "fused_add_norm": True,
        }

    return Format(read=read_config, write=write_config, ours=ours, copy=TIED_HEAD)


def _read(raw: Mapping[str, Any]) -> MambaConfig:
    """Return the Config of a Mamba-1."""
    return build_mamba(raw, {**FIELDS, **SSM_CFG})


def _write(config: MambaConfig) -> dict[str, Any]:
    """Return ssm_cfg of a Mamba-1."""
    if config.inner_norms != "none":
        raise LongscanError(
            f"the official layout has no field for inner_norms = {config.inner_norms}: use the Hugging Face "
            "layout."
        )
    usual, config = MambaConfig(d_model=config.d_model, n_layers=1, vocab_size=1), usual_rank(config)
    return {name: getattr(config, name) for name in SSM_CFG if getattr(config, name) != getattr(usual, name)}


FORMAT = official("Mamba1", _read, _write, SSM_CFG, ("use_fast_path",))
