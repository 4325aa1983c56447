"""HiPPO: Recurrent Memory with Optimal Polynomial Projections.

Albert Gu, Tri Dao, Stefano Ermon, Atri Rudra, Christopher Ré, 2020, arXiv 2008.07669.

Parent: the gated recurrent network (LSTM, GRU), and the Legendre Memory Unit, here the measure "lmu".
Kept: a gated recurrent cell.
Changed: the memory is not a learned feature but the optimal approximation of the whole past: the coefficients
of its projection onto N functions, under a measure that weights the past. The measures and the equations of
their coefficients are in common/hippo_measures.py; compression without a cell is in hippo_memory.py.

The paper and the official code differ in the order within a cell; both are here. In the paper h is updated
first and the remembered signal f is computed from the new h. In the code (MemoryCell of hippo-code) c is
updated first, and gate and update see the new c instead of the old h.

Deviations from both: all measures but "legs" are discretised by zero-order hold; "legs" starts from c = 0,
where the code starts from the first sample. Weights are initialised uniformly, biases to zero. Each cell is
the mixer of a residual block, with a norm before it and a projection after it.

The cell, for a token x (section 3.2 and appendix), order "hidden-first":

    g = sigmoid(W_g [x; h; c])      v = tanh(W_v [x; h; c])
    h = (1 - g) h + g v                                   the gate of a GRU; itself HiPPO with N = 1
    f = W_f h                                             the d_memory signals to remember
    c = A_bar c + B_bar f                                 N coefficients of each signal

and order "memory-first", that of the code:

    f = W_f [x; h]
    c = A_bar c + B_bar f
    g = sigmoid(W_g [x; c])         v = tanh(W_v [x; c])
    h = (1 - g) h + g v

Glossary: f = signal; c = coefficients, N = n = d_state of them; t or k = samples so far; A, B = transition,
A_bar, B_bar = discretised; theta = window; h = hidden; g = gate; tau = the update v.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from longscan.core.config import nearest
from longscan.errors import LongscanError
from longscan.models.common.entry import LANGUAGE, ModelEntry
from longscan.models.common.hippo_measures import MEASURES, SPANS, held, transition, transitions
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.layers import linear
from longscan.models.common.mixer import Block, LanguageModelConfig
from longscan.models.common.packing import SectionMixer
from longscan.models.common.state import over
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed, gradients

__all__ = ["MEASURES", "SPANS", "HippoConfig", "HippoMixer", "HippoRNN", "HippoState", "held", "transition"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257, "d_state": 16},
    "tiny-lm": {"d_model": 256, "n_layers": 3, "vocab_size": 4096, "d_hidden": 384, "d_memory": 8},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HippoConfig(LanguageModelConfig):
    """The configuration of a stack of HiPPO cells.

    Raises:
        LongscanError: a value is out of range.
    """

    d_hidden: int | None = None  # of h; None is d_model
    d_memory: int = 1  # number of remembered signals
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
            raise LongscanError(f"d_state: expected an even number for a Fourier series, got {self.d_state}.")
        if not self.window >= 1:
            raise LongscanError(f"window: expected at least 1 token, got {self.window}.")

    @property
    def width(self) -> int:
        """Width of h: d_hidden, or d_model if that is None."""
        return self.d_model if self.d_hidden is None else self.d_hidden


class HippoState(NamedTuple):
    """The state of one layer.

    Attributes:
        h: (batch, d_hidden) the hidden state.
        c: (batch, d_memory, d_state) the coefficients.
        length: (batch,) int64, tokens so far.
    """

    h: Tensor
    c: Tensor
    length: Tensor


class HippoMixer(SectionMixer[HippoState]):
    """The gated cell and its memory.

    Args:
        config: the configuration.
        generator: for the initial weights; torch's global one if None.
    """

    memory_bias: nn.Parameter | None  # of f, if in_proj, which has a bias of its own, doesn't compute it

    def __init__(self, config: HippoConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.measure, self.dt = config.measure, SPANS[config.measure](config.d_state) / config.window
        self.d_memory, self.d_state, self.width = config.d_memory, config.d_state, config.width
        self.memory_first = config.order == "memory-first"
        d_in = 2 * self.width + self.d_memory * self.memory_first  # of what depends on x
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
        """Return the terms of f, gate and update due to x (..., d_model) and the biases, concatenated."""
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
        run: Any = _run if composed() else _Cells.apply
        hs, h, c, *_ = run(self._inputs(x), h, c, self.state_weight, self.memory_weight, steps, length)
        read = x.shape[1] if length is None else length
        return cast(Tensor, self.out_proj(hs)), HippoState(h, c, start + read)

    def _transition(self, seen: Tensor, row: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A_bar (rows or 1, n, n) and B_bar (rows or 1, n) of row i after seen[row[i]] tokens."""
        A_bar, B_bar = transitions(self.measure, self.d_state, self.dt, seen.tolist())
        pair = torch.from_numpy(A_bar).to(like), torch.from_numpy(B_bar).to(like)
        return pair if len(A_bar) == 1 else (pair[0][row], pair[1][row])

    def init_state(self, batch_size: int) -> HippoState:
        """Return zeros; see `Mixer.init_state`. c is float32 at least."""
        zeros, wide = self.state_weight.new_zeros, torch.promote_types(self.state_weight.dtype, torch.float32)
        c = zeros(batch_size, self.d_memory, self.d_state, dtype=wide)
        return HippoState(zeros(batch_size, self.width), c, zeros(batch_size, dtype=torch.int64))

    @exact
    def step(self, x: Tensor, state: HippoState, plan: None = None, /) -> Tensor:
        """Process one token per row; see `Mixer.step`."""
        seen, row = torch.unique(state.length, return_inverse=True)
        step = self._transition(seen, row, state.c)
        h, c, _ = _cell(self._inputs(x), state.h, state.c, self.state_weight, self.memory_weight, step)
        state.h.copy_(h)
        state.c.copy_(c)
        state.length.add_(1)
        return cast(Tensor, self.out_proj(h))

    def rescale_time(self, factor: float) -> None:
        """Scale the time step; "legs" has none and doesn't change. See `Mixer.rescale_time`."""
        self.dt *= factor


