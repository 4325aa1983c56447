"""Translators: stepping, padding, the loss, learning; what all of them have in common."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import MODELS, Translator
from translation import (
    KINDS,
    NAMES,
    SENTENCES,
    TRANSLATIONS,
    build,
    close,
    kind,
    pairs,
    rows,
    seeded,
    source_and_target,
)

# every model, every kind


@pytest.mark.parametrize("label", KINDS)
@torch.no_grad()
def test_step_by_step_is_all_at_once(label: str) -> None:
    model, (source, target) = kind(label), source_and_target()
    whole = model(source, target).logits
    alone, beams = model.start(source), model.start(source).fork(3)
    for t in range(target.shape[1]):
        logits, alone = model.step(target[:, t], alone)
        close(logits, whole[:, t])
        logits, beams = model.step(target[:, t].repeat_interleave(3), beams)
        close(logits.unflatten(0, (4, 3)), whole[:, t : t + 1].expand(4, 3, -1))


@pytest.mark.parametrize("label", KINDS)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(label: str) -> None:
    model, (source, target) = kind(label), source_and_target()
    together = model(source, target, return_weights=True)
    for i, (sentence, translation) in enumerate(zip(SENTENCES, TRANSLATIONS, strict=True)):
        own, ours = rows(sentence), rows(translation, bos=True)
        n, s = ours.shape[1], own.shape[1]
        padded = F.pad(own, (0, 6))
        for lonely in (own, padded):
            output = model(lonely, F.pad(ours, (0, 2)), return_weights=True)
            close(output.logits[0, :n], together.logits[i, :n])
            for name, weights in output.weights.items():
                looking = s if name.startswith("encoder") else n
                looked_at = n if name.startswith("decoder") else s
                close(weights[0, :, :looking, :looked_at], together.weights[name][i, :, :looking, :looked_at])
                assert name.startswith("decoder") or not weights[0, ..., s:].any()


@pytest.mark.parametrize("label", KINDS)
@torch.no_grad()
def test_rows_of_a_state_can_be_taken_apart(label: str) -> None:
    model, (source, target) = kind(label), source_and_target()
    state = model.start(source)
    for t in range(2):
        _, state = model.step(target[:, t], state)
    expected, _ = model.step(target[:, 2], state.clone())
    order = [2, 0, 0, 3]
    logits, _ = model.step(target[order, 2], state.select(order))
    close(logits, expected[order])
    forked = state.fork(2)
    logits, _ = model.step(target[[1, 3], 2], forked.select(torch.tensor([3, 7])))
    close(logits, expected[[1, 3]])
    logits, _ = model.step(
        target[[1, 1, 3, 3], 2], forked.branch(torch.tensor([3, 2, 6, 6]), torch.tensor([1, 3]))
    )
    close(logits, expected[[1, 1, 3, 3]])
    assert forked.memory is state.memory  # nothing of the source is copied
    assert forked.branch(torch.arange(8)).memory is state.memory


@pytest.mark.parametrize("label", KINDS)
def test_the_loss_is_that_of_the_logits(label: str) -> None:
    model, (source, target) = kind(label), source_and_target()
    logits = model(source, target).logits[:, :-1].flatten(0, 1)
    wanted = target[:, 1:].flatten()
    for smoothing in (0.0, 0.1):
        aim = torch.full_like(logits, smoothing / (logits.shape[1] - 1))  # Vaswani et al.: of the other V - 1
        aim.scatter_(1, wanted[:, None], 1 - smoothing)
        nats = -(aim * logits.log_softmax(-1)).sum(1)[wanted != 0].mean()
        loss = model.loss(source, target, label_smoothing=smoothing)
        close(loss, nats)
        ours, theirs = (
            torch.autograd.grad(x, tuple(model.parameters()), allow_unused=True, retain_graph=True)
            for x in (loss, nats)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)
        with torch.no_grad():
            close(model.loss(source, target, label_smoothing=smoothing), nats)


@pytest.mark.parametrize("label", KINDS)
def test_every_parameter_learns(label: str) -> None:
    model, (source, target) = kind(label, dropout=0.1), source_and_target()
    torch.manual_seed(0)
    model.train().loss(source, target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("label", [label for label in KINDS if "seq2seq" not in label])
@torch.no_grad()
def test_weights_are_shares(label: str) -> None:
    model, (source, target) = kind(label), source_and_target()
    output = model(source, target, return_weights=True)
    assert any(name.startswith("cross") for name in output.weights)
    for name, weights in output.weights.items():
        assert weights.dim() == 4
        sums = weights.sum(-1)
        if "local" in label:  # the Gaussian takes its part, and a window may be empty
            assert (sums < 1 + 1e-10).all()
        else:
            close(sums, torch.ones_like(sums))
        if name.startswith("decoder"):
            assert not weights.triu(1).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_makes_the_same_model(name: str) -> None:
    entry = MODELS[name]
    config = entry.config.from_dict(entry.presets["tiny"])
    torch.manual_seed(0)
    one = cast(Translator, entry.cls(config, seeded(5)))
    torch.manual_seed(1)
    other = cast(Translator, entry.cls(config, seeded(5)))
    assert one.fingerprint() == other.fingerprint()
    assert all(parameter.isfinite().all() for parameter in one.parameters())
    source, target = source_and_target()
    assert abs(one.loss(source, target).item() - math.log(64)) < 1.5  # it starts by guessing


@pytest.mark.parametrize("name", NAMES)
def test_dropout_only_happens_in_training(name: str) -> None:
    model, (source, target) = build(name, dropout=0.3), source_and_target()
    assert torch.equal(model(source, target).logits, model(source, target).logits)
    model.train()
    assert not torch.equal(model(source, target).logits, model(source, target).logits)


def learn(model: Translator, steps: int, lr: float) -> float:
    """Train to reverse sentences; return the share of tokens it gets right afterwards."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
    generator = seeded(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        loss = model.train().loss(*pairs(32, 8, 4, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    source, target = pairs(200, 8, 4, generator)
    with torch.no_grad():
        found = model.eval()(source, target[:, :-1]).logits.argmax(-1)
    wanted = target[:, 1:]
    return float((found == wanted)[wanted != 0].float().mean())


@pytest.mark.parametrize(
    ("name", "steps", "lr", "fields"),
    [
        ("bahdanau", 120, 3e-2, {"d_hidden": 48}),
        ("luong", 120, 1e-2, {"d_hidden": 64, "n_layers": 1}),
        ("transformer", 150, 6e-3, {}),
    ],
    ids=["bahdanau", "luong", "transformer"],
)
def test_models_with_attention_learn_to_reverse(
    name: str, steps: int, lr: float, fields: dict[str, int]
) -> None:
    entry = MODELS[name]
    config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 8, **fields})
    assert learn(cast(Translator, entry.cls(config, seeded())), steps, lr) > 0.95


# word vectors, bad input


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_word_vectors_are_read_as_they_are(name: str) -> None:
    model = build(name)
    width = model.table("target").weight.shape[1]
    ids, vectors = torch.tensor([5, 7]), torch.randn(2, width, generator=seeded())
    before = model.table("source").weight[6].clone()
    model.load_vectors(ids, vectors, "source")
    close(model.table("source")(ids) * model.embedding_scale, vectors.double())
    assert torch.equal(model.table("source").weight[6], before)
    with pytest.raises(LongscanError, match=f"expected a width of {width}, got {width + 1}"):
        model.load_vectors(ids, torch.zeros(2, width + 1), "target")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("seq2seq", {"vocab_size": 0}, "vocab_size: expected 1 or more, got 0"),
        ("seq2seq", {"d_hidden": 0}, "d_hidden: expected 1 or more, got 0"),
        ("bahdanau", {"eos_id": 1}, "three different ids below vocab_size"),
        ("bahdanau", {"pad_id": 64}, "three different ids below vocab_size"),
        ("luong", {"dropout": 1.0}, "dropout: expected at least 0 and below 1"),
        ("luong", {"window": 0}, "window: expected 1 or more, got 0"),
        ("luong", {"score": "mlp"}, "one of 'dot', 'general', 'concat', 'location'"),
        ("transformer", {"n_heads": 5}, "d_model: expected an even multiple of n_heads"),
        ("transformer", {"norm_eps": -1.0}, "norm_eps: expected 0 or more"),
    ],
    ids=str,
)
def test_a_config_out_of_range_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    entry = MODELS[name]
    with pytest.raises(LongscanError, match=message):
        entry.config.from_dict({**entry.presets["tiny"], **fields})


def test_ids_that_do_not_fit_are_refused() -> None:
    model, (source, target) = build("transformer"), source_and_target()
    with pytest.raises(ValueError, match="source, target: expected as many rows, got 4 and 3"):
        model(source, target[:3])
    with pytest.raises(ValueError, match="source: expected a non-empty"):
        model.start(source[0])
    with pytest.raises(ValueError, match="target: expected a non-empty"):
        model(source, target[:, :0])
    with pytest.raises(ValueError, match="expected a token after bos_id"):
        model.loss(source, torch.tensor([[1, 0]] * 4))


@torch.no_grad()
def test_a_source_of_nothing_gives_numbers() -> None:
    source, target = rows([3, 4], [5]), rows([3], [4], bos=True)
    source[1] = 0
    for label in KINDS:
        assert kind(label)(source, target).logits.isfinite().all()
