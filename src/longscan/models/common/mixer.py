"""What a paper changes, and its place: the mixer, which moves information along time, inside a block."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models.common.layers import RMSNorm

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """What every language model here has; a model's own Config adds its letters.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        vocab_size: tokens the tokenizer knows.
        norm_eps: added to the mean square inside each norm.
        residual_in_fp32: whether the residual stream stays float32 under narrower weights.
        tie_embeddings: whether the head is the embedding, one parameter under one name.
        pad_vocab_size_multiple: the embedding has vocab_size rows rounded up to this multiple.
    """

    d_model: int
    n_layers: int
    vocab_size: int
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            LongscanError: a value is out of range.
        """
        super().__post_init__()
        for name in ("d_model", "n_layers", "vocab_size", "pad_vocab_size_multiple"):
            self.check_count(name)
        if self.norm_eps < 0:
            raise LongscanError(f"norm_eps: expected zero or more, got {self.norm_eps}.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the logits; ids from vocab_size on name no token."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def check_count(self, name: str) -> None:
        """Insist that a field is a whole number of at least 1.

        Args:
            name: the field.

        Raises:
            LongscanError: it is not.
        """
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise LongscanError(f"{name}: expected a whole number of at least 1, got {value!r}.")


class Mixer(nn.Module, Generic[StateT]):
    """What a paper changes: the part of a block that moves information along time.

    Attributes:
        recurrence: names of the parameters that set the time scales: never below float32, never decayed.
        slow: those of them that learn at most at `ssm_lr`, as the papers train them.
    """

    recurrence: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    def plan(self, ids: Tensor, state: StateT | None, seq_idx: Tensor | None) -> Any:
        """Work out once what the mixers of all layers need to know of the places of the tokens.

        Args:
            ids: (batch, seq_len), or (batch,) before a step; only its shape and device count.
            state: of the first layer.
            seq_idx: (batch, seq_len) integers: a new value starts a new sequence, negative means padding.

        Returns:
            What `forward` and `step` get; seq_idx itself unless a mixer needs more.
        """
        return seq_idx

    def forward(self, x: Tensor, state: StateT | None, plan: Any, /) -> tuple[Tensor, StateT]:
        """Mix along time.

        Args:
            x: (batch, seq_len, d_model).
            state: what came before the first token; nothing if None.
            plan: see `plan`.

        Returns:
            y: (batch, seq_len, d_model).
            state: after the last token.
        """
        raise NotImplementedError

    def init_state(self, batch_size: int) -> StateT:
        """Return the state before any token.

        Args:
            batch_size: rows.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: StateT, plan: Any, /) -> Tensor:
        """Take in one token per row.

        Args:
            x: (batch, d_model).
            state: overwritten with the state after the token.
            plan: see `plan`.

        Returns:
            y: (batch, d_model).
        """
        raise NotImplementedError

    def rescale_time(self, factor: float) -> None:
        """Make every time step longer, for signals that are sampled at another rate than those trained on.

        Args:
            factor: old rate / new rate: 2 at half the samples per second.

        Raises:
            LongscanError: the mixer knows no time, only places.
        """
        kind = type(self).__name__
        raise LongscanError(
            f"{kind} has no time step to rescale: resample the signal to the rate it was trained on."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module; under `.bfloat16()` and `.half()` the recurrence keeps float32."""
        kept = [self.get_parameter(name) for name in self.recurrence]

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.itemsize < 4 and any(tensor is p or tensor is p.grad for p in kept):
                return tensor.to(moved.device, torch.float32)
            return moved

        super()._apply(careful, recurse)  # type: ignore[no-untyped-call]
        return self


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: LanguageModelConfig, mixer: Mixer[Any]) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the mixer's word to the residual stream x (batch, seq_len, d_model); see `Mixer.forward`."""
        y, state = self.mixer(self.norm(x), state, plan)
        return x + y, state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Do the same for one token per row, x (batch, d_model); see `Mixer.step`."""
        return x + self.mixer.step(self.norm(x), state, plan)


class Blocks(nn.ModuleList):
    """The blocks of a model, in order."""

    def __iter__(self) -> Iterator[Block]:
        """Yield them, typed as what they are."""
        return iter(cast(dict[str, Block], self._modules).values())
