"""A request on its way through the engine: its prefill, in pieces if need be, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longscan.errors import LongscanError
from longscan.inference.prefill import CHUNK, read
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.request import Request
from longscan.inference.sampling import Finish, Sampler
from longscan.inference.text_writer import TextWriter
from longscan.models import LanguageModel, State

__all__ = ["MAX_PENDING", "Prompt", "Row", "RowProgress"]

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


class Prompt:
    """The prefill of a prompt, in pieces if need be; several rows may wait for it.

    Args:
        request: what to generate.
        ids: (n,) the tokens of the prompt, pending ones first.
        rows: that wait for it.
    """

    def __init__(self, request: Request, ids: np.ndarray, rows: int) -> None:
        self.request, self.ids, self._rows = request, ids, rows
        self.state: State | None = request.state
        self.done = 0  # tokens that are prefilled
        self.logits: Tensor | None = None  # (padded_vocab_size,) after them
        self._store: Callable[[int, State], None] | None = None  # for the prefix cache

    @property
    def complete(self) -> bool:
        """Whether all tokens are prefilled."""
        return self.done == len(self.ids)

    def prefill(
        self,
        model: LanguageModel,
        budget: int | None,
        cache: PrefixCache | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Process the next part of the prompt.

        Args:
            model: the engine's.
            budget: tokens to process, about; None for all that are left.
            cache: of states of prefixes.
            progress: called after each chunk with the tokens of this prompt that are prefilled.
        """
        ids, start, n_pending = self.ids, self.request.position, len(self.request.pending)
        if self.done < n_pending:
            self._decode_pending(model)
            if self.complete:
                return
        if cache and not self.done and self.request.state is None:
            self.done, self.state, self._store = cache.begin(ids)
        begin, end = self.done, len(ids)
        if budget is not None:  # cut where `read` cuts, as other chunks would round differently
            end = min(end, max(1, (start + begin + budget) // CHUNK) * CHUNK - start)
            end = end if end > begin else min(len(ids), begin + CHUNK - (start + begin) % CHUNK)

        def notify(done: int, _: int) -> None:
            if progress:
                progress(begin + done)

        self.logits, self.state = read(
            model, ids[begin:end], self.state, start + begin, progress=notify, boundary=self._store
        )
        self.done = end

    def _decode_pending(self, model: LanguageModel) -> None:
        """Decode the pending tokens of a saved text."""
        state, n_pending = self.request.state, len(self.request.pending)
        self.state = model.init_state(1) if state is None else state.clone()
        for begin in range(0, n_pending, MAX_PENDING):
            part = self.ids[begin : min(begin + MAX_PENDING, n_pending)]
            logits, _ = model.advance(torch.from_numpy(part)[None].to(model.device), self.state)
        self.done, self.logits = n_pending, logits[0, -1]

    def leave(self) -> bool:
        """Count a row that waits no longer; return whether it was the last, and all memory is freed."""
        self._rows -= 1
        if not self._rows:
            self.state = self.logits = self._store = None
        return not self._rows


class Row:
    """A request in the engine.

    Args:
        number: of the request.
        request: what to generate.
        prompt: its prefill.
    """

    sampler: Sampler
    writer: TextWriter

    def __init__(self, number: int, request: Request, prompt: Prompt) -> None:
        self.number, self.request, self.prompt = number, request, prompt
        self.ends = request.ends
        self.constraint = request.constraint() if request.constraint else None
        self.left = request.config.max_new_tokens
        self.logits: np.ndarray | None = None  # (padded_vocab_size,) to draw the next token from
        self.progress = RowProgress()
        self.finish: Finish | None = None
        # the position at which a stop string may have begun, and what `State.mark` returned there
        self.mark: tuple[int, list[Tensor]] | None = None

    def draw(self, logits: np.ndarray) -> int:
        """Return the id of the next token.

        Args:
            logits: (padded_vocab_size,) float32, not modified.

        Raises:
            LongscanError: the logits are not numbers, or the constraint allows nothing or has failed.
        """
        constraint = self.constraint
        if constraint is None:
            return self.sampler.draw(logits)
        try:
            token = self.sampler.draw(logits, constraint.allowed())
            constraint.accept(token)
        except LongscanError:
            raise
        except Exception as error:  # somebody else's code must not stop the other rows
            raise LongscanError(f"the constraint failed: {type(error).__name__}: {error}") from error
        return token
