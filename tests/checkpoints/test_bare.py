"""Files of tensors without config.json, as authors of vision models publish them."""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longscan.checkpoints.load import load, load_bert
from longscan.checkpoints.save import convert, quantize, save
from longscan.core.files import read_json
from longscan.errors import LongscanError, UsageError
from longscan.models import VMamba, VMambaConfig
from longscan.models.vmamba import PRESETS
from model_directories import edit, make, refusal

VANILLA: dict[str, Any] = {
    **{"d_state": 3, "expand": 2.0, "gate": "silu", "conv_bias": True, "mlp_ratio": 0.0},
    **{"patch_embed": "v1", "downsample": "v1", "patch_size": 3},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v2": {"d_model": (16, 32, 64), "n_blocks": (1, 3, 2), "n_classes": 7},
    "vanilla": {**VANILLA, "d_model": (16, 24), "n_blocks": (2, 1)},
    "conv2": {"downsample": "v2", "dt_rank": 3, "d_state": 2, "patch_size": 8, "mlp_ratio": 2.5},
    "no-conv": {"d_conv": 1, "expand": 1.5, "in_channels": 1, "mean": (0.0,), "std": (1.0,)},
    "large-conv": {"d_conv": 5, "d_model": (16,), "n_blocks": (1,), "conv_bias": True},
}
configs = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
# all but the tests of this warning
pytestmark = pytest.mark.filterwarnings("ignore:.*do not say the image size")
SIZES = {"drop_path": 0.1, "image_size": 224}  # not in a file; the defaults


def build(**fields: Any) -> VMamba:
    config = VMambaConfig.from_dict({**PRESETS["tiny"], **SIZES, **fields})
    return VMamba(config, torch.Generator().manual_seed(0)).eval()


def same(a: VMamba, b: Any) -> None:
    assert a.config == b.config
    assert a.fingerprint() == b.fingerprint()
    assert not b.training


@pytest.fixture
def model() -> VMamba:
    return build()


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# what is loaded


