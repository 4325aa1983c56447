"""HiPPO: Recurrent Memory with Optimal Polynomial Projections.

Albert Gu, Tri Dao, Stefano Ermon, Atri Rudra, Christopher Ré, 2020, arXiv 2008.07669. The Fourier measures
are of How to Train Your HiPPO, Gu, Johnson, Timalsina, Rudra and Ré, 2022, arXiv 2206.12037.

Parent: the gated recurrent network (LSTM, GRU), and the Legendre Memory Unit, here the measure "lmu".
Kept: a cell that reads token by token, with gates.
Changed: what is remembered is no feature that has to be learnt but the best approximation of the whole past:
the coefficients of its projection on N functions under a measure that says what of the past counts. They
follow the signal by a linear equation, c' = A c + B f, whose A and B are known in closed form.

Paper and official code differ in the order within a cell; both are here. In the paper h is updated first and
what is remembered is read from the new h. In the code (MemoryCell of hippo-code) the memory is updated first,
and gate and update see the new c instead of the old h.

Deviations from both: all measures but "legs" hold each sample (zero-order hold); "legs" starts from c = 0,
where the code starts from the first sample. Weights start from uniform numbers, biases from zero. To stand
in a stack the cell is a residual block with a norm before and a projection behind. What the coefficients of
a signal are worth by themselves, without a cell, is in hippo_memory.py.

The cell, for a token x (section 3.2 and appendix), order "hidden-first":

    g = sigmoid(W_g [x; h; c])      v = tanh(W_v [x; h; c])
    h = (1 - g) h + g v                                   the gate of a GRU; itself a memory of order N = 1
    f = W_f h                                             what is remembered, d_memory signals
    c = A_bar c + B_bar f                                 of each signal, N coefficients

and order "memory-first", that of the code:

    f = W_f [x; h]
    c = A_bar c + B_bar f
    g = sigmoid(W_g [x; c])         v = tanh(W_v [x; c])
    h = (1 - g) h + g v

Glossary: f = signal; c = coefficients, N = n = d_state of them; t or k = samples so far; A, B = transition,
A_bar, B_bar = discretised; theta = window; h = hidden; g = gate; tau = the update v.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longscan import ops
from longscan.core.config import nearest
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer
from longscan.models.common.state import over
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed, gradients

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 3, "vocab_size": 4096, "d_hidden": 384, "d_memory": 8},
}

# --- the matrices -------------------------------------------------------------------------------------------


def transition(measure: str, n: int) -> tuple[Tensor, Tensor]:
    """Return the equation c' = A c + B f by which coefficients of the past follow the signal f.

    For "legs" it is c' = (A c + B f) / t. Windows are of length 1, that of "fourier" of length 2; for another
    one, divide A and B by its ratio to that.

    Args:
        measure: a key of MEASURES.
        n: how many coefficients; even for the Fourier measures.

    Returns:
        A: (n, n) float64, stable.
        B: (n,) float64.

    Raises:
        LongscanError: there is no such measure, or it has no such n.
    """
    if measure not in MEASURES:
        raise LongscanError(f"no measure called {measure!r}{nearest(measure, MEASURES)}")
    if n < 1:
        raise LongscanError(f"n: expected at least 1 coefficient, got {n}.")
    return MEASURES[measure](n)


def _degrees(n: int) -> tuple[Tensor, Tensor]:
    """Return the degrees 0, 1, ... and the norms sqrt(2 degree + 1) of Legendre's polynomials, each (n,)."""
    degree = torch.arange(n, dtype=torch.float64)
    return degree, (2 * degree + 1).sqrt()


def _legt(n: int) -> tuple[Tensor, Tensor]:
    """A window, each moment in it counting the same."""
    degree, norm = _degrees(n)
    lag = degree[:, None] - degree  # of the row behind the column
    sign = torch.where(lag < 0, 1 - 2 * (lag % 2), 1.0)
    return -torch.outer(norm, norm) * sign, norm


