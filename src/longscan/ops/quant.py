"""Quantised weights: bfloat16, int8 and int4 matrices, and their products with activations.

The dtype of the quantised matrix q determines the format, for a weight (n_out, n_in):

    bfloat16   q (n_out, n_in)           w = q
    int8       q (n_out, n_in)           w = q scale, scale (n_out, 1) float32, or (n_out, n_in / 32) float16
    uint8      q (n_out, n_in / 2)       w = (nibble - 8) scale, scale (n_out, n_in / 32) float16: 4 bits

Kernels that multiply integers round the activations of a row to b bits, in blocks of 256:

    x ~ s r,  s = max |x| / (2^(b - 1) - 1),  r = round(x / s)

The formats with float16 scales are GGUF's Q8_0 and Q4_0, up to the order of the nibbles. Here a block of 32
weights is eight little-endian 16-bit words, and bits 4k to 4k + 3 of word j are weight 8 k + j: a shift and a
mask turn a register of words into the operand of a 16-bit multiplication.
"""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from longscan.ops import _native
from longscan.ops._derivatives import composed
from longscan.ops.linear import linear, linear_ref

Kind: TypeAlias = Literal["bf16", "int8", "int4"]

BLOCK = 32  # weights that share a scale
ACTIVATIONS = 256  # of a row that share one
FEW_ROWS = 16  # up to here the kernel streams the weights once; above, they are unpacked for a product
LARGEST = 127.0
MAX_INT4 = 8 * 65504  # a scale is float16
# the scales that int4 tries per block, relative to the one that represents the extreme weight exactly
SHRINKS = (1.0, 0.94, 0.88, 0.82, 1.06)
STORED: dict[Kind, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}

# --- 1. the equations ---------------------------------------------------------------------------------------


