"""`longscan classify`: train, evaluate and use classifiers of texts, images, clips and whole sequences."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from longscan.checkpoints.bert import LoadedBert
from longscan.checkpoints.formats.sequence_classifier import is_sequence_model
from longscan.checkpoints.load import load
from longscan.commands._compare import allow_several, compare
from longscan.commands._images import architecture, evaluate_images, is_image_model, predict_images
from longscan.commands._input import read_stdin, warn_of_cut
from longscan.commands._options import Architecture, ImageSize, Json, Threads
from longscan.commands._run import Out, Recipe, Resume, finished, run_command
from longscan.commands._scores import print_scores, report
from longscan.commands._sequences import evaluate_sequences, predict_sequences
from longscan.commands._settings import add_flags
from longscan.core.config import count
from longscan.core.files import read_toml
from longscan.core.runtime import use_threads
from longscan.data.archives import has_suffix
from longscan.data.labeled_sequences import is_sequence_file
from longscan.data.labeled_texts import (
    frame_examples,
    number_labels,
    read_examples,
)
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import score, tfidf
from longscan.inference.bert import answer, predict, several
from longscan.models import MODELS, preset_owner
from longscan.models.sequence_classifier import BODIES
from longscan.training.image_classifier import ImagesConfig, ImagesRun
from longscan.training.run import Run, RunResult
from longscan.training.run_directory import SETTINGS, read_settings
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun, check_bert
from longscan.training.text_classifier import ClassifyConfig, ClassifyRun

__all__ = ["commands", "train"]


def train(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA", help="Labelled texts or sequences, or directories of .wav or of images."
        ),
    ] = None,
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Fine-tune a BERT on texts, train a model of sequences or of images, or resume a run.

    With --model DIR of a BERT, DATA is a table with one text per line and tab-separated columns: label and
    text, or those that --columns names. It may also be .jsonl with "label" and "text". Both may be .gz or
    .xz.

    With --model NAME such as mamba, see `longscan models`, DATA may also be .npz files of x, y, lengths and
    times; .csv files with one sequence per row, label first, or with one time step per row under a header of
    id, label, optionally time, and channels; and directories or tars of .wav files, in one directory per
    class or named LABEL_....wav. Texts become sequences of bytes. Only --model neural_ode uses the times of
    irregular series. The defaults are then --lr 0.003, --epochs 20 and no limit on --seq-len.

    With --model NAME of an image model such as vmamba, or --from MODEL to fine-tune one, DATA is a directory
    with a directory of images for each class, a .zip or tar of it, or .npz files of x (bytes) and y. The
    images stay where they are and are decoded when they are needed. The defaults are then --lr 0.001,
    --epochs 30, --batch-size 64 and --weight-decay 0.05. For digits and letters, add --flip 0. A few thousand
    images or fewer call for less augmentation: --crop-scale 0.7 --randaugment 0 --ema 0.99 --lr 0.003.

    With --frames N and --model videomamba, DATA holds clips: in the directory of a class, each video file,
    .npz of frames, animated GIF, PNG or WebP, and each directory of still images is one. The model sees N
    frames, one of each of N equal segments, all with the same crop and flip. Add --flip 0 where left and
    right matter. --from may name a model of images, or one of another number of frames.

    --out receives checkpoints, metrics.jsonl, loss.png and in the end model/. Ctrl-C stops after the current
    step. With several --model NAME each has its run in --out, and their held-out accuracies are printed and
    drawn side by side; the same command resumes.

    Defaults in brackets below are those for texts.

    Args:
        data: what to train on.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of ClassifyConfig, SequencesConfig and ImagesConfig.

    Raises:
        UsageError: flags that contradict each other or have invalid values.
    """
    models = settings.pop("model") or []
    if len(models) > 1:
        compare(models, out, resume_from, recipe, {"data": data, **settings})
        return
    settings["model"] = models[0] if models else None
    given = {"data": data, **settings}
    earlier = _recipe(recipe) if resume_from is None else _settings(resume_from)
    model = str(settings["model"] or earlier.get("model", ""))
    if (start := settings["pretrained"] or earlier.get("pretrained")) and not model:
        given["model"] = model = architecture(start)
    run = _run_of(model)
    sequences = run is SequencesRun
    fields = _names(run)
    for name, value in given.items():
        if name not in fields and value not in (None, []):
            others = [other for other, kind in KINDS.items() if name in _names(kind)]
            raise UsageError(f"--{name.replace('_', '-')}: only for {' or '.join(others)}. Leave it out.")
    given = {name: value for name, value in given.items() if name in fields}
    if run is ClassifyRun:
        check_bert(model, data or earlier.get("data"))
    result = run_command(run, out, resume_from, recipe, given)
    files = data or earlier.get("data") or ()
    is_text = not sequences or not any(is_sequence_file(path) or has_suffix(path, ".csv") for path in files)
    what, rest = "sequences" if sequences else "texts", '"..."' if is_text else "FILE"
    if run is ImagesRun:
        clips = settings["frames"] or earlier.get("frames")
        what, rest = ("clips", "CLIP") if clips else ("images", "IMAGE")
    finished(result, _measured(result, what), f"classify predict {result.directory / 'model'} {rest}")


