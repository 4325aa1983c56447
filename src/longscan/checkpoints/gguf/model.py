"""GGUF files, those of llama.cpp: a Mamba, Mamba-2 or hybrid is read from one and saved as one.

Reading keeps what the file has: Q8_0 and Q4_0 are formats of ops/quant.py but for the order of the bytes, and
become those; BF16 stays; all else is dequantised to float32. Writing is exact where the format is: a model
that holds such matrices gets them into the file bit for bit.

Two things differ in meaning, not only in name. The file has A where the model has A_log, A = -exp(A_log), so
A_log comes back within a rounding of A. And llama.cpp computes only what the published models are, see the
file of each architecture; the residual stream is float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longscan.checkpoints.gguf.base import Architecture, Slot
from longscan.checkpoints.gguf.falcon_h1 import FALCON_H1
from longscan.checkpoints.gguf.granite import GRANITE
from longscan.checkpoints.gguf.jamba import JAMBA
from longscan.checkpoints.gguf.mamba import MAMBA
from longscan.checkpoints.gguf.mamba2 import MAMBA2
from longscan.checkpoints.gguf.nemotron_h import NEMOTRON_H, NEMOTRON_H_MOE
from longscan.checkpoints.gguf.parser import AGAIN, Header, TensorInfo, check, short
from longscan.checkpoints.gguf.tensors import (
    FILE_TYPES,
    PLAIN,
    READ,
    STORED,
    GGUFType,
    Shape,
    decode,
    encode,
    is_matrix,
    package,
    stored,
    type_of,
)
from longscan.checkpoints.gguf.tokenizer import describe_tokenizer, read_tokenizer
from longscan.checkpoints.source import Source, Weights, check_ids
from longscan.checkpoints.weights import refuse
from longscan.core.config import Config
from longscan.core.files import atomic_file
from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel, LanguageModelConfig, Model, entry_of
from longscan.models.common.quantization import KINDS, precision
from longscan.ops import dequantize
from longscan.ops.quant import STORED as STORED_DTYPES
from longscan.tokenizers.base import Tokenizer

__all__ = ["ARCHITECTURES", "GGUFFile", "GGUFType", "save_gguf", "usual_type"]

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (MAMBA, MAMBA2, FALCON_H1, GRANITE, JAMBA, NEMOTRON_H, NEMOTRON_H_MOE)
}

USUAL: dict[str, GGUFType] = {
    **{"float64": "F32", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
}


class Item(NamedTuple):
    """A tensor to be written, in parts."""

    name: str
    type: GGUFType
    shape: Shape
    parts: list[Callable[[], npt.NDArray[np.uint8]]]


class GGUFFile(Source):
    """A model in a GGUF file, which may come from anywhere.

    Args:
        path: of the file.

    Raises:
        LongscanError: the file is damaged, hostile, or of another model.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = check(path)
        with self._named():
            self._architecture = _architecture(self._header)
        self.name = self._architecture.model

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer in the file; None, after a warning, if it is of a kind that is not read."""
        with self._named():
            return read_tokenizer(self._header.metadata)

    def config(self, tokenizer_size: int | None = None) -> Config:
        """Return what the metadata say, which count the tokens in use; see `Source.config`."""
        with self._named():
            return self._architecture.read_config(self._header)

    def weights(self, config: Config) -> Weights:
        """Return Q8_0, Q4_0 and BF16 matrices as they are, all else in float32; see `Source.weights`."""
        assert isinstance(config, LanguageModelConfig)
        with self._named():
            places = _places(self._architecture, config)
            _check_fit(places, self._header.tensors)
            tensors = _read_tensors(self.path, places, self._header.tensors)
        types = {tensor.dtype for tensor in tensors.values()}
        kinds = [kind for kind in KINDS if STORED_DTYPES[kind] in types]  # the narrowest is last
        return Weights(tensors, kinds[-1] if kinds else None)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Put the name of the file before an error."""
        try:
            yield
        except LongscanError as error:
            raise LongscanError(f"{self.path}: {error}") from error


