"""The learning rate at every step, and the settings of a run from recipes and flags."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS
from longscan.training.build import model_settings
from longscan.training.config import FreshConfig, TrainConfig, read_recipe
from longscan.training.image_classifier import ImagesConfig
from longscan.training.schedule import learning_rate
from longscan.training.translation import TranslateConfig


def test_learning_rate() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup=10)
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[59] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(config, 0, 5) == pytest.approx(
        0.1 + 0.45 * (1 + math.cos(math.pi / 5))
    )  # no warm-up


def test_linear_falls_to_nothing() -> None:
    config = TrainConfig(lr=1.0, warmup=10, schedule="linear")
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 - (step + 1) / 100 for step in range(100)])


def test_noam_peaks_where_the_paper_says() -> None:
    config = TrainConfig(lr=1.0, warmup=4000, schedule="noam")
    rates = [learning_rate(config, step, 10_000, d_model=512) for step in range(10_000)]
    assert max(rates) == rates[3999] == pytest.approx(6.99e-4, rel=1e-3)  # d_model^-1/2 warmup^-1/2
    assert rates[0] == pytest.approx(512**-0.5 * 4000**-1.5)
    assert rates[8099] == pytest.approx(512**-0.5 / 90)


def test_epochs_become_steps() -> None:
    assert TrainConfig(epochs=1.5, batch_size=4, accumulate=2).total_steps(100, 8) == 19
    assert TrainConfig(batch_size=4).total_steps(100, 4) == 100  # four epochs unless said otherwise


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/*.toml")), ids=lambda path: path.name
)
def test_recipes_are_valid(path: Path) -> None:
    entry = MODELS[tomllib.loads(path.read_text())["model"]]
    kinds: dict[str, type[FreshConfig]] = {"translation": TranslateConfig, "image": ImagesConfig}
    config = read_recipe(path, {"seed": 3}, kinds.get(entry.kind, TrainConfig))
    assert config.seed == 3
    assert config.steps or config.epochs
    assert set(tomllib.loads(path.read_text())) <= set(config.to_dict())
    known = {"n_classes": 1000} if entry.kind == "image" else {"vocab_size": 257}
    assert entry.cls(model_settings(config, **known)).num_parameters() > 1e6


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('steps = 5\nlr = 1\nmodel = "mamba"')
    config = read_recipe(tmp_path / "a.toml", {"epochs": 2.0, "lr": 0.5})
    assert (config.steps, config.epochs, config.lr) == (None, 2.0, 0.5)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("lr = 'fast'", "lr"),
        ("learnin_rate = 1", "learnin_rate"),
        ("lr = ", "Invalid value"),
        ("lr = -1", "lr"),
    ],
)
def test_a_bad_recipe_names_the_file_and_the_fault(tmp_path: Path, content: str, word: str) -> None:
    (tmp_path / "bad.toml").write_text(content)
    with pytest.raises(LongscanError, match=rf"bad\.toml: .*{word}"):
        read_recipe(tmp_path / "bad.toml", {})


@pytest.mark.parametrize(
    "flags",
    [
        {"lr": 0.0},
        {"lr": 1e-3, "min_lr": 1e-2},
        {"steps": 0},
        {"steps": 3, "epochs": 1.0},
        {"epochs": -1.0},
        {"seq_len": 0},
        {"batch_size": 0},
        {"beta2": 1.0},
        {"valid_fraction": 1.0},
        {"clip": 0.0},
        {"save_every": 0},
        {"threads": 0},
        {"n_layers": 0},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_impossible_settings_are_misuse(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^--[a-z0-9-]+: "):
        read_recipe(None, flags)
