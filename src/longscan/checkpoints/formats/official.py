"""Mamba as its authors published it: config.json with the mixer's fields in ssm_cfg, and pytorch_model.bin.

A head that is the embedding stands in the file all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import TIED_HEAD, Format, check_fields
from longscan.checkpoints.formats.mamba import ONLY, build_mamba, ours, usual_rank
from longscan.errors import LongscanError
from longscan.models import MambaConfig

__all__ = ["FORMAT"]

# their name -> ours
OFFICIAL = {
    "d_model": "d_model",
    "n_layer": "n_layers",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "tie_embeddings": "tie_embeddings",
}
SSM_CFG = {
    name: name
    for name in (
        *("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"),
        *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    )
}


def _write(config: MambaConfig) -> dict[str, Any]:
    """Return config.json; ssm_cfg holds only what is not the default, as in the published files."""
    usual = MambaConfig(d_model=config.d_model, n_layers=1, vocab_size=1)
    if config.norm_eps != usual.norm_eps:
        raise LongscanError(
            f"the official layout has no field for norm_eps = {config.norm_eps} (it means {usual.norm_eps}): "
            "use the Hugging Face layout."
        )
    config = usual_rank(config)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in OFFICIAL.items()},
        "ssm_cfg": {
            name: getattr(config, name) for name in SSM_CFG if getattr(config, name) != getattr(usual, name)
        },
        "rms_norm": True,
        "fused_add_norm": True,
    }


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> MambaConfig:
    """Return the Config of the fields, of which those of the mixer are in ssm_cfg."""
    check_fields(raw, OFFICIAL, ONLY, {"ssm_cfg", "fused_add_norm"})
    ssm_cfg = raw.get("ssm_cfg", {})
    if not isinstance(ssm_cfg, dict):
        raise LongscanError(f"ssm_cfg: expected an object {{...}}, got {ssm_cfg!r}.")
    if ssm_cfg.get("layer", "Mamba1") != "Mamba1":
        raise LongscanError(
            f"ssm_cfg: layer: expected 'Mamba1', got {ssm_cfg['layer']!r}: not computed here."
        )
    check_fields(ssm_cfg, SSM_CFG, {"layer": ("Mamba1",)}, {"use_fast_path"})
    return build_mamba({**raw, **ssm_cfg}, {**OFFICIAL, **SSM_CFG})


FORMAT = Format(read=_read, write=_write, ours=ours, copy=TIED_HEAD)
