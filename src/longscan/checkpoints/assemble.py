"""A model around tensors: blank, fitted strictly, each tensor assigned once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.source import Weights
from longscan.checkpoints.weights import check_widths, dtype_name, narrowed, refuse
from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models import Model
from longscan.models.common.quantization import kind_of, precision, store_like

__all__ = ["assemble", "blank_model"]


def assemble(
    path: Path, cls: Callable[..., Model], config: Config, weights: Weights, dtype: torch.dtype | None
) -> Model:
    """Return a model with the tensors of a file, all of them and no others.

    Args:
        path: where they are from, for messages.
        cls: the model.
        config: its sizes.
        weights: its tensors; those of a mapped file are copied, each once.
        dtype: of the weights; None keeps theirs. Quantised weights stay as they are.

    Returns:
        The model, in evaluation mode; for inference only if it is quantised.

    Raises:
        LongscanError: a tensor is missing, left over, or of another shape or type; or the sizes are absurd.
    """
    tensors, kind, mapped, _ = weights
    sizes = _sizes(config)
    n_layers = sizes.get("n_layers", 1)  # some have one that nobody counts
    n_layers = max(n_layers, sum(sizes.get("n_blocks", [])))
    if n_layers > len(tensors):  # before a loop over layers that do not exist
        raise LongscanError(
            f"{path}: config.json says {n_layers:,} layers, {len(tensors)} tensors are there."
        )
    check_widths(path, sizes, tensors)
    largest = max(tensors.values(), key=Tensor.numel, default=torch.empty(0))
    model = blank_model(path, cls, config, torch.float32 if kind else dtype or largest.dtype)
    if kind:
        try:
            store_like(model, tensors)
        except LongscanError as error:
            raise LongscanError(f"{path}: {error}") from error
    expected = model.state_dict()
    _check_fit(path, expected, weights, types=kind is not None)
    try:
        fitted = {name: narrowed(name, tensors[name], x.dtype, copy=mapped) for name, x in expected.items()}
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    model.load_state_dict({name: tensor.contiguous() for name, tensor in fitted.items()}, assign=True)
    if kind_of(model) != kind:
        raise LongscanError(
            f"{path}: config.json says {kind}, the weights are {precision(model)}. Fetch both again."
        )
    return model.eval().requires_grad_(False) if kind else model.eval()


def blank_model(path: Path, cls: Callable[..., Model], config: Config, dtype: torch.dtype) -> Model:
    """Return a model of shapes and types, without memory; which parameters stay wide is the model's affair.

    Args:
        path: where the sizes are from, for the message.
        cls: the model.
        config: its sizes.
        dtype: of the weights.

    Raises:
        LongscanError: the sizes are impossible.
    """
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can address
        raise LongscanError(f"{path}: the sizes in config.json are impossible ({error}).") from error
    return model.to(dtype)


def _sizes(config: Config) -> dict[str, Any]:
    """Return the sizes of a model; a sequence classifier has most of them in the Config of its blocks."""
    fields = config.to_dict()
    return {**fields, **fields.get("body_config", {})}


def _check_fit(path: Path, expected: Mapping[str, Tensor], weights: Weights, *, types: bool) -> None:
    """Name everything that does not fit, in one error; also the types, where they tell what a tensor is."""
    found = weights.tensors
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in found.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        "of another type": [
            f"{name} {dtype_name(tensor.dtype)} instead of {dtype_name(expected[name].dtype)}"
            for name, tensor in found.items()
            if types and name in expected and tensor.dtype != expected[name].dtype
        ],
    }
    refuse(f"{path}: the weights are not {weights.expected}.", problems)
