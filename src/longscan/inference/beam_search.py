"""Beam search: an approximation of the most probable translation.

A beam holds the `beam_size` best prefixes of each sentence. A prefix followed by eos_id is finished; the
others are extended. The result is the finished one with the best log p / ((5 + length) / 6)^alpha, where
eos_id counts too (Wu et al., 2016, arXiv 1609.08144, section 7; Vaswani et al., section 6.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.core.checks import check_range, check_whole
from longscan.errors import LongscanError, UsageError
from longscan.models import DecoderState, Translator

EXTRA = 50  # tokens by which a translation may exceed its source, Vaswani et al., section 6.1


class Hypothesis(NamedTuple):
    """A finished translation.

    Attributes:
        ids: its tokens, without bos_id and eos_id.
        score: log p, divided by the length penalty.
    """

    ids: list[int]
    score: float


def translate_ids(
    model: Translator,
    source: Tensor,
    *,
    beam_size: int = 5,
    max_len: int | None = None,
    length_penalty: float = 0.6,
) -> list[Hypothesis]:
    """Return the best hypothesis of each sentence, independent of the others in the batch.

    A sentence is done when `beam_size` hypotheses are finished, or when no prefix can become better than the
    best finished hypothesis.

    Args:
        model: in evaluation mode, without dropout.
        source: (batch, src_len) int64: tokens, eos_id, then pad_id.
        beam_size: beam width; 1 is greedy search.
        max_len: tokens of a translation, at most; None for 50 more than the source has.
        length_penalty: alpha; 0 favours short sentences, 1 compares log p per token.

    Raises:
        LongscanError: a number is out of range, the model is in training mode, or its logits are NaN.
    """
    check_whole("beam_size", beam_size, 1)
    if max_len is not None:
        check_whole("max_len", max_len, 1)
    check_range("length_penalty", length_penalty, least=0, below=math.inf, error=UsageError)
    if model.training:
        raise LongscanError("the model is in training mode, with dropout: call model.eval() first.")
    lengths = (source != model.config.pad_id).sum(1) - 1  # without eos_id
    limits = lengths + EXTRA if max_len is None else torch.full_like(lengths, max_len)
    return _Search(model, source, limits, beam_size, length_penalty).run()


@dataclasses.dataclass
class _Beams:
    """The sentences that are not done, with `width` prefixes of each.

    Attributes:
        sentences: (n,) their indices in the batch.
        tokens: (n, width, length) after bos_id.
        scores: (n, width) log p; -inf where there are fewer prefixes.
        state: of the decoder, n * width rows.
    """

    sentences: Tensor
    tokens: Tensor
    scores: Tensor
    state: DecoderState


class _Search:
    """The search for one batch; the arguments are those of `translate_ids`, limits (batch,) for max_len."""

    def __init__(
        self, model: Translator, source: Tensor, limits: Tensor, beam_size: int, length_penalty: float
    ) -> None:
        self.model, self.source, self.limits = model, source, limits
        self.beam_size, self.alpha = beam_size, length_penalty
        self.finished: list[list[Hypothesis]] = [[] for _ in source]

    @torch.no_grad()
    def run(self) -> list[Hypothesis]:
        """Search until every sentence is done."""
        n, device = len(self.source), self.source.device
        bos = torch.full((n, 1, 1), self.model.config.bos_id, device=device)
        beams = _Beams(
            torch.arange(n, device=device),
            bos[..., :0],
            torch.zeros(n, 1, device=device),
            self.model.start(self.source),
        )
        last = bos.flatten()
        while len(beams.sentences):
            logits, beams.state = self.model.step(last, beams.state)
            self._extend(beams, self._log_p(logits, beams))
            last = beams.tokens[..., -1].flatten()
        if not all(self.finished):
            raise LongscanError(
                "the model's logits are NaN: its weights are damaged. Load or train it again."
            )
        return [max(hypotheses, key=lambda each: each.score) for hypotheses in self.finished]

    def penalty(self, length: Tensor | int) -> Tensor:
        """Return the length penalty of a length, eos_id included."""
        return ((5 + torch.as_tensor(length, dtype=torch.float64)) / 6) ** self.alpha

    def _log_p(self, logits: Tensor, beams: _Beams) -> Tensor:
        """Return log p of the next tokens (n, width, vocab_size) from logits (n * width, vocab_size)."""
        config = self.model.config
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        log_p[:, [config.pad_id, config.bos_id]] = -torch.inf
        log_p = log_p.view(*beams.scores.shape, -1)
        full = self.limits[beams.sentences] <= beams.tokens.shape[2]
        if bool(full.any()):  # only eos_id is allowed
            tokens = torch.arange(log_p.shape[-1], device=log_p.device)
            log_p.masked_fill_(full.view(-1, 1, 1) & (tokens != config.eos_id), -torch.inf)
        return log_p

    def _extend(self, beams: _Beams, log_p: Tensor) -> None:
        """Extend the best prefixes, collect finished hypotheses and drop sentences that are done."""
        n, width, vocab_size = log_p.shape
        # twice beam_size candidates: at most beam_size of them end here, so enough are left
        each = min(2 * self.beam_size, vocab_size)
        log_p, next_ids = log_p.topk(each)  # (n, width, each): no prefix has more among the best of all
        k = min(2 * self.beam_size, width * each)
        scores, flat = (beams.scores.unsqueeze(2) + log_p).flatten(1).topk(k)  # (n, k)
        parents, tokens = flat // each, next_ids.flatten(1).gather(1, flat)
        ends = tokens == self.model.config.eos_id
        self._finish(beams, parents, torch.where(ends, scores, -torch.inf)[:, : self.beam_size])

        scores, best = torch.where(ends, -torch.inf, scores).topk(min(self.beam_size, k))  # the unfinished
        parents, tokens = parents.gather(1, best), tokens.gather(1, best)
        stay = self._unfinished(beams, scores)
        rows = (torch.arange(n, device=flat.device).unsqueeze(1) * width + parents)[stay].flatten()
        before = beams.tokens[stay.unsqueeze(1), parents[stay]]  # (n that stay, width, length)
        beams.tokens = torch.cat((before, tokens[stay].unsqueeze(2)), 2)
        beams.scores, beams.sentences = scores[stay], beams.sentences[stay]
        beams.state = beams.state.branch(rows, None if len(stay) == n else stay)

    def _finish(self, beams: _Beams, parents: Tensor, scores: Tensor) -> None:
        """Collect the hypotheses that end here: scores (n, at most beam_size), -inf where none does."""
        length = beams.tokens.shape[2] + 1
        values = (scores / self.penalty(length)).tolist()
        for i, j in (scores > -torch.inf).nonzero().tolist():
            ids = beams.tokens[i, parents[i, j]].tolist()
            self.finished[int(beams.sentences[i])].append(Hypothesis(ids, values[i][j]))

    def _unfinished(self, beams: _Beams, scores: Tensor) -> Tensor:
        """Return which of the n sentences are not done, given the scores (n, width) of their prefixes."""
        finished = [self.finished[i] for i in beams.sentences.tolist()]
        # log p only falls, and the longest length has the largest penalty
        bounds = (scores.amax(1) / self.penalty(self.limits[beams.sentences] + 1)).tolist()
        stay = [
            i
            for i, (hypotheses, bound) in enumerate(zip(finished, bounds, strict=True))
            if len(hypotheses) < self.beam_size
            and bound > max((hypothesis.score for hypothesis in hypotheses), default=-float("inf"))
        ]
        return torch.tensor(stay, dtype=torch.long, device=scores.device)
