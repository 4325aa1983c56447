"""The suite translate: that the contenders do the same work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longscan.bench.contenders import translators
from longscan.bench.suites.translate import ELDERS, TARGET_TOKENS

FIELDS = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "dropout": 0.0}


def test_sentences_are_what_a_translator_reads() -> None:
    source, target = translators.sentences(500, 64)
    assert source.shape == (500, 17)
    assert target.shape == (500, 18)
    assert (target[:, 0] == 1).all()
    for ids in (source, target[:, 1:]):
        assert ((ids == 2).sum(1) == 1).all()
        ends = (ids == 2).nonzero()[:, 1]
        assert all(not ids[i, end + 1 :].any() and ids[i, :end].min() > 2 for i, end in enumerate(ends))
    assert abs((target[:, 1:] != 0).sum(1).double().mean() - TARGET_TOKENS) < 0.2


def test_torchs_transformer_is_ours() -> None:
    ours, theirs = translators.ours("transformer", FIELDS), translators.TorchTransformer(FIELDS)
    norms = 2 * 2 * 32  # torch's stacks end in a norm of their own
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters() + norms
    assert theirs(*translators.sentences(2, 64)).shape == (2, 18, 64)


def test_marian_is_ours_too() -> None:
    pytest.importorskip("transformers")
    ours, theirs = translators.ours("transformer", FIELDS), translators.marian(FIELDS)
    positions = 2 * 64 * 32  # they are no parameters here
    learnt = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert abs(learnt - ours.num_parameters()) <= positions


@pytest.mark.parametrize("name", ["transformer", *ELDERS])
def test_ours_run(name: str) -> None:
    fields: dict[str, Any] = (
        {**FIELDS} if name == "transformer" else {"vocab_size": 64, "d_embedding": 8, "d_hidden": 8}
    )
    if name == "bahdanau":
        fields |= {"d_align": 8, "d_maxout": 8}
    translators.train_ours(name, fields, 2)()
    assert translators.translate_ours(name, fields, 2, 3, 4)() == {"tokens": 4}


def test_peers_run() -> None:
    translators.train_torch(FIELDS, 2)()
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    translators.train_marian(FIELDS, 2)()
    assert translators.translate_marian(FIELDS, 2, 3, 4)() == {"tokens": 4}


def test_decoding_with_and_without_the_cache() -> None:
    for cached in (True, False):
        translators.decode_ours(FIELDS, 2, 3, cached)()
