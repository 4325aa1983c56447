"""`longscan bench serve --soak N`: a live server under N requests of all kinds, and what must hold.

Answers are compared with what an engine writes for the same request alone. Nothing may be lost or belong to
another request, memory must not grow, and in the end nothing may run, wait or be open.
"""

from __future__ import annotations

import http.client
import random
import re
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from longscan.bench.contenders import servers
from longscan.bench.contenders.soak_client import KINDS, Clients, known_answers
from longscan.bench.measure import Settings
from longscan.bench.report import Report, table
from longscan.checkpoints.load import load_with_tokenizer

__all__ = ["Check", "Soak", "run"]

MODEL = "longscan-tiny-en"
SLOTS, QUEUE, CACHE_MB = 4, 8, 8
CLIENTS = SLOTS + QUEUE // 2
BURST = 2 * (SLOTS + QUEUE)
PARTS = 8  # of the run, after each of which a flood comes and memory is measured
WARM = 2  # parts until memory must not grow
GROWTH = 32 << 20  # bytes that it may nevertheless
FLOOD = "floods"
COMPLAINT = re.compile("Traceback|never retrieved|never awaited| ERROR | CRITICAL ")
IDLE = 20.0  # seconds until the server must be idle


@dataclass(frozen=True)
class Check:
    """Something that must hold.

    Attributes:
        what: it is.
        value: that was found.
        holds: whether it does.
    """

    what: str
    value: str
    holds: bool


@dataclass
class Soak:
    """What a soak test has seen.

    Attributes:
        report: for people and programs.
        checks: all of them.
    """

    report: Report
    checks: list[Check] = field(default_factory=list)

    @property
    def violations(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.holds]


