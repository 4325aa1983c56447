"""One step: its learning rates, and what it saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

from longscan.errors import LongscanError
from longscan.models import MODELS, Mamba, MambaConfig
from longscan.training.config import TrainConfig
from longscan.training.schedule import slow_rate
from longscan.training.trainer import Trainer


@pytest.mark.parametrize(
    "optimizer",
    [
        b"not safetensors",
        save_tensors({"x": torch.zeros(1)}),
        save_tensors({"random_state": torch.zeros(3)}),
        save_tensors({"random_state": torch.get_rng_state(), "embedding.exp_avg": torch.zeros(2)}),
    ],
    ids=["damaged", "no-random-state", "no-state", "other-moments"],
)
def test_a_forged_checkpoint_is_an_error(optimizer: bytes, tmp_path: Path) -> None:
    model = Mamba(MambaConfig(d_model=8, n_layers=1, vocab_size=16))
    trainer = Trainer(model, TrainConfig(), 1, lambda _: [], lambda *_: torch.zeros(()))
    (tmp_path / "model.safetensors").write_bytes(save_tensors(dict(model.named_parameters())))
    (tmp_path / "optimizer.safetensors").write_bytes(optimizer)
    with pytest.raises(LongscanError, match=str(tmp_path)):
        trainer.load(tmp_path, 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "noam"])
@pytest.mark.parametrize("name", ["s4", "s4d", "lssl", "h3", "mamba"])
def test_state_spaces_learn_at_a_rate_of_their_own(name: str, schedule: str) -> None:
    """A, B and dt at min(ssm_lr, lr) at the peak and without decay, as S4's official code trains them."""
    entry = MODELS[name]
    model = entry.cls(entry.config.from_dict(entry.presets["tiny"]), torch.Generator().manual_seed(0))
    config = TrainConfig(lr=1e-2, warmup=1, schedule=schedule, weight_decay=0.5)
    ids = torch.arange(12).view(1, 12)
    trainer = Trainer(model, config, 4, lambda step: [(ids, 11)], lambda m, x: m(x, labels=x).loss)
    rate = trainer.step().lr
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    apart = {
        names[id(p)].rpartition(".")[2]: group["lr"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if group["lr"] != rate
    }
    expected = {"s4": {"P", "B", "A_imag"}, "s4d": {"A_imag"}, "h3": {"A_imag"}, "lssl": {"A", "B"}}
    if name == "mamba":
        assert not apart
        return
    assert set(apart) >= {"log_dt", *expected[name]}
    assert not {"C", "D", "weight"} & set(apart)
    assert all(lr == pytest.approx(rate / 10 if schedule != "noam" else 1e-3) for lr in apart.values())
    groups = [group for group in trainer.optimizer.param_groups if group["slow"]]
    assert [group["weight_decay"] for group in groups] == [0.0]
    slower = TrainConfig(lr=1e-4)
    assert slow_rate(slower, 1e-4) == 1e-4


@pytest.mark.parametrize("name", ["s4d", "h3"])
def test_what_learns_slowly_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Resumed half way, weights, both groups' moments and their rates are those of the whole run."""
    entry = MODELS[name]
    config = TrainConfig(lr=1e-2, warmup=2, weight_decay=0.1)

    def trainer() -> Trainer:
        model = entry.cls(entry.config.from_dict(entry.presets["tiny"]), torch.Generator().manual_seed(0))

        def batch(step: int) -> list[tuple[torch.Tensor, int]]:
            generator = torch.Generator().manual_seed(step)
            return [(torch.randint(0, 256, (2, 12), generator=generator), 22)]

        return Trainer(model, config, 6, batch, lambda m, x: m(x, labels=x).loss)

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(3):
        whole.step()
        first.step()
    first.state().save(tmp_path)
    second.load(tmp_path, 3)
    reports = [(whole.step(), second.step()) for _ in range(3)]
    assert all(a == b for a, b in reports)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [g["lr"] for g in second.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]
    assert any(group["slow"] for group in second.optimizer.param_groups)
    for mine, other in zip(second.model.slow(), whole.model.slow(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(second.optimizer.state[mine][key], whole.optimizer.state[other][key])


def averaging(decay: float = 0.25) -> Trainer:
    """A trainer of a small Mamba, with averaged weights."""
    model = Mamba(MambaConfig(d_model=8, n_layers=1, vocab_size=16), torch.Generator().manual_seed(0))
    ids = torch.arange(12).view(1, 12)
    config = TrainConfig(lr=1e-2, warmup=1)
    return Trainer(model, config, 4, lambda step: [(ids, 11)], lambda m, x: m(x, labels=x).loss, decay)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    trainer = averaging()
    expected = weights(trainer)
    for step in range(1, 5):
        trainer.step()
        decay = min(0.25, (1 + step) / (10 + step))
        for name, weight in weights(trainer).items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
    own = weights(trainer)
    with trainer.averaged():
        for name, weight in weights(trainer).items():
            torch.testing.assert_close(weight, expected[name])
            assert not torch.equal(weight, own[name])
    assert all(torch.equal(weight, own[name]) for name, weight in weights(trainer).items())


def test_the_average_is_saved_and_loaded_and_must_be_there(tmp_path: Path) -> None:
    one, two = averaging(), averaging()
    one.step()
    one.state().save(tmp_path)
    two.load(tmp_path, 1)
    assert one.average.keys() == two.average.keys() == weights(one).keys()
    assert all(torch.equal(one.average[name], two.average[name]) for name in one.average)
    assert not any(two.average[name] is two.model.get_parameter(name) for name in two.average)
    with pytest.raises(LongscanError, match="optimizer state of another model"):
        averaging(0.0).load(tmp_path, 1)
    assert not averaging(0.0).average


def test_the_statistics_of_batch_norms_are_averaged_too() -> None:
    """Those of the last step belong to the last weights, not to averaged ones."""
    entry = MODELS["resnet"]
    model = entry.cls(
        entry.config.from_dict(entry.presets["tiny"]), generator=torch.Generator().manual_seed(0)
    )
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def loss(model: Any, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images), torch.arange(4))

    trainer = Trainer(model, TrainConfig(lr=1e-2, warmup=1), 3, lambda step: [(images, 4)], loss, 0.25)
    expected = model.get_buffer("bn1.running_mean").clone()
    for step in range(1, 4):
        trainer.step()
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.get_buffer("bn1.running_mean")
    own = model.get_buffer("bn1.running_mean").clone()
    with trainer.averaged():
        torch.testing.assert_close(model.get_buffer("bn1.running_mean"), expected)
    assert torch.equal(model.get_buffer("bn1.running_mean"), own)
    assert not torch.equal(own, expected)
