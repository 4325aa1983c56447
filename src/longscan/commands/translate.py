"""`longscan translate`: train a translator, evaluate it, translate with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longscan.checkpoints.load import load_translator
from longscan.commands._options import Json, JsonLines, Threads
from longscan.commands._run import Out, Recipe, Resume, finished, run_command
from longscan.commands._settings import add_flags
from longscan.core.checks import check_range, check_whole
from longscan.core.files import atomic_write, utf8
from longscan.core.runtime import use_threads
from longscan.data.sentence_pairs import read_pairs
from longscan.errors import UsageError
from longscan.evaluation.bleu import TOKENIZERS
from longscan.evaluation.translation import measure
from longscan.inference.translate import describe, translate
from longscan.training.translation import BLOCK, TranslateConfig, TranslateRun

__all__ = ["commands", "text"]


def train(
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Train a translator on sentence pairs, or resume a run.

    --source and --target are files of one sentence per line, where line n of one translates line n of the
    other; or --source alone is a table of two tab-separated columns. Both may be .gz or .xz. The directory
    --out receives the tokenizer, checkpoints, metrics.jsonl, loss.png and in the end model/, the average of
    the last checkpoints, for `longscan translate evaluate` and `text`. Ctrl-C stops after the current step.

    Args:
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of TranslateConfig.

    Raises:
        UsageError: flags that contradict each other or have invalid values.
    """
    result = run_command(TranslateRun, out, resume_from, recipe, settings)
    measured = f"perplexity {result.valid:.2f} on held-out pairs"
    finished(result, measured, f'translate text {result.directory / "model"} "..."')


add_flags(train, TranslateConfig)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A translator's directory.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Source sentences, one per line; without REFERENCE, a table of two columns.",
        ),
    ],
    reference: Annotated[
        Path | None, typer.Argument(metavar="REFERENCE", help="Reference translations, line by line.")
    ] = None,
    beam: Annotated[int, typer.Option(help="Beam width; 1 = greedy.")] = 5,
    length_penalty: Annotated[
        float, typer.Option(help="Length penalty: above 0 favours long translations.")
    ] = 0.6,
    tokenize: Annotated[str, typer.Option(help="BLEU tokenizer of sacrebleu: 13a, zh, char, ...")] = "13a",
    out: Annotated[Path | None, typer.Option(help="Write the translations to this file.")] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """BLEU, chrF and perplexity of a translator, and BLEU by source length.

    Pairs with an empty side are left out. The numbers are sacrebleu's, with its signatures.
    `longscan plot bleu` draws the JSON of several translators.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: a file can't be read, or a sentence is too long for the model.
    """
    if tokenize not in TOKENIZERS:
        raise UsageError(f"--tokenize: expected one of {', '.join(TOKENIZERS)}, got {tokenize!r}.")
    _check_search(beam, length_penalty)
    use_threads(threads)
    network, tokenizer = load_translator(model)
    pairs = read_pairs(source, reference)
    typer.echo(f"{pairs} · {describe(network)}", err=True)
    report = {
        "model": model,
        "parameters": network.num_parameters(),
        "beam": beam,
        "length_penalty": length_penalty,
        **measure(network, tokenizer, pairs, beam, length_penalty, tokenize),
    }
    hypotheses = report.pop("translations")
    if out is not None:
        atomic_write(out, "".join(f"{line}\n" for line in hypotheses))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    typer.echo(f"BLEU {report['bleu']:.2f}   {report['bleu_signature']}")
    typer.echo(f"chrF {report['chrf']:.2f}   {report['chrf_signature']}")
    typer.echo(
        f"perplexity {report['perplexity']:.2f}   {report['sentences']:,} sentences in "
        f"{report['seconds']:.1f} s ({report['sentences_per_second']:.1f}/s)"
    )
    typer.echo("source words   sentences   BLEU")
    for row in report["by_length"]:
        typer.echo(f"{row['words']:>12} {row['sentences']:>11,} {row['bleu']:>6.2f}")


def text(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A translator's directory.")],
    sentences: Annotated[
        list[str] | None,
        typer.Argument(metavar="SENTENCES", help="Sentences to translate; default: the lines of stdin."),
    ] = None,
    beam: Annotated[int, typer.Option(help="Beam width; 1 = greedy.")] = 5,
    length_penalty: Annotated[
        float, typer.Option(help="Length penalty: above 0 favours long translations.")
    ] = 0.6,
    as_json: JsonLines = False,
    threads: Threads = None,
) -> None:
    """Translate sentences, the lines of stdin, or those typed at the prompt.

    Prints one translation per line; an empty line gives an empty one.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model can't be read, or a sentence is too long for it.
    """
    _check_search(beam, length_penalty)
    use_threads(threads)
    network, tokenizer = load_translator(model)

    def answer(lines: list[str]) -> None:
        translations = translate(network, tokenizer, lines, beam_size=beam, length_penalty=length_penalty)
        for line, each in zip(lines, translations, strict=True):
            shown = {"source": line, "translation": each.text, "score": each.score}
            typer.echo(json.dumps(shown, ensure_ascii=False) if as_json else each.text)

    if sentences:
        answer(sentences)
    elif sys.stdin.isatty():
        typer.echo(f"{describe(network)} · one sentence per line, Ctrl-D ends", err=True)
        while line := _prompt():
            answer([line.rstrip("\n")])
    else:
        lines = utf8(sys.stdin.buffer.read(), "stdin").removeprefix("\ufeff").removesuffix("\n").split("\n")
        for start in range(0, len(lines), BLOCK):
            answer(lines[start : start + BLOCK])


commands = {"train": train, "evaluate": evaluate, "text": text}


def _prompt() -> str:
    """Return the next typed line, "" at the end."""
    typer.echo("> ", nl=False, err=True)
    return sys.stdin.readline()


def _check_search(beam: int, length_penalty: float) -> None:
    """Raise UsageError if a number is out of range."""
    check_whole("--beam", beam, 1)
    check_range("--length-penalty", length_penalty, least=0, below=100, error=UsageError)
