"""The generator of events under everything that writes: prompts in, tokens and text out, in one batch.

A row has its own generator of random numbers and every threshold is taken over its own probabilities, so what
a row draws does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from longscan.config import Config
from longscan.errors import LongscanError, UsageError
from longscan.models import LanguageModel, State
from longscan.tokenizer import Tokenizer

__all__ = [
    "Event",
    "Finish",
    "Sampler",
    "SamplingConfig",
    "TextWriter",
    "check_fit",
    "generate_ids",
    "probabilities",
]

Finish: TypeAlias = Literal["eos", "stop", "length"]

CHUNK = 1024  # tokens of the prompts read at a time, all rows together
FIRST_LOOK = 64  # the likeliest tokens that top-p looks at before it looks further; mostly they suffice
CONTEXT = 8  # tokens of a prompt that may decide how the first new one is written
COLDEST = 1e-30  # below, dividing by the temperature would leave the range of float32; it is greedy anyway


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How to choose the next token, and when to stop.

    Attributes:
        max_new_tokens: for each row.
        temperature: 0 takes the likeliest token; below 1 sharpens, above 1 flattens the distribution.
        top_k: keep the k likeliest tokens (and those that tie with the last of them); 0 keeps all.
        top_p: keep the likeliest tokens that together have at least this probability; 1 keeps all.
        min_p: keep tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely (CTRL,
            Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        stop: strings that end a text; they are not part of it.
        seed: row i draws with seed + i; None draws a seed from torch's global generator.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and less than 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0"),
            "stop": (all(self.stop), "strings that are not empty"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
        }
        for name, (fits, expected) in rules.items():
            if not fits:
                raise UsageError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Event:
    """One new token of one row.

    Attributes:
        row: which prompt it continues.
        token: its id.
        text: what is certain of the text now: never part of a stop string, never half a character.
        finish: why the row ends here: the end-of-text token, a stop string, max_new_tokens; or None.
    """

    row: int
    token: int
    text: str
    finish: Finish | None = None


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    eos_id: int | None,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Event]:
    """Continue several sequences in one batch; each row ends by itself and then costs nothing more.

    Args:
        model: any causal model: it reads by `prefill` and `step`, and its state is its own affair.
        prompts: the ids of each row; an empty one begins after `eos_id`.
        config: how to choose tokens and when to stop.
        eos_id: the token that ends a row; None if nothing does.
        tokenizer: writes the text of the events and looks for stop strings; without one there is no text.
        progress: called while the prompts are read, with the tokens read and the length of the longest.

    Returns:
        An iterator of events: for each token, the rows that are still running, in order.

    Raises:
        LongscanError: an id, the tokenizer or an empty prompt is not for this model.
        UsageError: stop strings without a tokenizer.
    """
    if tokenizer is not None:
        check_fit(model, tokenizer)
    elif config.stop:
        raise UsageError("stop: stop strings are text, give generate_ids a tokenizer to find them.")
    starts = [list(ids) if ids or eos_id is None else [eos_id] for ids in prompts]
    for ids in starts:
        if not ids:
            raise LongscanError("a prompt is empty and no eos_id says how a text begins: give it a token.")
        wrong = next((token for token in ids if not 0 <= token < model.config.vocab_size), None)
        if wrong is not None:
            raise LongscanError(f"token id: expected 0 to {model.config.vocab_size - 1:,}, got {wrong:,}.")
    return _write(model, starts, config, eos_id, tokenizer, progress) if starts else iter(())


def _write(
    model: LanguageModel,
    prompts: list[list[int]],
    config: SamplingConfig,
    eos_id: int | None,
    tokenizer: Tokenizer | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Event]:
    """The loop of `generate_ids`."""
    logits, state = _read(model, prompts, progress)
    vocab_size = min([model.config.vocab_size, *([tokenizer.vocab_size] if tokenizer else [])])
    sampler = Sampler(config, vocab_size, prompts)
    texts = [TextWriter(tokenizer, ids, config.stop) for ids in prompts]
    rows = list(range(len(prompts)))
    for left in reversed(range(config.max_new_tokens)):
        ids = sampler(logits)
        running = []
        for place, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            text, finish = texts[row].push(token, is_eos=token == eos_id, is_last=left == 0)
            yield Event(row, token, text, finish)
            if finish is None:
                running.append(place)
        if not running:
            return
        if len(running) < len(rows):
            rows, ids = [rows[place] for place in running], ids[running]
            state = state.select(running)
            sampler.select(running)
        logits, state = model.step(ids.to(logits.device), state)


def _read(
    model: LanguageModel, prompts: list[list[int]], progress: Callable[[int, int], None] | None
) -> tuple[Tensor, State]:
    """Read the prompts in chunks of constant memory, aligned at their ends.

    A row joins the batch in the chunk in which it begins, so there is never more padding than one chunk.

    Returns:
        logits: (rows, padded_vocab_size) after each prompt.
        state: after it.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # longest first
    waits = [len(prompts[order[0]]) - len(prompts[row]) for row in order]  # columns before each row begins
    device, begin, length = model.backbone.embedding.weight.device, 0, len(prompts[order[0]])
    state, logits = model.init_state(0), torch.empty(0)
    while begin < length:
        width = min(CHUNK, length - begin)
        while width > 1 and width * sum(wait < begin + width for wait in waits) > CHUNK:
            width //= 2
        end = begin + width
        started = sum(wait < end for wait in waits)
        if started > state.batch_size:
            state = _join(state, model.init_state(started - state.batch_size))
        missing = [max(0, wait - begin) for wait in waits[:started]]
        ids = torch.tensor(
            [
                [0] * gap + prompts[row][begin + gap - wait : end - wait]
                for row, wait, gap in zip(order, waits, missing, strict=False)
            ]
        )  # (started, width)
        seq_idx = None
        if any(missing):
            seq_idx = torch.where(torch.arange(width) < torch.tensor(missing)[:, None], -1, 0).to(device)
        logits, state = model.prefill(ids.to(device), state, seq_idx, width)
        begin = end
        if progress:
            progress(begin, length)
    back = torch.tensor(order).argsort()
    return logits[back.to(logits.device)], state.select(back)


