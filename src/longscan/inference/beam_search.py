"""Beam search: the most probable sentence a translator can be found to write.

A beam keeps the `beam_size` best beginnings of each sentence. A beginning that goes on with eos_id is
finished and waits; the others go on. Of the finished ones the best by log p / ((5 + length) / 6)^alpha is
taken, where eos_id counts too (Wu et al., 2016, arXiv 1609.08144, section 7; Vaswani et al., section 6.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError
from longscan.models import DecoderState, Translator

EXTRA = 50  # tokens a translation may have more than its source, Vaswani et al., section 6.1


class Hypothesis(NamedTuple):
    """A sentence that was found.

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
    """Translate sentences together; each gets what it would get alone.

    A sentence is done when as many hypotheses are finished as the beam is wide, or when none that goes on can
    become better than the best that is finished.

    Args:
        model: in evaluation mode, so that nothing is dropped.
        source: (batch, src_len) int64: tokens, eos_id, then pad_id.
        beam_size: beginnings kept of each sentence; 1 is greedy search.
        max_len: tokens of a translation at most; 50 more than the source has if None.
        length_penalty: alpha; 0 prefers short sentences, 1 the mean probability of a token.

    Returns:
        The best hypothesis of each sentence.

    Raises:
        LongscanError: a number is out of range, the model is in training mode, or its logits are NaN.
    """
    check_whole("beam_size", beam_size, 1)
    if max_len is not None:
        check_whole("max_len", max_len, 1)
    if not 0 <= length_penalty < math.inf:
        raise LongscanError(f"length_penalty: expected 0 or more, got {length_penalty}.")
    if model.training:
        raise LongscanError("the model is in training mode and would drop numbers: call model.eval() first.")
    lengths = (source != model.config.pad_id).sum(1) - 1  # without eos_id
    limits = lengths + EXTRA if max_len is None else torch.full_like(lengths, max_len)
    return _Search(model, source, limits, beam_size, length_penalty).run()


@dataclasses.dataclass
class _Beams:
    """The sentences that are not done, `width` beginnings of each.

    Attributes:
        sentences: (n,) which of the batch.
        tokens: (n, width, length) after bos_id.
        scores: (n, width) log p; -inf where there are fewer beginnings.
        state: what the model remembers, n * width rows.
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
        return [max(found, key=lambda hypothesis: hypothesis.score) for found in self.finished]

    def penalty(self, length: Tensor | int) -> Tensor:
        """Compute the length penalty of so many tokens, eos_id included."""
        return ((5 + torch.as_tensor(length, dtype=torch.float64)) / 6) ** self.alpha

    def _log_p(self, logits: Tensor, beams: _Beams) -> Tensor:
        """Turn logits (n * width, vocab_size) into scores of the next tokens, (n, width, vocab_size)."""
        config = self.model.config
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        log_p[:, [config.pad_id, config.bos_id]] = -torch.inf
        log_p = log_p.view(*beams.scores.shape, -1)
        full = self.limits[beams.sentences] <= beams.tokens.shape[2]
        if bool(full.any()):  # nothing but the end is left
            tokens = torch.arange(log_p.shape[-1], device=log_p.device)
            log_p.masked_fill_(full.view(-1, 1, 1) & (tokens != config.eos_id), -torch.inf)
        return log_p

    def _extend(self, beams: _Beams, log_p: Tensor) -> None:
        """Take the best ways to go on, put away what is finished and drop what is done."""
        n, width, vocab_size = log_p.shape
        # twice as many as go on: at most beam_size of them end here, so that enough are left
        each = min(2 * self.beam_size, vocab_size)
        log_p, ways = log_p.topk(each)  # (n, width, each): no beginning has more among the best of all
        k = min(2 * self.beam_size, width * each)
        scores, flat = (beams.scores.unsqueeze(2) + log_p).flatten(1).topk(k)  # (n, k)
        parents, tokens = flat // each, ways.flatten(1).gather(1, flat)
        ends = tokens == self.model.config.eos_id
        self._put_away(beams, parents, torch.where(ends, scores, -torch.inf)[:, : self.beam_size])

        scores, best = torch.where(ends, -torch.inf, scores).topk(min(self.beam_size, k))  # those that go on
        parents, tokens = parents.gather(1, best), tokens.gather(1, best)
        stay = self._going_on(beams, scores)
        rows = (torch.arange(n, device=flat.device).unsqueeze(1) * width + parents)[stay].flatten()
        before = beams.tokens[stay.unsqueeze(1), parents[stay]]  # (n that stay, width, length)
        beams.tokens = torch.cat((before, tokens[stay].unsqueeze(2)), 2)
        beams.scores, beams.sentences = scores[stay], beams.sentences[stay]
        beams.state = beams.state.branch(rows, None if len(stay) == n else stay)

    def _put_away(self, beams: _Beams, parents: Tensor, scores: Tensor) -> None:
        """Keep the hypotheses that end here: scores (n, at most beam_size), -inf where none does."""
        length = beams.tokens.shape[2] + 1
        values = (scores / self.penalty(length)).tolist()
        for i, j in (scores > -torch.inf).nonzero().tolist():
            ids = beams.tokens[i, parents[i, j]].tolist()
            self.finished[int(beams.sentences[i])].append(Hypothesis(ids, values[i][j]))

    def _going_on(self, beams: _Beams, scores: Tensor) -> Tensor:
        """Return which of the n sentences are not done, given the scores (n, width) of what would go on."""
        found = [self.finished[i] for i in beams.sentences.tolist()]
        # log p only falls, and no length divides it by more than the longest
        hopes = (scores.amax(1) / self.penalty(self.limits[beams.sentences] + 1)).tolist()
        stay = [
            i
            for i, (hypotheses, hope) in enumerate(zip(found, hopes, strict=True))
            if len(hypotheses) < self.beam_size
            and hope > max((hypothesis.score for hypothesis in hypotheses), default=-float("inf"))
        ]
        return torch.tensor(stay, dtype=torch.long, device=scores.device)
