"""Sampling the next token of a text.

A row of a batch has its own settings, random generator and thresholds, so its samples do not depend on the
other rows. It draws exactly one random number for each token, whatever the settings: so speculative decoding
does not change the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longscan.core.config import Config
from longscan.errors import LongscanError, UsageError
from longscan.inference.prefill import Ids
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer

__all__ = [
    "Constraint",
    "Event",
    "Finish",
    "Sampler",
    "SamplingConfig",
    "candidates",
    "check_fit",
    "log_probabilities",
    "to_array",
]

Finish: TypeAlias = Literal["eos", "stop", "length", "error"]

# fractions of the largest probability: only tokens above the first are considered, then more if they
# do not suffice
THRESHOLDS = (1e-2, 1e-4, 1e-6, 0.0)
BLOCK = 256  # weights per partial sum, when the sampled one is searched for
LIMITS = (-3e38, 3e38)  # of float32
MIN_TEMPERATURE = 1e-30  # below it, the division would overflow float32; sampling is greedy anyway


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How to choose the next token, and when to stop.

    Attributes:
        max_new_tokens: for each row.
        temperature: 0 takes the most likely token; below 1 sharpens, above 1 flattens the distribution.
        top_k: sample from the k most likely tokens (and ties with the last of them); 0 is off.
        top_p: sample from the most likely tokens of at least this total probability; 1 is off.
        min_p: drop tokens below this fraction of the largest probability; 0 is off.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely (CTRL,
            Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens that the new text has already.
        frequency_penalty: likewise, times how often.
        logprobs: None, or how many of the most likely tokens each event lists with their log-probabilities,
            beside its own token's.
        stop: strings that end a text, without being part of it.
        seed: of the random numbers; None draws one from torch's global generator. If several texts share
            their settings, row i uses seed + i.

    Raises:
        UsageError: a value is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("max_new_tokens", least=1)
        self.check("temperature", "top_k", least=0)
        self.check("top_p", above=0, most=1)
        self.check("min_p", least=0, below=1)
        self.check("repetition_penalty", above=0)
        self.check("presence_penalty", "frequency_penalty", least=-2, most=2)
        self.check("logprobs", least=0)
        self.check("seed", least=0, most=2**64 - 1)
        if not all(self.stop):
            raise UsageError(f"stop: expected strings that are not empty, got {self.stop!r}.")


class Event(NamedTuple):
    """One new token of one text.

    Attributes:
        row: which prompt or request it continues.
        token: its id; -1 after an error.
        text: the text that is complete now: never part of a stop string or of a character.
        finish: why it ends here: an end-of-text token, a stop string, max_new_tokens, an error; or None.
        error: the error of this text, which affects no other.
        logprob: the natural logarithm of the token's probability, before temperature and penalties; only if
            `SamplingConfig.logprobs` asks for it.
        top: ids and log-probabilities of the most likely tokens, the largest first.
        settled: tokens that the text so far includes, if only in part; a stop string may cut off the others.
    """

    row: int
    token: int
    text: str
    finish: Finish | None = None
    error: LongscanError | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    settled: int = 0


class Constraint(Protocol):
    """Decides which tokens may come next in one text."""

    def allowed(self) -> np.ndarray | None:
        """Return (n,) bool, n at most the vocabulary: which ids may be next; None for all."""

    def accept(self, token: int) -> None:
        """Take notice of the next token.

        Args:
            token: its id.
        """


def check_fit(model: LanguageModel, tokenizer: Tokenizer | None) -> None:
    """Raise unless there is a tokenizer, and a model has embeddings for all of its ids.

    Args:
        model: any.
        tokenizer: any; None is what `load` returns for a checkpoint without one.

    Raises:
        UsageError: there is none.
        LongscanError: they do not belong together.
    """
    if tokenizer is None:
        raise UsageError(
            "tokenizer: expected a Tokenizer, got None, as `load` returns for a checkpoint without one. "
            "Name the one that the model was trained with: load(name, tokenizer=...)."
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise LongscanError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {model.config.vocab_size:,}: "
            "they do not belong together. Use the tokenizer the model was trained with."
        )


def to_array(logits: Tensor) -> np.ndarray:
    """Return logits as a float32 array, without a copy if they are float32 on the CPU.

    Args:
        logits: of any shape and type, on any device.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        logits = logits.to("cpu", torch.float32)
    return logits.detach().numpy()


