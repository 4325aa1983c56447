"""A BERT from disk with the head that a task needs, whatever head the checkpoint has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longscan.checkpoints.assemble import assemble
from longscan.checkpoints.formats.bert import TIED
from longscan.checkpoints.source import ModelDirectory, Weights
from longscan.core.files import read_json
from longscan.errors import LongscanError
from longscan.models.bert import Bert, BertConfig, Head
from longscan.tokenizers.wordpiece import WordPieceTokenizer, load_wordpiece

__all__ = ["HeadOptions", "LoadedBert", "read_bert", "read_classifier", "read_pooling"]

# what a checkpoint may lack as a whole; a part that the head has no use for is left out
PARTS = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.")

POOLING: dict[Literal["mean", "cls"], tuple[str, ...]] = {
    "mean": ("pooling_mode_mean_tokens", "pooling_mode_mean"),
    "cls": ("pooling_mode_cls_token", "pooling_mode_cls"),
}


@dataclass(frozen=True)
class HeadOptions:
    """What is to stand on top of a BERT.

    Attributes:
        head: its kind; None takes that of the checkpoint.
        labels: of a new classifier; those of the checkpoint if there are none.
        generator: randomness of the parts that the checkpoint lacks; torch's global one if None.
    """

    head: Head | None = None
    labels: Sequence[str] = ()
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class LoadedBert:
    """A BERT and its tokenizer.

    Attributes:
        model: in evaluation mode.
        tokenizer: its own.
        fresh: the parts that the checkpoint lacks, initialised at random.
        directory: of the checkpoint.
    """

    model: Bert
    tokenizer: WordPieceTokenizer
    fresh: tuple[str, ...]
    directory: Path

    def need(self, part: str, purpose: str) -> None:
        """Raise unless a part comes from the checkpoint.

        Args:
            part: the prefix of its parameters.
            purpose: what it is needed for.

        Raises:
            LongscanError: the checkpoint lacks it.
        """
        if part in self.fresh:
            raise LongscanError(
                f"{self.directory} can't {purpose}: it has no {part}* weights, the result would be random. "
                "Take a checkpoint with them, or train them."
            )


def read_bert(source: ModelDirectory, options: HeadOptions, dtype: torch.dtype | None) -> LoadedBert:
    """Return a BERT and its tokenizer.

    Args:
        source: of a BERT.
        options: what is to stand on top.
        dtype: of the weights; None keeps that of the file.

    Raises:
        LongscanError: a file is damaged or does not fit the others.
    """
    directory = source.path
    stored = source.config()
    assert isinstance(stored, BertConfig)
    tokenizer = load_wordpiece(directory)
    tokenizer.check(stored.vocab_size, directory)
    if tokenizer.pad_id != stored.pad_id:
        raise LongscanError(
            f"{directory}: the tokenizer pads with {tokenizer.pad_id}, config.json says {stored.pad_id}."
        )
    config = _with_head(stored, options)
    tensors = source.weights(config).tensors
    if config.labels != stored.labels:
        tensors = _without(tensors, "classifier.")
    parts = _parts(config)
    tensors = _without(tensors, *(part for part in PARTS if part not in parts))
    fresh = tuple(part for part in parts if not any(name.startswith(part) for name in tensors))
    embedding = tensors.get(TIED.original)
    if fresh and embedding is not None and embedding.shape == (config.vocab_size, config.d_model):
        small = config.replace(n_layers=1, d_ff=1, max_positions=1, n_types=1)  # the parts have no such sizes
        start = Bert(small, options.generator).state_dict()
        tensors |= {name: tensor for name, tensor in start.items() if name.startswith(fresh)}
    model = assemble(directory, Bert, config, Weights(tensors, mapped=True), dtype)
    assert isinstance(model, Bert)
    return LoadedBert(model, tokenizer, fresh, directory)


def read_classifier(source: ModelDirectory, dtype: torch.dtype | None) -> LoadedBert:
    """Load a BERT that classifies.

    Args:
        source: a directory that holds one.
        dtype: of the weights; None keeps that of the file.

    Raises:
        LongscanError: as `read_bert`; or it has another head, or none.
    """
    loaded = read_bert(source, HeadOptions(), dtype)
    if loaded.model.config.head != "classifier":
        raise LongscanError(
            f"{loaded.directory} does not classify: its head is {loaded.model.config.head!r}. "
            f"Train one: longscan classify train --model {loaded.directory} FILE --out DIR"
        )
    loaded.need("classifier.", "classify")
    return loaded


def _with_head(config: BertConfig, options: HeadOptions) -> BertConfig:
    """Return a Config with another head; the labels and the scores of the checkpoint stay if they may."""
    if options.head is None:
        return config
    labels = (tuple(options.labels) or config.labels) if options.head == "classifier" else ()
    score = config.score if labels and labels == config.labels else "softmax"
    return config.replace(head=options.head, labels=labels, score=score)


def _parts(config: BertConfig) -> tuple[str, ...]:
    """Return which of PARTS a model has."""
    least = BertConfig(
        d_model=1,
        n_layers=1,
        n_heads=1,
        vocab_size=1,
        head=config.head,
        labels=config.labels,
        score=config.score,
    )
    with torch.device("meta"):
        names = list(Bert(least).state_dict())
    return tuple(part for part in PARTS if any(name.startswith(part) for name in names))


def _without(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """Return the tensors that belong to none of some parts."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)}