@dataclass(frozen=True, kw_only=True)
class _Flags(ClassifyConfig, SequencesConfig, ImagesConfig):
    """The settings of all kinds of run, which share the verb's flags."""


add_flags(train, _Flags)
allow_several(
    train,
    "model",
    " For sequences or images, a name such as mamba or vmamba; repeat it to compare models.",
)


KINDS: dict[str, type[Run[Any]]] = {
    "a BERT": ClassifyRun,
    "the blocks of a language model, --model NAME": SequencesRun,
    "an image model, --model vmamba or videomamba": ImagesRun,
}


MEASURES = {  # of a validation, and how they are printed
    "valid_top1": "top-1 accuracy {:.1%}",
    "valid_accuracy": "accuracy {:.1%}",
    "valid_rmse": "root mean square error {:.4g}",
}


def _measured(result: RunResult, what: str) -> str:
    """Return the last validation of a run in a few words, "" if there was none."""
    known = [(key, text) for key, text in MEASURES.items() if key in result.scores]
    return "".join(f"{text.format(result.scores[key])} on held-out {what}" for key, text in known[:1])


def _run_of(model: str) -> type[Run[Any]]:
    """Return the kind of run that trains a model of this name."""
    if model in BODIES:
        return SequencesRun
    entry = MODELS.get(preset_owner(model) or model)  # a preset's name is refused later, with its model's
    return ImagesRun if entry and entry.kind == "image" else ClassifyRun


def _names(run: type[Run[Any]]) -> set[str]:
    """Return the names of the settings of a kind of run."""
    return {entry.name for entry in dataclasses.fields(run.settings)}


def _settings(directory: Path) -> dict[str, Any]:
    """Return the settings of a run; {} if there is none, which the run reports later."""
    return read_settings(directory, ClassifyRun.verb) if (directory / SETTINGS).is_file() else {}


def _recipe(path: Path | None) -> dict[str, Any]:
    """Return the settings of a recipe; {} if it can't be read, which the run reports later."""
    try:
        return {} if path is None else read_toml(path)
    except (OSError, LongscanError):
        return {}


COLUMNS = "1,2"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A classifier's directory.")]

SeqLen = Annotated[
    int | None, typer.Option(help="Cut texts to this many tokens; default: the model's limit.")
]


