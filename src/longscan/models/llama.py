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
from typing import Any

import torch
from torch import Tensor

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.attention import Attention, AttentionLayer
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.feed_forward import SwiGLU
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import RMSNorm
from longscan.models.common.mixer import Block, LanguageModelConfig

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
        if self.d_head is None and self.d_model % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"n_heads: expected a divisor of d_model, got {got}. Or set d_head.")
        self.check("rope_theta", above=0)
        self.attention  # noqa: B018 which checks that heads and rotations fit

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: n_kv_heads or its default."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head: d_head or its default."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def attention(self) -> AttentionLayer:
        """The sizes and options of each attention layer."""
        return AttentionLayer(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            d_head=self.head_width,
            rope_theta=self.rope_theta,
            max_positions=self.max_positions,
            depth=2 * self.n_layers,
        )

    @property
    def ff_width(self) -> int:
        """Width inside the feed-forward layer: d_ff or its default."""
        return -(-8 * self.d_model // 96) * 32 if self.d_ff is None else self.d_ff


class LlamaBlock(Block):
    """x + attention(norm(x)), then x + mlp(mlp_norm(x)).

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, Attention(config.attention, generator))
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.ff_width, generator, depth=2 * config.n_layers)

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the outputs of both sublayers to the residual stream x (batch, seq_len, d_model)."""
        x, state = super().forward(x, state, plan)
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the outputs of both sublayers for one token per row, x (batch, d_model)."""
        x = super().step(x, state, plan)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y

    def native(self, layer: int) -> list[ops.Sublayer] | None:
        """Return both sublayers for the native decoder; see `Block.native`."""
        attention, mlp = super().native(layer), self.mlp.native(layer, self.mlp_norm.weight)
        return None if attention is None or mlp is None else attention + mlp


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
