"""Long Short-Term Memory.

Sepp Hochreiter and Jürgen Schmidhuber, 1997, Neural Computation 9(8); the forget gate is of Gers, Schmidhuber
and Cummins, 2000. The alternative cell, GRU, is of Cho et al., 2014, arXiv 1406.1078.

Parents: none here. The line starts with it: the memory is a vector that gates write, keep and read.
Changed since: its state update is nonlinear in the state, so tokens must be processed sequentially.

Deviations: there are no peepholes; the bias of the forget gates is initialised with 1 (Jozefowicz et al.,
2015); the GRU applies its reset gate after the product with the state, as torch and cuDNN do. To fit the same
stack as its descendants, each layer is a residual block with a norm before it and a projection after it.

    i, f, o = sigmoid(W x + U h + b)    g = tanh(W x + U h + b)    c = f c + i g    h = o tanh(c)
    r, z    = sigmoid(W x + U h + b)    n = tanh(W x + b + r (U h + b'))            h = (1 - z) n + z h

Glossary: d_hidden = width of h and c; i, f, o = input, forget and output gate; r, z = reset and update gate.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer
from longscan.models.common.state import over
from longscan.ops._autocast import exact

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257},
    "tiny-lm": {"d_model": 256, "n_layers": 3, "vocab_size": 4096, "d_hidden": 400},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMConfig(LanguageModelConfig):
    """The configuration of a stack of recurrent layers.

    Raises:
        LongscanError: a value is out of range.
    """

    d_hidden: int | None = None  # None is d_model
    cell: Literal["lstm", "gru"] = "lstm"
    forget_bias: float = 1.0  # initial bias of the LSTM's forget gates

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_hidden")
        if self.cell not in ("lstm", "gru"):
            raise LongscanError(f"cell: expected 'lstm' or 'gru', got {self.cell!r}.")

    @property
    def width(self) -> int:
        """Width of the state: d_hidden or its default."""
        return self.d_model if self.d_hidden is None else self.d_hidden


class LSTMState(NamedTuple):
    """The state of one LSTM layer.

    Attributes:
        h: (batch, d_hidden) hidden state.
        c: (batch, d_hidden) cell state.
    """

    h: Tensor
    c: Tensor


class GRUState(NamedTuple):
    """The state of one GRU layer.

    Attributes:
        h: (batch, d_hidden) hidden state.
    """

    h: Tensor


class RecurrentMixer(SectionMixer[Any]):
    """A layer of torch's LSTM or GRU.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: LSTMConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.is_lstm = config.cell == "lstm"
        kind: type[nn.LSTM | nn.GRU] = nn.LSTM if self.is_lstm else nn.GRU
        self.rnn: nn.LSTM | nn.GRU = blank(kind, config.d_model, config.width, batch_first=True)
        self.out_proj = linear(config.width, config.d_model, False, generator)
        if not self.out_proj.weight.is_meta:
            self._init_weights(config, generator)

    @torch.no_grad()
    def _init_weights(self, config: LSTMConfig, generator: torch.Generator | None) -> None:
        """Initialise like torch, forget gates aside; scale the output projection for the residual stream."""
        bound = config.width**-0.5
        for parameter in self.rnn.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
        if self.is_lstm:
            _, _, bias, _ = self.rnn.parameters()
            bias.chunk(4)[1].add_(config.forget_bias)
        self.out_proj.weight /= config.n_layers**0.5

    @exact
    def mix(self, x: Tensor, state: Any, length: Tensor | None) -> tuple[Tensor, Any]:
        """Mix along time; see `SectionMixer.mix`."""
        state = self.init_state(len(x)) if state is None else state
        before = [tensor[None] for tensor in state]  # (1, rows, d_hidden) each
        hx = before if self.is_lstm else before[0]
        if length is None:
            h, after = self.rnn(x, hx)  # (rows, seq_len, d_hidden)
        else:  # torch rejects empty rows
            packed = pack_padded_sequence(x, length.clamp(min=1).cpu(), True, enforce_sorted=False)
            h, after = self.rnn(packed, hx)
            h, _ = pad_packed_sequence(h, True, total_length=x.shape[1])
        tensors = [tensor[0] for tensor in (after if self.is_lstm else [after])]
        if length is not None:
            tensors = [
                torch.where(over(length > 0, t), t, old) for t, old in zip(tensors, state, strict=True)
            ]
        return cast(Tensor, self.out_proj(h)), type(state)(*tensors)

    def init_state(self, batch_size: int) -> Any:
        """Return zeros; see `Mixer.init_state`."""
        zeros = next(self.rnn.parameters()).new_zeros(batch_size, self.rnn.hidden_size)
        return LSTMState(zeros, zeros.clone()) if self.is_lstm else GRUState(zeros)

    @exact
    def step(self, x: Tensor, state: Any, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        if self.is_lstm:
            h, c = torch.lstm_cell(x, state, *self.rnn.parameters())
            state.c.copy_(c)
        else:
            h = torch.gru_cell(x, state.h, *self.rnn.parameters())
        state.h.copy_(h)
        return cast(Tensor, self.out_proj(state.h))


class LSTM(LanguageModel):
    """A language model of recurrent layers.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: LSTMConfig

    @staticmethod
    def block(config: LSTMConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, RecurrentMixer(config, generator))


ENTRY = ModelEntry(
    name="lstm",
    kind="language",
    year=1997,
    paper="Long Short-Term Memory",
    arxiv="",
    idea="a gated feature",
    parents=(),
    cls=LSTM,
    config=LSTMConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
