"""`longscan bench`: longscan beside the installed peers and the ceilings of the hardware.

The suites ops, train, finetune, generate, translate, shipped, position, stream, vision and serve compare
speed and memory; grammar measures what structured output costs and whether it holds; evaluate compares speed
and log-likelihoods in tasks of lm-evaluation-harness; text and quality measure predictions, on files that the
user names. `serve --soak` tests a server under load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from longscan.bench import figure as figures
from longscan.bench import runner
from longscan.bench.machine import machine, versions
from longscan.bench.measure import Settings
from longscan.bench.report import Report
from longscan.bench.suites import quality, serve, soak, text
from longscan.commands._options import AsJson, Threads
from longscan.core.config import nearest
from longscan.core.optional import require
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.data.documents import Corpus
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.perplexity import Evaluation

__all__ = ["command"]

TEXT, QUALITY, SERVE = "text", "quality", "serve"
PRECISION = "int8"
SUITES = (*runner.SUITES, TEXT, QUALITY)
REPEATS = 5
GENERATE = ("mamba", "mamba2", "falcon-h1", "granite-h")
SHIPPED, SEPARATOR = "longscan-tiny-en", "\n\n\n"  # the shipped model, and the separator of its training text

Files = list[Path] | None


def command(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUITES",
            help=f"{', '.join(runner.SUITES)}; default: all. Or text, quality.",
        ),
    ] = None,
    as_json: AsJson = False,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the results: a .png, .svg or .pdf file.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = REPEATS,
    peers: Annotated[bool, typer.Option(help="Measure the peers too, not only longscan.")] = True,
    threads: Threads = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: to see that it works, not to quote.")
    ] = False,
    shape: Annotated[Literal["130m", "370m"], typer.Option(help="generate: the size of the Mamba.")] = "130m",
    precision: Annotated[
        str, typer.Option(help=f"serve: the precision of the weights: {', '.join(serve.PRECISIONS)}.")
    ] = PRECISION,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="train: instead sequences of up to a million tokens, in chunks; gradients are exact.",
        ),
    ] = False,
    soak_requests: Annotated[
        int | None,
        typer.Option(
            "--soak",
            metavar="N",
            help="serve: instead send N requests of all kinds, 20000 say, and check that nothing breaks.",
        ),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="text: training files or folders of the n-gram model; repeatable."),
    ] = None,
    test: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="text, quality: held-out files; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"generate: {', '.join(GENERATE)}; default: mamba. text, quality: a shipped model, a "
            f"directory, or a hub id; default: {SHIPPED}."
        ),
    ] = None,
    separator: Annotated[
        str,
        typer.Option(help="text, quality: between the documents of a file.", show_default="two empty lines"),
    ] = SEPARATOR,
) -> None:
    """Benchmark this machine: longscan, the installed peers, and what the hardware allows.

    Every contender runs in a fresh process, and they take turns. Numbers are medians with their range. All
    suites take more than an hour, generate a third of that, ops a few minutes; leave the machine idle
    meanwhile.

    The suite text measures bits per byte on held-out text: of the model, of a 5-gram model of the training
    text, and of xz. It needs --train and --test. The suite quality measures what the precisions of `longscan
    quantize` cost on --test: bits per byte, and how far the predictions move.

    With --soak the suite serve tests a server instead of timing it: answers under load, with clients that
    leave, flood and send nonsense, must be those of an engine that has nothing else to do, and memory must
    not grow. If something is violated, the exit status is 1.

    Args:
        suites: names.
        as_json: for programs.
        figure: the figure's file.
        repeats: at least 1.
        peers: whether to run the peers.
        threads: at least 1.
        quick: tiny sizes.
        shape: of Mamba in the suite generate.
        precision: of the weights in the suite serve.
        long: whether the suite train measures long sequences.
        soak_requests: of a soak test; None measures.
        train: of the suite text alone.
        test: of text and quality, as what follows; excluded from the training text.
        model: the one to measure.
        separator: as in `longscan.documents`.

    Raises:
        UsageError: there is no such suite, a number makes no sense, or an option is of another suite.
        LongscanError: a check of the soak test failed.
    """
    for name, value in (("--repeats", repeats), ("--threads", threads), ("--soak", soak_requests)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected 1 or more, got {value}.")
    chosen = _chosen(suites)
    changed = figure or quick or not peers or (repeats, shape, precision) != (REPEATS, "130m", PRECISION)
    if long and "train" not in chosen:
        raise UsageError("--long: is for the suite train, name it.")
    if soak_requests is not None:
        if chosen != [SERVE] or changed or train or test or model or separator != SEPARATOR:
            raise UsageError(
                "--soak: expected the suite serve alone, and no options but --threads and --json."
            )
        _soak(soak_requests, threads, as_json)
        return
    alone = next((suite for suite in (TEXT, QUALITY) if suite in chosen), None)
    if alone is None:
        if train or test or separator != SEPARATOR:
            raise UsageError("--train, --test and --separator are for the suites text and quality: name one.")
        size = _size(chosen, model, shape)
        if precision not in serve.PRECISIONS:
            raise UsageError(f"--precision: no {precision!r}{nearest(precision, serve.PRECISIONS)}")
        if precision != PRECISION and SERVE not in chosen:
            raise UsageError(f"--precision {precision}: is for the suite serve, name it too.")
        settings = Settings(
            repeats=repeats,
            budget=0.05 if quick else 0.5,
            threads=threads or torch.get_num_threads(),
            peers=peers,
        )
        _compare(chosen, settings, quick, (size, precision, long), figure, as_json)
        return
    if len(chosen) > 1 or changed:
        raise UsageError(
            f"{alone} runs alone: expected no other suite beside it, and no options but --train, --test, "
            "--model, --separator, --threads and --json."
        )
    use_threads(threads)
    model = SHIPPED if model is None else model
    if alone == TEXT:
        _text(model, train, test, separator, as_json)
    else:
        _quality(model, train, test, separator, as_json)


def _chosen(suites: list[str] | None) -> list[str]:
    """Return the suites to run, each once."""
    for suite in suites or ():
        if suite not in SUITES:
            raise UsageError(f"no suite called {suite!r}{nearest(suite, SUITES)}")
    return list(dict.fromkeys(suites or runner.SUITES))


def _size(suites: list[str], model: str | None, shape: str) -> str:
    """Return the model of the suite generate, as `runner.run` has it."""
    if "generate" not in suites and shape != "130m":
        raise UsageError(f"--shape {shape}: is for the suite generate, name it too.")
    if model is None:
        return shape
    if "generate" not in suites:
        raise UsageError("--model: expected the suite generate, text or quality beside it.")
    if model not in GENERATE:
        raise UsageError(
            "--model: a directory or a hub id is for the suites text and quality; generate has no "
            f"{model!r}{nearest(model, GENERATE)}"
        )
    if model != "mamba" and shape != "130m":
        raise UsageError(f"--shape {shape}: is for --model mamba, the others have one size.")
    return shape if model == "mamba" else model


def _compare(
    suites: list[str],
    settings: Settings,
    quick: bool,
    options: tuple[str, str, bool],
    figure: Path | None,
    as_json: bool,
) -> None:
    """Run suites of speed and memory and print their reports."""
    if figure is not None:
        figures.check(figure)
    about = runner.about(settings, quick)
    if not as_json:
        typer.echo(runner.heading(about))
    reports = []
    with _progress() as notify:
        settings = replace(settings, notify=notify)
        for suite in suites:
            reports.append(runner.run(suite, settings, quick, *options))
            if not as_json:
                typer.echo("\n" + reports[-1].text())
    absent = runner.missing_peers(settings)
    if as_json:
        _print_json(about | {"missing_peers": absent}, reports)
    elif absent:
        typer.echo(f"\n{runner.install_peers(absent)}")
    if figure is not None:
        figures.draw(reports, runner.heading(about), figure)
        typer.echo(f"figure: {figure}", err=True)


def _soak(n: int, threads: int | None, as_json: bool) -> None:
    """Run the soak test and print its report."""
    require("fastapi", "servers")
    require("uvicorn", "servers")
    settings = Settings(threads=threads or torch.get_num_threads())
    if not as_json:
        typer.echo(runner.heading(runner.about(settings, quick=False)) + "\n")
    with _progress() as notify:
        found = soak.run(n, replace(settings, notify=notify))
    if as_json:
        _print_json({"machine": machine(settings.threads), "versions": versions()}, [found.report])
    else:
        typer.echo(found.report.text())
    if found.violations:
        what = "; ".join(check.what for check in found.violations)
        raise LongscanError(f"soak: {len(found.violations)} of {len(found.checks)} checks failed: {what}.")


def _text(model: str, train: Files, test: Files, separator: str, as_json: bool) -> None:
    """Run the suite text and print its report."""
    if not (train and test):
        raise UsageError("text: expected --train FILE and --test FILE, the training and the held-out text.")
    corpus = Corpus(train, test, separator=separator)
    with _evaluating() as show:
        report = text.load_and_run(model, corpus, partial(typer.echo, err=True), show)
    if as_json:
        _print_json(_about_model(model), [report])
    else:
        typer.echo(report.text())


def _quality(model: str, train: Files, test: Files, separator: str, as_json: bool) -> None:
    """Run the suite quality and print its report."""
    if train or not test:
        raise UsageError("quality: expected --test FILE, the held-out text, and no --train.")
    with _evaluating() as show:
        report = quality.load_and_run(model, test, separator, show)
    if as_json:
        _print_json(_about_model(model), [report])
    else:
        typer.echo(f"{model}\n\n{report.text()}")


def _about_model(model: str) -> dict[str, Any]:
    """Return what a model's predictions are measured on, as plain values."""
    return {"machine": machine(torch.get_num_threads()), "versions": versions(), "model": model}


def _print_json(about: dict[str, Any], reports: list[Report]) -> None:
    """Print reports as one JSON object."""
    suites = [report.as_dict() for report in reports]
    typer.echo(json.dumps(about | {"suites": suites}, indent=2, ensure_ascii=False))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield what shows lines of progress on stderr: one changing line on a terminal, else a line each."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield partial(typer.echo, err=True)
        return
    with console.status("") as status:
        yield status.update


@contextmanager
def _evaluating() -> Iterator[Callable[[Evaluation, int], None]]:
    """Yield what shows a progress bar of an evaluation."""
    bar = Bar()

    def show(now: Evaluation, n_bytes: int) -> None:
        bar.show("evaluating", now.bytes, n_bytes, f"{now.bits_per_byte:.3f} bits/byte")

    try:
        yield show
    finally:
        bar.clear()
