"""mamba_ssm.distributed: names that can be imported; there is no tensor parallelism."""

from typing import Any, NoReturn

__all__ = [
    "ColumnParallelLinear",
    "ParallelEmbeddings",
    "RowParallelLinear",
    "all_gather",
    "all_reduce",
    "reduce_scatter",
    "sync_shared_params",
]


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"{name}: longscan.compat has no tensor parallelism; use process_group=None")


class ColumnParallelLinear:
    """Not covered: making one raises NotImplementedError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse(type(self).__name__)


class RowParallelLinear(ColumnParallelLinear):
    """Not covered: making one raises NotImplementedError."""


class ParallelEmbeddings(ColumnParallelLinear):
    """Not covered: making one raises NotImplementedError."""


def all_reduce(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("all_reduce")


def reduce_scatter(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("reduce_scatter")


def all_gather(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("all_gather")


def sync_shared_params(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError."""
    _refuse("sync_shared_params")
