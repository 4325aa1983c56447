"""The selective scan along several paths over one set of positions (VMamba, arXiv 2401.10166, section 4.2).

Path k visits position p = paths[k, t] at step t:

    h_k = exp(dt_k,p A_k) * h_k + dt_k,p B_k,p u_p
    y_p = sum over k of (C_k,p . h_k + D_k u_p)

Inputs and outputs lie in the order of the positions. Nothing is copied into the order of a path or back: the
kernel reads and writes the rows that the path names.
"""

from typing import Any

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops._derivatives import composed, register_second
from longscan.ops._scan_chunked import CHUNK, LANE_PAD
from longscan.ops.scan import MAX_NATIVE_STATE, selective_scan, selective_scan_ref

# --- 1. the equation ----------------------------------------------------------------------------------------


def path_scan_ref(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    paths: Tensor,
) -> Tensor:
    """Return the result of :func:`path_scan`, one path after the other, step by step."""
    ys = []
    for k, path in enumerate(paths):
        x = u[:, path] if u.dim() == 3 else u[:, path, k]
        bias = None if dt_bias is None else dt_bias[k]
        d = None if D is None else D[k]
        y, _ = selective_scan_ref(
            x, dt[:, path, k], A[k], B[:, path, k], C[:, path, k], d, None, bias, dt_softplus=True
        )
        ys.append(torch.zeros_like(y).index_copy(1, path, y))
    return torch.stack(ys).sum(0)


# --- 2. the op ----------------------------------------------------------------------------------------------


