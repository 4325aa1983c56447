"""`longscan bench`: ours, the peers that happen to be installed and the machine's ceiling, in one sitting.

A suite (ops, train, generate, translate, shipped, stream) is a file that lists cases and contenders; `race`
measures these in fresh processes that take turns; what a process runs stands in `ours`, `peers`, `llama`,
`translators` and `ceilings`. The suites text and quality are no races: they measure predictions, on files
that the user names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from longscan.core.config import nearest
from longscan.errors import UsageError

__all__ = ["SUITES", "command"]

SUITES = ("ops", "train", "generate", "translate", "shipped", "stream")
TEXT, QUALITY = "text", "quality"
SHIPPED, SEPARATOR = "longscan-tiny-en", "\n\n\n"  # the model and what parts the documents it learnt from


def command(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="ops, train, generate, translate, shipped, stream; all when left out. Or text or quality."
        ),
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
    shape: Annotated[
        Literal["130m", "370m"], typer.Option(help="generate: the size of the random model.")
    ] = "130m",
    train: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="text: files or folders to count in; repeatable."),
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text, quality: those to predict; repeatable.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="text, quality: a shipped model, a directory, or a hub id.")
    ] = SHIPPED,
    separator: Annotated[
        str,
        typer.Option(
            help="text, quality: what parts the documents of a file.", show_default="two empty lines"
        ),
    ] = SEPARATOR,
) -> None:
    """Measure this machine: longscan, the peers that are installed, and what the hardware allows.

    Every contender runs in a fresh process; they take turns. Numbers are medians with their range. Everything
    takes more than an hour, generate a third of that, ops a few minutes; leave the machine alone meanwhile.

    The suite text asks how well a model knows text that is held out: bits per byte of the model, of a 5-gram
    that counted the training text, and of xz. It needs --train and --test. The suite quality asks what the
    formats of `longscan quantize` cost on --test: bits per byte, and how far the predictions move.

    Args:
        suites: which.
        as_json: for programs.
        figure: where to draw.
        repeats: at least 1.
        peers: whether to run what is not ours.
        threads: at least 1.
        quick: for a look.
        shape: of the suite generate.
        train: of the suite text alone.
        test: of text and quality, as what follows; never counted in, even if it is found under `train`.
        model: what is measured.
        separator: as in `longscan.documents`.

    Raises:
        UsageError: there is no such suite, a number makes no sense, or an option is of another suite.
    """
    for name, value in (("--repeats", repeats), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected 1 or more, got {value}.")
    for suite in suites or ():
        if suite not in (*SUITES, TEXT, QUALITY):
            raise UsageError(f"no suite called {suite!r}{nearest(suite, (*SUITES, TEXT, QUALITY))}")
    chosen = list(dict.fromkeys(suites or SUITES))
    # the workers import this page too, and need nothing of what is imported from here on
    if TEXT not in chosen and QUALITY not in chosen:
        if train or test or (model, separator) != (SHIPPED, SEPARATOR):
            raise UsageError(
                "--train, --test, --model and --separator are for the suites text and quality: name one."
            )
        from longscan.bench.runner import sit

        sit(chosen, as_json, figure, repeats, peers, threads, quick, shape)
        return
    if len(chosen) > 1 or figure or quick or not peers or (repeats, shape) != (5, "130m"):
        raise UsageError(
            f"{TEXT if TEXT in chosen else QUALITY} is no race: expected no other suite beside it, and no "
            "options but --train, --test, --model, --separator, --threads and --json."
        )
    if chosen == [QUALITY]:
        if train or not test:
            raise UsageError("quality: expected --test FILE, the text to predict, and no --train.")
        from longscan.bench.suites.quality import show as show_quality

        show_quality(model, test, separator, as_json, threads)
        return
    if not (train and test):
        raise UsageError("text: expected --train FILE and --test FILE, the text to count in and to predict.")
    from longscan.bench.suites.text import show

    show(model, train, test, separator, as_json, threads)
