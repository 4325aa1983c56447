"""Attention: for each query, the average of the values, weighted by the match of query and keys.

    out_i = sum_j a_ij v_j,    a_i = softmax_j(scale q_i . k_j) over the j that query i attends to

Vaswani et al., 2017 (arXiv 1706.03762), section 3.2. A mask is True where a query attends, as in torch's
scaled_dot_product_attention; in nn.MultiheadAttention True means the opposite. A query whose keys are all
masked gets zeros and has no gradient, where the softmax would be NaN.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from longscan.ops._derivatives import composed, gradients

# --- 1. the equation ----------------------------------------------------------------------------------------


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`attention`, computed by the equation, and the weights.

    Args:
        q: as there, like all that follows.
        k: likewise.
        v: likewise.
        mask: likewise.
        causal: likewise.
        scale: likewise.
        dropout: likewise.

    Returns:
        out: (batch, q_len, n_heads, d_v).
        weights: (batch, n_heads, q_len, k_len), before dropout; each row sums to 1, or is zero.
    """
    group = _check(q, k, v)
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = masked_softmax(scores, _combine(mask, causal, q, k))
    return torch.einsum("bhij,bjhd->bihd", F.dropout(weights, dropout), v), weights


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of scores over the last axis; rows that are masked entirely are zero.

    Args:
        scores: (..., k_len).
        mask: boolean, broadcastable to the scores; False is masked. Nothing is if None.

    Returns:
        (..., k_len).
    """
    if mask is None:
        return scores.softmax(-1)
    # a row of only -inf would be NaN, forward and backward; with a finite minimum it is uniform, then zeroed
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(-1) * mask


# --- 2. the op ----------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the attention output, through torch's fused kernel where that applies.

    Args:
        q: (batch, q_len, n_heads, d_head), the queries.
        k: (batch, k_len, n_kv_heads, d_head), the keys. n_heads is a multiple of n_kv_heads: groups of
            adjacent query heads share one head of keys and values.
        v: (batch, k_len, n_kv_heads, d_v), the values.
        mask: boolean, broadcastable to (batch, n_heads, q_len, k_len), True where a query attends.
        causal: whether query i sees only the keys up to i + k_len - q_len: the queries are the last q_len
            of the k_len positions.
        scale: of the scores; d_head ** -0.5 if None.
        dropout: dropout probability of the weights; the caller passes 0 in evaluation.

    Returns:
        (batch, q_len, n_heads, d_v); zeros for a query whose keys are all masked. A key or value that is not
        finite makes those queries NaN that may attend to it, and no others.

    Raises:
        ValueError: shapes do not fit.
    """
    group = _check(q, k, v)
    if not q.dtype == k.dtype == v.dtype:  # autocast was switched on or off since
        k, v = k.to(q.dtype), v.to(q.dtype)
    if composed():
        return attention_ref(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout)[0]
    out = _fused(q, k, v, mask, causal, scale, dropout, group)
    if (mask is None and not causal) or torch.compiler.is_compiling() or out.is_meta:
        return out
    if bool(out.detach().sum().isfinite()):
        return out
    # a weight of zero carries NaN to queries that may not look at it: 0 · NaN is NaN
    sound = [x.isfinite().all(-1) for x in (k, v)]
    k, v = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (k, v))
    out = _fused(q, k, v, mask, causal, scale, dropout, group)
    bad = ~(sound[0] & sound[1]).transpose(1, 2).repeat_interleave(group, 1)[:, :, None]
    allowed = _combine(mask, causal, q, k)
    seen = (bad if allowed is None else bad & allowed).any(-1)  # (batch, n_heads, q_len or 1)
    return out.masked_fill(seen.transpose(1, 2)[..., None], torch.nan)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    group: int,
) -> Tensor:
    """Run torch's kernel; see `attention`."""
    square = causal and mask is None and q.shape[1] == k.shape[1]
    mask = None if square else _combine(mask, causal, q, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, n_heads, q_len, d_head)
    if _trains_fused(q, k, v, mask, square, dropout):
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        out = cast(Tensor, _Fused.apply(q, k, v, mask, square, scale))  # type: ignore[no-untyped-call]
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=square, scale=scale, enable_gqa=group > 1
        )
    return out.transpose(1, 2)


def _trains_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> bool:
    """Return whether gradients go through torch's fused CPU kernel, which has no second derivatives."""
    needed = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (
        not needed
        or q.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    gqa = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, causal, enable_gqa=gqa)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)


class _Fused(torch.autograd.Function):
    """Torch's fused kernel and its gradients; second derivatives are those of the equation."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        added = (
            None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        )
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = fused(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, mask, added, out, logsumexp)
        ctx.causal, ctx.scale = causal, scale
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, added, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():

            def equation(*inputs: Tensor) -> tuple[Tensor]:
                q, k, v = (x.transpose(1, 2) for x in inputs)
                weighted, _ = attention_ref(q, k, v, mask=mask, causal=ctx.causal, scale=ctx.scale)
                return (weighted.transpose(1, 2),)

            of = gradients(equation, (q, k, v), (dout,))
            return of.get(0), of.get(1), of.get(2), None, None, None
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        rest = 0.0, ctx.causal
        dq, dk, dv = fused(dout, q, k, v, out, logsumexp, *rest, attn_mask=added, scale=ctx.scale)
        return dq, dk, dv, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return the number of query heads per KV head; raise ValueError unless the shapes fit."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v: expected (batch, seq_len, n_heads, d_head), {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k, v: expected equal batch and d_head, and a value for every key, {shapes}")
    group, rest = divmod(q.shape[2], k.shape[2])
    if rest:
        raise ValueError(f"q, k: expected n_heads to be a multiple of n_kv_heads, {shapes}")
    return group


def _combine(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask combined with the causal one, or None if nothing is masked."""
    q_len, k_len = q.shape[1], k.shape[1]
    if not causal or q_len == 1:  # a single query is the last one and sees all
        return mask
    allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    return allowed if mask is None else mask & allowed
