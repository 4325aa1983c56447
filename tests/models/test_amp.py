"""Autocast: every language model learns under it, with float32 gradients and a float32 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.models import MODELS

NAMES = [name for name, entry in MODELS.items() if entry.kind == "language"]
HALVES = {torch.bfloat16: 0.01, torch.float16: 0.002}  # how far the loss may move
STATELESS = {
    "llama",
    "gau",
    "cnn",
    "hybrid",
    "zamba2",
}  # what they keep are tokens, in the type of the products

halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
every = pytest.mark.parametrize("name", NAMES)


def build(name: str) -> Any:
    entry = MODELS[name]
    return entry.cls(entry.config.from_dict(entry.presets["tiny"]), torch.Generator().manual_seed(0))


def draw(model: Any, seq_len: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (2, seq_len), generator=g)


@halves
@every
@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_training(name: str, dtype: torch.dtype, inside: bool) -> None:
    model = build(name)
    ids = draw(model, 9)
    packed = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1]).expand(2, -1)
    for extra in ({}, {"return_logits": False}, {"seq_idx": packed}):
        model.zero_grad()
        model(ids, labels=ids, **extra).loss.backward()
        exact = {key: p.grad.clone() for key, p in model.named_parameters()}
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            output = model(ids, labels=ids, **extra)
        with torch.autocast("cpu", dtype, enabled=inside):
            output.loss.backward()
        assert output.loss.dtype == torch.float32
        expected = model(ids, labels=ids, **extra).loss
        assert abs(float(output.loss.detach() - expected.detach())) < HALVES[dtype]
        for key, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32, key
            scale = float(exact[key].norm())
            error = float((parameter.grad - exact[key]).norm())
            assert error <= 0.1 * scale + 1e-4, (key, error, scale)


@halves
@every
def test_decoding(name: str, dtype: torch.dtype) -> None:
    """Prefill and steps under autocast, and steps after it."""
    model = build(name).eval()
    ids = draw(model, 7)
    logits, state = model.prefill(ids)
    expected = [logits.clone()]
    for _ in range(3):
        logits, state = model.step(ids[:, 0], state)
        expected.append(logits.clone())
    with torch.autocast("cpu", dtype):
        logits, state = model.prefill(ids)
        got = [logits.clone()]
        for _ in range(2):
            logits, state = model.step(ids[:, 0], state)
            got.append(logits.clone())
    logits, _ = model.step(ids[:, 0], state)
    got.append(logits)
    for a, b in zip(got, expected, strict=True):
        assert float((a.float() - b).norm()) <= 0.05 * float(b.norm()) + 1e-3
    if name not in STATELESS:
        kinds = {t.dtype for layer in state.layers for t in layer if t.is_floating_point()}
        assert kinds == {torch.float32}


@halves
@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.kind == "translation"])
def test_translators(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    g = torch.Generator().manual_seed(1)
    source, target = (torch.randint(4, model.config.vocab_size, (2, n), generator=g) for n in (6, 7))
    for smoothing in (0.0, 0.1):
        exact = model.loss(source, target, smoothing)
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model.loss(source, target, smoothing)
        loss.backward()
        assert loss.dtype == torch.float32
        assert abs(float(loss.detach() - exact.detach())) < HALVES[dtype]
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    with torch.no_grad():
        logits = model(source, target).logits
        with torch.autocast("cpu", dtype):
            state = model.start(source)
            got = torch.stack([model.step(ids, state)[0] for ids in target.unbind(1)], 1)
    assert float((got.float() - logits).norm()) <= 0.05 * float(logits.norm()) + 1e-3
