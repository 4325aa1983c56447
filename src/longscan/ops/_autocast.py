"""What autocast must leave alone: sums over a whole sequence, where errors of few bits would add up."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def exact(function: FunctionT) -> FunctionT:
    """Make a function compute in the types of its arguments, whatever autocast is around it.

    Args:
        function: one of its arguments is a tensor.

    Returns:
        The function, with autocast off inside.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(FunctionT, run)
