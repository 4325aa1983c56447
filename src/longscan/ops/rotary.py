"""Rotation by running sums of angles (Mamba-3, arXiv 2603.15569): data-dependent rotary embeddings.

    theta_t = theta_{t-1} + rate_t dt_t               of each head and pair of channels
    q_t = R(theta_t) (C_t + C_bias)                   R rotates pairs of channels
    k_t = R(theta_t) (B_t + B_bias)

Angles are sums in float64: after 10^5 tokens a float32 sum would have lost the turn. R changes no product of
q and k of the same token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed, register_second
from longscan.ops._segments import check_seq_idx, segments
from longscan.ops.ssd import ssd

__all__ = ["accumulate", "rotary", "rotary_ref", "rotate", "wrapped"]


def wrapped(angle: Tensor) -> Tensor:
    """Return an angle less whole turns, between -pi and pi.

    Args:
        angle: any shape.
    """
    return angle - 2 * math.pi * (angle / (2 * math.pi)).round()


def accumulate(turn: Tensor, angle: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the angle at each token, the sum of all turns of its sequence, in float64, and the last one.

    Args:
        turn: (batch, seq_len, n_heads, n_angles) by how much each token turns.
        angle: (batch, n_heads, n_angles) before the first token.
        seq_idx: (batch, seq_len) int32, see `rotary`.

    Returns:
        angles: (batch, seq_len, n_heads, n_angles); arbitrary in padding.
        final_angle: (batch, n_heads, n_angles).
    """
    turn, angle = turn.double(), angle.double()
    if seq_idx is None:
        angles = angle[:, None] + turn.cumsum(1)
        return angles, angles[:, -1]
    flat = turn.flatten(2)[:, :, None]  # one head that forgets nothing, for all angles
    one = torch.ones_like(flat[..., :1])
    no_decay = torch.zeros_like(one[..., 0])
    initial = angle.flatten(1)[:, None, :, None]
    angles, final = ssd(flat, one[..., 0], no_decay, one, one, None, initial, seq_idx)
    return angles.view(turn.shape), final.view(angle.shape)


def rotate(xs: tuple[Tensor, ...], angle: Tensor, halves: bool) -> tuple[Tensor, ...]:
    """Return tensors with pairs of channels rotated; channels beyond those of the angles are as they were.

    Args:
        xs: (..., rank, n_heads, d_state) each, of one dtype.
        angle: (..., n_heads, n_angles) in at least their precision.
        halves: whether channel i forms a pair with i + d_state // 2; else pairs are adjacent.

    Returns:
        One for each of xs.
    """
    angle, n, half = wrapped(angle).to(xs[0].dtype)[..., None, :, :], angle.shape[-1], xs[0].shape[-1] // 2
    cos, sin = angle.cos(), angle.sin()
    turned = []
    for x in xs:
        if halves:
            a, b = x[..., :n], x[..., half : half + n]
            parts = [a * cos - b * sin, x[..., n:half], a * sin + b * cos, x[..., half + n :]]
        else:
            a, b = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]
            parts = [torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), x[..., 2 * n :]]
        turned.append(torch.cat(parts, -1))
    return tuple(turned)


# --- 1. the equation ----------------------------------------------------------------------------------------


