"""Generation: the text of one prompt in pieces, or the token ids of several prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from longscan.core.checks import check_text
from longscan.inference.engine import MAX_SLOTS, Engine
from longscan.inference.prefill import Ids, Progress, encode
from longscan.inference.request import make_requests
from longscan.inference.sampling import (
    Event,
    SamplingConfig,
    check_fit,
)
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = ["drain", "generate", "generate_ids"]


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Ids],
    config: SamplingConfig,
    *,
    eos_id: int | Sequence[int] | None,
    tokenizer: Tokenizer | None = None,
    slots: int = MAX_SLOTS,
    progress: Progress | None = None,
) -> Iterator[Event]:
    """Return the events of several prompts, generated in one batch that finished rows leave.

    Args:
        model: any causal model.
        prompts: the ids of each row; an empty one starts with the first `eos_id`.
        config: the sampling settings.
        eos_id: the token that ends a row, or several; None for none.
        tokenizer: decodes the events' text and finds stop strings; without one there is no text.
        slots: rows that decode at a time, at most; the others follow.
        progress: called during prefill with the tokens processed so far and those of all prompts.

    Returns:
        An iterator of events, one for each token.

    Raises:
        LongscanError: an id or the tokenizer is not for this model, or a prompt is empty without `eos_id`.
        UsageError: stop strings without a tokenizer.
    """
    rows = max(1, min(len(prompts), slots))
    engine = Engine(model, tokenizer, slots=rows, progress=progress)
    for request in make_requests(prompts, config, eos_id):
        engine.submit(request)
    return drain(engine)


def drain(engine: Engine) -> Iterator[Event]:
    """Yield the events of an engine until it is idle.

    Raises:
        LongscanError: a text ended with an error.
    """
    for event in engine.run():
        if event.error is not None:
            raise event.error
        yield event


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> Iterator[str]:
    """Return the continuation of a text, piece by piece.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        prompt: the text; an empty one starts a new document.
        sampling: fields of `SamplingConfig`.

    Returns:
        An iterator of the new text, without the prompt.

    Raises:
        UsageError: there is no tokenizer.
        LongscanError: the tokenizer is not for this model, or a field is unknown.
    """
    config = SamplingConfig.from_dict(sampling)
    check_text("prompt", prompt)
    check_fit(model, tokenizer)
    prompts = encode(tokenizer, [prompt])
    events = generate_ids(model, prompts, config, eos_id=tokenizer.eos_ids, tokenizer=tokenizer)
    return (event.text for event in events if event.text)
