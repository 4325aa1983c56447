"""GGUF, llama.cpp's files, both ways, for Mamba.

Reading keeps what the file has: Q8_0 and Q4_0 are formats of ops/quant.py but for the order of the bytes, and
become those; BF16 stays; all else is dequantised to float32. Writing is exact where the format is: a model
that holds such matrices gets them into the file bit for bit.

Two things differ in meaning, not only in name. The file has A where the model has A_log, A = -exp(A_log), so
A_log comes back within a rounding of A. And llama.cpp computes only what the published models are: d_inner is
twice d_model, in_proj and out_proj have no bias, the residual stream is float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longscan import ops
from longscan.checkpoints.formats import read_config
from longscan.checkpoints.gguf.parser import AGAIN, Header, TensorInfo, Value, check, short
from longscan.checkpoints.gguf.tokenizer import describe_tokenizer, read_tokenizer, vocabulary_size
from longscan.checkpoints.weights import some
from longscan.core.files import atomic_file
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models import LanguageModel, Mamba, MambaConfig
from longscan.models.common.layers import WeightOnly
from longscan.models.common.quantization import DELICATE, precision, store_like
from longscan.ops.quant import BLOCK
from longscan.tokenizers.base import Tokenizer

__all__ = ["GGUFType", "load_gguf", "save_gguf", "usual_type"]

GGUFType: TypeAlias = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
Shape: TypeAlias = "tuple[int, ...]"

ARCHITECTURE = "mamba"
FILE_TYPES: dict[GGUFType, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # of llama.cpp
USUAL: dict[str, GGUFType] = {
    **{"float64": "F32", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DEQUANTISED = (  # by the gguf package
    *("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
)
LOW = 0x0F0F0F0F0F0F0F0F  # the lower halves of 8 bytes
BLOCKS = {"Q8_0": 34, "Q4_0": 18}  # bytes of a block: the types that are formats of ops/quant.py too
INSTALL = "pip install --upgrade 'longscan[gguf]'"

# our name -> theirs, around the layers and in them
OUTER = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
# transformers' name of a size -> its key; see layouts.py
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "intermediate_size": "ssm.inner_size",
    "time_step_rank": "ssm.time_step_rank",
}
EPSILON = "attention.layer_norm_rms_epsilon"
VOCAB_SIZE = "longscan.vocab_size"  # rows that stand for tokens, also where no tokenizer tells


class Item(NamedTuple):
    """A tensor to be written."""

    name: str
    type: GGUFType
    shape: Shape
    encode: Callable[[], npt.NDArray[np.uint8]]


def load_gguf(path: str | Path, dtype: torch.dtype | None = None) -> tuple[LanguageModel, Tokenizer | None]:
    """Load a Mamba and its tokenizer from a GGUF file.

    Args:
        path: the file; it may come from anywhere.
        dtype: None keeps Q8_0, Q4_0 and BF16 matrices as they are stored and makes all else float32. With a
            type all weights are dequantised to it; the recurrence stays float32 at least.

    Returns:
        model: ready to run, in evaluation mode.
        tokenizer: None if the file has none that is read here.

    Raises:
        LongscanError: the file is damaged, hostile, or of another model; or a package is missing.
        OSError: it cannot be read.
    """
    path = Path(path)
    header = check(path)
    try:
        config = _read_sizes(header)
        tokenizer = read_tokenizer(header.metadata)
        _check_vocabulary(tokenizer, config)
        model = _blank(config)
        places = _match(model, header.tensors)
        tensors = _read_tensors(path, places, keep=dtype is None)
        store_like(model, tensors)
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    model.to(dtype or torch.float32)
    types = {name: like.dtype for name, like in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(types[name]) for name, tensor in tensors.items()}, assign=True)
    stored = any(isinstance(module, WeightOnly) for module in model.modules())
    return model.eval().requires_grad_(not stored), tokenizer


@torch.no_grad()
def save_gguf(
    model: LanguageModel, path: str | Path, tokenizer: Tokenizer | None, kind: GGUFType | None = None
) -> None:
    """Write a Mamba as a GGUF file that llama.cpp reads, whole or not at all.

    Matrices get the type asked for. Not so in Q4_0 x_proj and dt_proj, which get Q8_0, and in both what
    blocks of 32 do not fit, which stays F32. All else is F32, as llama.cpp wants it.

    Args:
        model: plain or quantised. Matrices quantised in blocks go into a file of their type as they are,
            and those of 4 bits into Q8_0 without loss; rows of 8 bits keep their numbers, and their scales
            become float16.
        path: the file to create or replace.
        tokenizer: byte-level BPE or bytes; None for a model that reads ids.
        kind: of the matrices; None takes the nearest to what they are.

    Raises:
        LongscanError: llama.cpp has no place for such a model or tokenizer; or a package is missing.
        OSError: the file cannot be written.
    """
    kind = kind or usual_type(model)
    if kind not in FILE_TYPES:
        raise LongscanError(f"type of the GGUF file: expected {', '.join(FILE_TYPES)}, got {kind!r}.")
    config = model.config
    if not isinstance(config, MambaConfig):
        raise LongscanError(
            f"{type(model).__name__}: expected a Mamba: GGUF files of other models are not written. "
            "Use a directory."
        )
    if config.expand != 2 or config.bias:
        got = f"expand {config.expand}, bias {str(config.bias).lower()}"
        raise LongscanError(f"llama.cpp computes only Mambas of expand 2 without bias, this one has {got}.")
    _check_vocabulary(tokenizer, config)
    gguf = _package()
    metadata = {**_write_sizes(config, kind), **describe_tokenizer(tokenizer, config.padded_vocab_size)}
    plan = _plan(model, config, kind)
    with atomic_file(path) as new, contextlib.closing(gguf.GGUFWriter(new, ARCHITECTURE)) as writer:
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
            writer.write_tensor_data(item.encode())


def usual_type(model: LanguageModel) -> GGUFType:
    """Return the type that is nearest to what a model's matrices are.

    Args:
        model: plain or quantised.
    """
    return USUAL[precision(model)]


# ---- names and sizes


def _theirs(name: str) -> str:
    """Give a parameter of ours the name it has in the file."""
    if name in OUTER:
        return OUTER[name]
    layer, _, inner = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{layer}.{INNER[inner]}"


def _check_vocabulary(tokenizer: Tokenizer | None, config: MambaConfig) -> None:
    """Insist that the model knows all ids of its tokenizer."""
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise LongscanError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}: "
            "they do not belong together."
        )


def _read_sizes(header: Header) -> MambaConfig:
    """Make the Config of the metadata and of what tensors there are."""
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE or metadata.get(f"{ARCHITECTURE}.ssm.dt_b_c_rms", False) is not False:
        what = "a Mamba with extra norms" if architecture == ARCHITECTURE else short(architecture)
        raise LongscanError(
            f"general.architecture: expected mamba (Mamba-1), got {what}: GGUF files of other models are not "
            "read. Take the model as a directory of safetensors."
        )
    if metadata.get("split.count", 0) not in (0, 1):  # merging leaves 0 behind
        raise LongscanError("this is one part of a model: join them with `llama-gguf-split --merge`.")
    raw: dict[str, Any] = {theirs: _count(metadata, key) for theirs, key in SIZES.items()}
    if raw["num_hidden_layers"] * (len(INNER) - 1) > len(tensors):  # before a loop over layers not there
        raise LongscanError(
            f"{ARCHITECTURE}.block_count is {raw['num_hidden_layers']:,}, "
            f"the file has {len(tensors)} tensors."
        )
    if raw["intermediate_size"] % raw["hidden_size"]:
        raise LongscanError(
            f"{ARCHITECTURE}.ssm.inner_size: expected a multiple of {raw['hidden_size']:,}, "
            f"got {raw['intermediate_size']:,}."
        )
    epsilon = metadata.get(f"{ARCHITECTURE}.{EPSILON}")
    if type(epsilon) is not float or not 0 <= epsilon < 1:
        raise LongscanError(f"{ARCHITECTURE}.{EPSILON}: expected a small number, got {short(epsilon)}.")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LongscanError("token_embd.weight is missing or no matrix: fetch the file again.")
    n_rows = embedding.shape[0]
    listed = vocabulary_size(metadata) or n_rows
    if listed > n_rows:
        raise LongscanError(
            f"the tokenizer has {listed:,} ids, the model {n_rows:,}: they do not belong together."
        )
    size = _count(metadata, VOCAB_SIZE, prefix="") if VOCAB_SIZE in metadata else listed
    _, config = read_config(
        {
            **raw,
            "model_type": "mamba",
            "vocab_size": n_rows,
            "unpadded_vocab_size": size,
            "expand": raw["intermediate_size"] // raw["hidden_size"],
            "layer_norm_epsilon": float(str(np.float32(epsilon))),  # 1e-05, not 9.999999747378752e-06
            "tie_word_embeddings": "output.weight" not in tensors,
            "use_conv_bias": "blk.0.ssm_conv1d.bias" in tensors,
        }
    )
    assert isinstance(config, MambaConfig)
    return config


def _count(metadata: Mapping[str, Value], key: str, prefix: str = f"{ARCHITECTURE}.") -> int:
    """Return a size of the metadata."""
    value = metadata.get(prefix + key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise LongscanError(f"{prefix}{key}: expected a whole number of at least 1, got {short(value)}.")
    return value


def _write_sizes(config: MambaConfig, kind: GGUFType) -> dict[str, Any]:
    """Put a Config into metadata; llama.cpp wants some sizes that a Mamba does not have."""
    sizes = {
        "context_length": 2**20,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm.conv_kernel": config.d_conv,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.d_state,
        "ssm.time_step_rank": config.rank,
        EPSILON: config.norm_eps,
        "ssm.dt_b_c_rms": False,
    }
    return {
        "general.type": "model",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        VOCAB_SIZE: config.vocab_size,
        **{f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()},
    }


def _blank(config: MambaConfig) -> Mamba:
    """Build a model of shapes, without memory."""
    try:
        with torch.device("meta"):
            return Mamba(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can address
        raise LongscanError(f"the sizes in the metadata are impossible ({error}).") from error


def _match(model: LanguageModel, found: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, Shape]]:
    """Find each parameter's tensor, and the shape it has here; name all that does not fit, in one error."""
    expected = {_theirs(name): (name, tuple(like.shape)) for name, like in model.state_dict().items()}
    shapes = [
        f"{theirs} {found[theirs].shape} instead of {shape}"
        for theirs, (_, shape) in expected.items()
        if theirs in found and not _fits(found[theirs], shape)
    ]
    types = [
        f"{short(name)} {info.type}"
        for name, info in found.items()
        if info.type not in (*PLAIN, *BLOCKS, *DEQUANTISED)
    ]
    problems = {
        "missing": [theirs for theirs in expected if theirs not in found],
        "unexpected": [short(theirs) for theirs in found if theirs not in expected],
        "of another shape": shapes,
        "of a type that is not read": types,
    }
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LongscanError("\n".join(["the tensors are not those that the metadata describe.", *lines]))
    return {name: (found[theirs], shape) for theirs, (name, shape) in expected.items()}


