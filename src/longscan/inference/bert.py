"""Inference with a BERT: class probabilities, masked-token predictions, sentence embeddings."""

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
from longscan.inference.sampling import check_fit
from longscan.inference.text_vectors import text_vectors
from longscan.models import Bert, BertConfig, LanguageModel
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.wordpiece import Framed, WordPieceTokenizer

__all__ = [
    "MAX_PAIRED",
    "Prediction",
    "answer",
    "capacity",
    "embed",
    "fill_mask",
    "predict",
    "sentence_vectors",
    "several",
]


MAX_PAIRED = 50  # texts, at most, whose pairs are all printed


def embed(bert: LoadedBert | tuple[LanguageModel, Tokenizer], texts: Sequence[str], rows: int = 32) -> Tensor:
    """Return sentence embeddings: the mean over tokens, or [CLS] if the model is made so, scaled to length 1.

    Args:
        bert: preferably one trained for sentence embeddings, such as all-MiniLM-L6-v2; or a causal model and
            its tokenizer, whose final hidden states are taken.
        texts: those that are too long for a BERT are cut.
        rows: batch size; a causal model takes one text at a time.

    Returns:
        (n_texts, d_model) float32, whose dot products are cosine similarities.

    Raises:
        LongscanError: the model uses another pooling, or a text has no tokens.
    """
    check_texts("texts", texts)
    check_whole("rows", rows, 1)
    if isinstance(bert, tuple):
        model, tokenizer = bert
        check_fit(model, tokenizer)
        return text_vectors(model, tokenizer.encode_prompts(texts))
    return sentence_vectors(bert, bert.tokenizer.frame_batch(texts, max_length=capacity(bert)), rows)


@torch.inference_mode()
def sentence_vectors(bert: LoadedBert, framed: Sequence[Framed], rows: int = 32) -> Tensor:
    """Return the same for tokenised texts."""
    model, tokenizer, use_cls = bert.model, bert.tokenizer, read_pooling(bert.directory) == "cls"
    vectors = torch.empty(len(framed), model.config.d_model, dtype=torch.float32)
    for batch in by_length(framed, rows):
        ids, types = (part.to(model.device) for part in tokenizer.collate([framed[n] for n in batch]))
        mask = (ids != tokenizer.pad_id)[:, :, None]  # (batch, seq_len, 1)
        hidden = model(ids, types).hidden
        pooled = hidden[:, 0] if use_cls else (hidden * mask).sum(1) / mask.sum(1)
        vectors[batch] = F.normalize(pooled, dim=-1).float().cpu()
    return vectors


def capacity(bert: LoadedBert) -> int:
    """Return the most tokens of a text: the limit in its sentence-transformers files, or all positions."""
    limits = bert.directory / "sentence_bert_config.json"
    limit = read_json(limits).get("max_seq_length") if limits.is_file() else None
    tokenizer = bert.directory / "tokenizer_config.json"
    if limit is None and limits.is_file() and tokenizer.is_file():
        limit = read_json(tokenizer).get("model_max_length")
    positions = bert.model.config.max_positions
    return min(positions, limit) if isinstance(limit, int) and limit > 2 else positions


@torch.inference_mode()
def predict(model: Bert, tokenizer: WordPieceTokenizer, framed: Sequence[Framed], rows: int = 32) -> Tensor:
    """Return the predictions of a classifier.

    Args:
        model: a classifier, in evaluation mode.
        tokenizer: the model's.
        framed: the tokenised texts.
        rows: batch size.

    Returns:
        (n_texts, n_labels): log p of each class; or of a multi-label model the log p that each label applies;
        or of a regression the numbers themselves: see `BertConfig.score`.
    """
    functions = {"softmax": lambda x: x.log_softmax(-1), "sigmoid": F.logsigmoid, "none": lambda x: x}
    final: Callable[[Tensor], Tensor] = functions[model.config.score]
    scores = torch.empty(len(framed), len(model.config.labels), dtype=torch.float32)
    for batch in by_length(framed, rows):
        ids, types = (part.to(model.device) for part in tokenizer.collate([framed[n] for n in batch]))
        scores[batch] = final(model.classify(model(ids, types).pooled)).float().cpu()
    return scores


def several(config: BertConfig) -> bool:
    """Whether a classifier is multi-label.

    Args:
        config: of the classifier.
    """
    return config.score == "sigmoid" and len(config.labels) > 1


def answer(config: BertConfig, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the prediction of a classifier for a text as JSON values.

    Args:
        config: of the classifier.
        scores: the value of each output.
    """
    if config.score == "softmax":
        return {"label": max(scores, key=lambda name: scores[name]), "probabilities": scores}
    if several(config):
        return {"labels": [name for name, score in scores.items() if score > 0.5], "probabilities": scores}
    return {"scores": scores}


@dataclass(frozen=True)
class Prediction:
    """A token, such as "cat" or "##s", and its probability at a masked position."""

    token: str
    probability: float


@torch.inference_mode()
def fill_mask(bert: LoadedBert, text: str, top_k: int = 5) -> list[list[Prediction]]:
    """Return the predictions for the masked tokens of a text.

    Args:
        bert: with its masked-LM head.
        text: with one [MASK] or more, each predicted independently.
        top_k: predictions for each.

    Returns:
        For each [MASK] in order its predictions, most likely first.

    Raises:
        UsageError: there is no [MASK] in the text.
        LongscanError: the text is longer than the model's positions.
    """
    check_text("text", text)
    check_whole("top_k", top_k, 1)
    bert.need("cls.predictions.", "predict masked tokens")
    model, tokenizer = bert.model, bert.tokenizer
    tokens = tokenizer.encode_masked(text)
    if tokenizer.mask_id not in tokens:
        raise UsageError(
            f"no {tokenizer.mask_token} in the text: put it where a word is to be predicted, "
            f'as in "the {tokenizer.mask_token} sat on the mat".'
        )
    framed = tokenizer.frame(tokens, max_length=model.config.max_positions)
    if framed.cut:
        raise LongscanError(
            f"the text has {len(framed.ids) + framed.cut:,} tokens, the model {model.config.max_positions:,} "
            "positions: shorten it."
        )
    ids = torch.tensor([framed.ids], device=model.device)
    masked = ids[0] == tokenizer.mask_id
    logits = model.mlm_logits(model(ids).hidden[0, masked])[
        :, : tokenizer.vocab_size
    ]  # (n_masks, vocab_size)
    best = logits.softmax(-1).topk(min(top_k, tokenizer.vocab_size))
    return [
        [Prediction(tokenizer.token(token), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
