"""Effective Approaches to Attention-based Neural Machine Translation.

Minh-Thang Luong, Hieu Pham, Christopher D. Manning, 2015, arXiv 1508.04025.

Parents: seq2seq, whose deep LSTMs and reversed source it keeps; Bahdanau, whose attention it simplifies.
Changed: the decoder takes its step first and attends with the new state h_t; the score may be a dot product;
local attention covers only a window of the source; and input feeding passes the attentional state h~_t to the
next step, so that the decoder knows its past alignments.

Deviations: one vocabulary for both languages; dropout on embeddings, between layers and before the softmax.

    score  = h_t . h_s | h_t . W_a h_s | v_a . tanh(W_a [h_t; h_s])         dot, general, concat (section 3.1)
    a_t    = softmax(score), or softmax(W_a h_t), independent of h_s        location
    c_t    = sum_s a_t(s) h_s       h~_t = tanh(W_c [c_t; h_t])             p(y_t) = softmax(W_s h~_t)

Local attention (section 3.2) takes the softmax over |s - p_t| <= D only, with p_t = t (local-m), or, of a
source of S tokens, p_t = S sigmoid(v_p . tanh(W_p h_t)) (local-p). Then the weights are multiplied by
exp(-(s - p_t)^2 / (2 (D/2)^2)), and so sum to less than 1: through this factor gradients reach W_p and v_p.
Positions count from 0, in the order of the text. If the window is beyond the end of the source, all weights
are zero.

Glossary: d_hidden, d_embedding = the 1000 of the paper, n_layers = its 4; h_s = annotations; D = window.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.bahdanau import AdditiveAttention, Memory
from longscan.models.common.encoder_decoder import DecoderState, Translator, TranslatorConfig, embedding
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import linear
from longscan.models.common.state import State
from longscan.models.seq2seq import LSTM, uniform
from longscan.ops import masked_softmax

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "d_embedding": 24, "d_hidden": 32, "n_layers": 2},
    "multi30k": {
        "vocab_size": 8000,
        "d_embedding": 256,
        "d_hidden": 384,
        "n_layers": 1,
        "dropout": 0.2,
    },
    "paper": {
        "vocab_size": 50000,
        "d_embedding": 1000,
        "d_hidden": 1000,
        "n_layers": 4,
        "where": "local-p",
        "dropout": 0.2,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LuongConfig(TranslatorConfig):
    """The configuration of a Luong model: sizes and kind of attention.

    Raises:
        LongscanError: a value is out of range.
    """

    d_embedding: int
    d_hidden: int
    n_layers: int = 4
    reverse: bool = True  # encode the source from its end to its start
    score: Literal["dot", "general", "concat", "location"] = "general"
    where: Literal["global", "local-m", "local-p"] = "global"
    window: int = 10  # D
    input_feeding: bool = True
    n_locations: int = 100  # source positions that the location score covers; it attends to none beyond

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_embedding", "d_hidden", "n_layers", "window", "n_locations")


class Fed(NamedTuple):
    """The state of input feeding.

    Attributes:
        h_tilde: (batch, d_hidden) of the last step.
    """

    h_tilde: Tensor


class Luong(Translator):
    """Deep LSTMs with attention after the decoder's step.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: LuongConfig

    def __init__(self, config: LuongConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        n, sizes = config.d_hidden, (config.d_embedding, config.d_hidden, config.n_layers, config.dropout)
        self.source_embedding = embedding(config.vocab_size, config.d_embedding)
        self.target_embedding = embedding(config.vocab_size, config.d_embedding)
        self.encoder, self.decoder = LSTM(*sizes), LSTM(*sizes)
        self.feed = linear(n, 4 * n, False) if config.input_feeding else None  # from h~ into the first layer
        self.align: nn.Module | None = None  # W_a, and v_a of concat
        if config.score == "general":
            self.align = linear(n, n, False)
        elif config.score == "concat":
            self.align = AdditiveAttention(n, n, n)
        elif config.score == "location":
            self.align = linear(n, config.n_locations, False)
        self.centre = None  # W_p, tanh, v_p
        if config.where == "local-p":
            self.centre = nn.Sequential(linear(n, n, False), nn.Tanh(), linear(n, 1, False))
        self.combine = linear(2 * n, n, False)  # W_c
        self.head = linear(n, config.vocab_size, False)  # W_s
        uniform(self, 0.1, generator)  # section 4.1

    def encode(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> DecoderState:
        """Return the initial decoder state; see `Translator.encode`."""
        mask = source != self.config.pad_id
        x = self.drop(self.table("source")(source))
        h, state = self.encoder(x, self.encoder.init_state(len(source)), mask, self.config.reverse)
        keys = h
        if isinstance(self.align, AdditiveAttention):
            keys = self.align.key(h)
        elif self.align is not None and self.config.score == "general":
            keys = self.align(h)
        fed = Fed(h.new_zeros(len(h), self.config.d_hidden))
        return DecoderState(State([*state, fed]), State([Memory(h, keys, mask)]))

    def decode(self, target: Tensor, state: DecoderState, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the head's input for whole target sentences; see `Translator.decode`."""
        words = self.drop(self.target_embedding(target))
        (memory,), (*layers, fed) = state.memory.layers, state.decoder.layers
        times = torch.arange(target.shape[1], device=target.device)
        if self.feed is None:  # no step depends on attention: attend to all in parallel
            h, _ = self.decoder(words, layers)
            hidden, alignment = self._attend(h, memory, times)
        else:
            steps, alignments, last = [], [], fed.h_tilde.unsqueeze(1)
            for t, x in enumerate(self.decoder.project(words).unbind(1)):
                layers = self.decoder.step(x + self.feed(last.squeeze(1)), layers)
                last, alignment = self._attend(layers[-1].h.unsqueeze(1), memory, times[t : t + 1])
                steps.append(last)
                alignments.append(alignment)
            hidden, alignment = torch.cat(steps, 1), torch.cat(alignments, 1)
        if weights is not None:
            weights["cross"] = alignment.unsqueeze(1)
        return self.drop(hidden)

    def advance(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Return the head's input after one more target token per row; see `Translator.advance`."""
        x = self.decoder.project(self.drop(self.target_embedding(ids)))
        (memory,), (*layers, fed) = state.memory.layers, state.decoder.layers
        if self.feed is not None:
            x = x + self.feed(fed.h_tilde)
        layers = self.decoder.step(x, layers)
        time = torch.full((1,), state.position, device=ids.device)
        h = layers[-1].h.view(len(memory.mask), -1, self.config.d_hidden)  # (batch, rows of each, d_hidden)
        hidden = self._attend(h, memory, time)[0].flatten(0, 1)
        state.decoder = State([*layers, Fed(hidden)])
        return self.drop(hidden)

    def _attend(self, h: Tensor, memory: Memory, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attentional states h~ of the decoder's new states, and the weights.

        Args:
            h: (batch, q_len, d_hidden).
            memory: of the sentences.
            times: (q_len,) or (1,), the step of each query.

        Returns:
            h~: (batch, q_len, d_hidden).
            weights: (batch, q_len, src_len).
        """
        mask, position = memory.mask.unsqueeze(1), torch.arange(memory.mask.shape[1], device=h.device)
        if self.config.score == "location":
            mask = mask & (position < self.config.n_locations)
        distance = None
        if self.centre is not None:
            lengths = memory.mask.sum(1).view(-1, 1, 1)
            distance = position - lengths * self.centre(h).sigmoid()  # (batch, q_len, src_len)
        elif self.config.where == "local-m":
            distance = position - times.view(1, -1, 1)
        if distance is not None:
            mask = mask & (distance.abs() <= self.config.window)
        weights = masked_softmax(self._scores(h, memory), mask)
        if self.centre is not None and distance is not None:
            weights = weights * torch.exp(-(distance**2) / (2 * (self.config.window / 2) ** 2))
        both = torch.cat((weights @ memory.annotations, h), -1)
        return self.combine(both).tanh(), weights

    def _scores(self, h: Tensor, memory: Memory) -> Tensor:
        """Return the scores (batch, q_len, src_len) of source positions for h (batch, q_len, d_hidden)."""
        if isinstance(self.align, AdditiveAttention):
            return cast(Tensor, self.align(h, memory.keys))
        if self.align is not None and self.config.score == "location":
            src_len = memory.mask.shape[1]
            return F.pad(self.align(h), (0, max(0, src_len - self.config.n_locations)))[..., :src_len]
        return h @ memory.keys.transpose(1, 2)


ENTRY = ModelEntry(
    name="luong",
    kind="translation",
    year=2015,
    paper="Effective Approaches to Attention-based Neural Machine Translation",
    arxiv="1508.04025",
    idea="where I look, and where I looked",
    parents=("seq2seq", "bahdanau"),
    cls=Luong,
    config=LuongConfig,
    presets=PRESETS,
    verbs=("translate",),
)