def _fits(info: TensorInfo, shape: Shape) -> bool:
    """Whether a tensor has a shape but for axes of one, which conv1d has here and other writers add."""
    same = [n for n in info.shape if n != 1] == [n for n in shape if n != 1]
    return same and (info.type in PLAIN or info.shape[-1] == shape[-1])  # blocks lie along the last axis


# ---- from the file


def _read_tensors(
    path: Path, places: Mapping[str, tuple[TensorInfo, Shape]], *, keep: bool
) -> dict[str, Tensor]:
    """Read the tensors one after the other, under our names and in our shapes."""
    tensors: dict[str, Tensor] = {}
    data = np.memmap(path, np.uint8, "r")
    for name, (info, shape) in places.items():
        raw = torch.from_numpy(np.array(data[info.begin : info.begin + info.n_bytes]))
        if keep and _is_matrix(name, shape) and info.type in (*BLOCKS, "BF16"):
            tensors[name], scale = _stored(raw, info.type, shape)
            if scale is not None:
                tensors[name.removesuffix("weight") + "scale"] = scale
            continue
        values = _values(raw, info)
        if name.endswith("A_log"):
            if not bool((values <= 0).all()):
                raise LongscanError(f"{_theirs(name)}: expected A, which is never positive: {AGAIN}")
            values = values.double().neg().log().float()
        tensors[name] = values.view(shape)
    return tensors


