"""Layer states that grow with the sequence: a KV cache, or whatever else keeps an entry for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["KV", "GrowableState"]


class GrowableState:
    """A mixin for layer states with an entry per token, listed before their NamedTuple.

    The entries of a row fill its first `length` positions, in order. The spare capacity behind them holds
    finite numbers that nothing reads.

    Attributes:
        grows: names of the tensors (batch, capacity, ...); the others have a fixed size.
        length: (batch,) int64 entries of each row.
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
        """The tensors of fixed size, which a step overwrites; the length is one of them."""
        return [tensor for name, tensor in self._asdict().items() if name not in self.grows]

    @property
    def capacity(self) -> int:
        """The most tokens that fit without reallocation."""
        return int(getattr(self, self.grows[0]).shape[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.length.max()) if self.capacity and len(self.length) else 0

    def front(self, n: int) -> Self:
        """Return a view of the first n positions."""
        return self._replace(**{name: tensor[:, :n] for name, tensor in self.growing.items()})

    def used(self) -> Self:
        """Return a view without spare capacity."""
        return self.front(self.longest)

    def grown(self, capacity: int) -> Self:
        """Return a copy of at least this capacity, and of twice the present one so that copies are rare."""
        capacity = max(capacity, 2 * self.capacity, 16)

        def wider(tensor: Tensor) -> Tensor:
            wide = tensor.new_zeros(len(tensor), capacity, *tensor.shape[2:])
            wide[:, : tensor.shape[1]] = tensor
            return wide

        return self._replace(**{name: wider(tensor) for name, tensor in self.growing.items()})

    def next_positions(self, n: int) -> Tensor:
        """Return the positions of the next n tokens, (batch, n), or (1, n) if all rows are equally long."""
        even = len(self.length) and int(self.length.min()) == self.longest
        begin = self.length[:1] if even else self.length
        return begin[:, None] + torch.arange(n, device=begin.device)

    def extended(self, past: Tensor, new: Tensor) -> Tensor:
        """Return the entries of each row followed by its new ones.

        Args:
            past: (batch, capacity, ...), a tensor that grows.
            new: (batch, n, ...).

        Returns:
            (batch, longest + n, ...), zero behind the new entries of a row.
        """
        longest = self.longest
        past = past[:, :longest].to(new.dtype)
        if not longest or int(self.length.min()) == longest:
            return torch.cat([past, new], 1)
        ones = (1,) * (new.dim() - 2)
        inside = torch.arange(longest, device=new.device) < self.length[:, None]
        past = torch.where(inside.view(*inside.shape, *ones), past, 0)
        position = self.next_positions(new.shape[1])
        wide = torch.cat([past, torch.zeros_like(new)], 1)
        return wide.scatter(1, position.view(*position.shape, *ones).expand_as(new), new)

    if TYPE_CHECKING:  # provided by NamedTuple

        def _asdict(self) -> dict[str, Tensor]: ...
        def _replace(self, **fields: Tensor) -> Self: ...


class _KV(NamedTuple):
    """The fields of `KV`."""

    k: Tensor
    v: Tensor
    length: Tensor


class KV(GrowableState, _KV):
    """The KV cache of one attention layer: keys and values of every token.

    Attributes:
        k: (batch, capacity, n_kv_heads, d_head) keys.
        v: (batch, capacity, n_kv_heads, d_head) values.
        length: (batch,) int64 tokens of each row.
    """

    __slots__ = ()
    grows = ("k", "v")
