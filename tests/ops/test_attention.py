"""Attention: against a loop over everything, torch's two attentions, and what a mask has to mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.ops import attention, attention_ref, masked_softmax

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)

# q_len, k_len, n_heads, n_kv_heads, d_head, d_v
SHAPES = {
    "square": (5, 5, 4, 4, 8, 8),
    "longer-keys": (3, 7, 2, 2, 4, 4),
    "longer-queries": (6, 4, 2, 2, 4, 4),
    "one-query": (1, 9, 4, 4, 8, 8),
    "grouped": (5, 5, 6, 2, 4, 4),
    "one-kv-head": (4, 6, 4, 1, 8, 8),
    "other-values": (4, 5, 2, 2, 8, 3),
    "long": (70, 130, 2, 2, 16, 16),
}
MASKS = {"all": (False, False), "mask": (True, False), "causal": (False, True), "both": (True, True)}


def draw(shape: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q_len, k_len, n_heads, n_kv_heads, d_head, d_v = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(generator=generator).requires_grad_()

    return (
        normal(2, q_len, n_heads, d_head),
        normal(2, k_len, n_kv_heads, d_head),
        normal(2, k_len, n_kv_heads, d_v),
    )


def draw_mask(q: Tensor, k: Tensor) -> Tensor:
    """Forbid half of it, and everything to the first query of the last row."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, q.shape[1], k.shape[1], generator=generator) < 0.5
    mask[-1, :, 0] = False
    return mask


def reference(*arguments: Any, **options: Any) -> Tensor:
    return attention_ref(*arguments, **options)[0]


def loop(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend one number at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, q_len, n_heads, d_head = q.shape
    k_len, n_kv_heads = k.shape[1:3]
    out = torch.zeros(batch, q_len, n_heads, v.shape[3], dtype=torch.float64)
    weights = torch.zeros(batch, n_heads, q_len, k_len, dtype=torch.float64)
    for b in range(batch):
        for h in range(n_heads):
            shared = h // (n_heads // n_kv_heads)
            for i in range(q_len):
                seen = [j for j in range(k_len) if not causal or j <= i + k_len - q_len]
                if mask is not None:
                    seen = [j for j in seen if mask[b, 0, i, j]]
                factor = d_head**-0.5 if scale is None else scale
                scores = [factor * (q[b, i, h] @ k[b, j, shared]) for j in seen]
                total = sum(score.exp() for score in scores)
                for j, score in zip(seen, scores, strict=True):
                    weights[b, h, i, j] = score.exp() / total
                    out[b, i, h] += weights[b, h, i, j] * v[b, j, shared]
    return out, weights


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype])


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    direction = torch.empty(out.shape).normal_(generator=generator)
    return torch.autograd.grad(out, inputs, direction.to(out.dtype), retain_graph=True)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "long"])
