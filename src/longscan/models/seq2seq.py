"""Sequence to Sequence Learning with Neural Networks.

Ilya Sutskever, Oriol Vinyals, Quoc V. Le, 2014, arXiv 1409.3215.

Parent: the recurrent language model (LSTM). The encoder processes the source, last word first; its final
state, a vector per layer, is all that the decoder knows of it: there is no attention. Bahdanau's baseline is
the encoder-decoder of Cho et al. (2014, arXiv 1406.1078), which also feeds that one vector to the decoder at
every step; Luong's is this one. This one is here because it is the stronger of the two and because Luong is
exactly this model plus attention: the difference between them is what attention buys.

Deviations: one vocabulary for both languages; dropout on embeddings, between layers and before the softmax
(Zaremba et al., 2014, arXiv 1409.2329), which small data sets need.

    i, f, o = sigmoid(W x + U h + b)    g = tanh(W x + U h + b)    c = f c + i g    h = o tanh(c)

Glossary: d_embedding, d_hidden = the 1000 of the paper, n_layers = its 4; h, c = hidden state and cell.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from longscan.models.common.encoder_decoder import DecoderState, Translator, TranslatorConfig, embedding
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import linear
from longscan.models.common.state import State
from longscan.ops import dropout

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "d_embedding": 24, "d_hidden": 32, "n_layers": 2},
    "multi30k": {
        "vocab_size": 8000,
        "d_embedding": 256,
        "d_hidden": 384,
        "n_layers": 2,
        "dropout": 0.2,
    },
    "paper": {"vocab_size": 80000, "d_embedding": 1000, "d_hidden": 1000, "n_layers": 4},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(TranslatorConfig):
    """The configuration of a deep LSTM encoder-decoder.

    Raises:
        LongscanError: a value is out of range.
    """

    d_embedding: int
    d_hidden: int
    n_layers: int = 4
    reverse: bool = True  # encode the source from its end to its start, section 3.3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_embedding", "d_hidden", "n_layers")


class LSTMState(NamedTuple):
    """The state of one layer.

    Attributes:
        h: (batch, d_hidden).
        c: (batch, d_hidden).
    """

    h: Tensor
    c: Tensor


class Cell(Protocol):
    """A step of a recurrent layer."""

    def __call__(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the state after projected inputs x (batch, ...); its first tensor is the output."""