def path_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    paths: Tensor,
) -> Tensor:
    """Return the sum of selective scans along several paths, from zero states.

    Args:
        u: (batch, n, d_inner) input, for all paths, or (batch, n, n_paths, d_inner); any float type.
        dt: (batch, n, n_paths, d_inner) step sizes, before the bias and the softplus.
        A: (n_paths, d_inner, d_state) real; negative entries decay.
        B: (batch, n, n_paths, d_state) input matrix.
        C: (batch, n, n_paths, d_state) output matrix.
        D: (n_paths, d_inner) skip connection.
        dt_bias: (n_paths, d_inner) added to dt.
        paths: (n_paths, n) int32 or int64 on u's device: the position of each step; each row is a
            permutation of 0 ... n - 1.

    Returns:
        y: (batch, n, d_inner) in u's dtype.

    Raises:
        ValueError: shapes do not fit, or a path is no permutation.
        TypeError: an argument is not floating point, or paths is not int32 or int64.
    """
    _check(u, dt, A, B, C, D, dt_bias, paths)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    tensors: Any = [None if t is None else t.to(dtype) for t in (u, dt, A, B, C, D, dt_bias)]
    paths = torch.ops.longscan.check_paths(paths)
    if composed() or not _use_native(*tensors):  # the gathered scan is an op with its own gradients
        (gathered,) = _gathered(*[*tensors, paths])
        return gathered.to(u.dtype)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = torch.ops.longscan.path_scan(*tensors, paths, keep)
    out: Tensor = y.to(u.dtype)
    return out


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    paths: Tensor,
) -> None:
    """Raise ValueError or TypeError unless all shapes and dtypes fit."""
    if dt.dim() != 4 or 0 in dt.shape:
        raise ValueError(f"dt: expected a non-empty (batch, n, n_paths, d_inner), got {tuple(dt.shape)}")
    batch, n, n_paths, d_inner = dt.shape
    if A.dim() != 3 or A.shape[:2] != (n_paths, d_inner) or A.shape[2] == 0:
        raise ValueError(f"A: expected ({n_paths}, {d_inner}, d_state), got {tuple(A.shape)}")
    matrix = (batch, n, n_paths, A.shape[2])
    shapes: tuple[tuple[str, Tensor | None, tuple[tuple[int, ...], ...]], ...] = (
        ("u", u, ((batch, n, d_inner), tuple(dt.shape))),
        ("B", B, (matrix,)),
        ("C", C, (matrix,)),
        ("D", D, ((n_paths, d_inner),)),
        ("dt_bias", dt_bias, ((n_paths, d_inner),)),
        ("paths", paths, ((n_paths, n),)),
    )
    for name, tensor, expected in shapes:
        if tensor is not None and tuple(tensor.shape) not in expected:
            choices = " or ".join(map(str, expected))
            raise ValueError(f"{name}: expected shape {choices}, got {tuple(tensor.shape)}")
    for name, tensor in (("u", u), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("dt_bias", dt_bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected real floating point, got {tensor.dtype}")
    if paths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"paths: expected int32 or int64, got {paths.dtype}")


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor paths"
# an op of its own, so that compiled code checks too: the kernel goes where a path says
_lib.define("check_paths(Tensor paths) -> Tensor")
# boundaries: the states before every time tile, in the kernel's own layout
_lib.define(f"path_scan({_INPUTS}, bool keep) -> (Tensor y, Tensor boundaries)")
# An absent optional input has an empty gradient.
_lib.define(
    f"path_scan_backward({_INPUTS}, Tensor boundaries, Tensor dy) -> "
    "(Tensor du, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor ddt_bias)"
)


# --- 3. shapes ----------------------------------------------------------------------------------------------


def _boundaries_shape(dt: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return (tiles, batch, channels of all paths, padded each, d_state)."""
    batch, n, n_paths, d_inner = dt.shape
    return -(-n // CHUNK), batch, n_paths * -(-d_inner // LANE_PAD) * LANE_PAD, A.shape[2]


@torch.library.register_fake("longscan::check_paths", lib=_lib)
def _(paths):  # type: ignore[no-untyped-def]
    return paths.new_empty(paths.shape, dtype=torch.int32)


@torch.library.register_fake("longscan::path_scan", lib=_lib)
def _(u, dt, A, B, C, D, dt_bias, paths, keep):  # type: ignore[no-untyped-def]
    batch, n, _, d_inner = dt.shape
    return u.new_empty(batch, n, d_inner), u.new_empty(_boundaries_shape(dt, A) if keep else (0,))


@torch.library.register_fake("longscan::path_scan_backward", lib=_lib)
def _(u, dt, A, B, C, D, dt_bias, paths, boundaries, dy):  # type: ignore[no-untyped-def]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, dt, A, B, C, D, dt_bias))


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 9
    *inputs, boundaries = ctx.saved_tensors
    grads = torch.ops.longscan.path_scan_backward(*inputs, boundaries, dy)
    return *(g if t is not None else None for g, t in zip(grads, inputs[:7], strict=True)), None, None


def _gathered(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    paths: Tensor,
) -> tuple[Tensor]:
    """Run the op as a composite: gather along the paths, one scan with a group a path, scatter, sum."""
    batch, n, n_paths, d_inner = dt.shape
    order = paths.long().T  # (n, n_paths)
    back = torch.argsort(order, 0)
    u = u[:, :, None].expand(-1, -1, n_paths, -1) if u.dim() == 3 else u
    u, dt, B, C = (_take(x, order) for x in (u, dt, B, C))
    D, dt_bias = (None if x is None else x.flatten() for x in (D, dt_bias))
    y, _ = selective_scan(u.flatten(2), dt.flatten(2), A.flatten(0, 1), B, C, D, None, dt_bias, True)
    return (_take(y.view(batch, n, n_paths, d_inner), back).sum(2),)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Return x (batch, n, n_paths, channels) with the rows of each path in another order (n, n_paths)."""
    return x.gather(1, order[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


torch.library.register_autograd("longscan::path_scan", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::path_scan_backward", _lib, _gathered, n_inputs=8)


# --- 5. the native kernel -----------------------------------------------------------------------------------


def _use_native(*tensors: Tensor | None) -> bool:
    A = tensors[2]
    assert A is not None
    return A.shape[2] <= MAX_NATIVE_STATE and _native.available(*tensors)


def _checked(paths: Tensor) -> Tensor:
    """Return paths as contiguous int32; raise ValueError unless each visits every position once."""
    seen = torch.zeros(paths.shape, dtype=torch.bool, device=paths.device)
    inside = int(paths.min()) >= 0 and int(paths.max()) < paths.shape[1]
    if not inside or not seen.scatter_(1, paths.long(), True).all():
        raise ValueError(f"paths: expected permutations of 0 ... {paths.shape[1] - 1}, each position once")
    return paths.to(torch.int32, copy=True, memory_format=torch.contiguous_format)


def _refuse(*tensors: Tensor | None) -> None:
    """Raise TypeError unless the kernel supports these tensors."""
    if not _use_native(*tensors):
        raise TypeError("longscan::path_scan: expected float32 on the CPU; ops.path_scan takes all others")


def _layout(tensors: Any) -> list[Any]:
    """Return the op's seven tensor inputs in the kernel's layout: what varies may keep its strides."""
    u, dt, A, B, C, D, dt_bias = tensors
    u = _native.rows(u if u.dim() == 3 else u.flatten(2))
    dt, B, C = (_native.rows(x) for x in (dt, B, C))
    return [u, dt, A.contiguous(), B, C, _native.dense(D), _native.dense(dt_bias)]


def _fields(layout: list[Any], rest: tuple[Tensor | None, ...]) -> list[int]:
    """Return the C struct `ls_scan` from its first field up to `boundaries`."""
    u, dt, A, B, C, D, dt_bias = layout
    batch, n, n_paths, d_inner = dt.shape
    sizes = (batch, n, n_paths * d_inner, A.shape[2], n_paths, 1)
    operands = (t for x in (u, dt, None, B, C) for t in _native.row_fields(x))
    pointers = (_native.pointer(t) for t in (A, D, dt_bias, *rest))
    return [*sizes, *operands, B.stride(2), C.stride(2), *pointers]


def _forward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, paths, keep = inputs
    u, dt, A = tensors[:3]
    boundaries = u.new_zeros(_boundaries_shape(dt, A) if keep else (0,))
    _refuse(*tensors)
    layout, paths = _layout(tensors), paths.contiguous()
    y, final_state = u.new_empty(*dt.shape[:2], dt.shape[3]), u.new_empty(len(u), *A.shape)
    rest = (None, None, y, final_state, boundaries if keep else None)
    last = (paths.data_ptr(), int(u.dim() == 3), layout[1].stride(2))
    _native.call("ls_scan_forward", [*_fields(layout, rest), *[0] * 14, *last])
    return y, boundaries


def _backward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, paths, boundaries, dy = inputs
    _refuse(*tensors, dy)
    u, dt, A = tensors[:3]
    batch, n, n_paths, d_inner = dt.shape
    layout, paths, dy = _layout(tensors), paths.contiguous(), _native.rows(dy)
    du, ddt, dA, dB, dC, dD, ddt_bias = (
        dt.new_empty(0 if t is None else t.shape) for t in (dt, *tensors[1:])
    )
    workspace = u.new_empty(_native.scan_workspace(batch, n, n_paths * d_inner, A.shape[2], n_paths))
    fields = _fields(layout, (None, None, None, None, boundaries))
    out = (None, du, ddt, dA, dB, dC, dD, None, ddt_bias, None, workspace)
    last = (paths.data_ptr(), int(u.dim() == 3) + 2, layout[1].stride(2))
    pointers = [_native.pointer(t) for t in out]
    _native.call("ls_scan_backward", [*fields, *_native.row_fields(dy), *pointers, *last])
    return (du.sum(2) if u.dim() == 3 else du), ddt, dA, dB, dC, dD, ddt_bias


_lib.impl("check_paths", _checked, "CompositeExplicitAutograd")
_lib.impl("path_scan", _forward, "CompositeExplicitAutograd")
_lib.impl("path_scan_backward", _backward, "CompositeExplicitAutograd")
