"""Attention Is All You Need.

Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia
Polosukhin, 2017, arXiv 1706.03762.

Parents: Bahdanau and Luong, whose attention it keeps and whose recurrence it drops.
Changed: self-attention within each sentence, with several heads; as there is no recurrence, positional
encodings are added to the embeddings; all positions of a sentence are computed in parallel.

Deviations: none in the equations. Pre-norm (`norm_first`, Xiong et al., 2020, arXiv 2002.04745) is an option,
with the final norm of each stack that it needs; the paper has post-norm and no final norm. The paper does not
state its initialisation: here it is that of Glorot and Bengio (2010) for matrices, N(0, 1/d_model) for
embeddings.

    x          = sqrt(d_model) E[ids] + PE,  PE[p, 2i] = sin(p / 10000^(2i/d_model)), PE[p, 2i+1] = cos(same)
    sublayer   : x = norm(x + dropout(f(x)))       pre-norm: x = x + dropout(f(norm(x)))
    encoder    : f = self-attention, then feed-forward
    decoder    : f = causal self-attention, then attention to the encoder's output, then feed-forward
    feed-forward(x) = W_2 max(0, W_1 x + b_1) + b_2
    logits     = E x: source, target and output share one matrix (section 3.4)

Glossary: N = n_layers of each stack, h = n_heads, d_k = d_v = d_model / h, d_ff, P_drop = dropout.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.encoder_decoder import DecoderState, Translator, TranslatorConfig, embedding
from longscan.models.common.entry import ModelEntry
from longscan.models.common.growable import KV
from longscan.models.common.layers import linear, untouched
from longscan.models.common.state import State
from longscan.ops import attention, attention_ref, dropout

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64},
    "multi30k": {
        "vocab_size": 8000,
        "d_model": 256,
        "n_layers": 3,
        "n_heads": 8,
        "d_ff": 512,
        "dropout": 0.2,
    },
    "base": {
        "vocab_size": 37000,
        "d_model": 512,
        "n_layers": 6,
        "n_heads": 8,
        "d_ff": 2048,
        "dropout": 0.1,
    },
    "big": {
        "vocab_size": 37000,
        "d_model": 1024,
        "n_layers": 6,
        "n_heads": 16,
        "d_ff": 4096,
        "dropout": 0.3,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(TranslatorConfig):
    """The configuration of a Transformer; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: int
    n_layers: int  # N, of the encoder and of the decoder
    n_heads: int  # h
    d_ff: int
    norm_first: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_model", "n_layers", "n_heads", "d_ff")
        if self.d_model % self.n_heads or self.d_model % 2:
            what = f"d_model: expected an even multiple of n_heads ({self.n_heads})"
            raise LongscanError(f"{what}, got {self.d_model}.")
        self.check("norm_eps", least=0)


class Memory(NamedTuple):
    """The encoder's memory for one decoder layer: the keys and values of its cross-attention.

    Attributes:
        k: (batch, src_len, n_heads, d_head).
        v: likewise.
    """

    k: Tensor
    v: Tensor


class SourceMask(NamedTuple):
    """The padding mask of the source.

    Attributes:
        mask: (batch, src_len) boolean, False in padding.
    """

    mask: Tensor


def sinusoid_angles(position: Tensor, d_model: int) -> Tensor:
    """Return the angles of the positional encodings, position / 10000^(2i / d_model) (section 3.5).

    Args:
        position: (...) integers.
        d_model: an even width.

    Returns:
        (..., d_model / 2) float64.
    """
    even = torch.arange(0, d_model, 2, device=position.device, dtype=torch.float64)
    return position[..., None].double() * torch.exp(even * (-math.log(10000) / d_model))


