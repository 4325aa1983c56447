"""LLaMA: Open and Efficient Foundation Language Models.

Hugo Touvron and others, 2023, arXiv 2302.13971.

Parent: the decoder of the Transformer, without cross-attention. It is the baseline of the Mamba paper, which
calls it Transformer++.
Kept: causal multi-head self-attention; two sublayers in each block.
Changed: pre-norm with RMSNorm (1910.07467); rotary position embeddings (RoPE, 2104.09864); a gated
feed-forward layer (SwiGLU, 2002.05202); no biases. Several query heads may share one head of keys and values
(grouped-query attention, 2305.13245), as in LLaMA 2 and 3.

Deviations from the official code: RoPE rotates the two halves of a head against each other, as in Hugging
Face's files, not adjacent pairs; the model takes a state and returns one, both with gradients; padding and
packed sequences are supported; the residual stream is float32 whatever the dtype of the weights, and so are
the angles.

The block, for tokens x of width d_model at positions t:

    q, k, v = W_q x, W_k x, W_v x                      per head of width d_head
    q, k    = R_t q, R_t k                             R_t rotates (x_i, x_{i + d_head / 2}) by the angle
                                                       t rope_theta^(-2 i / d_head)
    x       = x + W_o softmax(q k' / sqrt(d_head)) v   over the tokens up to t; after a norm
    x       = x + W_down (silu(W_gate x) * W_up x)     after a norm

The state is a KV cache, which grows with the sequence: a key and a value per token, layer and KV head.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.growable import KV
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import Linear, RMSNorm, WeightOnly, blank
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.native_decode import matrix
from longscan.models.common.packing import warn_beyond
from longscan.ops import attention
from longscan.ops._segments import check_seq_idx, segments

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "n_heads": 4, "n_kv_heads": 2},
    # about as large as Mamba's presets of the same names
    "tiny-lm": {"d_model": 256, "n_layers": 4, "vocab_size": 4096, "n_heads": 4, "d_ff": 800},
    "130m": {"d_model": 768, "n_layers": 12, "vocab_size": 50277, "n_heads": 12},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(LanguageModelConfig):
    """The configuration of a Llama.

    Raises:
        LongscanError: a value is out of range.
    """

    n_heads: int
    n_kv_heads: int | None = None  # heads of keys and values; None is n_heads
    d_head: int | None = None  # None is d_model / n_heads
    d_ff: int | None = None  # width inside the feed-forward layer; None is 8/3 d_model, rounded up to 32s
    rope_theta: float = 10000.0  # nearly the longest wavelength / 2 pi
    max_positions: int = 2048  # the context length; longer sequences work, with a warning

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("n_heads", "n_kv_heads", "d_head", "d_ff", "max_positions")
        if self.n_heads % self.kv_heads:
            raise LongscanError(
                f"n_kv_heads: expected a divisor of {self.n_heads} heads, got {self.kv_heads}."
            )
        if self.d_head is None and self.d_model % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"n_heads: expected a divisor of d_model, got {got}. Or set d_head.")
        if self.head_width % 2:
            raise LongscanError(f"d_head: expected an even width, for RoPE, got {self.head_width}.")
        self.check("rope_theta", above=0)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: n_kv_heads or its default."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head: d_head or its default."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward layer: d_ff or its default."""
        return -(-8 * self.d_model // 96) * 32 if self.d_ff is None else self.d_ff


class AttentionPlan(NamedTuple):
    """Rotary embeddings and masks of a forward pass, shared by all layers.

    Attributes:
        cos: (batch or 1, seq_len, 1, d_head / 2) of the rotary angles; without seq_len in a step.
        sin: likewise.
        past: cached tokens that are attended to.
        mask: (batch or 1, 1, seq_len, past + seq_len) bool, True where a query attends; None means causal.
        order: (batch, past + seq_len) permutation of the cached and new positions that moves those which stay
            in the cache to the front; None: all stay.
        length: (batch,) int64 tokens in the cache after the pass; before it in a step.
    """

    cos: Tensor
    sin: Tensor
    past: int
    mask: Tensor | None
    order: Tensor | None
    length: Tensor


class Attention(Mixer[KV]):
    """Causal attention with rotary embeddings and a KV cache.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d_head = config.head_width
        d_q, d_kv = config.n_heads * d_head, config.kv_heads * d_head
        self.q_proj = _matrix(config.d_model, d_q, config, generator)
        self.k_proj = _matrix(config.d_model, d_kv, config, generator)
        self.v_proj = _matrix(config.d_model, d_kv, config, generator)
        self.o_proj = _matrix(d_q, config.d_model, config, generator, ends=True)

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
            warn_beyond(past + seq_len, self.config.max_positions)
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
        warn_beyond(past + 1, self.config.max_positions)
        if int(length.min()) == past:
            return self._make_plan(length[:1], past, None, None, length)
        mask = torch.arange(past + 1, device=ids.device) <= length[:, None]  # (batch, past + 1)
        return self._make_plan(length, past, mask[:, None, None], None, length)

    def _make_plan(
        self, positions: Tensor, past: int, mask: Tensor | None, order: Tensor | None, length: Tensor
    ) -> AttentionPlan:
        """Return the plan, with the rotary embeddings of positions (...)."""
        angles = positions[..., None].float() * self._frequencies()  # (..., d_head / 2)
        return AttentionPlan(
            angles.cos()[..., None, :], angles.sin()[..., None, :], past, mask, order, length
        )

    def forward(self, x: Tensor, state: KV | None, plan: AttentionPlan, /) -> tuple[Tensor, KV]:
        """Attend to the past; see `Mixer.forward`."""
        q, k, v = self._project(x, plan)  # (batch, seq_len, heads, d_head) each
        if state is not None and plan.past:
            k = torch.cat([state.k[:, : plan.past], k], 1)
            v = torch.cat([state.v[:, : plan.past], v], 1)
        y = attention(q, k, v, mask=plan.mask, causal=plan.mask is None)
        if plan.order is not None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            inside = torch.arange(plan.order.shape[1], device=k.device) < plan.length[:, None]
            k, v = (torch.where(inside[..., None, None], t[rows, plan.order], 0) for t in (k, v))
        return cast(Tensor, self.o_proj(y.flatten(2))), KV(k, v, plan.length.clone())

    def init_state(self, batch_size: int) -> KV:
        """Return an empty KV cache; see `Mixer.init_state`."""
        weight = self.k_proj.weight
        quantised = isinstance(self.k_proj, WeightOnly)  # then the activations are float32
        shape = (batch_size, 0, self.config.kv_heads, self.config.head_width)
        empty = torch.empty(shape, dtype=torch.float32 if quantised else weight.dtype, device=weight.device)
        return KV(empty, empty.clone(), torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def step(self, x: Tensor, state: KV, plan: AttentionPlan, /) -> Tensor:
        """Attend to the past of one more token per row; the cache has capacity. See `Mixer.step`."""
        q, k, v = self._project(x, plan)  # (batch, heads, d_head) each
        k, v = k.to(state.k.dtype), v.to(state.v.dtype)  # autocast may have been switched on or off
        end = plan.past + 1
        if plan.mask is None:
            state.k[:, plan.past], state.v[:, plan.past] = k, v
        else:
            rows = torch.arange(len(x), device=x.device)
            state.k[rows, plan.length], state.v[rows, plan.length] = k, v
        state.length.add_(1)
        y = attention(q[:, None], state.k[:, :end], state.v[:, :end], mask=plan.mask)
        return cast(Tensor, self.o_proj(y.flatten(1)))

    def native(self) -> ops.AttentionWeights | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        q, k, v, o = map(matrix, (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        if q is None or k is None or v is None or o is None:
            return None
        d_head = self.config.head_width
        return ops.AttentionWeights(q, k, v, o, d_head, d_head**-0.5, frequencies=self._frequencies())

    def _frequencies(self) -> Tensor:
        """Return the radians per position (d_head / 2,) of each pair."""
        half = self.config.head_width // 2
        # float32 whatever the weights: distant positions would coincide in fewer bits
        exponents = torch.arange(half, device=self.q_proj.weight.device, dtype=torch.float32) / half
        return 1.0 / self.config.rope_theta**exponents

    def _project(self, x: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, (..., heads, d_head), of x (..., d_model)."""
        split = (-1, self.config.head_width)
        q, k, v = (proj(x).unflatten(-1, split) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = plan.cos.to(q.dtype), plan.sin.to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with each pair (x_i, x_{i + d_head / 2}) rotated by its angle.

    Args:
        x: (..., d_head).
        cos: (..., d_head / 2) of the angles, broadcast over x.
        sin: likewise.

    Returns:
        (..., d_head).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x).

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gate_proj = _matrix(config.d_model, config.ff_width, config, generator)
        self.up_proj = _matrix(config.d_model, config.ff_width, config, generator)
        self.down_proj = _matrix(config.ff_width, config.d_model, config, generator, ends=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def native(self) -> ops.MLPWeights | None:
        """Return the weights for the native decoder; None if it cannot use them."""
        gate, up, down = map(matrix, (self.gate_proj, self.up_proj, self.down_proj))
        return None if gate is None or up is None or down is None else ops.MLPWeights(gate, up, down)


class LlamaBlock(Block):
    """x + attention(norm(x)), then x + mlp(mlp_norm(x)).

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, Attention(config, generator))
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, generator)

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the outputs of both sublayers to the residual stream x (batch, seq_len, d_model)."""
        x, state = super().forward(x, state, plan)
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the outputs of both sublayers for one token per row, x (batch, d_model)."""
        x = super().step(x, state, plan)
        return cast(Tensor, x + self.mlp(self.mlp_norm(x)))

    def native(self, layer: int) -> list[ops.Sublayer] | None:
        """Return both sublayers for the native decoder; see `Block.native`."""
        attention, mlp = super().native(layer), self.mlp.native()
        if attention is None or mlp is None:
            return None
        return [*attention, ops.Sublayer(mlp, layer, self.mlp_norm.weight)]


class Llama(LanguageModel):
    """A decoder-only Transformer.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: LlamaConfig
    decodable = (LlamaBlock, Attention, SwiGLU)

    @staticmethod
    def block(config: LlamaConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return LlamaBlock(config, generator)

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for."""
        return self.config.max_positions


def _matrix(
    d_in: int, d_out: int, config: LlamaConfig, generator: torch.Generator | None, ends: bool = False
) -> nn.Linear:
    """Return a Linear with GPT-2's initialisation, scaled by 1/sqrt(2 n_layers) if it ends a sublayer."""
    layer = blank(Linear, d_in, d_out, bias=False)
    if not layer.weight.is_meta:
        std = 0.02 / math.sqrt(2 * config.n_layers) if ends else 0.02
        nn.init.normal_(layer.weight, std=std, generator=generator)
    return layer


ENTRY = ModelEntry(
    name="llama",
    kind="language",
    year=2023,
    paper="LLaMA: Open and Efficient Foundation Language Models",
    arxiv="2302.13971",
    idea="every token before, rotated by its distance",
    parents=("transformer",),
    cls=Llama,
    config=LlamaConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
