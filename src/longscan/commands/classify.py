"""`longscan classify`: train, evaluate and use classifiers of texts and of whole sequences."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from longscan.checkpoints.bert import LoadedBert
from longscan.checkpoints.formats.sequence_classifier import is_sequence_model
from longscan.checkpoints.load import load
from longscan.commands._compare import allow_several, compare
from longscan.commands._input import read_stdin, tell_cut
from longscan.commands._run import Out, Recipe, Resume, finished, run_command
from longscan.commands._settings import add_flags
from longscan.core.config import count
from longscan.core.files import read_toml, utf8
from longscan.core.runtime import use_threads
from longscan.core.text_table import lay_out
from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.data.labeled_texts import (
    frame_examples,
    number_labels,
    read_examples,
)
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import measure, score, tfidf
from longscan.inference.bert import answer, predict, several
from longscan.inference.sequences import answers, to_rate
from longscan.models.sequence_classifier import BODIES, SequenceModel
from longscan.training.run import Run
from longscan.training.run_directory import SETTINGS, read_settings
from longscan.training.sequence_classifier import FILES, SequencesConfig, SequencesRun, check_bert
from longscan.training.text_classifier import ClassifyConfig, ClassifyRun

__all__ = ["commands", "evaluate_sequences", "predict_sequences", "train"]


def train(
    data: Annotated[list[str] | None, typer.Argument(help="Files of labelled texts.")] = None,
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Fine-tune a BERT on labelled texts, train any language model's blocks on sequences, or resume a run.

    With --model DIR of a BERT, DATA is a table, a row a line, columns parted by tabs, the first one the label
    and the second one the text unless --columns says otherwise; or .jsonl with "label" and "text". Both may
    be .gz or .xz.

    With --model NAME such as mamba, see `longscan models`, DATA may also be .npz files of x, y, lengths and
    times; .csv files with a sequence a row, the label first, or with a step a row, under a header of id,
    label, perhaps time, and channels; and folders or tars of .wav files, in a folder for each class or named
    LABEL_....wav; texts are read as bytes. The times of uneven series are read by --model neural_ode alone.
    There --lr is 0.003 unless given, --epochs 20, and --seq-len without end.

    --out receives checkpoints, metrics.jsonl, loss.png and in the end model/. Ctrl-C stops after the step in
    hand. With several --model NAME each has its run in --out, and their held-out accuracies are printed and
    drawn side by side; the same command resumes.

    Args:
        data: what to train on.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of ClassifyConfig and SequencesConfig.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
    """
    models = settings.pop("model") or []
    if len(models) > 1:
        compare(models, out, resume_from, recipe, {"data": data, **settings})
        return
    settings["model"] = models[0] if models else None
    given = {"data": data, **settings}
    found = _recipe(recipe) if resume_from is None else _settings(resume_from)
    model = str(settings["model"] or found.get("model", ""))
    sequences = model in BODIES
    run: type[Run[Any]] = SequencesRun if sequences else ClassifyRun
    fields = {entry.name for entry in dataclasses.fields(run.settings)}
    for name, value in given.items():
        if name not in fields and value not in (None, []):
            other = "a BERT" if sequences else "the blocks of a language model, --model NAME"
            raise UsageError(f"--{name.replace('_', '-')}: only {other} has it. Leave it out.")
    given = {name: value for name, value in given.items() if name in fields}
    if not sequences:
        check_bert(model, data or found.get("data"))
    result = run_command(run, out, resume_from, recipe, given)
    what, rest = ("sequences", "FILE") if sequences else ("texts", '"..."')
    measured = ""
    if "valid_accuracy" in result.scores:
        measured = f"accuracy {result.scores['valid_accuracy']:.1%} on held-out {what}"
    elif "valid_rmse" in result.scores:
        measured = f"root mean square error {result.scores['valid_rmse']:.4g} on held-out {what}"
    finished(result, measured, f"classify predict {result.directory / 'model'} {rest}")


@dataclass(frozen=True, kw_only=True)
class _Flags(ClassifyConfig, SequencesConfig):
    """What either kind of run is told."""


add_flags(train, _Flags)
allow_several(train, "model", " Repeat it to compare models of sequences.")


def _settings(directory: Path) -> dict[str, Any]:
    """Return what a run was told; if there is none, it is for the run to say so."""
    return read_settings(directory, ClassifyRun.verb) if (directory / SETTINGS).is_file() else {}


def _recipe(path: Path | None) -> dict[str, Any]:
    """Return what a recipe says; if it is none, it is for the run to say so."""
    try:
        return {} if path is None else read_toml(path)
    except (OSError, LongscanError):
        return {}


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A classifier's directory.")]

SeqLen = Annotated[int | None, typer.Option(help="Cut texts at so many tokens; the model's limit if None.")]

