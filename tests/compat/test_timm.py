"""Models of images under timm's interface: with a registry that stands in for timm's, and with timm."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longscan
from longscan.compat import timm as ours
from longscan.compat.timm_models import TimmModel
from longscan.errors import LongscanError
from longscan.models import MODELS

SMALL: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8": {"d_model": (8, 16, 32, 48), "n_blocks": (1, 1, 2, 1)},
    "vim_tiny": {"d_model": 32, "n_layers": 4},
    "videomamba_tiny": {"d_model": 32, "n_layers": 4},
}
WIDTHS = {"vmamba_tiny_s1l8": [8, 16, 32, 48], "vim_tiny": [32] * 4, "videomamba_tiny": [32] * 4}


class FakeModels:
    """The part of timm.models that `register` uses."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}
        self.cfgs: dict[str, Any] = {}

    def is_model(self, name: str) -> bool:
        return name in self.functions

    def generate_default_cfgs(self, cfgs: dict[str, Any]) -> dict[str, Any]:
        self.cfgs |= cfgs
        return cfgs

    def register_model(self, function: Any) -> None:
        assert function.__name__ not in self.functions
        self.functions[function.__name__] = function

    def build_model_with_cfg(
        self, make: Any, name: str, pretrained: bool, feature_cfg: Any, pretrained_filter_fn: Any, **kw: Any
    ) -> nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
            kw.pop(key, None)
        model: nn.Module = make(**kw)
        return model


@pytest.fixture(scope="module")
def models() -> FakeModels:
    fake = FakeModels()
    ours.register(SimpleNamespace(models=fake))
    ours.register(SimpleNamespace(models=fake))  # changes nothing
    return fake


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def create(models: FakeModels, name: str, **changes: Any) -> TimmModel:
    torch.manual_seed(0)
    model = models.functions[name](**{"img_size": 64, "num_classes": 10, **SMALL[name], **changes})
    assert isinstance(model, TimmModel)
    return model.eval()


def plain(name: str) -> Any:
    """The same model without timm's interface."""
    entry = MODELS[name.split("_")[0]]
    fields = {**entry.presets[name], **SMALL[name], "image_size": 64, "n_classes": 10}
    return entry.cls(entry.config(**fields), torch.Generator().manual_seed(1)).eval()


def test_every_published_size_is_registered(models: FakeModels) -> None:
    assert len(models.functions) == 18
    assert set(models.functions) == set(ours.names()) == set(models.cfgs)
    assert {"vanilla_vmamba_base", "vmamba_tiny_s1l8", "vim_small_stride8", "videomamba_middle"} <= set(
        models.functions
    )
    assert models.cfgs["vim_tiny"]["input_size"] == (3, 224, 224)
    assert models.cfgs["vmamba_tiny_s1l8"]["classifier"] == "classifier.head"


@torch.no_grad()
def test_the_interface(models: FakeModels, name: str) -> None:
    model, x = create(models, name, drop_path_rate=0.3, drop_rate=0.5), images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (2, 10)
    vector = model.forward_head(features, pre_logits=True)
    assert vector.shape == (2, model.num_features)
    assert model.config.drop_path == 0.3
    assert not torch.equal(model.train().forward_head(features), model.forward_head(features))  # dropout
    model.eval().reset_classifier(0)
    assert torch.equal(model(x), vector)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7, model.pooling)
    assert model(x).shape == (2, 7)
    assert model.num_classes == model.config.n_classes == 7
    with pytest.raises(LongscanError, match="global_pool"):
        model.reset_classifier(7, "max")
    assert create(models, name, num_classes=0)(x).shape == (2, model.num_features)
    assert create(models, name, in_chans=1)(images(1, 1, 64, 64)).shape == (1, 10)


@torch.no_grad()
def test_feature_maps(models: FakeModels, name: str) -> None:
    model, x = create(models, name), images(1, 3, 64, 64)
    features, maps = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x))
    assert (
        [each.shape[1] for each in maps] == WIDTHS[name] == [each["num_chs"] for each in model.feature_info]
    )
    assert [64 // each.shape[2] for each in maps] == [each["reduction"] for each in model.feature_info]
    for each in model.feature_info:
        model.get_submodule(each["module"])
    two = model.forward_intermediates(x, [0, -2], intermediates_only=True)
    assert all(map(torch.equal, two, (maps[0], maps[2])))
    assert torch.equal(model.forward_intermediates(x, 1, intermediates_only=True)[0], maps[-1])
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.layers) == 2
    pruned = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(map(torch.equal, pruned, maps))
    with pytest.raises(LongscanError, match="out_indices"):
        model.forward_intermediates(x, [9])


