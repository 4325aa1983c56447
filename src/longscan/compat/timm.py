"""VMamba, Vim and VideoMamba in timm's registry.

    from longscan.compat.timm import register
    register()
    timm.create_model("vmamba_tiny_s1l8", num_classes=10, features_only=True)

The models are those of longscan with timm's interface: a tensor has the same name in both, and files of the
authors load too. No weights are downloaded: timm's own arguments name a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from longscan.compat.timm_models import CLASSES, TimmModel, filter_weights, side
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models import MODELS
from longscan.models.common.entry import ModelEntry
from longscan.models.common.vision import VisionConfig, VisionModel

__all__ = ["names", "register"]

SOURCES = ("file", "state_dict", "url", "hf_hub_id")  # of weights, in timm's pretrained_cfg


def names() -> list[str]:
    """Return the names that `register` adds: all published sizes of image models."""
    return [name for name, _, _ in _published()]


def register(timm: Any = None) -> None:
    """Add the models to timm's registry; a second call changes nothing.

    Args:
        timm: the package; None imports it.

    Raises:
        LongscanError: it is missing, or does not import.
    """
    models = (_imported() if timm is None else timm).models
    new = [each for each in _published() if not models.is_model(each[0])]
    cfgs = models.generate_default_cfgs({name: _default_cfg(entry, fields) for name, entry, fields in new})
    globals().setdefault("default_cfgs", {}).update(cfgs)  # where timm's decorator looks
    for name, entry, fields in new:
        models.register_model(_entry_point(name, entry, fields, models.build_model_with_cfg))


def _imported() -> Any:
    """Return timm, whose import brings torchvision, which needs its own version of torch."""
    try:
        return require("timm", "models in timm's registry")
    except LongscanError:
        raise
    except Exception as error:
        raise LongscanError(
            f"timm is installed and does not import ({error}). Install the torchvision of torch "
            f"{torch.__version__}."
        ) from error


def _published() -> Iterator[tuple[str, ModelEntry, dict[str, Any]]]:
    """Yield name, entry and fields of the Config of every published image model."""
    for model in CLASSES:
        entry = MODELS[model]
        for name, fields in entry.presets.items():
            if name != "tiny" and not fields.get("n_frames"):
                yield name, entry, fields


def _default_cfg(entry: ModelEntry, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a model, without weights."""
    config = cast(VisionConfig, entry.config(**fields))
    staged = entry.name == "vmamba"
    return {
        "num_classes": config.n_classes,
        "input_size": (config.in_channels, config.image_size, config.image_size),
        "fixed_input_size": not staged,  # learned positions
        "pool_size": (7, 7) if staged else None,
        "crop_pct": config.crop,
        "interpolation": "bicubic",
        "mean": config.mean,
        "std": config.std,
        "first_conv": "patch_embed.0" if staged else "patch_embed.proj",
        "classifier": cast(type[VisionModel], entry.cls).head_name,
        "paper_ids": f"arXiv:{entry.arxiv}",
        "paper_name": entry.paper,
    }


def _entry_point(
    name: str, entry: ModelEntry, fields: Mapping[str, Any], build: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """Return the function that timm calls to create a model, under its name."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and not _source(kwargs):
            raise LongscanError(
                f"{name}: no weights are downloaded. Expected a file: checkpoint_path=FILE without "
                'pretrained, or pretrained=True with pretrained_cfg_overlay={"file": FILE}; add '
                '"custom_load": True there for a file of the authors, or a directory of longscan.'
            )
        make = functools.partial(_make, entry, fields)
        indices: Any = tuple(range(4)) if entry.name == "vmamba" else 3
        features = {"out_indices": indices, "feature_cls": "getter"}
        return build(
            make, name, pretrained, feature_cfg=features, pretrained_filter_fn=filter_weights, **kwargs
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Return {name} of {entry.paper} (arXiv {entry.arxiv})."
    globals()[name] = create
    return create


def _source(kwargs: Mapping[str, Any]) -> bool:
    """Return whether timm's arguments say where weights are."""
    given = (kwargs.get("pretrained_cfg_overlay"), kwargs.get("pretrained_cfg"))
    fields = [each if isinstance(each, Mapping) else getattr(each, "__dict__", {}) for each in given]
    return any(each.get(source) for each in fields for source in SOURCES)


def _make(
    entry: ModelEntry,
    preset: Mapping[str, Any],
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | Sequence[int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> TimmModel:
    """Return a model; options are fields of its Config."""
    fields = {**preset, **options, "n_classes": num_classes or 1, "in_channels": in_chans}
    if in_chans != 3:  # whose statistics nobody knows
        fields = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans, **fields}
    if img_size is not None:
        fields["image_size"] = side(img_size)
    if drop_path_rate is not None:
        fields["drop_path"] = drop_path_rate
    config = cast(VisionConfig, entry.config.from_dict(fields))
    return CLASSES[entry.name](config, num_classes, drop_rate, global_pool).to(device, dtype)
