"""Requests to an engine, and their validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_range, check_whole
from longscan.errors import LongscanError
from longscan.inference.prefill import Ids
from longscan.inference.sampling import Constraint, SamplingConfig
from longscan.models import LanguageModel, State
from longscan.models.common.growable import GrowableState
from longscan.models.common.state import SavedState

__all__ = ["Request", "make_requests", "tokens_of"]

DEFAULT = SamplingConfig()


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A text to continue.

    Attributes:
        ids: (seq_len,) the prompt, or what follows the tokens of `state` and `pending`.
        config: the sampling settings.
        eos_id: the token that ends the text, or several; None for none.
        state: of one row, to continue from, not modified; None at the start of a text.
        position: the number of tokens that the state includes.
        pending: the tokens after them, as in `SavedState.pending`: the engine decodes them step by step, so
            that the text continues bit-exactly as if it had not been saved.
        keep: whether `Engine.saved` still has the state when the text has ended.
        before_stop: whether that state, if a stop string ended the text, is the one before the token in which
            the stop string began, without pending tokens: it holds only what was shown. Drafts prevent it.
        logit_bias: id -> what is added to its logit before sampling.
        constraint: makes what decides which tokens may come next, a grammar say (see `Grammars`); None
            allows all.
        shown: special tokens that appear in the text of events, and how; others give no text.
    """

    ids: Ids
    config: SamplingConfig = DEFAULT
    eos_id: int | Sequence[int] | None = None
    state: State | None = None
    position: int = 0
    pending: Sequence[int] = ()
    keep: bool = False
    before_stop: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Callable[[], Constraint] | None = None
    shown: Mapping[int, str] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end the text."""
        if self.eos_id is None:
            return ()
        return tuple(self.eos_id) if isinstance(self.eos_id, Iterable) else (self.eos_id,)


def make_requests(
    prompts: Sequence[Ids],
    config: SamplingConfig,
    eos_id: int | Sequence[int] | None,
    before: SavedState | None = None,
    keep: bool = False,
) -> Iterator[Request]:
    """Yield requests for prompts that share their settings, row i with seed + i.

    Args:
        prompts: the ids of each; an empty one starts with the first `eos_id`.
        config: the sampling settings.
        eos_id: the token that ends a text, or several; None for none.
        before: the state that all prompts continue, or None.
        keep: see `Request`.

    Raises:
        LongscanError: a prompt is empty, and there is no eos_id to start with.
    """
    seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    for row, ids in enumerate(prompts):
        request = Request(
            ids=ids, config=replace(config, seed=(seed + row) % 2**64), eos_id=eos_id, keep=keep
        )
        if before is not None:
            request = replace(request, state=before.state, position=before.position, pending=before.pending)
        elif not len(ids):
            if not request.ends:
                raise LongscanError(
                    "a prompt is empty, and without an eos_id there is no token to start with: add a token."
                )
            request = replace(request, ids=request.ends[:1])
        yield request


def tokens_of(request: Request, model: LanguageModel, max_tokens: int | None = None) -> np.ndarray:
    """Return the tokens to prefill for a request, after validating it.

    Args:
        request: any.
        model: the engine's.
        max_tokens: of a text, prompt and new ones together; None for no bound.

    Returns:
        (n,) int64, pending ones first.

    Raises:
        LongscanError: it has no tokens or too many, an id is not of the model, or the state is not.
    """
    size = model.config.vocab_size
    ids = np.concatenate([_array(request.pending), _array(request.ids)])
    if not len(ids):
        raise LongscanError("a request has no tokens: expected at least one.")
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise LongscanError(f"token id: expected 0 to {size - 1:,}, got {wrong[0]:,}.")
    for end in request.ends:
        check_whole("eos_id", end, 0)
        if end >= size:
            raise LongscanError(f"eos_id: expected 0 to {size - 1:,}, or None, got {end:,}.")
    if not isinstance(request.logit_bias, Mapping):
        raise LongscanError(
            f"logit_bias: expected ids with numbers, got {type(request.logit_bias).__name__}."
        )
    for token, bias in request.logit_bias.items():
        check_whole("logit_bias", token, 0)
        if token >= size:
            raise LongscanError(f"logit_bias: expected ids from 0 to {size - 1:,}, got {token:,}.")
        check_range("logit_bias", bias, least=-100, most=100)
    check_whole("position", request.position, 0)
    known, new = request.position + len(ids), request.config.max_new_tokens
    if max_tokens is not None and known + new > max_tokens:
        raise LongscanError(
            f"a request of {known:,} tokens and {new:,} new ones: expected at most {max_tokens:,} together. "
            "Shorten it."
        )
    if request.state is not None:
        _check_state(request.state, model)
    return ids


def _check_state(state: State, model: LanguageModel) -> None:
    """Raise unless a state is one row of this model's."""
    like, mine = _layout(model.init_state(0)), _layout(state)
    if like != mine:
        expected, got = (f"{len(tensors)} tensors, {tensors[:2]} ..." for tensors in (like, mine))
        raise LongscanError(f"the state of another model: expected {expected}, got {got}.")
    if state.batch_size != 1:
        raise LongscanError(
            f"the state of a request: expected 1 row, got {state.batch_size}. See state.select."
        )


def _layout(state: State) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return the tensors of a state: names, shapes and types, apart from rows and tokens."""
    state = State([layer.front(0) if isinstance(layer, GrowableState) else layer for layer in state.layers])
    return [(name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in state.named_tensors()]


def _array(ids: Ids) -> np.ndarray:
    """Return a copy of token ids (seq_len,) as an int64 array."""
    try:
        values = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    except ValueError:  # lists of different lengths
        values = np.empty((0, 0))
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise LongscanError("token ids: expected one sequence of whole numbers.")
    return values.astype(np.int64)
