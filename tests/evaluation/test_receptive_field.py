"""The effective receptive field of models whose field is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longscan.evaluation.receptive_field import area, receptive_field
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig, VisionModel


class Convolution(VisionModel):
    """Two convolutions of 3 x 3 pixels: a field of 5 x 5."""

    def __init__(self) -> None:
        super().__init__(VisionConfig(n_classes=2, in_channels=1, mean=(0.0,), std=(1.0,)))
        self.d_features = 1
        self.body = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(2)))
        self.head = nn.Linear(1, 2)
        for layer in self.body:
            nn.init.ones_(layer.weight)  # type: ignore[arg-type]

    def forward_features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return [images, self.body(images)]


def test_the_field_of_a_convolution() -> None:
    field = receptive_field(Convolution().eval(), [torch.zeros(1, 9, 9), torch.ones(1, 9, 9)])
    side = torch.tensor([0.0, 0, 1, 2, 3, 2, 1, 0, 0])
    torch.testing.assert_close(field, side[:, None] * side / 9)
    # of 81 the largest are 9, four of 6, four of 4: half is reached after seven of them
    assert area(field) == 7 / 81
    assert area(field, 1.0) == 25 / 81


@pytest.mark.parametrize("name", ["vmamba", "vim"])
def test_a_scan_sees_the_whole_image(name: str) -> None:
    entry = MODELS[name]
    model = entry.cls(entry.config.from_dict(entry.presets["tiny"]), torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    field = receptive_field(model.double().eval(), [torch.randn(3, 24, 24, generator=draw)])  # type: ignore[arg-type]
    assert (field.shape, field.max().item()) == ((24, 24), 1.0)
    assert (field > 0).all()
    assert 0 < area(field) < 0.5


def test_gradients_of_the_weights_stay_away() -> None:
    model = Convolution().eval()
    receptive_field(model, [torch.ones(1, 8, 8)])
    assert all(parameter.grad is None for parameter in model.parameters())
