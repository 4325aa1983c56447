"""Residual networks: the paper's block, its sizes, and the statistics of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.errors import LongscanError
from longscan.models import ResNet, ResNetConfig
from longscan.models.resnet import PRESETS
from longscan.training.config import TrainConfig
from longscan.training.trainer import Trainer

# table 6 of the paper, in millions; the first one is exact, as others count it too
MILLIONS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
SMALL = {"d_model": [4, 6, 9], "n_blocks": [2, 1, 1], "image_size": 16, "n_classes": 5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(**fields: Any) -> ResNet:
    """A small model whose parameters and statistics are all different."""
    model, generator = ResNet(ResNetConfig.from_dict({**SMALL, **fields}), seeded()), seeded(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def images(*size: int) -> Tensor:
    return torch.randn(3, 3, *size, generator=seeded(2))


def literal(model: ResNet, x: Tensor, training: bool) -> Tensor:
    """The network of section 4.2, of plain convolutions and means."""
    w = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        if training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return x * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)

    def conv(x: Tensor, name: str, stride: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=w[f"{name}.weight"].shape[-1] // 2)

    x = norm(conv(x, "conv1", model.config.stride), "bn1").relu()
    for stage, n_blocks in enumerate(model.config.n_blocks, 1):
        for n in range(n_blocks):
            name, stride = f"layer{stage}.{n}", 2 if stage > 1 and n == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            elif stride == 2:
                wider = torch.zeros_like(y)
                wider[:, : x.shape[1]] = x[:, :, ::2, ::2]
                x = wider
            x = (x + y).relu()
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fields", [{}, {"shortcut": "B"}, {"stride": 2}], ids=str)
def test_it_is_the_paper_s_model(fields: dict[str, Any], training: bool, size: tuple[int, int]) -> None:
    model, x = build(**fields).double().train(training), images(*size).double()
    expected = literal(model, x, training)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", MILLIONS)
def test_the_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig.from_dict(PRESETS[preset]))
    n, layers = model.num_parameters(), int(preset.removeprefix("resnet"))
    assert float(f"{n / 1e6:.2g}") == MILLIONS[preset]
    assert sum(parameter.dim() > 1 for parameter in model.parameters()) == layers
    if preset == "resnet20":
        assert n == 269_722


@pytest.mark.parametrize(("shortcut", "more"), [("A", 0), ("B", 4 * 6 + 2 * 6 + 6 * 9 + 2 * 9)])
def test_only_option_b_has_parameters_in_its_shortcuts(shortcut: Literal["A", "B"], more: int) -> None:
    assert build(shortcut=shortcut).num_parameters() == build().num_parameters() + more


def test_each_stage_has_its_map() -> None:
    model = build()
    assert [tuple(x.shape[1:]) for x in model.feature_maps(images(13, 16))] == [
        (4, 13, 16),
        (6, 7, 8),
        (9, 4, 4),
    ]


def test_training_moves_the_statistics_and_evaluation_does_not() -> None:
    model = build()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = images(16, 16)
    model(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    first = F.conv2d(x, model.conv1.weight, padding=1)
    model.train()(x)
    expected = 0.9 * before["bn1.running_mean"] + 0.1 * first.mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, expected)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    single = build(d_model=[4], n_blocks=[1]).train()
    assert single(images(1, 1)[:1]).isfinite().all()  # one value a channel has no variance


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = build(shortcut="B")
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", "image")
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again(images(16, 16)), model(images(16, 16)))


def test_a_run_goes_on_with_its_statistics(tmp_path: Path) -> None:
    """Resumed half way, weights and statistics are those of the whole run."""

    def trainer() -> Trainer:
        model = ResNet(ResNetConfig.from_dict(SMALL), seeded())
        batch = images(16, 16)
        return Trainer(
            *(model, TrainConfig(lr=1e-2), 4, lambda step: [(batch * (step + 1), 3)]),
            lambda m, x: F.cross_entropy(m(x), torch.tensor([0, 1, 2])),
        )

    whole, half = trainer(), trainer()
    for _ in range(4):
        whole.step()
    for _ in range(2):
        half.step()
    half.state().save(tmp_path)
    again = trainer()
    again.load(tmp_path, 2)
    for _ in range(2):
        again.step()
    assert again.model.fingerprint() == whole.model.fingerprint()
    other = Trainer(build(d_model=[4, 6, 8]), TrainConfig(), 4, lambda _: [], lambda *_: torch.zeros(()))
    with pytest.raises(LongscanError, match="weights of another model"):
        other.load(tmp_path, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_blocks": [1, 1]}, r"number for each stage, got \(4, 6, 9\) and \(1, 1\)"),
        ({"n_blocks": [1, 0, 1]}, "a positive number for each stage"),
        ({"d_model": [], "n_blocks": []}, "a positive number for each stage"),
        ({"d_model": [4, 6, 5]}, "widths that grow for shortcuts of option A"),
        ({"stride": 0}, "stride"),
    ],
)
def test_impossible_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        ResNetConfig.from_dict({**SMALL, **fields})


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \(2, 1, 8, 8\)"):
        build()(torch.zeros(2, 1, 8, 8))
