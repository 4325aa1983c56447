"""Transformer Quality in Linear Time: the gated attention unit.

Weizhe Hua, Zihang Dai, Hanxiao Liu, Quoc V. Le, 2022, arXiv 2202.10447.

Parents: the Transformer, whose attention and feed-forward sublayers it merges, and linear attention, which
the paper's FLASH uses beyond a chunk.
Kept: every token attends to all before it. Changed: a gate as wide as a feed-forward layer lets one head,
whose queries and keys are cheap transforms of one projection, do the work of many; a squared relu replaces
the softmax. Mamba inherits the block: two wide streams, one mixed along time, the other the gate.

Deviations: this is the quadratic unit, not FLASH's chunks; the relative position bias is that of the paper
for long sequences (rotations of two learned vectors) at any length; the divisor of the scores is
max_positions, not the sequence length, so that chunks of a sequence give the same results as the whole.

The block, for tokens x of width d_model:

    u, v, z = silu(W x)                            of width d_inner, d_inner and d_attention; after a norm
    q, k    = gamma_q z + beta_q, gamma_k z + beta_k
    a_ij    = relu(q_i . k_j / n + b(i - j))^2     over the tokens j up to i;  b(i - j) = (R_i a) . (R_j b)
    x_i     = x_i + W_o (u_i * sum_j a_ij v_j)

Glossary: d = d_model, e = d_inner = expand d, s = d_attention, n = max_positions, R_t = the rotation of RoPE.
"""

import dataclasses
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.growable import KV
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer, Sections, warn_beyond
from longscan.ops._chunks import causal_parts

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_attention": 32},
    "tiny-lm": {"d_model": 256, "n_layers": 8, "vocab_size": 4096},
}
NARROW = 0.02  # standard deviation of the initial gamma, a and b


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAUConfig(LanguageModelConfig):
    """The configuration of a stack of gated attention units; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    expand: int = 2  # e / d
    d_attention: int = 128  # s
    max_positions: int = 512  # n, the context length; longer sequences work, with a warning

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("expand", "d_attention", "max_positions")

    @property
    def d_inner(self) -> int:
        """Width of the gate and of the values, e in the paper."""
        return self.expand * self.d_model


class GatedAttention(SectionMixer[KV]):
    """The gated attention unit. Its KV cache has one head, with keys of width d_attention, values of d_inner.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: GAUConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d_inner, width = config.d_inner, config.d_attention
        self.in_proj = linear(config.d_model, 2 * d_inner + width, False, generator)
        self.q_scale, self.k_scale = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.q_shift, self.k_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.bias_a, self.bias_b = (nn.Parameter(torch.empty(2 * -(-width // 2))) for _ in range(2))
        self.out_proj = linear(d_inner, config.d_model, False, generator)
        if not self.q_scale.is_meta:
            for parameter in (self.q_scale, self.k_scale, self.bias_a, self.bias_b):
                nn.init.normal_(parameter, std=NARROW, generator=generator)
            with torch.no_grad():
                self.out_proj.weight /= math.sqrt(config.n_layers)

    def plan(self, ids: Tensor, state: KV | None, seq_idx: Tensor | None) -> Sections | None:
        """Return the separated sequences; warn if they exceed the context; see `Mixer.plan`."""
        sections = super().plan(ids, state, seq_idx)
        new = 1 if ids.dim() == 1 else ids.shape[1] if sections is None else sections.position.shape[1]
        warn_beyond(new + (0 if state is None else state.longest), self.config.max_positions)
        return sections

    def mix(self, x: Tensor, state: KV | None, length: Tensor | None) -> tuple[Tensor, KV]:
        """Mix along time; see `SectionMixer.mix`."""
        state = self.init_state(len(x)) if state is None else state
        u, q, k, v = self._project(x)
        k, v = state.extended(state.k, k[:, :, None]), state.extended(state.v, v[:, :, None])
        y = self._attend(u, q, k, v, state.next_positions(x.shape[1]))
        return y, KV(k, v, state.length + (x.shape[1] if length is None else length))

    def init_state(self, batch_size: int) -> KV:
        """Return an empty KV cache; see `Mixer.init_state`."""
        empty = self.q_scale.new_empty
        k = empty(batch_size, 0, 1, self.config.d_attention)
        v = empty(batch_size, 0, 1, self.config.d_inner)
        return KV(k, v, empty(batch_size, dtype=torch.int64).zero_())

    def step(self, x: Tensor, state: KV, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        u, q, k, v = self._project(x)
        rows, position = torch.arange(len(x), device=x.device), state.length.clone()
        state.k[rows, position, 0], state.v[rows, position, 0] = k.to(state.k.dtype), v.to(state.v.dtype)
        state.length.add_(1)
        used = state.used()
        return self._attend(u[:, None], q[:, None], used.k, used.v, position[:, None])[:, 0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u, q, k and v of x (..., d_model)."""
        d_inner, width = self.config.d_inner, self.config.d_attention
        u, v, z = torch.split(F.silu(self.in_proj(x)), [d_inner, d_inner, width], -1)
        return u, z * self.q_scale + self.q_shift, z * self.k_scale + self.k_shift, v

    def _attend(self, u: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """Return the gated attention over each query's past.

        Args:
            u: (rows, seq_len, d_inner) gates.
            q: (rows, seq_len, d_attention).
            k: (rows, k_len, 1, d_attention).
            v: (rows, k_len, 1, d_inner).
            position: (rows, seq_len) index of each query's own key.

        Returns:
            (rows, seq_len, d_model).
        """
        distance = position[..., None] - torch.arange(k.shape[1], device=k.device)  # (rows, seq_len, k_len)
        bias = self.bias(k.shape[1])[distance.clamp(min=0)]
        scores = q @ k[:, :, 0].to(q.dtype).transpose(1, 2) / self.config.max_positions + bias.to(q.dtype)
        weights = scores.relu().square().masked_fill(distance < 0, 0)
        finite, after = causal_parts(v[:, :, 0].to(weights.dtype), 1)
        y = weights @ finite
        if after is not None:
            y = y + after.gather(1, position[..., None].expand_as(y))
        return cast(Tensor, self.out_proj(u * y))

    def bias(self, n: int) -> Tensor:
        """Return b(0), ..., b(n - 1), in at least float32, which distant positions need to be distinct."""
        kind = torch.promote_types(self.bias_a.dtype, torch.float32)
        (a1, a2), (b1, b2) = (t.to(kind).chunk(2) for t in (self.bias_a, self.bias_b))
        half = torch.arange(len(a1), device=a1.device, dtype=kind) / len(a1)
        angles = torch.arange(n, device=a1.device, dtype=kind)[:, None] * 10000.0**-half  # (n, width / 2)
        return angles.cos() @ (a1 * b1 + a2 * b2) + angles.sin() @ (a1 * b2 - a2 * b1)


class GAU(LanguageModel):
    """A language model of gated attention units.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: GAUConfig

    @staticmethod
    def block(config: GAUConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, GatedAttention(config, generator))

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for."""
        return self.config.max_positions


ENTRY = ModelEntry(
    name="gau",
    kind="language",
    year=2022,
    paper="Transformer Quality in Linear Time",
    arxiv="2202.10447",
    idea="every token before, behind one wide gate",
    parents=("linear_attention", "transformer"),
    cls=GAU,
    config=GAUConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
