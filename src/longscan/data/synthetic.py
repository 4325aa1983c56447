"""Synthetic tasks that test what a memory can do: associative recall, induction, copying, adding.

A maker returns ids (n, seq_len) and targets of the same shape: the token to predict at each position, -100
where there is none. Each is a function of the torch.Generator it is given.

    recall      a 5 b 7 c 6 a 5 => b        7              which value belongs to the key (Fu et al. 2022)
    induction   3 1 => 7 2 2 9 4 =>         7              what stood behind the mark (Olsson et al. 2022)
    mqar        a 5 b 7 6 b 5 a => . . . . . 7 . 5    the values of many keys (Arora et al. 2023)
    selective   . 5 . . 2 . 7 . : : :       5 2 7          the tokens without the blanks (Gu and Dao 2023)
    copying     5 2 7 . . . . . : : :       5 2 7          the tokens at the front (Arjovsky et al. 2016)
    adding      numbers, two of them marked                their sum (Hochreiter and Schmidhuber 1997)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.errors import UsageError

__all__ = [
    "IGNORED",
    "Examples",
    "adding",
    "copying",
    "distant",
    "distinct",
    "induction",
    "mqar",
    "recall",
    "selective",
]


IGNORED = -100
GAP_POWER = 0.01  # of the gaps of mqar: their distribution function is a power of the distance


class Examples(NamedTuple):
    """Token sequences and their targets.

    Attributes:
        ids: (n, seq_len) int64.
        targets: (n, seq_len) int64, -100 where there is none.
    """

    ids: Tensor
    targets: Tensor

    def everywhere(self) -> Examples:
        """Return the examples with the next token as target at every position without one."""
        following = torch.cat([self.ids[:, 1:], torch.full_like(self.ids[:, :1], IGNORED)], 1)
        return Examples(self.ids, torch.where(self.targets == IGNORED, following, self.targets))

    def select(self, rows: Tensor) -> Examples:
        """Return some of the sequences.

        Args:
            rows: (n,) their numbers.
        """
        return Examples(self.ids[rows], self.targets[rows])


Maker = Callable[[int, torch.Generator], Examples]  # how many, from which randomness


def recall(n: int, generator: torch.Generator, vocab_size: int = 9, length: int = 20) -> Examples:
    """Return sequences of keys and values, each key with one value, that end with one of the keys.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: the last token is the mark; half of the others are keys, half are values.
        length: tokens before the mark, in pairs.

    Returns:
        ids (n, length + 2); asked is the value of the last key.

    Raises:
        UsageError: the sizes allow no key or no pair.
    """
    n_keys, n_pairs = (vocab_size - 1) // 2, length // 2
    _check(n_keys > 0 and n_pairs > 0, "recall", "vocab_size of 3 or more, length of 2 or more")
    values = n_keys + _draw(n_keys, (n, n_keys), generator)  # (n, n_keys) the value of each key
    keys = _draw(n_keys, (n, n_pairs), generator)
    pairs = torch.stack([keys, values.gather(1, keys)], 2).flatten(1)  # (n, 2 n_pairs)
    asked = keys.gather(1, _draw(n_pairs, (n, 1), generator))
    ids = torch.cat([pairs, torch.full((n, 1), vocab_size - 1), asked], 1)
    return _at_the_end(ids, values.gather(1, asked))


def induction(n: int, generator: torch.Generator, vocab_size: int = 16, length: int = 255) -> Examples:
    """Return random tokens with a mark somewhere among them and the same mark at the end.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: the last token is the mark.
        length: tokens before the mark at the end.

    Returns:
        ids (n, length + 1); asked is the token behind the first mark.

    Raises:
        UsageError: the sizes are impossible.
    """
    mark = vocab_size - 1
    _check(mark > 0 and length > 1, "induction", "vocab_size and length of 2 or more")
    ids = _draw(mark, (n, length), generator)
    position = _draw(length - 1, (n, 1), generator)
    ids.scatter_(1, position, mark)
    return _at_the_end(torch.cat([ids, torch.full((n, 1), mark)], 1), ids.gather(1, position + 1))


def mqar(
    n: int, generator: torch.Generator, vocab_size: int = 256, length: int = 64, pairs: int = 8
) -> Examples:
    """Return pairs of a key and its value, then each key once more among other tokens: multi-query recall.

    As in Zoology, queries stand at even distances from the pairs, d with a probability about 1 / d, so that
    most follow soon and some late; here all other tokens after the pairs are random values.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: half of the tokens are keys, half are values.
        length: tokens.
        pairs: keys in a sequence, all different, each with a random value.

    Returns:
        ids (n, length); asked is the value of each key where it occurs again.

    Raises:
        UsageError: the sizes are impossible.
    """
    n_keys, slots = vocab_size // 2, (length - 2 * pairs) // 2
    _check(0 < pairs <= min(n_keys, slots), "mqar", "vocab_size of 2 pairs, length of 4 pairs or more")
    keys = torch.rand(n, n_keys, generator=generator).argsort(1)[:, :pairs]
    ids = n_keys + _draw(vocab_size - n_keys, (n, length), generator)
    values = ids[:, 1 : 2 * pairs : 2]
    ids[:, 0 : 2 * pairs : 2] = keys
    likely = torch.arange(1, slots + 1) ** (GAP_POWER - 1)
    slot = torch.multinomial(likely.expand(max(n, 1), -1), pairs, generator=generator)[:n]  # not of no rows
    positions = 2 * pairs + 2 * slot
    targets = torch.full_like(ids, IGNORED).scatter_(1, positions, values)
    return Examples(ids.scatter_(1, positions, keys), targets)


def selective(
    n: int, generator: torch.Generator, vocab_size: int = 16, length: int = 256, tokens: int = 16
) -> Examples:
    """Return tokens at random positions among blanks, then as many marks, at which to predict them in order.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: of all tokens; the last two are blank and mark.
        length: positions before the marks.
        tokens: how many to copy.

    Returns:
        ids (n, length + tokens).

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(vocab_size > 2 and 0 < tokens <= length, "selective", "vocab_size of 3, length of tokens or more")
    positions = torch.rand(n, length, generator=generator).argsort(1)[:, :tokens].sort(1).values
    return _copy(positions, vocab_size, length, generator)


