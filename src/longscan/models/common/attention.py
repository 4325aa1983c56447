"""Causal attention with rotary positions and a KV cache, for the models that have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.growable import KV
from longscan.models.common.layers import WeightOnly, normal_linear
from longscan.models.common.mixer import Mixer
from longscan.models.common.native_decode import matrix
from longscan.models.common.packing import warn_beyond
from longscan.ops import attention
from longscan.ops._segments import check_seq_idx, segments

__all__ = ["Attention", "AttentionLayer", "AttentionPlan", "empty_cache", "rotate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """The sizes and options of one attention layer.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: heads of keys and values, which divide them.
        d_head: width of a head.
        d_input: width of the input; None: d_model.
        rope_theta: of the rotary embeddings, nearly the longest wavelength / 2 pi; None: no positions.
        d_rotary: leading channels of each head that rotate; None: all.
        scale: of the scores; None: d_head ** -0.5.
        bias: whether the projections have biases.
        max_positions: the context length; longer sequences work, with a warning.
        depth: terms that add up in the residual stream, for the initialisation of o_proj.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_input: int | None = None
    rope_theta: float | None = 10000.0
    d_rotary: int | None = None
    scale: float | None = None
    bias: bool = False
    max_positions: int = 2048
    depth: int = 1

    def __post_init__(self) -> None:
        """Check that heads and rotations fit.

        Raises:
            LongscanError: they do not.
        """
        if self.n_heads % self.n_kv_heads:
            raise LongscanError(
                f"n_kv_heads: expected a divisor of {self.n_heads} heads, got {self.n_kv_heads}."
            )
        if self.rope_theta is not None and (self.rotary_width % 2 or self.rotary_width > self.d_head):
            got = f"{self.rotary_width} of {self.d_head} channels"
            raise LongscanError(f"d_head: expected an even width, for RoPE, got {got}.")

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotate: d_rotary or its default."""
        return self.d_head if self.d_rotary is None else self.d_rotary


class AttentionPlan(NamedTuple):
    """Rotary embeddings and masks of a forward pass, shared by all layers.

    Attributes:
        cos: (batch or 1, seq_len, 1, d_rotary / 2) of the rotary angles; without seq_len in a step; None:
            nothing rotates.
        sin: likewise.
        past: cached tokens that are attended to.
        mask: (batch or 1, 1, seq_len, past + seq_len) bool, True where a query attends; None means causal.
        order: (batch, past + seq_len) permutation of the cached and new positions that moves those which stay
            in the cache to the front; None: all stay.
        length: (batch,) int64 tokens in the cache after the pass; before it in a step.
    """

    cos: Tensor | None
    sin: Tensor | None
    past: int
    mask: Tensor | None
    order: Tensor | None
    length: Tensor


class Attention(Mixer[KV]):
    """Causal attention with rotary embeddings and a KV cache.

    Args:
        layer: sizes and options.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, layer: AttentionLayer, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer = layer
        d_in = layer.d_model if layer.d_input is None else layer.d_input
        d_q, d_kv = layer.n_heads * layer.d_head, layer.n_kv_heads * layer.d_head
        self.q_proj = normal_linear(d_in, d_q, generator, bias=layer.bias)
        self.k_proj = normal_linear(d_in, d_kv, generator, bias=layer.bias)
        self.v_proj = normal_linear(d_in, d_kv, generator, bias=layer.bias)
        self.o_proj = normal_linear(d_q, layer.d_model, generator, bias=layer.bias, depth=layer.depth)

    def plan(self, ids: Tensor, state: KV | None, seq_idx: Tensor | None) -> AttentionPlan:
        """Return positions and masks once for all layers; see `Mixer.plan`."""
        if ids.dim() == 1:
            assert state is not None
            return self._plan_step(ids, state)
        batch, seq_len = ids.shape
        seq_idx = check_seq_idx(seq_idx, batch, seq_len)
        length = torch.zeros(batch, dtype=torch.int64, device=ids.device) if state is None else state.length
        if len(length) != batch:
            raise ValueError(f"state: expected {batch} rows, got {len(length)}")
        past = 0 if state is None else state.longest
        if seq_idx is None and (not past or int(length.min()) == past):  # all rows of one length
            positions = torch.arange(past, past + seq_len, device=ids.device)[None]
            mask = None
            if past and seq_len > 1:
                mask = torch.ones(seq_len, past + seq_len, dtype=torch.bool, device=ids.device).tril(past)
            warn_beyond(past + seq_len, self.layer.max_positions)
            return self._make_plan(positions, past, mask, None, length + seq_len)
        if seq_idx is None:
            seq_idx = torch.zeros(batch, seq_len, dtype=torch.int64, device=ids.device)
        starts, padding = segments(seq_idx)
        section = torch.where(padding, -1, starts.cumsum(1))  # (batch, seq_len) 0 continues the state
        count = (~padding).cumsum(1)  # tokens so far, this one included
        before = torch.where(starts, count - 1, 0).cummax(1).values  # of those, in other sections
        positions = (count - 1 - before).clamp(min=0) + torch.where(section > 0, 0, length[:, None])
        old = torch.arange(past, device=ids.device) < length[:, None]  # (batch, past)
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=ids.device).tril()
        new = (section[:, :, None] == section[:, None]) & causal  # (batch, seq_len, seq_len)
        mask = torch.cat([(section == 0)[:, :, None] & old[:, None], new], 2)[:, None]
        last = section.amax(1, keepdim=True)  # (batch, 1) the section that the cache keeps
        stays = torch.cat([old & (last <= 0), (section == last) & ~padding], 1)  # (batch, past + seq_len)
        order = (~stays).int().argsort(dim=1, stable=True)
        return self._make_plan(positions, past, mask, order, stays.sum(1))

    def _plan_step(self, ids: Tensor, state: KV) -> AttentionPlan:
        """Return the plan of a step."""
        if len(state.length) != len(ids):
            raise ValueError(f"state: expected {len(ids)} rows, got {len(state.length)}")
        length = state.length.clone()  # every layer increments its own
        past = state.longest
        warn_beyond(past + 1, self.layer.max_positions)
        if int(length.min()) == past:
            return self._make_plan(length[:1], past, None, None, length)
        mask = torch.arange(past + 1, device=ids.device) <= length[:, None]  # (batch, past + 1)
        return self._make_plan(length, past, mask[:, None, None], None, length)

    def _make_plan(
        self, positions: Tensor, past: int, mask: Tensor | None, order: Tensor | None, length: Tensor
    ) -> AttentionPlan:
        """Return the plan, with the rotary embeddings of positions (...)."""
        if self.layer.rope_theta is None:
            return AttentionPlan(None, None, past, mask, order, length)
        angles = positions[..., None].float() * self._frequencies()  # (..., d_rotary / 2)
        return AttentionPlan(
            angles.cos()[..., None, :], angles.sin()[..., None, :], past, mask, order, length
        )

    def _frequencies(self) -> Tensor:
        """Return the radians per position (d_rotary / 2,) of each pair."""
        assert self.layer.rope_theta is not None
        half = self.layer.rotary_width // 2
        # float32 whatever the weights: distant positions would coincide in fewer bits
        exponents = torch.arange(half, device=self.q_proj.weight.device, dtype=torch.float32) / half
        return 1.0 / self.layer.rope_theta**exponents

    def forward(
        self, x: Tensor, state: KV | None, plan: AttentionPlan, /, adapters: Sequence[nn.Module] = ()
    ) -> tuple[Tensor, KV]:
        """Attend to the past; see `Mixer.forward`.

        Args:
            x: (batch, seq_len, d_input).
            state: see `Mixer.forward`.
            plan: likewise.
            adapters: of q_proj, k_proj and v_proj: they map x too, and are added.
        """
        q, k, v = self._project(x, plan, adapters)  # (batch, seq_len, heads, d_head) each
        if state is not None and plan.past:
            k = torch.cat([state.k[:, : plan.past], k], 1)
            v = torch.cat([state.v[:, : plan.past], v], 1)
        y = attention(q, k, v, mask=plan.mask, causal=plan.mask is None, scale=self.layer.scale)
        if plan.order is not None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            inside = torch.arange(plan.order.shape[1], device=k.device) < plan.length[:, None]
            k, v = (torch.where(inside[..., None, None], t[rows, plan.order], 0) for t in (k, v))
        return cast(Tensor, self.o_proj(y.flatten(2))), KV(k, v, plan.length.clone())

    def init_state(self, batch_size: int) -> KV:
        """Return an empty KV cache; see `Mixer.init_state`."""
        return empty_cache(self.layer, self.k_proj, batch_size)

    def step(
        self, x: Tensor, state: KV, plan: AttentionPlan, /, adapters: Sequence[nn.Module] = ()
    ) -> Tensor:
        """Attend to the past of one more token per row; the cache has capacity. See `forward`."""
        q, k, v = self._project(x, plan, adapters)  # (batch, heads, d_head) each
        k, v = k.to(state.k.dtype), v.to(state.v.dtype)  # autocast may have been switched on or off
        end = plan.past + 1
        if plan.mask is None:
            state.k[:, plan.past], state.v[:, plan.past] = k, v
        else:
            rows = torch.arange(len(x), device=x.device)
            state.k[rows, plan.length], state.v[rows, plan.length] = k, v
        state.length.add_(1)
        y = attention(q[:, None], state.k[:, :end], state.v[:, :end], mask=plan.mask, scale=self.layer.scale)
        return cast(Tensor, self.o_proj(y.flatten(1)))

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        q, k, v, o = map(matrix, (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        if q is None or k is None or v is None or o is None:
            return None
        sizes = self.layer
        scale = sizes.d_head**-0.5 if sizes.scale is None else sizes.scale
        frequencies = None if sizes.rope_theta is None else self._frequencies()
        weights = ops.AttentionWeights(q, k, v, o, sizes.d_head, scale, frequencies=frequencies)
        return [ops.Sublayer(weights, layer, norm)]

    def _project(
        self, x: Tensor, plan: AttentionPlan, adapters: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, (..., heads, d_head), of x (..., d_input)."""
        wide = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if adapters:
            wide = [y + adapter(x) for y, adapter in zip(wide, adapters, strict=True)]
        q, k, v = (y.unflatten(-1, (-1, self.layer.d_head)) for y in wide)
        if plan.cos is None or plan.sin is None:
            return q, k, v
        cos, sin = plan.cos.to(q.dtype), plan.sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def empty_cache(layer: AttentionLayer, like: nn.Module, batch_size: int) -> KV:
    """Return the KV cache of no tokens.

    Args:
        layer: sizes.
        like: a projection, whose outputs have the dtype of the cache.
        batch_size: rows.
    """
    weight = like.weight
    assert isinstance(weight, Tensor)
    quantised = isinstance(like, WeightOnly)  # then the activations are float32
    shape = (batch_size, 0, layer.n_kv_heads, layer.d_head)
    empty = torch.empty(shape, dtype=torch.float32 if quantised else weight.dtype, device=weight.device)
    return KV(empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64, device=weight.device))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with each pair (x_i, x_{i + d_rotary / 2}) rotated by its angle.

    Args:
        x: (..., d_head); channels from d_rotary on stay as they are.
        cos: (..., d_rotary / 2) of the angles, broadcast over x.
        sin: likewise.

    Returns:
        (..., d_head).
    """
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = [torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)]
    return torch.cat([*rotated, rest] if rest.shape[-1] else rotated, dim=-1)
