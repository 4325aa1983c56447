"""One run of `longscan bench`: its suites one by one, and the machine they ran on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from longscan.bench.machine import OthersLoad, machine, versions
from longscan.bench.measure import Settings
from longscan.bench.report import Report
from longscan.bench.suites import (
    evaluate,
    finetune,
    generate,
    grammar,
    ops,
    position,
    serve,
    shipped,
    stream,
    train,
    train_long,
    translate,
    vision,
)
from longscan.core.optional import EXTRAS

__all__ = ["SUITES", "about", "heading", "install_peers", "missing_peers", "run"]

SUITES = {
    "ops": ops.run,
    "train": train.run,
    "finetune": finetune.run,
    "generate": generate.run,
    "translate": translate.run,
    "shipped": shipped.run,
    "position": position.run,
    "stream": stream.run,
    "vision": vision.run,
    "serve": serve.run,
    "grammar": grammar.run,
    "evaluate": evaluate.run,
}
PEERS = ("mambapy", "transformers", "peft", "llama-cpp-python")
BUSY = 0.03  # share of the machine that others may take unnoted


def run(
    suite: str,
    settings: Settings,
    quick: bool = False,
    shape: str = "130m",
    precision: str = "int8",
    long: bool = False,
) -> Report:
    """Return the report of a suite, with notes on what its numbers are worth.

    Args:
        suite: of SUITES.
        settings: of the benchmark.
        quick: tiny sizes, to see that it works.
        shape: of the suite generate.
        precision: of the suite serve.
        long: whether the suite train measures long sequences instead.
    """
    others = OthersLoad()
    measure: Callable[[Settings, bool], Report] = SUITES[suite]
    if suite == "generate":
        measure = partial(generate.run, shape=shape)
    elif suite == "serve":
        measure = partial(serve.run, precision=precision)
    elif suite == "train" and long:
        measure = train_long.run
    report = measure(settings, quick)
    report.others = others.share()
    if report.others is not None and report.others > BUSY:
        report.notes.append(
            f"Other processes took {report.others:.0%} of the machine meanwhile: measure again."
        )
    if quick:
        report.ratios = [replace(ratio, goal="") for ratio in report.ratios]
        report.notes.append("Tiny sizes, only to see that everything runs; the goals are for the full ones.")
    return report


def about(settings: Settings, quick: bool) -> dict[str, Any]:
    """Return what the numbers are measured on and how, as plain values.

    Args:
        settings: of the benchmark.
        quick: whether sizes are tiny.
    """
    return {
        "machine": machine(settings.threads),
        "versions": versions(),
        "repeats": settings.repeats,
        "quick": quick,
    }


def heading(about: dict[str, Any]) -> str:
    """Return three lines of text.

    Args:
        about: of the function `about`.
    """
    here = about["machine"]
    parts = (
        here["cpu"],
        f"cores {here['cores']}",
        f"threads {here['threads']}",
        f"memory {here['memory_bytes'] / 2**30:.0f} GiB",
        here["system"],
        f"kernels {here['backend']}",
    )
    packages = (f"{name} {version}" for name, version in about["versions"].items())
    how = f"turns {about['repeats']}, alternating, each after a first run; medians (lowest–highest)"
    return "\n".join([" · ".join(parts), " · ".join(packages), how])


def missing_peers(settings: Settings) -> list[str]:
    """Return the peers that are not installed; none if peers are excluded.

    Args:
        settings: of the benchmark.
    """
    return [package for package in PEERS if settings.peers and not settings.installed(package)]


def install_peers(packages: Sequence[str]) -> str:
    """Return how to install peers.

    Args:
        packages: of `missing_peers`.
    """
    extras = ",".join(dict.fromkeys(EXTRAS[package][1] for package in packages))
    return f"not installed: {', '.join(packages)}; to compare with them: pip install 'longscan[{extras}]'"
