"""What a whole sequence is: a class or a few numbers, told by a stack of blocks of any language model.

    signal or ids -> encoder -> [x + mixer(norm(x))] -> norm -> mean or last -> head

The blocks are those of the line of models, so each way of remembering is tried on signals, on images as
rows of pixels and on text as bytes, under one roof. Beside them stands the neural ODE, which alone reads the
times of series that are not sampled evenly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.core.config import Config, nearest
from longscan.errors import LongscanError
from longscan.models import LINEAGE, LanguageModel, LanguageModelConfig, Model, neural_ode
from longscan.models.common.layers import RMSNorm, blank, linear
from longscan.models.common.mixer import Block, Blocks, Mixer

__all__ = ["BODIES", "Body", "SequenceConfig", "SequenceModel"]


class Body(NamedTuple):
    """What blocks come from.

    Attributes:
        config: their Config.
        presets: known sizes, fields of the Config by name.
        blocks: makes them, of a Config and a generator.
        timed: whether they read times, or places only.
    """

    config: type[LanguageModelConfig]
    presets: Mapping[str, dict[str, Any]]
    blocks: Callable[[Any, torch.Generator | None], Iterable[Block]]
    timed: bool = False


#: whose blocks can stand here: all language models of the line, and what reads times
BODIES: dict[str, Body] = {
    entry.name: Body(
        cast(type[LanguageModelConfig], entry.config),
        entry.presets,
        cast(type[LanguageModel], entry.cls).blocks,
    )
    for entry in LINEAGE
    if entry.kind == "language"
} | {
    "neural_ode": Body(neural_ode.NeuralODEConfig, neural_ode.PRESETS, neural_ode.blocks, timed=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig(Config):
    """The sizes of a model that reads a sequence and says one thing of it.

    Attributes:
        body: name of the model whose blocks it is made of, of BODIES.
        body_config: their sizes; of the vocabulary only tokens make use.
        n_outputs: classes, or numbers to be told.
        labels: names of the classes; none if numbers are told.
        d_input: channels of a signal; 0 means tokens.
        mean: of each channel in the training data, taken off; nothing if empty.
        std: likewise, divided by.
        rate: samples per second of the training data, if that is known.
        gap: mean seconds between its steps if it came with times: the unit of a body that reads them.
        pooling: what the head reads: the mean over the sequence, or what stands at its end.
        bidirectional: whether each block has a second mixer, which reads backwards.
        dropout: share of what a block adds that is left out while training.
    """

    body: str
    body_config: LanguageModelConfig
    n_outputs: int
    labels: tuple[str, ...] = ()
    d_input: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rate: float | None = None
    gap: float | None = None
    pooling: Literal["mean", "last"] = "mean"
    bidirectional: bool = False
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Build the configuration from plain values; see `Config.from_dict`.

        Args:
            mapping: `body` says whose fields those of `body_config` are.

        Returns:
            The configuration.

        Raises:
            LongscanError: as `Config.from_dict`; or there is no such body.
        """
        if isinstance(mapping, Mapping) and isinstance(mapping.get("body_config"), Mapping):
            name = mapping.get("body")
            if name not in BODIES:
                raise LongscanError(f"body: no language model called {name!r}{nearest(str(name), BODIES)}")
            config = BODIES[name].config.from_dict(mapping["body_config"])
            mapping = {**mapping, "body_config": config}
        return super().from_dict(mapping)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            LongscanError: a value is out of range.
        """
        super().__post_init__()
        if self.body not in BODIES or not isinstance(self.body_config, BODIES[self.body].config):
            got = f"{type(self.body_config).__name__} for {self.body!r}"
            raise LongscanError(f"body_config: expected the Config of the body, got {got}.")
        if self.n_outputs < 1 or self.d_input < 0:
            got = f"{self.n_outputs} and {self.d_input}"
            raise LongscanError(f"n_outputs, d_input: expected at least 1 and at least 0, got {got}.")
        if self.labels and (len(self.labels) != self.n_outputs or self.n_outputs < 2):
            raise LongscanError(f"labels: expected {max(2, self.n_outputs)} names, got {len(self.labels)}.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, self.d_input):
                got = f"{len(getattr(self, name))}"
                raise LongscanError(
                    f"{name}: expected a number for each of {self.d_input} channels, got {got}."
                )
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise LongscanError("std: expected a positive number beside each mean.")
        if self.rate is not None and self.rate <= 0:
            raise LongscanError(f"rate: expected more than 0 samples per second, got {self.rate}.")
        if self.gap is not None and self.gap <= 0:
            raise LongscanError(f"gap: expected more than 0 seconds, got {self.gap}.")
        if not 0 <= self.dropout < 1:
            raise LongscanError(f"dropout: expected at least 0 and below 1, got {self.dropout}.")


class BothWays(Mixer[Any]):
    """Two mixers: one reads forwards, one backwards; their words are added.

    Args:
        forth: reads forwards.
        back: reads backwards.
    """

    def __init__(self, forth: Mixer[Any], back: Mixer[Any]) -> None:
        super().__init__()
        self.forth, self.back = forth, back

    def plan(self, ids: Tensor, state: None, seq_idx: Tensor | None) -> Any:
        """Work out what both need.

        Args:
            ids: (batch, seq_len) times, which stand still behind the end of a sequence.
            state: nothing.
            seq_idx: (batch, seq_len) the place that each place has backwards.
        """
        assert seq_idx is not None
        back = (ids[:, -1:] - ids.gather(1, seq_idx)).cummax(1).values  # behind the end it would go back
        return self.forth.plan(ids, None, None), self.back.plan(back, None, None), seq_idx

    def forward(self, x: Tensor, state: None, plan: Any, /) -> tuple[Tensor, None]:
        """Mix along time, in both directions.

        Args:
            x: (batch, seq_len, d_model).
            state: nothing: there is none that both could continue.
            plan: those of the mixers, and (batch, seq_len) the place that each place has backwards.

        Returns:
            y: (batch, seq_len, d_model).
            state: nothing.
        """
        places, backwards, order = plan
        order = order[..., None].expand_as(x)
        forth, _ = self.forth(x, None, places)
        back, _ = self.back(x.gather(1, order), None, backwards)
        return forth + back.gather(1, order), None

    def rescale_time(self, factor: float) -> None:
        """Make every time step longer; see `Mixer.rescale_time`."""
        self.forth.rescale_time(factor)
        self.back.rescale_time(factor)


class SequenceModel(Model):
    """Reads whole sequences and tells the class of each, or numbers.

    Padding stands behind a sequence, so what is causal never sees it, and what reads backwards begins where
    the sequence ends.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    config: SequenceConfig

    def __init__(self, config: SequenceConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        body, d_model = config.body_config, config.body_config.d_model
        blocks = BODIES[config.body].blocks
        self.encoder: nn.Module
        if config.d_input:
            self.encoder = linear(config.d_input, d_model, True, generator)
        else:
            self.encoder = blank(nn.Embedding, body.padded_vocab_size, d_model)
            if not self.encoder.weight.is_meta:
                nn.init.normal_(self.encoder.weight, generator=generator)
        self.layers = Blocks(blocks(body, generator))
        if config.bidirectional:
            for layer, other in zip(self.layers, blocks(body, generator), strict=True):
                layer.mixer = BothWays(layer.mixer, other.mixer)
        self.norm_f = RMSNorm(d_model, body.norm_eps)
        self.head = linear(d_model, config.n_outputs, True, generator)

    def forward(self, x: Tensor, lengths: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Read sequences.

        Args:
            x: (batch, seq_len, d_input) of signals, or (batch, seq_len) int64 of tokens.
            lengths: (batch,) int64, what of each row is the sequence; all if None.
            times: (batch, seq_len) seconds, in order; at the rate of the training data, or one a step, if
                None. Bodies that know places only, not times, ignore them: all but the neural ODE.

        Returns:
            (batch, n_outputs): unnormalised log p of the classes, or the numbers.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(x, lengths, times)
        time = torch.arange(x.shape[1], device=x.device)
        ends = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
        ends = ends[:, None]  # (batch, 1)
        order = torch.where(time < ends, ends - 1 - time, time) if self.config.bidirectional else None
        clock = self._clock(times, ends, x.shape[1])
        hidden = self._read(x, order, clock)  # (batch, seq_len, d_model)
        if self.config.pooling == "last":
            return cast(Tensor, self.head(hidden[torch.arange(len(x), device=x.device), ends[:, 0] - 1]))
        weights = (time < ends).to(hidden.dtype) / ends  # (batch, seq_len)
        return cast(Tensor, self.head(torch.einsum("bl,bld->bd", weights, hidden)))

    def loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the mean nats of the class, or the mean square of the error.

        Args:
            outputs: (batch, n_outputs) of `forward`.
            truth: (batch,) int64 numbers of classes, or (batch, n_outputs).
        """
        return F.cross_entropy(outputs, truth) if self.config.labels else F.mse_loss(outputs, truth)

    def rescale_time(self, factor: float) -> None:
        """Make every time step longer, for signals sampled at another rate than those trained on.

        Args:
            factor: old rate / new rate: 2 at half the samples per second.

        Raises:
            LongscanError: the body knows no time, only places.
        """
        for layer in self.layers:
            layer.mixer.rescale_time(factor)

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrence, which set time scales."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.recurrence)

    def slow(self) -> Iterable[nn.Parameter]:
        """Return A, B and dt of state spaces, which learn at a lower rate."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.slow)

    def _clock(self, times: Tensor | None, ends: Tensor, seq_len: int) -> Tensor:
        """Return times in the unit of the body, (batch, seq_len), which stand still behind the ends."""
        step = 1 / (self.config.rate or 1)
        unit = self.config.gap or step
        place = torch.minimum(torch.arange(seq_len, device=ends.device), ends - 1)  # (batch, seq_len)
        return place * (step / unit) if times is None else times.gather(1, place) / unit

    def _read(self, x: Tensor, order: Tensor | None, clock: Tensor) -> Tensor:
        """Return what stands at each place after the blocks, (batch, seq_len, d_model)."""
        config = self.config
        if config.mean:
            x = (x - x.new_tensor(config.mean)) / x.new_tensor(config.std)
        x = self.encoder(x)
        plan = next(iter(self.layers)).mixer.plan(clock, None, order)
        for layer in self.layers:
            y, _ = layer(x, None, plan)
            x = x + ops.dropout(y - x, config.dropout, self.training) if config.dropout else y
        return cast(Tensor, self.norm_f(x))

    def _check(self, x: Tensor, lengths: Tensor | None, times: Tensor | None) -> None:
        """Refuse what cannot be read."""
        d_input, shape = self.config.d_input, tuple(x.shape)
        if d_input and (x.dim() != 3 or shape[2] != d_input or 0 in shape):
            raise ValueError(f"x: expected a non-empty (batch, seq_len, {d_input}), got {shape}")
        if not d_input and (x.dim() != 2 or 0 in shape or x.is_floating_point()):
            raise ValueError(
                f"x: expected a non-empty (batch, seq_len) of integers, got {shape} of {x.dtype}"
            )
        if lengths is not None and (
            lengths.shape != shape[:1] or not bool(((lengths > 0) & (lengths <= shape[1])).all())
        ):
            raise ValueError(f"lengths: expected {shape[0]} numbers from 1 to {shape[1]}, got {lengths}")
        if times is not None and times.shape != shape[:2]:
            raise ValueError(f"times: expected shape {shape[:2]}, got {tuple(times.shape)}")
