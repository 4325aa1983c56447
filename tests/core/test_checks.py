"""Checks of arguments: one wording for every range, and None is always valid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from longscan.core.checks import check_range, check_text, check_texts, check_whole
from longscan.core.config import Config
from longscan.errors import UsageError


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0, {"least": 1}, "1 or more, got 0"),
        (-0.5, {"least": 0, "below": math.inf}, "0 or more, got -0.5"),
        (2000, {"least": 1, "most": 1024}, "1 to 1,024, got 2000"),
        (-1, {"least": 0, "most": 2**64 - 1}, "0 to 2**64 - 1, got -1"),
        (1.0, {"least": 0, "below": 1}, "at least 0 and below 1, got 1.0"),
        (0.0, {"above": 0}, "more than 0, got 0.0"),
        (1.5, {"above": 0, "most": 1}, "more than 0 and at most 1, got 1.5"),
        (math.nan, {"least": 0}, "0 or more, got nan"),
        (math.inf, {"least": 0, "below": math.inf}, "0 or more, got inf"),
    ],
)
def test_a_number_out_of_range(value: float, bounds: dict[str, float], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        check_range("x", value, error=UsageError, **bounds)
    assert str(error.value) == f"x: expected {expected}."


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(1, {"least": 1}), (1, {"most": 1}), (0.999, {"below": 1}), (1e-9, {"above": 0}), (None, {"least": 1})],
)
def test_a_number_in_range(value: float | None, bounds: dict[str, float]) -> None:
    check_range("x", value, **bounds)


@dataclass(frozen=True, kw_only=True)
class Sizes(Config):
    width: int = 4
    depth: int | None = None


def test_a_config_names_its_field() -> None:
    Sizes().check("width", "depth", least=1)
    with pytest.raises(UsageError, match=r"^depth: expected 1 or more, got 0"):
        Sizes(depth=0).check("width", "depth", least=1)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(UsageError, match=r"^n: expected a whole number, got"):
        check_whole("n", value, 0)


def test_texts_are_several_and_a_text_is_one() -> None:
    check_texts("texts", ["a"])
    check_text("text", "a")
    with pytest.raises(UsageError, match=r"expected a list of texts, got one text, 'a'\. Put it in a list"):
        check_texts("texts", "a")
    with pytest.raises(UsageError, match="expected one text, got list"):
        check_text("text", ["a"])
