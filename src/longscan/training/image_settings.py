"""The settings of training on images or clips."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Self

from longscan.training.config import FreshConfig, setting

__all__ = ["ImagesConfig"]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(FreshConfig):
    """The settings of `longscan classify train IMAGES --model vmamba`, and of clips with `--frames 8`."""

    KINDS = ("image",)
    EPOCHS: ClassVar[float] = 30.0

    data: tuple[str, ...] = setting((), "Labelled images or clips.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation images or clips; default: hold out a part of DATA. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Fraction of DATA held out for validation.")
    model: str = setting("vmamba", "Architecture, see `longscan models`.")
    pretrained: str | None = setting(
        None, "Image classifier to fine-tune, a directory or file, in place of a new model.", alias="--from"
    )
    frames: int | None = setting(
        None, "Frames per clip: DATA holds clips, --model is one of videos, such as videomamba."
    )
    image_size: int | None = setting(
        None, "Height and width of the images in pixels; default: the model's, or that of arrays.", size=True
    )
    drop_path: float | None = setting(
        None, "Probability to skip a residual branch (stochastic depth); default: the model's.", size=True
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute the blocks in the backward pass, which saves memory."
    )

    crop_scale: float = setting(0.35, "Least area of a random resized crop; 1 = no cropping.")
    flip: float = setting(0.5, "Probability of a horizontal flip.")
    randaugment: float = setting(5.0, "Magnitude of RandAugment, 0 to 10.")
    mixup: float = setting(0.0, "Mixup alpha; 0 = off.")
    cutmix: float = setting(0.0, "CutMix alpha; 0 = off.")
    erase: float = setting(0.0, "Probability of random erasing.")
    smoothing: float = setting(0.1, "Label smoothing.")
    ema: float = setting(0.9999, "Decay of the exponential moving average of the weights; 0 = off.")

    batch_size: int = setting(64, "Images, or clips, per forward pass.")
    accumulate: int = setting(1, "Forward passes per step (gradient accumulation).")
    lr: float = setting(1e-3, "Peak learning rate.")
    weight_decay: float = setting(0.05, "Weight decay of AdamW, on matrices only.")
    beta2: float = setting(0.999, "AdamW beta2.")
    clip: float = setting(5.0, "Gradient clipping: the maximum norm.")

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("batch_size", "accumulate", least=1)
        self.check("frames", least=2, most=4096)
        self.check("valid_fraction", "drop_path", "smoothing", "ema", least=0, below=1)
        self.check("flip", "erase", least=0, most=1)
        self.check("crop_scale", above=0, most=1)
        self.check("randaugment", least=0, most=10)
        self.check("mixup", "cutmix", least=0, most=4)

    def absolute(self) -> Self:
        """Return the settings with absolute paths; the model to fine-tune may also be on the hub."""
        given = self.pretrained
        path = os.path.abspath(given) if given and os.path.exists(given) else given
        return super().absolute().replace(pretrained=path)
