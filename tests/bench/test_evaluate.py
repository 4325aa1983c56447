"""`longscan bench evaluate`: our adapter and lm-eval's own backend give the same log-likelihoods."""

from __future__ import annotations

import copy
import importlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longscan.bench.contenders import questions
from longscan.bench.contenders.longscan import ready
from longscan.bench.contenders.questions import TASKS, Counts
from longscan.bench.measure import Contender, Measurement, Settings
from longscan.bench.suites import evaluate
from longscan.bench.suites.generate_contenders import tiny
from longscan.tokenizers.base import ByteTokenizer

# The goal of the suite. A float32 number has 6e-8 of relative error; a sum of a few dozen log-probabilities
# of about -6 each stays far below 1e-6 of its value, unless a layer computes something else.
RELATIVE = 1e-6
COUNTS = Counts(
    endings=2, passage=1, last_word=4, documents=1, context=12, ending=5, passage_words=40, document=30
)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")


def here(title: str, contenders: Sequence[Contender], settings: Settings) -> dict[str, Measurement]:
    """Stand in for `compare`: run each contender twice in this process, a warm-up and a turn."""
    found = {}
    for one in contenders:
        module, name = one.job.split(":")
        run = getattr(importlib.import_module(module), name)(**one.arguments)
        run()
        begin = time.perf_counter()
        details = run()
        seconds = (details.pop("seconds"),)
        assert 0 < seconds[0] < time.perf_counter() - begin
        found[one.name] = Measurement(name=one.name, seconds=seconds, peak_bytes=10**8, details=details)
    return found


@pytest.mark.filterwarnings("ignore")  # of the harness and of transformers
def test_both_backends_agree() -> None:
    for package in ("lm_eval", "transformers", "accelerate"):
        pytest.importorskip(package)
    models = [evaluate.Model(shape, tiny(shape).model, COUNTS) for shape in ("130m", "falcon-h1")]
    report = evaluate.run(Settings(compare=here), quick=True, models=models)
    agreements = [row for row in report.rows if "requests" in row]
    assert [row["contender"] for row in agreements[:2]] == [
        f"{evaluate.OURS} / {evaluate.HF}",
        f"{evaluate.OURS} / {evaluate.HF_BATCH}",
    ]
    assert len(agreements) == 12  # 6 pairs of 2 models
    for row in agreements:
        assert row["requests"] == 4 * (2 + 1) + 4 + 1
        assert row["relative"] < RELATIVE, row
        assert row["absolute"] < 1000 * RELATIVE, row
        assert row["same_greedy"] == row["requests"]
        assert 1 <= row["greedy"] < row["requests"]  # of both kinds
        assert row["same_answers"] == row["questions"] == 3
        assert row["same_metrics"] == len(TASKS)
    speeds = [row for row in report.rows if "task" in row]
    assert {(row["model"], row["task"], row["contender"]) for row in speeds} == {
        (model.title, task, name)
        for model in models
        for task in TASKS
        for name in (evaluate.OURS, evaluate.HF, evaluate.HF_BATCH)
    }
    for row in speeds:
        assert row["rate"] == pytest.approx(COUNTS.of(row["task"]) / row["seconds"])
        assert row["repeats"] == 1
    for name in ("faster than lm-eval's hf", "difference from float64", "from lm-eval hf, batch 1"):
        assert sum(name in ratio.what and not math.isnan(ratio.measured) for ratio in report.ratios) >= 2
    text = report.text()
    for words in ("questions/s", "peak resident set", "same greedy flag", "17 of 17", "4 of 4", "≤ 1e-06"):
        assert words in text


def answers() -> dict[str, Any]:
    found = {
        task: {"logprobs": [-4.0, -3.0, -5.0, -6.0], "greedy": [False, True, False, False], "value": 0.5}
        for task in TASKS
    }
    found["documents"] = {"logprobs": [-80.0], "greedy": [False], "value": 2.0}
    return found


def test_differences_are_seen() -> None:
    one, other = answers(), answers()
    assert evaluate.differences(one, other) == {
        "requests": 13,
        "absolute": 0.0,
        "relative": 0.0,
        "same_greedy": 13,
        "greedy": 3,
        "questions": 2,
        "same_answers": 2,
        "same_metrics": 4,
    }
    worse = copy.deepcopy(one)
    worse["endings"] |= {"logprobs": [-2.0, -3.0, -5.0, -6.0], "greedy": [True] * 4}
    worse["documents"] |= {"logprobs": [-83.0], "value": 2.1}
    found = evaluate.differences(worse, other)
    assert (found["absolute"], found["relative"]) == (3.0, 0.5)
    assert (found["same_greedy"], found["same_answers"], found["same_metrics"]) == (10, 1, 3)
    certain = copy.deepcopy(other)
    certain["endings"]["logprobs"][0] = 0.0
    assert evaluate.differences(one, certain)["relative"] == math.inf


def test_the_questions_are_a_function_of_the_model(tmp_path: Path) -> None:
    model, tokenizer = ready({"d_model": 16, "n_layers": 1, "vocab_size": 257}), ByteTokenizer()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        questions.write(model, tokenizer, questions.english, COUNTS, tmp_path / name)
    for task in TASKS:
        lines = (tmp_path / "a" / f"{task}.jsonl").read_text()
        assert lines == (tmp_path / "b" / f"{task}.jsonl").read_text()
        assert len(lines.splitlines()) == COUNTS.of(task)
    first = json.loads((tmp_path / "a" / "endings.jsonl").read_text().splitlines()[0])
    assert len(first["choices"]) == questions.CHOICES
    assert len(first["context"].split()) == COUNTS.context
    assert all(choice.startswith(" ") and len(choice.split()) == COUNTS.ending for choice in first["choices"])


def test_what_is_missing_is_named() -> None:
    report = evaluate.run(Settings(installed=lambda _: False), quick=True)
    assert not report.rows
    for package in ("lm-eval", "transformers", "accelerate"):
        assert f"tasks need {package}: pip install" in report.text()
    report = evaluate.run(Settings(installed=lambda _: False, peers=False), quick=True)
    assert "transformers" not in report.text()