def _lmu(n: int) -> tuple[Tensor, Tensor]:
    """The same window in the scaling of the Legendre Memory Unit (Voelker et al. 2019)."""
    A, B = _legt(n)
    degree, norm = _degrees(n)
    scale = norm * (1 - 2 * (degree % 2))
    return scale[:, None] * A / scale, scale * B


def _lagt(n: int) -> tuple[Tensor, Tensor]:
    """A past that fades: orthonormal functions."""
    ones = torch.ones(n, n, dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) / 2 - ones.tril(), ones[0]


def _tlagt(n: int) -> tuple[Tensor, Tensor]:
    """A past that fades: polynomials under an exponential weight, the form the paper prints."""
    ones = torch.ones(n, n, dtype=torch.float64)
    return -ones.tril(), ones[0]


def _waves(n: int) -> tuple[Tensor, Tensor]:
    """Rotations by 0, 1, 2, ... per unit of angle, a pair of coefficients each: R (n, n) and B (n,)."""
    if n % 2:
        raise LongscanError(f"n: expected an even number, for pairs of cosine and sine, got {n}.")
    turns = torch.zeros(n - 1, dtype=torch.float64)
    turns[::2] = torch.arange(n // 2)
    B = torch.zeros(n, dtype=torch.float64)
    B[::2], B[0] = math.sqrt(2), 1  # the constant is its own norm; its sine, entry 1, stays zero
    return torch.diag(turns, -1) - torch.diag(turns, 1), B


def _fourier(n: int) -> tuple[Tensor, Tensor]:
    """A window of length 2 as a Fourier series."""
    R, B = _waves(n)
    return math.pi * R - torch.outer(B, B), B


def _foud(n: int) -> tuple[Tensor, Tensor]:
    """A past that fades, folded into a Fourier series of period 1."""
    R, B = _waves(n)
    return 2 * math.pi * R - torch.eye(n, dtype=torch.float64) / 2, B


#: what of the past counts, and how much; "legs" is the whole past, each moment counting the same
MEASURES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": ops.legs_matrices,
    "legt": _legt,
    "lmu": _lmu,
    "lagt": _lagt,
    "tlagt": _tlagt,
    "fourier": _fourier,
    "foud": _foud,
}

#: how far n functions look back, in the measure's own time: its window, or where a fading past is still told
SPANS: dict[str, Callable[[int], float]] = {
    "legs": lambda n: 1.0,
    "legt": lambda n: 1.0,
    "lmu": lambda n: 1.0,
    "lagt": lambda n: 2.0 * n,
    "tlagt": lambda n: 8.0,
    "fourier": lambda n: 2.0,
    "foud": lambda n: 1.0,
}


