"""An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling.

Shaojie Bai, J. Zico Kolter, Vladlen Koltun, 2018, arXiv 1803.01271: the temporal convolutional network.

Parents: none here; its predecessors are WaveNet (2016, arXiv 1609.03499) and ByteNet.
Kept of recurrent networks: causality. Changed: there is no state that compresses the past; each layer is a
dilated convolution, with twice the dilation of the layer below, so the memory is a receptive field of fixed
size.

Deviations: a norm before each block replaces weight normalisation and dropout. The residual stream passes
from block to block unchanged, where the paper applies a relu to the sum. Convolutions have torch's
initialisation, the second of a block divided by sqrt(n_layers); the official code has N(0, 0.01).

The block, in layer i:

    x = x + W_2 * relu(W_1 * norm(x))         * convolves d_conv tokens with dilation 2^i; relu after each

Glossary: k = d_conv, d = 2^i the dilation; the receptive field is 1 + 2 (k - 1) (2^n_layers - 1) tokens.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import blank, untouched
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257},
    "tiny-lm": {"d_model": 256, "n_layers": 9, "vocab_size": 4096},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNNConfig(LanguageModelConfig):
    """The configuration of a temporal convolutional network.

    Raises:
        LongscanError: a value is out of range.
    """

    d_conv: int = 3  # k
    d_inner: int | None = None  # channels between the two convolutions; None is d_model

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_conv", "d_inner")

    @property
    def width(self) -> int:
        """Channels between the convolutions: d_inner or its default."""
        return self.d_model if self.d_inner is None else self.d_inner


class CNNState(NamedTuple):
    """The state of one block: the last (d_conv - 1) dilation inputs of each convolution, oldest first.

    Attributes:
        below: (batch, (d_conv - 1) dilation, d_model).
        between: (batch, (d_conv - 1) dilation, d_inner).
    """

    below: Tensor
    between: Tensor


class DilatedConv(nn.Module):
    """A causal dilated convolution and a relu.

    Args:
        d_in: input channels.
        d_out: output channels.
        d_conv: taps.
        dilation: tokens from one tap to the next.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self, d_in: int, d_out: int, d_conv: int, dilation: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.conv = blank(nn.Conv1d, d_in, d_out, d_conv, dilation=dilation)
        self.past = (d_conv - 1) * dilation
        if not self.conv.weight.is_meta:
            nn.init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, x: Tensor, past: Tensor | None, length: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the convolution of x, and the last inputs.

        Args:
            x: (rows, seq_len, d_in).
            past: (rows, (d_conv - 1) dilation, d_in) the preceding inputs; zeros if None.
            length: (rows,) tokens of each row; seq_len if None.

        Returns:
            y: (rows, seq_len, d_out).
            past: the last inputs.
        """
        past = x.new_zeros(len(x), self.past, x.shape[2]) if past is None else past
        x = torch.cat([past, x], 1)
        y = self.conv(x.transpose(1, 2)).relu().transpose(1, 2)
        if length is None:
            return y, x[:, x.shape[1] - self.past :]
        index = length[:, None] + torch.arange(self.past, device=x.device)  # (rows, past)
        return y, x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    def step(self, x: Tensor, past: Tensor) -> Tensor:
        """Return the output at x (batch, d_in); x enters `past`, whose oldest input is dropped."""
        window = torch.cat([past, x[:, None]], 1)  # (batch, past + 1, d_in)
        past.copy_(window[:, 1:])
        if not untouched(self.conv):
            return cast(Tensor, self.conv(window.transpose(1, 2)).relu()[..., 0])
        taps = window[:, :: self.conv.dilation[0]].transpose(1, 2)  # (batch, d_in, d_conv)
        return F.linear(taps.flatten(1), self.conv.weight.flatten(1), self.conv.bias).relu()


class CNNMixer(SectionMixer[CNNState]):
    """Two dilated convolutions.

    Args:
        config: the configuration.
        dilation: tokens from one tap to the next.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self, config: CNNConfig, dilation: int = 1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.lower = DilatedConv(config.d_model, config.width, config.d_conv, dilation, generator)
        self.upper = DilatedConv(config.width, config.d_model, config.d_conv, dilation, generator)
        if not self.upper.conv.weight.is_meta:
            with torch.no_grad():
                self.upper.conv.weight /= math.sqrt(config.n_layers)

    def mix(self, x: Tensor, state: CNNState | None, length: Tensor | None) -> tuple[Tensor, CNNState]:
        """Mix along time; see `SectionMixer.mix`."""
        below, between = (None, None) if state is None else state
        x, below = self.lower(x, below, length)
        x, between = self.upper(x, between, length)
        return x, CNNState(below, between)

    def init_state(self, batch_size: int) -> CNNState:
        """Return zeros; see `Mixer.init_state`."""
        lower, upper = self.lower, self.upper
        zeros = lower.conv.weight.new_zeros
        return CNNState(
            zeros(batch_size, lower.past, lower.conv.in_channels),
            zeros(batch_size, upper.past, upper.conv.in_channels),
        )

    def step(self, x: Tensor, state: CNNState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        return self.upper.step(self.lower.step(x, state.below), state.between)


class CNN(LanguageModel):
    """A language model of dilated convolutions.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: CNNConfig

    @staticmethod
    def block(config: CNNConfig, generator: torch.Generator | None = None, dilation: int = 1) -> Block:
        """Return one block with this dilation."""
        return Block(config, CNNMixer(config, dilation, generator))

    @classmethod
    def blocks(cls, config: CNNConfig, generator: torch.Generator | None = None) -> list[Block]:
        """Return all blocks, each with twice the dilation of the one below."""
        return [cls.block(config, generator, 2**i) for i in range(config.n_layers)]


ENTRY = ModelEntry(
    name="cnn",
    kind="language",
    year=2018,
    paper="An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling",
    arxiv="1803.01271",
    idea="a window that doubles with each layer",
    parents=(),
    cls=CNN,
    config=CNNConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
