"""What a model remembers, as an object: to carry on, fork, drop rows of, weigh, keep in a file."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models.common import state_file


class Owner(Protocol):
    """What a state has to know of the model it belongs to."""

    @property
    def config(self) -> Any:
        """With a `vocab_size`."""

    def fingerprint(self) -> str:
        """Return a short hash of the weights."""

    def init_state(self, batch_size: int) -> "State":
        """Return the state before any token."""


class Growing:
    """What every layer state is that keeps something of each token: beside a NamedTuple, before it.

    A row's tokens stand at its front, in order; what lies behind them is room, finite and never looked at.

    Attributes:
        grows: the names of the tensors (batch, capacity, ...); the others have one size.
        length: (batch,) int64, how many of the places each row uses.
    """

    __slots__ = ()
    grows: ClassVar[tuple[str, ...]]
    length: Tensor

    @property
    def growing(self) -> dict[str, Tensor]:
        """The tensors that grow."""
        return {name: getattr(self, name) for name in self.grows}

    @property
    def fixed(self) -> list[Tensor]:
        """The tensors that do not, which a step overwrites; the length is among them."""
        return [tensor for name, tensor in self._asdict().items() if name not in self.grows]

    @property
    def capacity(self) -> int:
        """Tokens for which there is room."""
        return int(getattr(self, self.grows[0]).shape[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.length.max()) if self.capacity and len(self.length) else 0

    def front(self, n: int) -> Self:
        """Return a view of the first n places."""
        return self._replace(**{name: tensor[:, :n] for name, tensor in self.growing.items()})

    def used(self) -> Self:
        """Return a view without the room."""
        return self.front(self.longest)

    def grown(self, capacity: int) -> Self:
        """Return a copy that has room for as many tokens, and is at least doubled so that copies are rare."""
        capacity = max(capacity, 2 * self.capacity, 16)

        def wider(tensor: Tensor) -> Tensor:
            wide = tensor.new_zeros(len(tensor), capacity, *tensor.shape[2:])
            wide[:, : tensor.shape[1]] = tensor
            return wide

        return self._replace(**{name: wider(tensor) for name, tensor in self.growing.items()})

    def places(self, n: int) -> Tensor:
        """Return where the next n tokens of each row go, (batch, n), or (1, n) if it is the same in all."""
        even = len(self.length) and int(self.length.min()) == self.longest
        begin = self.length[:1] if even else self.length
        return begin[:, None] + torch.arange(n, device=begin.device)

    def extended(self, past: Tensor, new: Tensor) -> Tensor:
        """Join what each row has and what comes next.

        Args:
            past: (batch, capacity, ...), of a tensor that grows.
            new: (batch, n, ...).

        Returns:
            (batch, longest + n, ...), zeros behind what comes next in a row.
        """
        longest = self.longest
        past = past[:, :longest].to(new.dtype)
        if not longest or int(self.length.min()) == longest:
            return torch.cat([past, new], 1)
        ones = (1,) * (new.dim() - 2)
        inside = torch.arange(longest, device=new.device) < self.length[:, None]
        past = torch.where(inside.view(*inside.shape, *ones), past, 0)
        place = self.places(new.shape[1])
        wide = torch.cat([past, torch.zeros_like(new)], 1)
        return wide.scatter(1, place.view(*place.shape, *ones).expand_as(new), new)

    if TYPE_CHECKING:  # what NamedTuple adds

        def _asdict(self) -> dict[str, Tensor]: ...
        def _replace(self, **fields: Tensor) -> Self: ...


class _KV(NamedTuple):
    """The fields of `KV`."""

    k: Tensor
    v: Tensor
    length: Tensor


class KV(Growing, _KV):
    """What one attention layer remembers: the keys and values of every token, so it grows with the text.

    Attributes:
        k: (batch, capacity, n_kv_heads, d_head) keys.
        v: (batch, capacity, n_kv_heads, d_head) values.
        length: (batch,) int64, how many of the places each row uses.
    """

    __slots__ = ()
    grows = ("k", "v")


@dataclasses.dataclass(eq=False)
class State:
    """All that a model remembers of what it has read.

    `layers[i]` is the named tuple of tensors of mixer i, every tensor with the batch as its first axis. In
    Mamba it is (conv, ssm), whose size does not grow with the text: conv (batch, d_conv - 1, d_inner) holds
    the last inputs of the convolution, oldest first, and ssm (batch, d_inner, d_state) the hidden state h;
    both are float32 whatever the weights (float64 in a float64 model). In attention it is a `KV`; see
    `Growing` for all that grow.

    `forward` and `prefill` take a state and return a new one; `step` overwrites the one it is given. `model`
    is the one whose `init_state` or `prefill` made it, or None: only `save` asks.
    """

    layers: list[Any]
    model: Owner | None = dataclasses.field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of what pickle and deepcopy take; it is not a part of its states."""
        return {"layers": self.layers, "model": None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply a function to every tensor.

        Args:
            function: from a (batch, ...) tensor to another.

        Returns:
            A new state of the results.
        """
        return State([layer._make(map(function, layer)) for layer in self.layers], self.model)

    def clone(self) -> "State":
        """Return a copy that further steps on this state do not touch, without room that is not used."""
        return self.used().map(torch.clone)

    def used(self) -> "State":
        """Return a view without room that is not used; see `Growing`."""
        layers = [layer.used() if isinstance(layer, Growing) else layer for layer in self.layers]
        return State(layers, self.model)

    @property
    def growth(self) -> int:
        """Bytes that each token adds to a row; 0 if the size is constant."""
        caches = [layer for layer in self.layers if isinstance(layer, Growing)]
        tensors = [tensor for cache in caches for tensor in cache.growing.values()]
        return sum(tensor.element_size() * math.prod(tensor.shape[2:]) for tensor in tensors)

    @torch.no_grad()
    def reserve(self, n: int, rows: int | None = None) -> bool:
        """Make room for n more tokens; a state of constant size always has it.

        Args:
            n: tokens.
            rows: in how many rows, the first ones; all if None.

        Returns:
            Whether tensors were replaced by larger ones: views made before, by `head`, are then of the past.
        """
        first = next((layer for layer in self.layers if isinstance(layer, Growing)), None)
        if first is None or not len(first.length):
            return False
        needed = int(first.length[:rows].max()) + n
        if first.capacity >= needed:
            return False
        self.layers = [layer.grown(needed) if isinstance(layer, Growing) else layer for layer in self.layers]
        return True

    @torch.no_grad()
    def mark(self, memory: list[Tensor] | None = None) -> list[Tensor]:
        """Copy what further steps on this state overwrite; not what grows, of that the length says enough.

        Args:
            memory: an older mark that is not needed any more.

        Returns:
            What `rewind` takes.
        """
        if not memory:
            return [tensor.clone() for tensor in self._overwritten()]
        torch._foreach_copy_(memory, self._overwritten())
        return memory

    @torch.no_grad()
    def rewind(self, mark: list[Tensor]) -> None:
        """Go back, in place, to where `mark` was called.

        Args:
            mark: of this state, which has taken nothing but steps since.
        """
        torch._foreach_copy_(self._overwritten(), mark)

    def _overwritten(self) -> list[Tensor]:
        layers = (layer.fixed if isinstance(layer, Growing) else layer for layer in self.layers)
        return [tensor for layer in layers for tensor in layer]

    def detach(self) -> "State":
        """Return a state that shares the values but no gradients: where truncated backpropagation cuts."""
        return self.map(torch.detach)

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """Copy some rows of the batch: drop finished ones, repeat, reorder.

        Args:
            rows: indices into the batch, or a boolean mask over it.

        Returns:
            A new state with one row per index.
        """
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.long)
        return self.map(lambda tensor: tensor[index.to(tensor.device)])

    def fork(self, n: int = 1) -> "State":
        """Copy every row n times, to try n ways to go on from one text.

        Args:
            n: copies of each row; they stand together, in the order of the rows.

        Returns:
            A new state of batch_size * n rows that shares no memory with this one.

        Raises:
            ValueError: n is less than 1.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 copy, got {n}")
        return self.map(lambda tensor: tensor.repeat_interleave(n, 0))

    def head(self, n: int) -> "State":
        """Return the first n rows as a view: a `step` on it is a step on these rows of this state.

        What grows must have room: `reserve` it on the whole state, then take the view.

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
        """Overwrite a row in place.

        Args:
            to: the row of this state; if it needs more room than there is, all rows get it, see `reserve`.
            source: any state of the same model, also this one.
            source_row: the row of it that is copied.

        Raises:
            IndexError: there is no such row.
        """
        for index, (layer, other) in enumerate(zip(self.layers, source.layers, strict=True)):
            if isinstance(layer, Growing):
                n = int(other.length[source_row])
                if n > layer.capacity:
                    layer = self.layers[index] = layer.grown(n)
                for name, tensor in layer.growing.items():
                    tensor[to, :n] = getattr(other, name)[source_row, :n]
                    tensor[to, n:] = 0  # NaN that a text left there would count in spite of masks
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
    ) -> None:
        """Write a file that `load` turns into this state again, bit for bit; whole or not at all.

        Args:
            path: the file to create or replace.
            position: how many tokens the state has read.
            pending: the tokens that come next and are not read yet, in a state of one row: with them a text
                can go on from exactly its next logits.
            model: whose state it is; the one that made it if None.

        Raises:
            LongscanError: nobody knows whose state it is, it has no rows, its numbers are not finite, or
                position and pending are not those of a text.
            OSError: the file cannot be written.
        """
        model = model or self.model
        if model is None:
            raise LongscanError("this state does not know its model: use state.save(path, model=model).")
        if not self.batch_size or (len(pending) and self.batch_size != 1):
            rows = "one row" if len(pending) else "at least one row"
            raise LongscanError(f"expected a state of {rows}, got {self.batch_size}. See state.select.")
        if not 0 <= position < 10**18:
            raise LongscanError(f"position: expected the number of tokens read, got {position}.")
        tokens = torch.as_tensor(pending, dtype=torch.int64)
        _check_tokens("pending", tokens, model)
        if not self.is_finite():
            raise LongscanError(
                "the state holds NaN or infinite numbers, so nothing can follow from it: the model's weights "
                "are damaged, or their type is too narrow (load it in float32)."
            )
        state_file.write(path, _identity(model), dict(self.used().named_tensors()), position, tokens)

    @classmethod
    def load(cls, path: str | Path, model: Owner) -> "SavedState":
        """Read a file of `save`.

        Args:
            path: the file; it need not be trusted. No memory is taken but for a state of its size.
            model: the one whose state it is: the same weights in the same precision.

        Returns:
            The state, on the model's device, and where the text stood.

        Raises:
            LongscanError: the file is no state, is damaged or cut short, or is the state of another model.
            OSError: it cannot be read.
        """
        tensors, position, tokens = state_file.read(Path(path), _identity(model))
        like = model.init_state(0)
        device = like.layers[0][0].device
        places = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        state = State(
            [
                layer._make(places[f"layers.{index}.{field}"] for field in layer._fields)
                for index, layer in enumerate(like.layers)
            ],
            model,
        )
        if not state._is_whole():
            raise LongscanError(f"{path} is damaged: its rows have impossible lengths. Save the state again.")
        if not state.is_finite():
            raise LongscanError(f"{path} is damaged: it holds NaN or infinite numbers. Save the state again.")
        _check_tokens(f"{path}: pending", tokens, model)
        return SavedState(state, position, tokens.tolist())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, "layers.3.ssm"."""
        for index, layer in enumerate(self.layers):
            for field, tensor in zip(layer._fields, layer, strict=True):
                yield f"layers.{index}.{field}", tensor

    def restarted(self, rows: Tensor, fresh: "State") -> "State":
        """Return a state in which some rows have read nothing.

        Args:
            rows: (batch,) bool.
            fresh: the state before any token, of as many rows.
        """

        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(over(rows, old), new, old)

        def fresher(new: Any, old: Any) -> Any:
            kept = old.grows if isinstance(old, Growing) else ()  # of what grows the length says enough
            pairs = zip(old._fields, new, old, strict=True)
            return old._make(was if name in kept else pick(now, was) for name, now, was in pairs)

        layers = list(map(fresher, fresh.layers, self.layers))
        return State(layers, self.model)

    def _is_whole(self) -> bool:
        """Whether every layer that grows has the same rows, none beyond its room, the longest filling it."""
        caches = [layer for layer in self.layers if isinstance(layer, Growing)]
        return all(
            torch.equal(cache.length, caches[0].length)
            and int(cache.length.min()) >= 0
            and int(cache.length.max()) == cache.capacity
            for cache in caches
        )

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity in it."""
        return all(bool(tensor.isfinite().all()) for _, tensor in self.named_tensors())

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(self.layers[0][0].shape[0])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class SavedState(NamedTuple):
    """What a state file holds.

    Attributes:
        state: after `position` tokens.
        position: how many tokens it has read.
        pending: the tokens after them, not read yet.
    """

    state: State
    position: int
    pending: list[int]


def _identity(model: Owner) -> state_file.Identity:
    """Describe whose state it is."""
    like = model.init_state(0)
    name, layers = type(model).__name__, len(like.layers)
    caches = [(index, layer) for index, layer in enumerate(like.layers) if isinstance(layer, Growing)]
    grows = frozenset(f"layers.{index}.{field}" for index, layer in caches for field in layer.grows)
    return state_file.Identity(name, layers, model.fingerprint, dict(like.named_tensors()), grows)


def _check_tokens(what: str, tokens: Tensor, model: Owner) -> None:
    """Insist on tokens (n,) of the model's vocabulary."""
    size = model.config.vocab_size
    wrong = tokens[(tokens < 0) | (tokens >= size)]
    if len(wrong):
        raise LongscanError(f"{what}: expected token ids from 0 to {size - 1:,}, got {int(wrong[0]):,}.")


def latest(previous: Tensor | None, values: Tensor, seq_idx: Tensor) -> Tensor:
    """Pick from values (batch, seq_len, ...) those of each row's last token; previous where it has none."""
    time = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last = torch.where(seq_idx < 0, -1, time).amax(1)  # (batch,)
    found = values[torch.arange(len(last), device=last.device), last]
    return found if previous is None else torch.where(over(last < 0, found), previous, found)


def over(rows: Tensor, tensor: Tensor) -> Tensor:
    """Shape rows (batch,) so that it broadcasts over tensor (batch, ...)."""
    return rows.view(-1, *(1 for _ in tensor.shape[1:]))
