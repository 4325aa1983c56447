"""Tensors from files that may be truncated, damaged or hostile.

The tensors are views of the mapped file: nothing is read until it is used, and no memory is taken twice.
"""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longscan.core.files import read_json
from longscan.errors import LongscanError

__all__ = ["check_widths", "dtype_name", "find_weights", "narrowed", "read_weights", "refuse", "some"]

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
MAX_HEADER = 100_000_000  # bytes; what the safetensors library itself accepts
MAX_PICKLE = 2**26  # bytes of an archive's data.pkl, some hundred a tensor
PLAIN = re.compile(  # what the pickle of dense tensors names
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|\w+Storage)"
    r"|torch\.storage\.(Untyped|Typed)Storage|torch\.(float|bfloat|int|uint)\d+|torch\.bool"
)
CHEAP = 2**20  # a width up to which a model of shapes takes no time, so that all that is wrong can be listed
AGAIN = "delete the file and fetch it again."


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
        shard = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
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
    for name, size in sizes.items():
        compared = type(size) is int and name.startswith(("d_", "n_", "vocab", "src_", "tgt_"))
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


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file after comparing its size with what its header promises."""
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


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file of torch.save, whose pickle may name nothing but tensors: no code runs."""
    with open(file, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise LongscanError(
                f"{file} is not an archive of torch.save: a bare pickle may contain code and is refused.\n"
                "Ask for the model as safetensors, or save it again with a recent torch."
            )
    _check_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is raised
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise LongscanError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise LongscanError(f"{file}: expected a dictionary of tensors by name, as state_dict() returns.")
    _check_sizes(file, tensors)
    return tensors


def _check_archive(file: Path) -> None:
    """Raise unless an archive of torch.save is uncompressed and names nothing but dense tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise LongscanError(f"{file} is compressed, which torch.save never does: {AGAIN}")
            pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                raise LongscanError(f"{file} has no small data.pkl, as torch.save writes it: {AGAIN}")
            operations = list(pickletools.genops(archive.read(pickles[0])))
    except LongscanError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise LongscanError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error
    for operation, argument, _ in operations:
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise LongscanError(f"{file} is of a pickle protocol that torch.save does not use: {AGAIN}")
        if operation.name == "GLOBAL" and not PLAIN.fullmatch(name := str(argument).replace(" ", ".")):
            if name.startswith("torch._utils._rebuild"):
                raise LongscanError(f"{file} holds tensors made by {name}: expected dense ones with numbers.")
            raise LongscanError(
                f"{file} contains code ({name}): refused, because loading would run it.\n"
                "Expected tensors only: ask for the model as safetensors."
            )


def _check_sizes(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise unless a file holds the numbers it describes; a head may share those of the embedding."""
    total = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        total += n_bytes
        hollow = tensor.layout != torch.strided or tensor.is_meta
        if hollow or n_bytes > tensor.untyped_storage().nbytes() or _overlaps(tensor):
            raise LongscanError(
                f"{file}: {name} {tuple(tensor.shape)} is not stored as a whole: expected dense tensors."
            )
    if total > 2 * (size := file.stat().st_size):
        raise LongscanError(
            f"{file} describes tensors of {total:,} bytes and has {size:,}: the file is not meant well."
        )


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements of a tensor may be one number, which training would change at once."""
    last = 0  # offset of the last element along the axes so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += stride * max(0, size - 1)
    return False
