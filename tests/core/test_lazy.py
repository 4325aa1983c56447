"""Names and values that are imported or made when they are first used."""

from __future__ import annotations

import pytest

import longscan
from longscan import models
from longscan.core.lazy import LazyMapping, lazy_names


def test_a_lazy_mapping_makes_a_value_once_and_when_asked() -> None:
    made: list[str] = []

    def maker(name: str) -> str:
        made.append(name)
        return name.upper()

    values = LazyMapping({name: lambda name=name: maker(name) for name in ("b", "a")})
    assert (list(values), len(values), "a" in values, "c" in values) == (["b", "a"], 2, True, False)
    assert not made
    assert (values["a"], values["a"], made) == ("A", "A", ["a"])
    assert list(values.values()) == ["B", "A"]
    assert values.get("c") is None
    with pytest.raises(KeyError, match="c"):
        values["c"]


def test_lazy_names_refuse_what_is_not_there() -> None:
    getter = lazy_names("longscan", {"errors": ("LongscanError",), "core.config": ("nothing",)})
    assert getter("LongscanError") is longscan.LongscanError
    with pytest.raises(AttributeError, match="module 'longscan' has no attribute 'elsewhere'"):
        getter("elsewhere")
    with pytest.raises(AttributeError, match="nothing"):
        getter("nothing")


@pytest.mark.parametrize("package", [longscan, models], ids=["longscan", "models"])
def test_every_public_name_is_imported_when_used(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert set(names) <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None
