"""mamba_ssm.ops.selective_scan_interface and the package selective_scan, computed by longscan's scan.

Their layout is (batch, d_inner, seq_len); B and C are (d_inner, d_state), (batch, d_state, seq_len) or
(batch, n_groups, d_state, seq_len). With a complex A, time-varying B and C hold pairs of real and imaginary
parts, (..., 2 seq_len), and y is twice the real part.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import COMPLEX, expect, requires_tensors

__all__ = [
    "check_scan",
    "expect_matrices",
    "scan",
    "selective_scan_fn",
    "selective_scan_fn_without_gate",
    "time_first",
]


@requires_tensors
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the outputs of the selective scan, and on request its last state.

    Args:
        u: (batch, d_inner, seq_len).
        delta: (batch, d_inner, seq_len).
        A: (d_inner, d_state), real or complex.
        B: see above.
        C: see above.
        D: (d_inner,).
        z: (batch, d_inner, seq_len), a gate.
        delta_bias: (d_inner,).
        delta_softplus: whether delta passes through a softplus after the bias.
        return_last_state: whether to return the last state too. It is differentiable.

    Returns:
        (batch, d_inner, seq_len) in u's dtype; the last state is (batch, d_inner, d_state), at least float32.
    """
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


@requires_tensors
def selective_scan_fn_without_gate(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Tensor:
    """Return the outputs of `selective_scan_fn`; in this older package position 7 is the bias.

    Args:
        u: see `selective_scan_fn`; likewise the others.
        delta: likewise.
        A: likewise.
        B: likewise.
        C: likewise.
        D: likewise.
        delta_bias: likewise.
        delta_softplus: likewise.
        nrows: rows per block of the CUDA kernel; without effect.
    """
    return scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state of `selective_scan_fn`, from a state (batch, d_inner, d_state)."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    if A.is_complex():
        return _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    B, C = time_first(B, C)
    y, state = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        initial_state,
    )
    return y.transpose(1, 2).contiguous(), state  # contiguous as theirs: callers take views


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Check the arguments of `selective_scan_fn`.

    Raises:
        ValueError: a shape doesn't fit.
        TypeError: a dtype doesn't.
    """
    sizes: dict[str, int] = {}
    expect(sizes, u=(u, "batch d_inner seq_len"), delta=(delta, "batch d_inner seq_len"))
    expect(sizes, COMPLEX, A=(A, "d_inner d_state"))
    expect_matrices(sizes, A.is_complex(), B=B, C=C)
    expect(sizes, D=(D, "d_inner"), z=(z, "batch d_inner seq_len"), delta_bias=(delta_bias, "d_inner"))


def expect_matrices(sizes: dict[str, int], is_complex: bool, **matrices: Tensor | None) -> None:
    """Check B and C, given the sizes batch, d_inner, seq_len and d_state, and whether A is complex."""
    length = (2 if is_complex else 1) * sizes["seq_len"]
    varying = f"batch d_state {length} | batch n_groups d_state {length}"
    for name, matrix in matrices.items():
        own = dict(sizes)  # of B and C one may have no groups
        is_constant = isinstance(matrix, Tensor) and matrix.dim() == 2
        kind = (COMPLEX,) if is_complex and is_constant else ()
        expect(own, *kind, **{name: (matrix, f"d_inner d_state | {varying}")})
        n_groups = own.get("n_groups", 1)
        if n_groups == 0 or own["d_inner"] % n_groups:
            raise ValueError(
                f"{name}: expected a number of groups that divides {own['d_inner']} channels, got {n_groups}"
            )


def time_first(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and C with time after the batch, and as many groups if only one of them has groups."""
    B, C = (M.squeeze(1) if M.dim() == 4 and M.shape[1] == 1 else M for M in (B, C))
    B, C = (M if M.dim() == 2 else M.movedim(-1, 1) for M in (B, C))
    if {B.dim(), C.dim()} == {3, 4}:
        n_groups = max(M.shape[2] for M in (B, C) if M.dim() == 4)
        B, C = (M.unsqueeze(2).expand(-1, -1, n_groups, -1) if M.dim() == 3 else M for M in (B, C))
    return B, C


def _complex_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the final state for a complex A, step by step."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, dt = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    (batch, d_inner, seq_len), d_state = u.shape, A.shape[1]
    shape = (seq_len, batch, d_inner, d_state)
    Bs, Cs = (_complex_matrix(M, dtype, shape) for M in (B, C))
    h = A.new_zeros(shape[1:]) if initial_state is None else initial_state
    ys = []
    for t in range(seq_len):
        h = torch.exp(dt[..., t, None] * A) * h + (dt * x)[..., t, None] * Bs[t]
        ys.append(2 * (h * Cs[t]).sum(-1).real)
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * x
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def _complex_matrix(M: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return B or C as complex (seq_len, batch, d_inner, d_state)."""
    if M.dim() == 2:
        return M.expand(shape)
    pairs = torch.view_as_complex(torch.unflatten(M.to(dtype), -1, (-1, 2)).contiguous())
    if pairs.dim() == 3:
        pairs = pairs.unsqueeze(1)
    return pairs.permute(3, 0, 1, 2).repeat_interleave(shape[2] // pairs.shape[1], dim=2)
