"""The scan of a grid in several directions, and its merge (VMamba, arXiv 2401.10166, section 4.2).

    xs[t, k] = x[order[k, t]]                   scan: a sequence a direction of the pixels of an image
    y[p]     = sum_k ys[inverse[k, p], k]       merge: the sum of all sequences at each position

order[k] is a permutation of the positions and inverse[k] its inverse, so each op is the adjoint of the other.
Grids have any number of axes: an image has height and width, a video frames too. Channels are last, as
`selective_scan` takes them, with a group of B and C for each direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from longscan.ops._derivatives import composed

ScanMode: TypeAlias = Literal[
    "unidirectional",
    "bidirectional",
    "cross",
    "cascade",
    "window",
    "zigzag",
    "spatial_first",
    "temporal_first",
    "spatiotemporal",
]

# --- the directions -----------------------------------------------------------------------------------------


class ScanPattern(NamedTuple):
    """The directions in which a grid is scanned.

    Attributes:
        shape: of the grid, such as (height, width).
        order: (n_directions, n_positions) int64: the position, in row-major order, at each step.
        inverse: (n_directions, n_positions) int64: the step at each position.
        seq_idx: (n_directions, n_positions) int64: the line of each step, where every line of the grid is a
            sequence of its own (see `selective_scan`); None where a direction is one sequence.
    """

    shape: tuple[int, ...]
    order: Tensor
    inverse: Tensor
    seq_idx: Tensor | None = None


def scan_pattern(
    shape: Sequence[int],
    mode: ScanMode = "cross",
    *,
    window: int = 7,
    repeat: int = 1,
    device: torch.device | str = "cpu",
) -> ScanPattern:
    """Return the directions of a scan.

    Args:
        shape: of the grid: (height, width), (n_frames, height, width), or any other.
        mode: "unidirectional" is row-major, "bidirectional" that and its reverse. "cross" runs along each
            axis, and back: rows, columns, both reversed. "window" does so inside of windows, one after the
            other; "zigzag" turns at the end of each line instead of jumping. "cascade" scans every row
            forwards and backwards as a sequence of its own, then every column: its directions 0, 1 and 2, 3
            are for two passes. Of a video, "spatial_first" scans frame by frame and "temporal_first" pixel
            by pixel through all frames, forwards and backwards; "spatiotemporal" does both.
        window: side of the windows; those at the far edges may be smaller.
        repeat: how often each direction occurs, next to its copies.
        device: of the result.

    Raises:
        ValueError: a size is not positive, or there is no such mode.
    """
    sizes = (*shape, window, repeat)
    if not shape or not all(isinstance(size, int | torch.SymInt) and size >= 1 for size in sizes):
        got = f"{tuple(shape)}, {window}, {repeat}"
        raise ValueError(f"shape, window, repeat: expected positive whole numbers, got {got}")
    if mode not in get_args(ScanMode):
        raise ValueError(f"mode: expected {', '.join(get_args(ScanMode))}, got {mode!r}")
    arguments = (tuple(shape), mode, window, repeat, torch.device(device))
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or composed():
        return _pattern(*arguments)  # not to be remembered: these tensors belong to a trace
    known = _remembered(*arguments)
    order, inverse, seq_idx = (None if t is None else t.clone() for t in known[1:])  # the caller's own
    return ScanPattern(known.shape, order, inverse, seq_idx)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a later call may need gradients
def _remembered(
    shape: tuple[int, ...], mode: ScanMode, window: int, repeat: int, device: torch.device
) -> ScanPattern:
    return _pattern(shape, mode, window, repeat, device)


def _pattern(
    shape: tuple[int, ...], mode: ScanMode, window: int, repeat: int, device: torch.device
) -> ScanPattern:
    n_axes, n_positions = len(shape), math.prod(shape)
    axes = [(*range(i, n_axes), *range(i)) for i in range(n_axes)]  # slowest first
    if mode in ("unidirectional", "bidirectional", "spatial_first"):
        forwards = [_lines(shape, axes[0])]
    elif mode == "temporal_first":
        forwards = [_lines(shape, axes[1 % n_axes])]
    elif mode == "spatiotemporal":
        forwards = [_lines(shape, axes[0]), _lines(shape, axes[1 % n_axes])]
    elif mode == "window":
        forwards = [_windows(shape, each, window) for each in axes]
    else:
        forwards = [(_zigzag if mode == "zigzag" else _lines)(shape, each) for each in axes]
    orders = forwards if mode == "unidirectional" else [*forwards, *(order.flip(0) for order in forwards)]
    seq_idx = None
    if mode == "cascade":
        orders = [each for order in forwards for each in (order, order.flip(0))]
        steps = torch.arange(n_positions, device="cpu")
        seq_idx = torch.stack([steps // shape[each[-1]] for each in axes for _ in range(2)])
    order = torch.stack(orders)
    inverse = torch.empty_like(order).scatter_(
        1, order, torch.arange(n_positions, device="cpu").expand_as(order)
    )
    found = (
        None if t is None else t.repeat_interleave(repeat, 0).to(device) for t in (order, inverse, seq_idx)
    )
    return ScanPattern(shape, *found)  # type: ignore[arg-type]


def _lines(shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """Return the positions line by line, the last of the axes fastest."""
    return torch.arange(math.prod(shape), device="cpu").view(shape).permute(axes).flatten()


def _windows(shape: tuple[int, ...], axes: tuple[int, ...], window: int) -> Tensor:
    """Return the positions window by window, and line by line inside of each."""
    grid = torch.meshgrid(*(torch.arange(size, device="cpu") for size in shape), indexing="ij")
    key = torch.zeros(shape, dtype=torch.long, device="cpu")
    for axis in axes:
        key = key * -(-shape[axis] // window) + grid[axis] // window
    for axis in axes:
        key = key * window + grid[axis] % window
    return key.flatten().argsort()


def _zigzag(shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """Return the positions line by line, every other one backwards: each neighbours the one before."""
    step = torch.arange(math.prod(shape), device="cpu")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    position, faster = torch.zeros_like(step), math.prod(shape)
    for axis in axes:
        faster //= shape[axis]
        line = step // (faster * shape[axis])
        index = step // faster % shape[axis]
        position += torch.where(line % 2 == 1, shape[axis] - 1 - index, index) * strides[axis]
    return position


# --- 1. the equations ---------------------------------------------------------------------------------------


def cross_scan_ref(x: Tensor, pattern: ScanPattern) -> Tensor:
    """Return the result of :func:`cross_scan`: the equation as written."""
    return x.flatten(1, -2)[:, pattern.order.T]


def cross_merge_ref(y: Tensor, pattern: ScanPattern) -> Tensor:
    """Return the result of :func:`cross_merge`: the equation as written."""
    at = torch.arange(y.shape[2], device=y.device)
    return y[:, pattern.inverse.T, at].sum(2).view(y.shape[0], *pattern.shape, y.shape[-1])


# --- 2. the ops ---------------------------------------------------------------------------------------------


def cross_scan(x: Tensor, pattern: ScanPattern) -> Tensor:
    """Return a grid as one sequence a direction.

    Args:
        x: (batch, *pattern.shape, channels).
        pattern: the directions, see `scan_pattern`.

    Returns:
        (batch, n_positions, n_directions, channels).

    Raises:
        ValueError: the shape is not that of the pattern.
    """
    if x.shape[1:-1] != pattern.shape:
        raise ValueError(f"x: expected (batch, {pattern.shape}, channels), got {tuple(x.shape)}")
    if composed():
        return cross_scan_ref(x, pattern)
    scanned: Tensor = torch.ops.longscan.cross_scan(x.flatten(1, -2), pattern.order, pattern.inverse)
    return scanned


def cross_merge(y: Tensor, pattern: ScanPattern) -> Tensor:
    """Return the sum of one sequence a direction as a grid; the adjoint of `cross_scan`.

    Args:
        y: (batch, n_positions, n_directions, channels).
        pattern: the directions, see `scan_pattern`.

    Returns:
        (batch, *pattern.shape, channels).

    Raises:
        ValueError: the shape is not that of the pattern.
    """
    if y.dim() != 4 or y.shape[1:3] != pattern.order.T.shape:
        expected = f"(batch, {', '.join(map(str, pattern.order.T.shape))}, channels)"
        raise ValueError(f"y: expected {expected}, got {tuple(y.shape)}")
    if composed():
        return cross_merge_ref(y, pattern)
    merged: Tensor = torch.ops.longscan.cross_merge(y, pattern.order, pattern.inverse)
    return merged.view(y.shape[0], *pattern.shape, y.shape[-1])


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("cross_scan(Tensor x, Tensor order, Tensor inverse) -> Tensor")
_lib.define("cross_merge(Tensor y, Tensor order, Tensor inverse) -> Tensor")


# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::cross_scan", lib=_lib)
def _(x, order, inverse):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], order.shape[1], order.shape[0], x.shape[2])


@torch.library.register_fake("longscan::cross_merge", lib=_lib)
def _(y, order, inverse):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape[0], y.shape[1], y.shape[3])


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _scan_autograd(ctx, dy):  # type: ignore[no-untyped-def]
    return torch.ops.longscan.cross_merge(dy, *ctx.saved_tensors), None, None


def _merge_autograd(ctx, dx):  # type: ignore[no-untyped-def]
    return torch.ops.longscan.cross_scan(dx, *ctx.saved_tensors), None, None


for _name, _adjoint in (("cross_scan", _scan_autograd), ("cross_merge", _merge_autograd)):
    torch.library.register_autograd(f"longscan::{_name}", _adjoint, setup_context=_setup_context, lib=_lib)


# --- 5. the implementation ----------------------------------------------------------------------------------


def _scan(x, order, inverse):  # type: ignore[no-untyped-def]
    scanned = x.contiguous().index_select(1, order.T.flatten())
    return scanned.view(len(x), order.shape[1], order.shape[0], x.shape[2])


def _merge(y, order, inverse):  # type: ignore[no-untyped-def]
    batch, n_positions, n_directions, channels = y.shape
    if n_directions == 1:
        return y.squeeze(2).index_select(1, inverse[0])
    at = inverse.T * n_directions + torch.arange(n_directions, device=y.device)
    rows = torch.arange(batch, device=y.device)[:, None, None] * (n_positions * n_directions)
    bags = (at + rows).flatten(0, 1)  # the rows of y that add up to one of the result
    merged = F.embedding_bag(bags, y.reshape(-1, channels), mode="sum")  # without (batch, ..., 4, channels)
    return merged.view(batch, n_positions, channels)


_lib.impl("cross_scan", _scan, "CompositeExplicitAutograd")
_lib.impl("cross_merge", _merge, "CompositeExplicitAutograd")
