"""Checks of the drop-in functions' arguments: exact shapes over named sizes, and dtypes."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["check_boundaries", "check_rows", "expect", "requires_tensors"]

KINDS = ("real floating point", "real or complex floating point", "integers", "numbers")
REAL, COMPLEX, INTEGER, NUMBER = KINDS
Shape = str | Sequence[int]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def requires_tensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function, which then refuses anything but a tensor for what is annotated as `Tensor`.

    `expect` can't: it takes None for what is optional.

    Raises:
        TypeError: on a call, naming the argument.
    """
    parameters = inspect.signature(function).parameters.values()
    required = [(i, p.name) for i, p in enumerate(parameters) if p.annotation is Tensor]

    @wraps(function)  # also keeps the signature, by which transformers chooses the keywords
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for index, name in required:
            value = args[index] if index < len(args) else kwargs.get(name, required)
            if not isinstance(value, Tensor) and value is not required:  # a missing one is Python's error
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        return function(*args, **kwargs)

    return checked


def expect(sizes: dict[str, int], kind: str = REAL, /, **arguments: tuple[Tensor | None, Shape]) -> None:
    """Check shapes and dtypes in order; an axis gets its size from the first tensor that has it.

    Args:
        sizes: of the axes that are known so far; receives the others.
        kind: one of `KINDS`.
        **arguments: name -> tensor, and its shape: sizes, or names and sizes as in "batch d_inner 1", with
            " | " between alternatives. None instead of a tensor passes.

    Raises:
        ValueError: a shape doesn't fit.
        TypeError: an argument is no tensor, or has another kind of dtype.
    """
    for name, (tensor, shape) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not _is(tensor.dtype, kind):
            raise TypeError(f"{name}: expected {kind}, got {tensor.dtype}")
        found = tensor.shape
        shapes = _parse(shape) if isinstance(shape, str) else (tuple(shape),)
        for axes in shapes:
            if _fits(found, axes, sizes):
                for axis, size in zip(axes, found, strict=True):
                    if isinstance(axis, str):
                        sizes[axis] = size
                break
        else:
            expected = " or ".join(_text(axes, sizes) for axes in shapes)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(found)}")


def _fits(found: Sequence[int], axes: Sequence[str | int], sizes: dict[str, int]) -> bool:
    if len(found) != len(axes):
        return False
    for size, axis in zip(found, axes, strict=True):  # a loop, since every step of decoding comes here
        if size != (sizes.get(axis, size) if isinstance(axis, str) else axis):
            return False
    return True


def _is(dtype: torch.dtype, kind: str) -> bool:
    if kind == REAL:
        return dtype.is_floating_point
    if kind == COMPLEX:
        return dtype.is_floating_point or dtype.is_complex
    if kind == INTEGER:
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return not dtype.is_complex


@cache
def _parse(shape: str) -> tuple[tuple[str | int, ...], ...]:
    return tuple(
        tuple(int(axis) if axis.isdigit() else axis for axis in axes.split()) for axes in shape.split("|")
    )


def _text(axes: Sequence[str | int], sizes: dict[str, int]) -> str:
    """Return a shape as in (batch=2, d_inner, 1)."""
    parts = [f"{axis}={sizes[axis]}" if axis in sizes else str(axis) for axis in axes]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def check_rows(name: str, indices: Tensor, batch: int, n_rows: int) -> Tensor:
    """Return which of the indices (batch,) of a state's rows are no padding, which is negative.

    Raises:
        ValueError: their shape is another one, or a row is there twice or doesn't exist.
        TypeError: they are no integers.
    """
    expect({"batch": batch}, INTEGER, **{name: (indices, "batch")})
    own = indices >= 0
    rows = indices[own]
    if rows.numel() and int(rows.max()) >= n_rows:
        raise ValueError(f"{name}: expected less than the state's {n_rows} rows, got {int(rows.max())}")
    if len(set(rows.tolist())) != rows.numel():
        raise ValueError(f"{name}: expected every row of the state once, got {indices.tolist()}")
    return own


def check_boundaries(name: str, boundaries: Tensor, total: int) -> None:
    """Check that boundaries (n_sequences + 1,) rise from 0 to the length of a packed row.

    Raises:
        ValueError: they don't, or are fewer than two.
        TypeError: they are no integers.
    """
    expect({}, INTEGER, **{name: (boundaries, "n_sequences+1")})
    values = boundaries.tolist()
    if len(values) < 2 or values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(f"{name}: expected boundaries that rise from 0 to {total}, got {values}")
