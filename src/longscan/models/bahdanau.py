"""Neural Machine Translation by Jointly Learning to Align and Translate.

Dzmitry Bahdanau, Kyunghyun Cho, Yoshua Bengio, 2014, arXiv 1409.0473.

Parent: the encoder-decoder of Cho et al. and of Sutskever et al. (seq2seq).
Kept: a recurrent encoder, a recurrent decoder.
Changed: the encoder is bidirectional and keeps its hidden state at every word, the annotations h_j; at each
step the decoder attends to all of them: it takes their average, weighted by how well they match its state
s_{i-1}. The sentence no longer has to fit into one vector.

Deviations: one vocabulary for both languages; dropout, on embeddings, annotations and before the softmax.

The decoder (section 3.1, appendix A), for the previous word y_{i-1}:

    e_ij = v_a . tanh(W_a s_{i-1} + U_a h_j)       a_i = softmax(e_i)      c_i = sum_j a_ij h_j
    t_i  = maxout(U_o s_{i-1} + V_o E y_{i-1} + C_o c_i)                   p(y_i) = softmax(W_o t_i)
    z    = sigmoid(W_z E y_{i-1} + U_z s_{i-1} + C_z c_i)                  r likewise
    s~   = tanh(W E y_{i-1} + U (r s_{i-1}) + C c_i)                       s_i = (1 - z) s_{i-1} + z s~

and s_0 = tanh(W_s h_1) of the backward h_1, which has seen the whole sentence. This GRU resets the state
before the product, and z weights the candidate; torch's nn.GRU does both the other way round.

Glossary: n = d_hidden, m = d_embedding, n' = d_align, l = d_maxout; h = annotations, s = the decoder's state.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from longscan.models.common.encoder_decoder import DecoderState, Translator, TranslatorConfig, embedding
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import linear
from longscan.models.common.state import State
from longscan.models.seq2seq import unroll
from longscan.ops import masked_softmax

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 64,
        "d_embedding": 24,
        "d_hidden": 32,
        "d_align": 32,
        "d_maxout": 24,
        "start": "glorot",
    },
    "multi30k": {
        "vocab_size": 8000,
        "d_embedding": 256,
        "d_hidden": 384,
        "d_align": 256,
        "d_maxout": 256,
        "dropout": 0.2,
        "start": "glorot",
    },
    "paper": {"vocab_size": 30000, "d_embedding": 620, "d_hidden": 1000, "d_align": 1000, "d_maxout": 500},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BahdanauConfig(TranslatorConfig):
    """The configuration of an RNNsearch; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_embedding: int  # m
    d_hidden: int  # n
    d_align: int  # n'
    d_maxout: int  # l
    # "paper": appendix B.1, where v_a = 0 and matrices are so small that Adam learns the alignment late;
    # "glorot": the wider initialisation of Glorot and Bengio (2010)
    start: Literal["paper", "glorot"] = "paper"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_embedding", "d_hidden", "d_align", "d_maxout")


class GRUCell(nn.Module):
    """The gated unit of Cho et al., which resets before the product.

    Args:
        d_in: width of the inputs; those of a sentence are projected in one product.
        d_hidden: width of the state.
    """

    def __init__(self, d_in: int, d_hidden: int) -> None:
        super().__init__()
        self.input = linear(d_in, 3 * d_hidden, True)  # W_z, W_r, W
        self.gates = linear(d_hidden, 2 * d_hidden, False)  # U_z, U_r
        self.candidate = linear(d_hidden, d_hidden, False)  # U

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor]:
        """Return the state after one step, as a tuple of one.

        Args:
            x: (batch, 3 d_hidden), inputs projected by `input`.
            s: (batch, d_hidden).
        """
        d_hidden = s.shape[-1]
        z, r = (x[:, : 2 * d_hidden] + self.gates(s)).sigmoid().chunk(2, -1)
        candidate = (x[:, 2 * d_hidden :] + self.candidate(r * s)).tanh()
        return (s + z * (candidate - s),)


class Memory(NamedTuple):
    """The memory that the decoder attends to.

    Attributes:
        annotations: (batch, src_len, width) hidden state of the encoder at each word.
        keys: (batch, src_len, d_align) the part of the scores that is independent of the decoder state.
        mask: (batch, src_len) boolean, False in padding.
    """

    annotations: Tensor
    keys: Tensor
    mask: Tensor


class HiddenState(NamedTuple):
    """The hidden state of the decoder.

    Attributes:
        s: (batch, d_hidden).
    """

    s: Tensor


class AdditiveAttention(nn.Module):
    """e_ij = v_a . tanh(W_a s + U_a h_j).

    Args:
        d_query: width of s.
        d_key: width of h_j.
        d_align: width of the sum.
    """

    def __init__(self, d_query: int, d_key: int, d_align: int) -> None:
        super().__init__()
        self.query = linear(d_query, d_align, False)  # W_a
        self.key = linear(d_key, d_align, False)  # U_a
        self.v_a = nn.Parameter(torch.zeros(d_align))

    def forward(self, s: Tensor, keys: Tensor) -> Tensor:
        """Return the scores, (batch, q_len, src_len).

        Args:
            s: (batch, q_len, d_query).
            keys: (batch, src_len, d_align), annotations projected by `key`.
        """
        sums: Tensor = self.query(s).unsqueeze(2) + keys.unsqueeze(1)  # (batch, q_len, src_len, d_align)
        return sums.tanh() @ self.v_a