@torch.no_grad()
def test_the_last_norm(models: FakeModels, name: str) -> None:
    model, x = create(models, name), images(1, 3, 64, 64)
    (last,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    mean = last.mean((2, 3))
    if name.startswith("vmamba"):
        assert torch.allclose(mean, model.pool(model.forward_features(x)), atol=1e-5)
    else:
        assert torch.allclose(last, model.feature_maps(x)[0], atol=1e-5)


def test_training(models: FakeModels, name: str) -> None:
    model = create(models, name).train()
    model.set_grad_checkpointing()
    model(images(2, 3, 64, 64)).sum().backward()
    assert [key for key, each in model.named_parameters() if each.grad is None] == []
    exempt = model.no_weight_decay()
    assert all(("A_" in key or key.endswith(("D", "D_b", "Ds", "bias"))) or "." not in key for key in exempt)
    assert len(exempt) >= 3
    for coarse in (False, True):
        layers = model.group_matcher(coarse)
        assert re.compile(layers["stem"]).groups == 0  # timm reads the number of a layer from groups


@torch.no_grad()
def test_weights(models: FakeModels, name: str, tmp_path: Path) -> None:
    own, x = plain(name), images(1, 3, 64, 64)
    model = create(models, name)
    model.load_state_dict(own.state_dict())
    assert torch.equal(model(x), own(x))
    longscan.save(own, tmp_path / "model")
    torch.save({"model": own.state_dict(), "epoch": 1}, tmp_path / "file.pth")
    for source in ("model", "file.pth"):
        model = create(models, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the image size, which a file does not say
            model.load_pretrained(str(tmp_path / source))
        assert torch.equal(model(x), own(x))
    other = create(models, name, num_classes=3, img_size=96)
    other.load_pretrained(str(tmp_path / "model"))
    large = images(1, 3, 96, 96)
    assert torch.allclose(other.forward_features(large), own.forward_features(large), atol=1e-5)
    assert other(large).shape == (1, 3)


def test_names_of_the_authors(models: FakeModels) -> None:
    own = plain("vmamba_tiny_s1l8")
    theirs = {
        key.replace("classifier.", "").replace("patch_embed.0", "patch_embed.proj"): each
        for key, each in own.state_dict().items()
    }
    model = create(models, "vmamba_tiny_s1l8")
    model.load_state_dict(theirs)
    assert torch.equal(model.get_classifier().weight, own.head_layer.weight)


@pytest.mark.parametrize(
    "given",
    [{}, {"pretrained_cfg": "in1k"}, {"pretrained_cfg_overlay": {"num_classes": 5}}],
    ids=["nothing", "a tag", "another field"],
)
def test_nothing_is_downloaded(models: FakeModels, given: dict[str, Any]) -> None:
    with pytest.raises(LongscanError, match=r"no weights are downloaded.*checkpoint_path=FILE"):
        models.functions["vim_tiny"](pretrained=True, **given)
    overlay = {"file": "x.pth"}  # which timm reads
    models.functions["vim_tiny"](pretrained=True, pretrained_cfg_overlay=overlay, **SMALL["vim_tiny"])


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"img_size": (32, 64)}, "square"), ({"heads": 3}, "no field 'heads'")]
)
def test_impossible_arguments(models: FakeModels, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(LongscanError, match=reason):
        models.functions["vim_tiny"](**arguments)


# with timm


@pytest.fixture
def timm() -> Iterator[Any]:
    try:
        import timm
    except Exception as error:  # its torchvision may be of another torch
        pytest.skip(f"timm does not import: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.register()
        yield timm


@torch.no_grad()
def test_timm_creates_them(timm: Any, name: str, tmp_path: Path) -> None:
    from timm.data import resolve_model_data_config
    from timm.optim import create_optimizer_v2

    assert name in timm.list_models(f"{name[:3]}*")
    common = {"img_size": 64, **SMALL[name]}
    x = images(1, 3, 64, 64)
    features = timm.create_model(name, features_only=True, out_indices=(0, 1), **common)
    assert features.feature_info.channels() == WIDTHS[name][:2]
    assert [each.shape[1] for each in features(x)] == WIDTHS[name][:2]
    own = plain(name)
    torch.save({"model": own.state_dict()}, tmp_path / "file.pth")
    file = {"file": str(tmp_path / "file.pth"), "num_classes": 10}
    for arguments in (
        {"checkpoint_path": file["file"]},
        {"pretrained": True, "pretrained_cfg_overlay": file},
        {"pretrained": True, "pretrained_cfg_overlay": {**file, "custom_load": True}},
    ):
        model = timm.create_model(name, num_classes=10, **common, **arguments).eval()
        assert torch.equal(model(x), own(x))
    assert resolve_model_data_config(model)["crop_pct"] == 0.875
    tuned = timm.create_model(name, num_classes=3, **common, pretrained=True, pretrained_cfg_overlay=file)
    assert torch.equal(tuned.eval().forward_features(x), own.forward_features(x))
    assert tuned(x).shape == (1, 3)
    assert create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
