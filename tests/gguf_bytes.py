"""GGUF files written literally, as the format's description has them: valid ones, and any others."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def f32(value: float) -> bytes:
    return struct.pack("<If", F32, value)


def true() -> bytes:
    return struct.pack("<IB", BOOL, 1)


def string(value: str) -> bytes:
    return struct.pack("<I", STRING) + text(value)


def strings(values: Sequence[str], count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, STRING, len(values) if count is None else count)
    return head + b"".join(map(text, values))


def numbers(values: Sequence[int], kind: int = 5, code: str = "i") -> bytes:
    return struct.pack(f"<IIQ{len(values)}{code}", ARRAY, kind, len(values), *values)


@dataclass(frozen=True)
class Entry:
    """One tensor: the dimensions as in the file, the fastest first."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int = 0
    offset: int | None = None  # after the one before if None
    data: bytes = b""

    def described(self, offset: int) -> bytes:
        head = text(self.name) + struct.pack("<I", len(self.dims))
        return head + struct.pack(f"<{len(self.dims)}QIQ", *self.dims, self.kind, offset)


def file(
    metadata: Sequence[tuple[str | bytes, bytes]],
    entries: Sequence[Entry],
    *,
    alignment: int = 32,
    head: bytes | None = None,
) -> bytes:
    """Put a file together; `head` replaces magic, version and counts."""
    infos, body = b"", b""
    for entry in entries:
        infos += entry.described(len(body) if entry.offset is None else entry.offset)
        body += entry.data + bytes(-len(entry.data) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)) if head is None else head
    header = head + b"".join(text(key) + value for key, value in metadata) + infos
    return header + bytes(-len(header) % alignment) + body


TOKENS = ["<|endoftext|>", *"abcd", "ab", "abc", "Ġ", "[PAD8]", "[PAD9]"]
METADATA: dict[str, bytes] = {
    "general.architecture": string("mamba"),
    "mamba.embedding_length": u32(32),
    "mamba.block_count": u32(1),
    "mamba.ssm.conv_kernel": u32(4),
    "mamba.ssm.inner_size": u32(64),
    "mamba.ssm.state_size": u32(2),
    "mamba.ssm.time_step_rank": u32(2),
    "mamba.attention.layer_norm_rms_epsilon": f32(1e-5),
    "tokenizer.ggml.model": string("gpt2"),
    "tokenizer.ggml.pre": string("olmo"),
    "tokenizer.ggml.tokens": strings(TOKENS),
    "tokenizer.ggml.token_type": numbers([3, *[1] * 7, 5, 5]),
    "tokenizer.ggml.merges": strings(["a b", "ab c"]),
    "tokenizer.ggml.eos_token_id": u32(0),
}
BLOCKS = {
    2: (32, 18),
    8: (32, 34),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
}  # Q4_0 Q8_0 Q4_K Q5_K Q6_K


def entries(width: int = 32, matrix: int = 0, seed: int = 0) -> list[Entry]:
    """The tensors of a Mamba of one layer."""
    dims = {
        "token_embd.weight": (width, len(TOKENS)),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (width, 4 * width),
        "blk.0.ssm_conv1d.weight": (4, 2 * width),
        "blk.0.ssm_conv1d.bias": (2 * width,),
        "blk.0.ssm_x.weight": (2 * width, 6),
        "blk.0.ssm_dt.weight": (2, 2 * width),
        "blk.0.ssm_dt.bias": (2 * width,),
        "blk.0.ssm_a": (2, 2 * width),
        "blk.0.ssm_d": (2 * width,),
        "blk.0.ssm_out.weight": (2 * width, width),
    }
    rng = random.Random(seed)
    return [_entry(name, size, matrix, rng) for name, size in dims.items()]


