"""Texts continued together, as a library does it."""

from __future__ import annotations

from typing import Any

from longscan.inference.generate import generate_ids
from longscan.inference.prefill import encode
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer


def generate_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], slots: int = 32, **sampling: Any
) -> list[str]:
    """Continue several texts at once."""
    texts = [""] * len(prompts)
    config = SamplingConfig.from_dict(sampling)
    ids = encode(tokenizer, prompts)
    ends = tokenizer.eos_id
    for event in generate_ids(model, ids, config, eos_id=ends, tokenizer=tokenizer, slots=slots):
        texts[event.row] += event.text
    return texts