def _stored(raw: Tensor, kind: str, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Bring the bytes of a matrix into the order of ops/quant.py: q and scale."""
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


def _values(raw: Tensor, info: TensorInfo) -> Tensor:
    """Dequantise a tensor to float32."""
    if info.type in PLAIN:
        return raw.view(PLAIN[info.type]).float()
    if info.type in BLOCKS:
        return ops.dequantize(*_stored(raw, info.type, (raw.numel() // BLOCKS[info.type], BLOCK)))
    gguf = _package()
    rows = raw.numpy().reshape(math.prod(info.shape[:-1]), -1)
    try:
        with np.errstate(all="ignore"):  # what a damaged block holds is numbers nevertheless
            return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[info.type]))
    except (KeyError, NotImplementedError) as error:
        raise LongscanError(f"{info.type} is newer than this gguf package: {INSTALL}") from error


# ---- into the file


def _plan(model: LanguageModel, config: MambaConfig, kind: GGUFType) -> list[Item]:
    """List what a file holds, in an order that does not depend on how the model is stored."""
    state = model.state_dict()
    like = _blank(config.replace(conv_bias=True)).state_dict()
    plan = []
    for name, blank in like.items():
        shape = tuple((blank.squeeze(1) if name.endswith("conv1d.weight") else blank).shape)
        type_name = _type_of(name, shape, kind)
        tensor = state.get(name, torch.zeros(()).expand(shape))  # llama.cpp wants a bias of conv1d
        scale = state.get(name.removesuffix("weight") + "scale") if name.endswith("weight") else None
        plan.append(Item(_theirs(name), type_name, shape, partial(_encode, name, tensor, scale, type_name)))
    return plan


def _type_of(name: str, shape: Shape, kind: GGUFType) -> GGUFType:
    """Choose the type of one tensor; see `save_gguf`."""
    if not _is_matrix(name, shape) or (kind in BLOCKS and shape[1] % BLOCK):
        return "F32"
    return "Q8_0" if kind == "Q4_0" and name.split(".")[-2] in DELICATE else kind


def _is_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is one that is stored in fewer bits."""
    return name.endswith(".weight") and len(shape) == 2 and not name.endswith("conv1d.weight")


def _encode(name: str, tensor: Tensor, scale: Tensor | None, kind: GGUFType) -> npt.NDArray[np.uint8]:
    """Compute the bytes of a tensor."""
    tensor, scale = tensor.detach().cpu(), None if scale is None else scale.cpu()
    if kind in BLOCKS and (blocks := _blocks(tensor, scale, kind)) is not None:
        return blocks.numpy()
    values = tensor.float() if scale is None else ops.dequantize(tensor, scale)
    if kind in BLOCKS and not values.isfinite().all():
        raise LongscanError(f"{name}: expected finite numbers, got NaN or infinity: it can't be {kind}.")
    if name.endswith("A_log"):
        values = values.double().exp().neg()
    if kind in PLAIN:
        return values.to(PLAIN[kind]).contiguous().flatten().view(torch.uint8).numpy()
    try:
        if kind == "Q8_0":
            gguf = _package()
            quantised: npt.NDArray[np.uint8] = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
            return quantised
        q, scale = ops.quantize(values, "int4")
    except ValueError as error:
        raise LongscanError(f"{name}: {error}") from error
    blocks = _blocks(q, scale, kind)
    assert blocks is not None
    return blocks.numpy()


def _blocks(q: Tensor, scale: Tensor | None, kind: GGUFType) -> Tensor | None:
    """Bring a stored matrix into GGUF's order, if that loses nothing but a little of the scale of a row."""
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


def _add(writer: Any, key: str, value: Any) -> None:
    """Add an entry of the metadata in the type that its value has."""
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{adders[type(value)]}")(key, value)


def _package() -> Any:
    """Import the gguf package, which writes files and knows the many quantised types."""
    return require("gguf", "GGUF files of this kind")