@dataclass
class _Seen:
    """The outcomes of requests of one kind."""

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(n: int, settings: Settings, seed: int = 0) -> Soak:
    """Return what a live server did under n requests.

    Args:
        n: requests, apart from floods.
        settings: threads of the server, and what is notified.
        seed: of the requests.
    """
    settings.notify("soak: writing the expected answers")
    model, tokenizer = load_with_tokenizer(MODEL, None, True)
    known = known_answers(model, tokenizer, MODEL, min(96, max(12, n // 4)), seed)
    flags = ("--slots", SLOTS, "--queue", QUEUE, "--cache-mb", CACHE_MB, "--max-length", 2048)
    command = servers.ours(MODEL, "float32", settings.threads, *map(str, flags))
    command.remove("--quiet")
    with servers.running(command, "/health", settings.threads) as server:
        clients = Clients(server.port, known, BURST)
        files, memory, seen = (
            _open_files(server.pid),
            list[int](),
            {kind: _Seen() for kind in (*KINDS, FLOOD)},
        )
        for part in range(PARTS):
            settings.notify(f"soak: part {part + 1} of {PARTS}")
            begin, end = part * n // PARTS, (part + 1) * n // PARTS
            _part(clients, range(begin, end), seed, seen)
            _record(seen[FLOOD], clients, FLOOD, random.Random(f"{seed} flood {part}"))
            memory.append(_resident(server.pid))
        left = _until_idle(server)
        metrics = _metrics(server.port)
        after = _open_files(server.pid)
        status, log = server.stop(), server.output()
    failed = [f"{name} {value:.0f}" for name, value in metrics.items() if 'status="5' in name and value]
    states = metrics["longscan_conversation_state_bytes"]
    soak = Soak(Report(suite="soak"))
    soak.checks = [
        Check("requests with an outcome", *_all(seen, n)),
        Check("answers that were wrong or missing", *_none([w for s in seen.values() for w in s.wrong])),
        Check("running, waiting, their tokens in the end", ", ".join(map(str, left)), not any(left)),
        Check(
            "resident set, growth after the warm-up, MB",
            *_bounded(max(memory[WARM:]) - memory[WARM - 1], GROWTH),
        ),
        Check("open files, before and after", f"{files}, {after}", after <= files + 2),
        Check("statuses of 500 and above", *_none(failed)),
        Check("states of conversations, MB", *_bounded(states, CACHE_MB << 20)),
        Check("complaints in the log", *_none([line for line in log.splitlines() if COMPLAINT.search(line)])),
        Check("exit status after SIGTERM", str(status), status == 0),
    ]
    _fill(soak.report, soak.checks, seen, memory, clients)
    return soak


def _part(clients: Clients, numbers: range, seed: int, seen: dict[str, _Seen]) -> None:
    """Send requests, some at a time."""
    kinds, lock = list(KINDS), threading.Lock()

    def one(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        [kind] = chance.choices(kinds, [share for share, _ in KINDS.values()])
        mine = _Seen()
        _record(mine, clients, kind, chance)
        with lock:
            seen[kind].seconds += mine.seconds
            seen[kind].wrong += mine.wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one, numbers))


def _record(seen: _Seen, clients: Clients, kind: str, chance: random.Random) -> None:
    """Send a request and record its outcome."""
    act = Clients.flood if kind == FLOOD else KINDS[kind][1]
    begin = time.perf_counter()
    try:
        act(clients, chance)
    except Exception as error:  # whatever it is, it is an outcome
        seen.wrong.append(f"{kind}: {type(error).__name__}: {error}")
    seen.seconds.append(time.perf_counter() - begin)


def _until_idle(server: servers.Process) -> tuple[int, ...]:
    """Return the numbers of what runs and waits once they are zero, or after a while."""
    end = time.monotonic() + IDLE
    while True:
        found = _metrics(server.port)
        left = tuple(int(found[f"longscan_{name}"]) for name in ("running", "waiting", "waiting_tokens"))
        if not any(left) or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _metrics(port: int) -> dict[str, float]:
    """Return the metrics of the server."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _resident(pid: int) -> int:
    """Return the resident set of a process in bytes, 0 where it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def _open_files(pid: int) -> int:
    """Return the number of open files of a process, 0 where it is unknown."""
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def _all(seen: dict[str, _Seen], n: int) -> tuple[str, bool]:
    """Return how many requests of n have an outcome."""
    found = sum(len(one.seconds) for kind, one in seen.items() if kind != FLOOD)
    return f"{found:,} of {n:,}", found == n


def _none(found: list[str]) -> tuple[str, bool]:
    """Return how many there are, with an example; there should be none."""
    common = Counter(found).most_common(1)
    return (f"{len(found)}: {common[0][0][:300]}", False) if common else ("0", True)


def _bounded(n_bytes: float, most: int) -> tuple[str, bool]:
    """Return a number of bytes in MB, and whether it is within a bound."""
    return f"{n_bytes / 1e6:,.1f} (at most {most / 1e6:,.0f})", n_bytes <= most


def _fill(
    report: Report, checks: list[Check], seen: dict[str, _Seen], memory: list[int], clients: Clients
) -> None:
    """Add rows and tables."""
    for kind, one in seen.items():
        times = one.seconds or [0.0]
        report.rows.append(
            {
                "kind": kind,
                "requests": len(one.seconds) * (BURST if kind == FLOOD else 1),
                "wrong": len(one.wrong),
                "seconds": statistics.median(times),
                "seconds_max": max(times),
            }
        )
    report.rows += [{"check": check.what, "value": check.value, "holds": check.holds} for check in checks]
    body = (
        [
            row["kind"],
            f"{row['requests']:,}",
            str(row["wrong"]),
            *(f"{row[key]:.3f}" for key in ("seconds", "seconds_max")),
        ]
        for row in report.rows
        if "kind" in row
    )
    parts = [f"{number}/{PARTS}" for number in range(1, PARTS + 1)]
    report.tables = [
        table("soak: requests", ["", "sent", "wrong", "seconds, median", "longest"], body),
        table("soak: resident set, MB", ["after", *parts], [["", *(f"{one / 1e6:,.0f}" for one in memory)]]),
        table(
            "soak: checks",
            ["", "found", ""],
            ([check.what, check.value, "ok" if check.holds else "VIOLATED"] for check in checks),
        ),
    ]
    report.notes.append(
        f"{MODEL} with {SLOTS} slots and a queue of {QUEUE}; {CLIENTS} clients at a time, floods of {BURST}. "
        f"{clients.refused:,} requests of floods got 429, and {clients.again:,} others, then sent again."
    )
