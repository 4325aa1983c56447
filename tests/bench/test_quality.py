"""`longscan bench quality`: what a precision costs, against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.bench.suites import quality
from longscan.checkpoints.load import load
from longscan.checkpoints.save import quantize, save
from longscan.errors import LongscanError
from longscan.evaluation.perplexity import Source, evaluate
from longscan.models import Mamba, MambaConfig
from longscan.models.common.quantization import KINDS, ROUNDED
from longscan.tokenizers.base import ByteTokenizer

BYTES = ByteTokenizer()
TEXT = "The captain had not spoken since the morning. " * 9


def make(**fields: Any) -> Mamba:
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 257, "d_state": 4}
    return Mamba(MambaConfig.from_dict(sizes | fields), torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def model() -> Mamba:
    return make()


@pytest.fixture
def plain(model: Mamba, tmp_path: Path) -> Path:
    save(model, tmp_path / "plain", BYTES)
    return tmp_path / "plain"


@pytest.fixture
def int4(plain: Path, tmp_path: Path) -> Path:
    quantize(plain, tmp_path / "int4", "int4")
    return tmp_path / "int4"


def test_quality_against_the_definitions(cli: Any, plain: Path, model: Mamba, tmp_path: Path) -> None:
    documents = [TEXT, "Zoë smiled."]
    (tmp_path / "a.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    done = cli("bench", "quality", "--test", tmp_path / "a.txt", "--model", plain, "--json")
    assert done.code == 0, done.err
    (suite,) = json.loads(done.out)["suites"]
    assert [row["contender"] for row in suite["rows"]] == ["float32", "bf16", "int8", "int4", "w8a8", "w4a8"]
    models = {"float32": model} | {kind: load(plain, precision=kind)[0] for kind in (*KINDS, *ROUNDED)}
    for row in suite["rows"]:
        other = models[row["contender"]]
        expected = evaluate(other, BYTES, documents)
        assert (row["tokens"], row["bytes"]) == (expected.tokens, expected.bytes)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
        assert row["weight_bytes"] == sum(tensor.nbytes for tensor in other.state_dict().values())
        divergence, same = [], []
        for document in documents:
            ids = torch.tensor([[BYTES.eos_id, *BYTES.encode(document)[:-1]]])
            with torch.no_grad():
                p, q = (
                    network(ids).logits[0, :, : BYTES.vocab_size].double().log_softmax(1)
                    for network in (model, other)
                )
            divergence += (p.exp() * (p - q)).sum(1).tolist()
            same += (p.argmax(1) == q.argmax(1)).tolist()
        assert row["kl_nats_per_token"] == pytest.approx(sum(divergence) / len(divergence), abs=1e-7)
        assert row["same_top_token"] == pytest.approx(sum(same) / len(same), abs=0.02)
    kl = [row["kl_nats_per_token"] for row in suite["rows"]]
    assert 0 == kl[0] < kl[1] < kl[2] < kl[3]
    assert [ratio["measured"] for ratio in suite["ratios"]] == [
        row["weight_bytes"] / suite["rows"][0]["weight_bytes"] for row in suite["rows"][1:]
    ]


def test_quality_table(cli: Any, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    done = cli("bench", "quality", "--test", tmp_path / "a.txt", "--model", plain)
    assert done.code == 0, done.err
    for words in (f"{len(TEXT)} tokens", "mean KL", "same top token", "100.00 %", "bits per weight"):
        assert words in done.out


def test_quality_misuse(cli: Any, int4: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    for argv, code, words in (
        ([], 2, "expected --test FILE"),
        (["--test", "a.txt", "--train", "a.txt"], 2, "and no --train"),
        (["text", "--test", "a.txt"], 2, "text runs alone"),
        (["--test", "a.txt", "--quick"], 2, "quality runs alone"),
        (["--test", "none.txt"], 1, "no such file or folder"),
        (["--test", tmp_path / "a.txt", "--model", int4], 1, "is quantised already (int4)"),
    ):
        done = cli("bench", "quality", *argv)
        assert (done.code, done.out) == (code, ""), argv
        assert words in done.err
    with pytest.raises(LongscanError, match="no text to evaluate"):
        quality.run({"float32": make()}, BYTES, Source(BYTES, []))


def test_quality_of_damaged_weights() -> None:
    broken = make()
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(math.nan)
    with pytest.raises(LongscanError, match="the loss of b is not finite"):
        quality.run({"a": make(), "b": broken}, BYTES, Source(BYTES, ["abc"]))
