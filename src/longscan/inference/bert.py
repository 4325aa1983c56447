"""A BERT at work: class probabilities, masked-token predictions, sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.bert import LoadedBert, read_pooling
from longscan.core.checks import check_text, check_texts, check_whole
from longscan.core.files import read_json
from longscan.data.batching import by_length
from longscan.errors import LongscanError, UsageError
from longscan.models import Bert, BertConfig
from longscan.tokenizers.wordpiece import Framed, WordPieceTokenizer

__all__ = [
    "MAX_PAIRED",
    "Guess",
    "answer",
    "capacity",
    "embed",
    "fill_mask",
    "predict",
    "sentence_vectors",
    "several",
]


MAX_PAIRED = 50  # texts of which every pair is printed


def embed(found: LoadedBert, texts: Sequence[str], rows: int = 32) -> Tensor:
    """Turn texts into vectors: the mean over their tokens, or [CLS] if the model says so, scaled to length 1.

    Args:
        found: a BERT, best one that was trained for it, such as all-MiniLM-L6-v2.
        texts: what is too long for the model is cut.
        rows: read at a time.

    Returns:
        (n_texts, d_model) float32: products are cosines.

    Raises:
        LongscanError: the model asks for another pooling.
    """
    check_texts("texts", texts)
    check_whole("rows", rows, 1)
    return sentence_vectors(found, found.tokenizer.frame_batch(texts, room=capacity(found)), rows)


@torch.inference_mode()
def sentence_vectors(found: LoadedBert, framed: Sequence[Framed], rows: int = 32) -> Tensor:
    """Do it for texts in tokens."""
    model, tokenizer, first = found.model, found.tokenizer, read_pooling(found.directory) == "cls"
    vectors = torch.empty(len(framed), model.config.d_model)
    for batch in by_length(framed, rows):
        ids, types = (part.to(model.device) for part in tokenizer.collate([framed[n] for n in batch]))
        mask = (ids != tokenizer.pad_id)[:, :, None]  # (batch, seq_len, 1)
        hidden = model(ids, types).hidden
        pooled = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
        vectors[batch] = F.normalize(pooled, dim=-1).float().cpu()
    return vectors


def capacity(found: LoadedBert) -> int:
    """Return the most tokens of a text: what sentence-transformers or the tokenizer say, or all positions."""
    limits = found.directory / "sentence_bert_config.json"
    limit = read_json(limits).get("max_seq_length") if limits.is_file() else None
    tokenizer = found.directory / "tokenizer_config.json"
    if limit is None and limits.is_file() and tokenizer.is_file():
        limit = read_json(tokenizer).get("model_max_length")
    room = found.model.config.max_positions
    return min(room, limit) if isinstance(limit, int) and limit > 2 else room


@torch.inference_mode()
def predict(model: Bert, tokenizer: WordPieceTokenizer, framed: Sequence[Framed], rows: int = 32) -> Tensor:
    """Classify texts.

    Args:
        model: a classifier, in evaluation mode.
        tokenizer: its own.
        framed: the texts.
        rows: read at a time.

    Returns:
        (n_texts, n_labels): log p of each class; where the model's outputs are none of one choice, the log p
        that each label applies, or the numbers themselves: see `BertConfig.score`.
    """
    functions = {"softmax": lambda x: x.log_softmax(-1), "sigmoid": F.logsigmoid, "none": lambda x: x}
    final: Callable[[Tensor], Tensor] = functions[model.config.score]
    scores = torch.empty(len(framed), len(model.config.labels))
    for batch in by_length(framed, rows):
        ids, types = (part.to(model.device) for part in tokenizer.collate([framed[n] for n in batch]))
        scores[batch] = final(model.classify(model(ids, types).pooled)).float().cpu()
    return scores


def several(config: BertConfig) -> bool:
    """Whether a classifier has labels that do not exclude each other.

    Args:
        config: of the classifier.
    """
    return config.score == "sigmoid" and len(config.labels) > 1


def answer(config: BertConfig, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return what a classifier says of a text, for programs.

    Args:
        config: of the classifier.
        scores: of each of its outputs.
    """
    if config.score == "softmax":
        return {"label": max(scores, key=lambda name: scores[name]), "probabilities": scores}
    if several(config):
        return {"labels": [name for name, score in scores.items() if score > 0.5], "probabilities": scores}
    return {"scores": scores}


@dataclass(frozen=True)
class Guess:
    """An entry of the vocabulary, such as "cat" or "##s", and how likely it is at a place."""

    token: str
    probability: float


@torch.inference_mode()
def fill_mask(found: LoadedBert, text: str, top_k: int = 5) -> list[list[Guess]]:
    """Guess the hidden words of a text.

    Args:
        found: a BERT with its masked-word head.
        text: with [MASK] once or more; each is guessed by itself.
        top_k: guesses for each.

    Returns:
        The likeliest first, for each [MASK] in order.

    Raises:
        UsageError: there is no [MASK] in the text.
        LongscanError: the text is longer than the model's positions.
    """
    check_text("text", text)
    check_whole("top_k", top_k, 1)
    found.need("cls.predictions.", "guess words")
    model, tokenizer = found.model, found.tokenizer
    words = tokenizer.encode_masked(text)
    if tokenizer.mask_id not in words:
        raise UsageError(
            f"no {tokenizer.mask_token} in the text: put it where a word is to be found, "
            f'as in "the {tokenizer.mask_token} sat on the mat".'
        )
    framed = tokenizer.frame(words, room=model.config.max_positions)
    if framed.cut:
        raise LongscanError(
            f"the text has {len(framed.ids) + framed.cut:,} tokens, the model {model.config.max_positions:,} "
            "positions: give less of it."
        )
    ids = torch.tensor([framed.ids], device=model.device)
    places = ids[0] == tokenizer.mask_id
    logits = model.words(model(ids).hidden[0, places])[:, : tokenizer.vocab_size]  # (n_masks, vocab_size)
    best = logits.softmax(-1).topk(min(top_k, tokenizer.vocab_size))
    return [
        [Guess(tokenizer.token(token), share) for token, share in zip(tokens, shares, strict=True)]
        for tokens, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
