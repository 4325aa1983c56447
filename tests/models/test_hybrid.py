"""Hybrids: patterns, impossible sizes, published sizes, and what sets experts and multipliers apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import Hybrid, HybridConfig, Zamba2, Zamba2Config
from longscan.models.common.experts import Experts, ExpertsLayer
from longscan.models.hybrid import PRESETS
from longscan.models.zamba2 import PRESETS as ZAMBA_PRESETS

FIELDS: dict[str, Any] = {
    **{"d_model": 8, "vocab_size": 11, "pattern": "M-*E", "n_heads": 2, "d_ff": 6, "d_ssm_head": 4},
    **{"n_experts": 4, "n_active_experts": 2, "d_expert": 3},
}
# of the published files
PARAMETERS = {
    "falcon-h1-90m": 91_131_072,
    "falcon-h1-0.5b": 521_411_104,
    "granite-4.0-h-350m": 340_332_224,
    "granite-4.0-h-1b": 1_461_538_368,
    "granite-4.0-h-micro": 3_191_396_096,
    "granite-4.0-h-tiny": 6_939_037_248,
    "granite-4.0-h-small": 32_207_337_984,
    "bamba-9b": 9_780_235_392,
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "jamba-v0.1": 51_570_323_328,
}


ZAMBA_PARAMETERS = {"zamba2-1.2b": 1_215_064_704, "zamba2-2.7b": 2_662_214_560}


def config(**change: Any) -> HybridConfig:
    return HybridConfig.from_dict({**FIELDS, **change})


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_size_has_its_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Hybrid(HybridConfig.from_dict(PRESETS[name]))
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", ZAMBA_PARAMETERS)
def test_a_published_zamba2_has_its_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Zamba2(Zamba2Config.from_dict(ZAMBA_PRESETS[name]))
    assert model.num_parameters() == ZAMBA_PARAMETERS[name]


def test_blocks_are_shared_in_turn() -> None:
    fields = {"d_model": 4, "pattern": "ZMMZZ", "vocab_size": 7, "n_heads": 2, "d_ff": 3, "d_ssm_head": 4}
    model = Zamba2(Zamba2Config(**fields, n_shared=2, adapter_rank=1))
    x = torch.zeros(1, 3, 4)
    plans = model.backbone.plans(x, [None] * 5, None)
    blocks = list(model.backbone.shared)
    assert [plans[number].shared for number in (0, 3, 4)] == [blocks[0], blocks[1], blocks[0]]
    with pytest.raises(LongscanError, match="n_shared: expected at most 3"):
        Zamba2Config(**fields, n_shared=4)
    with pytest.raises(LongscanError, match="n_heads: expected a divisor of 2 d_model"):
        Zamba2Config(**{**fields, "n_heads": 3})


def test_a_pattern_is_repeated_to_the_number_of_layers() -> None:
    assert config(pattern="M-*").n_layers == 3
    longer = config(pattern="M-*", n_layers=7)
    assert longer.pattern == "M-*M-*M"
    assert longer.replace(n_layers=2).pattern == "M-"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ""}, "pattern|n_layers"),
        ({"pattern": "M?"}, "pattern: expected letters among .*'\\?'"),
        ({"pattern": "-E"}, "pattern: expected a layer that mixes"),
        ({"n_heads": None}, "n_heads: expected a number, for the '\\*'"),
        ({"d_ff": None}, "d_ff: expected a number, for the '-'"),
        ({"d_expert": None}, "d_expert: expected a number, for the 'E'"),
        ({"n_active_experts": 5}, "n_active_experts: expected at most 4 experts, got 5"),
        ({"n_expert_groups": 3}, "n_expert_groups: expected a divisor of 4 experts"),
        ({"n_expert_groups": 2, "n_active_groups": 3}, "n_active_groups: expected at most 2"),
        ({"n_ssm_groups": 3}, "n_groups: expected a divisor of 4 heads"),
        ({"pattern": "m", "d_ssm": 12}, "d_ssm: expected a multiple of d_model = 8"),
        ({"pattern": "m", "ssm_in_bias": True}, "ssm_out_bias: expected ssm_in_bias"),
        ({"d_ssm": 10}, "d_head: expected a divisor of 10"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of 2 heads"),
        ({"n_heads": 3}, "n_heads: expected a divisor of d_model"),
        ({"d_head": 5, "rope_theta": 1e4}, "d_head: expected an even width"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
        ({"logits_divisor": 0.0}, "logits_divisor"),
        ({"attention_multiplier": -1.0}, "attention_multiplier"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_impossible_sizes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        config(**change)


def test_layers_without_a_state_may_come_first() -> None:
    model = Hybrid(config(pattern="-EM*"), torch.Generator().manual_seed(0)).eval()
    state = model.init_state(3)
    assert state.batch_size == 3
    assert [len(layer) for layer in state.layers] == [0, 0, 2, 3]
    assert model.max_positions == 2048
    assert Hybrid(config(pattern="M-")).max_positions is None


ROUTERS: list[dict[str, Any]] = [
    {"router": "topk-softmax"},
    {"router": "softmax-topk", "d_shared": 4},
    {"router": "sigmoid", "normalize": False, "scale": 2.5, "kind": "relu2"},
    {"router": "sigmoid", "n_groups": 3, "n_active_groups": 2, "d_latent": 3, "d_shared": 4},
]


@pytest.mark.parametrize("options", ROUTERS, ids=lambda options: options["router"])
def test_experts_are_the_weighted_sum_of_their_equation(options: dict[str, Any]) -> None:
    layer = ExpertsLayer(d_model=5, n_experts=6, n_active=2, d_ff=4, **options)
    draw = torch.Generator().manual_seed(0)
    experts = Experts(layer, draw).double()
    with torch.no_grad():
        for tensor in (*experts.parameters(), *experts.buffers()):
            tensor += torch.randn(tensor.shape, generator=draw)
    x = torch.randn(2, 7, 5, generator=draw).double()
    expected = torch.stack([literal(experts, token) for token in x.flatten(0, 1)]).view_as(x)
    with torch.no_grad():
        assert (experts(x) - expected).abs().max() < 1e-12 * expected.abs().max()
        assert (experts(x[0, 0]) - expected[0, 0]).abs().max() < 1e-12 * expected.abs().max()


@torch.no_grad()
def literal(experts: Experts, x: Tensor) -> Tensor:
    """The mixture of one token, from nothing but the equations."""
    layer, router = experts.router.layer, experts.router
    scores = [float(row @ x) for row in router.weight]
    if layer.router == "sigmoid":
        weights = [1 / (1 + math.exp(-s)) for s in scores]
        ranks = [w + float(c) for w, c in zip(weights, router.correction, strict=True)]
        size = layer.n_experts // layer.n_groups
        groups = [ranks[i : i + size] for i in range(0, layer.n_experts, size)]
        best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: layer.n_active_groups]
        ranks = [rank if i // size in best else -9e9 for i, rank in enumerate(ranks)]
    else:
        weights = F.softmax(torch.tensor(scores, dtype=x.dtype), 0).tolist()
        ranks = scores
    chosen = sorted(range(layer.n_experts), key=lambda i: -ranks[i])[: layer.n_active]
    total = sum(weights[i] for i in chosen)
    if layer.router == "softmax-topk" or not layer.normalize:
        total = 1.0
    narrow = x if experts.fc1_latent_proj is None else experts.fc1_latent_proj(x)
    y = sum(layer.scale * weights[i] / total * experts.experts[i](narrow) for i in chosen)
    y = y if experts.fc2_latent_proj is None else experts.fc2_latent_proj(y)
    return y if experts.shared is None else y + experts.shared(x)


def test_the_correction_stays_float32() -> None:
    router = {"router": "sigmoid", "pattern": "ME"}
    model = Hybrid(config(**router)).bfloat16()
    assert model.backbone.layers[1].mixer.mlp.router.correction.dtype == torch.float32
    assert model.backbone.layers[1].mixer.mlp.router.weight.dtype == torch.bfloat16


def test_every_expert_has_a_gradient() -> None:
    model = Hybrid(config(pattern="ME", n_experts=40), torch.Generator().manual_seed(0))
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
