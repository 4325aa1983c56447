"""A model of whole sequences: padding, both directions, time, its Config, and that every body can learn."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models.sequence_classifier import BODIES, SequenceConfig, SequenceModel

# largest difference allowed in float64
TOLERANCE = 1e-10
SIZES = {"d_model": 8, "n_layers": 2}


def config(body: str = "mamba", **fields: Any) -> SequenceConfig:
    preset = {
        **BODIES[body].presets["tiny"],
        **SIZES,
        "vocab_size": 11 if not fields.get("d_input", 3) else 1,
    }
    given = {"n_outputs": 2, "labels": ["a", "b"], "d_input": 3, **fields}
    return SequenceConfig.from_dict({"body": body, "body_config": preset, **given})


def build(body: str = "mamba", seed: int = 0, **fields: Any) -> SequenceModel:
    model = SequenceModel(config(body, **fields), torch.Generator().manual_seed(seed)).double().eval()
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


def seconds(*shape: int) -> Tensor:
    """Times of uneven steps."""
    draw = torch.Generator().manual_seed(6)
    return (0.2 + 2 * torch.rand(shape, generator=draw, dtype=torch.float64)).cumsum(-1)


def signal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


needs_ode = pytest.mark.skipif(
    importlib.util.find_spec("torchdiffeq") is None, reason="the extra 'ode' is not installed"
)
every = pytest.mark.parametrize(
    "body", [pytest.param(name, marks=needs_ode if name == "neural_ode" else ()) for name in BODIES]
)


@every
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forth", "both"])
@torch.no_grad()
def test_padding_changes_nothing(body: str, pooling: str, bidirectional: bool) -> None:
    model = build(body, pooling=pooling, bidirectional=bidirectional)
    x, lengths = signal(3, 9, 3), torch.tensor([9, 1, 6])
    for times in (None, seconds(3, 9)):
        together = model(x, lengths, times)
        for row, length in enumerate(lengths.tolist()):
            own = None if times is None else times[row : row + 1, :length]
            alone = model(x[row : row + 1, :length], None, own)
            assert (together[row] - alone[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("value", [7.0, float("nan")])
@torch.no_grad()
def test_what_lies_behind_the_end_is_not_read(value: float) -> None:
    model = build(bidirectional=True)
    x, lengths = signal(2, 9, 3), torch.tensor([4, 9])
    changed = x.clone()
    changed[0, 4:] = value
    assert torch.equal(model(x, lengths)[0], model(changed, lengths)[0])
    assert not torch.equal(model(x)[0], model(changed)[0])


@every
@torch.no_grad()
def test_a_mirrored_model_reads_a_mirrored_signal_alike(body: str) -> None:
    model, mirrored = build(body, bidirectional=True), build(body, bidirectional=True)
    for layer in mirrored.layers:
        layer.mixer.forth, layer.mixer.back = layer.mixer.back, layer.mixer.forth
    x, times = signal(2, 7, 3), seconds(2, 7)
    assert (model(x, None, times) - mirrored(x.flip(1), None, -times.flip(1))).abs().max() < TOLERANCE


@torch.no_grad()
def test_only_two_mixers_see_what_comes() -> None:
    """The mean is over the places, so the last channel of the first place tells the directions apart."""
    x = signal(1, 6, 3)
    later = x.clone()
    later[0, 5] += 1.0
    for bidirectional, sees in ((False, False), (True, True)):
        model = build(bidirectional=bidirectional)
        clock = torch.arange(6)[None]
        hidden = [model._hidden(part, clock.flip(1), clock) for part in (x, later)]
        assert torch.equal(hidden[0][:, :5], hidden[1][:, :5]) != sees


@torch.no_grad()
def test_signals_are_normalised_inside() -> None:
    x = signal(2, 5, 3)
    plain, shifted = build(), build(mean=[1.0, 0.0, -2.0], std=[2.0, 1.0, 0.5])
    raw = x * x.new_tensor([2.0, 1.0, 0.5]) + x.new_tensor([1.0, 0.0, -2.0])
    assert (plain(x) - shifted(raw)).abs().max() < TOLERANCE


@pytest.mark.parametrize("body", ["lssl", "s4", "s4d", "h3", "mamba"])
@torch.no_grad()
def test_rescaling_time(body: str) -> None:
    """What has a time step reads a slow signal at half the rate as it read it at the whole rate."""
    model = build(body)
    if body == "mamba":
        with pytest.raises(LongscanError, match="MambaMixer has no time step to rescale"):
            model.rescale_time(2)
        return
    t = torch.linspace(0, 3, 1000, dtype=torch.float64)
    x = torch.stack([(2 * t).sin(), t.cos(), t / 3], 1)[None]
    whole, as_it_is = model(x), model(x[:, ::2])
    model.rescale_time(2)
    assert (model(x[:, ::2]) - whole).abs().max() < 0.1 * (as_it_is - whole).abs().max()


@every
@torch.no_grad()
def test_only_what_is_timed_reads_times(body: str) -> None:
    model, x = build(body), signal(2, 7, 3)
    plain, uneven = model(x), model(x, None, seconds(2, 7))
    assert torch.equal(plain, uneven) != BODIES[body].timed


@needs_ode
@torch.no_grad()
def test_time_has_the_unit_of_the_training_data() -> None:
    """Without times the clock ticks at the rate, or once a second; later, or in other units, is no matter."""
    x, times, lengths = signal(2, 7, 3), seconds(2, 7), torch.tensor([7, 4])
    ticks = torch.arange(7, dtype=torch.float64).expand(2, -1)
    expected = build("neural_ode")(x, lengths, ticks)
    for fields, read in (
        ({}, None),
        ({"rate": 50.0}, None),
        ({"rate": 50.0}, ticks / 50),
        ({"gap": 0.25}, 1e9 + ticks / 4),
    ):
        assert (build("neural_ode", **fields)(x, lengths, read) - expected).abs().max() < TOLERANCE
    slow, fast = build("neural_ode"), build("neural_ode")
    fast.rescale_time(2)
    assert (fast(x, lengths, times) - slow(x, lengths, 2 * times)).abs().max() < TOLERANCE
    assert (fast(x, lengths, times) - slow(x, lengths, times)).abs().max() > 1e-4


@every
def test_every_body_learns(body: str) -> None:
    """Which of the two kinds of sequences: the sum of the first half decides, the rest is noise."""
    torch.manual_seed(0)
    x = torch.randn(32, 12, 3)
    truth = (x[:, :6, 0].sum(1) > 0).long()
    model = SequenceModel(config(body, dropout=0.0), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=2e-2)
    losses = []
    for _ in range(25):
        loss = model.loss(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_tokens_and_numbers() -> None:
    model = build(d_input=0, labels=[], n_outputs=4)
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    outputs = model(ids, torch.tensor([6, 3]))
    assert outputs.shape == (2, 4)
    assert model.loss(outputs, outputs + 2).item() == pytest.approx(4.0)


def test_dropout_is_for_training() -> None:
    model, x = build(dropout=0.5), signal(2, 5, 3)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_what_sets_time_scales_does_not_decay() -> None:
    model = build(bidirectional=True)
    kept = {id(parameter) for parameter in model.no_decay_parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
    assert {name.rsplit("mixer.", 1)[1] for name in names} >= {"forth.A_log", "back.A_log", "back.D"}
    matrices = model.param_groups(0.1)[0]["params"]
    assert not kept & {id(parameter) for parameter in matrices}


def test_a_config_travels_as_json() -> None:
    original = config("llama", mean=[0.0] * 3, std=[1.0] * 3, rate=8000.0, bidirectional=True)
    assert SequenceConfig.from_dict(original.to_dict()) == original


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"body": ["mamba"]}, "no language model called ['mamba']"),
        ({"body": "bert"}, "no language model called 'bert'"),
        ({"body_config": {"d_model": 4}}, "MambaConfig needs n_layers"),
        ({"labels": ["a"]}, "labels: expected 2 names, got 1"),
        ({"n_outputs": 0, "labels": []}, "n_outputs: expected 1 or more"),
        ({"mean": [1.0]}, "mean: expected a number for each of 3 channels, got 1"),
        ({"mean": [0.0] * 3, "std": [0.0] * 3}, "std: expected a positive number"),
        ({"rate": -1.0}, "rate: expected more than 0"),
        ({"gap": 0.0}, "gap: expected more than 0"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1"),
        ({"pooling": "first"}, "pooling: expected one of 'mean', 'last'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_configs(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LongscanError) as error:
        SequenceConfig.from_dict({**config().to_dict(), **fields})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("d_input", "x", "lengths", "words"),
    [
        (3, torch.zeros(2, 5), None, r"expected a non-empty \(batch, seq_len, 3\)"),
        (3, torch.zeros(2, 0, 3), None, "non-empty"),
        (0, torch.zeros(2, 5), None, "of integers"),
        (3, torch.zeros(2, 5, 3), torch.tensor([5]), "expected 2 numbers from 1 to 5"),
        (3, torch.zeros(2, 5, 3), torch.tensor([5, 0]), "expected 2 numbers from 1 to 5"),
        (3, torch.zeros(2, 5, 3), torch.tensor([5, 6]), "expected 2 numbers from 1 to 5"),
    ],
    ids=["no-channels", "nothing", "no-integers", "too-few", "empty", "too-long"],
)
def test_impossible_inputs(d_input: int, x: Tensor, lengths: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(d_input=d_input)(x.double(), lengths)


def test_impossible_times() -> None:
    with pytest.raises(ValueError, match=r"times: expected shape \(2, 5\), got \(2, 4\)"):
        build()(signal(2, 5, 3), None, seconds(2, 4))


@needs_ode
def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="times: expected times that do not decrease"):
        build("neural_ode")(signal(2, 5, 3), None, -seconds(2, 5))


@pytest.mark.parametrize(
    "fields", [{"d_hidden": 0}, {"n_steps": 0}, {"solver": "x"}], ids=lambda f: next(iter(f))
)
def test_impossible_sizes_of_an_ode(fields: dict[str, Any]) -> None:
    original = config("neural_ode").to_dict()
    with pytest.raises(LongscanError, match=next(iter(fields))):
        SequenceConfig.from_dict({**original, "body_config": {**original["body_config"], **fields}})
