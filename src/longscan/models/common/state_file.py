"""The file format of a state: safetensors, trusted only after everything in its header has been checked.

It holds one tensor per layer and field, such as `layers.3.ssm`, bit-exact in its own dtype, and `pending`,
the tokens of the text that are known but not consumed yet. The metadata name the model by class, number of
layers and fingerprint, since the values are valid for no other, and the position in the text.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from longscan.core.files import atomic_write
from longscan.errors import LongscanError

FORMAT, VERSION, PENDING = "longscan-state", "1", "pending"
MAX_HEADER = 4 << 20  # bytes; 64 layers need 10 kB
MAX_BYTES = 2**63 - 1
TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
AGAIN = "Save the state again."


class Identity(NamedTuple):
    """The model that a state belongs to.

    Attributes:
        model: the name of its class.
        layers: number of layers.
        fingerprint: computes the hash of its weights.
        like: name -> tensor (0, ...), a state of no rows.
        grows: the names of the tensors (rows, tokens, ...), which all have the same number of tokens.
    """

    model: str
    layers: int
    fingerprint: Callable[[], str]
    like: Mapping[str, Tensor]
    grows: frozenset[str] = frozenset()


class Entry(NamedTuple):
    """A tensor's entry in the header; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write(
    path: str | Path, owner: Identity, tensors: Mapping[str, Tensor], position: int, pending: Tensor
) -> None:
    """Write a state file atomically.

    Args:
        path: the file to create or replace.
        owner: the model.
        tensors: name -> (rows, ...).
        position: tokens consumed.
        pending: (n,) int64, tokens not consumed yet.

    Raises:
        OSError: the file cannot be written.
    """
    # a copy of each: safetensors refuses tensors that share memory, such as the views of `State.rows`
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "model": owner.model,
        "layers": str(owner.layers),
        "fingerprint": owner.fingerprint(),
        "position": str(position),
    }
    atomic_write(path, save({**copies, PENDING: pending}, facts))


def read(path: Path, owner: Identity) -> tuple[dict[str, Tensor], int, Tensor]:
    """Return the content of a state file, which may be untrusted.

    Args:
        path: the file.
        owner: the model that the state has to belong to.

    Returns:
        name -> (rows, ...), with the names, dtypes and shapes of the owner; the position; pending (n,) int64.

    Raises:
        LongscanError: it is not a state file, is damaged or truncated, or belongs to another model.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise LongscanError(f"no state file {path}: expected one that state.save wrote.")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        facts, entries = _header(path, stream, size)
        _check_owner(path, facts, entries, owner)
        position = str(facts.get("position"))
        if not re.fullmatch("[0-9]{1,18}", position):
            raise LongscanError(f"{path} is damaged: its position is {_short(position)}. {AGAIN}")
        if facts.get("fingerprint") != (expected := owner.fingerprint()):  # last: it reads all weights
            raise LongscanError(
                f"{path} is the state of other weights (fingerprint {_short(facts.get('fingerprint'))}, this "
                f"model has {expected!r}).\nUse the model that wrote it, in the same precision."
            )
        data = bytearray(stream.read())
    if len(data) != max(entry.end for entry in entries.values()):
        raise LongscanError(f"{path} changed while it was read. {AGAIN}")
    tensors = {name: _tensor(data, entry) for name, entry in entries.items()}
    return tensors, int(position), tensors.pop(PENDING)


def _header(path: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Read the header of a safetensors file and leave the stream at its end.

    Returns:
        The metadata, and the entries by name, which fill the rest of the file without gaps or overlaps.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > MAX_HEADER:
        raise LongscanError(f"{path} is not a state file: expected safetensors that state.save wrote.")
    if size < 8 + length:
        raise _cut(path, 8 + length, size)
    try:
        raw = json.loads(stream.read(length))
        facts = raw.pop("__metadata__", {})
        is_state = facts.get("format") == FORMAT
        entries = {name: _entry(value) for name, value in raw.items()} if is_state else {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise LongscanError(f"{path} is damaged: its header is malformed. {AGAIN}") from error
    if not is_state:
        raise LongscanError(f"{path} is safetensors, but not a state: expected a file that state.save wrote.")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise LongscanError(f"{path} is damaged: its tensors overlap or leave gaps. {AGAIN}")
        end = entry.end
    if size < 8 + length + end:
        raise _cut(path, 8 + length + end, size)
    if size > 8 + length + end:
        more = size - (8 + length + end)
        raise LongscanError(f"{path} is damaged: {more:,} bytes more than its header says. {AGAIN}")
    return facts, entries


def _entry(value: dict[str, Any]) -> Entry:
    """Return a tensor's entry in the header; raise ValueError if it contradicts itself."""
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and 0 <= number <= MAX_BYTES for number in (*shape, begin, end)):
        raise ValueError("a size or an offset is not a number of bytes")
    nbytes = TYPES[dtype].itemsize
    for number in shape:
        nbytes *= number
        if nbytes > MAX_BYTES:  # stop early: a header may list ten thousand axes
            raise ValueError("larger than any file")
    if len(value) != 3 or end - begin != nbytes:
        raise ValueError("shape and offsets contradict each other")
    return Entry(dtype, shape, begin, end)


