"""Hyena Hierarchy: Towards Larger Convolutional Language Models.

Michael Poli, Stefano Massaroli, Eric Nguyen, Daniel Y. Fu, Tri Dao, Stephen Baccus, Yoshua Bengio, Stefano
Ermon, Christopher Ré, 2023, arXiv 2302.10866.

Parent: H3, a state space between two gates. Kept: multiplicative gates, a short convolution before them.
Changed: the filter in between is not a state space but an implicit filter, any function of time that a small
network can represent. There is no recurrence left: the memory is the whole past, as in attention, at a cost
of O(L log L).

Deviations: time is a fraction of max_positions, not of the sequence length, so that chunks of a sequence give
the same results as the whole; the positional features have integer frequencies from 1 on. The projections
have no biases and the filter network has one hidden layer; the official code has biases and two.

The mixer, for tokens x of width d_model:

    x_0, ..., x_{N-1}, v = short convolution of W x            N = order
    v   = x_i * v;  v = h_i (*) v + D_i v                      for i = N-1, ..., 1; (*) convolves
    out = W_o (x_0 * v)
    h_i(t) = exp(-alpha t) FFN(t, cos 2 pi f t, sin 2 pi f t)  the activations of FFN are sines

Glossary: alpha = decay, from slow to fast over the channels; f = 1, ..., n_bands; K of the paper = n_bands.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.growable import GrowableState
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import Derived, blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer, Sections, warn_beyond
from longscan.ops import causal_conv1d, causal_conv1d_step, long_conv
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_filter": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 12, "vocab_size": 4096},
}
TARGET = 1e-2  # the value that the window of a filter decays to
SLOW, FAST = 1.5, 0.3  # after these fractions of max_positions, in the first channel and in the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyenaConfig(LanguageModelConfig):
    """The configuration of a Hyena.

    Raises:
        LongscanError: a value is out of range.
    """

    order: int = 2  # gates; there is one long convolution fewer
    d_conv: int = 3  # taps of the short convolution
    d_filter: int = 64  # width of the filter network
    n_bands: int = 4  # frequencies of its positional features
    frequency: float = 10.0  # initial frequency of its activations sin(frequency x)
    max_positions: int = 2048  # length of the filters; longer sequences work, with a warning

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_conv", "d_filter", "n_bands", "max_positions")
        self.check("order", least=2)
        self.check("frequency", above=0)


class _HyenaState(NamedTuple):
    """The fields of `HyenaState`."""

    past: Tensor
    conv: Tensor
    length: Tensor


class HyenaState(GrowableState, _HyenaState):
    """The state of one layer: all inputs of its filters, so it grows with the sequence.

    Attributes:
        past: (batch, capacity, order - 1, d_model) the inputs of the long convolutions.
        conv: (batch, d_conv - 1, (order + 1) d_model) the last inputs of the short one, oldest first.
        length: (batch,) int64 tokens of each row.
    """

    __slots__ = ()
    grows = ("past",)


class HyenaMixer(SectionMixer[HyenaState]):
    """Long convolutions between gates.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    # parameters, not Linears: like everything that sets time scales they are few and stay float32
    recurrence = ("filter_in", "filter_mid", "filter_out", "filter_bias", "frequency", "D")

    def __init__(self, config: HyenaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d_model, order, d_filter = config.d_model, config.order, config.d_filter
        streams = (order + 1) * d_model
        self.in_proj = linear(d_model, streams, False, generator)
        self.conv1d = blank(nn.Conv1d, streams, streams, config.d_conv, groups=streams)
        self.filter_in = nn.Parameter(torch.empty(d_filter, 1 + 2 * config.n_bands))
        self.filter_mid = nn.Parameter(torch.empty(d_filter, d_filter))
        self.filter_out = nn.Parameter(torch.empty((order - 1) * d_model, d_filter))
        self.filter_bias = nn.Parameter(torch.empty(2, d_filter))
        self.frequency = nn.Parameter(torch.full((d_filter,), config.frequency))
        self.D = nn.Parameter(torch.empty(order - 1, d_model))
        self.out_proj = linear(d_model, d_model, False, generator)
        self._derived, self._cached_length = Derived(), 0
        if not self.D.is_meta:
            self._init_weights(config, generator)

    @torch.no_grad()
    def _init_weights(self, config: HyenaConfig, generator: torch.Generator | None) -> None:
        """Initialise everything but the Linears, and scale the output projection for the residual stream."""
        for weight in (self.filter_in, self.filter_mid, self.filter_out, self.conv1d.weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        for bias, width in zip(self.filter_bias, (self.filter_in.shape[1], config.d_filter), strict=True):
            bias.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        nn.init.zeros_(cast(Tensor, self.conv1d.bias))
        nn.init.normal_(self.D, generator=generator)
        self.out_proj.weight /= math.sqrt(config.n_layers)

    def plan(self, ids: Tensor, state: HyenaState | None, seq_idx: Tensor | None) -> Sections | None:
        """Return the separated sequences; warn if they exceed the context; see `Mixer.plan`."""
        sections = super().plan(ids, state, seq_idx)
        new = 1 if ids.dim() == 1 else ids.shape[1] if sections is None else sections.position.shape[1]
        warn_beyond(new + (0 if state is None else state.longest), self.config.max_positions)
        return sections

    def filters(self, n: int) -> Tensor:
        """Return the filters.

        Args:
            n: their length.

        Returns:
            (order - 1, d_model, n).
        """
        kind, device = self.D.dtype, self.D.device
        return self._evaluate(torch.arange(n, device=device, dtype=kind)[:, None] / self.config.max_positions)

    @exact
    def _evaluate(self, t: Tensor) -> Tensor:
        """Return the filters at times t (n, 1): (order - 1, d_model, n)."""
        n, kind, device = len(t), t.dtype, t.device
        angles = 2 * math.pi * t * torch.arange(1, self.config.n_bands + 1, device=device)
        hidden = torch.cat([t, angles.cos(), angles.sin()], 1)  # (n, 1 + 2 n_bands)
        for weight, bias in zip((self.filter_in, self.filter_mid), self.filter_bias, strict=True):
            hidden = torch.sin(self.frequency * F.linear(hidden, weight, bias))
        values = F.linear(hidden, self.filter_out).view(n, *self.D.shape)
        rates = torch.linspace(1 / SLOW, 1 / FAST, self.D.shape[1], device=device, dtype=kind)
        filters: Tensor = values * torch.exp(rates * math.log(TARGET) * t)[:, None]
        return filters.permute(1, 2, 0)

    def mix(self, x: Tensor, state: HyenaState | None, length: Tensor | None) -> tuple[Tensor, HyenaState]:
        """Mix along time; see `SectionMixer.mix`."""
        state = self.init_state(len(x)) if state is None else state
        seq_len, seq_idx = x.shape[1], None
        if length is not None:
            seq_idx = (torch.arange(seq_len, device=x.device) < length[:, None]).long() - 1
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed, conv = causal_conv1d(self.in_proj(x), weight, bias, None, state.conv, seq_idx)
        *gates, v = mixed.chunk(self.config.order + 1, -1)  # (rows, seq_len, d_model) each
        position = state.next_positions(seq_len)[..., None].expand(len(x), -1, x.shape[2])
        filters, past = self.filters(state.longest + seq_len), []
        for i, gate in enumerate(gates[:0:-1]):
            past.append(state.extended(state.past[:, :, i], (gate * v).to(state.past.dtype)))
            v = long_conv(past[-1], filters[i], self.D[i]).gather(1, position).to(x.dtype)
        end = state.length + (seq_len if length is None else length)
        return cast(Tensor, self.out_proj(gates[0] * v)), HyenaState(torch.stack(past, 2), conv, end)

    def init_state(self, batch_size: int) -> HyenaState:
        """Return an empty past, and zeros; see `Mixer.init_state`."""
        zeros, streams = self.D.new_zeros, len(self.conv1d.weight)
        return HyenaState(
            zeros(batch_size, 0, *self.D.shape),
            zeros(batch_size, self.config.d_conv - 1, streams),
            zeros(batch_size, dtype=torch.int64),
        )

    @exact
    def step(self, x: Tensor, state: HyenaState, plan: None = None, /) -> Tensor:
        """Mix one more token per row; see `Mixer.step`."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed = causal_conv1d_step(state.conv, self.in_proj(x), weight, bias)
        *gates, v = mixed.chunk(self.config.order + 1, -1)  # (batch, d_model) each
        rows, position = torch.arange(len(x), device=x.device), state.length.clone()
        state.length.add_(1)
        n = state.longest
        lag = position[:, None] - torch.arange(n, device=x.device)  # (batch, n), < 0 past the end of a row
        taps = self._cached_filters(n).permute(0, 2, 1)  # (order - 1, n, d_model)
        for i, gate in enumerate(gates[:0:-1]):
            v = gate * v
            state.past[rows, position, i] = v.to(state.past.dtype)
            weights = taps[i][lag.clamp(min=0)] * (lag >= 0)[..., None]  # (batch, n, d_model)
            v = (torch.einsum("bnd,bnd->bd", weights, state.past[:, :n, i]) + self.D[i] * v).to(v.dtype)
        return cast(Tensor, self.out_proj(gates[0] * v))

    def _cached_filters(self, n: int) -> Tensor:
        """Return what `filters` returns, from a cache as long as the network's weights stay the same."""
        if composed():
            return self.filters(n)
        if n > self._cached_length:
            self._derived, self._cached_length = Derived(), max(64, 2 * n)
        weights = [self.get_parameter(name) for name in self.recurrence]
        return self._derived.get("filters", weights, lambda: self.filters(self._cached_length))[:, :, :n]


class Hyena(LanguageModel):
    """A language model of gated long convolutions.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: HyenaConfig

    @staticmethod
    def block(config: HyenaConfig, generator: torch.Generator | None = None) -> Block:
        """Return one block."""
        return Block(config, HyenaMixer(config, generator))

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for."""
        return self.config.max_positions


ENTRY = ModelEntry(
    name="hyena",
    kind="language",
    year=2023,
    paper="Hyena Hierarchy: Towards Larger Convolutional Language Models",
    arxiv="2302.10866",
    idea="the whole past through a filter",
    parents=("h3",),
    cls=Hyena,
    config=HyenaConfig,
    presets=PRESETS,
    verbs=LANGUAGE,
)
