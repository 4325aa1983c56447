"""Fields of config.json that several families of hybrids have, read with care: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import check_fields
from longscan.errors import LongscanError
from longscan.models import HybridConfig
from longscan.models.hybrid_config import MAX_LAYERS

__all__ = [
    "LAYERS",
    "MAMBA",
    "MAMBA_MISSING",
    "MAX_LAYERS",
    "dt_limit",
    "layer_letters",
    "rotation",
    "ssm_widths",
    "whole",
    "written_limit",
]

INFINITE = ("Infinity", "inf", float("inf"))  # as files have it: JSON has no number for it

# of Mamba-2, in most families
MAMBA = {
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_n_groups": "n_ssm_groups",
    "mamba_conv_bias": "conv_bias",
}
MAMBA_MISSING: dict[str, Any] = {"mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False}
LAYERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}


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


def dt_limit(fields: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """Return the least and largest time step, None if there is no largest; None if there is no limit.

    Args:
        fields: theirs; infinity is written in several ways.

    Raises:
        LongscanError: they are no two numbers.
    """
    limit = fields.get("time_step_limit")
    if limit is None:
        return None
    numbers: list[float | None] = []
    for value in limit if isinstance(limit, list) else []:
        value = value.get("__float__") if isinstance(value, dict) else value
        if value in INFINITE or value is None:
            numbers.append(None)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append(float(value))
    if len(numbers) != 2 or len(limit) != 2 or numbers[0] is None:
        raise LongscanError(f"time_step_limit: expected two numbers, got {limit!r}.")
    return None if numbers == [0, None] else (numbers[0], numbers[1])


def written_limit(config: HybridConfig) -> dict[str, Any]:
    """Return the field of the time steps; missing, it is no limit.

    Args:
        config: ours.
    """
    if config.dt_limit is None:
        return {}
    least, largest = config.dt_limit
    return {"time_step_limit": [least, {"__float__": "Infinity"} if largest is None else largest]}


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
        stated = {} if fields.get(name) is None else fields[name]
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
