"""`longscan classify`: fine-tune a BERT on labelled texts, measure it, classify with it.

With the name of a language model instead, its blocks are trained on sequences: classify_sequences.py.

The directory of a run (see run.py) holds `start/`, the checkpoint it begins with under its new head, and
`data/`, the examples, besides: nothing else is needed to resume.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoint import save
from longscan.classify_sequences import (
    SequencesConfig,
    SequencesRun,
    check_bert,
    evaluate_sequences,
    is_sequence_model,
    predict_sequences,
)
from longscan.config import count
from longscan.encoders import LoadedBert, load_bert
from longscan.errors import LongscanError, UsageError
from longscan.examples import (
    Example,
    answer,
    divide,
    frame_examples,
    number_labels,
    parse_columns,
    predict,
    read_examples,
    score,
    several,
    shuffled,
)
from longscan.files import atomic_directory, read_toml
from longscan.generate import use_threads
from longscan.models import Bert, Model
from longscan.optional import require
from longscan.order import EpochOrder
from longscan.recipe import RunConfig, add_flags, check_device, setting
from longscan.run import Run
from longscan.run_command import Out, Recipe, Resume, finished, run_command
from longscan.runs import SETTINGS, Signals, read_settings
from longscan.tasks import BODIES
from longscan.text_input import read_stdin, tell_cut
from longscan.text_table import lay_out
from longscan.wordpiece import Framed, WordPieceTokenizer

__all__ = ["ClassifyConfig", "ClassifyRun", "commands", "load_classifier"]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """Everything that decides what `longscan classify train` computes; rates as in the BERT paper, A.3."""

    EPOCHS: ClassVar[float] = 3.0

    data: tuple[str, ...] = setting((), "Files of labelled texts.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Held-out file; without it a part of DATA is held out. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Part of DATA held out for validation.")
    columns: str = setting("1,2", "Where label, text (and the other text of a pair) stand in a table.")
    model: str = setting("", "Checkpoint to start from: a BERT's directory or hub id.")

    seq_len: int = setting(128, "Tokens of a text; longer ones are cut.")
    batch_size: int = setting(32, "Texts in a forward pass.")
    accumulate: int = setting(1, "Forward passes in a step.")

    schedule: Literal["cosine", "linear", "noam"] = setting("linear", "Course of the learning rate.")
    lr: float = setting(5e-5, "Peak learning rate.")
    warmup: int = setting(100, "Steps to reach the peak, at most a tenth of the run.")
    weight_decay: float = setting(0.01, "AdamW's decay of the matrices.")
    beta2: float = setting(0.999, "AdamW's memory of the gradient's square.")
    eps: float = setting(1e-6, "AdamW's smallest divisor.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its name."""
        super().__post_init__()
        self.check_least(8, "seq_len")
        self.check_least(1, "batch_size", "accumulate")
        self.check_fractions("valid_fraction")
        parse_columns(self.columns)


class _Part(NamedTuple):
    """What a forward pass reads."""

    ids: Tensor  # (batch, seq_len)
    types: Tensor  # likewise
    labels: Tensor  # (batch,)


