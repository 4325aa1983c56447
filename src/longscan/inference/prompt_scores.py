"""The log-probabilities of the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.inference.prefill import Ids, as_tensor
from longscan.models import LanguageModel, State

__all__ = ["Score", "prompt_scores"]

CHUNK = 128  # tokens whose logits are in memory at a time


class Score(NamedTuple):
    """A token of a prompt.

    Attributes:
        token: its id.
        logprob: the natural logarithm of its probability after the tokens before it; None for the first one.
        top: ids and log-probabilities of the most likely tokens there, the largest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def prompt_scores(model: LanguageModel, ids: Ids, top: int, vocab_size: int) -> Iterator[Score]:
    """Yield the tokens of a prompt with their log-probabilities, in float64.

    Args:
        model: any causal model.
        ids: (seq_len,) the prompt.
        top: how many of the most likely tokens to list.
        vocab_size: ids from here on are padding of the model's vocabulary.

    Raises:
        LongscanError: an id is not in the vocabulary.
    """
    tokens = as_tensor(ids)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(wrong):
        raise LongscanError(f"token id: expected 0 to {vocab_size - 1:,}, got {int(wrong[0]):,}.")
    state: State | None = None
    last: Tensor | None = None
    for begin in range(0, len(tokens), CHUNK):
        chunk = tokens[begin : begin + CHUNK]
        output = model(chunk[None].to(model.device), state=state)
        state = output.state
        logits = output.logits[0, :, :vocab_size].double().cpu()
        before = logits[:-1] if last is None else torch.cat([last[None], logits[:-1]])
        last = logits[-1]
        logprobs = before.log_softmax(-1)
        if begin == 0:
            yield Score(int(chunk[0]), None)
            chunk = chunk[1:]
        best = logprobs.topk(min(top, vocab_size), -1)
        for i, token in enumerate(chunk.tolist()):
            most = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
            yield Score(token, float(logprobs[i, token]), tuple(most))
