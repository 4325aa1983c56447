"""Tensors from files that may be truncated, damaged or hostile.

The tensors are views of the mapped file: nothing is read until it is used, and no memory is taken twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longscan.checkpoints.pickles import AGAIN, read_tensors
from longscan.core.files import read_json
from longscan.errors import LongscanError

__all__ = [
    "BARE_SUFFIXES",
    "check_widths",
    "dtype_name",
    "find_weights",
    "narrowed",
    "read_safetensors",
    "read_weights",
    "refuse",
    "some",
]

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
BARE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")  # of files that may come without a config.json
MAX_HEADER = 100_000_000  # bytes; what the safetensors library itself accepts
CHEAP = 2**20  # a width up to which a model of shapes takes no time, so that all that is wrong can be listed


def find_weights(directory: Path) -> list[Path]:
    """Return the files that hold the weights of a model directory.

    Args:
        directory: searched for safetensors first, for the pickles of torch only if there are none.

    Returns:
        One file or its shards; nothing if there are no weights.

    Raises:
        LongscanError: an index names files that are missing or outside the directory.
    """
    for name in (SAFETENSORS, PICKLE):
        if (directory / name).is_file():
            return [directory / name]
        if (index := directory / f"{name}.index.json").is_file():
            return _shards(index, Path(name).suffix)
    return []


def read_weights(
    directory: Path, quantised: bool = False, buffers: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a model directory.

    Args:
        directory: see `find_weights`.
        quantised: whether whole numbers of 8 bits may be among them.
        buffers: endings of names of whole numbers that were saved along and say nothing; they are left out.

    Returns:
        name -> tensor, mapped from the file, floating point unless quantised.

    Raises:
        LongscanError: there are no weights; a file is cut short, damaged or not what its name says; a pickle
            holds more than tensors; the numbers are of a type that is not expected.
    """
    files = find_weights(directory)
    if not files:
        found = some(path.name for path in directory.iterdir())
        raise LongscanError(f"no weights in {directory}: expected {SAFETENSORS} or {PICKLE}, found {found}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = read_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
        for name, tensor in shard.items():
            if name.endswith(buffers) and not tensor.is_floating_point():
                continue
            if name in tensors:
                raise LongscanError(f"{file}: {name} is in another shard too. Fetch all shards again.")
            stored = quantised and tensor.dtype in (torch.int8, torch.uint8)
            if not stored and (not tensor.is_floating_point() or tensor.itemsize < 2):
                raise LongscanError(
                    f"{file}: {name} is {dtype_name(tensor.dtype)}, expected float32, float16 or bfloat16"
                    + (
                        ", int8 or uint8: the file is damaged."
                        if quantised
                        else ". Quantised weights are read if "
                        "`longscan quantize` wrote them: take the original model."
                    )
                )
            tensors[name] = tensor
    return tensors


def check_widths(directory: Path, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse sizes that the tensors can't have, before a model of these sizes takes time and memory.

    Args:
        directory: where both are from, for the message.
        sizes: the fields of a Config; widths and counts among them are compared.
        tensors: name -> tensor.

    Raises:
        LongscanError: one is larger than all tensors together.
    """
    numbers = 2 * sum(tensor.numel() for tensor in tensors.values())  # four bits are two in a byte
    for name, value in sizes.items():
        all_of_them = value if isinstance(value, list) else [value]  # one a stage
        size = max((each for each in all_of_them if type(each) is int), default=0)
        compared = name.startswith(("d_", "n_", "vocab", "src_", "tgt_"))
        if compared and size > max(numbers, CHEAP):
            raise LongscanError(
                f"{directory}: the sizes in config.json are impossible ({name} = {size:,}, and all tensors "
                "together hold fewer numbers). Fetch both again."
            )


def some(names: Iterable[str]) -> str:
    """Return names as part of a sentence, the first eight of them.

    Args:
        names: in any order.

    Returns:
        "a, b, c", "a, b, ... and 12 more" or "nothing".
    """
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def refuse(heading: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise one error that lists all problems, if there are any.

    Args:
        heading: first line of the error.
        problems: what is wrong -> names.

    Raises:
        LongscanError: there is a name.
    """
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LongscanError("\n".join([heading, *lines]))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type as users know it.

    Args:
        dtype: any.
    """
    return str(dtype).removeprefix("torch.")


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """Return a tensor in another type, with no number lost to infinity.

    Args:
        name: of the tensor, for the message.
        tensor: any shape.
        dtype: of the result.
        copy: whether the result has memory of its own in any case.

    Raises:
        LongscanError: a finite number is infinite in that type.
    """
    cast = tensor.to(dtype, copy=copy)
    if dtype == torch.float16 != tensor.dtype and bool((cast.isinf() & tensor.isfinite()).any()):
        raise LongscanError(
            f"{name}: expected numbers up to 65,504, float16's largest, got more. Use bfloat16 or float32."
        )
    return cast


def _shards(index: Path, suffix: str) -> list[Path]:
    """Return the files an index names, all of them plain names beside it: a path could lead anywhere."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise LongscanError(f'{index}: expected {{"weight_map": {{tensor: file, ...}}}}.')
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if not re.fullmatch(rf"\w[\w.-]*{re.escape(suffix)}", name):
            raise LongscanError(f"{index}: expected plain names of {suffix} files beside it, got {name!r}.")
    files = [index.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise LongscanError(
            f"{index.parent}: {len(missing)} of {len(files)} shards missing: {some(missing)}. Fetch them."
        )
    return files


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, after comparing its size with what its header promises.

    Args:
        file: mapped.

    Raises:
        LongscanError: it is cut short, damaged or not what its name says.
    """
    _check_size(file)
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LongscanError(f"{file} is damaged ({error}): {AGAIN}") from error


def _check_size(file: Path) -> None:
    """Distinguish a truncated download from a damaged file: the first is common, and easily put right."""
    found = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise LongscanError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` beside it."
            )
        if found < 8:
            raise LongscanError(f"{file} is shorter than its header says ({found} bytes): {AGAIN}")
        if length > MAX_HEADER:
            raise LongscanError(f"{file} is not a safetensors file (impossible header length): {AGAIN}")
        header = stream.read(length)
    expected = 8 + length
    if found >= expected:
        try:
            entries = json.loads(header)
            expected += max(
                (entries[name]["data_offsets"][1] for name in entries if name != "__metadata__"), default=0
            )
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise LongscanError(f"{file} has a damaged header ({error}): {AGAIN}") from error
    if found < expected:
        raise LongscanError(
            f"{file} is shorter than its header says (expected {expected:,} bytes, found {found:,}).\n"
            f"The download was probably cut: {AGAIN}"
        )
    if found > expected:
        raise LongscanError(f"{file} has {found - expected:,} bytes more than its header says: {AGAIN}")
