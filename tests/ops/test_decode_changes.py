"""Mamba-3, experts and Zamba2 in the native decoder: ties, few rows, what is changed or not supported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoded_models import build, largest, tokens
from longscan.models import MODELS, LanguageModel
from longscan.ops import _native

TOLERANCE = 5e-6  # of float32, relative to the largest logit
pytestmark = pytest.mark.skipif(_native._library is None, reason="no native library")


def stepped(model: LanguageModel, ids: Tensor) -> Tensor:
    state = model.init_state(len(ids))
    return torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)


@pytest.mark.parametrize(
    "shape", ["mamba3-mimo-odd", "falcon-h1", "granite-experts", "nemotron-latent", "zamba2"]
)
def test_few_rows_on_many_threads_change_no_bit(shape: str) -> None:
    """Every thread prepares a few rows for itself, which is another path than that of many rows.

    With more threads than cores some of them are late wherever they can be.
    """
    model, before, found = build(shape), torch.get_num_threads(), []
    ids = tokens(model, 2, 12)
    try:
        for threads in (1, 2, 5, 5, 9, 9):
            torch.set_num_threads(threads)
            found += [stepped(model, ids), model.advance(ids, model.init_state(2))[0]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("router", ["topk-softmax", "sigmoid"])
def test_of_equal_scores_the_first_experts_win(router: str) -> None:
    fields: dict[str, Any] = {
        **{"d_model": 32, "pattern": "ME", "vocab_size": 40, "d_ssm_head": 16, "d_state": 8},
        **{"n_active_experts": 3, "d_expert": 24, "router": router},
    }
    entry = MODELS["hybrid"]
    many, three = (
        entry.cls(entry.config.from_dict({**fields, "n_experts": n}), torch.Generator().manual_seed(0)).eval()
        for n in (6, 3)
    )
    assert isinstance(many, LanguageModel)
    assert isinstance(three, LanguageModel)
    scores = "backbone.layers.1.mixer.mlp.router"
    for model in (many, three):
        model.get_parameter(f"{scores}.weight").data.zero_()
    shared = {name: many.state_dict()[name] for name in three.state_dict() if scores not in name}
    three.load_state_dict(shared, strict=False)
    ids = tokens(many, 2, 6)
    with torch.no_grad():
        expected = three(ids).logits
    assert largest(stepped(many, ids) - expected, expected) < TOLERANCE
    assert many._decoder is not None


def test_scores_that_are_not_numbers_do_no_harm() -> None:
    model = build("nemotron-latent")
    model.get_buffer("backbone.layers.3.mixer.mlp.router.correction")[2:5] = torch.nan
    ids = tokens(model, 2, 4)
    model.get_parameter("backbone.embedding.weight").data[ids[0, 0]] = torch.nan
    logits = stepped(model, ids)
    assert logits[0].isnan().all()
    assert model._decoder is not None


def halve(name: str) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        tensor = dict((*model.named_parameters(), *model.named_buffers()))[name]
        tensor.data.mul_(0.5)

    return change


def doubled(name: str) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args: _twice(forward(*args))  # type: ignore[method-assign]

    return change


def _twice(result: Any) -> Any:
    return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result


def other_eps(*names: str) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        for name in names:
            model.get_submodule(name).eps = 0.3  # type: ignore[assignment]

    return change


def biased(name: str) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        linear: Any = model.get_submodule(name)
        linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))

    return change


MIXER, MLP = "backbone.layers.1.mixer", "backbone.layers.3.mixer.mlp"
CHANGES: dict[str, tuple[str, Callable[[LanguageModel], None]]] = {
    "a bias through data": ("mamba3-mimo-two", halve(f"{MIXER}.B_bias")),
    "a factor through data": ("mamba3-mimo-two", halve(f"{MIXER}.mimo_o")),
    "half of fc1": ("mamba3-mimo-two", halve("backbone.layers.1.mlp.fc1.weight")),
    "one inner eps": ("mamba3-odd", other_eps(f"{MIXER}.C_norm")),
    "both inner eps": ("mamba3-odd", other_eps(f"{MIXER}.B_norm", f"{MIXER}.C_norm")),
    "the eps of y": ("mamba3-odd", other_eps(f"{MIXER}.norm")),
    "the convolution through data": ("conv-attention", halve(f"{MIXER}.conv1d.weight")),
    "the convolution's bias": ("conv-attention", halve(f"{MIXER}.conv1d.bias")),
    "the forward of an inner norm": ("mamba3", doubled(f"{MIXER}.B_norm")),
    "the correction": ("nemotron-latent", halve(f"{MLP}.router.correction")),
    "the forward of a router": ("nemotron-latent", doubled(f"{MLP}.router")),
    "the forward of an expert": ("granite-experts", doubled(f"{MLP}.experts.4")),
    "an expert's bias at the end": ("granite-experts", biased(f"{MLP}.experts.2.down_proj")),
    "an expert's bias inside": ("granite-experts", biased(f"{MLP}.experts.2.up_proj")),
    "an adapter of keys": ("zamba2", halve(f"{MIXER}.adapters.1.0.weight")),
    "an adapter's bias": ("zamba2", biased(f"{MIXER}.adapters.1.0")),
    "another bias of an adapter": ("zamba2", biased(f"{MIXER}.gate_up_adapter.1")),
    "the forward of an adapter": ("zamba2", doubled(f"{MIXER}.gate_up_adapter")),
    "the way into Mamba-2": ("zamba2", halve(f"{MIXER}.linear.weight")),
    "a norm of the shared block": ("zamba2", halve("backbone.shared.1.input_layernorm.weight")),
    "the eps of the shared block": ("zamba2", other_eps("backbone.shared.1.pre_ff_layernorm")),
    "the shared expert": ("granite-experts", halve(f"{MLP}.shared.up_proj.weight")),
}


@pytest.mark.parametrize("at", ["before the first step", "after it"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_the_forward_pass_whatever_was_changed(change: str, at: str) -> None:
    shape, apply = CHANGES[change]
    model = build(shape)
    ids = tokens(model, 3, 6)
    if at == "after it":
        model.step(ids[:, 0], model.init_state(3))
    with torch.no_grad():
        before = model(ids).logits
        apply(model)
        expected = model(ids).logits
    assert not torch.equal(expected, before), "nothing changed"
    logits = stepped(model, ids)
    assert largest(logits - expected, expected) < TOLERANCE


def test_more_vectors_than_the_decoder_supports_take_the_reference() -> None:
    entry = MODELS["mamba3"]
    fields = {"d_model": 16, "n_layers": 1, "vocab_size": 20, "d_state": 4, "d_head": 8, "mimo_rank": 17}
    model = entry.cls(entry.config.from_dict(fields), torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    ids = tokens(model, 2, 5)
    with torch.no_grad():
        expected = model(ids).logits
    assert largest(stepped(model, ids) - expected, expected) < TOLERANCE
    assert model._decoder is None


def test_a_text_goes_on_from_a_prompt_and_from_a_copied_state() -> None:
    """Mamba-3's k and v are of the last token alone: no cache that grows."""
    model = build("mamba3-mimo")
    ids = tokens(model, 2, 30)
    _, state = model.prefill(ids[:, :20], chunk_size=7)
    twin = state.clone()
    logits = model.advance(ids[:, 20:], state)[0]
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
    assert largest(logits - expected, expected) < TOLERANCE
    assert torch.equal(model.advance(ids[:, 20:], twin)[0], logits)
    assert model._decoder is not None
