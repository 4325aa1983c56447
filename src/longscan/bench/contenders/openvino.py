"""OpenVINO as a contender, through optimum-intel, which converts a model directory as transformers reads it.

Matrices in int8 have a scale per row, in int4 a scale per 128 weights. Runs in the workers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.bench.contenders.workloads import decoding, excerpt, random_ids
from longscan.bench.worker import Run

__all__ = ["PACKAGE", "PRECISIONS", "decode", "prefill"]

PACKAGE = "optimum-intel"
PRECISIONS = ("float32", "int8", "int4")


def prefill(directory: str, vocab_size: int, seq_len: int, precision: str) -> Run:
    """Prepare the prefill of a prompt."""
    model = _model(directory, precision)
    ids = random_ids(1, seq_len, vocab_size)

    def run() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)

    return run


def decode(directory: str, vocab_size: int, prompt: int, n_tokens: int, precision: str) -> Run:
    """Prepare greedy decoding after a prompt; the first run goes on from there, the others from its end."""
    model = _model(directory, precision)
    ids = random_ids(1, prompt, vocab_size)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    logits = output.logits[0, -1]
    seen, cache = prompt, output.cache_params

    def advance(token: Tensor) -> Tensor:
        nonlocal seen, cache
        seen += 1
        mask = torch.ones(1, seen, dtype=torch.int64)
        step = model(input_ids=token[:, None], attention_mask=mask, use_cache=True, cache_params=cache)
        cache = step.cache_params
        last: Tensor = step.logits[:, -1]
        return last

    steps = decoding(logits.argmax(-1)[None], n_tokens, advance)
    return lambda: (steps() or {}) | {"excerpt": excerpt(logits)}


def _model(directory: str, precision: str) -> Any:
    """Return the compiled model; it is converted once and stored beside the directory."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1
    options: dict[str, Any] = {
        "ov_config": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
    }
    converted = Path(f"{directory}-openvino-{precision}")
    if converted.is_dir():
        return OVModelForCausalLM.from_pretrained(converted, **options)
    bits = {"int8": 8, "int4": 4}.get(precision)
    if bits is None:
        options["load_in_8bit"] = False  # by default large models are quantised
    else:
        group = {} if bits == 8 else {"group_size": 128}
        options["quantization_config"] = OVWeightQuantizationConfig(bits=bits, sym=bits == 4, **group)
    model = OVModelForCausalLM.from_pretrained(directory, export=True, **options)
    model.save_pretrained(converted)
    return model
