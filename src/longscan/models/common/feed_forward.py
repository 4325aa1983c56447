"""Feed-forward layers, which map each token by itself: gated (SwiGLU) or of squared ReLUs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.models.common.layers import normal_linear
from longscan.models.common.mixer import Mixer
from longscan.models.common.native_decode import matrix

__all__ = ["FeedForward", "FeedForwardKind", "NoState", "Pointwise", "SquaredReLU", "SwiGLU", "feed_forward"]

FeedForwardKind: TypeAlias = Literal["swiglu", "relu2"]


class FeedForward(nn.Module):
    """A layer that maps each token by itself."""

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder, used in place; None if it cannot use them.

        Args:
            layer: index of the block.
            norm: see `Mixer.native`.
        """
        raise NotImplementedError


class SwiGLU(FeedForward):
    """W_down (silu(W_gate x) * W_up x).

    Args:
        d_model: width of x and of the result.
        d_ff: width inside.
        generator: randomness of the initialisation; torch's global generator if None.
        bias: whether the matrices have biases.
        depth: terms that add up in the residual stream, for the initialisation of down_proj.
        multipliers: constant factors of W_gate x and of the result.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        generator: torch.Generator | None = None,
        *,
        bias: bool = False,
        depth: int = 1,
        multipliers: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self.multipliers = multipliers
        self.gate_proj = normal_linear(d_model, d_ff, generator, bias=bias)
        self.up_proj = normal_linear(d_model, d_ff, generator, bias=bias)
        self.down_proj = normal_linear(d_ff, d_model, generator, bias=bias, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        of_gate, of_result = self.multipliers
        gate = self.gate_proj(x)
        gate = F.silu(gate if of_gate == 1 else gate * of_gate)
        y: Tensor = self.down_proj(gate * self.up_proj(x))
        return y if of_result == 1 else y * of_result

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        gate, up, down = map(matrix, (self.gate_proj, self.up_proj, self.down_proj))
        if gate is None or up is None or down is None:
            return None
        of_gate, of_result = self.multipliers
        weights = ops.MLPWeights(gate, up, down, gate_scale=of_gate)
        return [ops.Sublayer(weights, layer, norm, out_scale=of_result)]


class SquaredReLU(FeedForward):
    """W_down max(0, W_up x)^2 (Primer, arXiv 2109.08668).

    Args:
        d_model: width of x and of the result.
        d_ff: width inside.
        generator: randomness of the initialisation; torch's global generator if None.
        bias: whether the matrices have biases.
        depth: terms that add up in the residual stream, for the initialisation of down_proj.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        generator: torch.Generator | None = None,
        *,
        bias: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.up_proj = normal_linear(d_model, d_ff, generator, bias=bias)
        self.down_proj = normal_linear(d_ff, d_model, generator, bias=bias, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        return cast(Tensor, self.down_proj(F.relu(self.up_proj(x)).square()))

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        up, down = map(matrix, (self.up_proj, self.down_proj))
        if up is None or down is None:
            return None
        return [ops.Sublayer(ops.MLPWeights(None, up, down, activation="relu2"), layer, norm)]


class NoState(NamedTuple):
    """The state of a layer that maps each token by itself: nothing."""


class Pointwise(Mixer[NoState]):
    """A layer that moves nothing along time.

    Args:
        mlp: maps each token.
    """

    def __init__(self, mlp: FeedForward) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, state: NoState | None, plan: Any, /) -> tuple[Tensor, NoState]:
        """Map each token; see `Mixer.forward`."""
        return self.mlp(x), NoState()

    def init_state(self, batch_size: int) -> NoState:
        """Return nothing; see `Mixer.init_state`."""
        return NoState()

    def step(self, x: Tensor, state: NoState, plan: Any, /) -> Tensor:
        """Map one more token per row; see `Mixer.step`."""
        return cast(Tensor, self.mlp(x))

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder; see `Mixer.native`."""
        mlp = self.mlp
        return mlp.native(layer, norm) if isinstance(mlp, FeedForward) else None  # it may be adapted


def feed_forward(
    kind: FeedForwardKind,
    d_model: int,
    d_ff: int,
    generator: torch.Generator | None = None,
    *,
    bias: bool = False,
    depth: int = 1,
) -> FeedForward:
    """Return a feed-forward layer.

    Args:
        kind: "swiglu" or "relu2".
        d_model: width of its input and output.
        d_ff: width inside.
        generator: randomness of the initialisation; torch's global generator if None.
        bias: whether the matrices have biases.
        depth: terms that add up in the residual stream, for the initialisation.
    """
    cls = SwiGLU if kind == "swiglu" else SquaredReLU
    return cls(d_model, d_ff, generator, bias=bias, depth=depth)
