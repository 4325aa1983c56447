"""What a model remembers, as an object: to carry on, fork, drop rows of, weigh."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class State:
    """All that a model remembers of what it has read, at a size that does not grow with the text.

    `layers[i]` is the named tuple of tensors of mixer i, every tensor with the batch as its first axis. In
    Mamba it is (conv, ssm): conv (batch, d_conv - 1, d_inner) holds the last inputs of the convolution,
    oldest first, and ssm (batch, d_inner, d_state) the hidden state h; both are float32 whatever the weights
    (float64 in a float64 model).

    `forward` and `prefill` take a state and return a new one; `step` overwrites the one it is given.
    """

    layers: list[Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply a function to every tensor.

        Args:
            function: from a (batch, ...) tensor to another.

        Returns:
            A new state of the results.
        """
        return State([layer._make(map(function, layer)) for layer in self.layers])

    def clone(self) -> "State":
        """Return a copy that further steps on this state do not touch."""
        return self.map(torch.clone)

    def detach(self) -> "State":
        """Return a state that shares the values but no gradients: where truncated backpropagation cuts."""
        return self.map(torch.detach)

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """Copy some rows of the batch: drop finished ones, fork by repeating, reorder.

        Args:
            rows: indices into the batch, or a boolean mask over it.

        Returns:
            A new state with one row per index.
        """
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.long)
        return self.map(lambda tensor: tensor[index.to(tensor.device)])

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return int(self.layers[0][0].shape[0])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)