def copying(
    n: int, generator: torch.Generator, vocab_size: int = 16, length: int = 256, tokens: int = 16
) -> Examples:
    """Return the same with all tokens at the front, so that every delay is the same.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: see `selective`.
        length: likewise.
        tokens: likewise.

    Returns:
        ids (n, length + tokens).

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(vocab_size > 2 and 0 < tokens <= length, "copying", "vocab_size of 3, length of tokens or more")
    return _copy(torch.arange(tokens).expand(n, tokens), vocab_size, length, generator)


def adding(n: int, generator: torch.Generator, length: int = 100) -> tuple[Tensor, Tensor]:
    """Return numbers of which two are marked, one in each half, and the sums of these.

    Args:
        n: sequences.
        generator: randomness.
        length: of each.

    Returns:
        x: (n, length, 2) float32, numbers in [0, 1) and marks.
        y: (n, 1) the sums of the marked ones.

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(length > 1, "adding", "length of 2 or more")
    numbers, half = torch.rand(n, length, generator=generator), length // 2
    positions = torch.cat([_draw(half, (n, 1), generator), half + _draw(length - half, (n, 1), generator)], 1)
    marks = torch.zeros(n, length).scatter_(1, positions, 1.0)
    return torch.stack([numbers, marks], 2), numbers.gather(1, positions).sum(1, keepdim=True)


def distant(n: int, generator: torch.Generator, length: int = 1000, rare: float = 0.0) -> Examples:
    """Return sequences that begin with one of two cues and end with a question: which was it?

    Args:
        n: sequences, as many of each cue.
        generator: randomness.
        length: tokens between the cue and the question.
        rare: probability of a token other than the usual one between them.

    Returns:
        ids (n, length + 2) of 6 tokens: 2 cues, 2 rare ones, the usual one, the question; asked is the cue.

    Raises:
        UsageError: n is odd or less than 2.
    """
    _check(n >= 2 and n % 2 == 0, "distant", "even number of sequences, as many of each cue")
    cue = torch.arange(n)[:, None] % 2
    others = 2 + _draw(2, (n, length), generator)
    between = torch.where(torch.rand((n, length), generator=generator) < rare, others, 4)
    return _at_the_end(torch.cat([cue, between, torch.full_like(cue, 5)], 1), cue)


def distinct(make: Maker, n: int, generator: torch.Generator) -> Examples:
    """Return distinct sequences.

    Args:
        make: makes some.
        n: how many.
        generator: randomness.

    Returns:
        The first n that differ.

    Raises:
        UsageError: there are not so many.
    """
    found: dict[tuple[int, ...], int] = {}
    ids, targets = make(0, generator)
    for _ in range(100):
        more = make(n, generator)
        ids, targets = torch.cat([ids, more.ids]), torch.cat([targets, more.targets])
        for number in range(len(ids) - n, len(ids)):
            found.setdefault(tuple(ids[number].tolist()), number)
        if len(found) >= n:
            return Examples(ids, targets).select(torch.tensor(list(found.values())[:n]))
    raise UsageError(f"expected {n:,} distinct sequences, found only {len(found):,}. Ask for fewer.")


def _draw(bound: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random integers below a bound."""
    return torch.randint(bound, shape, generator=generator)


def _at_the_end(ids: Tensor, answer: Tensor) -> Examples:
    """Return examples with the target answer (n, 1) at the last of ids (n, seq_len)."""
    return Examples(ids, torch.cat([torch.full_like(ids[:, 1:], IGNORED), answer], 1))


def _copy(positions: Tensor, vocab_size: int, length: int, generator: torch.Generator) -> Examples:
    """Return tokens at positions (n, tokens) among blanks, with targets at the marks that follow."""
    blank, mark = vocab_size - 2, vocab_size - 1
    values = _draw(vocab_size - 2, tuple(positions.shape), generator)
    ids = torch.full((len(positions), length), blank).scatter(1, positions, values)
    nothing = torch.full_like(ids, IGNORED)
    return Examples(torch.cat([ids, torch.full_like(values, mark)], 1), torch.cat([nothing, values], 1))


def _check(possible: bool, task: str, expected: str) -> None:
    """Raise UsageError unless the sizes are possible."""
    if not possible:
        raise UsageError(f"{task}: expected a {expected}.")