class Sampler:
    """Samples the tokens of one text.

    It uses NumPy, whose passes over a row of 50,000 numbers take 2 µs where torch's operators take 30 to 70.

    Args:
        config: the sampling settings.
        vocab_size: of the tokenizer; larger ids are padding and never sampled.
        prompt: the ids so far, for the repetition penalty.
        bias: id -> what is added to its logit.
    """

    def __init__(
        self,
        config: SamplingConfig,
        vocab_size: int,
        prompt: Ids = (),
        bias: Mapping[int, float] | None = None,
    ) -> None:
        self._config, self._vocab_size = config, vocab_size
        self._greedy = config.temperature == 0
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: np.ndarray | None = None  # (vocab_size,) bool
        if config.repetition_penalty != 1:
            ids = np.asarray(prompt, np.int64)
            self._seen = np.zeros(vocab_size, bool)
            self._seen[ids[ids < vocab_size]] = True
        self._added: np.ndarray | None = None  # (vocab_size,) float32, to the logits
        if bias or config.presence_penalty or config.frequency_penalty:
            self._added = np.zeros(vocab_size, np.float32)
            for token, value in (bias or {}).items():
                if token < vocab_size:
                    self._added[token] = value
        self._written: set[int] = set()

    def draw(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """Return the id of the next token.

        Args:
            logits: (padded_vocab_size,) float32, not modified.
            allowed: (n,) bool, which of the first n ids may be drawn, and no others; None for all.

        Raises:
            LongscanError: the logits are not numbers, or no token is allowed.
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
        if self._added is not None:
            logits = logits + self._added
        if allowed is not None:
            logits = _mask(logits, allowed)
        if self._added is not None or allowed is not None:
            token = int(logits.argmax())
        if not self._greedy:
            u = float(torch.rand((), generator=self._generator, dtype=torch.float64))
            ids, weights = candidates(logits, self._config)
            index = _invert(weights, u)
            token = index if ids is None else int(ids[index])
        if self._seen is not None:
            self._seen[token] = True
        if self._added is not None:
            first = token not in self._written
            self._added[token] -= self._config.frequency_penalty + first * self._config.presence_penalty
            self._written.add(token)
        return token


def candidates(logits: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the tokens to sample from: temperature, then top-k, top-p and min-p.

    Only thresholds are computed, so tokens that tie at one stay together. Usually a few hundred of the most
    likely tokens suffice for that; otherwise more are considered.

    Args:
        logits: (vocab_size,) float32, finite at their largest.
        config: with a temperature above 0.

    Returns:
        ids: (n,) ascending, or None for all.
        weights: (n,) proportional to their probabilities; the largest is 1.
    """
    with np.errstate(over="ignore"):  # -inf is correct
        weights = np.exp((logits - logits.max()) / np.float32(max(config.temperature, MIN_TEMPERATURE)))
    top_k = config.top_k if config.top_k < len(logits) else 0
    if not top_k and config.top_p == 1:
        if not config.min_p:
            return None, weights
        ids = (weights >= config.min_p).nonzero()[0]
        return ids, weights[ids]
    for threshold in THRESHOLDS:
        ids = (weights >= threshold).nonzero()[0]
        likely = weights[ids]
        if len(ids) < top_k:
            continue
        least = np.partition(likely, -top_k)[-top_k] if top_k else np.float32(0)
        if config.top_p < 1:
            total = float((likely[likely >= least] if top_k else weights).sum())
            bound = _nucleus(likely[likely >= least], config.top_p * total)
            if bound is None and threshold and not top_k:
                continue
            least = max(least, bound or least)
        break
    chosen = likely >= max(least, np.float32(config.min_p))
    return ids[chosen], likely[chosen]


def _nucleus(weights: np.ndarray, mass: float) -> np.float32 | None:
    """Return the smallest of the largest weights that reach a mass, or None (Holtzman et al. 2019)."""
    ordered = np.sort(weights)[::-1]
    n = int(ordered.cumsum(dtype=np.float64).searchsorted(mass))
    return np.float32(ordered[n]) if n < len(ordered) else None


def _invert(weights: np.ndarray, u: float) -> int:
    """Return the index at which the distribution function of weights (n,) reaches 0 <= u < 1."""
    # in float64, or the tail of a large vocabulary would be lost; in blocks, as one cumulative sum is slow
    below = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    # u has 53 bits, so u * total < total: an index without weight is never reached, even at the end
    target = u * below[-1]
    block = int(below.searchsorted(target, side="right"))
    part = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    index = int(part.searchsorted(target - (below[block - 1] if block else 0.0), side="right"))
    if index == len(part):  # the sum of the block was rounded to a little more
        index = int(part.searchsorted(part[-1]))
    return block * BLOCK + index


def _penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits (vocab_size,) with those of seen ids divided by the penalty, or multiplied below 0."""
    logits, ids = logits.copy(), seen.nonzero()[0]
    values = logits[ids]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = np.where(values > 0, values / penalty, values * penalty)
    logits[ids] = scaled.clip(*LIMITS)  # infinite ones would become NaN
    return logits


def _mask(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return logits (vocab_size,) in which ids that are not allowed are impossible."""
    if allowed.ndim != 1 or allowed.dtype != np.bool_:
        raise LongscanError(
            f"the constraint: expected a row of truth values, got {allowed.dtype} {allowed.shape}."
        )
    masked = np.full_like(logits, -np.inf)
    n = min(len(logits), len(allowed))
    masked[:n][allowed[:n]] = logits[:n][allowed[:n]]
    if not masked.max() > -np.inf:
        raise LongscanError("no token is allowed here: the constraint and the vocabulary do not fit.")
    return masked


def log_probabilities(logits: np.ndarray, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and the n most likely tokens with theirs.

    Args:
        logits: (vocab_size,) float32.
        token: its id.
        n: at least 0; ties go to the smaller id.

    Returns:
        In natural logarithms, computed in float64, the largest first.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    n = min(n, len(values))
    if not n:
        return float(values[token]), ()
    least = np.partition(values, -n)[-n]
    likely = (values >= least).nonzero()[0]
    order = likely[np.argsort(-values[likely], kind="stable")][:n]
    return float(values[token]), tuple((int(index), float(values[index])) for index in order)
