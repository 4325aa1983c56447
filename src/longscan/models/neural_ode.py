"""Neural Ordinary Differential Equations, for series that are not sampled evenly.

Ricky T. Q. Chen, Yulia Rubanova, Jesse Bettencourt, David Duvenaud, 2018, arXiv 1806.07366. The ODE-RNN is of
Rubanova, Chen, Duvenaud, 2019, arXiv 1907.03907, its gated dynamics of De Brouwer and others, 2019, arXiv
1905.12374.

Parent: the GRU. Kept: at each observation a gate decides how much of it enters the state.
Changed: between observations the state evolves by an ODE, for as long as the gap in time. A state space does
that too, but linearly, so that the solution has a closed form; here it is integrated numerically.

    h'  = f(h)                       from the time of one observation to that of the next
    h   = GRU(x, h)                  at the observation
    f(h) = W_2 tanh(W_1 h), or the gated (1 - z) (g - h), in which h stays bounded

Deviations: each gap is integrated in its own time, s = (t - t_k) / (t_{k+1} - t_k), so that the rows of a
batch need not be observed at the same times. To serve as a block of a sequence classifier (see
sequence_classifier.py), an ODE-RNN is a mixer with a norm before it and a projection after it. It is no
language model itself: tokens have positions, not times.
"""

import dataclasses
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longscan.core.config import Config
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models.common.layers import blank, linear
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.model import Model

PRESETS: dict[str, dict[str, Any]] = {"tiny": {"d_model": 64, "n_layers": 2, "vocab_size": 257}}
ADAPTIVE = ("dopri5",)  # solvers with an adaptive step size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODERNNConfig(Config):
    """The configuration of an ODE-RNN.

    Attributes:
        d_input: channels of an observation.
        d_hidden: width of the state.
        d_ode: width inside f; None is d_hidden.
        dynamics: f: "mlp", or "gated" for that of a continuous GRU.
        solver: of the ODE.
        n_steps: steps per gap of a fixed-step solver.
        tolerance: relative and absolute tolerance of an adaptive solver.

    Raises:
        LongscanError: a value is out of range.
    """

    d_input: int
    d_hidden: int
    d_ode: int | None = None
    dynamics: Literal["mlp", "gated"] = "mlp"
    solver: Literal["euler", "midpoint", "rk4", "dopri5"] = "rk4"
    n_steps: int = 1
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_input", "d_hidden", "d_ode", "n_steps")
        if self.dynamics not in ("mlp", "gated"):
            raise LongscanError(f"dynamics: expected 'mlp' or 'gated', got {self.dynamics!r}.")
        if self.solver not in ("euler", "midpoint", "rk4", *ADAPTIVE):
            raise LongscanError(f"solver: expected euler, midpoint, rk4 or dopri5, got {self.solver!r}.")
        self.check("tolerance", above=0)


class MLPDynamics(nn.Module):
    """W_2 tanh(W_1 h).

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: ODERNNConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = config.d_hidden if config.d_ode is None else config.d_ode
        self.wide = linear(config.d_hidden, width, True, generator)
        self.narrow = linear(width, config.d_hidden, True, generator)

    def forward(self, h: Tensor) -> Tensor:
        """Return the time derivative of h (batch, d_hidden)."""
        return cast(Tensor, self.narrow(self.wide(h).tanh()))


class GatedDynamics(nn.Module):
    """(1 - z) (g - h): the continuous limit of a GRU without inputs.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: ODERNNConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gates = linear(config.d_hidden, 2 * config.d_hidden, True, generator)
        self.goal = linear(config.d_hidden, config.d_hidden, True, generator)

    def forward(self, h: Tensor) -> Tensor:
        """Return the time derivative of h (batch, d_hidden)."""
        reset, update = self.gates(h).sigmoid().chunk(2, -1)
        return cast(Tensor, (1 - update) * (self.goal(reset * h).tanh() - h))


