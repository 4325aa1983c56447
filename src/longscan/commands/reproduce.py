"""`longscan reproduce`: published experiments on this machine, the published results beside ours.

An experiment is a file of the room `reproduce`: it names the systems to train, what was published about them
and how ours differ.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from longscan.commands._options import AsJson, Threads
from longscan.core.config import nearest
from longscan.errors import UsageError

__all__ = ["EXPERIMENTS", "command"]

#: name -> the line that describes it; the module has the same name, with underscores
EXPERIMENTS = {
    "multi30k": "English to German: no attention, Bahdanau, Luong and the Transformer, one vocabulary.",
    "en-zh": "English to Chinese: a Transformer on real software texts.",
    "bert": "A small BERT from scratch: masked tokens and next sentences of held-out text.",
    "movie-snippets": "Sentiment: a fine-tuned MiniLM beside TF-IDF with logistic regression.",
    "authors": "Who wrote this? The shipped model learns to answer, by LoRA and with all weights.",
    "hippo": "A million samples in 256 numbers: LegS, the LMU, and the floor (HiPPO, section 4.3).",
    "discretization": "HiPPO-LegS by four discretisations, against the length of the signal.",
    "s4-cost": "Time and memory against length: S4, LSSL, a Transformer layer (S4, tables 2 and 3).",
    "h3-recall": "Associative recall and induction: attention, S4D, H3 and Mamba (H3, table 1).",
    "selective-copying": "Copy some of many tokens: a fixed state fails (Mamba, table 1).",
    "state-tracking": "Parity and arithmetic with remainders, up to 8 times the trained length (Mamba-3).",
    "mqar": "Many keys, many queries: accuracy against the width and the size of the state (Zoology).",
    "ablations": "Mamba without its gate, with constant Δ, B or C, and more (Mamba, tables 6 to 10).",
    "induction": "Trained on 256 tokens, tested on up to 1,048,576 (Mamba, table 2).",
    "long-dependency": "An answer 100,000 tokens after its cue: exact and truncated gradients.",
    "digits": "Spoken digits from raw samples, also at half the rate.",
    "vowels": "Speaker identification: twelve channels of Japanese vowels, also at half the rate.",
    "irregular": "The vowels with half of the steps dropped: a neural ODE on their times, and others.",
    "hippo-ablation": "Images pixel by pixel: S4 initialised with HiPPO's matrix, or with a random one.",
    "vision": "VMamba, Vim, a ViT and a ResNet of equal size on three sets of small images.",
    "resolution": "The models of `vision` from 64 to 1,024 pixels: accuracy, time and memory.",
    "video": "Clips whose label is the order of their frames: VideoMamba, the mean over single frames.",
}


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The experiment; without it they are listed.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of its data.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to fine-tune, for movie-snippets: a directory or hub id.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory of runs and results; finished runs in it are reused.")
    ] = Path("runs"),
    full: Annotated[bool, typer.Option("--full", help="The largest version: more seeds, more data.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps: to see that it works, not to quote.")
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Repeat a published experiment and print the published results beside those measured here.

    Finished runs in --out are not trained again; Ctrl-C stops after the current step, and the same command
    resumes. The results are NAME.json and NAME.png in --out; they say "reduced" where the experiment is
    smaller than the published one.

    Args:
        name: of an experiment.
        data: the directory of its files.
        model: the checkpoint to fine-tune; each experiment that fine-tunes has a default.
        out: receives a directory for each system.
        full: several seeds, all of the data.
        quick: a few steps.
        threads: at least 1.
        as_json: for programs.

    Raises:
        UsageError: there is no such experiment, or flags contradict each other.
        LongscanError: data are missing, or a run was made with other settings.
        typer.Exit: a signal stopped it.
    """
    if name is None:
        for known, line in EXPERIMENTS.items():
            typer.echo(f"{known:{max(map(len, EXPERIMENTS))}} {line}")
        return
    if name not in EXPERIMENTS:
        raise UsageError(f"no experiment called {name!r}{nearest(name, EXPERIMENTS)}")
    if full and quick:
        raise UsageError("--full and --quick: expected one of them, got both.")
    module = importlib.import_module(f"longscan.reproduce.{name.replace('-', '_')}")
    if data is None and module.FILES:
        raise UsageError(f"--data: expected the directory with {', '.join(module.FILES)}.")
    if data is not None and not module.FILES:
        raise UsageError(f"--data: {name} makes its own data. Leave it out.")
    start = getattr(module, "MODEL", None)
    if model is not None and start is None:
        raise UsageError(f"--model: {name} trains its models from scratch. Leave it out.")
    from longscan.commands._run import exit_stopped
    from longscan.core.progress import Terminal
    from longscan.reproduce.experiment import Plan, StoppedError

    plan = Plan(
        name=name,
        data=data,
        out=out,
        full=full,
        quick=quick,
        threads=threads,
        model=model or start,
        notify=partial(typer.echo, err=True),
        display=partial(Terminal, 100),
    )
    plan.check(module.FILES, module.SOURCE)
    try:
        report = module.run(plan)
    except StoppedError as stop:
        exit_stopped(stop.result, "the same command resumes")
    typer.echo(json.dumps(report, ensure_ascii=False, indent=2) if as_json else module.show(report))
