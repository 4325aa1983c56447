"""LoRA adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

Layers have the names of the base's published layout: `base_model.model.` + module + `.lora_A.weight`. Where
that layout has a matrix in pieces or in one with others, the layer has our name, which only longscan reads.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longscan.checkpoints.formats import format_of
from longscan.checkpoints.weights import read_safetensors, some
from longscan.core.files import atomic_directory, read_json, utf8, write_json, writing
from longscan.errors import LongscanError
from longscan.models import LanguageModel, Model
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach, merge, shape_of, sharing
from longscan.models.common.quantization import kind_of
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat_templates import DEFAULT

__all__ = ["CONFIG", "AdapterError", "apply_adapter", "beside", "save_adapter", "template_of"]

CONFIG, WEIGHTS, TEMPLATE = "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST = 1e6  # of alpha
MAX_TEMPLATE = 1 << 20  # bytes
PREFIX, MATRICES = "base_model.model.", ("lora_A", "lora_B")
BASE = "longscan_base"  # in the header of the weights: the fingerprint of the model they were trained on

# what an adapter of others may have, and is not computed here: name -> the values that mean it has not
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None, {}),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_bdlora": (False, None),
}


class AdapterError(LongscanError):
    """An adapter is damaged, not of this model, or of a kind that is not computed here."""


class _Adapter(NamedTuple):
    """An adapter's files, checked: our name of a layer -> its A and B, and its scale."""

    matrices: dict[str, tuple[Tensor, Tensor]]
    layers: dict[str, LoraLayer]
    base: str | None


def save_adapter(
    model: Model,
    directory: str | Path,
    *,
    base: str,
    fingerprint: str,
    dropout: float = 0.0,
    template: str | None = None,
) -> None:
    """Save the adapters of a model, whole or not at all.

    Args:
        model: with adapters, all of one rank and scale.
        directory: created, or replaced if it holds an adapter.
        base: the name of the model without them, for the file.
        fingerprint: of that model, before it was quantised.
        dropout: in training, for the file.
        template: the chat template that it has learnt, if that is not the base's.

    Raises:
        LongscanError: the directory holds something else, or could not be written.
        OSError: likewise.
    """
    names, tensors, scales = _published(model), {}, set()
    for name, module in adapted(model):
        scales.add(LoraLayer(len(module.lora_A), module.s))
        for key in MATRICES:
            tensors[f"{PREFIX}{names[name]}.{key}.weight"] = getattr(module, key).detach().contiguous()
    ((rank, scale),) = scales
    chosen = {names[name] for name, _ in adapted(model)}
    leaves = {name.rpartition(".")[2] for name in chosen}
    every = {theirs for theirs in names.values() if theirs.rpartition(".")[2] in leaves}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "target_modules": sorted(leaves if every == chosen else chosen),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    with atomic_directory(directory, marker=CONFIG) as folder, writing(Path(directory)):
        write_json(folder / CONFIG, fields)
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8")
        # one entry: of several, the order in the file is random
        save_file(tensors, folder / WEIGHTS, metadata={BASE: fingerprint})


def apply_adapter(model: Model, directory: str | Path) -> None:
    """Add an adapter to a model: merged into its matrices, or beside them if they are quantised.

    Args:
        model: that it was trained on, changed in place.
        directory: of PEFT's files, or of a run of `longscan finetune`.

    Raises:
        AdapterError: it is damaged, of another model, or not of a kind that is computed here.
        OSError: it can't be read.
    """
    dtype, training = model.dtype, model.training
    _attach(model, directory, None if kind_of(model) else model.fingerprint())
    if kind_of(model) is None:
        merge(model)
        model.requires_grad_(True)
    model.train(training)
    assert model.dtype == dtype


