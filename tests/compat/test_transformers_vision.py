"""Models of images in transformers' Auto classes: the same directories, the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import longscan
from longscan.checkpoints.load import load
from longscan.inference.images import log_probabilities
from longscan.models import MODELS
from longscan.models.common.vision import VisionModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PHOTO = Path(__file__).parents[2] / "docs" / "figures" / "house.png"
NAMES = ("vmamba", "vim", "videomamba")
LABELS = tuple(f"kind {i}" for i in range(10))


@pytest.fixture(scope="module", autouse=True)
def ours() -> Any:
    from longscan.compat import transformers as ours

    ours.register()
    ours.register()  # changes nothing
    return ours


def tiny(name: str, **changes: Any) -> VisionModel:
    entry = MODELS[name]
    fields = {**entry.presets["tiny"], "labels": LABELS, "n_frames": 0, **changes}
    known = {key: value for key, value in fields.items() if hasattr(entry.config, key) or key == "d_model"}
    known |= {key: fields[key] for key in ("n_layers",) if key in fields}
    model = entry.cls(entry.config(**known), torch.Generator().manual_seed(0))
    assert isinstance(model, VisionModel)
    with torch.no_grad():
        model.head_layer.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, directory = tiny(request.param), tmp_path_factory.mktemp("saved") / "model"
    longscan.save(model, directory)
    return model, directory


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


Saved = tuple[VisionModel, Path]


@torch.no_grad()
def test_our_directories_open_there(saved: Saved) -> None:
    model, directory = saved
    auto = transformers.AutoModelForImageClassification
    theirs, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    x = images(2, 3, 32, 32)
    output = theirs(x, labels=torch.tensor([1, 2]))
    assert torch.equal(output.logits, model(x))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 2]))
    assert torch.allclose(output.loss, expected)
    assert theirs.config.id2label[3] == "kind 3"
    maps = theirs(x, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, maps, model.feature_maps(x)))
    assert torch.equal(theirs(x, return_dict=False)[0], output.logits)


@torch.no_grad()
def test_and_theirs_here(saved: Saved, tmp_path: Path) -> None:
    model, directory = saved
    transformers.AutoModelForImageClassification.from_pretrained(directory).save_pretrained(tmp_path)
    back = load(tmp_path, "image")
    assert isinstance(back, VisionModel)
    assert back.config == model.config
    assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    x = images(1, 3, 32, 32)
    assert torch.equal(again(x).logits, model(x))
    again.network.head_layer.weight.zero_()
    again.load_state_dict(model.state_dict())  # as a Trainer resumes from a file
    assert torch.equal(again(x).logits, model(x))


@torch.no_grad()
def test_features(saved: Saved, ours: Any) -> None:
    model, directory = saved
    x = images(2, 3, 32, 32)
    base, report = transformers.AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(base(x).last_hidden_state, model.forward_features(x))
    assert torch.equal(base(x).pooler_output, model.pool(model.forward_features(x)))
    cls = {"VMamba": ours.VMambaBackbone, "Vim": ours.VimBackbone, "VideoMamba": ours.VideoMambaBackbone}
    maps = model.feature_maps(x)
    every = list(range(len(maps)))
    config = transformers.AutoConfig.from_pretrained(directory)
    config.save_pretrained(directory.parent / "config")  # which states the last stage
    given = transformers.AutoConfig.from_pretrained(directory.parent / "config", out_indices=every)
    assert given.out_features == [f"stage{i + 1}" for i in every]
    backbone = cls[type(model).__name__].from_pretrained(directory, out_indices=every)
    got = backbone(x).feature_maps
    assert len(got) == len(maps)
    assert all(map(torch.equal, got, maps))
    assert backbone.channels == [each.shape[1] for each in maps]
    last = transformers.AutoBackbone.from_config(config)
    assert last.out_features == [f"stage{len(maps)}"]
    assert len(last(x).feature_maps) == 1


def test_fine_tuning_on_other_classes(saved: Saved, tmp_path: Path) -> None:
    _, directory = saved
    names = {0: "cat", 1: "dog", 2: "owl"}
    auto = transformers.AutoModelForImageClassification
    model = auto.from_pretrained(directory, id2label=names, ignore_mismatched_sizes=True).train()
    head = model.network.head_layer
    assert 0.01 < head.weight.std() < 0.03
    assert not head.bias.any()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.network.gradient_checkpointing
    model(images(2, 3, 32, 32), labels=torch.tensor([0, 2])).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    model.save_pretrained(tmp_path)
    assert load(tmp_path, "image").config.labels == ("cat", "dog", "owl")


@torch.no_grad()
def test_half_precision_keeps_the_recurrence(saved: Saved) -> None:
    model, directory = saved
    auto = transformers.AutoModelForImageClassification
    half = auto.from_pretrained(directory, dtype=torch.bfloat16)
    expected = model.config and load(directory, "image", dtype=torch.bfloat16)
    dtypes = {name: each.dtype for name, each in expected.state_dict().items()}
    assert {name: each.dtype for name, each in half.network.state_dict().items()} == dtypes
    x = images(1, 3, 32, 32).bfloat16()
    assert torch.equal(half(x).logits, expected(x))


def test_the_pipeline_prepares_a_photo_as_we_do(saved: Saved) -> None:
    model, directory = saved
    classify = transformers.pipeline("image-classification", model=str(directory))
    photo = Image.open(PHOTO).convert("RGB")
    scores = {each["label"]: each["score"] for each in classify(photo, top_k=10)}
    expected = log_probabilities(model, [photo])[0].exp()
    for label, probability in zip(LABELS, expected.tolist(), strict=True):
        assert abs(scores[label] - probability) < 0.01  # a crop may lie one pixel beside


def test_the_processor_is_that_of_the_config(tmp_path: Path) -> None:
    longscan.save(tiny("vmamba", crop=0.5, mean=(0.1, 0.2, 0.3)), tmp_path / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.size["shortest_edge"] == 64
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 32)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor(Image.open(PHOTO), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_videos(tmp_path: Path) -> None:
    model = tiny("videomamba", n_frames=4)
    longscan.save(model, tmp_path / "model")
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "model")
    x = images(1, 3, 4, 32, 32)
    assert torch.equal(theirs(x.transpose(1, 2)).logits, model(x))
    theirs.save_pretrained(tmp_path / "back")
    assert load(tmp_path / "back", "image").config == model.config


def test_a_model_from_a_config(ours: Any) -> None:
    config = ours.VMambaConfig(d_model=[8, 16], n_blocks=[1, 1], num_labels=4, image_size=32)
    model = transformers.AutoModelForImageClassification.from_config(config)
    assert model(images(1, 3, 32, 32)).logits.shape == (1, 4)
    dt = torch.nn.functional.softplus(model.network.layers[0].blocks[0].op.dt_projs_bias)
    assert dt.min() >= 0.9e-3  # longscan's own initialisation
    assert ours.VimConfig().d_model == 192
    with pytest.raises(longscan.LongscanError, match="d_conv"):
        ours.VMambaConfig(d_conv=2)
