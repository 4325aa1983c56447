"""Drawing the next token of a text, and turning tokens into the text that may be shown.

A row of a batch has its own settings, its own generator of random numbers and thresholds over its own
probabilities, so what it draws does not depend on its neighbours. It takes exactly one random number for each
token, whatever the settings: that is what lets drafts be checked without changing the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longscan.core.config import Config
from longscan.errors import LongscanError, UsageError
from longscan.inference.prefill import Ids
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = [
    "Event",
    "Finish",
    "Sampler",
    "SamplingConfig",
    "TextWriter",
    "candidates",
    "check_fit",
    "to_array",
]

Finish: TypeAlias = Literal["eos", "stop", "length", "error"]

# tokens with this share of the likeliest one's probability are looked at, then more if they do not suffice
LOOKS = (1e-2, 1e-4, 1e-6, 0.0)
BLOCK = 256  # weights that are added up together before the one that is drawn is searched for
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
        seed: of the random numbers; None draws a seed from torch's global generator. Where several texts
            share their settings, row i draws with seed + i.

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
        """Check the types and the ranges."""
        super().__post_init__()
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


class Event(NamedTuple):
    """One new token of one text.

    Attributes:
        row: which prompt or request it continues.
        token: its id; -1 if there is none because of an error.
        text: what is certain of the text now: never part of a stop string, never half a character.
        finish: why the text ends here: the end-of-text token, a stop string, max_new_tokens, an error; or
            None.
        error: what went wrong with this text, and with this one only.
    """

    row: int
    token: int
    text: str
    finish: Finish | None = None
    error: LongscanError | None = None


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


def to_array(logits: Tensor) -> np.ndarray:
    """Show logits as a float32 array, without a copy if they are float32 on the CPU.

    Args:
        logits: of any shape and type, on any device.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        logits = logits.to("cpu", torch.float32)
    return logits.detach().numpy()


class Sampler:
    """Draws the tokens of one text, one after another.

    NumPy does it: on one row of 50,000 numbers its passes take 2 µs where torch's operators take 30 to 70.

    Args:
        config: how.
        vocab_size: ids from here on name no token and are never drawn.
        prompt: the ids so far, for the repetition penalty.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int, prompt: Ids = ()) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._greedy = config.temperature == 0
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: np.ndarray | None = None  # (vocab_size,) bool
        if config.repetition_penalty != 1:
            ids = np.asarray(prompt, np.int64)
            self._seen = np.zeros(vocab_size, bool)
            self._seen[ids[ids < vocab_size]] = True

    def draw(self, logits: np.ndarray) -> int:
        """Draw the next token.

        Args:
            logits: (padded_vocab_size,) float32, left as they are.

        Returns:
            Its id.

        Raises:
            LongscanError: the logits are not numbers.
        """
        logits = logits[: self._vocab_size]
        token = int(logits.argmax())  # the first NaN, if there is one
        if not -np.inf < logits[token] < np.inf:
            raise LongscanError(
                "the model computed NaN or infinite logits: its weights are damaged, "
                "or its type is too narrow for them (load it in float32)."
            )
        if self._seen is not None:
            logits = _penalize(logits, self._seen, self._config.repetition_penalty)
            token = int(logits.argmax())
        if not self._greedy:
            u = float(torch.rand((), generator=self._generator, dtype=torch.float64))
            ids, weights = candidates(logits, self._config)
            place = _invert(weights, u)
            token = place if ids is None else int(ids[place])
        if self._seen is not None:
            self._seen[token] = True
        return token


def candidates(logits: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """Find the tokens that may be drawn: temperature, then top-k, top-p and min-p.

    Only thresholds are searched for, so tokens that tie at one stay together. Mostly some hundred of the
    likeliest tokens decide; more are looked at until they certainly do.

    Args:
        logits: (vocab_size,) float32, finite at their largest.
        config: with a temperature above 0.

    Returns:
        ids: (n,) ascending, or None for all.
        weights: (n,) in proportion to their probabilities; the largest is 1.
    """
    with np.errstate(over="ignore"):  # -inf is right
        weights = np.exp((logits - logits.max()) / np.float32(max(config.temperature, COLDEST)))
    top_k = config.top_k if config.top_k < len(logits) else 0
    if not top_k and config.top_p == 1:
        if not config.min_p:
            return None, weights
        ids = (weights >= config.min_p).nonzero()[0]
        return ids, weights[ids]
    for look in LOOKS:
        ids = (weights >= look).nonzero()[0]
        kept = weights[ids]
        if len(ids) < top_k:
            continue
        least = np.partition(kept, -top_k)[-top_k] if top_k else np.float32(0)
        if config.top_p < 1:
            total = float((kept[kept >= least] if top_k else weights).sum())
            bound = _nucleus(kept[kept >= least], config.top_p * total)
            if bound is None and look and not top_k:
                continue
            least = max(least, bound or least)
        break
    chosen = kept >= max(least, np.float32(config.min_p))
    return ids[chosen], kept[chosen]


def _nucleus(weights: np.ndarray, mass: float) -> np.float32 | None:
    """Return the least of the largest weights that reach a mass, or None (Holtzman et al. 2019)."""
    ordered = np.sort(weights)[::-1]
    n = int(ordered.cumsum(dtype=np.float64).searchsorted(mass))
    return np.float32(ordered[n]) if n < len(ordered) else None


def _invert(weights: np.ndarray, u: float) -> int:
    """Invert the distribution function of weights (n,) at a random number 0 <= u < 1."""
    # in float64, or the tail of a large vocabulary would be lost; and in blocks, as adding one by one is slow
    below = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    # u has 53 bits, so u * total < total: what has no weight is out of reach, also at the end
    target = u * below[-1]
    block = int(below.searchsorted(target, side="right"))
    part = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    place = int(part.searchsorted(target - (below[block - 1] if block else 0.0), side="right"))
    if place == len(part):  # the sum of the block, rounded otherwise, was a little larger
        place = int(part.searchsorted(part[-1]))
    return block * BLOCK + place


def _penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Copy logits (vocab_size,), less likely where seen: towards 0 above it, away from 0 below it."""
    logits, ids = logits.copy(), seen.nonzero()[0]
    values = logits[ids]
    with np.errstate(over="ignore"):
        logits[ids] = np.where(values > 0, values / penalty, values * penalty)
    return logits


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
