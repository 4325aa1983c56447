"""Sequence classification and regression, with the blocks of any language model.

    signal or ids -> encoder -> [x + mixer(norm(x))] -> norm -> mean or last -> head

All models of the line can be compared on signals, on images as rows of pixels and on text as bytes. The
neural ODE joins them here: it alone uses the times of irregularly sampled series.
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
from longscan.models import MODELS, LanguageModel, LanguageModelConfig, Model, neural_ode
from longscan.models.common.layers import RMSNorm, blank, linear
from longscan.models.common.mixer import Block, Blocks, Mixer

__all__ = ["BODIES", "Body", "SequenceConfig", "SequenceModel"]


class Body(NamedTuple):
    """A kind of block.

    Attributes:
        config: the class of its Config.
        presets: name -> fields of the Config.
        blocks: builds the blocks from a Config and a generator.
        timed: whether the blocks use times, or positions only.
    """

    config: type[LanguageModelConfig]
    presets: Mapping[str, dict[str, Any]]
    blocks: Callable[[Any, torch.Generator | None], Iterable[Block]]
    timed: bool = False


#: the available kinds of block: those of language models that depend on their input alone, and of the neural
#: ODE
BODIES: dict[str, Body] = {
    entry.name: Body(
        cast(type[LanguageModelConfig], entry.config),
        entry.presets,
        cast(type[LanguageModel], entry.cls).blocks,
    )
    for entry in MODELS.values()
    if entry.kind == "language" and "classify" in entry.verbs
} | {
    "neural_ode": Body(neural_ode.NeuralODEConfig, neural_ode.PRESETS, neural_ode.blocks, timed=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig(Config):
    """The configuration of a sequence classifier, or of a regression model.

    Attributes:
        body: the kind of block, a key of BODIES.
        body_config: its configuration; vocab_size is used for tokens only.
        n_outputs: number of classes, or of predicted numbers.
        labels: names of the classes; empty for regression.
        d_input: channels of a signal; 0 means tokens.
        mean: of each channel in the training data, subtracted from the input; no normalisation if empty.
        std: likewise, divided by.
        rate: samples per second of the training data, if known.
        gap: mean seconds between steps of training data with times: the unit of time of a timed body.
        pooling: the head's input: the mean over the sequence, or its last hidden state.
        bidirectional: whether each block has a second mixer, which runs backwards.
        dropout: dropout probability of the blocks' outputs.
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
        """Return the configuration of plain values; see `Config.from_dict`.

        Args:
            mapping: `body` decides the class of `body_config`.

        Raises:
            LongscanError: as `Config.from_dict`, or the body is unknown.
        """
        if isinstance(mapping, Mapping) and isinstance(mapping.get("body_config"), Mapping):
            name = mapping.get("body")
            if not isinstance(name, str) or name not in BODIES:
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
        self.check("n_outputs", least=1)
        self.check("d_input", least=0)
        self.check("rate", "gap", above=0)
        self.check("dropout", least=0, below=1)
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


class Bidirectional(Mixer[Any]):
    """The sum of a forward and a backward mixer.

    Args:
        forth: runs forwards.
        back: runs backwards.
    """

    def __init__(self, forth: Mixer[Any], back: Mixer[Any]) -> None:
        super().__init__()
        self.forth, self.back = forth, back

    def plan(self, ids: Tensor, state: None, seq_idx: Tensor | None) -> Any:
        """Return the plans of both mixers, and the reversed positions.

        Args:
            ids: (batch, seq_len) times, constant in padding.
            state: unused.
            seq_idx: (batch, seq_len) the reversed position of each position.
        """
        assert seq_idx is not None
        back = (ids[:, -1:] - ids.gather(1, seq_idx)).cummax(1).values  # cummax: constant in padding too
        return self.forth.plan(ids, None, None), self.back.plan(back, None, None), seq_idx

    def forward(self, x: Tensor, state: None, plan: Any, /) -> tuple[Tensor, None]:
        """Mix along time in both directions; there is no state. See `Mixer.forward`."""
        forwards, backwards, order = plan
        order = order[..., None].expand_as(x)
        forth, _ = self.forth(x, None, forwards)
        back, _ = self.back(x.gather(1, order), None, backwards)
        return forth + back.gather(1, order), None

    @property
    def kind(self) -> type[nn.Module]:
        """The kind of what it runs in both directions; see `Mixer.kind`."""
        return self.forth.kind

    def rescale_time(self, factor: float) -> None:
        """Scale every time step; see `Mixer.rescale_time`."""
        self.forth.rescale_time(factor)
        self.back.rescale_time(factor)


