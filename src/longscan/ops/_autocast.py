"""Protection from autocast, for sums over a whole sequence, where rounding errors would add up."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def exact(function: FunctionT) -> FunctionT:
    """Return the function with autocast switched off inside: it computes in the dtypes of its arguments.

    Args:
        function: one of its arguments is a tensor.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(FunctionT, run)
