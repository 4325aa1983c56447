"""The numbers of a GGUF file: its types of tensors, decoded and encoded.

Q8_0 and Q4_0 are formats of ops/quant.py but for the order of the bytes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longscan import ops
from longscan.checkpoints.gguf.parser import TensorInfo
from longscan.checkpoints.weights import narrowed
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models.common.quantization import DELICATE
from longscan.ops.quant import BLOCK, MAX_INT4

__all__ = [
    "FILE_TYPES",
    "PLAIN",
    "READ",
    "STORED",
    "GGUFType",
    "Shape",
    "decode",
    "encode",
    "is_matrix",
    "package",
    "stored",
    "type_of",
]

GGUFType: TypeAlias = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
Shape: TypeAlias = "tuple[int, ...]"

FILE_TYPES: dict[GGUFType, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # of llama.cpp
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = {"Q8_0": 34, "Q4_0": 18}  # bytes of a block: the types that are formats of ops/quant.py too
MAX_Q8 = 127 * 65504  # a scale is float16
STORED = (*BLOCKS, "BF16")  # matrices of these types stay as they are
READ = (
    *PLAIN,
    *BLOCKS,
    # dequantised by the gguf package
    *("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
)
LOW = 0x0F0F0F0F0F0F0F0F  # the lower halves of 8 bytes
INSTALL = "pip install --upgrade 'longscan[gguf]'"


def stored(raw: Tensor, kind: str, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Return a matrix in the order of ops/quant.py: q and scale.

    Args:
        raw: (n_bytes,) uint8 of the file.
        kind: its type, one of STORED.
        shape: (n_out, n_in).
    """
    if kind == "BF16":
        return raw.view(torch.bfloat16).view(shape), None
    n_out, n_in = shape
    blocks = raw.view(-1, BLOCKS[kind])
    scale = blocks[:, :2].contiguous().view(torch.float16).view(n_out, n_in // BLOCK)
    if kind == "Q8_0":
        if n_in == BLOCK:  # one scale a row, which is float32 here
            scale = scale.float()
        return blocks[:, 2:].contiguous().view(torch.int8).view(shape), scale
    # byte j is weight j and, in its upper half, weight j + 16; ours see ops/quant.py. Eight bytes at a time:
    first, second = blocks[:, 2:].contiguous().view(torch.int64).T.contiguous()
    even, odd = (first & LOW) | ((second & LOW) << 4), ((first >> 4) & LOW) | (second & ~LOW)
    pairs = even.view(torch.uint8).short() | (odd.view(torch.uint8).short() << 8)
    return pairs.view(torch.uint8).view(n_out, n_in // 2), scale


def decode(raw: Tensor, info: TensorInfo, shape: Shape) -> Tensor:
    """Return a tensor dequantised to float32.

    Args:
        raw: (n_bytes,) uint8 of the file.
        info: of the tensor, or of one of which it is a part.
        shape: of the tensor.

    Returns:
        (n,) float32.

    Raises:
        LongscanError: the gguf package is missing, or older than the type.
    """
    if info.type in PLAIN:
        return raw.view(PLAIN[info.type]).float()
    if info.type in BLOCKS:
        return ops.dequantize(*stored(raw, info.type, (raw.numel() // BLOCKS[info.type], BLOCK)))
    gguf = package()
    rows = raw.numpy().reshape(math.prod(shape[:-1]), -1)
    try:
        with np.errstate(all="ignore"):  # what a damaged block holds is numbers nevertheless
            return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[info.type]))
    except (KeyError, NotImplementedError) as error:
        raise LongscanError(f"{info.type} is newer than this gguf package: {INSTALL}") from error


def type_of(name: str, shape: Shape, kind: GGUFType) -> GGUFType:
    """Return the type of one tensor in a file; see `save_gguf`.

    Args:
        name: ours.
        shape: of the tensor.
        kind: of the matrices.
    """
    if not is_matrix(name, shape) or (kind in BLOCKS and shape[1] % BLOCK):
        return "F32"
    return "Q8_0" if kind == "Q4_0" and name.split(".")[-2] in DELICATE else kind


def is_matrix(name: str, shape: Shape) -> bool:
    """Return whether a parameter is one that is stored in fewer bits.

    Args:
        name: ours.
        shape: of the parameter.
    """
    return (
        name.endswith(".weight") and len(shape) == 2 and not name.endswith(("conv1d.weight", "router.weight"))
    )


def encode(name: str, tensor: Tensor, scale: Tensor | None, kind: GGUFType) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor.

    Args:
        name: ours.
        tensor: plain or stored.
        scale: of a stored one.
        kind: its type in the file.

    Raises:
        LongscanError: its numbers are not finite.
    """
    tensor, scale = tensor.detach().cpu(), None if scale is None else scale.cpu()
    values = tensor.float() if scale is None else ops.dequantize(tensor, scale)
    if name.endswith("A_log"):
        values = values.double().exp().neg().float()
    if not values.isfinite().all():
        raise LongscanError(f"{name}: expected finite numbers, got NaN or infinity: it can't be {kind}.")
    if kind in BLOCKS and values.abs().max() > (largest := MAX_INT4 if kind == "Q4_0" else MAX_Q8):
        raise LongscanError(
            f"{name}: expected numbers up to {largest:,} in {kind}, got {values.abs().max():.3g}. Use F32."
        )
    if kind in BLOCKS and (blocks := _blocks(tensor, scale, kind)) is not None:
        return blocks.numpy()
    if kind in PLAIN:
        return narrowed(name, values, PLAIN[kind]).contiguous().flatten().view(torch.uint8).numpy()
    try:
        if kind == "Q8_0":
            gguf = package()
            quantised: npt.NDArray[np.uint8] = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
            return quantised
        q, scale = ops.quantize(values, "int4")
    except ValueError as error:
        raise LongscanError(f"{name}: {error}") from error
    blocks = _blocks(q, scale, kind)
    assert blocks is not None
    return blocks.numpy()


def _blocks(q: Tensor, scale: Tensor | None, kind: GGUFType) -> Tensor | None:
    """Return a stored matrix in GGUF's order, if that loses nothing but a little of the scale of a row."""
    if scale is None or (kind == "Q4_0" and q.dtype != torch.uint8):
        return None
    if kind == "Q4_0":
        pairs = q.view(-1, 8, 2)
        even, odd = pairs[:, :, 0], pairs[:, :, 1]
        numbers = torch.cat([(even & 15) | ((odd & 15) << 4), (even >> 4) | (odd & 240)], 1)
    else:
        numbers = (ops.unpack_int4(q) - 8 if q.dtype == torch.uint8 else q.view(torch.uint8)).view(-1, BLOCK)
    per_row = len(numbers) // len(scale)  # the scale of a row is that of each of its blocks
    scales = scale.half().expand(-1, per_row).contiguous().view(-1, 1)
    return torch.cat([scales.view(torch.uint8), numbers], 1)


def package() -> Any:
    """Return the gguf package, which writes files and knows the many quantised types.

    Raises:
        LongscanError: it is missing.
    """
    return require("gguf", "GGUF files of this kind")
