"""The native decoder in every model that has it: the forward pass, bits, KV caches, precisions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from decoded_models import SHAPES, build, largest, tokens
from longscan.models import LanguageModel
from longscan.models.common.experts import Router
from longscan.models.common.quantization import KINDS
from longscan.ops import _native

PRECISIONS = ("float32", *KINDS)
# relative to the largest logit: float32 rounding, or activations in 16 bits
TOLERANCE = {"float32": 5e-6, "bf16": 5e-6, "int8": 5e-4, "int4": 5e-4}
pytestmark = pytest.mark.skipif(_native._library is None, reason="no native library")


def settled(model: LanguageModel, ids: Tensor, tolerance: float) -> tuple[Any, Tensor]:
    """The forward pass, and the tokens (batch, seq_len) up to which rounding decides over no expert."""
    wavers = torch.zeros(ids.shape, dtype=torch.bool)
    g = torch.Generator().manual_seed(2)

    def look(router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        chosen = output[1].sort(1).values
        for _ in range(4):
            x = inputs[0] + tolerance * inputs[0].abs().max() * torch.randn(inputs[0].shape, generator=g)
            wavers.logical_or_((router.forward(x)[1].sort(1).values != chosen).any(1).view(ids.shape))

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, Router)]  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(ids)
    for handle in handles:
        handle.remove()
    return output, wavers.cumsum(1) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_forward_pass_and_itself_cut_anyhow(isa: str, shape: str, precision: str) -> None:
    model = build(shape, precision)
    ids = tokens(model, 7, 73)  # beyond a block of cached tokens
    expected, clear = settled(model, ids, TOLERANCE[precision])
    rows = clear[:, -1]
    assert clear.float().mean() > 0.2
    one_by_one, steps = model.init_state(7), []
    for column in ids.unbind(1):
        steps.append(model.step(column, one_by_one)[0])
    logits = torch.stack(steps, 1)
    assert model._decoder is not None, "the native decoder was not used"
    assert largest((logits - expected.logits)[clear], expected.logits) < TOLERANCE[precision]
    for ours, theirs in zip(one_by_one.used().layers, expected.state.layers, strict=True):
        for name, a, b in zip(getattr(ours, "_fields", ()), ours, theirs, strict=True):
            assert a.shape == b.shape
            difference = a - b
            if name == "angle":  # whole turns do not count
                difference -= 2 * math.pi * (difference / (2 * math.pi)).round()
            # steps round the angle to float32 73 times, one pass does not: so much further k and ssm may be
            allowed = TOLERANCE[precision] * (2 if shape.startswith("mamba3") else 1)
            assert not difference[rows].numel() or largest(difference[rows], b) < allowed

    together = model.init_state(7)
    cuts = (slice(5), slice(5, 6), slice(6, 70), slice(70, None))
    pieces = [model.advance(ids[:, cut], together)[0] for cut in cuts]
    assert torch.equal(torch.cat(pieces, 1), logits)
    alone = model.init_state(1)
    assert torch.equal(model.advance(ids[4:5], alone)[0][0], logits[4])
    for whole, cut in ((one_by_one, together), (one_by_one.select([4]), alone)):
        for ours, theirs in zip(whole.used().layers, cut.used().layers, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape: str, precision: str) -> None:
    model, before = build(shape, precision), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            state = model.init_state(3)
            found.append(model.advance(tokens(model, 3, 9), state)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_goes_on_from_prompts_of_different_lengths(shape: str) -> None:
    """Rows of a padded batch have caches of their own lengths."""
    model = build(shape)
    ids = tokens(model, 3, 12)
    seq_idx = torch.tensor([[-1] * 7 + [0] * 5, [0] * 12, [0] * 3 + [-1] * 9])
    _, state = model.prefill(ids, seq_idx=seq_idx)
    following = tokens(model, 3, 4)
    logits = model.advance(following, state)[0]
    assert model._decoder is not None
    for row in range(3):
        prompt = ids[row, seq_idx[row] >= 0]
        whole = model(torch.cat([prompt, following[row]])[None]).logits[0, len(prompt) :]
        assert largest(logits[row] - whole, whole) < 1e-5


@pytest.mark.parametrize("shape", ["llama", "llama-odd"])
def test_long_caches_are_read_in_spans(isa: str, shape: str) -> None:
    """Caches that end before, at and behind a border of 1,024 tokens: the forward pass; bits alone."""
    model, before = build(shape), torch.get_num_threads()
    lengths, size = (3, 1_020, 1_023, 1_024, 2_041), 2_041
    ids, following = tokens(model, 5, size), tokens(model, 5, 7)
    seq_idx = torch.tensor([[-1] * (size - n) + [0] * n for n in lengths])
    _, state = model.prefill(ids, seq_idx=seq_idx)
    mark = state.mark()
    logits = model.advance(following, state)[0]
    assert model._decoder is not None
    for row, n in enumerate(lengths):
        whole = model(torch.cat([ids[row, size - n :], following[row]])[None]).logits[0, n:]
        assert largest(logits[row] - whole, whole) < 1e-5
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            state.rewind(mark)
            pieces = [model.advance(piece, state)[0] for piece in following.split((1, 2, 4), 1)]
            assert torch.equal(torch.cat(pieces, 1), logits)
            state.rewind(mark)
            for row in range(5):
                alone = model.advance(following[row : row + 1], state.select([row]))[0]
                assert torch.equal(alone[0], logits[row])
    finally:
        torch.set_num_threads(before)


def test_a_cache_grows_and_rewinds() -> None:
    model = build("llama")
    ids = tokens(model, 2, 40)
    state = model.init_state(2)
    first = model.advance(ids[:, :3], state)[0]
    mark = state.mark()
    model.advance(tokens(model, 2, 30).flip(1), state)
    state.rewind(mark)
    rest = model.advance(ids[:, 3:], state)[0]
    whole = model.advance(ids, model.init_state(2))[0]
    assert torch.equal(torch.cat([first, rest], 1), whole)


def test_a_text_beyond_the_context_is_warned_of() -> None:
    model = build("llama")
    model.config.__dict__["max_positions"] = 8
    state = model.init_state(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.advance(tokens(model, 1, 8), state)
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        model.step(tokens(model, 1), state)


@pytest.mark.parametrize("shape", ["falcon-h1", "granite", "mamba2"])
def test_changed_factors_are_noticed(shape: str) -> None:
    """Constants beside the weights are copied into the stack."""
    model = build(shape)
    ids = tokens(model, 2)
    model.step(ids, model.init_state(2))
    model.backbone.embedding_multiplier *= 2
    model.backbone.hidden_multiplier *= 0.7
    for block in model.backbone.layers:
        for module in (block, block.mixer):
            if hasattr(module, "outward"):
                factors: Any = module.outward
                module.outward = (
                    3 * factors if isinstance(factors, float) else tuple(3 * factor for factor in factors)
                )
    logits = model.step(ids, model.init_state(2))[0]
    with torch.no_grad():
        expected = model(ids[:, None]).logits[:, 0]
    assert largest(logits - expected, expected) < 5e-6
