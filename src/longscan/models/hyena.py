"""Hyena Hierarchy: Towards Larger Convolutional Language Models.

Michael Poli, Stefano Massaroli, Eric Nguyen, Daniel Y. Fu, Tri Dao, Stephen Baccus, Yoshua Bengio, Stefano
Ermon, Christopher Ré, 2023, arXiv 2302.10866.

Parent: H3, a state space between two gates. Kept: gates that multiply, a short convolution before them.
Changed: the filter in between is no state space but any function of time that a small network can draw, so
nothing recurrent is left: the memory is the whole past, as in attention, while the work stays O(L log L).

Deviations: time is counted in shares of max_positions, not of the text in hand, so that what is read in
pieces is what is read at once; the waves that tell the time have whole frequencies from 1 on. The projections
have no biases and the network of the filters has one inner layer; the official code has biases and two.

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

from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import Derived, blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer, Sections, warn_beyond
from longscan.models.common.state import Growing
from longscan.ops import causal_conv1d, causal_conv1d_step, long_conv
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_filter": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 12, "vocab_size": 4096},
}
TARGET = 1e-2  # what the window of a filter is down to
SLOW, FAST = 1.5, 0.3  # after these shares of max_positions, in the first channel and in the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyenaConfig(LanguageModelConfig):
    """The sizes of a Hyena.

    Raises:
        LongscanError: a value is out of range.
    """

    order: int = 2  # gates; one long convolution fewer
    d_conv: int = 3  # taps of the short convolution
    d_filter: int = 64  # width of the network that draws the filters
    n_bands: int = 4  # waves it is told the time by
    frequency: float = 10.0  # of its activations sin(frequency x) at the start
    max_positions: int = 2048  # the length of the filters; longer texts are read, with a warning

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("d_conv", "d_filter", "n_bands", "max_positions"):
            self.check_count(name)
        if self.order < 2:
            raise LongscanError(f"order: expected at least 2 gates, got {self.order}.")
        if not self.frequency > 0:
            raise LongscanError(f"frequency: expected more than 0, got {self.frequency}.")


class _HyenaState(NamedTuple):
    """The fields of `HyenaState`."""

    past: Tensor
    conv: Tensor
    length: Tensor


class HyenaState(Growing, _HyenaState):
    """What one layer remembers: all that its filters have read, so it grows with the text.

    Attributes:
        past: (batch, capacity, order - 1, d_model) the inputs of the long convolutions.
        conv: (batch, d_conv - 1, (order + 1) d_model) the last inputs of the short one, oldest first.
        length: (batch,) int64, how many of the places each row uses.
    """

    __slots__ = ()
    grows = ("past",)


class HyenaMixer(SectionMixer[HyenaState]):
    """Long convolutions between gates.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    # plain parameters and no Linear, like all that sets time scales: they are few and keep float32
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
        self._derived, self._drawn = Derived(), 0
        if not self.D.is_meta:
            self._start(config, generator)

    @torch.no_grad()
    def _start(self, config: HyenaConfig, generator: torch.Generator | None) -> None:
        """Set what is no Linear, and the scale of the residual."""
        for weight in (self.filter_in, self.filter_mid, self.filter_out, self.conv1d.weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        for bias, width in zip(self.filter_bias, (self.filter_in.shape[1], config.d_filter), strict=True):
            bias.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        nn.init.zeros_(cast(Tensor, self.conv1d.bias))
        nn.init.normal_(self.D, generator=generator)
        self.out_proj.weight /= math.sqrt(config.n_layers)

    def plan(self, ids: Tensor, state: HyenaState | None, seq_idx: Tensor | None) -> Sections | None:
        """Take the rows apart; see `Mixer.plan`."""
        sections = super().plan(ids, state, seq_idx)
        new = 1 if ids.dim() == 1 else ids.shape[1] if sections is None else sections.place.shape[1]
        warn_beyond(new + (0 if state is None else state.longest), self.config.max_positions)
        return sections

    def filters(self, n: int) -> Tensor:
        """Draw the filters.

        Args:
            n: their length.

        Returns:
            (order - 1, d_model, n).
        """
        kind, device = self.D.dtype, self.D.device
        return self._draw(torch.arange(n, device=device, dtype=kind)[:, None] / self.config.max_positions)

    @exact
    def _draw(self, t: Tensor) -> Tensor:
        """Draw the filters at times t (n, 1): (order - 1, d_model, n)."""
        n, kind, device = len(t), t.dtype, t.device
        angles = 2 * math.pi * t * torch.arange(1, self.config.n_bands + 1, device=device)
        hidden = torch.cat([t, angles.cos(), angles.sin()], 1)  # (n, 1 + 2 n_bands)
        for weight, bias in zip((self.filter_in, self.filter_mid), self.filter_bias, strict=True):
            hidden = torch.sin(self.frequency * F.linear(hidden, weight, bias))
        drawn = F.linear(hidden, self.filter_out).view(n, *self.D.shape)
        decay = torch.linspace(1 / SLOW, 1 / FAST, self.D.shape[1], device=device, dtype=kind) * math.log(
            TARGET
        )
        filters: Tensor = drawn * torch.exp(decay * t)[:, None]
        return filters.permute(1, 2, 0)

    def read(self, x: Tensor, state: HyenaState | None, length: Tensor | None) -> tuple[Tensor, HyenaState]:
        """Mix along time; see `SectionMixer.read`."""
        state = self.init_state(len(x)) if state is None else state
        seq_len, seq_idx = x.shape[1], None
        if length is not None:
            seq_idx = (torch.arange(seq_len, device=x.device) < length[:, None]).long() - 1
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed, conv = causal_conv1d(self.in_proj(x), weight, bias, None, state.conv, seq_idx)
        *gates, v = mixed.chunk(self.config.order + 1, -1)  # (rows, seq_len, d_model) each
        place = state.places(seq_len)[..., None].expand(len(x), -1, x.shape[2])
        filters, past = self.filters(state.longest + seq_len), []
        for i, gate in enumerate(gates[:0:-1]):
            past.append(state.extended(state.past[:, :, i], (gate * v).to(state.past.dtype)))
            v = long_conv(past[-1], filters[i], self.D[i]).gather(1, place).to(x.dtype)
        end = state.length + (seq_len if length is None else length)
        return cast(Tensor, self.out_proj(gates[0] * v)), HyenaState(torch.stack(past, 2), conv, end)

    def init_state(self, batch_size: int) -> HyenaState:
        """Return nothing, and zeros; see `Mixer.init_state`."""
        zeros, streams = self.D.new_zeros, len(self.conv1d.weight)
        return HyenaState(
            zeros(batch_size, 0, *self.D.shape),
            zeros(batch_size, self.config.d_conv - 1, streams),
            zeros(batch_size, dtype=torch.int64),
        )

    @exact
    def step(self, x: Tensor, state: HyenaState, plan: None = None, /) -> Tensor:
        """Take in one token per row; see `Mixer.step`."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed = causal_conv1d_step(state.conv, self.in_proj(x), weight, bias)
        *gates, v = mixed.chunk(self.config.order + 1, -1)  # (batch, d_model) each
        rows, place = torch.arange(len(x), device=x.device), state.length.clone()
        state.length.add_(1)
        n = state.longest
        lag = place[:, None] - torch.arange(n, device=x.device)  # (batch, n), < 0 behind the row
        taps = self._kept(n).permute(0, 2, 1)  # (order - 1, n, d_model)
        for i, gate in enumerate(gates[:0:-1]):
            v = gate * v
            state.past[rows, place, i] = v.to(state.past.dtype)
            heard = taps[i][lag.clamp(min=0)] * (lag >= 0)[..., None]  # (batch, n, d_model)
            v = (torch.einsum("bnd,bnd->bd", heard, state.past[:, :n, i]) + self.D[i] * v).to(v.dtype)
        return cast(Tensor, self.out_proj(gates[0] * v))

    def _kept(self, n: int) -> Tensor:
        """Draw filters as `filters` does, but only once while the network stays as it is."""
        if composed():
            return self.filters(n)
        if n > self._drawn:
            self._derived, self._drawn = Derived(), max(64, 2 * n)
        weights = [self.get_parameter(name) for name in self.recurrence]
        return self._derived.get("filters", weights, lambda: self.filters(self._drawn))[:, :, :n]


class Hyena(LanguageModel):
    """A language model of gated long convolutions.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    config: HyenaConfig

    @staticmethod
    def block(config: HyenaConfig, generator: torch.Generator | None = None) -> Block:
        """Make one block."""
        return Block(config, HyenaMixer(config, generator))

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text it was made for."""
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
