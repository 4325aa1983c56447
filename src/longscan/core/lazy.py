"""What is imported when it is first used, so that a command waits only for what it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["LazyMapping", "lazy_names"]

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """Values by name, each made when it is first looked up; names and order cost nothing.

    Args:
        makers: name -> what returns its value.
    """

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = dict(makers)
        self._values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Return the value of a name.

        Args:
            name: one of the makers'.

        Raises:
            KeyError: it is none.
        """
        if name not in self._values:
            self._values[name] = self._makers[name]()
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Return how many names there are."""
        return len(self._makers)


def lazy_names(package: str, home: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports its public names when they are first used (PEP 562).

    Args:
        package: its name.
        home: module in the package -> the public names that it defines.
    """
    module_of = {name: f"{package}.{module}" for module, names in home.items() for name in names}

    def getter(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(importlib.import_module(package), name, value)
        return value

    return getter
