"""Online compression of a signal with HiPPO: its coefficients, and its reconstruction from them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.hippo import SPANS, held, transition

_BLOCK = 1024  # samples that update a window at once, in a matrix product
_PIECE = 1 << 14  # samples reconstructed at once: amortises the calls and stays in the cache


class Memory:
    """The HiPPO coefficients of a signal of any length, updated online.

    Args:
        n: number of coefficients per channel.
        measure: the weighting of the past, a key of MEASURES.
        channels: number of signals.
        window: samples of the past that a measure other than "legs" covers; "legs" covers all.
        method: discretisation of "legs", see `ops.legs_scan`; the other measures use the zero-order hold.

    Attributes:
        coefficients: (channels, n) float64.
        length: samples so far.

    Raises:
        LongscanError: the measure is unknown, does not support this n, or needs a window.
    """

    def __init__(
        self,
        n: int,
        measure: str = "legs",
        *,
        channels: int = 1,
        window: float | None = None,
        method: ops.LegsMethod = "bilinear",
    ) -> None:
        transition(measure, n)
        self.measure, self.method, self.length = measure, method, 0
        self.coefficients = torch.zeros(channels, n, dtype=torch.float64)
        if measure != "legs":
            if window is None or not window >= 1:
                raise LongscanError(f"window: expected 1 or more samples for {measure!r}, got {window}.")
            self._dt = SPANS[measure](n) / window
            self._A, B = map(torch.from_numpy, held(measure, n, self._dt))
            self._inputs = _responses(self._A, B, _BLOCK)
        self.window = window

    @property
    def n(self) -> int:
        """Coefficients per channel."""
        return self.coefficients.shape[1]

    @property
    def oldest(self) -> int:
        """The first sample that can be reconstructed: 0, or the first inside the window."""
        if self.measure == "legs" or self.window is None:
            return 0
        return max(0, self.length - int(self.window))

    def write(self, f: Tensor) -> None:
        """Update the coefficients with samples, any number at a time.

        Args:
            f: (length,) or (channels, length).
        """
        f = f.view(len(self.coefficients), -1)
        if not f.shape[1]:
            return
        if self.measure == "legs":
            self.coefficients, _ = ops.legs_scan(f, self.coefficients, self.length, self.method)
        else:
            self._hold(f.double())
        self.length += f.shape[1]

    def _hold(self, f: Tensor) -> None:
        """Update in blocks: one matrix product for the samples, one power of A_bar for the coefficients."""
        rest = f.shape[1] % _BLOCK
        blocks = f[:, rest:].reshape(len(f), -1, _BLOCK) @ self._inputs.mT  # (channels, blocks, n)
        power = torch.linalg.matrix_power(self._A, rest)
        self.coefficients = self.coefficients @ power.mT + f[:, :rest] @ self._inputs[:, _BLOCK - rest :].mT
        power = torch.linalg.matrix_power(self._A, _BLOCK) if blocks.shape[1] else power
        for update in blocks.unbind(1):
            self.coefficients = self.coefficients @ power.mT + update

    def reconstruct(self, positions: Tensor) -> Tensor:
        """Return the signal that the coefficients describe.

        Args:
            positions: (n_positions,) of samples, from `oldest` to below `length`; fractions are allowed.

        Returns:
            (channels, n_positions) float64.

        Raises:
            LongscanError: a position is outside the memory.
        """
        if positions.numel() and not (self.oldest <= positions.min() and positions.max() < self.length):
            raise LongscanError(
                f"positions: expected samples in memory, {self.oldest:,} to {self.length - 1:,}, got "
                f"{float(positions.min()):,g} to {float(positions.max()):,g}."
            )
        age = self.length - 0.5 - positions.double()  # a sample lasts from its index to the next
        age = age / self.length if self.measure == "legs" else age * self._dt
        return torch.cat([self._evaluate(piece) for piece in torch.split(age, _PIECE)], 1)

    def _evaluate(self, age: Tensor) -> Tensor:
        """Return the sum of basis functions at ages (n_positions,): (channels, n_positions)."""
        if self.measure not in ("legs", "legt"):
            return self.coefficients @ basis(self.measure, self.n, age)
        # Clenshaw's algorithm: downwards from the last degree, with only two sums at a time, all in the cache
        x = 1 - 2 * age
        weights = (2 * torch.arange(self.n).to(x) + 1).sqrt() * self.coefficients  # (channels, n)
        now, before, spare = (x.new_zeros(len(weights), len(x)) for _ in range(3))
        for k in reversed(range(self.n)):
            torch.add(weights[:, k, None], before, alpha=-(k + 1) / (k + 2), out=spare)
            spare.addcmul_(now, x, value=(2 * k + 1) / (k + 1))
            now, before, spare = spare, now, before
        return now


def _responses(A_bar: Tensor, B_bar: Tensor, length: int) -> Tensor:
    """Return the impulse response A_bar^k B_bar of the state, the oldest sample first: (n, length)."""
    left = B_bar[:, None]
    while left.shape[1] < length:
        left = torch.cat([left, A_bar @ left], 1)
        A_bar = A_bar @ A_bar
    return left[:, :length].flip(1)


def compress(signal: Tensor, n: int, measure: str = "legs", method: ops.LegsMethod = "bilinear") -> Memory:
    """Return the memory of a signal; the window, if any, is as long as the signal.

    Args:
        signal: (length,) or (channels, length).
        n: number of coefficients per channel.
        measure: a key of MEASURES.
        method: see `Memory`.

    Raises:
        LongscanError: the signal is empty, the measure is unknown or does not support this n.
    """
    if not signal.numel():
        raise LongscanError("signal: expected samples, got none.")
    channels = len(signal) if signal.dim() == 2 else 1
    memory = Memory(n, measure, channels=channels, window=signal.shape[-1], method=method)
    memory.write(signal)
    return memory


def basis(measure: str, n: int, age: Tensor) -> Tensor:
    """Return the basis functions: f at an age is sum_n c_n basis_n(age).

    Args:
        measure: a key of MEASURES.
        n: number of functions.
        age: (length,) in the measure's own unit of time; for "legs" a fraction of the whole past, in [0, 1].

    Returns:
        (n, length) float64.

    Raises:
        LongscanError: the measure is unknown or does not support this n.
    """
    B, age = transition(measure, n)[1][:, None], age.double()
    if measure in ("legs", "legt"):
        return B * torch.stack(list(ops.legendre(1 - 2 * age, n)))
    if measure == "lmu":  # its coefficients are those of "legt" times B
        return torch.stack(list(ops.legendre(2 * age - 1, n)))
    if measure in ("lagt", "tlagt"):
        fading = (-age / 2).exp() if measure == "lagt" else torch.ones_like(age)
        return torch.stack(list(_laguerre(age, fading, n)))
    angle = torch.arange(n // 2)[:, None] * age * (math.pi if measure == "fourier" else 2 * math.pi)
    waves = B[::2].repeat_interleave(2, 0) * torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)
    return waves if measure == "fourier" else waves * (age / 2).exp()


def _laguerre(x: Tensor, first: Tensor, n: int) -> Iterator[Tensor]:
    """Yield Laguerre's polynomials of degree 0, 1, ... n - 1 at x, times `first`."""
    before, now = torch.zeros_like(x), first
    for degree in range(n):
        yield now
        before, now = now, ((2 * degree + 1 - x) * now - degree * before) / (degree + 1)
