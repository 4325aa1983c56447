"""Tensors out of files that may be cut short, damaged or hostile.

The tensors are views of the mapped file: nothing is read until it is used, and no memory is taken twice.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longscan.errors import LongscanError
from longscan.files import read_json

__all__ = ["find_weights", "read_weights", "some"]

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
MAX_HEADER = 100_000_000  # bytes; what the safetensors library itself accepts
AGAIN = "delete the file and fetch it again."


def find_weights(directory: Path) -> list[Path]:
    """List the files that hold the weights of a model directory.

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
    """Read the tensors of a model directory.

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
        shard = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        for name, tensor in shard.items():
            if name.endswith(buffers) and not tensor.is_floating_point():
                continue
            if name in tensors:
                raise LongscanError(f"{file}: {name} is in another shard too. Fetch all shards again.")
            stored = quantised and tensor.dtype in (torch.int8, torch.uint8)
            if not stored and (not tensor.is_floating_point() or tensor.itemsize < 2):
                raise LongscanError(
                    f"{file}: {name} is {_name(tensor.dtype)}, expected float32, float16 or bfloat16"
                    + (
                        ", int8 or uint8: the file is damaged."
                        if quantised
                        else ". Quantised weights are read if "
                        "`longscan quantize` wrote them: take the original model."
                    )
                )
            tensors[name] = tensor
    return tensors


def some(names: Iterable[str]) -> str:
    """Put names in a sentence, the first eight of them.

    Args:
        names: in any order.

    Returns:
        "a, b, c", "a, b, ... and 12 more" or "nothing".
    """
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


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


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file after comparing its size with what its header promises."""
    _check_size(file)
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LongscanError(f"{file} is damaged ({error}): {AGAIN}") from error


def _check_size(file: Path) -> None:
    """Tell a download that was cut from a damaged file: the first is common, and easily put right."""
    found = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise LongscanError(
                f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` beside it."
            )
        if found >= 8 and length > MAX_HEADER:
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


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file of torch.save, whose pickle may name nothing but tensors: no code runs."""
    with open(file, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise LongscanError(
                f"{file} is not an archive of torch.save: a bare pickle may contain code and is refused.\n"
                "Ask for the model as safetensors, or save it again with a recent torch."
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is raised
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can fail in any way
        if stranger := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise LongscanError(
                f"{file} contains code ({stranger[1]}): refused, because loading would run it.\n"
                "Expected tensors only: ask for the model as safetensors."
            ) from error
        raise LongscanError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise LongscanError(f"{file}: expected a dictionary of tensors by name, as state_dict() returns.")
    return tensors


def _name(dtype: torch.dtype) -> str:
    """Name a type as users know it."""
    return str(dtype).removeprefix("torch.")
