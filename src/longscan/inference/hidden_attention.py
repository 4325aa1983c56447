"""The scans of a layer of a vision model, and the attention that they amount to.

The hidden attention of Mamba models: Ali, Zimerman and Wolf 2024, arXiv 2403.01590. Unrolled along its path,
a selective scan is a matrix product, for each channel a different one:

    y_i = sum over j <= i of alpha_ij u_j + D u_i
    alpha_ij = C_i . exp(A (dt_{j+1} + ... + dt_i)) dt_j B_j

i and j count the steps of the path. alpha has no softmax: its rows don't add up to 1, and it may be negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longscan import ops
from longscan.errors import LongscanError, UsageError
from longscan.models.common.patch_tokens import separate
from longscan.models.common.vision import VisionModel
from longscan.models.vim import Route, Vim, VimMixer
from longscan.models.vmamba import SS2D

__all__ = ["LayerScans", "attention_rows", "layer_scans", "scan_layers"]


class LayerScans(NamedTuple):
    """What a layer computes from one image along its paths, in the order of their steps.

    Attributes:
        grid: rows and columns of the patches.
        classes: the positions of class tokens; all others are patches, in row-major order.
        order: (n_paths, n) int64, the position at each step.
        u: (n_paths, n, d_inner) input of the scans.
        dt: (n_paths, n, d_inner) step sizes, after bias and softplus.
        A: (n_paths, d_inner, d_state).
        B: (n_paths, n, d_state).
        C: (n_paths, n, d_state).
        D: (n_paths, d_inner).
        y: (n, d_inner) the sum of the scans, by position.
    """

    grid: tuple[int, int]
    classes: tuple[int, ...]
    order: Tensor
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    y: Tensor

    def by_position(self, x: Tensor) -> Tensor:
        """Return x (n_paths, n, ...), given by step, by position."""
        inverse = self.order.argsort(1)
        return torch.stack([path[at] for path, at in zip(x, inverse, strict=True)])

    def maps(self, x: Tensor) -> Tensor:
        """Return x (..., n), given by position, as maps (..., *grid) without the class tokens."""
        patches = [position for position in range(x.shape[-1]) if position not in self.classes]
        return x[..., patches].view(*x.shape[:-1], *self.grid)

    def position(self, row: int, column: int) -> int:
        """Return the position of a patch among all tokens."""
        patches = [position for position in range(self.order.shape[1]) if position not in self.classes]
        return patches[row * self.grid[1] + column]


def scan_layers(model: VisionModel) -> list[SS2D | VimMixer]:
    """Return the layers of a model that scan, first to last.

    Args:
        model: an image classifier.

    Raises:
        LongscanError: there is none.
    """
    found = [module for module in model.modules() if isinstance(module, SS2D | VimMixer)]
    if not found:
        kind = type(model).__name__
        raise LongscanError(
            f"expected a model whose layers scan an image, such as vmamba or vim; got {kind}."
        )
    return found


@torch.no_grad()
def layer_scans(model: VisionModel, image: Tensor, layer: int = -1) -> LayerScans:
    """Return the scans of a layer.

    Args:
        model: in evaluation mode.
        image: (1, in_channels, height, width), normalised.
        layer: its index; from the end if negative.

    Raises:
        UsageError: there is no such layer.
        LongscanError: the layers of the model don't scan.
    """
    layers = scan_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise UsageError(f"layer: expected 0 to {len(layers) - 1}, got {layer}.")
    mixer, inputs = layers[layer], list[tuple[Any, ...]]()
    hook = mixer.register_forward_pre_hook(lambda _, given: inputs.append(given))
    try:
        model.forward_features(image)
    finally:
        hook.remove()
    with _Recorder() as recorder:
        mixer(*inputs[0])
    parts = recorder.paths
    order, grid, classes = _order(model, mixer, image, *inputs[0])
    u, dt, A, B, C, D, y = (torch.cat(each) for each in zip(*parts, strict=True))
    total = torch.zeros_like(y[0])
    for path, values in zip(order, y, strict=True):
        total[path] += values
    return LayerScans(grid, classes, order, u, dt, A, B, C, D, total)


def attention_rows(scans: LayerScans, queries: Sequence[int]) -> Tensor:
    """Return rows of alpha, of every path and channel.

    The scans' output at a position is the sum over paths and positions of alpha u, and of D u.

    Args:
        scans: of a layer.
        queries: positions, the i of the rows.

    Returns:
        (n_paths, n_queries, d_inner, n) in the order of the positions: 0 where j comes after i on the path.
    """
    n_paths, n, d_inner = scans.u.shape
    rows = scans.u.new_zeros(n_paths, len(queries), n, d_inner)
    for k, (path, dt, A, B, C) in enumerate(
        zip(scans.order, scans.dt, scans.A, scans.B, scans.C, strict=True)
    ):
        log_decay = (
            dt.double().cumsum(0)[..., None] * A.double()
        )  # of the state from the start, (n, d_inner, N)
        for row, query in zip(rows[k], queries, strict=True):
            i = int((path == query).nonzero())
            decay = (log_decay[i] - log_decay[: i + 1]).exp().to(dt.dtype)
            alpha = torch.einsum("jdn,jd,jn,n->jd", decay, dt[: i + 1], B[: i + 1], C[i])
            row[path[: i + 1]] = alpha
    return rows.mT


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the scans that run inside, whatever layer calls them.

    Attributes:
        paths: for each call (u, dt, A, B, C, D, y) of its paths, see `LayerScans`; y by step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, and record it if it is a scan."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.longscan.selective_scan.default:
            u, dt, A, B, C, D, _, bias, *_ = args
            n_paths = B.shape[2]
            u, dt, y = (x[0].unflatten(-1, (n_paths, -1)).transpose(0, 1) for x in (u, dt, result[0]))
            A, D, bias = (x.unflatten(0, (n_paths, -1)) for x in (A, D, bias))
            B, C = B[0].transpose(0, 1), C[0].transpose(0, 1)
            self._add(u, dt, A, B, C, D, bias, y)
        elif func is torch.ops.longscan.path_scan.default:  # by position, and the sum of the paths
            u, dt, A, B, C, D, bias, paths, _ = args
            u = u if u.dim() == 4 else u[:, :, None].expand_as(dt)
            y = torch.zeros_like(dt)
            y[:, :, 0] = result[0]
            u, dt, B, C, y = (
                torch.stack([x[0, path, k] for k, path in enumerate(paths.long())]) for x in (u, dt, B, C, y)
            )
            self._add(u, dt, A, B, C, D, bias, y)
        return result

    def _add(self, u: Tensor, dt: Tensor, *rest: Tensor) -> None:
        """Record the paths of a call; u, dt, B, C and y are (n_paths, n, channels)."""
        A, B, C, D, bias, y = rest
        self.paths.append((u, F.softplus(dt + bias[:, None]), A, B, C, D, y))


def _order(
    model: VisionModel, mixer: nn.Module, image: Tensor, x: Tensor, routes: Sequence[Route] = ()
) -> tuple[Tensor, tuple[int, int], tuple[int, ...]]:
    """Return the order of a layer's paths, the grid of its patches, and the positions of class tokens."""
    if isinstance(mixer, SS2D):
        height, width = x.shape[1:3]
        pattern = ops.scan_pattern((height, width), mixer.scan, repeat=mixer.repeat)
        return pattern.order, (height, width), ()
    assert isinstance(model, Vim)
    tokens = torch.arange(x.shape[1])
    _, classes = separate(tokens[None, :, None], model.config.class_token)
    orders = [tokens if route.order is None else route.order for route in routes]
    order = torch.stack(
        [path.flip(0) if route.backward else path for path, route in zip(orders, routes, strict=True)]
    )
    return order, cast(tuple[int, int], model.patch_embed.grid(image)), tuple(classes.flatten().tolist())
