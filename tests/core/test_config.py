"""Configurations travel as JSON and refuse what they do not know."""

from __future__ import annotations

import importlib
import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import longscan
from longscan.core.config import Config, brief, count, nearest
from longscan.errors import LongscanError


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    d_model: int
    rate: float = 0.5
    bias: bool = False
    rank: int | None = None
    stop: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    init: Literal["random", "constant"] = "random"
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model < 1:
            raise LongscanError(f"d_model: expected at least 1, got {self.d_model}.")


samples = st.builds(
    Sample,
    d_model=st.integers(1, 2**70),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    bias=st.booleans(),
    rank=st.none() | st.integers(),
    stop=st.lists(st.text()).map(tuple),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    init=st.sampled_from(["random", "constant"]),
    inner=st.builds(Inner, width=st.integers()),
)


@given(samples)
def test_round_trip_through_json(sample: Sample) -> None:
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def test_lists_ints_and_dictionaries_become_what_the_field_is() -> None:
    sample = Sample.from_dict(
        {"d_model": 2, "rate": 3, "stop": ["a", "b"], "betas": [0, 1], "inner": {"width": 7}}
    )
    assert sample == Sample(d_model=2, rate=3.0, stop=("a", "b"), betas=(0.0, 1.0), inner=Inner(width=7))
    assert type(sample.rate) is float
    assert type(sample.betas[0]) is float


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_modle": 3}, ["Sample", "'d_modle'", "did you mean 'd_model'?"]),
        ({"zzz": 3}, ["'zzz'", "known: betas, bias,"]),
        ({3: 3}, ["no field 3"]),
        ({"d_model": True}, ["Sample.d_model", "expected int", "True (bool)"]),
        ({"d_model": 2.0}, ["expected int", "2.0 (float)"]),
        ({"d_model": None}, ["expected int", "None"]),
        ({"d_model": 0}, ["at least 1"]),
        ({"rate": float("nan")}, ["Sample.rate", "expected a finite number", "nan"]),
        ({"rate": float("inf")}, ["finite"]),
        ({"rate": 10**400}, ["finite"]),
        ({"rate": False}, ["finite", "False (bool)"]),
        ({"rate": "0.1"}, ["finite", "'0.1' (str)"]),
        ({"bias": 1}, ["true or false", "1 (int)"]),
        ({"rank": "2"}, ["expected int or null", "'2' (str)"]),
        ({"stop": "abc"}, ["a list of text", "'abc' (str)"]),
        ({"stop": ["a", 1]}, ["a list of text"]),
        ({"betas": [0.1]}, ["a list of 2"]),
        ({"init": "zeros"}, ["one of 'random', 'constant'", "'zeros'"]),
        ({"init": 0}, ["one of"]),
        ({"inner": {"wide": 1}}, ["Inner", "'wide'", "'width'"]),
        ({"inner": 4}, ["Inner", "expected a dictionary", "4 (int)"]),
        ({"stop": ["x" * 1000, 1]}, ["..."]),
    ],
)
def test_errors_say_field_expected_got(changes: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(LongscanError) as caught:
        Sample.from_dict({"d_model": 1, **changes})
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 200


def test_missing_fields_are_named() -> None:
    with pytest.raises(LongscanError, match="Sample needs d_model"):
        Sample.from_dict({})


def test_a_configuration_is_a_dictionary() -> None:
    with pytest.raises(LongscanError, match="expected a dictionary"):
        Sample.from_dict([1, 2])  # type: ignore[arg-type]


def test_replace_checks_and_leaves_the_original() -> None:
    sample = Sample(d_model=1)
    assert sample.replace(d_model=2, inner=Inner(width=3)) == Sample(d_model=2, inner=Inner(width=3))
    assert sample.d_model == 1
    with pytest.raises(LongscanError, match="did you mean 'rate'"):
        sample.replace(rats=1)
    with pytest.raises(LongscanError, match=r"Sample\.rate"):
        sample.replace(rate="fast")


def test_nearest() -> None:
    assert nearest("mmba", ["mamba", "s4"]) == "; did you mean 'mamba'?"
    assert nearest("beta", ["beta1", "lr"]) == "; did you mean 'beta1'?"
    assert nearest("mamba2", ["mamba", "s4"]) == "; known: mamba, s4."  # another model
    assert nearest("xyz", ["s4", "mamba"]) == "; known: mamba, s4."


@pytest.mark.parametrize(
    ("n", "words"), [(0, "0 classes"), (1, "1 class"), (2, "2 classes"), (12345, "12,345 classes")]
)
def test_counts_have_their_nouns(n: int, words: str) -> None:
    assert count(n, "class", "classes") == words
    assert count(n, "step") == words.replace("classes", "steps").replace("class", "step")


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [(99.6, 2, "100"), (0.0123, 2, "0.012"), (1234.4, 3, "1,234"), (3.14159, 3, "3.14"), (999.7, 3, "1,000")],
)
def test_brief_numbers_have_no_exponent(value: float, digits: int, words: str) -> None:
    assert brief(value, digits) == words


def configs() -> list[type[Config]]:
    """Every configuration of the package."""
    for path in sorted(Path(longscan.__file__).parent.rglob("*.py")):
        name = path.relative_to(Path(longscan.__file__).parent).with_suffix("").as_posix().replace("/", ".")
        if not name.endswith("__init__"):
            importlib.import_module(f"longscan.{name}")
    found, waiting = [], [Config]
    while waiting:
        below = [cls for cls in waiting.pop().__subclasses__() if cls.__module__.startswith("longscan.")]
        found += below
        waiting += below
    return list(dict.fromkeys(found))


def test_every_constructor_checks_what_from_dict_checks() -> None:
    found = configs()
    assert {"SamplingConfig", "MambaConfig", "BertConfig", "TrainConfig", "ODERNNConfig"} <= {
        cls.__name__ for cls in found
    }
    for cls in found:
        for field in fields(cls):
            if field.init:  # no field takes a complex number
                required = {
                    other.name: 1j
                    for other in fields(cls)
                    if other.init and other.default is MISSING and other.default_factory is MISSING
                }
                with pytest.raises(LongscanError, match=rf"{cls.__name__}\.\w+: expected .* 1j \(complex\)"):
                    cls(**{**required, field.name: 1j})


def test_constructors_convert_where_nothing_is_lost() -> None:
    sample = Sample(d_model=np.int64(3), rate=np.float32(0.5), stop=["a"])  # type: ignore[arg-type]
    assert sample == Sample(d_model=3, rate=0.5, stop=("a",))
    assert [type(value) for value in (sample.d_model, sample.rate, sample.stop)] == [int, float, tuple]
    with pytest.raises(LongscanError, match=r"Sample\.stop: expected a list of text, got 'great' \(str\)"):
        Sample(d_model=1, stop="great")  # type: ignore[arg-type]
    with pytest.raises(LongscanError, match=r"Sample\.d_model: expected int, got 2\.5"):
        Sample(d_model=2.5)  # type: ignore[arg-type]