@torch.no_grad()
def test_the_reference_is_the_equation(shape: str, masks: str) -> None:
    q, k, v = draw(shape, torch.float64)
    mask, causal = draw_mask(q, k) if MASKS[masks][0] else None, MASKS[masks][1]
    scale = 0.7 if shape == "square" else None
    out, weights = attention_ref(q, k, v, mask=mask, causal=causal, scale=scale)
    expected = loop(q, k, v, mask, causal, scale)
    close(out, expected[0], torch.float64)
    close(weights, expected[1], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_op_is_the_reference(shape: str, masks: str, dtype: torch.dtype) -> None:
    q, k, v = draw(shape, dtype)
    mask, causal = draw_mask(q, k) if MASKS[masks][0] else None, MASKS[masks][1]
    scale = 0.3 if shape == "grouped" else None
    out = attention(q, k, v, mask=mask, causal=causal, scale=scale)
    expected, weights = attention_ref(*(x.double() for x in (q, k, v)), mask=mask, causal=causal, scale=scale)
    close(out, expected, dtype)
    for ours, theirs in zip(gradients(out, q, k, v), gradients(expected, q, k, v), strict=True):
        assert ours.isfinite().all()
        close(ours, theirs, dtype)
    sums = weights.sum(-1)
    assert ((sums == 0) | ((sums - 1).abs() < 1e-10)).all()


@pytest.mark.parametrize("function", [attention, reference], ids=["op", "ref"])
@pytest.mark.parametrize("shape", ["square", "grouped", "one-query", "other-values"])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(shape: str, function: Any) -> None:
    q, k, v = draw(shape, torch.float32)
    mask = torch.ones(2, 1, 1, k.shape[1], dtype=torch.bool)
    mask[1] = False
    out = function(q, k, v, mask=mask)
    assert out[0].abs().min() > 0
    assert not out[1].any()
    for gradient in gradients(out, q, k, v):
        assert gradient.isfinite().all()
        assert gradient[0].any()
        assert not gradient[1].any()


def test_causal_queries_are_the_last_of_the_positions() -> None:
    q, k, v = draw("square", torch.float64)
    whole = attention(q, k, v, causal=True)
    for begin in range(5):
        close(attention(q[:, begin:], k, v, causal=True), whole[:, begin:], torch.float64)
    close(whole[:, 0], v[:, 0], torch.float64)  # the first one sees itself alone
    ahead = attention(torch.cat((q, q), 1), k, v, causal=True)
    assert not ahead[:, :5].any()  # positions before the first key


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_it_is_torchs_sdpa(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = draw("square", dtype)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    close(attention_ref(q, k, v, causal=causal)[0], theirs.transpose(1, 2), dtype)
    close(attention(q, k, v, causal=causal), theirs.transpose(1, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
def test_it_is_torchs_multi_head_attention(dtype: torch.dtype) -> None:
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    x, y = (torch.empty(2, n, 12, dtype=dtype).normal_(generator=generator) for n in (4, 6))
    padding = torch.arange(6) >= torch.tensor([[6], [3]])  # True is padding there, True may be seen here
    expected, expected_weights = theirs(x, y, y, key_padding_mask=padding, average_attn_weights=False)
    weight, bias = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    heads = [F.linear(t, w, b).unflatten(-1, (3, 4)) for t, w, b in zip((x, y, y), weight, bias, strict=True)]
    mask = ~padding[:, None, None]
    out, weights = attention_ref(*heads, mask=mask)
    for ours in (out, attention(*heads, mask=mask)):
        result = F.linear(ours.flatten(2), theirs.out_proj.weight, theirs.out_proj.bias)
        close(result, expected, dtype)
        parameters = (theirs.in_proj_weight, theirs.out_proj.weight)
        both = gradients(result, *parameters), gradients(theirs(x, y, y, padding)[0], *parameters)
        for mine, wanted in zip(*both, strict=True):
            close(mine, wanted, dtype)
    close(weights, expected_weights, dtype)


def test_the_scale_keeps_the_spread_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.empty(200, 1, 1, 64).normal_(generator=generator) for _ in range(2))
    products = (q * k).sum(-1)
    assert abs(products.var().item() / 64 - 1) < 0.3  # section 3.2.1: the variance of q . k is d_head


@pytest.mark.parametrize("function", [attention, reference], ids=["op", "ref"])
def test_dropout_takes_weights_away_and_keeps_the_mean(function: Any) -> None:
    torch.manual_seed(0)
    q, k, v = draw("square", torch.float32)
    whole = attention(q, k, v)
    drawn = torch.stack([function(q, k, v, dropout=0.5) for _ in range(2000)])
    assert drawn.std(0).min() > 0
    torch.testing.assert_close(drawn.mean(0), whole, rtol=0, atol=0.1)


def test_a_masked_softmax_differentiates() -> None:
    scores = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = masked_softmax(scores, mask)
    torch.testing.assert_close(weights[0], torch.tensor([1.0, -torch.inf, 3.0]).double().softmax(0))
    assert not weights[1].any()
    assert torch.autograd.gradcheck(lambda x: masked_softmax(x, mask), scores)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), "expected \\(batch, seq_len, n_heads, d_head\\)"),
        (((2, 3, 4, 8), (1, 3, 4, 8), (2, 3, 4, 8)), "equal batch and d_head"),
        (((2, 3, 4, 8), (2, 3, 4, 6), (2, 3, 4, 6)), "equal batch and d_head"),
        (((2, 3, 4, 8), (2, 3, 4, 8), (2, 5, 4, 8)), "a value for every key"),
        (((2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8)), "multiple of n_kv_heads"),
    ],
    ids=["dims", "batch", "width", "values", "groups"],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes))
