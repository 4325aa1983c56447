"""Generate text: pieces for one prompt, whole texts for many, ids for who needs them."""

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
    progress: Progress | None = None,
) -> Iterator[Event]:
    """Continue several sequences in one batch; each row ends by itself and then costs nothing more.

    Args:
        model: any causal model: it reads by `prefill` and `step`, and its state is its own affair.
        prompts: the ids of each row; an empty one begins after the first `eos_id`.
        config: how to choose tokens and when to stop.
        eos_id: the token that ends a row, or several; None if nothing does.
        tokenizer: writes the text of the events and looks for stop strings; without one there is no text.
        progress: called while prompts are read, with the tokens read and those of all prompts.

    Returns:
        An iterator of events: for each token, the rows that are still running. At most MAX_SLOTS run at a
        time; the others follow.

    Raises:
        LongscanError: an id, the tokenizer or an empty prompt is not for this model.
        UsageError: stop strings without a tokenizer.
    """
    slots = max(1, min(len(prompts), MAX_SLOTS))
    engine = Engine(model, tokenizer, slots=slots, progress=progress)
    for request in make_requests(prompts, config, eos_id):
        engine.submit(request)
    return drain(engine)


def drain(engine: Engine) -> Iterator[Event]:
    """Run an engine to its end.

    Raises:
        LongscanError: a text ended with an error.
    """
    for event in engine.run():
        if event.error is not None:
            raise event.error
        yield event


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **sampling: Any) -> Iterator[str]:
    """Continue a text, piece by piece.

    Args:
        model: what writes.
        tokenizer: the one it was trained with.
        prompt: where to begin; nothing begins a new document.
        sampling: fields of `SamplingConfig`.

    Returns:
        An iterator of the new text, without the prompt.

    Raises:
        LongscanError: the model and the tokenizer or the fields do not fit.
    """
    config = SamplingConfig.from_dict(sampling)
    check_text("prompt", prompt)
    prompts = encode(tokenizer, [prompt])
    events = generate_ids(model, prompts, config, eos_id=tokenizer.eos_ids, tokenizer=tokenizer)
    return (event.text for event in events if event.text)
