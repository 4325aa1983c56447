"""`longscan bench serve`: chats over HTTP, many at a time and over many turns.

Every server has a process of its own and the same weights; one client, in another process, asks them in
turns. The peers are the server of llama-cpp-python and `transformers serve`, the ceiling is a server that
computes nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longscan.bench.contenders import chat_model, servers
from longscan.bench.machine import multiplies_bf16
from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table, spread, table
from longscan.bench.suites.generate_contenders import SHAPES, tiny
from longscan.errors import LongscanError

__all__ = ["OURS", "PRECISIONS", "run"]

PRECISIONS = tuple(chat_model.GGUF)
OURS, LLAMA, TRANSFORMERS, NULL = (
    "longscan serve",
    "llama-cpp-python",
    "transformers serve",
    "ceiling: a server that computes nothing",
)
STARLETTE = ("pydantic-settings", "sse-starlette", "starlette-context")
NEEDS = {  # the packages of each
    OURS: ("fastapi", "uvicorn"),
    LLAMA: ("llama-cpp-python", "gguf", "fastapi", "uvicorn", *STARLETTE),
    TRANSFORMERS: ("transformers", "accelerate", "openai", "fastapi", "uvicorn"),
    NULL: (),
}
PEERS, PATIENCE = (LLAMA, TRANSFORMERS), 30.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a benchmark.

    Attributes:
        model: see `contenders.longscan.fresh`.
        title: what it is called.
        streams: at a time.
        prompt: tokens of the messages of concurrent streams.
        n_tokens: of an answer.
        message: tokens of the messages of a conversation.
        turns: of a conversation that are printed; the last is its length.
    """

    model: dict[str, Any]
    title: str
    streams: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    n_tokens: int = 64
    message: int = 30
    turns: tuple[int, ...] = (2, 5, 10, 20)


FULL = Sizes(SHAPES["130m"].model, SHAPES["130m"].title)
QUICK = Sizes(tiny("130m").model, tiny("130m").title, (1, 2), 8, 8, 4, (2, 3))


@dataclass
class _Servers:
    """The servers that run, as endpoints by name, and why others do not."""

    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def run(settings: Settings, quick: bool, precision: str = "int8") -> Report:
    """Return a report of throughput and latency by concurrent streams, and of latency by turn.

    Args:
        settings: of the benchmark.
        quick: a small model, few streams and turns, to see that it works.
        precision: of the weights: of PRECISIONS.
    """
    report, sizes = Report(suite="serve"), QUICK if quick else FULL
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longscan-bench-")))
        found = _start(stack, folder, sizes, precision, settings)
        for streams in sizes.streams:
            _streams(report, found, streams, sizes, settings)
        _turns(report, found, sizes, settings)
    _tables(report, sizes)
    report.notes += [
        f"{sizes.title}, random weights, {precision} in longscan, {chat_model.GGUF[precision]} in llama.cpp, "
        f"{_dtype(precision)} in transformers; chats of {sizes.prompt} tokens and the template, answers of "
        f"{sizes.n_tokens} at temperature 1. In conversations messages have {sizes.message} tokens.",
        f"{LLAMA} answers one request at a time, as does {TRANSFORMERS} with this model: the others wait.",
        *dict.fromkeys(found.notes.values()),
    ]
    shares = [
        row["client_share"] for row in report.rows if row["contender"] == OURS and "client_share" in row
    ]
    if shares:
        report.notes.append(f"The client took at most {max(shares):.0%} of a core while it asked {OURS}.")
    return report


def _start(
    stack: contextlib.ExitStack, folder: Path, sizes: Sizes, precision: str, settings: Settings
) -> _Servers:
    """Start the servers that are installed; they end with the stack."""
    found, names = _Servers(), []
    for name, packages in NEEDS.items():
        missing = [package for package in packages if not settings.installed(package)]
        if name in PEERS and not settings.peers:
            continue
        if missing:
            extra = "servers" if name in PEERS else "serve"
            found.notes[name] = f"{name} needs {missing[0]}: pip install 'longscan[{extra}]'"
        else:
            names.append(name)
    directory, file = folder, None
    if names != [NULL]:
        settings.notify("serve: writing the model")
        gguf = chat_model.GGUF[precision] if LLAMA in names else None
        directory, file = chat_model.export(sizes.model, folder, gguf)
    slots = ("--slots", str(servers.SLOTS), "--name", "model")
    commands = {
        OURS: (servers.ours(str(directory), precision, settings.threads, *slots), "/health", "model"),
        LLAMA: (servers.llama_cpp(str(file), settings.threads), "/v1/models", "model"),
        TRANSFORMERS: (
            servers.transformers(str(directory), _dtype(precision)),
            "/health",
            str(directory),
        ),
        NULL: (servers.null(), "/health", "model"),
    }
    for name in names:
        command, path, model = commands[name]
        settings.notify(f"serve: starting {name}")
        try:
            server = stack.enter_context(servers.running(command, path, settings.threads))
        except LongscanError as error:
            found.notes[name] = f"failed: {name}: {error}"
            continue
        found.endpoints[name] = {
            "port": server.port,
            "pid": server.pid,
            "model": model,
            "vocab_size": sizes.model["vocab_size"],
        }
    return found