Threads = Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def evaluate(
    model: ModelArgument,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Labelled texts, as train takes them.")
    ],
    columns: Annotated[str, typer.Option(help="Where label and text stand in a table.")] = "1,2",
    baseline: Annotated[
        list[Path] | None,
        typer.Option(help="Also score TF-IDF and logistic regression, trained on this file. Repeatable."),
    ] = None,
    seq_len: SeqLen = None,
    pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose group is the label in a sound's path.")
    ] = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Accuracy and F1 on labelled texts, also by class; or on sequences.

    Raises:
        UsageError: a flag has an impossible value.
        LongscanError: the model or a file can't be read, or a label was not in the training data.
    """
    use_threads(threads)
    if is_sequence_model(model):
        _refuse(model, baseline=baseline, seq_len=seq_len)
        evaluate_sequences(model, files, columns, pattern, as_json)
        return
    _refuse(model, pattern=pattern)
    examples = read_examples(files, columns)
    found = load(model, "classifier")
    labels = found.model.config.labels
    if found.model.config.score != "softmax":
        raise LongscanError(
            f"{model} chooses no class: its {count(len(labels), 'output')} are scores, each by itself. "
            "Expected a model of two classes or more; longscan classify predict prints the scores."
        )
    truth = number_labels(examples, labels)
    framed = frame_examples(found.tokenizer, examples, _room(found, seq_len))
    scores = score(truth, predict(found.model, found.tokenizer, framed).argmax(1).tolist())
    report: dict[str, Any] = {"model": model, "texts": len(examples)}
    report |= {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
    if baseline:
        peer = score(truth, tfidf(read_examples(baseline, columns), examples, labels))
        report["tfidf"] = {"accuracy": peer.accuracy, "macro_f1": peer.macro_f1}
    fields = ("precision", "recall", "f1", "texts")
    classes = {labels[n]: dict(zip(fields, row, strict=True)) for n, row in scores.classes.items()}
    tell_cut(framed)
    if as_json:
        typer.echo(json.dumps({**report, "classes": classes}, ensure_ascii=False, indent=2))
        return
    typer.echo(
        f"accuracy {scores.accuracy:.4f} · macro-F1 {scores.macro_f1:.4f} · {count(len(examples), 'text')}"
    )
    if baseline:
        typer.echo(
            f"accuracy {peer.accuracy:.4f} · macro-F1 {peer.macro_f1:.4f} · TF-IDF + logistic regression"
        )
    table: list[tuple[str, ...]] = [("precision", "recall", "F1", "texts", "class")]
    for label, row in classes.items():
        shares = (f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.append((*shares, f"{row['texts']:,}", label))
    typer.echo("\n".join(lay_out(table, ">>>><")))


def predict_texts(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; without, the lines of stdin. For a model of sequences: files of them."),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Each is a pair of texts, parted by a tab.")] = False,
    seq_len: SeqLen = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Tell the classes of texts, or of the lines of stdin; or of sequences.

    A line each: the class, its probability, the text, parted by tabs; with --json all probabilities. Of a
    model with one output, such as a cross-encoder, its name and score; of labels that don't exclude each
    other, all above 0.5, or the likeliest.

    Raises:
        UsageError: a flag has an impossible value.
        LongscanError: the model can't be read, or a text is no pair.
    """
    use_threads(threads)
    if is_sequence_model(model):
        _refuse(model, pairs=pairs, seq_len=seq_len)
        predict_sequences(model, texts or [], as_json)
        return
    found = load(model, "classifier")
    texts = texts or read_stdin()
    if not texts:
        return
    parted = [text.split("\t") if pairs else [text] for text in texts]
    for number, parts in enumerate(parted, 1):
        if pairs and len(parts) != 2:
            raise LongscanError(f"text {number}: expected a pair parted by a tab, got {len(parts)} parts.")
    second = [parts[1] for parts in parted] if pairs else None
    framed = found.tokenizer.frame_batch([parts[0] for parts in parted], second, _room(found, seq_len))
    labels = found.model.config.labels
    scores = predict(found.model, found.tokenizer, framed)
    if found.model.config.score != "none":
        scores = scores.exp()
    for text, row in zip(texts, scores.tolist(), strict=True):
        if as_json:
            shown = {"text": text, **answer(found.model.config, dict(zip(labels, row, strict=True)))}
            typer.echo(json.dumps(shown, ensure_ascii=False))
        else:
            # of labels that don't exclude each other, all that apply
            chosen = [n for n, score in enumerate(row) if score > 0.5] if several(found.model.config) else []
            chosen = chosen or [max(range(len(row)), key=row.__getitem__)]
            names, numbers = ",".join(labels[n] for n in chosen), ",".join(f"{row[n]:.4f}" for n in chosen)
            typer.echo(f"{names}\t{numbers}\t{' '.join(text.splitlines())}")
    tell_cut(framed)


commands = {"train": train, "predict": predict_texts, "evaluate": evaluate}


