"""Products with a Cauchy matrix on the imaginary axis, the core of S4's kernel.

    out_k = sum_n v_n / (i t_k - lam_n) + conj(v_n) / (i t_k - conj(lam_n))

Gu et al., 2021 (arXiv 2111.00396), section 3.2: with i t_k where the bilinear transform puts the roots of
unity and lam = dt Lambda, four such sums make a kernel.
"""

from typing import Any

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops._derivatives import composed, register_second

BLOCK = 1 << 22  # complex numbers held at a time

# --- 1. the equation ----------------------------------------------------------------------------------------


def cauchy_ref(v: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """Return the result of :func:`cauchy`, computed with the full (channels, n, k) matrix in complex128."""
    v, points = v.to(torch.complex128), 1j * t
    matrix, conjugate = (1 / (points - x[..., None]) for x in (lam, lam.conj()))
    return torch.einsum("jcn,cnk->jck", v, matrix) + torch.einsum("jcn,cnk->jck", v.conj(), conjugate)


# --- 2. the op ----------------------------------------------------------------------------------------------


def cauchy(v: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """Return sums over poles and their conjugates, for several numerators over the same poles in one pass.

    Args:
        v: (n_numerators, channels, n) complex64 or complex128.
        t: (k,) float64 points on the imaginary axis; without gradient.
        lam: (channels, n) complex128 poles, off that axis. They are always complex128, because near a pole
            the difference of two large numbers matters.

    Returns:
        (n_numerators, channels, k) of v's type.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes do not.
    """
    if v.dim() != 3 or t.dim() != 1 or v.shape[1:] != lam.shape or 0 in (*v.shape, *t.shape):
        shapes = f"got {tuple(v.shape)}, {tuple(t.shape)}, {tuple(lam.shape)}"
        raise ValueError(f"v, t, lam: expected (n_numerators, channels, n), (k,), (channels, n), {shapes}")
    if not v.is_complex() or t.dtype != torch.float64 or lam.dtype != torch.complex128:
        types = f"got {v.dtype}, {t.dtype}, {lam.dtype}"
        raise TypeError(f"v, t, lam: expected complex, float64, complex128, {types}")
    add: Any = _forward_torch if composed() else torch.ops.longscan.cauchy
    out: Tensor = add(v, t, lam)
    return out


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("cauchy(Tensor v, Tensor t, Tensor lam) -> Tensor")
_lib.define("cauchy_backward(Tensor v, Tensor t, Tensor lam, Tensor dout) -> (Tensor dv, Tensor dlam)")

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::cauchy", lib=_lib)
def _(v, t, lam):  # type: ignore[no-untyped-def]
    return v.new_empty(*v.shape[:2], len(t))


@torch.library.register_fake("longscan::cauchy_backward", lib=_lib)
def _(v, t, lam, dout):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), lam.new_empty(lam.shape)


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout):  # type: ignore[no-untyped-def]
    dv, dlam = torch.ops.longscan.cauchy_backward(*ctx.saved_tensors, dout)
    return dv, None, dlam


def _composite(v: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor]:
    return (_forward_torch(v, t, lam),)


torch.library.register_autograd("longscan::cauchy", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::cauchy_backward", _lib, _composite, n_inputs=3, indices=(0, 2))

# --- 5. the native kernel -----------------------------------------------------------------------------------

MAX_NATIVE_NUMERATORS = 4


def _use_native(v: Tensor, t: Tensor, lam: Tensor) -> bool:
    fits = v.dtype == torch.complex64 and len(v) <= MAX_NATIVE_NUMERATORS
    return fits and _native.available(v.real) and {t.device, lam.device} == {v.device}


class _Pairs:
    """A pole and its conjugate over one denominator: (i t alpha - beta) / ((i t - lam)(i t - conj(lam)))."""

    def __init__(self, v: Tensor, t: Tensor, lam: Tensor) -> None:
        self.t, self.lam = t.float().contiguous(), lam.resolve_conj().contiguous()
        self.t_low = (t - self.t).float()  # near a pole float32 alone loses all digits of the difference
        self.alpha = (2 * v.real).contiguous()
        self.beta = (2 * (v * lam.conj_physical()).real).float().contiguous()  # product in complex128
        self.sizes = [*v.shape, len(t)]

    def call(self, function: str, *rest: Tensor | None) -> None:
        """Run a kernel on the C struct ``ls_cauchy``."""
        operands = (self.t, self.t_low, self.lam, self.alpha, self.beta, *rest)
        _native.call(function, self.sizes + [_native.pointer(tensor) for tensor in operands])


def _blocks(t: Tensor, lam: Tensor) -> list[slice]:
    """Return slices of the points for which the matrix is small."""
    width = max(1, BLOCK // lam.numel())
    return [slice(begin, begin + width) for begin in range(0, len(t), width)]


def _matrices(v: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / (i t - lam) and 1 / (i t - conj(lam)), (channels, n, k) in v's dtype.

    The differences are computed in float64.
    """
    real, imag = (-lam.real)[..., None].expand(*lam.shape, len(t)), lam.imag[..., None]
    matrix, conjugate = (torch.complex(real, difference) for difference in (t - imag, t + imag))
    return matrix.to(v.dtype).reciprocal(), conjugate.to(v.dtype).reciprocal()


def _forward(v: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    if _use_native(v, t, lam):
        out = v.new_empty(*v.shape[:2], len(t))
        _Pairs(v, t, lam).call("ls_cauchy_forward", out, None, None, None, None)
        return out
    return _forward_torch(v, t, lam)


def _forward_torch(v: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    """Run the op on any device and in complex128; differentiable any number of times."""
    rows, outs = v.transpose(0, 1), []  # (channels, n_numerators, n)
    for block in _blocks(t, lam):
        matrix, twin = _matrices(v, t[block], lam)
        outs.append((rows @ matrix + rows.conj_physical() @ twin).transpose(0, 1))
    return torch.cat(outs, 2)


def _backward(v: Tensor, t: Tensor, lam: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    if _use_native(v, t, lam):
        pairs, dout = _Pairs(v, t, lam), dout.resolve_conj().contiguous()
        dalpha, dbeta, through = (torch.empty_like(x) for x in (pairs.alpha, pairs.beta, pairs.lam))
        pairs.call("ls_cauchy_backward", None, dout, dalpha, dbeta, through)
        # alpha = 2 Re v, beta = 2 Re(v conj(lam))
        return (2 * (dalpha + dbeta * lam)).to(v.dtype), through + 2 * (dbeta * v).sum(0)
    dv, dlam = torch.zeros_like(v), torch.zeros_like(lam)
    for block in _blocks(t, lam):
        matrix, twin = _matrices(v, t[block], lam)
        g = dout[..., block].transpose(0, 1)  # (channels, n_numerators, k)
        dv += (g @ matrix.conj_physical().mT + g.conj_physical() @ twin.mT).transpose(0, 1)
        pair = g @ matrix.square().conj_physical().mT, g.conj_physical() @ twin.square().mT
        dlam += (v.conj_physical() * (pair[0] + pair[1]).transpose(0, 1)).sum(0)
    return dv, dlam


_lib.impl("cauchy", _forward, "CompositeExplicitAutograd")
_lib.impl("cauchy_backward", _backward, "CompositeExplicitAutograd")