def _dtype(precision: str) -> str:
    """Return the type of transformers' weights: it has no such integers."""
    return "bfloat16" if precision == "bf16" and multiplies_bf16() else "float32"


def _contenders(found: _Servers, job: str, **arguments: int) -> list[Contender]:
    """Return a client for each server."""
    return [
        Contender(
            name=name,
            job=f"longscan.bench.contenders.chat_client:{job}",
            arguments={"endpoint": endpoint, **arguments},
            patience=PATIENCE,
        )
        for name, endpoint in found.endpoints.items()
    ]


def _streams(report: Report, found: _Servers, streams: int, sizes: Sizes, settings: Settings) -> None:
    """Add the rows and the ratio of concurrent streams."""
    case = f"{streams} stream{'s' * (streams > 1)}"
    contenders = _contenders(found, "load", streams=streams, prompt=sizes.prompt, n_tokens=sizes.n_tokens)
    results = settings.compare(case, contenders, settings)
    report.add(case, results.values(), streams * sizes.n_tokens, "tokens/s", streams=streams)
    if OURS in results:
        over = faster(results, OURS, *PEERS)
        report.ratios.append(Ratio(what=f"{case}: over the best peer", measured=over))


def _turns(report: Report, found: _Servers, sizes: Sizes, settings: Settings) -> None:
    """Add the rows and the ratios of a conversation."""
    last = sizes.turns[-1]
    contenders = _contenders(
        found, "conversation", turns=last, message=sizes.message, n_tokens=sizes.n_tokens
    )
    results = settings.compare("conversation", contenders, settings)
    firsts = {name: m.details.pop("firsts", []) for name, m in results.items()}
    by_turn: dict[int, dict[str, Measurement]] = {}
    for turn in range(2, last + 1):
        by_turn[turn] = {
            name: Measurement(
                name=name,
                seconds=tuple(one[turn - 1] for one in firsts[name]),
                warm=m.warm,
                details=m.details,
                note=m.note if turn == 2 else "",
            )
            for name, m in results.items()
        }
        report.add(f"turn {turn}", by_turn[turn].values(), 1, "first tokens/s", turn=turn)
    if OURS in results:
        over = faster(by_turn[last], OURS, *PEERS)
        growth = by_turn[last][OURS].median / by_turn[2][OURS].median
        report.ratios += [
            Ratio(what=f"turn {last}: first token, over the best peer", measured=over),
            Ratio(what=f"turn {last}: seconds to the first token, over those of turn 2", measured=growth),
        ]


def _tables(report: Report, sizes: Sizes) -> None:
    """Add the tables."""
    streams = [row for row in report.rows if "streams" in row]
    turns = [row for row in report.rows if row.get("turn") in sizes.turns]
    report.tables = [
        rate_table("concurrent streams: tokens/s in all (min–max)", streams, rate),
        table(
            "latency, milliseconds",
            ["", "streams", "first token, p50", "p99", "between tokens, p50", "p99"],
            ([row["contender"], str(row["streams"]), *_latencies(row)] for row in streams if row["rate"]),
        ),
        rate_table("first token by turn of a conversation: milliseconds (min–max)", turns, _milliseconds),
        table(
            "memory", ["", "peak resident set of the server since its start, MB"], _memory([*streams, *turns])
        ),
    ]


def _milliseconds(row: dict[str, Any]) -> str:
    """Return the cell of a time."""
    return spread(row, lambda seconds: 1e3 * seconds, ",.0f" if (row["seconds"] or 0) > 0.02 else ",.1f")


def _latencies(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row's latencies."""
    values = (row.get(key) for key in ("first_p50", "first_p99", "gap_p50", "gap_p99"))
    return ["–" if value is None else f"{1e3 * value:,.1f}" for value in values]


def _memory(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the servers' memory: the largest that was seen."""
    peaks: dict[str, int] = {}
    for row in rows:
        peaks[row["contender"]] = max(peaks.get(row["contender"], 0), row.get("server_peak_bytes") or 0)
    return [[name, f"{peak / 1e6:,.0f}"] for name, peak in peaks.items() if peak]
