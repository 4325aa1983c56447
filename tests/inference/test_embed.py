"""Texts as vectors: the mean over tokens, and files of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longscan.checkpoints.bert import read_pooling
from longscan.checkpoints.load import load_bert
from longscan.checkpoints.save import save
from longscan.data.batching import by_length
from longscan.errors import LongscanError
from longscan.inference.bert import embed
from longscan.models import Bert, BertConfig
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.wordpiece import train_wordpiece
from small_models import NAMES, build

GOOD, BAD = "a fine warm lovely film", "a poor cold dreadful film"
ROWS = [("good", f"{GOOD} number {n}") for n in range(20)] + [("bad", f"{BAD} number {n}") for n in range(20)]
TOKENIZER = train_wordpiece([text for _, text in ROWS] * 2, 150)
SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 32, "init_std": 0.1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint without heads."""
    directory = tmp_path_factory.mktemp("bert") / "model"
    config = BertConfig.from_dict({**SIZES, "vocab_size": TOKENIZER.vocab_size, "head": "none"})
    save(Bert(config, torch.Generator().manual_seed(0)), directory, TOKENIZER)
    return directory


def test_embedding_is_the_mean_over_tokens(bert: Path) -> None:
    found = load_bert(bert, "none")
    texts = [GOOD, "film", BAD]
    framed, vectors = found.tokenizer.frame_batch(texts), embed(found, texts, rows=2)
    for one, vector in zip(framed, vectors, strict=True):
        mean = found.model(torch.tensor([one.ids])).hidden[0].mean(0)
        assert (vector - mean / mean.norm()).abs().max() < 1e-6
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert [len(batch) for batch in by_length(framed, 2)] == [2, 1]


def test_embed(cli: Any, bert: Path, tmp_path: Path) -> None:
    lines = [line.split("\t") for line in cli("embed", bert, GOOD, BAD, GOOD).out.splitlines()]
    assert [(float(cosine), a, b) for cosine, a, b in lines[:1]] == [(1.0, GOOD, GOOD)]
    assert len(lines) == 3
    (tmp_path / "texts.txt").write_text(f"{GOOD}\n{BAD}\n")
    done = cli("embed", bert, "--file", tmp_path / "texts.txt", "--out", tmp_path / "vectors.npy")
    assert (done.code, done.out) == (0, f"2 vectors of 16 numbers in {tmp_path / 'vectors.npy'}\n")
    vectors = np.load(tmp_path / "vectors.npy")
    shown = [
        json.loads(line) for line in cli("embed", bert, "--json", stdin=f"{GOOD}\n{BAD}").out.splitlines()
    ]
    assert np.allclose([row["vector"] for row in shown], vectors)
    assert [row["text"] for row in shown] == [GOOD, BAD]


def test_embed_misuse(cli: Any, bert: Path, tmp_path: Path) -> None:
    for code, words, arguments in (
        (2, "2 to 50 texts to compare, got 1", (bert, "film")),
        (2, "no text given", (bert, "--json")),
        (2, "ends in .npy", (bert, "film", "--out", tmp_path / "a.txt")),
        (2, "not both", (bert, "film", "--file", tmp_path / "a.txt")),
        (1, "text 2 is empty", (bert, "film", " ")),
        (1, "a.txt", (bert, "--file", tmp_path / "a.txt")),
    ):
        done = cli("embed", *arguments)
        assert (done.code, done.out) == (code, ""), words
        assert words in done.err


@pytest.mark.parametrize("verb", ["embed", "fill-mask"])
def test_a_model_of_the_hub_is_not_fetched_offline(cli: Any, verb: str) -> None:
    done = cli(verb, "nobody/nothing", "[MASK]", "film", "--revision", "v1", "--offline")
    assert (done.code, done.out) == (1, "")
    assert "the hub is not asked (offline)" in done.err


def test_files_of_sentence_transformers_are_minded(cli: Any, bert: Path, tmp_path: Path) -> None:
    found = load_bert(bert)
    save(found.model, tmp_path / "model", found.tokenizer)
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    done = cli("embed", tmp_path / "model", "film", GOOD)
    assert "1 of 2 texts was cut at 6 tokens" in done.err
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    done = cli("embed", tmp_path / "model", "film", GOOD)
    assert (done.code, done.out) == (1, "")
    assert "pooling_mode_mean_tokens" in done.err


POOLINGS: dict[str, tuple[dict[str, Any], str]] = {
    "new-cls": ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
    "new-mean": ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
    "old-cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    "old-mean": ({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, "mean"),
    "empty": ({}, "mean"),
}


@pytest.mark.parametrize(("pooling", "expected"), POOLINGS.values(), ids=POOLINGS)
def test_both_spellings_of_a_pooling(pooling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = ("Transformer", "Pooling", "Normalize")
    steps = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    assert read_pooling(tmp_path) == expected


def modules(*paths: str) -> str:
    kinds = ("Transformer", "Pooling", "Normalize")
    named = zip(kinds, paths, strict=False)
    return json.dumps(
        [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in named]
    )


def test_the_pooling_is_where_modules_json_says(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules("", "2_Pooling", "3_Normalize"))
    with pytest.raises(LongscanError, match=r"2_Pooling/config.json is missing"):
        read_pooling(tmp_path)
    (tmp_path / "2_Pooling").mkdir()
    (tmp_path / "2_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert read_pooling(tmp_path) == "cls"


@pytest.mark.parametrize("text", ["{}", "[1]", "[[]", modules(""), modules("0_T", "1_P"), modules("", "..")])
def test_other_lists_of_modules(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(LongscanError, match=r"modules.json: expected"):
        read_pooling(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "weights": [1]}),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}]),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
    ],
)
def test_vectors_that_are_made_in_another_way(file: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(LongscanError, match=file):
        read_pooling(tmp_path)


# causal models


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_model_gives_the_mean_of_its_final_hidden_states(name: str) -> None:
    model, tokenizer = build(name=name), ByteTokenizer()
    texts = [GOOD, "film"]
    vectors = embed((model, tokenizer), texts)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer.encode(text)]), return_hidden=True).hidden
        assert hidden is not None
        expected = torch.nn.functional.normalize(hidden[-1][0].mean(0), dim=0)
        assert torch.allclose(vector, expected.float(), atol=1e-6)


def test_a_causal_model_refuses_what_has_no_vector() -> None:
    model, tokenizer = build(), ByteTokenizer()
    with pytest.raises(LongscanError, match="got none"):
        embed((model, tokenizer), [""])
    with pytest.raises(LongscanError, match="expected a Tokenizer"):
        embed((model, None), ["x"])  # type: ignore[arg-type]
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(LongscanError, match="NaN or infinite states"):
        embed((model, tokenizer), ["x"])
