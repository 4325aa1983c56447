"""What a layer computes from a text, as matrices, norms and half-lives, against the layer itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.inference.layer_scans import ChannelScan, HeadScan
from longscan.inference.text_layers import (
    TextLayer,
    mixing_layers,
    states,
    time_steps,
    visit_layers,
    walk_layers,
)
from longscan.models import MODELS
from longscan.models.common.attention import Attention
from longscan.models.mamba import MambaMixer
from longscan.models.mamba2 import Mamba2Mixer
from longscan.models.mamba3 import Mamba3Mixer

MIXERS = (MambaMixer, Mamba2Mixer, Mamba3Mixer)
HYBRID = {"d_model": 32, "d_ff": 32, "d_ssm_head": 8, "d_state": 8}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "falcon mamba": ("mamba", {"inner_norms": "plain"}),
    "mamba2": ("mamba2", {}),
    "mamba2 groups": (
        "mamba2",
        {"n_groups": 2, "D_per_channel": True, "dt_limit": (0.01, 0.05), "d_ssm": 64, "gated_norm": "none"},
    ),
    "mamba3": ("mamba3", {}),
    "mamba3 mimo": ("mamba3", {"mimo_rank": 2, "n_groups": 2, "A_activation": "softplus"}),
    "hybrid": ("hybrid", {**HYBRID, "pattern": "m-P*M", "n_layers": 5, "ssm_in_multiplier": 1.3}),
    "hybrid conv": ("hybrid", {**HYBRID, "pattern": "M*", "n_layers": 2, "attention_conv": 3}),
    "zamba2": ("zamba2", {"n_shared": 2, "attention_adapters": True}),
}


def make(variant: tuple[str, dict[str, Any]], dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose dt, A, B and C are far from their start."""
    name, fields = variant
    entry, draw = MODELS[name], torch.Generator().manual_seed(0)
    model = entry.cls(entry.config.from_dict({**entry.presets["tiny"], **fields}), draw).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.3 / parameter.shape[-1] ** 0.5
            parameter.add_(spread * torch.randn(parameter.shape, generator=draw))
    return model.to(dtype)


def draw_ids(n: int = 41) -> Tensor:
    return torch.randint(257, (n,), generator=torch.Generator().manual_seed(1))


def passes(model: Any, kinds: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """Each module of some kinds, in the order of their calls, with its input and output."""
    seen: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, x, y: seen.append((module, x[0][0], y[0][0])))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model(draw_ids()[None])
    for hook in hooks:
        hook.remove()
    return seen


def scans(model: Any) -> list[Any]:
    return [
        layer.scan for layer in visit_layers(model, draw_ids(), lambda each: each) if layer.scan is not None
    ]


