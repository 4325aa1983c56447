"""Mamba-3 as its authors published it; `official` has the fields around the mixers.

No field says which activation of A the weights were trained with. Published weights and current official
code mean "heavy-tail"; weights of earlier code, and of others, need `"A_activation": "softplus"` in ssm_cfg,
which is read here. It is never written, as the official code would ignore it and compute other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import build
from longscan.checkpoints.formats.official import FIELDS, official
from longscan.errors import LongscanError
from longscan.models import Mamba3Config

__all__ = ["OFFICIAL"]

MLP = {"d_intermediate": "d_intermediate"}  # which stands outside of ssm_cfg
# the authors' fields of ssm_cfg -> ours
SSM_CFG = {
    "d_state": "d_state",
    "headdim": "d_head",
    "ngroups": "n_groups",
    "expand": "expand",
    "rope_fraction": "rope_fraction",
    "A_floor": "A_floor",
    "is_outproj_norm": "outproj_norm",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
}
ACTIVATION, RANK, IS_MIMO = "A_activation", "mimo_rank", "is_mimo"
USUAL_RANK = 4
# how kernels divide the work, and what the official code ignores
IDLE = ("chunk_size", "fuse_pregate_headwise_norm", "dropout")


def _read(raw: Mapping[str, Any]) -> Mamba3Config:
    """Return the Config of the authors' fields, those of ssm_cfg among them."""
    is_mimo, rank = raw.get(IS_MIMO, False), raw.get(RANK, USUAL_RANK)
    if not isinstance(is_mimo, bool):
        raise LongscanError(f"{IS_MIMO}: expected true or false, got {is_mimo!r}.")
    if type(rank) is not int or rank < 1:  # checked in SISO too, which has no use for it
        raise LongscanError(f"{RANK}: expected 1 or more, got {rank!r}.")
    names = {**FIELDS, **MLP, **SSM_CFG, RANK: RANK, ACTIVATION: ACTIVATION}
    fields = {name: raw[name] for name in names if name in raw}
    return build(Mamba3Config, {**fields, RANK: rank if is_mimo else None}, names)


def _write(config: Mamba3Config) -> dict[str, Any]:
    """Return ssm_cfg."""
    usual = Mamba3Config(d_model=config.d_head, n_layers=1, vocab_size=1, d_head=config.d_head)
    if config.A_activation != usual.A_activation:
        raise LongscanError(
            f"the official layout has no field for A_activation = {config.A_activation!r} (it means "
            f"{usual.A_activation!r}): use the Hugging Face layout."
        )
    fields = {
        theirs: getattr(config, ours)
        for theirs, ours in SSM_CFG.items()
        if ours == "d_head" or getattr(config, ours) != getattr(usual, ours)
    }
    return fields if config.mimo_rank is None else {**fields, IS_MIMO: True, RANK: config.mimo_rank}


OFFICIAL = official("Mamba3", _read, _write, (*SSM_CFG, RANK, IS_MIMO, ACTIVATION), IDLE, MLP)