def _entry(name: str, dims: tuple[int, ...], matrix: int, rng: random.Random) -> Entry:
    count = dims[0] * (dims[1] if len(dims) > 1 else 1)
    if matrix and name.endswith(("token_embd.weight", "ssm_in.weight", "ssm_x.weight", "ssm_out.weight")):
        block, size = BLOCKS[matrix]
        return Entry(
            name, dims, matrix, data=b"".join(_block(matrix, size, rng) for _ in range(count // block))
        )
    values = [rng.uniform(-0.5, 0.5) for _ in range(count)]
    if name.endswith("ssm_a"):
        values = [-1 - abs(value) for value in values]
    return Entry(name, dims, data=struct.pack(f"<{count}f", *values))


def _block(kind: int, size: int, rng: random.Random) -> bytes:
    """Random bits under sensible scales, which stand last in Q6_K and first in the others."""
    scale = struct.pack("<e", rng.uniform(0.001, 0.01))
    if kind == 14:
        return rng.randbytes(size - 2) + scale
    n_scales = 2 if kind in (12, 13) else 1
    return scale * n_scales + rng.randbytes(size - 2 * n_scales)


def mamba(*, width: int = 32, matrix: int = 0, drop: str = "", **changes: Any) -> bytes:
    """A valid file; `changes` replace metadata by the last word of its key, ... removes it."""
    sizes = {"mamba.embedding_length": u32(width), "mamba.ssm.inner_size": u32(2 * width)}
    metadata = {**METADATA, **sizes}
    for word, value in changes.items():
        key = next((key for key in metadata if key.rpartition(".")[2] == word), word.replace("__", "."))
        metadata[key] = value
    kept = [(key, value) for key, value in metadata.items() if value is not ...]
    return file(kept, [entry for entry in entries(width, matrix) if entry.name != drop])


def mamba2_values(seed: int = 0) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    """The tensors of a Mamba-2 of one layer, 6 wide, 4 heads of 3 and 2 groups of 2: dimensions, values."""
    dims = {
        "token_embd.weight": (6, len(TOKENS)),
        "output_norm.weight": (6,),
        "blk.0.attn_norm.weight": (6,),
        "blk.0.ssm_in.weight": (6, 12 + 12 + 4 + 4 + 4),
        "blk.0.ssm_conv1d.weight": (3, 20),
        "blk.0.ssm_conv1d.bias": (20,),
        "blk.0.ssm_dt.bias": (4,),
        "blk.0.ssm_a": (1, 4),
        "blk.0.ssm_d": (1, 4),
        "blk.0.ssm_norm.weight": (6, 2),
        "blk.0.ssm_out.weight": (12, 6),
    }
    rng = random.Random(seed)
    sign = {"blk.0.ssm_a": -1.0}
    return {
        name: (size, [sign.get(name, 1.0) * rng.uniform(0.1, 0.9) for _ in range(math.prod(size))])
        for name, size in dims.items()
    }


def mamba2(drop: str = "", **changes: Any) -> bytes:
    """A valid file of `mamba2_values`, with the changes that `mamba` takes."""
    metadata = {key.replace("mamba.", "mamba2."): value for key, value in METADATA.items()}
    sizes = {"embedding_length": 6, "ssm.conv_kernel": 3, "ssm.inner_size": 12, "ssm.time_step_rank": 4}
    metadata |= {f"mamba2.{key}": u32(size) for key, size in sizes.items()}
    metadata |= {"general.architecture": string("mamba2"), "mamba2.ssm.group_count": u32(2)}
    for word, value in changes.items():
        metadata[next(key for key in metadata if key.rpartition(".")[2] == word)] = value
    entries = [
        Entry(name, dims, data=struct.pack(f"<{len(values)}f", *values))
        for name, (dims, values) in mamba2_values().items()
        if name != drop
    ]
    return file([(key, value) for key, value in metadata.items() if value is not ...], entries)


def with_entry(change: str, **fields: Any) -> bytes:
    """A valid file but for the fields of one tensor."""
    changed = [replace(e, **fields) if e.name == change else e for e in entries()]
    return file(list(METADATA.items()), changed)
