"""Small translators and sentences for the tests of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.models import MODELS, Translator

NAMES = [entry.name for entry in MODELS.values() if entry.kind == "translation"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SENTENCES = [[3, 4, 5, 6, 7], [8, 9], [10], [3, 11, 12]]
TRANSLATIONS = [[5, 6], [7, 8, 9, 10, 11, 12], [3, 4, 4], []]

# every kind of attention and norm, by what its tests are called
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "seq2seq": ("seq2seq", {}),
    "seq2seq-unreversed": ("seq2seq", {"reverse": False}),
    "bahdanau": ("bahdanau", {}),
    "luong-general": ("luong", {}),
    "luong-dot": ("luong", {"score": "dot"}),
    "luong-concat": ("luong", {"score": "concat"}),
    "luong-location": ("luong", {"score": "location", "n_locations": 4}),
    "luong-local-m": ("luong", {"where": "local-m", "window": 2}),
    "luong-local-p": ("luong", {"where": "local-p", "window": 2}),
    "luong-unfed": ("luong", {"input_feeding": False}),
    "luong-unfed-local-m": ("luong", {"input_feeding": False, "where": "local-m", "window": 1}),
    "transformer": ("transformer", {}),
    "transformer-pre-norm": ("transformer", {"norm_first": True}),
    "transformer-untied": ("transformer", {"tie_embeddings": False}),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def build(name: str, seed: int = 1, **fields: Any) -> Translator:
    """Make a tiny float64 translator whose weights are large enough that everything in it matters."""
    entry, generator = MODELS[name], seeded(seed)
    config = entry.config.from_dict({**entry.presets["tiny"], "vocab_size": 13, **fields})
    model = entry.cls(config, generator)
    assert isinstance(model, Translator)
    for parameter in model.double().parameters():
        parameter += torch.empty_like(parameter).normal_(std=0.4, generator=generator)
    return model.eval()


def kind(label: str, **fields: Any) -> Translator:
    name, own = KINDS[label]
    return build(name, **own, **fields)


def rows(*sentences: list[int], bos: bool = False) -> Tensor:
    """Lay sentences out as a translator wants them: (bos_id,) tokens, eos_id, padding."""
    whole = [[1] * bos + sentence + [2] for sentence in sentences]
    width = max(map(len, whole))
    return torch.tensor([sentence + [0] * (width - len(sentence)) for sentence in whole])


def source_and_target() -> tuple[Tensor, Tensor]:
    return rows(*SENTENCES), rows(*TRANSLATIONS, bos=True)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


def pairs(n: int, vocab_size: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sentences and their reversals."""
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    drawn = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return rows(*drawn), rows(*(sentence[::-1] for sentence in drawn), bos=True)
