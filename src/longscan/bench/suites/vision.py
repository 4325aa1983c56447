"""`longscan bench vision`: images per second, by resolution and batch size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.models import MODELS

__all__ = ["run"]

CASES = ((224, 1), (224, 8), (512, 1), (768, 1))  # (pixels, batch)
QUICK_CASES = ((32, 1), (64, 1))
VMAMBA, VIM, VIT, SWIN, CONVNEXT = "VMamba-T", "Vim-S", "ViT-S", "Swin-T", "ConvNeXt-T"
PRESETS = {VMAMBA: ("vmamba", "vmamba_tiny_s1l8"), VIM: ("vim", "vim_small")}
QUICK_PRESETS = {VMAMBA: ("vmamba", "tiny"), VIM: ("vim", "tiny")}
# transformers' config and its fields: the sizes of the papers
VIT_FIELDS = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    VIT: ("ViTConfig", VIT_FIELDS),
    SWIN: ("SwinConfig", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
    CONVNEXT: ("ConvNextConfig", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}),
}
QUICK_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    VIT: (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "patch_size": 4,
        },
    ),
    SWIN: ("SwinConfig", {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}),
    CONVNEXT: ("ConvNextConfig", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}),
}
LAYERS, LOOP = "{}: its linear layers and convolutions alone", "{}: its scans alone, torch loop"


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of image classifiers.

    Args:
        settings: of the benchmark.
        quick: tiny models and images, to see that it works.
    """
    report = Report(suite="vision")
    models = (QUICK_PRESETS, QUICK_PEERS) if quick else (PRESETS, PEERS)
    seconds: dict[str, list[tuple[int, float]]] = {}
    for pixels, batch in QUICK_CASES if quick else CASES:
        case = f"{pixels} × {pixels}, batch {batch}"
        results = settings.compare(case, _contenders(*models, pixels, batch), settings)
        report.add(case, results.values(), batch, "images/s", pixels=pixels, batch=batch)
        report.ratios += _ratios(case, results, quick)
        for name, result in results.items():
            if batch == 1 and result.seconds:
                seconds.setdefault(name, []).append((pixels**2, result.median))
    for name in (VMAMBA, VIM, VIT):
        if len(seconds.get(name, ())) > 1:
            sizes, times = np.log(np.array(seconds[name])).T
            slope = float(np.polyfit(sizes, times, 1)[0])
            report.ratios.append(
                Ratio(what=f"{name}: time grows as pixels to the power of", measured=slope, unit="")
            )
    report.tables = [rate_table("images per second (min–max)", report.rows, rate)]
    report.notes.append(
        "Random weights, float32, inference. The loop is one layer of each kind times their number, without "
        "the rest of the model: a lower bound of what the official code needs without CUDA."
    )
    return report


def _contenders(
    presets: dict[str, tuple[str, str]], peers: dict[str, tuple[str, dict[str, Any]]], pixels: int, batch: int
) -> list[Contender]:
    """Return the contenders of a case."""
    home, size = "longscan.bench.contenders.vision", {"pixels": pixels, "batch": batch}
    contenders = []
    for name, (model, preset) in presets.items():
        here = {"model": model, "preset": preset, **size}
        scans = {"scans": _scans(model, preset, pixels, batch)}
        contenders += [
            Contender(name=name, job=f"{home}:classify", arguments=here),
            Contender(name=LAYERS.format(name), job=f"{home}:layers", arguments=here),
        ]
        if pixels <= 224 and batch == 1:
            loop = Contender(
                name=LOOP.format(name), job=f"{home}:loops", arguments=scans, peer=True, patience=5.0
            )
            contenders.append(loop)
    for name, (config, fields) in peers.items():
        sized = fields | ({} if name == CONVNEXT else {"image_size": pixels})
        contenders.append(
            Contender(
                name=name,
                job=f"{home}:transformers",
                arguments={"config": config, "fields": sized, **size},
                packages=("transformers",),
                peer=True,
            )
        )
    return contenders


def _scans(model: str, preset: str, pixels: int, batch: int) -> list[list[int]]:
    """Return the sizes of the scans of a model; see `loops`."""
    config = MODELS[model].config(**MODELS[model].presets[preset])
    values = config.to_dict()
    if model == "vim":
        stride = values["stride"] or values["patch_size"]
        n = ((pixels - values["patch_size"]) // stride + 1) ** 2 + 1
        return [[values["n_layers"], batch, n, 2, values["expand"] * values["d_model"], values["d_state"]]]
    sides = [math.ceil(pixels / (values["patch_size"] * 2**i)) for i in range(len(values["d_model"]))]
    stages = zip(values["n_blocks"], sides, values["d_model"], strict=True)
    return [
        [count, batch, side**2, 4, int(values["expand"] * width), values["d_state"]]
        for count, side, width in stages
    ]


def _ratios(case: str, results: dict[str, Measurement], quick: bool) -> list[Ratio]:
    """Return the ratios of one case."""
    goals = {} if quick else {(VIM, LOOP.format(VIM)): "≥ 10 ×", (VMAMBA, SWIN): "≥ 1 ×"}
    pairs = [(name, LOOP.format(name)) for name in (VMAMBA, VIM)]
    pairs += [(VMAMBA, SWIN), (VMAMBA, CONVNEXT), (VIM, VIT)]
    ratios = [
        Ratio(
            what=f"{case}: {ours} faster than {other}",
            measured=faster(results, ours, other),
            goal=goals.get((ours, other), ""),
        )
        for ours, other in pairs
        if other in results
    ]
    for name in (VMAMBA, VIM):
        what = f"{case}: {name}, share of the speed of its linear layers and convolutions"
        ratios.append(Ratio(what=what, measured=faster(results, name, LAYERS.format(name)), percent=True))
    return ratios
