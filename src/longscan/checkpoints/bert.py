"""BERTs from disk: with the head that is asked for, whatever head the checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longscan.checkpoints.formats import read_config
from longscan.checkpoints.hub import resolve
from longscan.checkpoints.load import assemble
from longscan.checkpoints.weights import read_weights
from longscan.core.files import read_json
from longscan.errors import LongscanError
from longscan.models import MODELS
from longscan.models.bert import Bert, BertConfig, Head
from longscan.tokenizers.wordpiece import WordPieceTokenizer, load_wordpiece

__all__ = ["LoadedBert", "load_bert", "load_classifier", "read_pooling"]


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


TIED, EMBEDDING = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

# what a checkpoint may lack as a whole; what of it the wanted head has no use for is left out
PARTS = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.")

POOLING: dict[Literal["mean", "cls"], tuple[str, ...]] = {
    "mean": ("pooling_mode_mean_tokens", "pooling_mode_mean"),
    "cls": ("pooling_mode_cls_token", "pooling_mode_cls"),
}


@dataclass(frozen=True)
class LoadedBert:
    """What `load_bert` found.

    Attributes:
        model: in evaluation mode.
        tokenizer: its own.
        fresh: the parts that the checkpoint lacks, which hold random numbers now.
        directory: where all this is.
    """

    model: Bert
    tokenizer: WordPieceTokenizer
    fresh: tuple[str, ...]
    directory: Path

    def need(self, part: str, purpose: str) -> None:
        """Insist that a part was learnt.

        Args:
            part: the beginning of its parameters' names.
            purpose: what it is needed for.

        Raises:
            LongscanError: the checkpoint lacks it.
        """
        if part in self.fresh:
            raise LongscanError(
                f"{self.directory} can't {purpose}: it has no {part}* weights, the result would be random. "
                "Take a checkpoint with them, or train them."
            )


def load_bert(
    name_or_dir: str | Path,
    head: Head | None = None,
    *,
    labels: Sequence[str] = (),
    generator: torch.Generator | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> LoadedBert:
    """Load a checkpoint of the BERT family in Hugging Face layout, and its tokenizer.

    With and without the `bert.` prefix, with gamma and beta, safetensors or pickled tensors: see `rename`.

    Args:
        name_or_dir: see `resolve`.
        head: what is to stand on top; what the checkpoint has if None.
        labels: of a new classifier; those of the checkpoint if there are none.
        generator: randomness of the parts that the checkpoint lacks.
        revision: branch, tag or commit of a hub repository.
        offline: whether to use only what the hub's cache holds.

    Returns:
        Model, tokenizer, and what is not from the checkpoint.

    Raises:
        LongscanError: no such model, another model, or a file that is damaged or does not fit the others.
    """
    directory = resolve(name_or_dir, revision=revision, offline=offline)
    if directory.is_file():
        raise LongscanError(f"{directory}: expected a model directory of a BERT, got a file.")
    config = stored = _read(directory)
    tokenizer = load_wordpiece(directory)
    tokenizer.check(config.vocab_size, directory)
    if tokenizer.pad_id != config.pad_id:
        raise LongscanError(
            f"{directory}: the tokenizer pads with {tokenizer.pad_id}, config.json says {config.pad_id}."
        )
    if head is not None:
        named = (tuple(labels) or stored.labels) if head == "classifier" else ()
        score = stored.score if named and named == stored.labels else "softmax"
        config = stored.replace(head=head, labels=named, score=score)
    tensors = MODELS["bert"].rename(read_weights(directory, buffers=BUFFERS))
    _drop_tied(directory, tensors)
    if config.labels != stored.labels:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
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
    wanted = tuple(part for part in PARTS if any(name.startswith(part) for name in names))
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(PARTS) or name.startswith(wanted)
    }
    fresh = tuple(part for part in wanted if not any(name.startswith(part) for name in tensors))
    embedding = tensors.get(EMBEDDING)
    if fresh and embedding is not None and embedding.shape == (config.vocab_size, config.d_model):
        small = config.replace(n_layers=1, d_ff=1, max_positions=1, n_types=1)  # the parts have no such sizes
        start = Bert(small, generator).state_dict()
        tensors |= {name: tensor for name, tensor in start.items() if name.startswith(fresh)}
    model = assemble(directory, Bert, config, tensors, torch.float32)
    assert isinstance(model, Bert)
    return LoadedBert(model, tokenizer, fresh, directory)


def _text(path: Path) -> str:
    """Read a file of names."""
    return path.read_bytes().decode(errors="replace")


def read_pooling(directory: Path) -> Literal["mean", "cls"]:
    """Understand how sentence-transformers makes one vector of a text with the model of a directory.

    Args:
        directory: its modules.json lists the steps, 1_Pooling/config.json describes the second; without these
            files nothing says otherwise than the mean.

    Returns:
        "mean" over all tokens, or "cls" for the first token alone.

    Raises:
        LongscanError: the vectors are made in another way.
    """
    steps = directory / "modules.json"
    if steps.is_file():
        kinds = [kind.rpartition(".")[2] for kind in re.findall(r'"type":\s*"([^"]*)"', _text(steps))]
        if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
            raise LongscanError(
                f"{steps}: expected Transformer, Pooling, Normalize, got {', '.join(other)}, too."
            )
    for name, field, wanted in (
        ("sentence_bert_config.json", "do_lower_case", (False, None)),
        ("config_sentence_transformers.json", "default_prompt_name", (None,)),
    ):
        path = directory / name
        value = read_json(path).get(field) if path.is_file() else None
        if value not in wanted:
            raise LongscanError(f"{path}: {field}: expected {wanted[0]!r}, got {value!r}: not done here.")
    path = directory / "1_Pooling" / "config.json"
    raw = read_json(path) if path.is_file() else {}
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


def _read(directory: Path) -> BertConfig:
    """Read the configuration."""
    path = directory / "config.json"
    try:
        name, config = read_config(read_json(path))
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    if not isinstance(config, BertConfig):
        raise LongscanError(f"{directory} is a {name}; expected a BERT.")
    return config


def _drop_tied(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Drop the matrix of the masked-word head that repeats the embedding; refuse another one."""
    tied, embedding = tensors.pop(TIED, None), tensors.get(EMBEDDING)
    if tied is not None and (embedding is None or not torch.equal(tied, embedding)):
        raise LongscanError(f"{directory}: {TIED} is not the word embedding: that is another model.")
