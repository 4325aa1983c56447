"""A small image classifier, and a run that knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longscan.models import ModelEntry
from longscan.models.common.vision import VisionConfig, VisionModel
from longscan.training.image_classifier import ImagesConfig, ImagesRun


@dataclass(frozen=True, kw_only=True)
class ToyConfig(VisionConfig):
    width: int = 16
    n_frames: int = 0  # as a model of videos has it


class Toy(VisionModel):
    """Two convolutions, mean over the image, head."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(generator.initial_seed() if generator else 0)
            self.d_features = 2 * config.width
            self.stem = nn.Conv2d(config.in_channels, config.width, 4, stride=2)
            self.deep = nn.Conv2d(config.width, 2 * config.width, 4, stride=2)
            self.head = nn.Linear(self.d_features, config.n_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.deep(self.stem(images).relu()).relu()

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return [self.forward_features(images)]


ENTRY = ModelEntry(
    name="toy",
    kind="image",
    year=2026,
    paper="",
    arxiv="",
    idea="",
    parents=(),
    cls=Toy,
    config=ToyConfig,
    presets={"tiny": {"image_size": 16}},
    verbs=(),
)


@dataclass(frozen=True, kw_only=True)
class ToyImagesConfig(ImagesConfig):
    model: str = "toy"

    @property
    def choice(self) -> Mapping[str, ModelEntry]:
        return {"toy": ENTRY}


class ToyImagesRun(ImagesRun):
    settings = ToyImagesConfig

    def export(self, directory: Path) -> None:
        """Write the weights only: `save` knows the models of the registry."""
        directory.mkdir()
        with self.trainer.averaged():
            save_file(self.model.state_dict(), directory / "model.safetensors")