def unroll(
    cell: Cell, x: Tensor, state: tuple[Tensor, ...], mask: Tensor | None = None, backward: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the outputs of a cell over sentences, and its state; padding does not change the state.

    Args:
        cell: the cell.
        x: (batch, seq_len, ...) projected inputs.
        state: tensors (batch, d_hidden).
        mask: (batch, seq_len) boolean, False in padding; no padding if None.
        backward: whether to run from right to left.

    Returns:
        outputs: (batch, seq_len, d_hidden), the first tensor of the state after each token.
        state: after the last token.
    """
    columns = x.unbind(1)
    outputs: list[Tensor] = []
    ragged = [False] * len(columns) if mask is None else (~mask).any(0).tolist()
    for t in range(len(columns))[:: -1 if backward else 1]:
        after = cell(columns[t], *state)
        if mask is not None and ragged[t]:
            real = mask[:, t, None]
            after = tuple(torch.where(real, new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(state[0])
    return torch.stack(outputs[:: -1 if backward else 1], 1), state


class LSTMCell(nn.Module):
    """An LSTM layer; the inputs of a sentence are projected in one product.

    Args:
        d_in: width of the inputs.
        d_hidden: width of the state.
    """

    def __init__(self, d_in: int, d_hidden: int) -> None:
        super().__init__()
        self.input = linear(d_in, 4 * d_hidden, True)
        self.recurrent = linear(d_hidden, 4 * d_hidden, False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after one step.

        Args:
            x: (batch, 4 d_hidden), inputs projected by `input`.
            h: (batch, d_hidden).
            c: (batch, d_hidden).

        Returns:
            h, c: after the step.
        """
        i, f, g, o = (x + self.recurrent(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class LSTM(nn.Module):
    """A stack of LSTM layers, with dropout between them.

    Args:
        d_in: width of the inputs.
        d_hidden: width of each layer.
        n_layers: number of layers.
        dropout: dropout probability between layers.
    """

    def __init__(self, d_in: int, d_hidden: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.d_hidden, self.dropout = d_hidden, dropout
        self.layers = nn.ModuleList(LSTMCell(d_hidden if i else d_in, d_hidden) for i in range(n_layers))

    def init_state(self, batch_size: int) -> list[LSTMState]:
        """Return the initial state: zeros."""
        zeros = next(self.parameters()).new_zeros(batch_size, self.d_hidden)
        return [LSTMState(zeros, zeros)] * len(self.layers)

    def forward(
        self, x: Tensor, state: list[LSTMState], mask: Tensor | None = None, backward: bool = False
    ) -> tuple[Tensor, list[LSTMState]]:
        """Return the outputs of whole sentences, and the state.

        Args:
            x: (batch, seq_len, d_in).
            state: of each layer.
            mask: see `unroll`.
            backward: see `unroll`.

        Returns:
            outputs: (batch, seq_len, d_hidden) of the top layer.
            state: of each layer after the last token.
        """
        after = []
        for i, (cell, start) in enumerate(zip(self.layers, state, strict=True)):
            x = dropout(x, self.dropout, self.training and i > 0)
            x, last = unroll(cast(LSTMCell, cell), cast(LSTMCell, cell).input(x), start, mask, backward)
            after.append(LSTMState._make(last))
        return x, after

    def project(self, x: Tensor) -> Tensor:
        """Return the inputs x (..., d_in) projected for `step`, (..., 4 d_hidden)."""
        return cast(Tensor, cast(LSTMCell, self.layers[0]).input(x))

    def step(self, x: Tensor, state: list[LSTMState]) -> list[LSTMState]:
        """Return the state of each layer after one more token; the h of the last is the output.

        Args:
            x: (batch, 4 d_hidden), inputs projected by `project`.
            state: of each layer.
        """
        after: list[LSTMState] = []
        for i, (cell, before) in enumerate(zip(self.layers, state, strict=True)):
            if i:
                x = cast(LSTMCell, cell).input(dropout(after[-1].h, self.dropout, self.training))
            after.append(LSTMState._make(cell(x, *before)))
        return after


class Source(NamedTuple):
    """The decoder's memory of the source: nothing but the number of sentences, as there is no attention.

    Attributes:
        lengths: (batch,) of the sentences.
    """

    lengths: Tensor


class Seq2Seq(Translator):
    """A deep LSTM encoder, whose final state is the initial state of a deep LSTM decoder.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        sizes = (config.d_embedding, config.d_hidden, config.n_layers, config.dropout)
        self.source_embedding = embedding(config.vocab_size, config.d_embedding)
        self.target_embedding = embedding(config.vocab_size, config.d_embedding)
        self.encoder, self.decoder = LSTM(*sizes), LSTM(*sizes)
        self.head = linear(config.d_hidden, config.vocab_size, False)
        uniform(self, 0.08, generator)  # section 3.4

    def encode(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> DecoderState:
        """Return the initial decoder state; see `Translator.encode`."""
        mask = source != self.config.pad_id
        x = self.drop(self.table("source")(source))
        _, state = self.encoder(x, self.encoder.init_state(len(source)), mask, self.config.reverse)
        return DecoderState(State([*state]), State([Source(mask.sum(1))]))

    def decode(self, target: Tensor, state: DecoderState, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the head's input for whole target sentences; see `Translator.decode`."""
        hidden, _ = self.decoder(self.drop(self.target_embedding(target)), state.decoder.layers)
        return self.drop(hidden)

    def advance(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Return the head's input after one more target token per row; see `Translator.advance`."""
        x = self.decoder.project(self.drop(self.target_embedding(ids)))
        layers = self.decoder.step(x, state.decoder.layers)
        state.decoder = State([*layers])
        return self.drop(layers[-1].h)


@torch.no_grad()
def uniform(model: nn.Module, bound: float, generator: torch.Generator | None) -> None:
    """Initialise all parameters of a model uniformly in [-bound, bound].

    Args:
        model: the model.
        bound: the largest absolute value.
        generator: randomness; torch's global one if None.
    """
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator)


ENTRY = ModelEntry(
    name="seq2seq",
    kind="translation",
    year=2014,
    paper="Sequence to Sequence Learning with Neural Networks",
    arxiv="1409.3215",
    idea="one vector for a sentence",
    parents=("lstm",),
    cls=Seq2Seq,
    config=Seq2SeqConfig,
    presets=PRESETS,
    verbs=("translate",),
)
