"""The layers of a language model while it processes a text: their scans and their attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from longscan.errors import LongscanError
from longscan.inference.layer_scans import ChannelScan, HeadScan, Scan, Softmax
from longscan.models import LanguageModel
from longscan.models.common.trapezoid import Tokens
from longscan.models.mamba3 import Mamba3Mixer

__all__ = ["TextLayer", "mixing_layers", "states", "states_of", "time_steps", "visit_layers", "walk_layers"]

Result = TypeVar("Result")


class TextLayer(NamedTuple):
    """What a layer computes from a text.

    Attributes:
        number: of the layer, from 0, as the model numbers it.
        scan: of its selective state space, if it has one.
        attention: likewise; a layer may have both.
    """

    number: int
    scan: Scan | None
    attention: Softmax | None


def mixing_layers(model: LanguageModel) -> list[TextLayer]:
    """Return the layers with a selective scan or attention, for a text of one token.

    Args:
        model: in evaluation mode.
    """
    return visit_layers(model, torch.zeros(1, dtype=torch.int64), lambda layer: layer)


@torch.no_grad()
def visit_layers(model: LanguageModel, ids: Tensor, visit: Callable[[TextLayer], Result]) -> list[Result]:
    """Run a model over a text and call a function with each layer; nothing else of a layer is retained.

    Args:
        model: in evaluation mode.
        ids: (n,) int64, a text from its start.
        visit: called with each layer that has a selective scan or attention, first to last.

    Returns:
        What the function returned for each of them.

    Raises:
        LongscanError: a layer computes NaN or infinity.
    """
    return [visit(layer) for layer in walk_layers(model, ids)]


@torch.no_grad()
def walk_layers(model: LanguageModel, ids: Tensor) -> Iterator[TextLayer]:
    """Run a model over a text and yield each layer that has a selective scan or attention, first to last.

    Between two of them the model may be used otherwise.

    Args:
        model: in evaluation mode.
        ids: (n,) int64, a text from its start.

    Raises:
        LongscanError: a layer computes NaN or infinity.
    """
    blocks, recorder = model.backbone.layers, _Recorder()
    x = model.backbone.embed(ids[None].to(model.device))
    plans = model.backbone.plans(x, [None] * len(blocks), None)
    for number, (block, plan) in enumerate(zip(blocks, plans, strict=True)):
        recorder.scan = recorder.attention = None
        with ExitStack() as hooks:
            for module in block.modules():
                if isinstance(module, Mamba3Mixer):  # whose scan is more than the op's
                    hooks.callback(module.register_forward_pre_hook(recorder.enter).remove)
            with recorder:  # every call of torch takes longer inside
                x, _ = block(x, None, plan)
        if recorder.scan is not None or recorder.attention is not None:
            layer = TextLayer(number, recorder.scan, recorder.attention)
            _check_finite(layer)
            yield layer


def time_steps(model: LanguageModel, ids: Tensor) -> Tensor:
    """Return the step sizes of each layer with a selective scan, as means over channels or heads.

    Args:
        model: in evaluation mode; at least one layer has a scan.
        ids: (n,) int64, a text from its start.

    Returns:
        (n_layers, n).
    """
    steps = visit_layers(model, ids, lambda layer: None if layer.scan is None else layer.scan.dt.mean(1))
    return torch.stack([each for each in steps if each is not None])


def states(model: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return how large the states of a model are and how long they hold what they store.

    Args:
        model: in evaluation mode; at least one layer has a scan.
        ids: (n,) int64, a text from its start.

    Returns:
        norms: (n_layers, n) of the state of each layer with a selective scan, after each token.
        half_lives: (n_layers, 3) quartiles over tokens, channels and states, in tokens; see `layer_scans`.
    """
    found = visit_layers(model, ids, lambda layer: None if layer.scan is None else states_of(layer.scan))
    norms, half_lives = zip(*(each for each in found if each is not None), strict=True)
    return torch.stack(norms), torch.stack(half_lives)


def states_of(scan: Scan) -> tuple[Tensor, Tensor]:
    """Return the norm of the state of a scan after each token, and quartiles of its half-lives.

    Args:
        scan: of a layer over a text of n tokens.

    Returns:
        norms: (n,).
        half_lives: (3,); see `states`.
    """
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    half_lives = scan.half_lives().flatten()  # infinity cannot be interpolated
    return scan.norms(), half_lives.quantile(quarters, interpolation="nearest")


class _Recorder(TorchFunctionMode):
    """Records the scan and the attention of the layer that runs inside.

    Attributes:
        scan: of the layer, if any so far.
        attention: likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scan: Scan | None = None
        self.attention: Softmax | None = None

    def enter(self, mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Record what a Mamba-3 makes of its input."""
        assert isinstance(mixer, Mamba3Mixer)
        tokens = mixer.tokens(inputs[0])
        self.scan = HeadScan(Tokens(*(x[0] for x in tokens)), mixer.D.detach())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record it if it is a scan or attention."""
        if func is torch.ops.longscan.selective_scan:
            self.scan = _channels(*args)
        elif func is torch.ops.longscan.ssd and self.scan is None:
            self.scan = _heads(*args)
        elif func is F.scaled_dot_product_attention:
            q, k, v = (x[0].transpose(0, 1) for x in args[:3])
            self.attention = Softmax(q, k, v, kwargs["scale"])
        return func(*args, **(kwargs or {}))


def _check_finite(layer: TextLayer) -> None:
    """Raise LongscanError if what a layer takes holds NaN or infinity."""
    scan = layer.scan.tokens if isinstance(layer.scan, HeadScan) else layer.scan
    tensors = [*(scan or ()), *(layer.attention[:3] if layer.attention else ())]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise LongscanError(
            f"layer {layer.number} computes NaN or infinity: the model's weights are damaged, or their dtype "
            "is too narrow (load it in float32)."
        )


def _channels(*args: Any) -> ChannelScan:
    """Return the scan of a call of the op `selective_scan`."""
    u, dt, A, B, C, D, _, bias, _, _, softplus, _ = args
    dt = dt if bias is None else dt + bias
    dt = F.softplus(dt) if softplus else dt
    return ChannelScan(u[0], dt[0], A, B[0, :, 0], C[0, :, 0], D)


def _heads(*args: Any) -> HeadScan:
    """Return the scan of a call of the op `ssd`."""
    x, dt, log_decay, B, C = (tensor[0] for tensor in args[:5])
    group = x.shape[1] // B.shape[1]
    q, k = (M.repeat_interleave(group, 1)[:, None] for M in (C, B))  # of each head
    return HeadScan(Tokens(q, k, x[:, None], log_decay, torch.zeros_like(dt), dt), args[5])
