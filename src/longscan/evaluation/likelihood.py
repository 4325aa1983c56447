"""Log-likelihoods of continuations: which of several answers, or of two sentences, does a model prefer?

A context is prefilled once, and its state is forked over the answers, which run as one batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.core.files import utf8
from longscan.errors import LongscanError
from longscan.inference.prefix_cache import PrefixCache
from longscan.models import LanguageModel, State
from longscan.tokenizers.base import Tokenizer

__all__ = ["Likelihood", "Pair", "PairResult", "compare_pairs", "likelihoods", "read_pairs"]

ROWS = 32  # continuations of a batch
GOOD, BAD = ("good", "sentence_good"), ("bad", "sentence_bad")


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprob: the natural logarithm of its probability after the context.
        greedy: whether each of its tokens is the most likely one.
    """

    logprob: float
    greedy: bool


@torch.inference_mode()
def likelihoods(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """Return the log-likelihoods of continuations, in float64.

    Args:
        model: any causal model.
        requests: ids of a context, at least one, and of its continuation. Those of one context share its
            prefill; contexts that share a beginning share the prefill of it, in steps of 512 tokens.
        vocab_size: ids from here on are padding of the model's vocabulary.
        progress: called with the requests done so far and all of them.

    Raises:
        LongscanError: a context is empty, or an id is not in the vocabulary.
    """
    found: dict[int, Likelihood] = {}
    order = sorted(range(len(requests)), key=lambda i: (tuple(requests[i][0]), len(requests[i][1])))
    cache = PrefixCache(model)
    for context, group in itertools.groupby(order, key=lambda i: tuple(requests[i][0])):
        if not context:
            raise LongscanError("a context is empty: expected at least one token, that of the end of a text.")
        logits, state = cache.read(context)
        indices = list(group)
        for begin in range(0, len(indices), ROWS):
            part = indices[begin : begin + ROWS]
            scored = _continuations(model, logits, state, [requests[i][1] for i in part], vocab_size)
            found.update(zip(part, scored, strict=True))
            if progress:
                progress(len(found), len(requests))
    return [found[i] for i in range(len(requests))]


def _continuations(
    model: LanguageModel, logits: Tensor, state: State, rows: Sequence[Sequence[int]], vocab_size: int
) -> list[Likelihood]:
    """Return the likelihoods of continuations of one context, the logits (vocab_size,) after it known."""
    first = logits[:vocab_size].double().log_softmax(-1).cpu()
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), max(longest - 1, 0), dtype=torch.long)
    for i, row in enumerate(rows):
        if any(not 0 <= token < vocab_size for token in row):
            wrong = min(row) if min(row) < 0 else max(row)
            raise LongscanError(f"token id: expected 0 to {vocab_size - 1:,}, got {wrong:,}.")
        ids[i, : max(len(row) - 1, 0)] = torch.tensor(row[:-1], dtype=torch.long)
    after = None
    if longest > 1:  # what follows the end of a shorter row does not affect it
        output = model(ids.to(model.device), state=state.select([0] * len(rows)))
        after = output.logits[:, :, :vocab_size].double().log_softmax(-1).cpu()
    scored = []
    for i, row in enumerate(rows):
        steps = [] if not row else [first, *(() if after is None else after[i, : len(row) - 1])]
        values = [float(step[token]) for step, token in zip(steps, row, strict=True)]
        greedy = all(float(step.max()) == value for step, value in zip(steps, values, strict=True))
        scored.append(Likelihood(sum(values), greedy))
    return scored


class Pair(NamedTuple):
    """Two sentences of which a model should prefer the first.

    Attributes:
        good: the acceptable one.
        bad: the other one.
        kind: of the phenomenon, for a table; "" if there is none.
    """

    good: str
    bad: str
    kind: str = ""


@dataclass(frozen=True)
class PairResult:
    """The result of one kind of pairs.

    Attributes:
        kind: of the phenomenon.
        right: pairs whose good sentence is more likely.
        total: pairs.
    """

    kind: str
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of right pairs."""
        return self.right / self.total


def read_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a file.

    Args:
        path: JSON lines with "good" and "bad", or BLiMP's "sentence_good" and "sentence_bad"; and, if there
            are several kinds, "kind", or BLiMP's "UID".

    Raises:
        LongscanError: a line is none, or there is none.
        OSError: the file cannot be read.
    """
    pairs = []
    for number, line in enumerate(utf8(path.read_bytes(), str(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            good, bad = fields.get(GOOD[0], fields.get(GOOD[1])), fields.get(BAD[0], fields.get(BAD[1]))
            kind = fields.get("kind", fields.get("UID", ""))
        except (ValueError, AttributeError, RecursionError) as error:
            raise LongscanError(
                f'{path}, line {number}: expected {{"good": "...", "bad": "..."}}, got {line[:60]!r}.'
            ) from error
        if not all(isinstance(text, str) and text for text in (good, bad)) or not isinstance(kind, str):
            raise LongscanError(
                f'{path}, line {number}: expected two texts, "good" and "bad", got {line[:60]!r}.'
            )
        pairs.append(Pair(good, bad, kind))
    if not pairs:
        raise LongscanError(f"{path}: expected pairs of sentences, got none.")
    return pairs


def compare_pairs(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PairResult]:
    """Yield the results of pairs by their kind, in alphabetical order; then, if there are several, of all.

    The likelihood of a sentence is that of all its tokens after an end-of-text token, as in BLiMP
    (arXiv 1912.00582); a tie is wrong.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        pairs: see `read_pairs`.
        progress: see `likelihoods`.
    """
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    requests = [(tokenizer.start, ids) for ids in tokenizer.encode_batch(texts)]
    scores = likelihoods(model, requests, tokenizer.vocab_size, progress)
    right: dict[str, list[bool]] = {}
    for i, pair in enumerate(pairs):
        right.setdefault(pair.kind, []).append(scores[2 * i].logprob > scores[2 * i + 1].logprob)
    for kind in sorted(right):
        name = kind or ("all" if len(right) == 1 else "of no kind")
        yield PairResult(name, sum(right[kind]), len(right[kind]))
    if len(right) > 1:
        yield PairResult("all", sum(map(sum, right.values())), len(pairs))
