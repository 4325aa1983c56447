"""Matrices with a low-rank adapter beside them; `lora` gives them to a model."""

from __future__ import annotations

from torch import Tensor, nn

from longscan import ops
from longscan.models.common.layers import DtProjection, Linear, WeightOnlyLinear
from longscan.ops.dropout import dropout

__all__ = ["KINDS", "PLAIN", "Adapted"]


class Adapted(nn.Module):
    """A matrix with an adapter: its class comes first among the bases of one below.

    Attributes:
        lora_A: (rank, n_in).
        lora_B: (n_out, rank).
        s: s.
        dropout: probability of an input's element, for the adapter alone, in training.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    s: float
    dropout: float

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        y: Tensor = super().forward(input)
        narrow = ops.linear(dropout(input, self.dropout, self.training), self.lora_A)
        return y + ops.linear(narrow * self.s, self.lora_B).to(y.dtype)


class AdaptedLinear(Adapted, Linear):
    """A Linear with an adapter."""


class AdaptedDtProjection(Adapted, DtProjection):
    """A DtProjection with an adapter."""


class AdaptedWeightOnlyLinear(Adapted, WeightOnlyLinear):
    """A quantised Linear with an adapter in float32."""


KINDS: dict[type[nn.Module], type[Adapted]] = {
    Linear: AdaptedLinear,
    DtProjection: AdaptedDtProjection,
    WeightOnlyLinear: AdaptedWeightOnlyLinear,
}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {kind: plain for plain, kind in KINDS.items()}