def finish(mixer: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a mixer makes of the output of its scan: gate, norm and projection."""
    projected = mixer.in_proj(x)
    if isinstance(mixer, MambaMixer):
        return mixer.out_proj(y * F.silu(projected.chunk(2, -1)[1]))
    if isinstance(mixer, Mamba2Mixer):
        z0, x0, z, *_ = projected.split(mixer.splits, -1)
        y = y.flatten(1)
        y = y * F.silu(z) if mixer.norm is None else mixer.norm(y, z)
        return mixer.out_proj(torch.cat([x0 * F.silu(z0), y], -1) if mixer.layer.d_mlp else y)
    z = projected[:, : mixer.config.d_inner].view(len(x), 1, *y.shape[2:])
    if mixer.config.mimo_rank is not None:
        z = z * mixer.mimo_z.transpose(0, 1)
        y = y * F.silu(z) * mixer.mimo_o.transpose(0, 1)
    else:
        y = y * F.silu(z)
    return mixer.out_proj(y.sum(1).flatten(1))


def unrolled(scan: Any) -> Tensor:
    """sum_j alpha_ij u_j + D u_i of all channels, or heads."""
    if isinstance(scan, ChannelScan):
        return torch.einsum("dij,jd->id", scan.alpha(slice(None)), scan.u) + scan.D * scan.u
    v, D = scan.tokens.v, scan.D if scan.D.dim() == 2 else scan.D[:, None]
    y = torch.einsum("hirjs,jshp->irhp", scan.alpha(slice(None)), v) + D * v
    return y if v.shape[1] > 1 else y.view(v.shape)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_scan_is_a_product_with_its_hidden_attention(variant: str) -> None:
    model = make(VARIANTS[variant])
    found, ran = scans(model), passes(model, MIXERS)
    assert len(found) == len(ran) > 0
    for scan, (mixer, x, output) in zip(found, ran, strict=True):
        torch.testing.assert_close(finish(mixer, x, unrolled(scan)), output, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_matrix_is_causal_and_a_mean_is_over_all(variant: str) -> None:
    for scan in scans(make(VARIANTS[variant])):
        alpha = scan.alpha(slice(None))
        parts = torch.cat([scan.alpha(slice(k, k + 1)) for k in range(len(alpha))])
        torch.testing.assert_close(parts, alpha, atol=1e-14, rtol=1e-9)
        rank = (2, 4) if alpha.dim() == 5 else ()  # outputs and inputs of a step, of a MIMO Mamba-3
        torch.testing.assert_close(scan.matrix(1), alpha.mean(rank)[1] if rank else alpha[1])
        size = alpha.abs()
        torch.testing.assert_close(scan.matrix(), (size.mean(rank) if rank else size).mean(0))
        assert scan.matrix().triu(1).count_nonzero() == 0
        assert scan.matrix().count_nonzero() == 41 * 42 // 2


def literal_dt(mixer: Any, x: Tensor) -> Tensor:
    """The time steps by their definition, from what projects them."""
    if isinstance(mixer, Mamba2Mixer):
        least, most = mixer.layer.dt_limit or (0.0, math.inf)
        return F.softplus(mixer.in_proj(x).split(mixer.splits, -1)[-1] + mixer.dt_bias).clamp(least, most)
    return F.softplus(mixer.in_proj(x).split(mixer.config.splits, -1)[4] + mixer.dt_bias)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_time_steps_are_those_that_the_model_used(variant: str) -> None:
    model, expected = make(VARIANTS[variant]), []
    for mixer, x, _ in passes(model, MIXERS):
        if isinstance(mixer, MambaMixer):
            seen: list[Tensor] = []
            hook = mixer.dt_proj.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y[0]))
            mixer(x[None])
            hook.remove()
            expected.append(F.softplus(seen[0] + mixer.dt_proj.bias))
        else:
            expected.append(literal_dt(mixer, x))
    found = scans(model)
    for scan, dt in zip(found, expected, strict=True):
        torch.testing.assert_close(scan.dt, dt, atol=1e-14, rtol=0)
    means = time_steps(model, draw_ids())
    torch.testing.assert_close(means, torch.stack([dt.mean(1) for dt in expected]), atol=1e-14, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
def test_norms_are_those_of_the_state(variant: str, dtype: torch.dtype, atol: float) -> None:
    model, ids = make(VARIANTS[variant], dtype), draw_ids()
    norms, _ = states(model, ids)
    for n in (1, 2, 33, 41):
        state = model.prefill(ids[None, :n])[1]
        expected = [layer.ssm.norm() for layer in state.layers if hasattr(layer, "ssm")]
        torch.testing.assert_close(norms[:, n - 1], torch.stack(expected), atol=atol, rtol=atol)


def literal_half_life(dt: list[float], rate: float, start: int) -> float:
    """Tokens until exp(-rate sum of dt) is at most one half, after the text at its mean rate."""
    total, n = 0.0, 0
    mean = sum(dt) / len(dt)
    while True:
        total += dt[start + 1 + n] if start + 1 + n < len(dt) else mean
        n += 1
        if math.exp(-rate * total) <= 0.5:
            return n


@pytest.mark.parametrize("variant", ["mamba", "mamba2 groups", "mamba3"])
def test_half_lives_against_a_count(variant: str) -> None:
    ids = draw_ids()
    for scan in scans(make(VARIANTS[variant])):
        found = scan.half_lives()
        per_head = isinstance(scan, HeadScan)
        dt = -scan.tokens.log_decay if per_head else scan.dt
        rates = torch.ones(dt.shape[1], 1) if per_head else -scan.A
        assert found.shape == (len(ids), *rates.shape)
        for start, lane, state in ((0, 0, 0), (7, 1, -1), (20, 2, 0), (39, 3, -1), (40, 0, 0)):
            expected = literal_half_life(dt[:, lane].tolist(), float(rates[lane, state]), start)
            assert found[start, lane, state] == expected


def test_half_lives_of_a_constant_decay() -> None:
    n = 200
    dt, A = torch.full((n, 2), 0.1).double(), -torch.tensor([[1.0, 2.0], [0.5, 100.0]]).double()
    dt[:, 1] = 0.0
    other = torch.ones(n, 2).double()
    found = ChannelScan(dt, dt, A, other, other, dt[0]).half_lives()
    assert found.shape == (64, 2, 2)  # long texts are sampled
    assert (found[:, 0] == torch.tensor([7.0, 4.0])).all()  # ln 2 / 0.1 and half of it, rounded up
    assert found[:, 1].isinf().all()


def test_quartiles_are_over_tokens_channels_and_states() -> None:
    model = make(VARIANTS["hybrid"])
    _, quartiles = states(model, draw_ids())
    for scan, row in zip(scans(model), quartiles, strict=True):
        values = scan.half_lives().flatten().sort().values
        for share, quartile in zip((0.25, 0.5, 0.75), row, strict=True):
            at = share * (len(values) - 1)
            assert quartile in (values[math.floor(at)], values[math.ceil(at)])


@pytest.mark.parametrize("variant", [("llama", {}), VARIANTS["hybrid"], VARIANTS["zamba2"]])
@torch.no_grad()
def test_softmax_weights_are_those_of_the_layer(variant: tuple[str, dict[str, Any]]) -> None:
    model = make(variant)
    found = [
        layer.attention for layer in visit_layers(model, draw_ids(), lambda each: each) if layer.attention
    ]
    ran = passes(model, Attention)
    assert len(found) == len(ran) > 0
    for each, (module, _, output) in zip(found, ran, strict=True):
        n_heads = each.q.shape[1]
        v = each.v.repeat_interleave(n_heads // each.v.shape[1], 1)
        weights = torch.stack([each.matrix(head) for head in range(n_heads)])
        y = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        torch.testing.assert_close(module.o_proj(y), output, atol=1e-12, rtol=0)
        torch.testing.assert_close(each.matrix(), weights.mean(0))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_layers_have_the_numbers_of_the_model() -> None:
    layers = mixing_layers(make(VARIANTS["hybrid"]))
    assert [each.number for each in layers if each.scan] == [0, 2, 4]
    assert [each.number for each in layers if each.attention] == [2, 3]
    assert [each.scan.noun for each in layers if each.scan] == ["channel", "head", "head"]
    both = [each.number for each in mixing_layers(make(VARIANTS["hybrid conv"]))]
    assert both == [0, 1]
    assert not mixing_layers(make(("s4d", {})))


def test_a_model_is_as_before_after_an_error() -> None:
    model, ids = make(VARIANTS["mamba3"]), draw_ids()
    before = model(ids[None]).logits

    def fail(_: TextLayer) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit_layers(model, ids, fail)
    assert torch.equal(model(ids[None]).logits, before)
    assert [each.number for each in mixing_layers(model)] == [0, 1]


@pytest.mark.parametrize("variant", ["mamba", "mamba3", "hybrid"])
def test_damaged_weights_are_refused(variant: str) -> None:
    model = make(VARIANTS[variant])
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight.fill_(torch.nan)
    with pytest.raises(LongscanError, match="layer 0 computes NaN or infinity: the model's weights"):
        time_steps(model, draw_ids())


def test_nothing_is_retained_but_results() -> None:
    assert visit_layers(make(VARIANTS["mamba"]), draw_ids(), lambda each: each.number) == [0, 1]


@pytest.mark.parametrize("name", ["mamba", "mamba3", "hybrid"])
def test_the_model_may_be_used_between_two_layers(name: str) -> None:
    """A server decodes other texts meanwhile: neither notices."""
    model, ids = make(VARIANTS[name]), draw_ids(9)
    expected = visit_layers(model, ids, lambda layer: layer.scan and layer.scan.dt)
    logits, state = model.prefill(draw_ids(5)[None])
    alone = model.step(ids[:1], state.clone())[0]
    found = []
    for layer in walk_layers(model, ids):
        found.append(layer.scan and layer.scan.dt)
        assert torch.equal(model.prefill(draw_ids(5)[None])[0], logits)
        assert torch.equal(model.step(ids[:1], state.clone())[0], alone)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
