"""The native decoder in every model that has it: the forward pass, bits, KV caches, precisions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.models import MODELS, LanguageModel
from longscan.models.common.quantization import KINDS, quantize_model
from longscan.ops import _native

PRECISIONS = ("float32", *KINDS)
# relative to the largest logit: float32 rounding, or activations in 16 bits
TOLERANCE = {"float32": 5e-6, "bf16": 5e-6, "int8": 5e-4, "int4": 5e-4}
SMALL = {"d_model": 64, "n_layers": 2, "vocab_size": 100}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {**SMALL, "d_state": 32, "d_head": 32}),
    "mamba2-odd": (
        "mamba2",
        {
            **{"d_model": 36, "n_layers": 3, "vocab_size": 37, "d_state": 5, "d_head": 6, "n_groups": 3},
            **{"d_conv": 3, "bias": True, "tie_embeddings": False, "conv_bias": False},
        },
    ),
    "mamba2-norm-first": (
        "mamba2",
        {**SMALL, "d_state": 19, "d_head": 16, "gated_norm": "norm-first", "D_per_channel": True},
    ),
    "mamba2-limits": (
        "mamba2",
        {**SMALL, "d_state": 16, "d_head": 64, "gated_norm": "none", "dt_limit": (0.02, 0.3)},
    ),
    "llama": ("llama", {**SMALL, "n_heads": 4, "n_kv_heads": 2}),
    "llama-odd": (
        "llama",
        {
            **{"d_model": 40, "n_layers": 3, "vocab_size": 37, "n_heads": 3, "d_head": 10, "d_ff": 50},
            **{"tie_embeddings": False, "rope_theta": 100.0},
        },
    ),
    "falcon-h1": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "P-P-", "vocab_size": 61, "n_heads": 6, "n_kv_heads": 2},
            **{"d_head": 16, "rope_theta": 1e4, "d_ssm": 72, "d_ssm_head": 12, "d_state": 20, "d_ff": 50},
            **{"gated_norm": "none", "embedding_multiplier": 3.0, "logits_multiplier": 0.3},
            **{"attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7, "key_multiplier": 0.5},
            **{"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8, "gate_multiplier": 0.9},
            **{"ssm_multipliers": (0.5, 1.5, 0.7, 1.2, 0.9), "down_multiplier": 1.1},
        },
    ),
    "granite": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "M-*-M-", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 2},
            **{"d_ssm_head": 32, "d_state": 16, "d_ff": 96, "residual_multiplier": 0.3},
            **{"attention_multiplier": 0.02, "logits_divisor": 3.0, "embedding_multiplier": 12.0},
        },
    ),
    "nemotron": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "-M*MM-", "vocab_size": 61, "n_heads": 4, "feed_forward": "relu2"},
            **{"d_ssm": 96, "d_ssm_head": 16, "n_ssm_groups": 3, "d_state": 16, "d_ff": 100},
            **{"feed_forward_bias": True, "attention_bias": True},
        },
    ),
    "bamba": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "*-M-", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 1},
            **{"rope_theta": 1e3, "rotary_fraction": 0.5, "d_ssm_head": 16, "d_state": 16, "d_ff": 96},
        },
    ),
}
pytestmark = pytest.mark.skipif(_native._library is None, reason="no native library")


def build(shape: str, precision: str = "float32") -> LanguageModel:
    name, fields = SHAPES[shape]
    entry = MODELS[name]
    model = entry.cls(entry.config.from_dict(fields), torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    if precision != "float32":
        quantize_model(model, precision)  # type: ignore[arg-type]
    return model


def tokens(model: LanguageModel, *size: int) -> Tensor:
    return torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))


def largest(difference: Tensor, scale: Tensor) -> float:
    return (difference.detach().abs().max() / scale.detach().abs().max()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_forward_pass_and_itself_cut_anyhow(isa: str, shape: str, precision: str) -> None:
    model = build(shape, precision)
    ids = tokens(model, 7, 73)  # beyond a block of cached tokens
    with torch.no_grad():
        expected = model(ids)
    one_by_one, steps = model.init_state(7), []
    for column in ids.unbind(1):
        steps.append(model.step(column, one_by_one)[0])
    logits = torch.stack(steps, 1)
    assert model._decoder is not None, "the native decoder was not used"
    assert largest(logits - expected.logits, expected.logits) < TOLERANCE[precision]
    for ours, theirs in zip(one_by_one.used().layers, expected.state.layers, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert a.numel() == 0 or largest(a - b, b) < TOLERANCE[precision]

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
