"""The reports of `longscan bench`: ratios beside their goals, tables and their marks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longscan.bench import report
from longscan.bench.contenders import llama
from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.suites import generate, stream, train
from longscan.bench.suites.work import work_of


def measurement(name: str, *seconds: float, **more: Any) -> Measurement:
    return Measurement(name=name, seconds=seconds, peak_bytes=10**9, **more)


def test_goals_stand_beside_ratios() -> None:
    def fake(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
        slow = {train.MAMBAPY: 20.0, train.HF_MAMBAPY: 25.0, train.HF: 200.0}
        return {c.name: measurement(c.name, slow.get(c.name, 1.0)) for c in contenders}

    found = train.run(Settings(compare=fake), quick=False)
    ratios = {ratio.what: ratio for ratio in found.ratios}
    assert ratios["512: faster than mambapy"].measured == 20.0
    assert ratios["512: faster than the faster path of transformers"].measured == 25.0
    assert ratios["2048: speed, share of that at 512"].measured == 1.0
    assert ratios["8192: speed, share of that at 512"].measured == 2.0  # twice the tokens in the same second
    assert ratios["512: faster than mambapy"].goal == "≥ 10 ×"
    text = found.text()
    assert "20 ×" in text
    assert "2048" in text
    assert not [row for row in found.rows if row["contender"] == train.HF and row["seq_len"] > 512]


def test_generation_beside_its_goals() -> None:
    slow = {"llama.cpp f32": 3.0, "llama.cpp q4_0": 2.0, "llama.cpp q4_K": 1.8, generate.HF: 10.0}
    slow |= {"longscan int4": 0.5, "longscan int8 × 8": 2.0, generate.MIXING: 0.2}
    products = {"float32": 0.5, "bf16": 0.4, "int8": 0.3, "int4": 0.3, "w8a8": 0.2, "w4a8": 0.2}
    slow |= {f"{generate.PRODUCTS}, {precision}": seconds for precision, seconds in products.items()}
    slow |= {generate.READING: 0.9}
    weights = 4 * work_of(generate.SHAPES["130m"].model).parameters

    def fake(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
        details: dict[str, Any] = {"weight_bytes": weights, "state_bytes": 0, "python_share": 0.04}
        if title == "decode":
            details["excerpt"] = [1.0, 3.0]
        return {c.name: measurement(c.name, slow.get(c.name, 1.0), details=dict(details)) for c in contenders}

    def export(model: dict[str, Any], folder: Path, settings: Settings) -> generate.Files:
        return generate.Files(gguf={name: folder / name for name in llama.FORMATS}, directory=folder)

    settings = Settings(compare=fake, installed=lambda _: True)
    found = generate.run(settings, quick=False, export=export)
    ratios = {ratio.what: ratio for ratio in found.ratios}

    def shown(what: str) -> tuple[float, str]:
        return pytest.approx(ratios[what].measured), ratios[what].goal

    assert shown("prefill 512: float32 over llama.cpp f32") == (3.0, "≥ 2.2 ×")
    assert shown("prefill 2048: int4 over llama.cpp q4_0") == (4.0, "≥ 3 ×")
    assert shown("prefill 512: w8a8 over llama.cpp q8_0") == (1.0, "≥ 3 ×")
    assert shown("prefill 512: w4a8 over float32")[0] == 1.0
    assert shown("prefill 512: our slowest over the fastest llama.cpp") == (1.0, "")
    assert shown("prefill 512: int8, share of both ceilings in turn") == (0.5, "")
    assert shown("prefill 512: float32, share of both ceilings in turn") == (0.7, "")  # each has its own
    assert shown("decode 1: int4 over llama.cpp q4_0 or q4_K") == (3.6, "≥ 1.6 ×")
    assert shown("decode 1: float32, share of reading the weights") == (0.9, "≥ 90 %")
    assert shown("decode 1: int4, share of Python in generate_ids") == (0.04, "≤ 5 %")
    assert shown("decode 8: int8 over one sequence") == (4.0, "≥ 4 ×")
    assert shown("decode 32: int8 over one sequence") == (32.0, "≥ 8 ×")
    cases = [row["case"] for row in found.rows if row["contender"] == "longscan int8"]
    assert cases == ["prefill 512", "prefill 2048", "decode 1", "decode 8", "decode 32"]
    checked = [row for row in found.rows if row["case"] == "decode 1" and "Llama" not in row["contender"]]
    assert {row["logits_error"] for row in checked} == {0.0}
    assert "excerpt" not in json.dumps(found.as_dict(), allow_nan=False)
    larger = generate.run(settings, quick=False, shape="370m", export=export)
    assert {r.what: r.goal for r in larger.ratios}["decode 1: int8 over llama.cpp q8_0"] == "≥ 1.26 ×"
    slow |= {"OpenVINO int4": 1.5, "transformers bf16": 5.0}
    granite = generate.run(settings, quick=False, shape="granite-h", export=export)
    ratios = {ratio.what: ratio for ratio in granite.ratios}
    assert shown("prefill 512: int4 over the best peer") == (3.0, "≥ 2 ×")
    assert shown("decode 1: bf16 over the best peer") == (1.0, "≥ 1.2 ×")  # llama.cpp's
    assert not [row for row in granite.rows if "Llama" in row["contender"]]
    falcon = generate.run(settings, quick=False, shape="falcon-h1", export=export)
    assert not [row for row in falcon.rows if "OpenVINO" in row["contender"]]
    assert any("OpenVINO" in note for note in falcon.notes)


def test_marks_of_single_and_extrapolated_runs() -> None:
    found = report.Report(suite="train")
    cold = measurement("cold", 2.0, warm=False)
    guess = measurement("guess", 4.0, warm=False, details={"extrapolated": True})
    found.add("512", [cold, guess, measurement("warm", 1.0, 2.0, 3.0)], 4096, "tokens/s")
    found.tables.append(report.rate_table("speeds", found.rows, report.rate))
    text = found.text()
    assert "2,048¹" in text
    assert "1,024²¹" in text
    assert "2,048 (1,365–4,096)" in text
    assert "¹ a single first run" in text
    assert "² extrapolated" in text


def test_failures_show_in_table_and_notes() -> None:
    found = report.Report(suite="train")
    found.add("512", [measurement("broken", note="failed: out of memory")], 4096, "tokens/s")
    found.tables.append(report.rate_table("speeds", found.rows, report.rate))
    assert "broken  failed" in found.text()
    assert "512: broken: failed: out of memory" in found.text()
    json.dumps(found.as_dict(), allow_nan=False)


def test_quarters() -> None:
    marks = [[1000 * i, 0.5 * i, 10**8 + i] for i in range(1, 41)]
    quarters = stream._quarters(marks)
    assert [quarter["tokens"] for quarter in quarters] == [10_000, 20_000, 30_000, 40_000]
    assert all(quarter["rate"] == pytest.approx(2000) for quarter in quarters)
    assert quarters[-1]["resident_bytes"] == 10**8 + 40


def test_faster_takes_the_best_of_the_others() -> None:
    found = {name: measurement(name, s) for name, s in (("ours", 1.0), ("a", 30.0), ("b", 20.0))}
    assert faster(found, "ours", "a", "b", "absent") == 20.0
    assert math.isnan(faster(found, "ours", "absent"))