class ClassifyRun(Run[ClassifyConfig]):
    """Fine-tunes a BERT: tell the class of a text, or of a pair of texts."""

    verb = "classify train"
    settings = ClassifyConfig
    valid_key, valid_unit = "valid_loss", "nats/text"
    unit, item = "nats per text", "texts"
    score, scores = "accuracy and F1", {"valid_accuracy": "accuracy", "valid_macro_f1": "macro-F1"}
    trained_on = ("data/train.jsonl", "data/valid.jsonl", "start/config.json", "start/model.safetensors")
    tokenizer: WordPieceTokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Read examples and checkpoint, or what the run made of them before."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name files of labelled texts.")
        if not config.model:
            raise UsageError("--model: expected the checkpoint to start from, a BERT's directory or hub id.")
        check_device(config.device)
        place = self.directory / "data"
        if not place.is_dir():
            self._prepare(place)
        found = load_bert(self.directory / "start")
        self.model, self.tokenizer = found.model.to(config.device), found.tokenizer
        self.train, self.valid = (self._encode(place / f"{name}.jsonl") for name in ("train", "valid"))
        self.rows = config.batch_size * config.accumulate
        lengths = [len(one.ids) for one in self.train[0]]
        self.plans = EpochOrder(config.seed, partial(shuffled, lengths, self.rows))
        return self.model, -(-len(self.train[1]) // self.rows), 1

    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it."""
        framed, _ = self.train
        cut = sum(one.cut > 0 for one in framed)
        words = f", {cut:,} cut at {self.config.seq_len} tokens" if cut else ""
        classes = count(len(self.model.config.labels), "class", "classes")
        data = f"{count(len(framed), 'text')} of {classes}{words}, {len(self.valid[1]):,} held out"
        return data, count(self.rows, "text")

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the texts of a step in parts."""
        framed, numbers = self.train
        epoch, place = divmod(step, -(-len(framed) // self.rows))
        chosen, parts = self.plans[epoch][place], []
        for start in range(0, len(chosen), self.config.batch_size):
            some = chosen[start : start + self.config.batch_size]
            ids, types = self.tokenizer.collate([framed[number] for number in some])
            labels = torch.tensor([numbers[number] for number in some])
            parts.append((_Part(ids, types, labels), len(some)))
        return parts

    def loss(self, model: Bert, part: _Part) -> Tensor:
        """Return the mean nats of a text's class."""
        ids, types, labels = (tensor.to(self.config.device) for tensor in part)
        return F.cross_entropy(model.classify(model(ids, types).pooled), labels)

    @property
    def validates(self) -> bool:
        """Whether examples are held out."""
        return bool(self.valid[1])

    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure loss, accuracy and F1 on what is held out."""
        framed, truth = self.valid
        scores = predict(self.model, self.tokenizer, framed, self.config.batch_size)
        found = score(truth, scores.argmax(1).tolist())
        self.say(f"accuracy {found.accuracy:.1%}, macro-F1 {found.macro_f1:.3f}")
        return {
            "valid_loss": F.nll_loss(scores, torch.tensor(truth)).item(),
            "valid_accuracy": found.accuracy,
            "valid_macro_f1": found.macro_f1,
        }

    def _encode(self, path: Path) -> tuple[list[Framed], list[int]]:
        """Frame the examples of a file and number their labels."""
        if not path.stat().st_size:
            return [], []
        examples = read_examples([path])
        framed = frame_examples(self.tokenizer, examples, self.config.seq_len)
        return framed, number_labels(examples, self.model.config.labels)

    def _prepare(self, place: Path) -> None:
        """Divide the examples and put a new head on the checkpoint."""
        config = self.config
        train = read_examples(config.data, config.columns)
        if config.valid:
            valid = read_examples(config.valid, config.columns)
        else:
            train, valid = divide(train, config.valid_fraction)
        names = {example.label for example in train}
        labels = sorted(names, key=int if all(name.isdecimal() for name in names) else None)
        if len(labels) < 2:
            raise LongscanError(f"{train[0].where}: expected two classes or more, all are {labels[0]!r}.")
        number_labels(valid, labels)
        if valid and (valid[0].pair is None) != (train[0].pair is None):
            raise LongscanError(
                f"{valid[0].where}: expected pairs there as in the training data, or nowhere."
            )
        generator = torch.Generator().manual_seed(config.seed)
        found = load_bert(config.model, "classifier", labels=labels, generator=generator)
        positions = found.model.config.max_positions
        if config.seq_len > positions:
            raise UsageError(f"--seq-len: expected at most the {positions} positions of {config.model}.")
        if found.fresh:
            parts = ", ".join(part.rstrip(".") for part in found.fresh)
            self.display.line(f"fresh      {parts}: not in {config.model}, learnt from the examples alone")
        save(found.model, self.directory / "start", found.tokenizer)
        with atomic_directory(place) as temporary:
            for name, examples in (("train", train), ("valid", valid)):
                lines = [json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples]
                text = "".join(lines).encode(errors="backslashreplace")  # names of files need not be UTF-8
                (temporary / f"{name}.jsonl").write_bytes(text)


def load_classifier(name_or_dir: str | Path) -> LoadedBert:
    """Load a BERT that classifies.

    Args:
        name_or_dir: see `load_bert`.

    Raises:
        LongscanError: as `load_bert`; or it has no such head.
    """
    found = load_bert(name_or_dir)
    if found.model.config.head != "classifier":
        raise LongscanError(
            f"{found.directory} does not classify: its head is {found.model.config.head!r}. "
            f"Train one: longscan classify train --model {found.directory} FILE --out DIR"
        )
    found.need("classifier.", "classify")
    return found


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
    hand.

    Args:
        data: what to train on.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of ClassifyConfig and SequencesConfig.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
    """
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
    found = load_classifier(model)
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
    found = load_classifier(model)
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


def tfidf(train: Sequence[Example], test: Sequence[Example], labels: Sequence[str]) -> list[int]:
    """Classify with what there was before: word and word-pair counts, and a linear model of them.

    Args:
        train: what to learn from; five of its folds choose how much to regularise.
        test: what to classify.
        labels: the classes.

    Returns:
        The numbers of the classes.

    Raises:
        LongscanError: scikit-learn is not installed, or a label is not among `labels`.
    """
    names = "feature_extraction.text", "linear_model", "model_selection"
    text, linear, selection = (require("scikit-learn", "baselines", f"sklearn.{name}") for name in names)
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    counts = words.fit_transform([_whole(example) for example in train])
    search = selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), {"C": [0.1, 1, 10, 100]}, cv=5)
    search.fit(counts, number_labels(train, labels))
    answers: list[int] = search.predict(words.transform([_whole(example) for example in test])).tolist()
    return answers


def _refuse(model: str, **flags: Any) -> None:
    """Refuse flags that say nothing to a model."""
    for name, value in flags.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: {model} has no use for it. Leave it out.")


def _whole(example: Example) -> str:
    """Return all text of an example."""
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


def _room(found: LoadedBert, seq_len: int | None) -> int:
    """Return how many tokens of a text are read."""
    positions = found.model.config.max_positions
    if seq_len is not None and not 3 <= seq_len <= positions:
        raise UsageError(f"--seq-len: expected 3 to {positions}, the positions of the model, got {seq_len}.")
    return seq_len or positions