class SequenceModel(Model):
    """A model that predicts the class of a whole sequence, or numbers.

    Padding follows a sequence, so causal mixers never see it; backward mixers start at the end of the
    sequence.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
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
                layer.mixer = Bidirectional(layer.mixer, other.mixer)
        self.norm_f = RMSNorm(d_model, body.norm_eps)
        self.head = linear(d_model, config.n_outputs, True, generator)

    def forward(self, x: Tensor, lengths: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Return the logits of the classes, or the predicted numbers.

        Args:
            x: (batch, seq_len, d_input) signals, or (batch, seq_len) int64 tokens.
            lengths: (batch,) int64 length of each sequence; seq_len if None.
            times: (batch, seq_len) seconds, increasing; if None, steps at the rate of the training data, or
                of 1 second. Only a timed body, the neural ODE, uses them.

        Returns:
            (batch, n_outputs).

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(x, lengths, times)
        time = torch.arange(x.shape[1], device=x.device)
        ends = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
        ends = ends[:, None]  # (batch, 1)
        if x.is_floating_point():  # NaN there would not stay there
            x = x.masked_fill((time >= ends)[:, :, None], 0)
        order = torch.where(time < ends, ends - 1 - time, time) if self.config.bidirectional else None
        clock = self._clock(times, ends, x.shape[1])
        hidden = self._hidden(x, order, clock)  # (batch, seq_len, d_model)
        if self.config.pooling == "last":
            return cast(Tensor, self.head(hidden[torch.arange(len(x), device=x.device), ends[:, 0] - 1]))
        weights = (time < ends).to(hidden.dtype) / ends  # (batch, seq_len)
        return cast(Tensor, self.head(torch.einsum("bl,bld->bd", weights, hidden)))

    def loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, or the mean squared error.

        Args:
            outputs: (batch, n_outputs) of `forward`.
            truth: (batch,) int64 class indices, or (batch, n_outputs) numbers.
        """
        return F.cross_entropy(outputs, truth) if self.config.labels else F.mse_loss(outputs, truth)

    def rescale_time(self, factor: float) -> None:
        """Scale every time step, for signals of another sampling rate than the training data.

        Args:
            factor: old rate / new rate: 2 at half the samples per second.

        Raises:
            LongscanError: the body has positions only, no time steps.
        """
        for layer in self.layers:
            layer.mixer.rescale_time(factor)

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrence, which set its time scales."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.recurrence)

    def slow(self) -> Iterable[nn.Parameter]:
        """Return A, B and dt of state spaces, which have a lower learning rate."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.slow)

    def _clock(self, times: Tensor | None, ends: Tensor, seq_len: int) -> Tensor:
        """Return times in the unit of the body, (batch, seq_len), constant in padding."""
        step = 1 / (self.config.rate or 1)
        unit = self.config.gap or step
        position = torch.minimum(torch.arange(seq_len, device=ends.device), ends - 1)  # (batch, seq_len)
        return position.float() * (step / unit) if times is None else times.gather(1, position) / unit

    def _hidden(self, x: Tensor, order: Tensor | None, clock: Tensor) -> Tensor:
        """Return the final hidden states, (batch, seq_len, d_model)."""
        config = self.config
        if config.mean:
            x = (x - x.new_tensor(config.mean)) / x.new_tensor(config.std)
        x = self.encoder(x)
        plans = self.layers.plans(clock, [None] * len(self.layers), order)
        for layer, plan in zip(self.layers, plans, strict=True):
            y, _ = layer(x, None, plan)
            x = x + ops.dropout(y - x, config.dropout, self.training) if config.dropout else y
        return cast(Tensor, self.norm_f(x))

    def _check(self, x: Tensor, lengths: Tensor | None, times: Tensor | None) -> None:
        """Raise ValueError unless the shapes fit."""
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