class ODERNN(Model):
    """An ODE-RNN over observations with times.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: ODERNNConfig

    def __init__(self, config: ODERNNConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        dynamics = MLPDynamics if config.dynamics == "mlp" else GatedDynamics
        self.dynamics: nn.Module = dynamics(config, generator)
        self.cell = blank(nn.GRUCell, config.d_input, config.d_hidden)
        bound = config.d_hidden**-0.5
        for parameter in self.cell.parameters():
            if not parameter.is_meta:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(
        self, x: Tensor, times: Tensor, lengths: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor:
        """Return the state after each observation.

        Args:
            x: (batch, seq_len, d_input) observations.
            times: (batch, seq_len) of the observations, not decreasing; the initial state is at the first.
            lengths: (batch,) int64 observations of each row, left-aligned; seq_len if None.
            state: (batch, d_hidden) initial state, before the first observation; zeros if None.

        Returns:
            (batch, seq_len, d_hidden); in padding, the last state of the row.

        Raises:
            ValueError: shapes do not fit, or times decrease.
            LongscanError: torchdiffeq is not installed.
        """
        batch, seq_len = self._check(x, times)
        time = torch.arange(seq_len, device=x.device)
        real = None if lengths is None else time < lengths[:, None]  # (batch, seq_len)
        gaps = times.diff(dim=1).to(x.dtype)
        gaps = gaps if real is None else gaps * real[:, 1:]
        if bool((gaps < 0).any()):
            raise ValueError(
                "times: expected times that do not decrease, got a smaller one after a larger one"
            )
        h = x.new_zeros(batch, self.config.d_hidden) if state is None else state
        after = []
        for t in range(seq_len):
            h = self.evolve(h, gaps[:, t - 1]) if t else h
            updated = self.cell(x[:, t], h)
            h = updated if real is None else torch.where(real[:, t, None], updated, h)
            after.append(h)
        return torch.stack(after, 1)

    def evolve(self, h: Tensor, gap: Tensor) -> Tensor:
        """Return the state after a gap in time: between observations, or after the last one.

        Args:
            h: (batch, d_hidden).
            gap: (batch,) duration.

        Returns:
            (batch, d_hidden).

        Raises:
            LongscanError: torchdiffeq is not installed.
        """
        odeint = require("torchdiffeq", "neural ODEs").odeint
        config = self.config
        settings: dict[str, Any] = {"options": {"step_size": 1 / config.n_steps}}
        if config.solver in ADAPTIVE:
            settings = {"rtol": config.tolerance, "atol": config.tolerance}

        def speed(_: Tensor, h: Tensor) -> Tensor:
            change: Tensor = gap[:, None] * self.dynamics(h)
            return change

        span = torch.tensor([0.0, 1.0], dtype=h.dtype, device=h.device)
        return cast(Tensor, odeint(speed, h, span, method=config.solver, **settings)[-1])

    def _check(self, x: Tensor, times: Tensor) -> tuple[int, int]:
        """Validate the shapes; return (batch, seq_len)."""
        d_input = self.config.d_input
        if x.dim() != 3 or 0 in x.shape or x.shape[2] != d_input:
            raise ValueError(f"x: expected a non-empty (batch, seq_len, {d_input}), got {tuple(x.shape)}")
        if times.shape != x.shape[:2]:
            raise ValueError(f"times: expected shape {tuple(x.shape[:2])}, got {tuple(times.shape)}")
        return x.shape[0], x.shape[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralODEConfig(LanguageModelConfig):
    """The configuration of a stack of ODE-RNNs; see `ODERNNConfig`.

    Raises:
        LongscanError: a value is out of range.
    """

    d_hidden: int | None = None  # None is d_model
    d_ode: int | None = None
    dynamics: Literal["mlp", "gated"] = "gated"  # bounded, however long a gap is
    solver: Literal["euler", "midpoint", "rk4", "dopri5"] = "rk4"
    n_steps: int = 1
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.of_one()

    def of_one(self) -> ODERNNConfig:
        """Return the Config of one ODE-RNN.

        Raises:
            LongscanError: a value is out of range.
        """
        return ODERNNConfig(
            d_input=self.d_model,
            d_hidden=self.d_model if self.d_hidden is None else self.d_hidden,
            d_ode=self.d_ode,
            dynamics=self.dynamics,
            solver=self.solver,
            n_steps=self.n_steps,
            tolerance=self.tolerance,
        )


class ODEMixer(Mixer[Any]):
    """An ODE-RNN over whole sequences.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    pace: Tensor

    def __init__(self, config: NeuralODEConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.rnn = ODERNN(config.of_one(), generator)
        self.out_proj = linear(self.rnn.config.d_hidden, config.d_model, False, generator)
        self.register_buffer("pace", torch.ones(1))  # factor of the times, see rescale_time
        if not self.out_proj.weight.is_meta:
            with torch.no_grad():
                self.out_proj.weight /= config.n_layers**0.5

    def plan(self, ids: Tensor, state: None, seq_idx: Tensor | None) -> Tensor:
        """Return the times of the positions.

        Args:
            ids: (batch, seq_len), these times.
            state: unused.
            seq_idx: unused: time is constant in padding, on the right.
        """
        return ids

    def forward(self, x: Tensor, state: None, plan: Tensor, /) -> tuple[Tensor, None]:
        """Mix along time, given as plan (batch, seq_len); there is no state. See `Mixer.forward`."""
        return cast(Tensor, self.out_proj(self.rnn(x, self.pace * plan))), None

    @torch.no_grad()
    def rescale_time(self, factor: float) -> None:
        """Scale the times; see `Mixer.rescale_time`."""
        self.pace *= factor


def blocks(config: NeuralODEConfig, generator: torch.Generator | None = None) -> list[Block]:
    """Return all n_layers blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """
    return [Block(config, ODEMixer(config, generator)) for _ in range(config.n_layers)]
