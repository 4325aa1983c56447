"""`longscan bench grammar`: what structured output costs, and whether it holds, for random JSON schemas.

The model that ships continues random prompts, each under a schema of its own. Every text that ends by itself
is parsed and validated by jsonschema, which knows nothing of the grammar. Timed are compiling a schema, the
mask of allowed ids before each token, and taking notice of the token.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longscan.bench.measure import Settings
from longscan.bench.report import Ratio, Report, table
from longscan.bench.suites.schemas import random_schema
from longscan.checkpoints.load import load_with_tokenizer
from longscan.core.optional import require
from longscan.core.runtime import use_threads
from longscan.inference.engine import Engine
from longscan.inference.grammar import Grammars
from longscan.inference.request import Request
from longscan.inference.sampling import Constraint, SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = ["run", "run_on"]

MODEL = "longscan-tiny-en"
SCHEMAS, QUICK = 500, 8
PROMPT, TOKENS = 12, 1024  # tokens of a prompt, and of a text at most


@dataclass
class _Seen:
    """What happened, times in seconds."""

    compiled: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    valid: int = 0
    cut: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


class _Timed:
    """A constraint that notes how long it takes.

    Args:
        inner: the constraint.
        seen: where to.
    """

    def __init__(self, inner: Constraint, seen: _Seen) -> None:
        self._inner, self._seen = inner, seen

    def allowed(self) -> np.ndarray | None:
        """Return (n,) bool, which ids may be next."""
        begin = time.perf_counter()
        found = self._inner.allowed()
        self._seen.masks.append(time.perf_counter() - begin)
        return found

    def accept(self, token: int) -> None:
        """Take notice of the next token."""
        begin = time.perf_counter()
        self._inner.accept(token)
        self._seen.accepted.append(time.perf_counter() - begin)


def run(settings: Settings, quick: bool) -> Report:
    """Return the report of the model that ships.

    Args:
        settings: of the benchmark.
        quick: a few schemas, to see that it works.
    """
    use_threads(settings.threads)
    model, tokenizer = load_with_tokenizer(MODEL, None, False)
    return run_on(model, tokenizer, QUICK if quick else SCHEMAS, settings.notify)


def run_on(
    model: LanguageModel, tokenizer: Tokenizer, n: int, notify: Callable[[str], None] = lambda line: None
) -> Report:
    """Return the report of a model.

    Args:
        model: any causal model.
        tokenizer: of it, with a tokenizer.json.
        n: schemas; schema i and its prompt are functions of i.
        notify: called with what is done now.

    Raises:
        LongscanError: jsonschema or llguidance is missing.
    """
    jsonschema = require("jsonschema", "grammar benchmarks")
    grammars, seen = Grammars(tokenizer), _Seen()
    free = _Seen()  # the same without grammars
    for i in range(n):
        if i % 50 == 0:
            notify(f"grammar: schema {i + 1:,} of {n:,}")
        draw = random.Random(i)
        schema = random_schema(draw)
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(PROMPT)]
        prompt = tokenizer.encode(tokenizer.decode(ids))  # text: ids may end within a character
        begin = time.perf_counter()
        make = grammars.json_schema(schema)
        seen.compiled.append(time.perf_counter() - begin)
        text, ended = _write(model, tokenizer, prompt, grammars.ends, i, seen, make)
        if not ended:
            seen.cut += 1
            continue
        try:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
            seen.valid += 1
        except (ValueError, jsonschema.ValidationError) as error:
            seen.wrong.append(f"schema {i}: {text[:80]!r}: {str(error).splitlines()[0][:120]}")
        _write(model, tokenizer, prompt, (), i, free)
    return _report(n, seen, free)


def _write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    ends: Sequence[int],
    seed: int,
    seen: _Seen,
    make: Callable[[], Constraint] | None = None,
) -> tuple[str, bool]:
    """Return a text and whether it ended by itself; without a grammar it has 32 tokens."""
    engine = Engine(model, tokenizer, slots=1)
    config = SamplingConfig(
        max_new_tokens=TOKENS if make else 32, temperature=1.0, top_k=0, top_p=1.0, seed=seed
    )
    constraint = None if make is None else (lambda: _Timed(make(), seen))
    engine.submit(Request(ids=prompt, config=config, eos_id=ends, constraint=constraint))
    text, finish = "", None
    events = engine.run()
    first = next(events)  # with the prefill
    text, finish = first.text, first.finish
    begin = time.perf_counter()
    for event in events:
        if event.error is not None:
            raise event.error
        text, finish = text + event.text, event.finish
        seen.tokens += 1
    seen.seconds += time.perf_counter() - begin
    return text, finish == "eos"


def _report(n: int, seen: _Seen, free: _Seen) -> Report:
    """Return rows, tables, ratios and notes."""
    report = Report(suite="grammar")
    ended = n - seen.cut
    rows = {
        "compile a schema, ms": (seen.compiled, 1e3),
        "mask of a token, µs": (seen.masks, 1e6),
        "accept a token, µs": (seen.accepted, 1e6),
    }
    cells = []
    for name, (times, unit) in rows.items():
        scaled = unit * np.array(times)
        middle, mean, late = float(np.median(scaled)), float(scaled.mean()), float(np.quantile(scaled, 0.99))
        report.rows.append(
            {"case": "cost", "contender": name, "median": middle, "mean": mean, "p99": late, "n": len(times)}
        )
        cells.append([name, f"{middle:,.1f}", f"{mean:,.1f}", f"{late:,.1f}", f"{len(times):,}"])
    report.tables.append(table("what a grammar costs", ["", "median", "mean", "p99", "measured"], cells))
    whole, alone = (1e6 * one.seconds / max(1, one.tokens) for one in (seen, free))
    counts = {"schemas": n, "ended": ended, "valid": seen.valid, "cut": seen.cut, "tokens": seen.tokens}
    report.rows.append({"case": "texts", "contender": "longscan", **counts})
    report.tables.append(
        table(
            f"{n:,} random JSON schemas, {seen.tokens:,} tokens",
            [
                "",
                "ended and valid",
                "ended and not valid",
                f"cut at {TOKENS:,} tokens",
                "µs per token",
                "without",
            ],
            [
                [
                    "texts",
                    f"{seen.valid:,}",
                    f"{len(seen.wrong):,}",
                    f"{seen.cut:,}",
                    f"{whole:,.0f}",
                    f"{alone:,.0f}",
                ]
            ],
        )
    )
    share = seen.valid / ended if ended else math.nan
    report.ratios.append(
        Ratio(
            what="valid, share of the texts that ended by themselves",
            measured=share,
            goal="100 %",
            percent=True,
        )
    )
    report.notes += seen.wrong[:5]
    report.notes.append(
        "Schema and prompt i are functions of i: see longscan.bench.suites.schemas. Validated by jsonschema, "
        "formats included. One text at a time; 'without' are the same prompts without a grammar."
    )
    return report