def _refuse(model: str, **flags: Any) -> None:
    """Refuse flags that say nothing to a model."""
    for name, value in flags.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {model} has no use for it. Leave it out.")


def _room(found: LoadedBert, seq_len: int | None) -> int:
    """Return how many tokens of a text are read."""
    positions = found.model.config.max_positions
    if seq_len is not None and not 3 <= seq_len <= positions:
        raise UsageError(f"--seq-len: expected 3 to {positions}, the positions of the model, got {seq_len}.")
    return seq_len or positions


def evaluate_sequences(
    directory: str, files: Sequence[Path], columns: str, pattern: str | None, as_json: bool
) -> None:
    """Measure a model on labelled sequences and print it; see `classify evaluate`.

    Args:
        directory: of the model.
        files: see `read_sequences`.
        columns: likewise.
        pattern: likewise.
        as_json: for programs.
    """
    model = load(directory, "sequence")
    data = read_sequences(files, split="test", pattern=pattern, columns=columns)
    _fit(model, data)
    found = measure(model, data.labelled(model.config.labels))
    if as_json:
        typer.echo(json.dumps({"model": directory, "sequences": len(data), **found}, indent=2))
    elif model.config.labels:
        scores = f"accuracy {found['accuracy']:.4f} · macro-F1 {found['macro_f1']:.4f}"
        typer.echo(f"{scores} · {count(len(data), 'sequence')}")
    else:
        typer.echo(f"root mean square error {found['rmse']:.6g} · {count(len(data), 'sequence')}")


def predict_sequences(directory: str, files: Sequence[str], as_json: bool) -> None:
    """Print what sequences are; see `classify predict`.

    Args:
        directory: of the model.
        files: see `read_sequences`; their labels don't count. Of a model of tokens also texts, or none: then
            the lines of stdin are its texts.
        as_json: for programs.

    Raises:
        UsageError: there are no files, and the model is one of signals.
    """
    model = load(directory, "sequence")
    labels, is_text = model.config.labels, False
    if model.config.d_input:
        if not files:
            raise UsageError("FILES: expected signals, as train takes them; there are none on stdin.")
    else:
        is_text = not any(map(_is_file, files))
        files = files or read_stdin()
        if not files:
            return
    data = _texts(files) if is_text else read_sequences(files, split="test")
    _fit(model, data)
    for name, row in zip(data.names, answers(model, data), strict=True):
        if as_json:
            said = {"probabilities": dict(zip(labels, row.exp().tolist(), strict=True))} if labels else {}
            shown = {"label": labels[int(row.argmax())]} if labels else {"numbers": row.tolist()}
            typer.echo(json.dumps({"text" if is_text else "name": name, **shown, **said}, ensure_ascii=False))
        elif labels:
            shown_name = " ".join(name.splitlines()) if is_text else name
            typer.echo(f"{labels[int(row.argmax())]}\t{row.exp().max():.4f}\t{shown_name}")
        else:
            typer.echo("\t".join([*(f"{number:.6g}" for number in row.tolist()), name]))


def _is_file(argument: str) -> bool:
    """Whether an argument names a file of sequences, be it one that is not there, rather than a text."""
    name = argument.lower().removesuffix(".gz").removesuffix(".xz")
    return os.path.exists(argument) or (len(argument.split()) == 1 and name.endswith(FILES))


def _texts(texts: Sequence[str]) -> Sequences:
    """Take texts as sequences of bytes, as training did."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise LongscanError(f"text {number} is empty: leave it out.")
    rows = [
        np.frombuffer(utf8(text.encode(errors="surrogateescape"), "the text").encode(), np.uint8)
        for text in texts
    ]
    lengths = np.array([len(row) for row in rows], np.int64)
    values = np.concatenate(rows).astype(np.int64)
    return Sequences(values, lengths, np.zeros((len(rows), 1)), (), tuple(texts))


def _fit(model: SequenceModel, data: Sequences) -> None:
    """Insist on sequences that a model can read; at another rate it reads by other time steps."""
    d_input, vocab_size = model.config.d_input, model.config.body_config.vocab_size
    if data.d_input != d_input:
        expected, got = (f"{n} channels" if n else "tokens" for n in (d_input, data.d_input))
        raise LongscanError(f"{data.names[0]}: expected {expected} as in the training data, got {got}.")
    if not d_input and int(data.values.max()) >= vocab_size:
        raise LongscanError(
            f"{data.names[0]}: expected tokens below {vocab_size:,}, got {int(data.values.max()):,}."
        )
    if BODIES[model.config.body].timed and model.config.gap and data.times is None:
        raise LongscanError(f"{data.names[0]}: expected times as in the training data, got none.")
    if data.rate and model.config.rate and data.rate != model.config.rate:
        to_rate(model, data.rate)
        typer.echo(
            f"{data.rate:g} samples per second instead of {model.config.rate:g}: time steps are "
            f"{model.config.rate / data.rate:g} times as long",
            err=True,
        )