def sinusoids(begin: int, end: int, d_model: int) -> Tensor:
    """Return the positional encodings of a range (section 3.5).

    Args:
        begin: first position.
        end: one past the last position.
        d_model: an even width.

    Returns:
        (end - begin, d_model) float64; sines at even indices, cosines at odd ones.
    """
    angles = sinusoid_angles(torch.arange(begin, end), d_model)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (section 3.2.2).

    Args:
        d_model: width of input and output.
        n_heads: heads, each of width d_model / n_heads.
        name: the key of its attention weights.
    """

    def __init__(self, d_model: int, n_heads: int, name: str) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.name = d_model, n_heads, name
        self.in_proj = linear(d_model, 3 * d_model, True)  # W^Q, W^K, W^V, stacked
        self.out_proj = linear(d_model, d_model, True)  # W^O

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (batch, len, n_heads, d_head), of x (batch, len, d_model)."""
        return cast(Tensor, self.in_proj(x)).view(*x.shape[:-1], 3, self.n_heads, -1).unbind(2)

    def query(self, x: Tensor) -> Tensor:
        """Return the queries (batch, len, n_heads, d_head) of x (batch, len, d_model)."""
        return self._part(x, slice(self.d_model)).view(*x.shape[:-1], self.n_heads, -1)

    def memory(self, x: Tensor) -> Memory:
        """Return the keys and values (batch, len, n_heads, d_head) of x (batch, len, d_model)."""
        both = self._part(x, slice(self.d_model, None))
        return Memory(*both.view(*x.shape[:-1], 2, self.n_heads, -1).unbind(2))

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        """Return x (batch, len, d_model) projected by rows of in_proj, called as a whole if adapted."""
        if not untouched(self.in_proj):
            return cast(Tensor, self.in_proj(x))[..., rows]
        return ops.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention output, with the heads concatenated and projected.

        Args:
            q: (batch, q_len, n_heads, d_head).
            k: (batch, k_len, n_heads, d_head).
            v: likewise.
            mask: see `ops.attention`.
            causal: likewise.
            weights: receives the attention weights.

        Returns:
            (batch, q_len, d_model).
        """
        if weights is None:
            out = attention(q, k, v, mask=mask, causal=causal)
        else:
            out, weights[self.name] = attention_ref(q, k, v, mask=mask, causal=causal)
        return cast(Tensor, self.out_proj(out.flatten(2)))


class Layer(nn.Module):
    """A layer of either stack: self-attention, cross-attention in the decoder, feed-forward.

    Args:
        config: the configuration.
        stack: "encoder" or "decoder".
        index: which layer of it.
    """

    def __init__(self, config: TransformerConfig, stack: str, index: int) -> None:
        super().__init__()
        d_model, n_heads = config.d_model, config.n_heads
        self.dropout, self.norm_first = config.dropout, config.norm_first
        self.self_attn = MultiHeadAttention(d_model, n_heads, f"{stack}.{index}")
        self.norm1 = nn.LayerNorm(d_model, config.norm_eps)
        if stack == "decoder":
            self.cross_attn = MultiHeadAttention(d_model, n_heads, f"cross.{index}")
            self.norm2 = nn.LayerNorm(d_model, config.norm_eps)
        self.linear1 = linear(d_model, config.d_ff, True)
        self.linear2 = linear(config.d_ff, d_model, True)
        self.norm3 = nn.LayerNorm(d_model, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Memory | None = None,
        cache: KV | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the next hidden states.

        Args:
            x: (batch, len, d_model).
            mask: (sentences, 1, 1, src_len) of the source, see `ops.attention`.
            memory: keys and values of the cross-attention, (sentences, src_len, n_heads, d_head); in x the
                rows of a sentence are adjacent.
            cache: the KV cache of a decoder, to which the single position in x is appended.
            weights: receives the attention weights.

        Returns:
            (batch, len, d_model).
        """

        def self_attention(y: Tensor) -> Any:
            q, k, v = self.self_attn.qkv(y)
            if memory is None:
                return self.self_attn(q, k, v, mask, weights=weights)
            if cache is not None:
                t = cache.longest
                cache.k[:, t], cache.v[:, t] = k[:, 0], v[:, 0]
                cache.length.add_(1)
                k, v = cache.k[:, : t + 1], cache.v[:, : t + 1]
            return self.self_attn(q, k, v, causal=True, weights=weights)

        def cross_attention(y: Tensor) -> Any:
            assert memory is not None
            q = self.cross_attn.query(y)
            # the hypotheses of a beam are further queries to their sentence
            grouped = q.reshape(len(memory.k), -1, *q.shape[2:])
            return self.cross_attn(grouped, *memory, mask, weights=weights).view(y.shape)

        x = self._add(x, self.norm1, self_attention)
        if memory is not None:
            x = self._add(x, self.norm2, cross_attention)
        return self._add(x, self.norm3, lambda y: self.linear2(self.linear1(y).relu()))

    def _add(self, x: Tensor, norm: nn.LayerNorm, f: Callable[[Tensor], Any]) -> Tensor:
        """Return x plus the output of a sublayer, with the norm before or after."""
        y = dropout(f(norm(x) if self.norm_first else x), self.dropout, self.training)
        return x + y if self.norm_first else cast(Tensor, norm(x + y))


