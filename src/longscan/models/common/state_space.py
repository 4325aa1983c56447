"""State space basics: continuous systems, their discretisation, and their two forms.

    x'(t) = A x(t) + B u(t)          x_k = A_bar x_{k-1} + B_bar u_k          y = K * u + D u
    y(t)  = C x(t) + D u(t)          y_k = C x_k + D u_k                      K_l = C A_bar^l B_bar

The first is a linear differential equation of order N; sampled at steps of dt it becomes the second, a
recurrence; unrolled, the recurrence is the third, a convolution. There is one input and one output; leading
axes, if any, are independent systems. This is the plain reference that the models' fast paths are tested
against, in float64.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.core.config import nearest
from longscan.errors import LongscanError

#: alpha of the generalised bilinear transform, the weight of a step's end, by method; "gbt" takes any
ALPHA = {"euler": 0.0, "bilinear": 0.5, "backward": 1.0}


class StateSpace(NamedTuple):
    """A continuous system.

    Attributes:
        A: (N, N) the state matrix.
        B: (N,) the input matrix.
        C: (N,) the output matrix.
        D: () the direct path: the limit of the transfer function at infinity.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


def mass_spring(m: float, c: float, k: float) -> StateSpace:
    """Return the damped oscillator m q'' + c q' + k q = u, with state (q, q') and output q.

    Args:
        m: mass.
        c: damping.
        k: stiffness.

    Raises:
        LongscanError: the mass is not positive.
    """
    if not m > 0:
        raise LongscanError(f"m: expected a positive mass, got {m}.")
    matrices = [[0.0, 1.0], [-k / m, -c / m]], [0.0, 1 / m], [1.0, 0.0], 0.0
    return StateSpace(*(torch.tensor(matrix, dtype=torch.float64) for matrix in matrices))