Step: TypeAlias = tuple[Tensor, Tensor]  # A_bar (rows or 1, n, n) and B_bar (rows or 1, n)


def _cell(
    inputs: Tensor, h: Tensor, c: Tensor, weight: Tensor, memory_weight: Tensor, step: Step
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Process one token of each row: h and c after it, and what the backward pass needs.

    Args:
        inputs: (rows, d_memory + 2 d_hidden) terms of f, gate and update due to x and the biases.
        h: (rows, d_hidden).
        c: (rows, d_memory, d_state).
        weight: (2 d_hidden, d_past) of gate and update; its width depends on the order, see `_reads_h`.
        memory_weight: (d_memory, d_hidden) of f.
        step: A_bar and B_bar.
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
    """Whether gate and update are computed from [h; c] before the token, that is, h is updated first."""
    return weight.shape[1] > c[0].numel()


def _run(
    inputs: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    memory_weight: Tensor,
    steps: list[Step],
    length: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Process tokens one by one: h after each (rows, seq_len, d_hidden), last h and c, what `_cell` saved."""
    hs, saved = [], []
    for t, step in enumerate(steps):
        new_h, new_c, used = _cell(inputs[:, t], h, c, weight, memory_weight, step)
        if length is not None:
            new_h, new_c = (torch.where(over(t < length, x), x, y) for x, y in ((new_h, h), (new_c, c)))
        h, c = new_h, new_c
        hs.append(h)
        saved.append(used)
    return torch.stack(hs, 1), h, c, saved


class _Cells(torch.autograd.Function):
    """The recurrence; a weight's gradient is one matrix product instead of one for each token."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, inputs, h, c, weight, memory_weight, steps, length
    ):
        """Process inputs (rows, seq_len, widths): h after each token (rows, seq_len, d_hidden), h and c."""
        hs, new_h, new_c, saved = _run(inputs, h, c, weight, memory_weight, steps, length)
        ctx.steps = steps
        stacked = (torch.stack(tensors) for tensors in zip(*saved, strict=True))
        ctx.save_for_backward(inputs, h, c, weight, memory_weight, length, hs, *stacked)
        return hs, new_h, new_c

    @staticmethod
    def backward(ctx, dhs, dh, dc):  # type: ignore[no-untyped-def]
        """Backpropagate through time."""
        inputs, h, c, weight, memory_weight, length, hs, pasts, gates, updates = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = inputs, h, c, weight, memory_weight, ctx.steps, length
            of = gradients(lambda *args: _run(*args)[:3], args, (dhs, dh, dc))
            return *(of.get(index) for index in range(5)), None, None
        hidden_first, width, d_memory = _reads_h(weight, c), h.shape[1], c.shape[1]
        before = torch.cat([h[:, None], hs[:, :-1]], 1)
        products = inputs.new_empty(len(pasts), len(h), inputs.shape[2])  # gradients of f, gate and update
        for t in reversed(range(len(pasts))):
            (A_bar, B_bar), gate, update = ctx.steps[t], gates[t], updates[t]
            dh = dh + dhs[:, t]
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
        sources = hs if hidden_first else before
        df, dgates = products[..., :d_memory], products[..., d_memory:]
        dweight = dgates.flatten(0, 1).mT @ pasts.flatten(0, 1)
        dmemory_weight = df.flatten(0, 1).mT @ sources.transpose(0, 1).flatten(0, 1)
        return products.transpose(0, 1), dh, dc, dweight, dmemory_weight, None, None


class HippoRNN(LanguageModel):
    """A language model of HiPPO cells.

    Args:
        config: the configuration.
        generator: for the initial weights; torch's global one if None.
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