class Transformer(Translator):
    """The Transformer: an encoder and a decoder of attention layers.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.embedding_scale = math.sqrt(config.d_model)
        self.target_embedding = embedding(config.vocab_size, config.d_model)
        self.source_embedding = self.head = None
        if not config.tie_embeddings:
            self.source_embedding = embedding(config.vocab_size, config.d_model)
            self.head = linear(config.d_model, config.vocab_size, False)
        layers = range(config.n_layers)
        self.encoder = nn.ModuleList(Layer(config, "encoder", i) for i in layers)
        self.decoder = nn.ModuleList(Layer(config, "decoder", i) for i in layers)
        self.encoder_norm, self.decoder_norm = (
            nn.LayerNorm(config.d_model, config.norm_eps) if config.norm_first else nn.Identity()
            for _ in range(2)
        )
        self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """Initialise the matrices; norms and biases are initialised already."""
        d_model = self.config.d_model
        packed = {id(m.in_proj) for m in self.modules() if isinstance(m, MultiHeadAttention)}
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=d_model**-0.5, generator=generator)
            elif isinstance(module, nn.Linear):  # W^Q, W^K and W^V are three matrices in one
                for matrix in module.weight.chunk(3 if id(module) in packed else 1):
                    nn.init.xavier_uniform_(matrix, generator=generator)

    def encode(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> DecoderState:
        """Return the initial decoder state, with the keys and values of every layer's cross-attention."""
        mask = source != self.config.pad_id
        padding = None if bool(mask.all()) else mask[:, None, None, :]
        x = self._embed(self.table("source"), source, 0)
        for layer in self.encoder:
            x = layer(x, padding, weights=weights)
        x = self.encoder_norm(x)
        memory = [cast(Layer, layer).cross_attn.memory(x) for layer in self.decoder]
        n_heads, d_head = memory[0].k.shape[2:]
        empty = x.new_empty(len(x), 0, n_heads, d_head)
        caches = [KV(empty, empty, mask.new_zeros(len(x), dtype=torch.long)) for _ in memory]
        return DecoderState(State([*caches]), State([*memory, SourceMask(mask)]))

    def decode(self, target: Tensor, state: DecoderState, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the head's input for whole target sentences; see `Translator.decode`."""
        *memory, (mask,) = state.memory.layers
        padding = None if bool(mask.all()) else mask[:, None, None, :]
        x = self._embed(self.target_embedding, target, 0)
        for layer, kv in zip(self.decoder, memory, strict=True):
            x = layer(x, padding, kv, weights=weights)
        return cast(Tensor, self.decoder_norm(x))

    def advance(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Return the head's input after one more target token per row; see `Translator.advance`."""
        *memory, (mask,) = state.memory.layers
        state.decoder.reserve(1)
        x = self._embed(self.target_embedding, ids.unsqueeze(1), state.position)
        for layer, kv, cache in zip(self.decoder, memory, state.decoder.layers, strict=True):
            x = layer(x, mask[:, None, None, :], kv, cache)
        return cast(Tensor, self.decoder_norm(x).squeeze(1))

    def _embed(self, table: nn.Module, ids: Tensor, begin: int) -> Tensor:
        """Return the embeddings of ids (batch, len), with positional encodings from `begin` on."""
        x = table(ids) * self.embedding_scale
        return self.drop(x + sinusoids(begin, begin + ids.shape[1], x.shape[-1]).to(x))


ENTRY = ModelEntry(
    name="transformer",
    kind="translation",
    year=2017,
    paper="Attention Is All You Need",
    arxiv="1706.03762",
    idea="every pair of words",
    parents=("bahdanau", "luong"),
    cls=Transformer,
    config=TransformerConfig,
    presets=PRESETS,
    verbs=("translate",),
)
