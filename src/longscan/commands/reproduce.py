"""`longscan reproduce`: published experiments on this machine, their numbers beside ours.

An experiment is a file: `multi30k`, `en_zh`. It names the systems to train, what was published about them and
what differs; `systems` trains what isn't trained yet, measures, and remembers.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import typer

from longscan.core.config import nearest
from longscan.errors import UsageError

__all__ = ["EXPERIMENTS", "command"]

#: name -> the line that describes it; the module is called the same, with underscores
EXPERIMENTS = {
    "multi30k": "English to German: no attention, Bahdanau, Luong and the Transformer, one vocabulary.",
    "en-zh": "English to Chinese: a Transformer on real software texts.",
    "bert": "A small BERT from scratch: hidden words and next sentences of held-out text.",
    "movie-snippets": "Kind or unkind: a fine-tuned MiniLM beside TF-IDF and logistic regression.",
    "hippo": "A million samples in 256 numbers: LegS, the LMU, and the floor (HiPPO, section 4.3).",
    "discretization": "HiPPO-LegS by four discretisations, against the length of the signal.",
    "s4-cost": "Time and memory against length: S4, LSSL, a Transformer layer (S4, tables 2 and 3).",
    "h3-recall": "Associative recall and induction: attention, S4D, H3 and Mamba (H3, table 1).",
    "selective-copying": "Keep some tokens of many: a fixed state fails (Mamba, table 1).",
    "induction": "Trained on 256 tokens, tried on up to 1,048,576 (Mamba, table 2).",
    "digits": "Spoken digits from raw samples, also at half the rate.",
    "vowels": "Who says it: twelve channels of Japanese vowels, also at half the rate.",
    "irregular": "The vowels with half of the steps lost: a neural ODE reads times, others places or gaps.",
    "hippo-ablation": "Images pixel by pixel: S4 that starts from HiPPO's matrix, or from a random one.",
}


def command(
    name: Annotated[str | None, typer.Argument(help="The experiment; without it they are listed.")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of its data.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to begin with, where one is: a directory or hub id.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory of the runs and results; finished runs are found there.")
    ] = Path("runs"),
    full: Annotated[bool, typer.Option("--full", help="As large as it gets: see the experiment.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps: to see that it runs, not to quote.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> None:
    """Repeat a published experiment and print its numbers beside those measured here.

    What is trained already, in --out, is not trained again; Ctrl-C stops in good order, the same command goes
    on. The results are NAME.json and NAME.png in --out; they say "reduced" where they are.

    Args:
        name: of an experiment.
        data: where its files are.
        model: what to fine-tune; each such experiment has one in mind.
        out: receives a directory for each system.
        full: several seeds, all of the data.
        quick: a few steps.
        threads: at least 1.
        as_json: for programs.

    Raises:
        UsageError: there is no such experiment, or flags contradict each other.
        LongscanError: data are missing, or a run was made with other settings.
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
    start = getattr(module, "MODEL", None)
    if model is not None and start is None:
        raise UsageError(f"--model: {name} trains its models from scratch. Leave it out.")
    from longscan.reproduce.experiment import Plan

    plan = Plan(name=name, data=data, out=out, full=full, quick=quick, threads=threads, model=model or start)
    plan.check(module.FILES, module.SOURCE)
    report = module.run(plan)
    typer.echo(json.dumps(report, ensure_ascii=False, indent=2) if as_json else module.show(report))