def _join(first: State, second: State) -> State:
    """Put two batches below each other."""
    pairs = zip(first.layers, second.layers, strict=True)
    return State([a._make(map(torch.cat, zip(a, b, strict=True))) for a, b in pairs])


def check_fit(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Insist that the model knows all ids of the tokenizer.

    Args:
        model: any.
        tokenizer: any.

    Raises:
        LongscanError: they do not belong together.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise LongscanError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {model.config.vocab_size:,}: "
            "they do not belong together. Use the tokenizer the model was trained with."
        )


class Sampler:
    """Draws a token for every row that is still running.

    Args:
        config: how.
        vocab_size: ids from here on name no token and are never drawn.
        prompts: the ids of each row so far, for the repetition penalty.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int, prompts: Sequence[Sequence[int]]) -> None:
        self._config, self._vocab_size = config, vocab_size
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
        self._generators = [
            torch.Generator().manual_seed((seed + row) % 2**64) for row in range(len(prompts))
        ]
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, ids in enumerate(prompts):
                self._seen[row, [token for token in set(ids) if token < vocab_size]] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw.

        Args:
            logits: (rows, padded_vocab_size) of any type, on any device.

        Returns:
            (rows,) int64, on the CPU.

        Raises:
            LongscanError: the logits are not numbers.
        """
        logits = logits[:, : self._vocab_size].to("cpu", torch.float32)  # (rows, vocab_size)
        if not logits.amax(-1).isfinite().all():
            raise LongscanError(
                "the model computed NaN or infinite logits: its weights are damaged, "
                "or its type is too narrow for them (load it in float32)."
            )
        if self._seen is not None:
            logits = _penalize(logits, self._seen, self._config.repetition_penalty)
        if self._config.temperature == 0:
            ids = logits.argmax(-1)
        else:
            ids = self._draw(probabilities(logits, self._config))
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows.

        Args:
            rows: their places in the batch as it is now.
        """
        self._generators = [self._generators[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _draw(self, probs: Tensor) -> Tensor:
        """Invert each row's distribution function at one random number; probs (rows, vocab_size)."""
        below = probs.double().cumsum(-1)  # in float32 the tail of a large vocabulary would be lost
        # u < 1 in 53 bits, so u * total < total: a token of probability 0 is out of reach, also the last one
        u = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in self._generators])
        return torch.searchsorted(below, u * below[:, -1:], right=True).squeeze(1)


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Turn logits into the distribution that is drawn from: temperature, then top-k, top-p and min-p.

    Only thresholds are searched for, never an order, so tokens that tie at one stay together.

    Args:
        logits: (rows, vocab_size) float32, finite at their largest.
        config: with a temperature above 0.

    Returns:
        (rows, vocab_size), each row with sum 1.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(config.temperature, COLDEST)
    if 0 < config.top_k < logits.shape[1]:
        least = scaled.topk(config.top_k).values[:, -1:]  # (rows, 1)
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probs = scaled.softmax(-1)
    if config.top_p < 1:
        probs = probs.masked_fill(probs < _nucleus(probs, config.top_p), 0)
    if config.min_p > 0:
        probs = probs.masked_fill(probs < config.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability in each row that top-p keeps (rows, 1); Holtzman et al. 2019."""
    width, vocab_size = FIRST_LOOK, probs.shape[1]
    while True:
        likeliest = probs.topk(min(width, vocab_size)).values
        missing = likeliest.cumsum(-1, dtype=torch.float64) < top_p  # (rows, width), True and then False
        if width >= vocab_size or not missing[:, -1].any():
            break
        width *= 8
    last = missing.sum(-1, keepdim=True).clamp(
        max=likeliest.shape[1] - 1
    )  # rounding may miss top_p = 0.999...
    return likeliest.gather(1, last)


def _penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely where seen (rows, vocab_size): towards 0 above it, away from 0 below it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class TextWriter:
    """Turns the tokens of a row into text, and ends it before a stop string.

    What may become a stop string is held back, so the text that is out never has to be taken back.

    Args:
        tokenizer: knows the tokens; without one there is no text.
        prompt: the ids before the first new one.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._stop, self._held = stop, ""
        self._stream = tokenizer.stream() if tokenizer else None
        if self._stream:
            for token in prompt[-CONTEXT:]:
                self._stream.push(token)  # in some vocabularies a space depends on the token before it

    def push(self, token: int, *, is_eos: bool, is_last: bool) -> tuple[str, Finish | None]:
        """Take the next token.

        Args:
            token: its id.
            is_eos: whether it ends the text, and is none itself.
            is_last: whether no other may follow.

        Returns:
            The text that is certain now, and why the row ends here, if it does.
        """
        text = ""
        if self._stream:
            text = "" if is_eos else self._stream.push(token)
            text += self._stream.flush() if is_eos or is_last else ""
        text, stopped = self._release(self._held + text)
        if stopped:
            return text, "stop"
        if is_eos or is_last:
            return text + self._held, "eos" if is_eos else "length"
        return text, None

    def _release(self, text: str) -> tuple[str, bool]:
        """Return the text before the first stop string; without one, hold back what may begin one."""
        # the one that is complete first counts, so it does not matter in which pieces the text arrives
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            return text[: min(found)[1]], True
        begun = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) - max(begun, default=0)
        self._held = text[cut:]
        return text[:cut], False