def discretize(
    A: Tensor, B: Tensor, dt: Tensor | float, method: str = "zoh", alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the discretised system x_k = A_bar x_{k-1} + B_bar u_k.

    "zoh", the zero-order hold, is exact for an input that is constant within a step. The others average the
    slopes at both ends of a step, with weight alpha on its end: "euler" 0, "bilinear" 1/2, "backward" 1,
    "gbt" any.

    Args:
        A: (..., N, N).
        B: (..., N).
        dt: (...) the step.
        method: "zoh", "euler", "bilinear", "backward" or "gbt".
        alpha: from 0 to 1, for "gbt" only.

    Returns:
        A_bar: (..., N, N).
        B_bar: (..., N).

    Raises:
        LongscanError: there is no such method, or dt or alpha is out of range.
    """
    step = torch.as_tensor(dt, dtype=A.dtype, device=A.device)
    if not bool(((step > 0) & step.isfinite()).all()):
        raise LongscanError(f"dt: expected finite steps of more than 0, got {float(step.min())}.")
    if method == "gbt" and alpha is None:
        raise LongscanError("alpha: expected a number from 0 to 1 with the method 'gbt', got none.")
    if method not in ("zoh", "gbt", *ALPHA):
        raise LongscanError(f"no method called {method!r}{nearest(method, ('zoh', 'gbt', *ALPHA))}")
    if method != "gbt" and alpha is not None:
        raise LongscanError(f"alpha: expected none with the method {method!r}, got {alpha}.")
    step = step[..., None, None]
    n = A.shape[-1]
    if method == "zoh":  # exp of [[A, B], [0, 0]]: no inverse of A, which may be singular
        top = torch.cat([A * step, B[..., None] * step], -1)
        both = torch.matrix_exp(torch.nn.functional.pad(top, (0, 0, 0, 1)))
        return both[..., :n, :n], both[..., :n, n]
    weight = ALPHA.get(method, alpha)
    assert weight is not None
    if not 0 <= weight <= 1:
        raise LongscanError(f"alpha: expected a number from 0 to 1, got {weight}.")
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    ahead = torch.cat([eye + (1 - weight) * step * A, step * B[..., None]], -1)
    both = torch.linalg.solve(eye - weight * step * A, ahead)
    return both[..., :n], both[..., n]


def recurrence(
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    u: Tensor,
    D: Tensor | float = 0.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of a discrete system, step by step, and its state.

    Args:
        A_bar: (..., N, N).
        B_bar: (..., N).
        C: (..., N).
        u: (..., seq_len) the input.
        D: (...).
        state: (..., N) before the first step; zeros if None.

    Returns:
        y: (..., seq_len).
        state: (..., N) after the last step.
    """
    x = torch.zeros_like(B_bar * u[..., :1]) if state is None else state
    outputs = []
    for now in u.unbind(-1):
        x = (A_bar @ x[..., None])[..., 0] + B_bar * now[..., None]
        outputs.append((C * x).sum(-1) + D * now)
    return torch.stack(outputs, -1), x


def simulate(
    system: StateSpace, u: Tensor, dt: float, method: str = "zoh", state: Tensor | None = None
) -> Tensor:
    """Return the outputs of a continuous system for a sampled input.

    Args:
        system: an unstable one gives a warning.
        u: (seq_len,) finite.
        dt: seconds between samples.
        method: see `discretize`; a stable system that it makes unstable gives a warning.
        state: (N,) initial state; zeros if None.

    Returns:
        (seq_len,).

    Raises:
        LongscanError: u holds NaN or infinity; or as `discretize`.
    """
    if not bool(u.isfinite().all()):
        index = int((~u.isfinite()).nonzero()[0])
        raise LongscanError(f"u: expected finite samples, got {float(u[index])} at {index}.")
    A_bar, B_bar = discretize(system.A, system.B, dt, method)
    if check_stable(system.A):
        check_stable(A_bar, discrete=True)
    return recurrence(A_bar, B_bar, system.C, u, system.D, state)[0]


def krylov(A_bar: Tensor, B_bar: Tensor, length: int) -> Tensor:
    """Return the states after a unit impulse, B_bar, A_bar B_bar, A_bar^2 B_bar, ..., by doubling.

    Args:
        A_bar: (..., N, N).
        B_bar: (..., N).
        length: steps.

    Returns:
        (..., N, length): O(N^3 log length + N^2 length) time, O(N length) memory.
    """
    columns, power = B_bar[..., None], A_bar
    while columns.shape[-1] < length:
        ahead = columns[..., : length - columns.shape[-1]]
        columns = torch.cat([columns, power @ ahead], -1)
        power = power @ power
    return columns


def kernel_powers(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """Return the same as `kernel` by repeated multiplication, which is the definition.

    Args:
        A_bar: (..., N, N).
        B_bar: (..., N).
        C: (..., N).
        length: steps.

    Returns:
        (..., length).
    """
    x, values = B_bar, []
    for _ in range(length):
        values.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(values, -1)


def kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """Return the response to a unit impulse, K_l = C A_bar^l B_bar, without D.

    Args:
        A_bar: (..., N, N).
        B_bar: (..., N).
        C: (..., N).
        length: steps.

    Returns:
        (..., length).
    """
    return (C[..., None, :] @ krylov(A_bar, B_bar, length))[..., 0, :]


def transfer(system: StateSpace, s: Tensor) -> Tensor:
    """Return the transfer function C (s - A)^-1 B + D; at s = i omega, the frequency response.

    Args:
        system: the system.
        s: (k,) complex.

    Returns:
        (k,) complex.
    """
    A, B, C = (matrix.to(s.dtype) for matrix in system[:3])
    eye = torch.eye(len(B), dtype=s.dtype)
    states: Tensor = torch.linalg.solve(s[:, None, None] * eye - A, B.expand(len(s), -1))
    return states @ C + system.D


def check_stable(A: Tensor, discrete: bool = False) -> bool:
    """Return whether a system is stable, up to rounding; warn, naming the eigenvalue, if it is not.

    Args:
        A: (..., N, N).
        discrete: whether A is the matrix of a recurrence, whose eigenvalues must lie in the unit circle.
    """
    eigenvalues = torch.linalg.eigvals(A.detach()).flatten()
    growth = eigenvalues.abs().log() if discrete else eigenvalues.real
    worst = int(growth.argmax())
    slack = math.sqrt(torch.finfo(A.dtype).eps) * max(1.0, float(A.detach().abs().max()))
    if float(growth[worst]) <= slack:
        return True
    value = complex(eigenvalues[worst])
    where = "outside the unit circle" if discrete else "to the right of the imaginary axis"
    per = "step" if discrete else "unit of time"
    warnings.warn(
        f"the system is unstable: its eigenvalue {value:.4g} lies {where}, so the state grows "
        f"{math.exp(min(float(growth[worst]), 700)):.3g} times per {per}.",
        stacklevel=2,
    )
    return False
