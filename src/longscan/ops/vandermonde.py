"""The kernel of a diagonal state space: a sum of decaying oscillations, at every step.

    K_l = 2 Re sum_n C_n exp(z_n)^l,    l = 0 ... length - 1

A product with a Vandermonde matrix. Gupta et al., 2022 (arXiv 2203.14343), and Gu et al., 2022 (arXiv
2206.11893), section 3.1.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _native
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed, register_second

# --- 1. the equation ----------------------------------------------------------------------------------------


def vandermonde_ref(C: Tensor, z: Tensor, length: int) -> Tensor:
    """Return the result of :func:`vandermonde`, computed with the full (channels, n, length) matrix."""
    powers = (z[..., None] * torch.arange(length, device=z.device)).exp()
    return 2 * torch.einsum("...cn,cnl->...cl", C, powers).real


# --- 2. the op ----------------------------------------------------------------------------------------------


def vandermonde(C: Tensor, z: Tensor, length: int) -> Tensor:
    """Return the kernels, computed in O(channels (n sqrt(length) + length)) memory.

    Args:
        C: (..., channels, n) complex, one of each conjugate pair.
        z: (channels, n) complex, logarithms of the ratio between two steps.
        length: steps.

    Returns:
        (..., channels, length) real.

    Raises:
        ValueError: shapes do not fit, or length is less than 1.
        TypeError: C or z is not complex.
    """
    for name, tensor in (("C", C), ("z", z)):
        if not tensor.is_complex():
            raise TypeError(f"{name}: expected complex numbers, got {tensor.dtype}")
    if z.dim() != 2 or C.shape[-2:] != z.shape:
        shapes = f"got C {tuple(C.shape)}, z {tuple(z.shape)}"
        raise ValueError(f"C, z: expected (..., channels, n) and (channels, n), {shapes}")
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    lead = C.shape[:-2]
    make: Any = _forward_torch if composed() else torch.ops.longscan.vandermonde
    K: Tensor = make(C.reshape(-1, *z.shape), z.to(torch.complex128), length)
    return K.view(*lead, z.shape[0], length)


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("vandermonde(Tensor C, Tensor z, SymInt length) -> Tensor")
_lib.define("vandermonde_backward(Tensor C, Tensor z, SymInt length, Tensor dK) -> (Tensor dC, Tensor dz)")

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::vandermonde", lib=_lib)
def _(C, z, length):  # type: ignore[no-untyped-def]
    return C.real.new_empty(*C.shape[:2], length)


@torch.library.register_fake("longscan::vandermonde_backward", lib=_lib)
def _(C, z, length, dK):  # type: ignore[no-untyped-def]
    return C.new_empty(C.shape), z.new_empty(z.shape)


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dK):  # type: ignore[no-untyped-def]
    return *torch.ops.longscan.vandermonde_backward(*ctx.saved_tensors, ctx.length, dK), None


def _composite(C: Tensor, z: Tensor, length: int) -> tuple[Tensor]:
    return (_forward_torch(C, z, length),)


torch.library.register_autograd("longscan::vandermonde", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::vandermonde_backward", _lib, _composite, n_inputs=3)

# --- 5. the native kernel -----------------------------------------------------------------------------------


def _use_native(C: Tensor, z: Tensor) -> bool:
    return C.dtype == torch.complex64 and _native.available(C.real) and z.device == C.device


def _fields(C: Tensor, a: Tensor, length: int) -> list[int]:
    """Return the C struct ``ls_vandermonde`` from its first field up to ``c``."""
    return [C.shape[0] * C.shape[1], *a.shape, length, a.data_ptr(), C.data_ptr()]


def _tables(C: Tensor, z: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the powers by a S and by b, and the steps a S, for l = a S + b with S near sqrt(length).

    Returns:
        far: (channels, a, n) in C's dtype, exp(z a S); the exponents are complex128, or rounding would lose
            the phases of fast oscillations at the end of a long kernel.
        near: (channels, b, n) complex, exp(z b).
        steps: (a,) a S.
    """
    width = math.isqrt(length - 1) + 1
    steps = torch.arange(0, length, width, device=z.device)
    exponents = (steps, torch.arange(width, device=z.device))
    far, near = ((z[:, None] * k[:, None]).exp().to(C.dtype) for k in exponents)
    return far, near, steps


def _parts(x: Tensor) -> Tensor:
    """Return x (..., n) complex as (..., 2 n) real."""
    return torch.view_as_real(x).flatten(-2)


def _forward(C: Tensor, z: Tensor, length: int) -> Tensor:
    if _use_native(C, z):
        a, C, K = z.exp(), C.resolve_conj().contiguous(), C.real.new_empty(*C.shape[:2], length)
        _native.call("ls_vandermonde_forward", [*_fields(C, a, length), K.data_ptr(), 0, 0])
        return K
    return _forward_torch(C, z, length)


@exact
def _forward_torch(C: Tensor, z: Tensor, length: int) -> Tensor:
    """Run the op on any device and in float64; differentiable any number of times."""
    far, near, _ = _tables(C, z, length)
    rows = (2 * C[:, :, None] * far).conj_physical()  # (m, channels, a, n)
    K = torch.einsum("mcan,cbn->mcab", _parts(rows), _parts(near))
    return K.flatten(2)[..., :length].contiguous()


@exact
def _backward(C: Tensor, z: Tensor, length: int, dK: Tensor) -> tuple[Tensor, Tensor]:
    if _use_native(C, z):
        a, C, dK = z.exp(), C.resolve_conj().contiguous(), dK.contiguous()
        sums = z.new_empty(*C.shape, 2)  # of dK exp(z l) and of l dK exp(z l)
        _native.call("ls_vandermonde_backward", [*_fields(C, a, length), 0, dK.data_ptr(), sums.data_ptr()])
        plain, slope = sums.unbind(-1)
        return (2 * plain.conj_physical()).to(C.dtype), (2 * C * slope).sum(0).conj_physical()
    far, near, steps = _tables(C, z, length)
    width = near.shape[1]
    dK = F.pad(dK, (0, len(steps) * width - length)).view(*dK.shape[:2], len(steps), width)
    # sums over b of dK exp(z b) and of b dK exp(z b)
    later = torch.arange(width, device=z.device)[:, None] * near
    both = (torch.einsum("mcab,cbn->mcan", dK, _parts(table)) for table in (near, later))
    plain, slope = (torch.view_as_complex(x.reshape(*x.shape[:3], -1, 2)) for x in both)
    dC = 2 * (far * plain).sum(2).conj_physical()
    dz = 2 * (C * (far * (steps[:, None] * plain + slope)).sum(2)).sum(0).conj_physical()
    return dC, dz.to(z.dtype)


_lib.impl("vandermonde", _forward, "CompositeExplicitAutograd")
_lib.impl("vandermonde_backward", _backward, "CompositeExplicitAutograd")
