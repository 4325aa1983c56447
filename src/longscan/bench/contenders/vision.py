"""Image classifiers of random weights, ours and others', and what bounds ours. Runs in the workers."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from longscan.bench.worker import Run
from longscan.models import MODELS
from longscan.models.common.vision import VisionModel
from longscan.ops import path_scan_ref

__all__ = ["classify", "layers", "loops", "transformers"]


def classify(model: str, preset: str, pixels: int, batch: int) -> Run:
    """Prepare the logits of random square images.

    Args:
        model: in MODELS.
        preset: its size.
        pixels: height and width.
        batch: images.
    """
    return _forward(_ours(model, preset), pixels, batch)


def transformers(config: str, fields: dict[str, Any], pixels: int, batch: int) -> Run:
    """Prepare the same for an image classifier of transformers.

    Args:
        config: its class, such as "ViTConfig".
        fields: of the config.
        pixels: see `classify`.
        batch: see `classify`.
    """
    library: Any = importlib.import_module("transformers")

    described = getattr(library, config)(**fields, num_labels=1000)
    model = library.AutoModelForImageClassification.from_config(described)
    return _forward(model.eval(), pixels, batch)


def layers(model: str, preset: str, pixels: int, batch: int) -> Run:
    """Prepare the linear layers and convolutions of our model alone, each by its fastest turn.

    Args:
        model: see `classify`.
        preset: see `classify`.
        pixels: see `classify`.
        batch: see `classify`.
    """
    net = _ours(model, preset)
    found: list[tuple[nn.Module, Tensor]] = []
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda layer, x, y: found.append((layer, torch.randn_like(x[0]))))
    _forward(net, pixels, batch)()
    for module in net.modules():
        module._forward_hooks.clear()
    best = [float("inf")] * len(found)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            for i, (layer, x) in enumerate(found):
                begin = time.perf_counter()
                layer(x)
                best[i] = min(best[i], time.perf_counter() - begin)
        return {"seconds": sum(best)}

    return run


def loops(scans: list[list[int]]) -> Run:
    """Prepare the scans of a model as a loop over time in torch: what others run without CUDA.

    Args:
        scans: (layers, batch, positions, paths, channels, state) of each stage; one layer is run.
    """
    stages: list[tuple[int, Any]] = []
    for n_layers, batch, n, n_paths, d_inner, d_state in scans:
        along = (torch.randn(batch, n, n_paths, d_state) for _ in range(2))
        inputs = (torch.randn(batch, n, d_inner), torch.randn(batch, n, n_paths, d_inner))
        A = -torch.rand(n_paths, d_inner, d_state)
        stages.append((n_layers, (*inputs, A, *along, None, None, torch.arange(n).repeat(n_paths, 1))))

    def run() -> dict[str, Any]:
        seconds = 0.0
        with torch.inference_mode():
            for n_layers, inputs in stages:
                begin = time.perf_counter()
                path_scan_ref(*inputs)
                seconds += n_layers * (time.perf_counter() - begin)
        return {"seconds": seconds, "extrapolated": True}

    return run


def _ours(model: str, preset: str) -> VisionModel:
    entry = MODELS[model]
    return cast(VisionModel, entry.cls(entry.config(**entry.presets[preset])).eval())


def _forward(model: Callable[[Tensor], Any], pixels: int, batch: int) -> Run:
    images = torch.randn(batch, 3, pixels, pixels)

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run