def quantize(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Return a quantised matrix and its scales.

    Args:
        weight: (n_out, n_in) floating point, finite; for "int4" n_in is a multiple of 32.
        kind: the format. int8 has one scale per row; int4 one per 32 weights, the best of a few by squared
            error.

    Returns:
        q and scale, see the top of this file; scale is None for "bf16".

    Raises:
        ValueError: the matrix does not fit the format or is not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (n_out, n_in), got {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, got NaN or infinity")
    weight = weight.detach().float()
    if kind == "bf16":
        return weight.bfloat16(), None
    if kind == "int8":
        scale = weight.abs().amax(1, keepdim=True) / LARGEST
        return (weight / _nonzero(scale)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale
    if weight.shape[1] % BLOCK:
        raise ValueError(f"weight: int4 expects n_in in multiples of {BLOCK}, got {weight.shape[1]}")
    if weight.numel() and weight.abs().max() > MAX_INT4:
        raise ValueError(f"weight: int4 expects numbers up to {MAX_INT4:,}, got {weight.abs().max():.3g}")
    pieces = [_nibbles(piece) for piece in torch.split(weight, max(1, 2**20 // weight.shape[1]))]
    return pack_int4(torch.cat([p[0] for p in pieces])), torch.cat([p[1] for p in pieces])


def dequantize_ref(q: Tensor, scale: Tensor | None) -> Tensor:
    """Return the result of :func:`dequantize`, by the equations."""
    if scale is None:
        return q.float()
    values = unpack_int4(q).float() - 8 if q.dtype == torch.uint8 else q.float()
    weight: Tensor = values.view(len(q), scale.shape[1], -1) * scale.float().unsqueeze(2)
    return weight.flatten(1)


def quant_linear_ref(
    x: Tensor, q: Tensor, scale: Tensor | None, bias: Tensor | None = None, activation_bits: int = 16
) -> Tensor:
    """Return the result of :func:`quant_linear` with integer weights, by the equations.

    Args:
        x: (..., n_in), finite.
        q: see the top of this file.
        scale: likewise.
        bias: (n_out,).
        activation_bits: b.

    Returns:
        (..., n_out) in x's dtype.
    """
    blocks = torch.split(x, ACTIVATIONS, -1)
    scales = [block.abs().amax(-1, keepdim=True) / (2 ** (activation_bits - 1) - 1) for block in blocks]
    inverses = [1 / _nonzero(s) for s in scales]
    rounded = [  # multiplied exactly, as kernels with fused multiply-add do
        (block.double() * inverse.double()).round().to(x.dtype) * s
        for block, s, inverse in zip(blocks, scales, inverses, strict=True)
    ]
    return linear_ref(torch.cat(rounded, -1), dequantize_ref(q, scale).to(x.dtype), bias)


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return nibbles (n_out, n_in), 0 ... 15 around 8, and scales (n_out, n_blocks) of blocks of 32."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))  # with its sign: it becomes nibble 0
    best = torch.full_like(extreme, torch.inf)
    nibbles, scale = torch.zeros_like(blocks), torch.zeros_like(extreme)
    for shrink in SHRINKS:
        trial = (extreme * (shrink / -8)).half().float()
        rounded = (blocks / _nonzero(trial)).round_().clamp_(-8, 7)
        error = (blocks - rounded * trial).square().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        nibbles, scale = torch.where(better, rounded, nibbles), torch.where(better, trial, scale)
    return (nibbles + 8).flatten(1).to(torch.uint8), scale.squeeze(2).half()


def _nonzero(scale: Tensor) -> Tensor:
    """Return the scales with zeros replaced by 1; for a block of zeros any scale will do."""
    return torch.where(scale == 0, 1.0, scale)


def pack_int4(nibbles: Tensor) -> Tensor:
    """Return nibbles packed in pairs into bytes.

    Args:
        nibbles: (n_out, n_in) uint8 below 16, n_in a multiple of 32.

    Returns:
        (n_out, n_in / 2) uint8.
    """
    words = nibbles.reshape(
        len(nibbles), -1, 2, 2, 8
    )  # (n_out, n_blocks, byte of the word, half of the byte, word)
    pairs = words[:, :, :, 0] | (words[:, :, :, 1] << 4)  # (n_out, n_blocks, byte, word)
    return pairs.transpose(2, 3).flatten(1).contiguous()


def unpack_int4(q: Tensor) -> Tensor:
    """Return the nibbles of packed bytes, the inverse of `pack_int4`.

    Args:
        q: (n_out, n_in / 2) uint8.

    Returns:
        (n_out, n_in) uint8 below 16.
    """
    pairs = q.reshape(len(q), -1, 8, 2).transpose(2, 3)  # (n_out, n_blocks, byte, word)
    return torch.stack([pairs & 15, pairs >> 4], 3).flatten(1)


# --- 2. the ops ---------------------------------------------------------------------------------------------


def dequantize(q: Tensor, scale: Tensor | None) -> Tensor:
    """Return the float32 matrix of a quantised one.

    Args:
        q: see the top of this file.
        scale: likewise.

    Returns:
        (n_out, n_in) float32.
    """
    if _native.quantized(q, scale):
        return torch.ops.longscan.dequantize(q, scale)  # type: ignore[no-any-return]
    return dequantize_ref(q, scale)


def quant_linear(
    x: Tensor, q: Tensor, scale: Tensor | None, bias: Tensor | None = None, activation_bits: int = 16
) -> Tensor:
    """Return x dequantize(q, scale)^T + bias.

    Without gradients, native kernels multiply 8-bit and 4-bit weights as integers and round the activations;
    see the top of this file.

    Args:
        x: (..., n_in).
        q: the quantised matrix.
        scale: its scales, or None.
        bias: (n_out,).
        activation_bits: 16, or 8, which is faster for many rows on processors with VNNI
            or, on aarch64, dotprod.

    Returns:
        (..., n_out) in x's dtype.

    Raises:
        ValueError: activation_bits is something else.
    """
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits: expected 8 or 16, got {activation_bits!r}")
    rows = x.numel() // max(1, x.shape[-1])
    native = rows and _native.available(x, bias) and _native.quantized(q, scale)
    if native and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        integers = scale is not None and _native.multiplies_integers(activation_bits)
        if rows <= FEW_ROWS and not (integers and activation_bits == 8):
            return _native.multiply(x.contiguous(), q, scale, _native.dense(bias), rows)
        if integers:
            return _native.quant_gemm(x.contiguous(), q, scale, _native.dense(bias), rows, activation_bits)
    if x.requires_grad and torch.is_grad_enabled() and not composed():
        y: Tensor = _Frozen.apply(x, q, scale)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return linear(x, dequantize(q, scale).to(x.dtype), bias)


class _Frozen(torch.autograd.Function):
    """x dequantize(q, scale)^T, which retains q for the backward pass and not the float32 weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        return linear(x, dequantize(q, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        return linear(dy, dequantize(q, scale).to(dy.dtype).T), None, None


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("dequantize(Tensor q, Tensor? scale) -> Tensor")

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::dequantize", lib=_lib)
def _(q, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1] * (1 + (q.dtype == torch.uint8)), dtype=torch.float32)


# --- 4. gradients: a quantised matrix has none; x has those of linear ---------------------------------------
# --- 5. the implementation ----------------------------------------------------------------------------------


def _dequantize(q, scale):  # type: ignore[no-untyped-def]
    if not _native.quantized(q, scale):
        return dequantize_ref(q, scale)
    weight = q.new_empty(q.shape[0], q.shape[1] * (1 + (q.dtype == torch.uint8)), dtype=torch.float32)
    _native.dequantize(q, scale, weight)
    return weight


_lib.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
