"""The memory that a training step takes, estimated before the run starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.models import LanguageModel

__all__ = ["Footprint", "check_memory", "footprint", "memory_size"]

PROCESS = 600_000_000  # bytes of Python, torch, their code and a tokenizer
SLACK = 1.15  # of what is measured: temporary tensors, and what the allocator can't reuse
MOST = 0.9  # of the available memory


class Footprint(NamedTuple):
    """Bytes of a training step.

    Attributes:
        weights: of the model.
        trained: gradients and AdamW's moments of what is trained.
        activations: what the backward pass needs of the forward pass.
    """

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, with the process and some slack."""
        return PROCESS + round(SLACK * sum(self))

    def __str__(self) -> str:
        """Return the sum and its parts in a line."""
        names = "program", "weights", "gradients and moments", "activations"
        parts = zip(names, (PROCESS, *self), strict=True)
        return (
            f"{memory_size(self.total)} ({', '.join(f'{name} {memory_size(part)}' for name, part in parts)})"
        )


def footprint(model: LanguageModel, loss: Callable[[int], Tensor], tokens: int, probe: int = 64) -> Footprint:
    """Estimate the memory of a training step: a forward pass of few tokens shows what each token retains.

    Args:
        model: with what is trained marked by `requires_grad`.
        loss: a number of tokens -> the loss of a row of as many.
        tokens: of a forward pass in training.
        probe: tokens of the short pass.
    """
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    short, longer = (_retained(model, loss, n, held) for n in (probe, 2 * probe))
    each = max(0, longer - short) / probe
    activations = round(short - probe * each + tokens * each)
    if model.backbone.checkpointing:  # a block's input each, and one block in full
        streams = 4 * tokens * model.config.d_model * len(model.backbone.layers)
        activations = streams + round(activations / len(model.backbone.layers))
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return Footprint(weights, 3 * trained, activations)


def check_memory(needs: Footprint, available: int | None) -> None:
    """Raise unless a training step fits into the memory.

    Args:
        needs: of the step.
        available: bytes; None if unknown.

    Raises:
        LongscanError: it takes more than nine tenths of it.
    """
    if available is not None and needs.total > MOST * available:
        raise LongscanError(
            f"a step takes about {needs}, and {memory_size(available)} are available. Lower --seq-len, "
            "--rank or --batch-size, add --checkpointing, or choose --base-precision int8. --force tries it "
            "all the same."
        )


def memory_size(n_bytes: int) -> str:
    """Return a size in GB, or in MB if it is small.

    Args:
        n_bytes: in bytes.
    """
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.0f} MB"


def _retained(model: LanguageModel, loss: Callable[[int], Tensor], tokens: int, held: set[int]) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, beside the model."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    checkpointing, model.backbone.checkpointing = model.backbone.checkpointing, False
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = loss(tokens)  # alive until all is counted: addresses are not used twice
            del kept
    finally:
        model.backbone.checkpointing = checkpointing
    return sum(found.values())
