"""Attention Is All You Need.

Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit, Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia
Polosukhin, 2017, arXiv 1706.03762.

Parents: Bahdanau and Luong, whose attention it keeps and whose recurrence it drops.
Changed: words look at each other within a sentence too, with several heads at once; since nothing is read in
order any more, positions are added to the embeddings; all positions of a sentence are computed together.

Deviations: none in the equations. Pre-norm (`norm_first`, Xiong et al., 2020, arXiv 2002.04745) can be
chosen, with the norm after each stack that it needs; the paper has post-norm and no such norm. The paper
does not say how it starts: here matrices start as Glorot and Bengio (2010), embeddings from N(0, 1/d_model).

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
from longscan.models.common.encoder_decoder import Translator, TranslatorConfig, Writing, embedding
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import linear, untouched
from longscan.models.common.state import KV, State
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
    """The sizes of a Transformer; the paper's symbols stand in the comments.

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
        self.check_counts("d_model", "n_layers", "n_heads", "d_ff")
        if self.d_model % self.n_heads or self.d_model % 2:
            what = f"d_model: expected an even multiple of n_heads ({self.n_heads})"
            raise LongscanError(f"{what}, got {self.d_model}.")
        if self.norm_eps < 0:
            raise LongscanError(f"norm_eps: expected zero or more, got {self.norm_eps}.")


class Memory(NamedTuple):
    """What one decoder layer looks at.

    Attributes:
        k: (batch, src_len, n_heads, d_head).
        v: likewise.
    """

    k: Tensor
    v: Tensor


class SourceMask(NamedTuple):
    """Where the source is.

    Attributes:
        mask: (batch, src_len) boolean, False in padding.
    """

    mask: Tensor


def sinusoids(begin: int, end: int, d_model: int) -> Tensor:
    """Compute the positional encodings, section 3.5.

    Args:
        begin: first position.
        end: the one after the last.
        d_model: their width.

    Returns:
        (end - begin, d_model) float64; sines at even places, cosines at odd ones.
    """
    rates = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000) / d_model))
    angles = torch.outer(torch.arange(begin, end, dtype=torch.float64), rates)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


class MultiHeadAttention(nn.Module):
    """Several heads of attention, each in its own projection (section 3.2.2).

    Args:
        d_model: width in and out.
        n_heads: heads, each d_model / n_heads wide.
        name: of its weights.
    """

    def __init__(self, d_model: int, n_heads: int, name: str) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.name = d_model, n_heads, name
        self.in_proj = linear(d_model, 3 * d_model, True)  # W^Q, W^K, W^V, one below the other
        self.out_proj = linear(d_model, d_model, True)  # W^O

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project x (batch, len, d_model) to queries, keys and values, each (batch, len, n_heads, d_head)."""
        return cast(Tensor, self.in_proj(x)).view(*x.shape[:-1], 3, self.n_heads, -1).unbind(2)

    def query(self, x: Tensor) -> Tensor:
        """Project x (batch, len, d_model) to queries (batch, len, n_heads, d_head)."""
        return self._part(x, slice(self.d_model)).view(*x.shape[:-1], self.n_heads, -1)

    def memory(self, x: Tensor) -> Memory:
        """Project x (batch, len, d_model) to keys and values (batch, len, n_heads, d_head)."""
        both = self._part(x, slice(self.d_model, None))
        return Memory(*both.view(*x.shape[:-1], 2, self.n_heads, -1).unbind(2))

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        """Project x (batch, len, d_model) by some rows of in_proj; an adapted one is called as a whole."""
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
        """Attend and join the heads.

        Args:
            q: (batch, q_len, n_heads, d_head).
            k: (batch, k_len, n_heads, d_head).
            v: likewise.
            mask: see `ops.attention`.
            causal: likewise.
            weights: receives the weights.

        Returns:
            (batch, q_len, d_model).
        """
        if weights is None:
            out = attention(q, k, v, mask=mask, causal=causal)
        else:
            out, weights[self.name] = attention_ref(q, k, v, mask=mask, causal=causal)
        return cast(Tensor, self.out_proj(out.flatten(2)))


class Layer(nn.Module):
    """One block of either stack: attention within the sentence, to the source in the decoder, feed-forward.

    Args:
        config: the sizes.
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
        """Transform each position.

        Args:
            x: (batch, len, d_model).
            mask: (sentences, 1, 1, src_len) of the source, see `ops.attention`.
            memory: what a decoder looks at, of (sentences, src_len, n_heads, d_head); the rows of one
                sentence stand together in x.
            cache: a decoder's keys and values of the positions before; those of the one in x join them.
            weights: receives the attention weights.

        Returns:
            (batch, len, d_model).
        """

        def look_within(y: Tensor) -> Any:
            q, k, v = self.self_attn.qkv(y)
            if memory is None:
                return self.self_attn(q, k, v, mask, weights=weights)
            if cache is not None:
                t = cache.longest
                cache.k[:, t], cache.v[:, t] = k[:, 0], v[:, 0]
                cache.length.add_(1)
                k, v = cache.k[:, : t + 1], cache.v[:, : t + 1]
            return self.self_attn(q, k, v, causal=True, weights=weights)

        def look_at_source(y: Tensor) -> Any:
            assert memory is not None
            q = self.cross_attn.query(y)  # a beam's hypotheses are so many queries to one sentence
            together = q.reshape(len(memory.k), -1, *q.shape[2:])
            return self.cross_attn(together, *memory, mask, weights=weights).view(y.shape)

        x = self._add(x, self.norm1, look_within)
        if memory is not None:
            x = self._add(x, self.norm2, look_at_source)
        return self._add(x, self.norm3, lambda y: self.linear2(self.linear1(y).relu()))

    def _add(self, x: Tensor, norm: nn.LayerNorm, f: Callable[[Tensor], Any]) -> Tensor:
        """Add what a sublayer says, with the norm before or after."""
        y = dropout(f(norm(x) if self.norm_first else x), self.dropout, self.training)
        return x + y if self.norm_first else cast(Tensor, norm(x + y))