def beside(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    fingerprint: str | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Return a model with an adapter beside its weights, which it shares with the given one, and a tokenizer.

    It computes what the merged model computes, up to rounding, and takes the memory of the adapter alone.

    Args:
        model: that the adapter was trained on; it keeps its weights, and no adapter.
        tokenizer: the model's; the result has the adapter's chat template, if that has one.
        directory: see `apply_adapter`.
        fingerprint: of the model, so that several adapters need not compute it each.

    Raises:
        AdapterError: see `apply_adapter`.
        OSError: it can't be read.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = sharing(model)
    _attach(shared, directory, None if kind_of(model) else fingerprint or model.fingerprint())
    for parameter in trained:  # `attach` has frozen what both have
        parameter.requires_grad_(True)
    shared.eval()
    if tokenizer is not None and (template := template_of(directory)) is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_templates = {**tokenizer.chat_templates, DEFAULT: template}
    return shared, tokenizer


def _attach(model: Model, directory: str | Path, fingerprint: str | None) -> None:
    """Give a model an adapter, and warn if it was trained on weights with another fingerprint."""
    directory = _found(directory)
    adapter = _read(model, directory)
    if fingerprint is not None and adapter.base not in (None, fingerprint):
        warnings.warn(
            f"{directory} was trained on other weights of this shape: the result is of neither model.",
            stacklevel=3,
        )
    attach(model, adapter.layers)
    for name, module in adapted(model):
        for key, matrix in zip(MATRICES, adapter.matrices[name], strict=True):
            getattr(module, key).data.copy_(matrix)
            getattr(module, key).requires_grad_(False)


def template_of(directory: str | Path) -> str | None:
    """Return the chat template that an adapter has learnt; None if that is its base's.

    Args:
        directory: see `apply_adapter`.

    Raises:
        LongscanError: it is not UTF-8, or longer than any template.
        OSError: it can't be read.
    """
    path = _found(directory) / TEMPLATE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_TEMPLATE:
        raise AdapterError(f"{path}: expected at most {MAX_TEMPLATE:,} bytes.")
    return utf8(path.read_bytes(), str(path))


def _found(directory: str | Path) -> Path:
    """Return the directory of an adapter, that of a run included."""
    directory = Path(directory)
    inside = directory / "adapter"
    return inside if not (directory / CONFIG).is_file() and (inside / CONFIG).is_file() else directory


def _read(model: Model, directory: Path) -> _Adapter:
    """Return an adapter that fits a model."""
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            found = some(path.name for path in directory.iterdir()) if directory.is_dir() else "no directory"
            pickle = (
                " A pickled adapter is not read: it may hold code." if "adapter_model.bin" in found else ""
            )
            raise AdapterError(
                f"{directory}: expected an adapter, {CONFIG} and {WEIGHTS}; found {found}.{pickle}"
            )
    fields = read_json(directory / CONFIG)
    for name, harmless in ONLY.items():
        if name in fields and fields[name] not in harmless:
            expected = " or ".join(map(repr, harmless[:1]))
            raise AdapterError(
                f"{directory / CONFIG}: {name}: expected {expected}, got {str(fields[name])[:80]!r}: an "
                "adapter with this is not computed here. Merge it with the program that trained it."
            )
    tensors, path = read_safetensors(directory / WEIGHTS), directory / WEIGHTS
    ours = {theirs: name for name, theirs in _published(model).items()}
    shapes = {name: shape_of(module) for name, module in adaptable(model).items()}
    found_: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None:
            raise AdapterError(
                f"{path}: {key[:120]}: expected {PREFIX}(layer).lora_A.weight or .lora_B.weight."
            )
        path_in = match[1].removeprefix("network.")  # trained on the model of compat/causal_lm.py
        layer = ours.get(path_in, path_in)
        if match[2] in found_.get(layer, {}):
            raise AdapterError(f"{path}: {layer} has two adapters. Fetch or make it again.")
        if layer not in shapes:
            known = some(theirs for theirs in ours)
            raise AdapterError(f"{path}: {match[1][:120]}: this model has no such matrix. It has {known}.")
        if tensor.dtype not in TYPES or not bool(tensor.float().isfinite().all()):
            raise AdapterError(f"{path}: {key}: expected finite numbers of 16 bits or more.")
        found_.setdefault(layer, {})[match[2]] = tensor.float()
    if not found_:
        raise AdapterError(f"{path}: expected the matrices of an adapter, got none.")
    matrices, layers = {}, {}
    for layer, pair in found_.items():
        n_out, n_in = shapes[layer]
        a, b = (pair.get(key) for key in MATRICES)
        if (
            a is None
            or b is None
            or a.dim() != 2
            or not len(a)
            or tuple(b.shape) != (n_out, len(a))
            or a.shape[1] != n_in
        ):
            got = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in pair.items())
            raise AdapterError(
                f"{path}: {layer}: expected lora_A (rank, {n_in}) and lora_B ({n_out}, rank), got {got}: "
                "it is damaged, or of another model."
            )
        matrices[layer] = a, b
        if isinstance(fields.get("r"), int) and not fields.get("rank_pattern") and fields["r"] != len(a):
            raise AdapterError(
                f"{directory / CONFIG}: r: expected {len(a)}, the rank of the matrices, "
                f"got {fields['r']!r:.40}."
            )
        layers[layer] = LoraLayer(len(a), _scale(fields, directory, layer, len(a)))
    with safe_open(path, "pt") as file:
        base = (file.metadata() or {}).get(BASE)
    return _Adapter(matrices, layers, base)


def _scale(fields: Mapping[str, Any], directory: Path, layer: str, rank: int) -> float:
    """Return s of a layer, whose patterns are endings of its name."""
    alpha, root, patterns = (fields.get(name) for name in ("lora_alpha", "use_rslora", "alpha_pattern"))
    if not isinstance(root, bool | None) or not isinstance(patterns, dict | None):
        raise AdapterError(
            f"{directory / CONFIG}: expected use_rslora to be true or false, and alpha_pattern an object."
        )
    for pattern, its in (patterns or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise AdapterError(
                f"{directory / CONFIG}: alpha_pattern: expected names of layers, got {pattern[:80]!r}."
            )
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = its
    alpha = 8 if alpha is None else alpha  # PEFT's default
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MOST <= alpha <= MOST:
        raise AdapterError(
            f"{directory / CONFIG}: lora_alpha: expected a number up to {MOST:g}, got {str(alpha)[:80]!r}."
        )
    return float(alpha) / (math.sqrt(rank) if root else rank)


def _published(model: Model) -> dict[str, str]:
    """Return the published name of each matrix that can have an adapter, or has one; ours if it has none."""
    names = [*adaptable(model), *(name for name, _ in adapted(model))]
    blank = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    layout = format_of(model)
    whole = {id(tensor): name for name, tensor in layout.outgoing(blank, model.config).items()}
    return {
        name: whole.get(id(blank[f"{name}.weight"]), f"{name}.weight").removesuffix(".weight")
        for name in names
    }
