"""One sitting of `longscan bench`: the suites in turn, said aloud as they finish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from longscan.bench import figure as drawing
from longscan.bench.machine import OthersLoad, installed, machine, versions
from longscan.bench.measure import Pace
from longscan.bench.report import Report
from longscan.bench.suites import generate, ops, shipped, stream, train, translate

__all__ = ["sit"]

SUITES = {
    "ops": ops.run,
    "train": train.run,
    "generate": generate.run,
    "translate": translate.run,
    "shipped": shipped.run,
    "stream": stream.run,
}
PEERS = {"mambapy": "peers", "transformers": "peers", "llama-cpp-python": "llama"}  # and the extra with it


def sit(
    suites: list[str],
    as_json: bool,
    figure: Path | None,
    repeats: int,
    peers: bool,
    threads: int | None,
    quick: bool,
    shape: str,
) -> None:
    """Run suites and print what they found.

    Args:
        suites: names of SUITES.
        as_json: whether to print one JSON object at the end instead of text on the way.
        figure: where to draw, if anywhere.
        repeats: turns of each contender.
        peers: whether to run what is not ours.
        threads: for everyone; torch's choice if None.
        quick: whether to use tiny sizes.
        shape: of the suite generate.

    Raises:
        LongscanError: the figure could not be drawn.
    """
    if figure is not None:
        drawing.check(figure)
    threads = threads or torch.get_num_threads()
    absent = [package for package in PEERS if peers and not installed(package)]
    about = {"machine": machine(threads), "versions": versions(), "repeats": repeats, "quick": quick}
    if not as_json:
        typer.echo(_heading(about))
    reports = []
    with _progress() as tell:
        pace = Pace(repeats=repeats, budget=0.05 if quick else 0.5, threads=threads, peers=peers, tell=tell)
        for suite in suites:
            reports.append(_run(suite, pace, quick, shape))
            if not as_json:
                typer.echo("\n" + reports[-1].text(shutil.get_terminal_size((120, 24)).columns))
    if as_json:
        found = {"missing_peers": absent, "suites": [report.as_dict() for report in reports]}
        typer.echo(json.dumps(about | found, indent=2, ensure_ascii=False))
    elif absent:
        extras = ",".join(dict.fromkeys(PEERS[package] for package in absent))
        typer.echo(
            f"\nnot installed: {', '.join(absent)}; to compare with them: pip install 'longscan[{extras}]'"
        )
    if figure is not None:
        drawing.draw(reports, _heading(about), figure)
        typer.echo(f"figure: {figure}", err=True)


def _run(suite: str, pace: Pace, quick: bool, shape: str) -> Report:
    """Run a suite and note what a reader of its numbers has to know."""
    others = OthersLoad()
    report = generate.run(pace, quick, shape) if suite == "generate" else SUITES[suite](pace, quick)
    report.others = others.share()
    if report.others is not None and report.others > 0.03:
        report.notes.append(
            f"Other processes took {report.others:.0%} of the machine meanwhile: measure again."
        )
    if quick:
        report.ratios = [replace(ratio, goal="") for ratio in report.ratios]
        report.notes.append("Tiny sizes, only to see that everything runs; the goals are for the full ones.")
    return report


def _heading(about: dict[str, Any]) -> str:
    """Say what the numbers were measured on, and how."""
    here = about["machine"]
    machine = (
        here["cpu"],
        f"cores {here['cores']}",
        f"threads {here['threads']}",
        f"memory {here['memory_bytes'] / 2**30:.0f} GiB",
        here["system"],
        f"kernels {here['backend']}",
    )
    versions = (f"{name} {version}" for name, version in about["versions"].items())
    how = f"turns {about['repeats']}, alternating, each after a first run; medians (lowest–highest)"
    return "\n".join([" · ".join(machine), " · ".join(versions), how])


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being measured: one changing line on a terminal, else a line each."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: typer.echo(line, err=True)
        return
    with console.status("") as status:
        yield status.update
