"""What HiPPO remembers of a signal: coefficients that follow it online, and the signal told from them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.hippo import SPANS, held, transition

_BLOCK = 1024  # samples that enter a window at once, in a product of matrices
_PIECE = 1 << 14  # samples that are told at once: worth the calls, and still in the cache


class Memory:
    """Coefficients that follow a signal, however long it gets.

    Args:
        n: how many for each channel.
        measure: what of the past counts, a key of MEASURES.
        channels: signals side by side.
        window: samples that a measure other than "legs" looks back; "legs" looks back to the first.
        method: how "legs" is discretised, see `ops.legs_scan`; the others hold each sample ("zoh").

    Attributes:
        coefficients: (channels, n) float64.
        length: samples so far.

    Raises:
        LongscanError: there is no such measure, it has no such n, or it needs a window.
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
                raise LongscanError(f"window: expected 1 sample or more for {measure!r}, got {window}.")
            self._dt = SPANS[measure](n) / window
            self._A, B = map(torch.from_numpy, held(measure, n, self._dt))
            self._inputs = _responses(self._A, B, _BLOCK)
        self.window = window

    @property
    def n(self) -> int:
        """Coefficients of a channel."""
        return self.coefficients.shape[1]

    @property
    def oldest(self) -> int:
        """The first sample that can be told: 0, or the first inside the window."""
        if self.measure == "legs" or self.window is None:
            return 0
        return max(0, self.length - int(self.window))

    def write(self, f: Tensor) -> None:
        """Take in samples, any number at a time.

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
        """Take in blocks: what samples bring is one product, what was there takes one power of A_bar."""
        rest = f.shape[1] % _BLOCK
        whole = f[:, rest:].reshape(len(f), -1, _BLOCK) @ self._inputs.mT  # (channels, blocks, n)
        power = torch.linalg.matrix_power(self._A, rest)
        self.coefficients = self.coefficients @ power.mT + f[:, :rest] @ self._inputs[:, _BLOCK - rest :].mT
        power = torch.linalg.matrix_power(self._A, _BLOCK) if whole.shape[1] else power
        for brought in whole.unbind(1):
            self.coefficients = self.coefficients @ power.mT + brought

    def reconstruct(self, places: Tensor) -> Tensor:
        """Tell the signal from the coefficients.

        Args:
            places: (n_places,) numbers of samples, from `oldest` to below `length`; between samples too.

        Returns:
            (channels, n_places) float64.

        Raises:
            LongscanError: a place is not in memory.
        """
        if places.numel() and not (self.oldest <= places.min() and places.max() < self.length):
            raise LongscanError(
                f"expected samples from {self.oldest:,} to {self.length - 1:,}, which are in memory, got "
                f"{float(places.min()):,g} to {float(places.max()):,g}."
            )
        age = self.length - 0.5 - places.double()  # a sample lasts from its number to the next
        age = age / self.length if self.measure == "legs" else age * self._dt
        return torch.cat([self._tell(piece) for piece in torch.split(age, _PIECE)], 1)

    def _tell(self, age: Tensor) -> Tensor:
        """Sum up the functions at a few ages (n_places,): (channels, n_places)."""
        if self.measure not in ("legs", "legt"):
            return self.coefficients @ basis(self.measure, self.n, age)
        # Clenshaw's way: from the last degree down, nothing but two sums at a time, all in the cache
        x = 1 - 2 * age
        weights = (2 * torch.arange(self.n).to(x) + 1).sqrt() * self.coefficients  # (channels, n)
        now, before, spare = (x.new_zeros(len(weights), len(x)) for _ in range(3))
        for k in reversed(range(self.n)):
            torch.add(weights[:, k, None], before, alpha=-(k + 1) / (k + 2), out=spare)
            spare.addcmul_(now, x, value=(2 * k + 1) / (k + 1))
            now, before, spare = spare, now, before
        return now


def _responses(A_bar: Tensor, B_bar: Tensor, length: int) -> Tensor:
    """Return what samples have left behind in the state, the oldest first: A_bar^k B_bar, (n, length)."""
    left = B_bar[:, None]
    while left.shape[1] < length:
        left = torch.cat([left, A_bar @ left], 1)
        A_bar = A_bar @ A_bar
    return left[:, :length].flip(1)


def compress(signal: Tensor, n: int, measure: str = "legs", method: ops.LegsMethod = "bilinear") -> Memory:
    """Put a signal into n coefficients; a window is as long as the signal.

    Args:
        signal: (length,) or (channels, length).
        n: how many for each channel.
        measure: a key of MEASURES.
        method: see `Memory`.

    Returns:
        The memory, ready for more of the signal.

    Raises:
        LongscanError: the signal is empty, or there is no such measure or n.
    """
    if not signal.numel():
        raise LongscanError("signal: expected samples, got none.")
    channels = len(signal) if signal.dim() == 2 else 1
    memory = Memory(n, measure, channels=channels, window=signal.shape[-1], method=method)
    memory.write(signal)
    return memory


def basis(measure: str, n: int, age: Tensor) -> Tensor:
    """Return the functions that coefficients belong to: so long ago f was sum_n c_n basis_n(age).

    Args:
        measure: a key of MEASURES.
        n: how many.
        age: (length,) in the measure's own time; for "legs" as a part of all that passed, in [0, 1].

    Returns:
        (n, length) float64.

    Raises:
        LongscanError: there is no such measure, or it has no such n.
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
