"""A request on its way through the engine: its prefill, in pieces if need be, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longscan.inference.prefill import CHUNK, read
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.request import Request
from longscan.inference.sampling import Finish, Sampler, TextWriter
from longscan.models import LanguageModel, State

__all__ = ["MAX_PENDING", "Row", "RowProgress"]

MAX_PENDING = 16  # tokens that one pass decodes before the drafts; more are decoded without drafts first


@dataclass
class RowProgress:
    """How much of a text its state includes.

    Attributes:
        position: tokens that the state includes.
        pending: the tokens after them, at least one.
        ids: all tokens, for drafters; empty if there is none.
    """

    position: int = 0
    pending: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class Row:
    """A request in the engine.

    Args:
        number: of the request.
        request: what to generate.
        ids: (n,) the tokens of the prompt, pending ones first.
    """

    sampler: Sampler
    writer: TextWriter

    def __init__(self, number: int, request: Request, ids: np.ndarray) -> None:
        self.number, self.request, self.ids = number, request, ids
        self.state: State | None = request.state  # until the prefill is complete
        self.ends = request.ends
        self.done = 0  # tokens of the prompt that are prefilled
        self.left = request.config.max_new_tokens
        self.logits: np.ndarray | None = None  # (padded_vocab_size,) to draw the next token from
        self.progress = RowProgress()
        self.finish: Finish | None = None
        self._store: Callable[[int, State], None] | None = None  # for the prefix cache

    def prefill(
        self,
        model: LanguageModel,
        budget: int | None,
        cache: PrefixCache | None,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Process the next part of the prompt.

        Args:
            model: the engine's.
            budget: tokens to process, about; None for all that are left.
            cache: of states of prefixes.
            progress: called after each chunk with the tokens of this prompt that are prefilled.

        Returns:
            (padded_vocab_size,) the logits after it.
        """
        ids, start, n_pending = self.ids, self.request.position, len(self.request.pending)
        if self.done < n_pending:
            logits = self._decode_pending(model)
            if n_pending == len(ids):
                return logits
        if cache and not self.done and self.request.state is None:
            self.done, self.state, self._store = cache.begin(ids)
        begin, end = self.done, len(ids)
        if budget is not None:  # cut where `read` cuts, as other chunks would round differently
            end = min(end, max(1, (start + begin + budget) // CHUNK) * CHUNK - start)
            end = end if end > begin else min(len(ids), begin + CHUNK - (start + begin) % CHUNK)

        def notify(done: int, _: int) -> None:
            if progress:
                progress(begin + done)

        logits, self.state = read(
            model, ids[begin:end], self.state, start + begin, progress=notify, boundary=self._store
        )
        self.done = end
        return logits

    def _decode_pending(self, model: LanguageModel) -> Tensor:
        """Decode the pending tokens of a saved text; return the logits (padded_vocab_size,) after them."""
        state, n_pending = self.request.state, len(self.request.pending)
        self.state = model.init_state(1) if state is None else state.clone()
        for begin in range(0, n_pending, MAX_PENDING):
            part = self.ids[begin : min(begin + MAX_PENDING, n_pending)]
            logits, _ = model.advance(torch.from_numpy(part)[None].to(model.device), self.state)
        self.done = n_pending
        return logits[0, -1]

    def release(self) -> None:
        """Free what only the prefill needs."""
        self.state = self._store = None
