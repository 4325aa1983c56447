"""Files of Vim and VideoMamba: the model and its sizes from names and shapes alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.checkpoints.formats import BARE
from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, Model
from longscan.models.videomamba import PRESETS

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
    "videomamba_t16_k400_f8_res224.pth": ("videomamba", "videomamba_tiny_f8"),
    "videomamba_s16_k400_f16_res224.pth": ("videomamba", "videomamba_small_f16"),
    "videomamba_m16_k400_f16_res224.pth": ("videomamba", "videomamba_middle_f16"),
}
SMALL = {"d_model": 16, "n_layers": 2, "patch_size": 4, "image_size": 16, "n_classes": 5, "d_state": 4}


def make(name: str, fields: Mapping[str, Any]) -> Model:
    entry = MODELS[name]
    return entry.cls(entry.config.from_dict({**SMALL, **fields}), torch.Generator().manual_seed(3)).eval()


def write(file: Path, tensors: Mapping[str, Any]) -> Path:
    torch.save(dict(tensors), file)
    return file


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_files_say_which_model_they_hold(file: str) -> None:
    name, preset = PUBLISHED[file]
    entry = MODELS[name]
    config = entry.config.from_dict(entry.presets[preset])
    with torch.device("meta"):
        stored = entry.cls(config).state_dict()
    assert BARE[name].matches(stored)
    assert BARE[name].infer(stored) == config


@pytest.mark.parametrize("image_size", [448, 576])
def test_files_of_larger_images(image_size: int) -> None:
    config = MODELS["videomamba"].config.from_dict({**PRESETS["videomamba_tiny"], "image_size": image_size})
    with torch.device("meta"):
        stored = MODELS["videomamba"].cls(config).state_dict()
    assert BARE["videomamba"].infer(stored) == config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"class_token": "double"},
        {"class_token": "none"},
        {"bidirectional": "v1", "conv_bias": False},
        {"bidirectional": "none", "bias": True, "expand": 3},
        {"layer_scale": 1.0, "dt_rank": 3, "d_conv": 3},
        {"in_channels": 2, "mean": [0.0, 0.0], "std": [1.0, 1.0]},
        {"image_size": 224, "patch_size": 32, "stride": 16},
    ],
    ids=str,
)
def test_every_vim_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make("vim", fields)
    stored = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    stored |= {"module.rope.freqs_cos": torch.ones(3), "module.rope.freqs_sin": torch.ones(3)}
    again = load(write(tmp_path / "a.pth", stored), "image")
    assert again.config == model.config
    images = torch.randn(2, fields.get("in_channels", 3), 33, 41)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("fields", [{}, {"n_frames": 4}, {"n_frames": 6, "tubelet": 2}], ids=str)
def test_every_videomamba_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make("videomamba", fields)
    stored = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    stored["backbone.norm.weight"] = stored.pop("backbone.norm_f.weight")  # as pre-training calls it
    for idle in ("distill_head.0.bias", "clip_decoder.0.head.bias", "clip_teacher.proj", "pool_norm.bias"):
        stored[f"backbone.{idle}"] = torch.ones(3)
    again = load(write(tmp_path / "a.pth", stored), "image")
    assert again.config == model.config
    images = torch.randn(2, 3, *((4, 21, 18) if fields else (21, 18)))
    assert torch.equal(again(images), model(images))


def test_the_weights_that_were_evaluated_are_taken(tmp_path: Path) -> None:
    """Vim's accuracies are those of "model", not of the averaged weights beside it."""
    model, averaged = make("vim", {}), make("vim", {"drop_path": 0.0})
    with torch.no_grad():
        averaged.head.bias += 1
    run = {"model": model.state_dict(), "model_ema": averaged.state_dict(), "epoch": 3}
    file = write(tmp_path / "vim_t.pth", {**run, "args": argparse.Namespace(model="vim_tiny", lr=0.1)})
    with pytest.warns(UserWarning, match="loads the weights in 'model', not 'model_ema'"):
        assert load(file, "image").fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vim", {"class_token": "none"}),
        ("vim", {"bidirectional": "v1"}),
        ("vim", {"layer_scale": 1.0}),
        ("videomamba", {"n_frames": 2}),
        ("videomamba", {"n_frames": 2, "tubelet": 2}),
    ],
)
def test_what_only_one_of_them_has_decides(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    for file in ("weights.pth", "vim.pth", "videomamba.pth"):
        found = load(write(tmp_path / file, make(name, fields).state_dict()), "image")
        assert type(found) is MODELS[name].cls


@pytest.mark.parametrize("name", ["vim", "videomamba"])
def test_the_name_of_the_file_decides_between_models_that_look_alike(name: str, tmp_path: Path) -> None:
    model = make(name, {})
    for file in (f"{name}_t16.pth", f"{name.upper()}-tiny.pth", f"my.{name}.pth"):
        found = load(write(tmp_path / file, model.state_dict()), "image")
        assert type(found) is type(model)
        assert found.fingerprint() == model.fingerprint()
    for file in ("weights.pth", "vim_or_videomamba.pth", "vimmm.pth"):
        message = rf"those of a vim or a videomamba, .* --model vim .* rename it: .* vim_{file}"
        with pytest.raises(LongscanError, match=message):
            load(write(tmp_path / file, model.state_dict()), "image")


@pytest.mark.parametrize("name", ["vim", "videomamba"])
def test_a_user_decides_between_models_that_look_alike(
    name: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    model = make(name, {})
    for file in ("best.pth", "vim.pth", "videomamba.pth"):  # before its name
        path = write(tmp_path / file, model.state_dict())
        assert type(load(path, "image", model=name)) is type(model)
        assert type(convert(path, tmp_path / f"{file}-directory", model=name)) is type(model)
    done = cli("convert", tmp_path / "best.pth", tmp_path / "n", "--model", name)
    assert done.code == 0, done.err
    assert type(load(tmp_path / "n", "image")) is type(model)
    with pytest.raises(UsageError, match=f"n is a {name}, got 'vmamba'. Leave it out"):
        load(tmp_path / "n", "image", model="vmamba")
    with pytest.raises(UsageError, match="model: expected kind 'image'"):
        load(tmp_path / "n", model=name)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "head.weight is missing: this file holds an encoder"),
        ({"layers.0.mixer.A_log": None}, "A_log is missing: the file is not that of a whole model"),
        ({"pos_embed": torch.ones(1, 16, 16)}, "expected the positions of a square of patches, got 15"),
        ({"pos_embed": torch.ones(17, 16)}, "pos_embed: expected 3 axes"),
        ({"pos_embed": torch.ones(1, 1, 16)}, "expected the positions of a square of patches, got 0"),
        ({"layers.0.mixer.A_log": torch.ones(32, 0)}, "A_log: expected 2 axes, none of them empty"),
        ({"layers.1.mixer.D": None}, "missing: layers.1.mixer.D"),
        ({"layers.7.mixer.D": torch.ones(32)}, "unexpected: layers.7.mixer.D"),
        ({"head.bias": torch.ones(4)}, r"of another shape: head.bias \(4,\) instead of \(5,\)"),
    ],
)
def test_files_that_are_not_whole(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    stored = {**make("vim", {}).state_dict(), **change}
    file = write(
        tmp_path / "vim.pth", {name: tensor for name, tensor in stored.items() if tensor is not None}
    )
    with pytest.raises(LongscanError, match=message):
        load(file, "image")


def test_a_video_file_that_is_not_whole(tmp_path: Path) -> None:
    stored = {**make("videomamba", {"n_frames": 2}).state_dict(), "temporal_pos_embedding": torch.ones(4)}
    with pytest.raises(LongscanError, match="temporal_pos_embedding: expected 3 axes"):
        load(write(tmp_path / "a.pth", stored), "image")
    stored = {**make("vim", {}).state_dict(), "patch_embed.proj.weight": torch.ones(16, 48)}
    with pytest.raises(LongscanError, match=r"patch_embed.proj.weight: expected 4 or 5 axes"):
        load(write(tmp_path / "vim.pth", stored), "image")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vim", {"labels": list("abcde"), "halve": False}),
        ("videomamba", {"n_frames": 4, "scan_order": "temporal"}),
    ],
)
def test_a_directory_and_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(name, fields)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", "image")
    assert (again.config, again.fingerprint()) == (model.config, model.fingerprint())
