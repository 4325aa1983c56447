"""LoRA on every language model: what is frozen stays, what is trained learns, merged is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach, detach, merge, shape_of
from longscan.models.common.quantization import KINDS, dequantized, quantize_model
from longscan.ops import Kind

LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language" and name != "cnn"]
LAYER = LoraLayer(rank=3, scale=2.0)


def build(name: str, **fields: Any) -> LanguageModel:
    entry = MODELS[name]
    settings = {**entry.presets["tiny"], **fields}
    model = entry.cls(entry.config.from_dict(settings), torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    return model


def draw_ids() -> Tensor:
    return torch.randint(0, 100, (2, 19), generator=torch.Generator().manual_seed(1))


def with_adapters(model: LanguageModel, *, trained: bool = True) -> LanguageModel:
    """Give all matrices an adapter, and B what training might make of it."""
    draw = torch.Generator().manual_seed(2)
    attach(model, dict.fromkeys(adaptable(model), LAYER), generator=draw)
    for _, module in adapted(model):
        if trained:
            torch.nn.init.normal_(module.lora_B, std=0.05, generator=draw)
    return model


def steps(model: LanguageModel, ids: Tensor) -> Tensor:
    state = model.init_state(len(ids))
    return torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_new_adapter_changes_nothing_and_a_removed_one_leaves_nothing(name: str) -> None:
    model, ids = build(name), draw_ids()
    with torch.no_grad():
        before, tensors = model(ids).logits, {k: t.clone() for k, t in model.state_dict().items()}
        with_adapters(model, trained=False)
        assert torch.equal(model(ids).logits, before)
        with_adapters_off = with_adapters(copy.deepcopy(build(name)))
        detach(with_adapters_off)
    assert not list(adapted(with_adapters_off))
    after = with_adapters_off.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", LANGUAGE)
def test_adapted_and_merged_compute_the_same_in_every_way(name: str) -> None:
    model, ids = build(name).double(), draw_ids()
    with torch.no_grad():
        base, decoded = model(ids).logits, steps(model, ids)  # a decoder is made, and must be dropped
        with_adapters(model).double()
        logits = model(ids).logits
        assert float((logits - base).abs().max()) > 1e-7
        torch.testing.assert_close(steps(model, ids), logits, rtol=1e-9, atol=1e-9)
        assert not torch.equal(steps(model, ids), decoded)
        merge(model)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps(model, ids), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LANGUAGE)
def test_only_adapters_get_gradients_and_all_of_them_do(name: str) -> None:
    model, ids = with_adapters(build(name)), draw_ids()
    model(ids, labels=ids, return_logits=False).loss.backward()
    for key, parameter in model.named_parameters():
        is_adapter = "lora_" in key
        assert parameter.requires_grad == is_adapter
        assert (parameter.grad is not None) == is_adapter, key
        if is_adapter:
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0, key


def test_gradients_are_those_of_the_sum_of_matrices() -> None:
    """d/dA of W + s B A is s B^T dW, and d/dB is s dW A^T."""
    model, ids = build("mamba", tie_embeddings=False).double(), draw_ids()
    full = copy.deepcopy(model)
    with_adapters(model).double()
    model(ids, labels=ids, return_logits=False).loss.backward()
    for name, module in adapted(model):
        with torch.no_grad():
            full.get_parameter(f"{name}.weight").add_(module.s * module.lora_B @ module.lora_A)
    full(ids, labels=ids, return_logits=False).loss.backward()
    for name, module in adapted(model):
        weight = full.get_parameter(f"{name}.weight").grad
        assert weight is not None
        torch.testing.assert_close(
            module.lora_A.grad, module.s * module.lora_B.T @ weight, rtol=1e-8, atol=1e-12
        )
        torch.testing.assert_close(
            module.lora_B.grad, module.s * weight @ module.lora_A.T, rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mamba", "mamba2", "llama"])
def test_on_quantised_weights_gradients_are_those_on_the_dequantised(name: str, kind: Kind) -> None:
    stored, ids = build(name, d_model=64), draw_ids()
    quantize_model(stored, kind)
    plain = dequantized(stored)
    results = []
    for model in (stored, plain):
        with_adapters(model)
        loss = model(ids, labels=ids, return_logits=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(LongscanError, match="quantised"):
        merge(stored)
    assert len(list(adapted(stored))) == len(list(adapted(plain)))  # nothing was merged


def test_quantised_weights_are_not_retained_as_float32() -> None:
    model, ids = build("mamba", d_model=64), draw_ids()
    quantize_model(model, "int8")
    with_adapters(model)
    saved: list[tuple[torch.dtype, torch.Size]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append((t.dtype, t.shape)), t)[1], lambda t: t
    ):
        model(ids, labels=ids, return_logits=False)
    assert not [shape for _, shape in saved if shape and shape[-1] >= model.config.vocab_size]  # no logits
    matrices = {shape_of(module) for name, module in adapted(model) if not name.endswith("dt_proj")}
    assert not [shape for dtype, shape in saved if dtype == torch.float32 and tuple(shape) in matrices]


def test_dropout_is_for_training_alone() -> None:
    model, ids = build("mamba"), draw_ids()
    attach(model, dict.fromkeys(adaptable(model), LAYER), dropout=0.5)
    for _, module in adapted(model):
        torch.nn.init.ones_(module.lora_B)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_an_unknown_matrix_is_refused() -> None:
    model = build("mamba")
    for name in ("backbone.embedding", "backbone.layers.0.mixer.conv1d", "nothing"):
        with pytest.raises(LongscanError, match=name):
            attach(model, {name: LAYER})
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["mamba", "llama", "zamba2"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model, ids = build(name).double(), draw_ids()
    seq_idx = torch.tensor([[0] * 7 + [1] * 12, [0] * 15 + [-1] * 4])
    gradients = []
    for model.backbone.checkpointing in (False, True):
        loss = model(ids, labels=ids, seq_idx=seq_idx, return_logits=False).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
