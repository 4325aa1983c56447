"""Files of Vim and VideoMamba: the model and its sizes from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.checkpoints.assemble import assemble
from longscan.checkpoints.formats import BARE, find_bare
from longscan.checkpoints.source import Weights
from longscan.errors import LongscanError
from longscan.models import MODELS, Model, videomamba

BY_NAME = {layout.name: layout for layout in BARE}
# as their authors call them
PUBLISHED = {
    "vim_t_midclstok_76p1acc.pth": ("vim", "vim_tiny"),
    "vim_t_midclstok_ft_78p3acc.pth": ("vim", "vim_tiny_stride8"),
    "vim_s_midclstok_80p5acc.pth": ("vim", "vim_small"),
    "vim_s_midclstok_ft_81p6acc.pth": ("vim", "vim_small_stride8"),
    "vim_b_midclstok_81p9acc.pth": ("vim", "vim_base"),
    "videomamba_t16_in1k_res224.pth": ("videomamba", "videomamba_tiny"),
    "videomamba_s16_in1k_res224.pth": ("videomamba", "videomamba_small"),
    "videomamba_m16_in1k_res224.pth": ("videomamba", "videomamba_middle"),
    "videomamba_b16_in1k_res224.pth": ("videomamba", "videomamba_base"),
    "t16_f8.pth": ("videomamba", "videomamba_tiny_f8"),
    "s16_f16.pth": ("videomamba", "videomamba_small_f16"),
    "m16_f16.pth": ("videomamba", "videomamba_middle_f16"),
}
SMALL = {"d_model": 16, "n_layers": 2, "patch_size": 4, "image_size": 16, "n_classes": 5, "d_state": 4}
NO_TRACE = ("drop_path", "labels", "layer_scale", "residual_in_fp32", "halve", "norm_eps", "crop")


def make(name: str, fields: Mapping[str, Any]) -> Model:
    entry = MODELS[name]
    return entry.cls(entry.config.from_dict({**SMALL, **fields}), torch.Generator().manual_seed(3)).eval()


def read(name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {BY_NAME[name].ours(theirs): tensor for theirs, tensor in stored.items()}
    return {ours: tensor for ours, tensor in renamed.items() if ours is not None}


def load(name: str, stored: Mapping[str, Tensor]) -> Model:
    tensors = read(name, stored)
    config = BY_NAME[name].infer(tensors)
    return assemble(Path("some.pth"), MODELS[name].cls, config, Weights(tensors), torch.float32)


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_files_say_which_model_they_hold(file: str) -> None:
    name, preset = PUBLISHED[file]
    entry = MODELS[name]
    config = entry.config.from_dict(entry.presets[preset])
    with torch.device("meta"):
        stored = entry.cls(config).state_dict()
    layout = find_bare(stored, hint=file)
    assert layout.name == name
    assert layout.infer(stored) == config


@pytest.mark.parametrize("image_size", [448, 576])
def test_files_of_larger_images(image_size: int) -> None:
    fields = {**videomamba.PRESETS["videomamba_tiny"], "image_size": image_size}
    config = MODELS["videomamba"].config.from_dict(fields)
    with torch.device("meta"):
        stored = MODELS["videomamba"].cls(config).state_dict()
    assert BY_NAME["videomamba"].infer(stored) == config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"class_token": "double"},
        {"class_token": "none"},
        {"bidirectional": "v1", "conv_bias": False},
        {"bidirectional": "none", "bias": True, "expand": 3},
        {"layer_scale": 0.5, "dt_rank": 3, "d_conv": 3},
        {"in_channels": 2, "mean": [0.0, 0.0], "std": [1.0, 1.0]},
        {"image_size": 224, "patch_size": 32, "stride": 16},
    ],
    ids=str,
)
def test_every_vim_comes_back(fields: dict[str, Any]) -> None:
    model = make("vim", fields)
    stored = {**model.state_dict(), "rope.freqs_cos": torch.ones(3), "rope.freqs_sin": torch.ones(3)}
    again = load("vim", stored)
    changed = {name for name, value in vars(model.config).items() if getattr(again.config, name) != value}
    assert changed <= set(NO_TRACE)
    images = torch.randn(2, fields.get("in_channels", 3), 33, 41)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("fields", [{}, {"n_frames": 4}, {"n_frames": 6, "tubelet": 2}], ids=str)
def test_every_videomamba_comes_back(fields: dict[str, Any]) -> None:
    model = make("videomamba", fields)
    stored = dict(model.state_dict())
    stored["norm.weight"] = stored.pop("norm_f.weight")  # as pre-training calls it
    for idle in (
        "distill_head.0.weight",
        "clip_decoder.0.head.weight",
        "clip_teacher.proj",
        "pool_norm.bias",
    ):
        stored[idle] = torch.ones(3)
    assert find_bare(stored).name == "videomamba"
    again = load("videomamba", stored)
    assert again.config == model.config.replace(drop_path=0.1)
    size = (4, 21, 18) if fields else (21, 18)
    images = torch.randn(2, 3, *size)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("name", "fields", "decided"),
    [
        ("vim", {}, False),
        ("videomamba", {}, False),
        ("vim", {"class_token": "double"}, True),
        ("vim", {"class_token": "none"}, True),
        ("vim", {"bidirectional": "v1"}, True),
        ("vim", {"layer_scale": 0.1}, True),
        ("vim", {"image_size": 224, "patch_size": 16, "stride": 8}, False),
        ("videomamba", {"n_frames": 2}, True),
        ("videomamba", {"n_frames": 2, "tubelet": 2}, True),
    ],
)
def test_what_only_one_of_them_has_decides(name: str, fields: dict[str, Any], decided: bool) -> None:
    stored = make(name, fields).state_dict()
    other = "vim" if name == "videomamba" else "videomamba"
    assert find_bare(stored, name).name == name
    assert find_bare(stored, hint=f"{name}_t16.pth").name == name
    if decided:
        assert find_bare(stored).name == name
        assert find_bare(stored, hint=f"{other}.pth").name == name
        with pytest.raises(LongscanError, match=f"model: expected {name}, as the tensors say, got '{other}'"):
            find_bare(stored, other)
    else:
        assert find_bare(stored, other, hint=f"{name}.pth").name == other
        for hint in ("", "weights.pth", "vim_or_videomamba.pth", "vimmm.pth"):
            with pytest.raises(LongscanError, match=r"may be of vim or videomamba, .* Name the model"):
                find_bare(stored, hint=hint)


def test_tensors_of_another_model() -> None:
    for stored in ({}, make("vim", {}).layers[0].state_dict(), {"pos_embed": torch.ones(1)}):
        with pytest.raises(LongscanError, match="of no model that is known by them alone"):
            find_bare(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "head.weight is missing: this file holds an encoder"),
        ({"layers.0.mixer.A_log": None}, "A_log is missing: the file is not that of a whole model"),
        ({"pos_embed": torch.ones(1, 16, 16)}, "expected the positions of a square of patches, got 15"),
        ({"pos_embed": torch.ones(1, 1, 16)}, "expected the positions of a square of patches, got 0"),
        ({"pos_embed": torch.ones(17, 16)}, "pos_embed: expected 3 axes"),
        ({"layers.0.mixer.A_log": torch.ones(32, 0)}, "A_log: expected 2 axes, none of them empty"),
        ({"layers.1.mixer.D": None}, "missing: layers.1.mixer.D"),
        ({"layers.7.mixer.D": torch.ones(32)}, "unexpected: layers.7.mixer.D"),
        ({"head.bias": torch.ones(4)}, r"of another shape: head.bias \(4,\) instead of \(5,\)"),
    ],
)
def test_files_that_are_not_whole(change: dict[str, Tensor | None], message: str) -> None:
    stored = {**make("vim", {}).state_dict(), **change}
    with pytest.raises(LongscanError, match=message):
        load("vim", {name: tensor for name, tensor in stored.items() if tensor is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_pos_embedding": torch.ones(4)}, "temporal_pos_embedding: expected 3 axes"),
        ({"patch_embed.proj.weight": torch.ones(16, 3, 4, 4)}, "patch_embed.proj.weight: expected 5 axes"),
    ],
)
def test_video_files_that_are_not_whole(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        load("videomamba", {**make("videomamba", {"n_frames": 2}).state_dict(), **change})
