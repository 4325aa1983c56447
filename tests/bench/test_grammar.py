"""`longscan bench grammar`: its random schemas, and what it says of texts that are wrong."""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest

import longscan
from longscan.bench.suites import grammar
from longscan.bench.suites.schemas import random_schema
from longscan.inference.grammar import Grammars
from longscan.inference.json_schema import json_rule
from longscan.tokenizers.base import ByteTokenizer
from small_models import build


def test_schemas_are_valid_supported_and_various() -> None:
    kinds, texts = Counter[str](), set()
    for seed in range(300):
        schema = random_schema(Random(seed))
        assert schema == random_schema(Random(seed))
        jsonschema.Draft202012Validator.check_schema(schema)
        json_rule(schema)
        text = json.dumps(schema)
        texts.add(text)
        for kind in ("anyOf", "$ref", "prefixItems", "enum", "const", "pattern", "format", "multipleOf"):
            kinds[kind] += f'"{kind}"' in text
    assert len(texts) > 290
    assert min(kinds.values()) > 30


def test_the_report_counts_what_it_says() -> None:
    model, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    report = grammar.run_on(model, tokenizer, 3)
    texts = next(row for row in report.rows if row["case"] == "texts")
    assert texts["schemas"] == 3
    assert texts["valid"] == texts["ended"] == 3 - texts["cut"]
    mask = next(row for row in report.rows if row["contender"].startswith("mask"))
    assert mask["n"] >= texts["tokens"]
    assert 0 < mask["median"] <= mask["p99"]
    assert report.ratios[0].measured == 1.0


def test_a_text_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the grammar of another schema, as if the grammar were at fault."""
    made = Grammars.json_schema

    def other(self: Grammars, schema: Any) -> Any:
        return made(self, {"const": "nothing of the kind"})

    monkeypatch.setattr(Grammars, "json_schema", other)
    report = grammar.run_on(build(), ByteTokenizer(), 2)
    assert report.ratios[0].measured == 0.0
    assert [row["valid"] for row in report.rows if row["case"] == "texts"] == [0]
    assert any("nothing of the kind" in note for note in report.notes)


def test_an_end_that_cannot_come_counts_as_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "TOKENS", 2)
    report = grammar.run_on(build(), ByteTokenizer(), 2)
    [texts] = [row for row in report.rows if row["case"] == "texts"]
    assert (texts["cut"], texts["ended"]) == (2, 0)
    assert np.isnan(report.ratios[0].measured)