def evaluate(
    model: ModelArgument,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES", help="Labelled texts, sequences, images or clips, as for train."),
    ],
    columns: Annotated[str, typer.Option(help="Table columns of label and text.")] = COLUMNS,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(help="Also evaluate TF-IDF with logistic regression, trained on this file. Repeatable."),
    ] = None,
    seq_len: SeqLen = None,
    pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose group is the label in a .wav file's path.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the confusion matrix of an image model to this file.")
    ] = None,
    architecture: Architecture = None,
    image_size: ImageSize = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Accuracy and F1 of a classifier on labelled texts or images, also by class; or on sequences.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model or a file can't be read, or a label was not in the training data.
    """
    use_threads(threads)
    if is_image_model(model):
        given = None if columns == COLUMNS else columns
        _refuse(model, baseline=baseline, seq_len=seq_len, pattern=pattern, columns=given)
        evaluate_images(model, files, figure, as_json, model=architecture, image_size=image_size)
        return
    _refuse(model, figure=figure, model=architecture, image_size=image_size)
    if is_sequence_model(model):
        _refuse(model, baseline=baseline, seq_len=seq_len)
        evaluate_sequences(model, files, columns, pattern, as_json)
        return
    _refuse(model, pattern=pattern)
    examples = read_examples(files, columns)
    loaded = load(model, "classifier")
    labels = loaded.model.config.labels
    if loaded.model.config.score != "softmax":
        raise LongscanError(
            f"{model} chooses no class: its {count(len(labels), 'output')} are scores, each by itself. "
            "Expected a model of two classes or more; longscan classify predict prints the scores."
        )
    truth = number_labels(examples, labels)
    framed = frame_examples(loaded.tokenizer, examples, _capacity(loaded, seq_len))
    scores = score(truth, predict(loaded.model, loaded.tokenizer, framed).argmax(1).tolist())
    peer = score(truth, tfidf(read_examples(baseline, columns), examples, labels)) if baseline else None
    warn_of_cut(framed)
    if as_json:
        shown = {"model": model, **report(labels, len(examples), scores, peer)}
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
    else:
        print_scores(labels, len(examples), scores, peer)


def predict_texts(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXTS",
            help="Texts; for a model of sequences, images or clips, files; default: the lines of stdin.",
        ),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Classify pairs of texts, separated by a tab.")
    ] = False,
    seq_len: SeqLen = None,
    architecture: Architecture = None,
    image_size: ImageSize = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Classify texts, the lines of stdin, sequences, images, or clips.

    Images are files, directories, which are searched, or the lines of stdin. Those that can't be opened are
    reported, the others classified, and the exit code is 1. The same holds for clips, of which a model of
    videos sees the middle frame of each of N equal segments; a directory of still images is one clip.

    Prints one line each: the class, its probability and the text, separated by tabs; with --json all
    probabilities. For a model with one output, such as a cross-encoder, prints its name and score; for
    multi-label models, all labels above 0.5, or else the most likely one.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model can't be read, or a text is no pair.
    """
    use_threads(threads)
    if is_image_model(model):
        _refuse(model, pairs=pairs, seq_len=seq_len)
        predict_images(model, texts or [], as_json, model=architecture, image_size=image_size)
        return
    _refuse(model, model=architecture, image_size=image_size)
    if is_sequence_model(model):
        _refuse(model, pairs=pairs, seq_len=seq_len)
        predict_sequences(model, texts or [], as_json)
        return
    loaded = load(model, "classifier")
    texts = texts or read_stdin()
    if not texts:
        return
    split = [text.split("\t") if pairs else [text] for text in texts]
    for number, parts in enumerate(split, 1):
        if pairs and len(parts) != 2:
            raise LongscanError(f"text {number}: expected two texts separated by a tab, got {len(parts)}.")
    second = [parts[1] for parts in split] if pairs else None
    framed = loaded.tokenizer.frame_batch([parts[0] for parts in split], second, _capacity(loaded, seq_len))
    labels = loaded.model.config.labels
    scores = predict(loaded.model, loaded.tokenizer, framed)
    if loaded.model.config.score != "none":
        scores = scores.exp()
    for text, row in zip(texts, scores.tolist(), strict=True):
        if as_json:
            shown = {"text": text, **answer(loaded.model.config, dict(zip(labels, row, strict=True)))}
            typer.echo(json.dumps(shown, ensure_ascii=False))
        else:
            # of labels that don't exclude each other, all that apply
            chosen = [n for n, score in enumerate(row) if score > 0.5] if several(loaded.model.config) else []
            chosen = chosen or [max(range(len(row)), key=row.__getitem__)]
            names, numbers = ",".join(labels[n] for n in chosen), ",".join(f"{row[n]:.4f}" for n in chosen)
            typer.echo(f"{names}\t{numbers}\t{' '.join(text.splitlines())}")
    warn_of_cut(framed)


commands = {"train": train, "predict": predict_texts, "evaluate": evaluate}


def _refuse(name: str, /, **flags: Any) -> None:
    """Raise UsageError for flags that don't apply to a model."""
    for flag, value in flags.items():
        if value:
            raise UsageError(f"--{flag.replace('_', '-')}: does not apply to {name}. Leave it out.")


def _capacity(loaded: LoadedBert, seq_len: int | None) -> int:
    """Return the maximum number of tokens per text; longer texts are cut."""
    positions = loaded.model.config.max_positions
    if seq_len is not None and not 3 <= seq_len <= positions:
        raise UsageError(f"--seq-len: expected 3 to {positions}, the positions of the model, got {seq_len}.")
    return seq_len or positions
