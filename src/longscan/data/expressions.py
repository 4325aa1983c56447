"""Tasks whose answer is a state that every token changes: parity, and arithmetic with remainders.

A maker returns ids and the token to predict at each position, as those of `synthetic` do.

    parity        1 0 1 1            1 1 0 1        the sum so far, modulo the vocabulary's size
    arithmetic    2 + 4 * 3          2 . 1 . 4      the value so far, modulo 5, as Python computes it
    brackets      2 * ( 1 - 4 )      2 . . 1 . 2 4  the same within the brackets that are open

Mamba-3 (Lahoti et al. 2026) tests on them whether a state can be more than a sum that fades.
"""

from __future__ import annotations

import numpy as np
import torch

from longscan.data.synthetic import IGNORED, Examples
from longscan.errors import UsageError

__all__ = ["DEPTH", "OPERATORS", "arithmetic", "brackets", "parity"]

OPERATORS = "+-*"  # the tokens after the digits; brackets follow
DEPTH = 3  # of nested brackets, at most: a finite state can know all that is open
BRACKETS = 1 / 3  # how often one opens or closes where it may


def parity(
    n: int, generator: torch.Generator, vocab_size: int = 2, length: int = 40, uneven: bool = False
) -> Examples:
    """Return random digits, and the sum of all so far.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: digits, and modulus of the sum; 2 is parity.
        length: tokens.
        uneven: whether each sequence has its own share of zeros, from none to all, and not all the same.

    Returns:
        ids (n, length), with a target at every position.

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(vocab_size > 1 and length > 0, "parity", "vocab_size of 2 or more, length of 1 or more")
    ids = torch.randint(vocab_size, (n, length), generator=generator)
    if uneven:
        zero = torch.rand(n, length, generator=generator) < torch.rand(n, 1, generator=generator)
        ids = torch.where(zero, 0, ids.clamp(min=1))
    return Examples(ids, ids.cumsum(1) % vocab_size)


def arithmetic(n: int, generator: torch.Generator, vocab_size: int = 8, length: int = 40) -> Examples:
    """Return sums, differences and products of digits, and their values so far.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: digits, as many as the modulus, and the three signs.
        length: tokens; the last one is left out if it is even, for it would be a sign.

    Returns:
        ids (n, length or one less); asked at each digit is the value of all up to it.

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(vocab_size > 4 and length > 0, "arithmetic", "vocab_size of 5 or more, length of 1 or more")
    return _expressions(n, generator, vocab_size - 3, (length - 1) // 2 * 2 + 1, 0)


def brackets(n: int, generator: torch.Generator, vocab_size: int = 10, length: int = 40) -> Examples:
    """Return the same with brackets, nested at most `DEPTH` deep.

    Args:
        n: sequences.
        generator: randomness.
        vocab_size: digits, as many as the modulus, the three signs and two brackets.
        length: see `arithmetic`.

    Returns:
        ids (n, length or one less); asked at each digit and each closing bracket is the value of what stands
        between the last open bracket and there.

    Raises:
        UsageError: the sizes are impossible.
    """
    _check(vocab_size > 6 and length > 0, "brackets", "vocab_size of 7 or more, length of 1 or more")
    return _expressions(n, generator, vocab_size - 5, (length - 1) // 2 * 2 + 1, DEPTH)


def _expressions(n: int, generator: torch.Generator, modulus: int, length: int, most: int) -> Examples:
    """Return expressions of an odd length with brackets at most `most` deep, and their values so far.

    Each token is drawn from those after which the expression can still end in time. A level of brackets has a
    sum, and the term that the next sign multiplies or adds to it.
    """
    luck = torch.rand(length, n, generator=generator).numpy() < BRACKETS
    digits = torch.randint(modulus, (length, n), generator=generator).numpy()
    signs = torch.randint(len(OPERATORS), (length, n), generator=generator).numpy()
    rows, depth, expects = np.arange(n), np.zeros(n, np.int64), np.ones(n, bool)  # a digit or a bracket
    sums, terms, sign = np.zeros((3, n, most + 1), np.int64)
    ids, targets = np.empty((2, n, length), np.int64)
    for t in range(length):
        left = length - t
        opens = expects & (depth < most) & (left >= depth + 3) & luck[t]
        closes = ~expects & (depth > 0) & (luck[t] | (left == depth))
        value = np.where(closes, sums[rows, depth] + terms[rows, depth], digits[t])  # of the operand
        depth += opens
        depth -= closes
        here = rows, depth
        before, term, how = sums[here], terms[here], sign[here]
        operand, product = closes | (expects & ~opens), how == OPERATORS.index("*")
        after = np.where(product, before, before + term) % modulus
        latest = (
            np.where(product, term * value, np.where(how == OPERATORS.index("-"), -value, value)) % modulus
        )
        sums[here] = np.where(operand, after, before) * ~opens
        terms[here] = np.where(operand, latest, term) * ~opens
        sign[here] = np.where(expects | closes, how, signs[t]) * ~opens
        ids[:, t] = np.where(expects, digits[t], modulus + signs[t])
        ids[opens, t], ids[closes, t] = modulus + len(OPERATORS), modulus + len(OPERATORS) + 1
        targets[:, t] = np.where(operand, (after + latest) % modulus, IGNORED)
        expects = ~operand
    return Examples(torch.from_numpy(ids), torch.from_numpy(targets))


def _check(possible: bool, task: str, expected: str) -> None:
    """Raise UsageError unless the sizes are possible."""
    if not possible:
        raise UsageError(f"{task}: expected a {expected}.")
