"""`longscan bench`: ours, the peers that happen to be installed and the machine's ceiling, in one sitting.

A suite (ops, train, generate, stream) is a file that lists cases and contenders; `race` measures these in
fresh processes that take turns; what a process runs stands in `ours`, `peers` and `ceilings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longscan.config import nearest
from longscan.errors import UsageError

__all__ = ["SUITES", "command"]

SUITES = ("ops", "train", "generate", "stream")


def command(
    suites: Annotated[
        list[str] | None, typer.Argument(help="ops, train, generate, stream; all of them when left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the results into this .png, .svg or .pdf.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 5,
    peers: Annotated[bool, typer.Option(help="Measure the others too, not only longscan.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Threads for everyone; torch's choice when left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: to see that it runs, not to quote.")
    ] = False,
) -> None:
    """Measure this machine: longscan, the peers that are installed, and what the hardware allows.

    Every contender runs in a fresh process; they take turns. Numbers are medians with their range. Everything
    takes about half an hour, ops a few minutes; leave the machine alone meanwhile.

    Args:
        suites: which.
        as_json: for programs.
        figure: where to draw.
        repeats: at least 1.
        peers: whether to run what is not ours.
        threads: at least 1.
        quick: for a look.

    Raises:
        UsageError: there is no such suite, or a number makes no sense.
    """
    for name, value in (("--repeats", repeats), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected 1 or more, got {value}.")
    for suite in suites or ():
        if suite not in SUITES:
            raise UsageError(f"no suite called {suite!r}{nearest(suite, SUITES)}")
    from longscan.bench.sitting import sit  # the workers import this page too, and need nothing of that

    sit(list(dict.fromkeys(suites or SUITES)), as_json, figure, repeats, peers, threads, quick)