@torch.no_grad()
def save_gguf(
    model: LanguageModel,
    path: str | Path,
    tokenizer: Tokenizer | None,
    kind: GGUFType | None = None,
    *,
    new: bool = False,
) -> None:
    """Write a Mamba, Mamba-2 or hybrid as a GGUF file that llama.cpp reads, whole or not at all.

    Matrices get the type asked for. Not so in Q4_0 x_proj and dt_proj, which get Q8_0, and in both what
    blocks of 32 do not fit, which stays F32. All else is F32, as llama.cpp wants it.

    Args:
        model: plain or quantised. Matrices quantised in blocks go into a file of their type as they are,
            and those of 4 bits into Q8_0 without loss; rows of 8 bits keep their numbers, and their scales
            become float16.
        path: the file to create or replace.
        tokenizer: byte-level BPE or bytes; None for a model that reads ids.
        kind: of the matrices; None takes the nearest to what they are.
        new: whether an existing file is refused.

    Raises:
        LongscanError: llama.cpp takes no such model or tokenizer; a package is missing; another process is
            writing the file; or it exists, and `new` is set.
        OSError: the file cannot be written.
    """
    kind = kind or usual_type(model)
    if kind not in FILE_TYPES:
        raise LongscanError(f"type of the GGUF file: expected {', '.join(FILE_TYPES)}, got {kind!r}.")
    config, name = model.config, entry_of(model).name
    known = (known for known in ARCHITECTURES.values() if known.model == name and known.takes(config))
    architecture = next(known, None)
    if architecture is None:
        raise LongscanError(
            f"{type(model).__name__}: expected a Mamba, a Mamba-2 or a hybrid of a published family "
            f"({', '.join(ARCHITECTURES)}): GGUF files of other models are not written. Use a directory."
        )
    check_ids(path, tokenizer.vocab_size if tokenizer else 0, config.vocab_size)
    gguf = package()
    metadata = {
        **architecture.metadata(config, FILE_TYPES[kind]),
        **describe_tokenizer(tokenizer, config.padded_vocab_size),
    }
    plan = _plan(model, architecture, kind)
    with (
        atomic_file(path, exclusive=True, new=new) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture.name)) as writer,
    ):
        for key, value in metadata.items():
            _add(writer, key, value)
        for item in plan:
            like = gguf.GGMLQuantizationType[item.type]
            block, n_bytes = gguf.GGML_QUANT_SIZES[like]
            size = math.prod(item.shape) // block * n_bytes
            writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size, raw_dtype=like)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in plan:  # one at a time: a model may be large
            parts = [part() for part in item.parts]
            writer.write_tensor_data(parts[0] if len(parts) == 1 else np.concatenate(parts))


def usual_type(model: LanguageModel) -> GGUFType:
    """Return the type that is nearest to what a model's matrices are.

    Args:
        model: plain or quantised.
    """
    return USUAL[precision(model)]


def _architecture(header: Header) -> Architecture:
    """Return the architecture of a file that holds a whole model."""
    stated = header.metadata.get("general.architecture")
    if not isinstance(stated, str) or stated not in ARCHITECTURES:
        raise LongscanError(
            f"general.architecture: expected {', '.join(ARCHITECTURES)}, got {short(stated)}: GGUF files "
            "of other models are not read. Take the model as a directory of safetensors."
        )
    if header.metadata.get("split.count", 0) not in (0, 1):  # merging leaves 0 behind
        raise LongscanError("this is one part of a model: join them with `llama-gguf-split --merge`.")
    return ARCHITECTURES[stated]


def _blank(model: str, config: LanguageModelConfig) -> Model:
    """Return a model of shapes, without memory."""
    try:
        with torch.device("meta"):
            return MODELS[model].cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can address
        raise LongscanError(f"the sizes in the metadata are impossible ({error}).") from error


class Place(NamedTuple):
    """Where a parameter stands in a file, and its shape here."""

    slot: Slot
    ours: Shape


