"""The recurrent state or KV cache of a model as an object: continue, fork, select, measure, save, load."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models.common import state_file
from longscan.models.common.growable import GrowableState


class Owner(Protocol):
    """The part of a model that its states use."""

    @property
    def config(self) -> Any:
        """A configuration with a `vocab_size`."""

    def fingerprint(self) -> str:
        """Return a short hash of the weights."""

    def init_state(self, batch_size: int) -> "State":
        """Return the state before any token."""


@dataclasses.dataclass(eq=False)
class State:
    """The state of a model after some tokens: all that later tokens depend on.

    `layers[i]` is the named tuple of tensors of mixer i; the first axis of every tensor is the batch. In
    Mamba it is (conv, ssm), of constant size: conv (batch, d_conv - 1, d_inner) holds the last inputs of the
    convolution, oldest first, and ssm (batch, d_inner, d_state) the hidden state h; both are float32 whatever
    the dtype of the weights (float64 in a float64 model). In attention it is a KV cache, `KV`, one of the
    states that grow; see `GrowableState`.

    `forward` and `prefill` take a state and return a new one; `step` overwrites the one it is given. `model`
    is the model whose `init_state` or `prefill` made the state, or None; only `save` needs it.
    """

    layers: list[Any]
    model: Owner | None = dataclasses.field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of pickles and deep copies: it is no part of its states."""
        return {"layers": self.layers, "model": None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Return a new state with a function applied to every tensor.

        Args:
            function: from a (batch, ...) tensor to another.
        """
        return State([layer._make(map(function, layer)) for layer in self.layers], self.model)

    def clone(self) -> "State":
        """Return an independent copy, without spare capacity."""
        return self.used().map(torch.clone)

    def used(self) -> "State":
        """Return a view without spare capacity; see `GrowableState`."""
        layers = [layer.used() if isinstance(layer, GrowableState) else layer for layer in self.layers]
        return State(layers, self.model)

    @property
    def growth(self) -> int:
        """Bytes that each token adds to a row; 0 if the size is constant."""
        caches = [layer for layer in self.layers if isinstance(layer, GrowableState)]
        tensors = [tensor for cache in caches for tensor in cache.growing.values()]
        return sum(tensor.element_size() * math.prod(tensor.shape[2:]) for tensor in tensors)

    @torch.no_grad()
    def reserve(self, n: int, rows: int | None = None) -> bool:
        """Ensure capacity for n more tokens; a state of constant size always has it.

        Args:
            n: tokens.
            rows: check only this many rows, the first ones; all if None.

        Returns:
            Whether tensors were reallocated: earlier views, such as those of `rows`, are then stale.
        """
        first = next((layer for layer in self.layers if isinstance(layer, GrowableState)), None)
        if first is None or not len(first.length):
            return False
        needed = int(first.length[:rows].max()) + n
        if first.capacity >= needed:
            return False
        self.layers = [
            layer.grown(needed) if isinstance(layer, GrowableState) else layer for layer in self.layers
        ]
        return True

    @torch.no_grad()
    def mark(self, memory: list[Tensor] | None = None) -> list[Tensor]:
        """Return a checkpoint for `rewind`: a copy of what steps overwrite, which growing tensors are not.

        Args:
            memory: an older mark to reuse the tensors of.
        """
        if not memory:
            return [tensor.clone() for tensor in self._overwritten()]
        torch._foreach_copy_(memory, self._overwritten())
        return memory

    @torch.no_grad()
    def rewind(self, mark: list[Tensor]) -> None:
        """Restore the state, in place, to what it was when `mark` was called.

        Args:
            mark: of this state, which only steps have changed since.
        """
        torch._foreach_copy_(self._overwritten(), mark)

    def _overwritten(self) -> list[Tensor]:
        layers = (layer.fixed if isinstance(layer, GrowableState) else layer for layer in self.layers)
        return [tensor for layer in layers for tensor in layer]

    def detach(self) -> "State":
        """Return a state with the same values and no gradients, for truncated backpropagation."""
        return self.map(torch.detach)

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """Return a copy of some rows of the batch, to drop finished ones, repeat or reorder.

        Args:
            rows: indices into the batch, or a boolean mask over it.
        """
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.long)
        return self.map(lambda tensor: tensor[index.to(tensor.device)])

    def fork(self, n: int = 1) -> "State":
        """Return a state with n copies of every row, to sample n continuations of one prompt.

        Args:
            n: copies of each row; they are adjacent, in the order of the rows.

        Returns:
            A new state of batch_size * n rows that shares no memory with this one.

        Raises:
            ValueError: n is less than 1.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 copy, got {n}")
        return self.map(lambda tensor: tensor.repeat_interleave(n, 0))

    def rows(self, n: int) -> "State":
        """Return the first n rows as a view: a `step` on it is a step on these rows of this state.

        Call `reserve` on the whole state first: a view cannot grow.

        Args:
            n: at most batch_size.

        Raises:
            ValueError: there are fewer rows.
        """
        if not 0 <= n <= self.batch_size:
            raise ValueError(f"n: expected 0 to {self.batch_size} rows, got {n}")
        return self.map(lambda tensor: tensor[:n])

    @torch.no_grad()
    def copy_row_(self, to: int, source: "State", source_row: int) -> None:
        """Copy a row of a state into a row of this one, in place.

        Args:
            to: index of the row of this state. If it needs more capacity, all rows get it; see `reserve`.
            source: any state of the same model, including this one.
            source_row: index of the row to copy.

        Raises:
            IndexError: there is no such row.
        """
        for index, (layer, other) in enumerate(zip(self.layers, source.layers, strict=True)):
            if isinstance(layer, GrowableState):
                n = int(other.length[source_row])
                if n > layer.capacity:
                    layer = self.layers[index] = layer.grown(n)
                for name, tensor in layer.growing.items():
                    tensor[to, :n] = getattr(other, name)[source_row, :n]
                    tensor[to, n:] = 0  # leftover NaN would pass through attention masks
                pairs = zip(layer.fixed, other.fixed, strict=True)
            else:
                pairs = zip(layer, other, strict=True)
            for tensor, values in pairs:
                tensor[to].copy_(values[source_row])

    def save(
        self,
        path: str | Path,
        *,
        position: int = 0,
        pending: Sequence[int] = (),
        model: Owner | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Write a file from which `load` restores this state bit-exactly; the write is atomic.

        Args:
            path: the file to create or replace.
            position: how many tokens the state has consumed.
            pending: the tokens after them that are not consumed yet, in a state of one row: with them
                generation resumes at exactly the next logits.
            model: the model of the state; the one that made it if None.
            fingerprint: of the model, if it is known: to compute it takes all weights.

        Raises:
            LongscanError: the model is unknown, the state has no rows or holds NaN or infinity, or position
                or pending is out of range.
            OSError: the file cannot be written.
        """
        model = model or self.model
        if model is None:
            raise LongscanError("this state has no model attached: use state.save(path, model=model).")
        if not self.batch_size or (len(pending) and self.batch_size != 1):
            rows = "one row" if len(pending) else "at least one row"
            raise LongscanError(f"expected a state of {rows}, got {self.batch_size}. See state.select.")
        if not 0 <= position < 10**18:
            raise LongscanError(f"position: expected the number of tokens consumed, got {position}.")
        tokens = torch.as_tensor(pending, dtype=torch.int64)
        _check_tokens("pending", tokens, model)
        if not self.is_finite():
            raise LongscanError(
                "the state holds NaN or infinity, so nothing can be generated from it: the model's weights "
                "are damaged, or their dtype is too narrow (load it in float32)."
            )
        state_file.write(
            path, _identity(model, fingerprint), dict(self.used().named_tensors()), position, tokens
        )

    @classmethod
    def load(cls, path: str | Path, model: Owner, *, fingerprint: str | None = None) -> "SavedState":
        """Return the state that `save` wrote.

        Args:
            path: the file; it may be untrusted. No more memory is allocated than the file's own size.
            model: the model of the state: the same weights in the same precision.
            fingerprint: of the model, if it is known.

        Returns:
            The state, on the model's device, its position, and the pending tokens.

        Raises:
            LongscanError: the file is not a state, is damaged or truncated, or belongs to another model.
            OSError: it cannot be read.
        """
        tensors, position, tokens = state_file.read(Path(path), _identity(model, fingerprint))
        like = model.init_state(0)
        copies = {name: tensor.to(like._first.device, copy=True) for name, tensor in tensors.items()}
        state = State(
            [
                layer._make(copies[f"layers.{index}.{field}"] for field in layer._fields)
                for index, layer in enumerate(like.layers)
            ],
            model,
        )
        if not state._is_whole():
            raise LongscanError(f"{path} is damaged: its rows have impossible lengths. Save the state again.")
        if not state.is_finite():
            raise LongscanError(f"{path} is damaged: it holds NaN or infinity. Save the state again.")
        _check_tokens(f"{path}: pending", tokens, model)
        return SavedState(state, position, tokens.tolist())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of every tensor, such as "layers.3.ssm", and the tensor."""
        for index, layer in enumerate(self.layers):
            for field, tensor in zip(layer._fields, layer, strict=True):
                yield f"layers.{index}.{field}", tensor

    def restarted(self, rows: Tensor, fresh: "State") -> "State":
        """Return a state with some rows reset to the initial state.

        Args:
            rows: (batch,) bool.
            fresh: the initial state, with as many rows.
        """

        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(over(rows, old), new, old)

        def fresher(new: Any, old: Any) -> Any:
            growing = old.grows if isinstance(old, GrowableState) else ()  # a length of 0 resets these
            pairs = zip(old._fields, new, old, strict=True)
            return old._make(was if name in growing else pick(now, was) for name, now, was in pairs)

        return State(list(map(fresher, fresh.layers, self.layers)), self.model)

    def _is_whole(self) -> bool:
        """Whether all growing layers have the same lengths, the longest of which is their capacity."""
        caches = [layer for layer in self.layers if isinstance(layer, GrowableState)]
        return all(
            torch.equal(cache.length, caches[0].length)
            and int(cache.length.min()) >= 0
            and int(cache.length.max()) == cache.capacity
            for cache in caches
        )

    def is_finite(self) -> bool:
        """Return whether the state holds neither NaN nor infinity."""
        return all(bool(tensor.isfinite().all()) for _, tensor in self.named_tensors())

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(self._first.shape[0])

    @property
    def _first(self) -> Tensor:  # some layers have none
        return next(self.named_tensors())[1]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class SavedState(NamedTuple):
    """The content of a state file.

    Attributes:
        state: after `position` tokens.
        position: tokens consumed.
        pending: the tokens after them, not consumed yet.
    """

    state: State
    position: int
    pending: list[int]


def _identity(model: Owner, fingerprint: str | None = None) -> state_file.Identity:
    """Return what a state file says of the model it belongs to."""
    like = model.init_state(0)
    name, layers = type(model).__name__, len(like.layers)
    caches = [(index, layer) for index, layer in enumerate(like.layers) if isinstance(layer, GrowableState)]
    grows = frozenset(f"layers.{index}.{field}" for index, layer in caches for field in layer.grows)
    its = model.fingerprint if fingerprint is None else lambda: fingerprint
    return state_file.Identity(name, layers, its, dict(like.named_tensors()), grows)


def _check_tokens(what: str, tokens: Tensor, model: Owner) -> None:
    """Raise LongscanError unless tokens (n,) are ids of the model's vocabulary."""
    size = model.config.vocab_size
    wrong = tokens[(tokens < 0) | (tokens >= size)]
    if len(wrong):
        raise LongscanError(f"{what}: expected token ids from 0 to {size - 1:,}, got {int(wrong[0]):,}.")


def over(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return rows (batch,) shaped to broadcast over tensor (batch, ...)."""
    return rows.view(-1, *(1 for _ in tensor.shape[1:]))