def rotary_ref(
    C: Tensor,
    B: Tensor,
    rate: Tensor,
    dt: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    initial_angle: Tensor,
    seq_idx: Tensor | None = None,
    halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result of :func:`rotary`, token by token: the equations as written."""
    q, k = _of_heads(C, C_bias), _of_heads(B, B_bias)
    batch, seq_len = q.shape[:2]
    starts, padding = segments(q.new_zeros(batch, seq_len, dtype=torch.long) if seq_idx is None else seq_idx)
    theta, turned = initial_angle.double(), []
    for t in range(seq_len):
        before = torch.where(starts[:, t, None, None], 0.0, theta)
        after = before + rate[:, t, None].double() * dt[:, t, :, None].double()
        theta = torch.where(padding[:, t, None, None], theta, after)
        turned.append(torch.stack(rotate((q[:, t], k[:, t]), theta, halves)))
    both = torch.where(padding[..., None, None, None], 0.0, torch.stack(turned, 2))
    products = torch.einsum("blrhn,blshn->blrsh", *both)
    return *both, products, wrapped(theta).to(C_bias.dtype)


# --- 2. the op ----------------------------------------------------------------------------------------------


@exact
def rotary(
    C: Tensor,
    B: Tensor,
    rate: Tensor,
    dt: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    initial_angle: Tensor,
    seq_idx: Tensor | None = None,
    halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rotated q and k of every head, their products, and the angles after the last token.

    Args:
        C: (batch, seq_len, rank, n_groups, d_state), any float type; a group is shared by n_heads / n_groups
            adjacent heads.
        B: likewise.
        rate: (batch, seq_len, n_angles), by how much each pair of channels turns in a step of 1.
        dt: (batch, seq_len, n_heads) step sizes.
        C_bias: (rank, n_heads, d_state).
        B_bias: likewise.
        initial_angle: (batch, n_heads, n_angles) before the first token.
        seq_idx: (batch, seq_len) int32 or int64 for packed rows: where the value changes a new sequence
            starts from angles of zero (the first sequence of a row continues initial_angle). Negative values
            are padding: the angles pass through unchanged, and q, k and the products are 0.
        halves: whether channel i forms a pair with i + d_state // 2; else pairs are adjacent. Channels beyond
            those of the angles do not turn.

    Returns:
        q: (batch, seq_len, rank, n_heads, d_state), in the biases' dtype, at least float32.
        k: likewise.
        products: (batch, seq_len, rank, rank, n_heads), of each q and each k of a token.
        final_angle: (batch, n_heads, n_angles), less whole turns.

    Raises:
        ValueError: shapes do not fit.
        TypeError: seq_idx is not int32 or int64.
    """
    _check(C, B, rate, dt, C_bias, B_bias, initial_angle)
    seq_idx = check_seq_idx(seq_idx, *C.shape[:2])
    dtype = torch.float64 if C_bias.dtype == torch.float64 else torch.float32
    tensors = [t.to(dtype) for t in (C, B, rate, dt, C_bias, B_bias, initial_angle)]
    run: Any = _composite if composed() else torch.ops.longscan.rotary
    q, k, products, final_angle = run(*tensors, seq_idx, halves)
    return q, k, products, final_angle


def _check(
    C: Tensor,
    B: Tensor,
    rate: Tensor,
    dt: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    initial_angle: Tensor,
) -> None:
    """Raise ValueError unless all shapes fit."""
    if C.dim() != 5 or 0 in C.shape:
        expected = "a non-empty (batch, seq_len, rank, n_groups, d_state)"
        raise ValueError(f"C: expected {expected}, got {tuple(C.shape)}")
    batch, seq_len, rank, n_groups, d_state = C.shape
    if dt.dim() != 3 or dt.shape[:2] != C.shape[:2] or not dt.shape[2] or dt.shape[2] % n_groups:
        heads = f"{(batch, seq_len)} + (n_heads,) with {n_groups} groups dividing n_heads"
        raise ValueError(f"dt: expected {heads}, got {tuple(dt.shape)}")
    if rate.dim() != 3 or rate.shape[:2] != C.shape[:2] or not 2 <= 2 * rate.shape[2] <= d_state:
        angles = f"{(batch, seq_len)} + (n_angles,) with 1 to {d_state // 2} angles"
        raise ValueError(f"rate: expected {angles}, got {tuple(rate.shape)}")
    n_heads = dt.shape[2]
    for name, tensor, shape in (
        ("B", B, tuple(C.shape)),
        ("C_bias", C_bias, (rank, n_heads, d_state)),
        ("B_bias", B_bias, (rank, n_heads, d_state)),
        ("initial_angle", initial_angle, (batch, n_heads, rate.shape[2])),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = (
    "Tensor C, Tensor B, Tensor rate, Tensor dt, Tensor C_bias, Tensor B_bias, Tensor initial_angle, "
    "Tensor? seq_idx, bool halves"
)
_lib.define(f"rotary({_INPUTS}) -> (Tensor q, Tensor k, Tensor products, Tensor final_angle)")
_lib.define(
    f"rotary_backward({_INPUTS}, Tensor dq, Tensor dk, Tensor dproducts, Tensor? dfinal) -> (Tensor dC, "
    "Tensor dB, Tensor drate, Tensor ddt, Tensor dC_bias, Tensor dB_bias, Tensor dinitial_angle)"
)


# --- 3. shapes ----------------------------------------------------------------------------------------------


def _empty(C: Tensor, dt: Tensor, initial_angle: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq_len, rank, _, d_state = C.shape
    n_heads = dt.shape[2]
    q, k = (C.new_empty(batch, seq_len, rank, n_heads, d_state) for _ in range(2))
    products = C.new_empty(batch, seq_len, rank, rank, n_heads)
    return q, k, products, initial_angle.new_empty(initial_angle.shape)


@torch.library.register_fake("longscan::rotary", lib=_lib)
def _(C, B, rate, dt, C_bias, B_bias, initial_angle, seq_idx, halves):  # type: ignore[no-untyped-def]
    return _empty(C, dt, initial_angle)


@torch.library.register_fake("longscan::rotary_backward", lib=_lib)
def _(*inputs):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in inputs[:7])


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.halves = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.like = [(t.shape, t.dtype) for t in output[:3]]


def _autograd(ctx, dq, dk, dproducts, dfinal):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    dense = [
        tensors[0].new_zeros(shape) if d is None else d
        for d, (shape, _) in zip((dq, dk, dproducts), ctx.like, strict=True)
    ]
    return *torch.ops.longscan.rotary_backward(*tensors, ctx.halves, *dense, dfinal), None, None


def _of_heads(B: Tensor, bias: Tensor) -> Tensor:
    """Return B (batch, seq_len, rank, n_groups, d_state) + bias, of each head."""
    bias = torch.unflatten(bias, 1, (B.shape[3], -1))
    return (B[..., None, :] + bias).flatten(3, 4)


def _composite(
    C: Tensor,
    B: Tensor,
    rate: Tensor,
    dt: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    initial_angle: Tensor,
    seq_idx: Tensor | None,
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the op on any device and in float64, without a loop; differentiable any number of times."""
    turn = rate[:, :, None].double() * dt[..., None].double()
    angles, final = accumulate(turn, initial_angle, seq_idx)
    q, k = rotate((_of_heads(C, C_bias), _of_heads(B, B_bias)), angles, halves)
    if seq_idx is not None:
        q, k = (torch.where((seq_idx < 0)[..., None, None, None], 0.0, x) for x in (q, k))
    products = torch.einsum("blrhn,blshn->blrsh", q, k)
    return q, k, products, wrapped(final).to(C_bias.dtype)


def _backward_torch(*inputs: Any) -> tuple[Tensor, ...]:
    """Run the backward op on any device and in float64; a turn moves all later angles of its sequence."""
    C, B, rate, dt, C_bias, B_bias, initial_angle, seq_idx, halves, dq, dk, dproducts, dfinal = inputs
    padding = None if seq_idx is None else seq_idx < 0
    turn = rate[:, :, None].double() * dt[..., None].double()
    angles, _ = accumulate(turn, initial_angle, seq_idx)
    given = [_of_heads(C, C_bias), _of_heads(B, B_bias)]
    if padding is not None:
        given, (dq, dk, dproducts) = (
            [torch.where(padding[..., None, None, None], 0.0, x) for x in xs]
            for xs in (given, (dq, dk, dproducts))
        )
    back = rotate((dq, dk), -angles, halves)
    crossed = [_cross(x, d, rate.shape[2], halves).sum(2) for x, d in zip(given, back, strict=True)]
    dangle = crossed[0] + crossed[1]
    after = torch.zeros_like(initial_angle) if dfinal is None else dfinal
    reversed_idx = None if seq_idx is None else seq_idx.flip(1)
    dturn, dinitial = accumulate(dangle.flip(1), after, reversed_idx)
    dturn = dturn.flip(1).to(C.dtype)
    if padding is not None:
        dturn = torch.where(padding[..., None, None], 0.0, dturn)
    du = back[0] + torch.einsum("blrsh,blshn->blrhn", dproducts, given[1])
    dv = back[1] + torch.einsum("blrsh,blrhn->blshn", dproducts, given[0])
    sums = [torch.unflatten(d, 3, (C.shape[3], -1)).sum(4) for d in (du, dv)]
    drate, ddt = (dturn * dt[..., None]).sum(2), (dturn * rate[:, :, None]).sum(3)
    return *sums, drate, ddt, du.sum((0, 1)), dv.sum((0, 1)), dinitial.to(C.dtype)


def _cross(x: Tensor, d: Tensor, n: int, halves: bool) -> Tensor:
    """Return a d_b - b d_a of the pairs (a, b) of x, (..., n_heads, n_angles)."""
    half = x.shape[-1] // 2
    first, second = (slice(n), slice(half, half + n)) if halves else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    return x[..., first] * d[..., second] - x[..., second] * d[..., first]


torch.library.register_autograd("longscan::rotary", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::rotary_backward", _lib, _composite, n_inputs=9)


# --- 5. the native kernel -----------------------------------------------------------------------------------

MAX_NATIVE_STATE, MAX_NATIVE_RANK = 256, 16  # LS_MAX_STATE and LS_MAX_RANK of the kernel
STARTS, PADDING = 1, 2  # LS_STARTS and LS_PADDING


def _use_native(*tensors: Tensor | None) -> bool:
    C = tensors[0]
    assert C is not None
    fits = C.shape[4] <= MAX_NATIVE_STATE and C.shape[2] <= MAX_NATIVE_RANK
    return fits and _native.available(*tensors)


def _marks(seq_idx: Tensor | None) -> Tensor | None:
    """Return what happens at each token of packed rows, (batch, seq_len) uint8."""
    if seq_idx is None:
        return None
    starts, padding = segments(seq_idx)
    return starts.to(torch.uint8) * STARTS + padding.to(torch.uint8) * PADDING


def _run(
    function: str, inputs: list[Tensor], marks: Tensor | None, halves: bool, rest: list[Tensor | None]
) -> None:
    """Run a kernel on contiguous inputs; rest are the fields of ``ls_rotary`` from q on."""
    C, _, rate, dt = inputs[:4]
    batch, seq_len, rank, n_groups, d_state = C.shape
    sizes = (batch, seq_len, rank, dt.shape[2], n_groups, d_state, rate.shape[2], int(halves))
    fields = [*sizes, *map(_native.pointer, (*inputs, marks, *rest))]
    fields += [0] * (8 + 7 + 4 + 4 + 7 - len(fields) + 1)
    size = _native.workspace("ls_rotary_workspace", [*fields, 0])
    workspace = torch.empty(size, dtype=torch.float32, device="cpu")
    _native.call(function, [*fields, workspace.data_ptr()])


def _forward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, halves = inputs
    if not _use_native(*tensors):
        return tuple(t.clone() for t in _composite(*inputs))
    out = _empty(tensors[0], tensors[3], tensors[6])
    _run("ls_rotary_forward", [t.contiguous() for t in tensors], _marks(seq_idx), halves, list(out))
    return out


def _backward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, halves = inputs[:9]
    if not _use_native(*tensors, *inputs[9:]):
        return tuple(gradient.contiguous() for gradient in _backward_torch(*inputs))
    grads = [t.new_empty(t.shape) for t in tensors]
    rest = [None] * 4 + [_native.dense(d) for d in inputs[9:]] + grads
    _run("ls_rotary_backward", [t.contiguous() for t in tensors], _marks(seq_idx), halves, rest)
    return tuple(grads)


_lib.impl("rotary", _forward, "CompositeExplicitAutograd")
_lib.impl("rotary_backward", _backward, "CompositeExplicitAutograd")
