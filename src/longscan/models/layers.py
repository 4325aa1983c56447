"""The layers every model is made of: a Linear through the fast multiplication, and the norm."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import ops

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 at least and returned in the weight's type."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token.

        Args:
            x: (..., d_model).

        Returns:
            (..., d_model).
        """
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Linear(nn.Linear):
    """torch's Linear, through the multiplication that is fast on this processor."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return ops.linear(input, self.weight, self.bias)


def linear(d_in: int, d_out: int, bias: bool, generator: torch.Generator | None = None) -> nn.Linear:
    """Make a Linear as the official code starts it: torch's own weights, zero bias.

    Args:
        d_in: input width.
        d_out: output width.
        bias: whether it has one.
        generator: randomness; torch's global one if None.

    Returns:
        The layer.
    """
    layer = blank(Linear, d_in, d_out, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class _Unset(TorchFunctionMode):
    """Turns torch.nn.init off; torch's skip_init would, through the meta device, import a second of code."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def blank(kind: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Make a torch module without its random start, which would draw from the global generator.

    Args:
        kind: its class.
        args: as for the class.
        kwargs: as for the class.

    Returns:
        The module, its parameters allocated and not yet set.
    """
    with _Unset():
        return kind(*args, **kwargs)