class Transformer(Translator):
    """An encoder and a decoder of attention layers.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
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
        self._start(generator)

    @torch.no_grad()
    def _start(self, generator: torch.Generator | None) -> None:
        """Draw the matrices; norms and biases are set."""
        d_model = self.config.d_model
        packed = {id(m.in_proj) for m in self.modules() if isinstance(m, MultiHeadAttention)}
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=d_model**-0.5, generator=generator)
            elif isinstance(module, nn.Linear):  # W^Q, W^K and W^V are three matrices in one
                for matrix in module.weight.chunk(3 if id(module) in packed else 1):
                    nn.init.xavier_uniform_(matrix, generator=generator)

    def read(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> Writing:
        """Read source sentences, and project them to the keys and values of every decoder layer, once."""
        mask = source != self.config.pad_id
        everywhere = None if bool(mask.all()) else mask[:, None, None, :]
        x = self._embed(self.table("source"), source, 0)
        for layer in self.encoder:
            x = layer(x, everywhere, weights=weights)
        x = self.encoder_norm(x)
        memory = [cast(Layer, layer).cross_attn.memory(x) for layer in self.decoder]
        n_heads, d_head = memory[0].k.shape[2:]
        nothing = x.new_empty(len(x), 0, n_heads, d_head)
        caches = [KV(nothing, nothing, mask.new_zeros(len(x), dtype=torch.long)) for _ in memory]
        return Writing(State([*caches]), State([*memory, SourceMask(mask)]))

    def write(self, target: Tensor, state: Writing, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Read whole target sentences; see `Translator.write`."""
        *memory, (mask,) = state.memory.layers
        everywhere = None if bool(mask.all()) else mask[:, None, None, :]
        x = self._embed(self.target_embedding, target, 0)
        for layer, kv in zip(self.decoder, memory, strict=True):
            x = layer(x, everywhere, kv, weights=weights)
        return cast(Tensor, self.decoder_norm(x))

    def advance(self, ids: Tensor, state: Writing) -> Tensor:
        """Read one target token per row; see `Translator.advance`."""
        *memory, (mask,) = state.memory.layers
        state.decoder.reserve(1)
        x = self._embed(self.target_embedding, ids.unsqueeze(1), state.position)
        for layer, kv, cache in zip(self.decoder, memory, state.decoder.layers, strict=True):
            x = layer(x, mask[:, None, None, :], kv, cache)
        return cast(Tensor, self.decoder_norm(x).squeeze(1))

    def _embed(self, table: nn.Module, ids: Tensor, begin: int) -> Tensor:
        """Embed ids (batch, len) at the positions from `begin` on."""
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