@configs
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_the_config_follows_from_names_and_shapes(
    fields: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    model, path = build(**fields), tmp_path / f"anything{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    same(model, load(path, "image"))
    same(model, load(str(path), "image"))


def test_ratios_are_any_that_give_the_widths(tmp_path: Path) -> None:
    model = build(expand=1.3, mlp_ratio=2.7, d_model=(14, 36))
    loaded = load(written(tmp_path / "m.pth", model.state_dict()), "image")
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_base_s2l15", "vanilla_vmamba_tiny"])
def test_the_published_configurations(name: str) -> None:
    from longscan.checkpoints.formats import BARE

    config = VMambaConfig.from_dict({**PRESETS[name], "drop_path": 0.1})
    with torch.device("meta"):
        tensors = VMamba(config).state_dict()
    (form,) = (form for form in BARE.values() if form.matches(tensors))
    assert form.infer(form.rename(tensors)) == config


def newer(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The names of the root file, and convolutions for linear maps."""
    if name.endswith(("x_proj_weight", "dt_projs_weight")):
        return name.replace("_weight", ".weight"), tensor.flatten(0, 1)[..., None, None]
    linear = name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"))
    return name, tensor[..., None, None] if linear else tensor


def older(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The names of the first version."""
    name = re.sub(r"^classifier\.", "", name.replace(".op.", ".self_attention."))
    name = name.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
    return re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", name), tensor


@pytest.mark.parametrize(
    ("rename", "fields"),
    [(newer, {}), (older, VANILLA), (newer, VANILLA)],
    ids=["newer", "older", "newer-v0"],
)
def test_other_names_and_shapes(
    rename: Callable[[str, Tensor], tuple[str, Tensor]], fields: dict[str, Any], tmp_path: Path
) -> None:
    model = build(**fields)
    renamed = dict(rename(name, tensor) for name, tensor in model.state_dict().items())
    assert renamed.keys() != model.state_dict().keys()
    same(model, load(written(tmp_path / "old.pth", renamed), "image"))


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "module.encoder.", "_orig_mod."])
def test_prefixes_of_wrappers_are_dropped(model: VMamba, prefix: str, tmp_path: Path) -> None:
    wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    same(model, load(written(tmp_path / "m.pth", wrapped), "image"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_dtype(model: VMamba, dtype: torch.dtype, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", {k: v.to(dtype) for k, v in model.state_dict().items()})
    assert load(path, "image").dtype == torch.float32
    kept = load(path, "image", dtype=None)
    assert kept.dtype == dtype
    assert kept.layers[0].blocks[0].op.A_logs.dtype == torch.float32


# checkpoints of a training run


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type[dict[str, Any]]:
    """A stand-in of yacs' class, which runs code when it is unpickled with its module at hand."""

    class CfgNode(dict[str, Any]):
        def __setstate__(self, state: Any) -> None:
            raise AssertionError("the class was run")

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


def run_of(model: VMamba, config: Any) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"milestones": collections.Counter([3, 4])},
        "max_accuracy": np.float64(82.6),
        "scaler": {},
        "epoch": 264,
        "config": config,
        "args": argparse.Namespace(output=Path("out"), nested=argparse.Namespace(lr=1e-3)),
    }


def test_settings_of_a_run_are_skipped(model: VMamba, yacs: Any, tmp_path: Path) -> None:
    config = yacs(MODEL=yacs(VSSM=yacs(DEPTHS=[1, 2])))
    config.__dict__["__immutable__"] = True
    path = written(tmp_path / "run.pth", run_of(model, config))
    same(model, load(path, "image"))
    del sys.modules["yacs.config"], sys.modules["yacs"]
    same(model, load(path, "image"))
    assert "yacs" not in sys.modules


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_ema"])
def test_the_only_entry_is_taken_in_silence(model: VMamba, entry: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", {entry: model.state_dict(), "epoch": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model, load(path, "image", image_size=224))


def test_of_several_entries_the_published_one_is_taken(model: VMamba, tmp_path: Path) -> None:
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = written(tmp_path / "m.pth", {"model_ema": average, "model": model.state_dict()})
    with pytest.warns(UserWarning, match=r"loads the weights in 'model', not 'model_ema'"):
        same(model, load(path, "image"))


def test_a_size_that_the_tensors_do_not_say_is_said(
    model: VMamba, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = written(tmp_path / "m.pth", model.state_dict())
    message = r"m.pth: its tensors do not say the image size, which is taken as 224, .* --image-size N"
    for use in (lambda: load(path, "image"), lambda: convert(path, tmp_path / "guessed")):
        with pytest.warns(UserWarning, match=message) as said:
            assert use().config.image_size == 224
        assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path, "image", image_size=48).config.image_size == 48
        assert convert(path, tmp_path / "m", image_size=48).config.image_size == 48
        assert cli("convert", path, tmp_path / "n", "--image-size", 40).code == 0
        assert load(tmp_path / "m", "image").config.image_size == 48
        assert load(tmp_path / "n", "image").config.image_size == 40
    with pytest.raises(UsageError, match="image_size: expected 1 or more, got 0"):
        load(path, "image", image_size=0)
    with pytest.raises(UsageError, match="image_size: expected kind 'image'"):
        load(path, image_size=8)  # type: ignore[call-overload]
    save(make(), tmp_path / "mamba")
    failed = cli("convert", tmp_path / "mamba", tmp_path / "o", "--image-size", 8)
    assert (failed.code, "is no image classifier" in failed.err) == (2, True)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("key", ["config", "model"])
def test_code_is_refused(model: VMamba, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "m.pth", {"model": model.state_dict(), key: Hostile()})
    assert "contains code" in refusal(path, kind="image")
    assert not Path("hostile").exists()


def test_a_settings_object_is_no_tensor(model: VMamba, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", {**model.state_dict(), "args": argparse.Namespace(a=1)})
    assert "expected a dictionary of tensors by name" in refusal(path, kind="image")


def test_a_directory_may_hold_no_settings(model: VMamba, tmp_path: Path) -> None:
    """What is skipped in a bare file stays refused beside a config.json."""
    save(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "m" / "pytorch_model.bin")
    assert "contains code (argparse.Namespace)" in refusal(tmp_path / "m", kind="image")


# what is refused


def test_all_that_does_not_fit_is_one_error(model: VMamba, tmp_path: Path) -> None:
    tensors = model.state_dict()
    del tensors["layers.1.blocks.1.op.Ds"]
    tensors["pos_embed"] = torch.zeros(1, 16, 8, 8)
    tensors["layers.1.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    message = refusal(written(tmp_path / "m.pth", {"state_dict": tensors}), kind="image")
    for part in (
        "not those of the vmamba that the names and shapes in 'state_dict' describe",
        "1 missing: layers.1.blocks.1.op.Ds",
        "1 unexpected: pos_embed",
        "1 of another shape: layers.1.blocks.0.mlp.fc1.bias (3,) instead of (128,)",
    ):
        assert part in message


def test_a_detection_backbone_is_no_classifier(model: VMamba, tmp_path: Path) -> None:
    tensors = {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith("classifier")}
    tensors["backbone.outnorm0.weight"] = torch.ones(16)
    message = refusal(written(tmp_path / "m.pth", {"state_dict": tensors}), kind="image")
    assert "expected classifier.head.weight" in message


@pytest.mark.parametrize("damage", ["norm.weight", "op.A_logs", "op.out_norm.weight", "op.in_proj.weight"])
def test_sizes_that_nothing_tells(model: VMamba, damage: str, tmp_path: Path) -> None:
    flat = {k: torch.tensor(1.0) if k.endswith(damage) else v for k, v in model.state_dict().items()}
    assert "which gives a size" in refusal(written(tmp_path / "flat.pth", flat), kind="image")
    less = {k: v for k, v in model.state_dict().items() if not k.endswith(damage)}
    assert "got none" in refusal(written(tmp_path / "less.pth", less), kind="image")


def test_absurd_numbers_of_blocks(model: VMamba, tmp_path: Path) -> None:
    tensors = model.state_dict()
    tensors["layers.0.blocks.999999999999.norm.weight"] = torch.ones(16)
    assert "tensors are there" in refusal(written(tmp_path / "m.pth", tensors), kind="image")
    tensors["layers.7.blocks.0.norm.weight"] = torch.ones(16)
    assert "expected the tensors of stages" in refusal(written(tmp_path / "n.pth", tensors), kind="image")


def test_a_tensor_under_two_names(model: VMamba, tmp_path: Path) -> None:
    tensors = model.state_dict()
    tensors["module.head.bias"] = tensors["classifier.head.bias"] + 1
    assert "both hold different numbers" in refusal(written(tmp_path / "m.pth", tensors), kind="image")


@pytest.mark.parametrize("prefixes", [("", "module."), ("encoder.", "backbone.")])
def test_prefixes_do_not_make_two_tensors_one(
    model: VMamba, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    first, second = prefixes
    tensors = {f"{first}{name}": tensor for name, tensor in model.state_dict().items()}
    tensors[f"{second}classifier.head.bias"] = torch.zeros(7)
    file = written(tmp_path / "two.pth", tensors)
    with pytest.raises(LongscanError, match="are two tensors of one name"):
        load(file, "image")


def test_weights_that_are_not_finite(model: VMamba, tmp_path: Path) -> None:
    tensors = model.state_dict()
    tensors["classifier.head.bias"][1] = torch.nan
    file = written(tmp_path / "nan.pth", tensors)
    with pytest.raises(LongscanError, match=r"classifier\.head\.bias holds NaN or infinity"):
        load(file, "image")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(LongscanError, match="expected a file or a directory"):
        load(tmp_path / "pipe.pth", "image")


def test_whole_numbers_are_no_weights(model: VMamba, tmp_path: Path) -> None:
    tensors = {**model.state_dict(), "counter": torch.tensor(3)}
    message = refusal(written(tmp_path / "m.pth", tensors), kind="image")
    assert "counter: expected float32, float16 or bfloat16, got int64" in message


def test_files_of_other_models(tmp_path: Path) -> None:
    path = written(tmp_path / "pytorch_model.bin", make().state_dict())
    for kind in ("image", "language", "translation", "masked", "sequence"):
        message = refusal(path, kind=kind)
        assert "known without a config.json: vmamba" in message
        assert "name the directory that holds both" in message


def test_other_kinds(model: VMamba, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", model.state_dict())
    save(model, tmp_path / "m")
    for source in (path, tmp_path / "m"):
        assert "is a vmamba, an image model; expected a language model. Verbs for it: classify." in refusal(
            source
        )
        with pytest.raises(LongscanError, match="expected a masked language model"):
            load_bert(source)
        with pytest.raises(LongscanError, match="expected a language model"):
            quantize(source, tmp_path / "q", "int8")
    save(make(), tmp_path / "mamba")
    assert "a language model; expected an image classifier" in refusal(tmp_path / "mamba", kind="image")
    with pytest.raises(UsageError, match="tokenizer"):
        load(path, "image", tokenizer="x")  # type: ignore[call-overload]


def test_random_damage_is_never_unforeseen(model: VMamba, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pth", run_of(model, argparse.Namespace(a=1)))
    data, rng = path.read_bytes(), random.Random(0)
    end = data.index(b"data.pkl") + 20_000
    for _ in range(100):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            bad[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(bad if rng.random() < 0.8 else bad[: rng.randrange(len(bad))])
        try:
            load(path, "image")
        except LongscanError:
            continue


# saved again


@configs
def test_a_directory_and_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build(**{**fields, "labels": [str(i) for i in range(fields.get("n_classes", 10))]})
    save(model, tmp_path / "m")
    raw = read_json(tmp_path / "m" / "config.json")
    assert (raw["model_type"], raw["longscan"], raw["dtype"]) == ("vmamba", 1, "float32")
    assert raw["n_blocks"] == list(model.config.n_blocks)
    same(model, load(tmp_path / "m", "image"))


def test_a_directory_that_is_not_what_it_says(model: VMamba, tmp_path: Path) -> None:
    save(model, tmp_path / "m")
    edit(tmp_path / "m", n_blocks=[1, 1])
    assert "the weights are not those that config.json describes" in refusal(tmp_path / "m", kind="image")
    edit(tmp_path / "m", n_blocks=[1, 10**12])
    assert "tensors are there" in refusal(tmp_path / "m", kind="image")
    edit(tmp_path / "m", n_blocks=[1, 2], d_model=[16, 10**12])
    assert "are impossible" in refusal(tmp_path / "m", kind="image")


def test_conversion(model: VMamba, tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = written(tmp_path / "m.pth", {"model": model.state_dict()})
    same(model, convert(path, tmp_path / "m"))
    same(model, load(tmp_path / "m", "image"))
    narrow = convert(tmp_path / "m", tmp_path / "half", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.fingerprint() == load(tmp_path / "half", "image", dtype=None).fingerprint()
    done = cli("convert", path, tmp_path / "n")
    assert done.code == 0
    assert re.search(r"n · longscan layout · 33,930 parameters · float32 · [\d,]+ bytes\n$", done.out)
    same(model, load(tmp_path / "n", "image"))
    for refused in (("--to", "official"), ("--tokenizer", "x")):
        failed = cli("convert", path, tmp_path / "o", *refused)
        assert failed.code == 1
        assert "error" in failed.err
        assert not (tmp_path / "o").exists()
    with pytest.raises(LongscanError, match="image classifier"):
        convert(path, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"out.pth: expected the name of a directory"):
        convert(path, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vmamba", "a model, .* --model vmamba"),
        ("vim_tiny", "a preset of vim, .* --model vim --preset vim_tiny"),
    ],
)
def test_names_without_weights(name: str, words: str) -> None:
    with pytest.raises(LongscanError, match=f"{name} is the name of {words}"):
        load(name, "image")


def test_bytes_are_no_input(model: VMamba) -> None:
    with pytest.raises(LongscanError, match="images: expected floats that are normalised, got uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