@functools.lru_cache(maxsize=32)
def held(measure: str, n: int, dt: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the step of a measure other than "legs": A_bar (n, n) and B_bar (n,), zero-order hold.

    Args:
        measure: a key of MEASURES.
        n: how many coefficients.
        dt: how long a sample lasts, in the measure's own time.
    """
    with torch.device("cpu"):
        A, B = transition(measure, n)
        both = torch.zeros(n + 1, n + 1, dtype=torch.float64)  # A may be singular: hold f as one more state
    both[:n, :n], both[:n, n] = A * dt, B * dt
    step = torch.matrix_exp(both).numpy()
    return step[:n, :n], step[:n, n]


# --- the cell -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HippoConfig(LanguageModelConfig):
    """The sizes of a stack of HiPPO cells.

    Raises:
        LongscanError: a value is out of range.
    """

    d_hidden: int | None = None  # of h; None is d_model
    d_memory: int = 1  # signals that are remembered
    d_state: int = 64  # N
    measure: str = "legs"
    window: float = 256.0  # theta, in tokens; "legs" has none
    order: Literal["hidden-first", "memory-first"] = "hidden-first"  # the paper's, or that of its code

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("d_memory", "d_state"):
            self.check(name)
        if self.d_hidden is not None:
            self.check("d_hidden")
        if self.measure not in MEASURES:
            raise LongscanError(
                f"measure: expected one of {', '.join(MEASURES)}, got {self.measure!r}"
                f"{nearest(self.measure, MEASURES)}"
            )
        if self.measure in ("fourier", "foud") and self.d_state % 2:
            raise LongscanError(f"d_state: expected an even number for waves, got {self.d_state}.")
        if not self.window >= 1:
            raise LongscanError(f"window: expected at least 1 token, got {self.window}.")

    @property
    def width(self) -> int:
        """Width of h: d_hidden, or the default it stands for."""
        return self.d_model if self.d_hidden is None else self.d_hidden


class HippoState(NamedTuple):
    """What one layer remembers.

    Attributes:
        h: (batch, d_hidden) the gated feature.
        c: (batch, d_memory, d_state) the coefficients.
        length: (batch,) int64, tokens so far.
    """

    h: Tensor
    c: Tensor
    length: Tensor


class HippoMixer(SectionMixer[HippoState]):
    """The gated cell with a memory of what it chose to remember.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    memory_bias: nn.Parameter | None  # of f; where f reads x it is in that of in_proj

    def __init__(self, config: HippoConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.measure, self.dt = config.measure, SPANS[config.measure](config.d_state) / config.window
        self.d_memory, self.d_state, self.width = config.d_memory, config.d_state, config.width
        self.memory_first = config.order == "memory-first"
        d_in = 2 * self.width + self.d_memory * self.memory_first  # of what reads x
        d_past = self.d_memory * self.d_state + self.width * (not self.memory_first)  # of [c] or [h; c]
        self.in_proj = linear(config.d_model, d_in, True, generator)
        self.state_weight = nn.Parameter(torch.empty(2 * self.width, d_past))
        self.memory_weight = nn.Parameter(torch.empty(self.d_memory, self.width))
        bias = None if self.memory_first else nn.Parameter(torch.empty(self.d_memory))
        self.register_parameter("memory_bias", bias)
        self.out_proj = linear(config.width, config.d_model, False, generator)
        if not self.out_proj.weight.is_meta:
            for weight in (self.state_weight, self.memory_weight):
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(weight, -bound, bound, generator=generator)
            if self.memory_bias is not None:
                nn.init.zeros_(self.memory_bias)
            with torch.no_grad():
                self.out_proj.weight /= math.sqrt(config.n_layers)

    def _inputs(self, x: Tensor) -> Tensor:
        """Return what x (..., d_model) and the biases add to f, gate and update, side by side."""
        inputs = cast(Tensor, self.in_proj(x))
        if self.memory_bias is None:
            return inputs
        return torch.cat([self.memory_bias.to(inputs).expand(*inputs.shape[:-1], -1), inputs], -1)

    @exact
    def mix(self, x: Tensor, state: HippoState | None, length: Tensor | None) -> tuple[Tensor, HippoState]:
        """Mix along time, token by token; see `SectionMixer.mix`."""
        h, c, start = self.init_state(len(x)) if state is None else state
        starts, row = torch.unique(start, return_inverse=True)
        steps = [self._transition(starts + t, row, c) for t in range(x.shape[1])]
        run: Any = _cells if composed() else _Cells.apply
        said, h, c = run(self._inputs(x), h, c, self.state_weight, self.memory_weight, steps, length)
        read = x.shape[1] if length is None else length
        return cast(Tensor, self.out_proj(said)), HippoState(h, c, start + read)

    def _transition(self, seen: Tensor, row: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A_bar (rows or 1, n, n) and B_bar (rows or 1, n) if row i saw seen[row[i]] tokens."""
        if self.measure == "legs":
            steps = [_legs_step(self.d_state, k) for k in seen.tolist()]
            A_bar, B_bar = (np.stack(matrices) for matrices in zip(*steps, strict=True))
        else:
            A_bar, B_bar = (matrix[None] for matrix in held(self.measure, self.d_state, self.dt))
        pair = torch.from_numpy(A_bar).to(like), torch.from_numpy(B_bar).to(like)
        return pair if len(A_bar) == 1 else (pair[0][row], pair[1][row])

    def init_state(self, batch_size: int) -> HippoState:
        """Return zeros; see `Mixer.init_state`. The memory is float32 at least."""
        zeros, wide = self.state_weight.new_zeros, torch.promote_types(self.state_weight.dtype, torch.float32)
        c = zeros(batch_size, self.d_memory, self.d_state, dtype=wide)
        return HippoState(zeros(batch_size, self.width), c, zeros(batch_size, dtype=torch.int64))

    @exact
    def step(self, x: Tensor, state: HippoState, plan: None = None, /) -> Tensor:
        """Take in one token per row; see `Mixer.step`."""
        seen, row = torch.unique(state.length, return_inverse=True)
        step = self._transition(seen, row, state.c)
        h, c, _ = _cell(self._inputs(x), state.h, state.c, self.state_weight, self.memory_weight, step)
        state.h.copy_(h)
        state.c.copy_(c)
        state.length.add_(1)
        return cast(Tensor, self.out_proj(h))

    def rescale_time(self, factor: float) -> None:
        """Make every time step longer; "legs" knows no step and needs no change. See `Mixer.rescale_time`."""
        self.dt *= factor


Step: TypeAlias = tuple[Tensor, Tensor]  # A_bar (rows or 1, n, n) and B_bar (rows or 1, n)


def _cell(
    inputs: Tensor, h: Tensor, c: Tensor, weight: Tensor, memory_weight: Tensor, step: Step
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Take in one token of each row: h and c after it, and what the way back needs.

    Args:
        inputs: (rows, d_memory + 2 d_hidden) what x and the biases add to f, gate and update.
        h: (rows, d_hidden).
        c: (rows, d_memory, d_state).
        weight: (2 d_hidden, d_past) of gate and update; its width tells the order, see `_reads_h`.
        memory_weight: (d_memory, d_hidden) of f.
        step: the discrete equation of c.
    """
    (A_bar, B_bar), d_memory = step, c.shape[1]

    def remember(h: Tensor) -> Tensor:
        f = torch.addmm(inputs[:, :d_memory], h, memory_weight.mT)
        return c @ A_bar.mT + f.to(c)[..., None] * B_bar[:, None]

    if _reads_h(weight, c):
        past = torch.cat([h, c.flatten(1).to(h)], 1)
    else:
        c = remember(h)
        past = c.flatten(1).to(h)
    gate, update = torch.addmm(inputs[:, d_memory:], past, weight.mT).chunk(2, 1)
    gate, update = gate.sigmoid(), update.tanh()
    h = torch.lerp(h, update, gate)
    return h, remember(h) if _reads_h(weight, c) else c, (past, gate, update)


def _reads_h(weight: Tensor, c: Tensor) -> bool:
    """Whether gate and update read [h; c] from before the token: h is then updated first."""
    return weight.shape[1] > c[0].numel()


def _cells(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    memory_weight: Tensor,
    steps: list[Step],
    length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `_Cells` does, as torch differentiates it however often."""
    said, h, c, _ = _run(inputs, h, c, weight, memory_weight, steps, length)
    return said, h, c


def _run(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    memory_weight: Tensor,
    steps: list[Step],
    length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Take in a cell's tokens one by one: h after each (rows, seq_len, d_hidden), h, c, what `_cell` kept."""
    said, kept = [], []
    for t, step in enumerate(steps):
        new_h, new_c, used = _cell(inputs[:, t], h, c, weight, memory_weight, step)
        if length is not None:
            new_h, new_c = (torch.where(over(t < length, x), x, y) for x, y in ((new_h, h), (new_c, c)))
        h, c = new_h, new_c
        said.append(h)
        kept.append(used)
    return torch.stack(said, 1), h, c, kept


class _Cells(torch.autograd.Function):
    """A cell after the other; a weight's gradient is one product instead of one for each token."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, inputs, h, c, weight, memory_weight, steps, length
    ):
        """Read inputs (rows, seq_len, widths): h after each token (rows, seq_len, d_hidden), h and c."""
        said, new_h, new_c, kept = _run(inputs, h, c, weight, memory_weight, steps, length)
        ctx.steps = steps
        stacked = (torch.stack(tensors) for tensors in zip(*kept, strict=True))
        ctx.save_for_backward(inputs, h, c, weight, memory_weight, length, said, *stacked)
        return said, new_h, new_c

    @staticmethod
    def backward(ctx, dsaid, dh, dc):  # type: ignore[no-untyped-def]
        """Go back from the last token to the first."""
        inputs, h, c, weight, memory_weight, length, said, pasts, gates, updates = ctx.saved_tensors
        if torch.is_grad_enabled():
            run = functools.partial(_cells, steps=ctx.steps, length=length)
            of = gradients(run, (inputs, h, c, weight, memory_weight), (dsaid, dh, dc))
            return *(of.get(place) for place in range(5)), None, None
        hidden_first, width, d_memory = _reads_h(weight, c), h.shape[1], c.shape[1]
        before = torch.cat([h[:, None], said[:, :-1]], 1)
        products = inputs.new_empty(len(pasts), len(h), inputs.shape[2])  # gradients of f, gate and update
        for t in reversed(range(len(pasts))):
            (A_bar, B_bar), gate, update = ctx.steps[t], gates[t], updates[t]
            dh = dh + dsaid[:, t]
            after = dh, dc
            if hidden_first:
                df = (dc * B_bar[:, None]).sum(-1).to(dh)
                dh, dc = dh + df @ memory_weight, dc @ A_bar
            rise = dh * gate
            dgates = torch.cat([rise * (1 - gate) * (update - before[:, t]), rise * (1 - update * update)], 1)
            dh, dpast = dh - rise, dgates @ weight
            if hidden_first:
                dh = dh + dpast[:, :width]
            dc = dc + dpast[:, -c[0].numel() :].view(c.shape).to(dc)
            if not hidden_first:
                df = (dc * B_bar[:, None]).sum(-1).to(dh)
                dh, dc = dh + df @ memory_weight, dc @ A_bar
            product = torch.cat([df, dgates], 1)
            if length is not None:
                product, dh, dc = (
                    torch.where(over(t < length, x), x, y)
                    for x, y in ((product, 0), (dh, after[0]), (dc, after[1]))
                )
            products[t] = product
        sources = said if hidden_first else before
        df, dgates = products[..., :d_memory], products[..., d_memory:]
        dweight = dgates.flatten(0, 1).mT @ pasts.flatten(0, 1)
        dmemory_weight = df.flatten(0, 1).mT @ sources.transpose(0, 1).flatten(0, 1)
        return products.transpose(0, 1), dh, dc, dweight, dmemory_weight, None, None


_STEPS = 64  # of "legs" are made at a time


def _legs_step(n: int, seen: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A_bar (n, n) and B_bar (n,) of the sample after `seen` ones."""
    A_bar, B_bar = _legs_steps(n, seen // _STEPS)
    return A_bar[seen % _STEPS], B_bar[seen % _STEPS]


@functools.lru_cache(maxsize=64)
def _legs_steps(n: int, block: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps of a block of samples, by the bilinear rule."""
    with torch.device("cpu"):
        A, B = (matrix.numpy() for matrix in ops.legs_matrices(n))
    k = np.arange(block * _STEPS + 1, (block + 1) * _STEPS + 1)[:, None, None]
    both = np.linalg.solve(
        np.eye(n) - A / (2 * k), np.concatenate([np.eye(n) + A / (2 * k), B[:, None] / k], 2)
    )
    return both[..., :n], both[..., n]


class HippoRNN(LanguageModel):
    """A language model of HiPPO cells.

    Args:
        config: the sizes.
        generator: randomness of the start; torch's global one if None.
    """

    config: HippoConfig

    @staticmethod
    def block(config: HippoConfig, generator: torch.Generator | None = None) -> Block:
        """Make one block."""
        return Block(config, HippoMixer(config, generator))


ENTRY = ModelEntry(
    name="hippo",
    kind="language",
    year=2020,
    paper="HiPPO: Recurrent Memory with Optimal Polynomial Projections",
    arxiv="2008.07669",
    idea="the best polynomial fit of the past",
    parents=("lstm",),
    cls=HippoRNN,
    config=HippoConfig,
    presets=PRESETS,
    verbs=(*LANGUAGE, "remember"),
)