class Bahdanau(Translator):
    """RNNsearch: a bidirectional encoder, and a decoder that attends before each word.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: BahdanauConfig

    def __init__(self, config: BahdanauConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        n, m = config.d_hidden, config.d_embedding
        self.source_embedding = embedding(config.vocab_size, m)
        self.target_embedding = embedding(config.vocab_size, m)
        self.forwards, self.backwards = GRUCell(m, n), GRUCell(m, n)
        self.start_state = linear(n, n, True)  # W_s
        self.align = AdditiveAttention(n, 2 * n, config.d_align)
        self.decoder = GRUCell(m, n)
        self.context = linear(2 * n, 3 * n, False)  # C_z, C_r, C
        self.readout = linear(n + m + 2 * n, 2 * config.d_maxout, True)  # U_o, V_o, C_o
        self.head = linear(config.d_maxout, config.vocab_size, False)  # W_o
        if not self.head.weight.is_meta:  # which only needs shapes
            self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """Initialise the parameters; biases are zero."""
        paper = self.config.start == "paper"
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            elif paper:
                nn.init.normal_(parameter, std=0.01, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)
        if paper:
            for matrix in (self.align.query.weight, self.align.key.weight):
                nn.init.normal_(matrix, std=0.001, generator=generator)
        else:
            for table in (self.table("source"), self.table("target")):
                nn.init.normal_(table.weight, std=0.1, generator=generator)
            nn.init.normal_(self.align.v_a, std=len(self.align.v_a) ** -0.5, generator=generator)
        for cell in (self.forwards, self.backwards, self.decoder):
            n = cell.candidate.weight.shape[0]
            for matrix in (cell.gates.weight[:n], cell.gates.weight[n:], cell.candidate.weight):
                # torch has no QR decomposition of half-precision numbers
                wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
                matrix.copy_(nn.init.orthogonal_(wide, generator=generator))

    def encode(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> DecoderState:
        """Return the initial decoder state, encoding in both directions; see `Translator.encode`."""
        mask = source != self.config.pad_id
        x = self.drop(self.table("source")(source))
        zeros = x.new_zeros(len(x), self.config.d_hidden)
        # no mask forwards: nothing follows the padding on the right
        forwards, _ = unroll(self.forwards, self.forwards.input(x), (zeros,))
        backwards, (first,) = unroll(self.backwards, self.backwards.input(x), (zeros,), mask, backward=True)
        annotations = self.drop(torch.cat((forwards, backwards), -1))
        memory = Memory(annotations, self.align.key(annotations), mask)
        return DecoderState(State([HiddenState(self.start_state(first).tanh())]), State([memory]))

    def decode(self, target: Tensor, state: DecoderState, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the head's input for whole target sentences; see `Translator.decode`."""
        words = self.drop(self.target_embedding(target))
        ((s,),), (memory,) = state.decoder.layers, state.memory.layers
        states, contexts, alignments = [], [], []
        for x in self.decoder.input(words).unbind(1):
            context, alignment = self._attend(s, memory)
            states.append(s)
            contexts.append(context)
            alignments.append(alignment)
            (s,) = self.decoder(x + self.context(context), s)
        if weights is not None:
            weights["cross"] = torch.stack(alignments, 2)  # (batch, 1, tgt_len, src_len)
        return self._read_out(torch.stack(states, 1), words, torch.stack(contexts, 1))

    def advance(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Return the head's input after one more target token per row; see `Translator.advance`."""
        word = self.drop(self.target_embedding(ids))
        ((s,),), (memory,) = state.decoder.layers, state.memory.layers
        context, _ = self._attend(s, memory)
        after = self.decoder(self.decoder.input(word) + self.context(context), s)
        state.decoder = State([HiddenState(*after)])
        return self._read_out(s, word, context)

    def _attend(self, s: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return the weighted average of the annotations, and the weights.

        Args:
            s: (rows, d_hidden), equally many rows for each sentence.
            memory: of the sentences.

        Returns:
            context: (rows, 2 d_hidden).
            weights: (batch, rows / batch, src_len).
        """
        scores = self.align(s.view(len(memory.mask), -1, s.shape[-1]), memory.keys)
        weights = masked_softmax(scores, memory.mask.unsqueeze(1))
        return (weights @ memory.annotations).flatten(0, 1), weights

    def _read_out(self, s: Tensor, word: Tensor, context: Tensor) -> Tensor:
        """Return t_i (..., d_maxout) of s_{i-1}, E y_{i-1} and c_i: the larger of each pair."""
        pairs = self.readout(torch.cat((s, word, context), -1)).unflatten(-1, (-1, 2))
        return self.drop(cast(Tensor, pairs.amax(-1)))


ENTRY = ModelEntry(
    name="bahdanau",
    kind="translation",
    year=2014,
    paper="Neural Machine Translation by Jointly Learning to Align and Translate",
    arxiv="1409.0473",
    idea="where I look before each word",
    parents=("seq2seq",),
    cls=Bahdanau,
    config=BahdanauConfig,
    presets=PRESETS,
    verbs=("translate",),
)