def _places(architecture: Architecture, config: LanguageModelConfig) -> dict[str, Place]:
    """Return where each parameter stands, by our names."""
    blank = _blank(architecture.model, config).state_dict()
    shapes = {name: tuple(like.shape) for name, like in blank.items()}
    return {name: Place(architecture.locate(name, shape, config), shape) for name, shape in shapes.items()}


def _check_fit(places: Mapping[str, Place], found: Mapping[str, TensorInfo]) -> None:
    """Raise unless a file has a tensor for each parameter; name all that does not fit, in one error."""
    expected = {slot.name: slot.shape for slot, _ in places.values()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [short(name) for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in found and not _fits(found[name], shape)
        ],
        "of a type that is not read": [
            f"{short(name)} {info.type}" for name, info in found.items() if info.type not in READ
        ],
    }
    refuse("the tensors are not those that the metadata describe.", problems)


def _fits(info: TensorInfo, shape: Shape) -> bool:
    """Return whether a shape fits but for axes of one, which other writers add or leave out."""
    same = [n for n in info.shape if n != 1] == [n for n in shape if n != 1]
    return same and (info.type in PLAIN or info.shape[-1] == shape[-1])  # blocks lie along the last axis


def _read_tensors(
    path: Path, places: Mapping[str, Place], infos: Mapping[str, TensorInfo]
) -> dict[str, Tensor]:
    """Read the tensors one after the other, under our names and in our shapes."""
    tensors: dict[str, Tensor] = {}
    data = np.memmap(path, np.uint8, "r")
    for name, (slot, shape) in places.items():
        info = infos[slot.name]
        size = info.n_bytes // slot.n_parts
        begin = info.begin + slot.part * size
        raw = torch.from_numpy(np.array(data[begin : begin + size]))
        rows = None if slot.rows is None else slot.rows().argsort()
        if is_matrix(name, shape) and info.type in STORED:
            q, scale = stored(raw, info.type, shape)
            tensors[name] = q if rows is None else q[rows]
            if scale is not None:
                tensors[name.removesuffix("weight") + "scale"] = scale if rows is None else scale[rows]
            continue
        values = decode(raw, info, shape)
        if name.endswith("A_log"):
            if not bool((values <= 0).all()):
                raise LongscanError(f"{slot.name}: expected A, which is never positive: {AGAIN}")
            values = values.double().neg().log().float()
        values = values.view(shape)
        tensors[name] = values if rows is None else values[rows]
    return tensors


def _plan(model: LanguageModel, architecture: Architecture, kind: GGUFType) -> list[Item]:
    """List what a file holds, in an order that does not depend on how the model is stored."""
    state = model.state_dict()
    items: dict[str, Item] = {}
    for name, (slot, shape) in _places(architecture, architecture.written(model.config)).items():
        item = items.setdefault(slot.name, Item(slot.name, type_of(name, shape, kind), slot.shape, []))
        source = name if name != "lm_head.weight" or name in state else "backbone.embedding.weight"
        tensor = state.get(source, torch.zeros(()).expand(shape))  # llama.cpp wants a bias of conv1d
        scale = state.get(source.removesuffix("weight") + "scale") if name.endswith("weight") else None
        item.parts.append(partial(_encode, name, tensor, scale, item.type, slot))
    return list(items.values())


def _encode(
    name: str, tensor: Tensor, scale: Tensor | None, kind: GGUFType, slot: Slot
) -> npt.NDArray[np.uint8]:
    """Return the bytes of a parameter as it stands in a file."""
    factor = slot.factor() if callable(slot.factor) else slot.factor
    if isinstance(factor, Tensor) or factor != 1:
        tensor, scale = (tensor if scale is None else dequantize(tensor, scale)).float() * factor, None
    if slot.rows is not None:
        rows = slot.rows()
        tensor, scale = tensor[rows], None if scale is None else scale[rows]
    return encode(name, tensor, scale, kind)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add an entry of the metadata in the type that its value has."""
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{adders[type(value)]}")(key, value)
