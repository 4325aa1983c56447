"""Measuring: every byte is predicted once, from all that came before it in its document and nothing else."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longscan import save
from longscan.data.documents import Piece, iter_pieces
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.perplexity import Evaluation, evaluate
from longscan.inference.generate import generate
from longscan.models import Llama, LlamaConfig, Mamba, MambaConfig
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe

Cli = Callable[..., Any]
BYTES = ByteTokenizer()
TEXT = "The captain had not spoken since the morning.\nNobody asked him why; Zoë smiled.\n" * 4
DOCUMENTS = [TEXT, "a", TEXT[:32], "", "Two\nlines", TEXT[:31], "é", TEXT[5:]]


def build(vocab_size: int = 257) -> Mamba:
    config = MambaConfig(d_model=16, n_layers=2, d_state=4, vocab_size=vocab_size)
    return Mamba(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def model() -> Mamba:
    return build()


@pytest.mark.parametrize("use", [evaluate, generate], ids=["evaluate", "generate"])
def test_no_tokenizer_is_an_error_with_a_remedy(use: Callable[..., Any], model: Mamba) -> None:
    with pytest.raises(UsageError, match=r"expected a Tokenizer, got None.*load\(name, tokenizer="):
        use(model, None, TEXT if use is generate else DOCUMENTS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save(build(), path, BYTES)
    return path


@torch.no_grad()
def by_hand(model: Mamba, documents: list[str]) -> float:
    """One full forward pass for each document."""
    nats = 0.0
    for ids in filter(None, map(BYTES.encode, documents)):
        logits = model(torch.tensor([[BYTES.eos_id, *ids[:-1]]])).logits[0, :, : BYTES.vocab_size]
        nats += F.cross_entropy(logits.double(), torch.tensor(ids), reduction="sum").item()
    return nats


# 32: a document ends exactly where a chunk does
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 100, 1024])
def test_chunks_of_any_size_give_what_full_passes_give(model: Mamba, chunk_size: int) -> None:
    result = evaluate(model, BYTES, DOCUMENTS, chunk_size=chunk_size)
    size = len("".join(DOCUMENTS).encode())
    assert (result.tokens, result.bytes, result.documents) == (size, size, len(DOCUMENTS))
    assert result.nats == pytest.approx(by_hand(model, DOCUMENTS), rel=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 32, 100])
def test_pieces_are_the_document(model: Mamba, cut: int) -> None:
    pieces = [Piece(TEXT[:cut], ends=False), Piece(TEXT[cut:], ends=True), Piece("next", ends=True)]
    result = evaluate(model, BYTES, pieces, chunk_size=32)
    assert result.nats == pytest.approx(by_hand(model, [TEXT, "next"]), rel=1e-6)
    assert result.documents == 2


def test_byte_level_bpe_gives_the_same_tokens_for_the_pieces_of_a_file(tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 320)
    model = build(tokenizer.vocab_size)
    text = TEXT + "\n\n   indented\r\n\n" + TEXT
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(iter_pieces(tmp_path / "a.txt", piece_size=50))
    assert len(pieces) > 5
    whole, parts = evaluate(model, tokenizer, [text]), evaluate(model, tokenizer, pieces)
    assert (
        (parts.tokens, parts.bytes)
        == (whole.tokens, whole.bytes)
        == (
            len(tokenizer.encode(text)),
            len(text.encode()),
        )
    )
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)


def test_memory_is_that_of_a_chunk(model: Mamba) -> None:
    taken, passes = 0, []

    def pieces() -> Iterator[Piece]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield Piece(TEXT, ends=number == 39)

    hook = model.backbone.register_forward_pre_hook(lambda _, args: passes.append((args[0].shape, taken)))
    result = evaluate(model, BYTES, pieces(), chunk_size=128)
    hook.remove()
    assert max(rows * length for (rows, length), _ in passes) == 128
    assert sum(length for (_, length), _ in passes) == result.tokens
    read = 0
    for (_, length), pulled in passes:  # text is asked for when the chunk before it is done
        read += length
        assert pulled * len(TEXT.encode()) < read + len(TEXT.encode()) + 128


@pytest.mark.parametrize("chunk_size", [7, 32, 1024])
def test_a_model_with_positions_reads_long_documents_in_windows(chunk_size: int) -> None:
    """Of 20 tokens, wherever chunks are cut; warnings are errors, so no text got longer."""
    config = LlamaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_positions=20)
    model = Llama(config, torch.Generator().manual_seed(0)).eval()
    nats = 0.0
    for ids in filter(None, map(BYTES.encode, DOCUMENTS)):
        read = torch.tensor([BYTES.eos_id, *ids[:-1]]).split(20)
        for window, targets in zip(read, torch.tensor(ids).split(20), strict=True):
            logits = model(window[None]).logits[0, :, :257].double()
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
    result = evaluate(model, BYTES, DOCUMENTS, chunk_size=chunk_size)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.documents == len(DOCUMENTS)


def test_many_short_documents_share_a_pass(model: Mamba) -> None:
    passes: list[int] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    evaluate(model, BYTES, ["ab"] * 300, chunk_size=100)
    hook.remove()
    assert passes == [100] * 6


def test_progress_ends_with_the_result(model: Mamba) -> None:
    seen: list[Evaluation] = []
    result = evaluate(model, BYTES, DOCUMENTS, chunk_size=64, progress=seen.append)
    assert [now.tokens for now in seen[:-1]] == [64 * (i + 1) for i in range(len(seen) - 1)]
    assert (seen[-1].nats, seen[-1].bytes) == (result.nats, result.bytes)
    assert all(now.bits_per_byte > 0 for now in seen)


def test_the_numbers_mean_what_they_say() -> None:
    one = Evaluation(nats=8 * math.log(2), tokens=4, bytes=16, documents=1, seconds=2.0)
    assert one.bits_per_byte == pytest.approx(0.5)
    assert one.perplexity == pytest.approx(4.0)
    assert one.tokens_per_second == 2.0
    two = one + Evaluation(nats=0.0, tokens=4, bytes=16, documents=2, seconds=2.0)
    assert (two.bits_per_byte, two.perplexity, two.documents) == (
        pytest.approx(0.25),
        pytest.approx(2.0),
        3,
    )
    assert Evaluation(nats=1e6, tokens=1, bytes=1, documents=1, seconds=1.0).perplexity == math.inf


def test_what_cannot_be_measured_is_an_error(model: Mamba) -> None:
    for nothing in ([], [""]):
        with pytest.raises(LongscanError, match="no text to evaluate"):
            evaluate(model, BYTES, nothing)
    with pytest.raises(UsageError, match="chunk_size: expected 1 or more, got 0"):
        evaluate(model, BYTES, ["a"], chunk_size=0)
    with pytest.raises(LongscanError, match="the tokenizer has 257 ids, the model 100"):
        evaluate(build(100), BYTES, ["a"])
    broken = build()
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(torch.nan)
    with pytest.raises(LongscanError, match="the loss is not finite after 1 tokens"):
        evaluate(broken, BYTES, ["a"])


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in ("first", "second é", TEXT)]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "c.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return folder


def test_the_command_measures_what_the_library_measures(
    cli: Cli, directory: Path, files: Path, model: Mamba
) -> None:
    expected = evaluate(model, BYTES, [TEXT, "first", "second é", TEXT, TEXT])
    done = cli("evaluate", directory, files)
    assert done.code == 0
    assert done.out.startswith(
        f"{expected.bits_per_byte:.4f} bits/byte · perplexity {expected.perplexity:,.2f} per token · "
        f"{expected.tokens:,} tokens · {expected.bytes:,} bytes · 5 documents · "
    )
    assert done.err.startswith(f"{directory} · Mamba, ")
    quiet = cli("evaluate", directory, files, "--json", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    report = json.loads(quiet.out)
    assert report["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert (report["tokens"], report["documents"]) == (expected.tokens, 5)


def test_a_line_for_each_file_and_the_total(cli: Cli, directory: Path, files: Path) -> None:
    whole = json.loads(cli("evaluate", directory, files, "--json").out)
    report = json.loads(cli("evaluate", directory, files, "--json", "--per-file").out)
    parts = report.pop("files")
    assert [Path(part["file"]).name for part in parts] == ["a.txt", "b.jsonl", "c.txt.gz"]
    assert parts[0]["bits_per_byte"] == pytest.approx(parts[2]["bits_per_byte"])
    assert sum(part["tokens"] for part in parts) == report["tokens"] == whole["tokens"]
    assert report["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-6)
    lines = cli("evaluate", directory, files, "--per-file", "-q").out.splitlines()
    assert lines[0].split() == ["bits/byte", "perplexity", "tokens", "bytes", "file"]
    assert [line.split()[-1] for line in lines[1:]] == [*(part["file"] for part in parts), "total"]
    assert lines[-1].split()[0] == f"{report['bits_per_byte']:.4f}"


def test_a_separator_divides_a_file(cli: Cli, directory: Path, tmp_path: Path, model: Mamba) -> None:
    (tmp_path / "a.txt").write_text("one<end>two<end>three", encoding="utf-8")
    report = json.loads(cli("evaluate", directory, tmp_path / "a.txt", "--separator", "<end>", "--json").out)
    assert report["documents"] == 3
    expected = evaluate(model, BYTES, ["one", "two", "three"])
    assert report["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "no such file or folder"),
        ("empty.txt", b"", "empty, or only white space"),
        ("binary.txt", b"a\x00b", "is not UTF-8 text: byte 0x00 at offset 1"),
        ("latin.txt", "Zoë".encode("latin-1"), "is not UTF-8 text: byte 0xEB at offset 2"),
    ],
)
def test_bad_files_are_found_before_any_work(
    cli: Cli, tmp_path: Path, files: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = cli("evaluate", "/no/model", files, tmp_path / name, "--per-file")
    assert (done.code, done.out) == (1, "")
    assert words in done.err


def test_misuse_exits_with_2(cli: Cli, directory: Path, files: Path) -> None:
    assert cli("evaluate", directory).code == 2
    assert "threads: expected 1 to 1,024, got -1." in cli("evaluate", directory, files, "--threads", -1).err
    assert cli("evaluate", directory, files, "--separator", "").code == 2


def test_models_that_cannot_read_text(cli: Cli, tmp_path: Path, files: Path) -> None:
    assert cli("evaluate", tmp_path, files).code == 1
    save(build(), tmp_path / "mute")
    done = cli("evaluate", tmp_path / "mute", files)
    assert done.code == 1
    assert "has no tokenizer" in done.err


def test_a_file_name_that_is_not_utf8_is_printed(cli: Cli, directory: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"Once upon a time.")
    done = cli("evaluate", directory, tmp_path, "--per-file", "-q")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].endswith(r"caf\udce9.txt")
    report = json.loads(cli("evaluate", directory, tmp_path, "--per-file", "--json").out)
    assert os.fsencode(report["files"][0]["file"]) == path
