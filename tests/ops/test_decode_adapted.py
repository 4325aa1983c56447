"""LoRA in the native decoder: every kind of model, every format, every instruction set, and changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decoded_models import SHAPES, build, largest, tokens
from longscan.models import LanguageModel
from longscan.models.common.adapted import Adapted
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach, detach
from longscan.models.common.quantization import quantize_model
from longscan.ops import MAX_ADAPTER, Kind, _native

TOLERANCE = 5e-6  # of float32, relative to the largest logit
# as torch's path of the same weights rounds neither the activations nor, of bf16, its sums
STORED: dict[Kind, float] = {"bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}
pytestmark = pytest.mark.skipif(_native._library is None, reason="no native library")


def adapt(model: LanguageModel, rank: int = 5, scale: float = 1.7) -> LanguageModel:
    draw = torch.Generator().manual_seed(3)
    attach(model, dict.fromkeys(adaptable(model), LoraLayer(rank, scale)), generator=draw)
    for _, module in adapted(model):
        torch.nn.init.normal_(module.lora_B, std=0.1, generator=draw)
    return model


def stepped(model: LanguageModel, ids: Tensor) -> Tensor:
    state = model.init_state(len(ids))
    found = torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)
    assert model._decoder is not None, "the native decoder was not used"
    return found


def whole(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_forward_pass(shape: str) -> None:
    model, plain = adapt(build(shape)), build(shape)
    ids = tokens(model, 3, 9)
    expected = whole(model, ids)
    assert largest(expected - whole(plain, ids), expected) > 1e-3
    assert largest(stepped(model, ids) - expected, expected) < TOLERANCE
    assert largest(model.advance(ids, model.init_state(3))[0] - expected, expected) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 3, 16, 64, MAX_ADAPTER])
@pytest.mark.parametrize("shape", ["mamba2-odd", "llama"])
def test_every_rank_on_every_instruction_set(isa: str, shape: str, rank: int) -> None:
    model = adapt(build(shape), rank, 0.3)
    ids = tokens(model, 2, 5)
    expected = whole(model, ids)
    assert largest(stepped(model, ids) - expected, expected) < TOLERANCE


@pytest.mark.parametrize("kind", STORED)
def test_stored_weights_have_it_beside_them(isa: str, kind: Kind) -> None:
    model = build("llama")
    quantize_model(model, kind)
    plain = stepped(model, ids := tokens(model, 3, 7))
    adapt(model)
    expected, found = whole(model, ids), stepped(model, ids)
    change = expected - plain
    assert largest(change, expected) > 5 * STORED[kind]
    assert largest(found - expected, expected) < STORED[kind]


@pytest.mark.parametrize("shape", ["mamba2", "llama", "falcon-h1", "granite-experts", "zamba2"])
def test_rows_and_threads_change_no_bit(shape: str) -> None:
    model, before = adapt(build(shape)), torch.get_num_threads()
    ids = tokens(model, 11, 6)
    expected = stepped(model, ids)
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(stepped(model, ids), expected)
            assert torch.equal(stepped(model, ids[4:5]), expected[4:5])
            assert torch.equal(stepped(model, ids[2:6]), expected[2:6])
    finally:
        torch.set_num_threads(before)


def rescale(module: Adapted) -> None:
    module.s *= 2


def in_place(module: Adapted) -> None:
    module.lora_B.data.mul_(2)


def replaced(module: Adapted) -> None:
    module.lora_A = torch.nn.Parameter(2 * module.lora_A.detach())


@pytest.mark.parametrize("change", [rescale, in_place, replaced])
def test_a_change_is_seen(change: Callable[[Adapted], None]) -> None:
    model = adapt(build("llama"))
    ids = tokens(model, 2, 5)
    before = stepped(model, ids)
    for _, module in adapted(model):
        change(module)
    expected = whole(model, ids)
    assert largest(before - expected, expected) > 1e-3
    assert largest(stepped(model, ids) - expected, expected) < TOLERANCE


def test_a_removed_adapter_is_gone() -> None:
    model, plain = build("llama"), build("llama")
    ids = tokens(model, 2, 5)
    stepped(adapt(model), ids)
    detach(model)
    assert torch.equal(stepped(model, ids), stepped(plain, ids))


def test_dropout_and_large_ranks_take_the_reference() -> None:
    ids = tokens(build("llama"), 2, 5)
    for model in (adapt(build("llama"), MAX_ADAPTER + 1), adapt(build("llama"))):
        if len(next(adapted(model))[1].lora_A) <= MAX_ADAPTER:
            for _, module in adapted(model):
                module.dropout = 0.1
        expected, state = whole(model, ids), model.init_state(2)
        found = torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)
        assert model._decoder is None
        assert largest(found - expected, expected) < TOLERANCE
