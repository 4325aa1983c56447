"""The mixer, which is the part of a block that moves information along time, and the block around it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from longscan import ops
from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models.common.layers import Recurrent, RMSNorm

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """The fields that all language models share; each model's own Config adds its paper's.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        vocab_size: number of tokens in the tokenizer's vocabulary.
        norm_eps: epsilon of the norms, added to the mean square.
        residual_in_fp32: whether the residual stream stays float32 under narrower weights.
        tie_embeddings: whether the head shares the embedding, as one parameter under one name.
        pad_vocab_size_multiple: the embedding has vocab_size rows, rounded up to this multiple.
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
        self.check("d_model", "n_layers", "vocab_size", "pad_vocab_size_multiple")
        self.check("norm_eps", least=0)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and entries of the logits; those from vocab_size on belong to no token."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class Mixer(Recurrent, Generic[StateT]):
    """The part of a block that moves information along time: what most papers here replace.

    Attributes:
        slow: parameters of the recurrence whose learning rate is at most `ssm_lr`, as in the papers.
        copied: parameters that `native` returns in another form.
    """

    slow: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    @property
    def kind(self) -> type[nn.Module]:
        """What decides over the plan: mixers of one kind share it."""
        return type(self)

    def plan(self, ids: Tensor, state: StateT | None, seq_idx: Tensor | None) -> Any:
        """Return what all layers of this kind need to know of the positions of the tokens, computed once.

        Args:
            ids: (batch, seq_len), or (batch,) before a step; only its shape and device are used.
            state: of the first layer of this kind.
            seq_idx: (batch, seq_len) integers: a new value starts a new sequence, negative means padding.

        Returns:
            The argument `plan` of `forward` and `step`: seq_idx itself unless a mixer needs more.
        """
        return seq_idx

    def forward(self, x: Tensor, state: StateT | None, plan: Any, /) -> tuple[Tensor, StateT]:
        """Mix along time.

        Args:
            x: (batch, seq_len, d_model).
            state: before the first token; the initial state if None.
            plan: see `plan`.

        Returns:
            y: (batch, seq_len, d_model).
            state: after the last token.
        """
        raise NotImplementedError

    def init_state(self, batch_size: int) -> StateT:
        """Return the initial state.

        Args:
            batch_size: rows.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: StateT, plan: Any, /) -> Tensor:
        """Mix one more token per row, as decoding does.

        Args:
            x: (batch, d_model).
            state: overwritten with the state after the token.
            plan: see `plan`.

        Returns:
            y: (batch, d_model).
        """
        raise NotImplementedError

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder, used in place; None if it cannot use them.

        Args:
            layer: index of the block, and of the state.
            norm: (d_model,) weight of the norm before the mixer; None: the input is that of the sublayer
                before.
        """
        return None

    def rescale_time(self, factor: float) -> None:
        """Scale every time step, for signals of another sampling rate than the training data.

        Args:
            factor: old rate / new rate: 2 at half the samples per second.

        Raises:
            LongscanError: the mixer has positions only, no time steps.
        """
        kind = type(self).__name__
        raise LongscanError(
            f"{kind} has no time step to rescale: resample the signal to the rate it was trained on."
        )


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: LanguageModelConfig, mixer: Mixer[Any]) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the mixer's output to the residual stream x (batch, seq_len, d_model); see `Mixer.forward`."""
        y, state = self.mixer(self.norm(x), state, plan)
        return x + y, state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the mixer's output for one token per row, x (batch, d_model); see `Mixer.step`."""
        return x + self.mixer.step(self.norm(x), state, plan)

    def native(self, layer: int) -> list[ops.Sublayer] | None:
        """Return the sublayers for the native decoder; None if it cannot run the block.

        Args:
            layer: index of the block, and of its state.
        """
        return self.mixer.native(layer, self.norm.weight)


class Blocks(nn.ModuleList):
    """The blocks of a model, in order."""

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks, with their type."""
        return iter(cast(dict[str, Block], self._modules).values())

    def plans(self, ids: Tensor, states: Sequence[Any], seq_idx: Tensor | None) -> list[Any]:
        """Return the plan of each block; blocks whose mixers are of one kind share it.

        Args:
            ids: see `Mixer.plan`.
            states: of each block.
            seq_idx: see `Mixer.plan`.
        """
        made: dict[type[nn.Module], Any] = {}
        kinds = [block.mixer.kind for block in self]
        for block, kind, state in zip(self, kinds, states, strict=True):
            if kind not in made:
                made[kind] = block.mixer.plan(ids, state, seq_idx)
        return [made[kind] for kind in kinds]
