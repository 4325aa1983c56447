"""The gated MLP of the official Mamba blocks, and the block that has one behind its mixer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.models.common.layers import RMSNorm, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.native_decode import matrix

__all__ = ["MULTIPLE", "GatedMLP", "MLPBlock", "rounded"]

MULTIPLE = 128  # the official code rounds the width up to it


def rounded(d_intermediate: int) -> int:
    """Return the width of an MLP in the official code, of the one in its configuration.

    Args:
        d_intermediate: 0 for no MLP.
    """
    return -(-d_intermediate // MULTIPLE) * MULTIPLE


class GatedMLP(nn.Module):
    """fc2 (y silu(gate)) with [y; gate] = fc1 x.

    Args:
        d_model: width of the residual stream.
        d_mlp: width of y.
        depth: terms that add up in the residual stream, for the initialisation of fc2.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self, d_model: int, d_mlp: int, depth: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.fc1 = linear(d_model, 2 * d_mlp, False, generator)
        self.fc2 = linear(d_mlp, d_model, False, generator)
        if not self.fc2.weight.is_meta:
            with torch.no_grad():
                self.fc2.weight /= math.sqrt(depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return cast(Tensor, self.fc2(y * F.silu(gate)))

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return the weights for the native decoder, fc1 in two halves; see `Mixer.native`."""
        both, down = matrix(self.fc1), matrix(self.fc2)
        if both is None or down is None:
            return None
        up, gate = both.halves
        return [ops.Sublayer(ops.MLPWeights(gate, up, down), layer, norm)]


class MLPBlock(Block):
    """x + mixer(norm(x)), then x + mlp(norm2(x)).

    Args:
        config: the configuration.
        mixer: of the first sublayer.
        d_mlp: width of the MLP.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        mixer: Mixer[Any],
        d_mlp: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(config, mixer)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = GatedMLP(config.d_model, d_mlp, config.n_layers, generator)

    def forward(self, x: Tensor, state: Any, plan: Any) -> tuple[Tensor, Any]:
        """Add the outputs of both sublayers to the residual stream x (batch, seq_len, d_model)."""
        x, state = super().forward(x, state, plan)
        return x + self.mlp(self.norm2(x)), state

    def step(self, x: Tensor, state: Any, plan: Any) -> Tensor:
        """Add the outputs of both sublayers for one token per row, x (batch, d_model)."""
        x = super().step(x, state, plan)
        return cast(Tensor, x + self.mlp(self.norm2(x)))

    def native(self, layer: int) -> list[ops.Sublayer] | None:
        """Return both sublayers for the native decoder; see `Block.native`."""
        mixer, mlp = super().native(layer), self.mlp.native(layer, self.norm2.weight)
        return None if mixer is None or mlp is None else [*mixer, *mlp]