def read_pooling(directory: Path) -> Literal["mean", "cls"]:
    """Return how sentence-transformers makes one vector of a text with the model of a directory.

    Args:
        directory: its modules.json lists the steps, a config.json describes the second; without these files
            it is the mean.

    Returns:
        "mean" over all tokens, or "cls" for the first token alone.

    Raises:
        LongscanError: the vectors are made in another way.
    """
    path = _pooling_file(directory)
    for name, field, expected in (
        ("sentence_bert_config.json", "do_lower_case", (False, None)),
        ("config_sentence_transformers.json", "default_prompt_name", (None,)),
    ):
        file = directory / name
        value = read_json(file).get(field) if file.is_file() else None
        if value not in expected:
            raise LongscanError(f"{file}: {field}: expected {expected[0]!r}, got {value!r}: not done here.")
    raw = read_json(path) if path else {}
    known = ("word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode")
    if unknown := [name for name in raw if name not in known and not name.startswith("pooling_mode_")]:
        raise LongscanError(
            f"{path}: unknown field {', '.join(map(repr, unknown))}: it may change the vectors."
        )
    modes = [name for name, value in raw.items() if name.startswith("pooling_mode_") and value is not False]
    stated = raw.get("pooling_mode", [])
    modes += [f"pooling_mode_{mode}" for mode in (stated if isinstance(stated, list) else [stated])]
    for mode, names in POOLING.items():
        if modes and all(name in names for name in modes):
            return mode
    if raw.get("pooling_mode_mean_tokens", True) is True and not modes:
        return "mean"
    raise LongscanError(
        f"{path}: expected pooling_mode_mean_tokens or cls, got {', '.join(modes) or 'neither'}."
    )


def _pooling_file(directory: Path) -> Path | None:
    """Return the description of the pooling, where modules.json says it is; None if there is none."""
    steps = directory / "modules.json"
    if not steps.is_file():
        path = directory / "1_Pooling" / "config.json"
        return path if path.is_file() else None
    try:
        modules = json.loads(steps.read_bytes())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise LongscanError(f"{steps}: expected a list of modules, each with type and path.") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise LongscanError(f"{steps}: expected Transformer, Pooling, Normalize, got {', '.join(kinds)}.")
    root, pooling = (
        str(module.get("path", usual)) for module, usual in zip(modules[:2], ("", "1_Pooling"), strict=True)
    )
    if root != "" or not re.fullmatch(r"\w[\w.-]*", pooling):
        raise LongscanError(f"{steps}: expected the paths '' and '1_Pooling', got {root!r} and {pooling!r}.")
    if not (path := directory / pooling / "config.json").is_file():
        raise LongscanError(f"{path} is missing: it says how {steps} makes one vector of a text. Fetch it.")
    return path