def _check_owner(path: Path, facts: dict[str, Any], entries: dict[str, Entry], owner: Identity) -> None:
    """Raise LongscanError unless names, dtypes and shapes are those of a state of this model."""
    if facts.get("version") != VERSION:
        raise LongscanError(
            f"{path} is a state file of version {_short(facts.get('version'))}, expected {VERSION!r}. "
            "Read it with the longscan that wrote it."
        )
    got = (facts.get("model"), facts.get("layers"))
    if got != (owner.model, str(owner.layers)):
        raise LongscanError(
            f"{path} is the state of another model: expected {owner.model} of {owner.layers} layers, "
            f"got {_short(got[0])} of {_short(got[1])}. Use the model that wrote it."
        )
    expected = {*owner.like, PENDING}
    if wrong := sorted(expected ^ entries.keys()):
        what = "is missing" if wrong[0] in expected else "is unexpected"
        raise LongscanError(f"{path} is damaged: {_short(wrong[0])} {what}. {AGAIN}")
    first = entries[min(owner.grows, default=next(iter(owner.like)))].shape
    rows, tokens = next(iter(first), 0), first[1] if len(first) > 1 else 0
    for name, like in owner.like.items():
        entry, rest = entries[name], list(like.shape[1:])
        grows = name in owner.grows
        shape = (rows, tokens, *rest[1:]) if grows else (rows, *rest)
        if not rows or entry.shape != shape or TYPES[entry.dtype] != like.dtype:
            kind = next(key for key, dtype in TYPES.items() if dtype == like.dtype)
            sizes = ["rows", *(["tokens"] if grows else []), *map(str, rest[grows:])]
            raise LongscanError(
                f"{path} is the state of another model: expected {name} to be {kind} of shape "
                f"({', '.join(sizes)}), got {entry.dtype} {_short(entry.shape)}. "
                "Use the model that wrote it."
            )
    pending = entries[PENDING]
    if pending.dtype != "I64" or len(pending.shape) != 1 or (rows > 1 and pending.shape[0]):
        raise LongscanError(f"{path} is damaged: {PENDING} is not a list of the tokens of one row. {AGAIN}")


def _tensor(data: bytearray, entry: Entry) -> Tensor:
    """Return a tensor that views bytes of the file."""
    dtype = TYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    part = memoryview(data)[entry.begin : entry.end]
    return torch.frombuffer(part, dtype=dtype).view(entry.shape)


def _cut(path: Path, expected: int, got: int) -> LongscanError:
    """Return the error about a truncated file."""
    return LongscanError(
        f"{path} is shorter than its header says (expected {expected:,} bytes, got {got:,}). {AGAIN}"
    )


def _short(value: object) -> str:
    """Return the repr of a value from a file, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
