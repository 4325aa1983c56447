"""What BERT is pre-trained on: the paper's counts, and the same batch whenever it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longscan.checkpoints.load import load_bert
from longscan.checkpoints.save import save
from longscan.core.random import RandomStream
from longscan.data.masked_pairs import PairDataset, hide
from longscan.data.token_files import prepare
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.masked_lm import measure
from longscan.models import Bert, BertConfig
from longscan.tokenizers.sentences import SentenceTokenizer, split_sentences
from longscan.tokenizers.wordpiece import WordPieceTokenizer, train_wordpiece
from longscan.training.config import TrainConfig
from longscan.training.train import resume, train
from stand_ins import PowerCut

NAMES = "alpha beta gamma delta epsilon zeta".split()
# in each document every sentence has the document's name and its own number, so that pairs can be checked
DOCUMENTS = [
    " ".join(f"{name.capitalize()} has number {n} here." for n in range(30 + 5 * i))
    for i, name in enumerate(NAMES)
]
TOKENIZER = train_wordpiece(DOCUMENTS, 200)
SEQ_LEN = 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n\n\n".join(DOCUMENTS))
    return file


@pytest.fixture(scope="module")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens") / "data"
    files = prepare(corpus, SentenceTokenizer(TOKENIZER), place, valid_fraction=0, separator="\n\n\n")
    return files.train.path


def dataset(tokens: Path, batch_size: int = 8, seed: int = 0) -> PairDataset:
    return PairDataset(tokens, TOKENIZER, SEQ_LEN, batch_size, seed)


def sentence(ids: list[int]) -> list[tuple[str, int]]:
    """The names and numbers of the whole sentences in a stretch."""
    words = TOKENIZER.decode(ids).split()
    starts = [
        i for i, word in enumerate(words) if word in NAMES and words[i + 1 : i + 3] == ["has", "number"]
    ]
    return [(words[i], int(words[i + 3])) for i in starts if "here." in words[i + 3 : i + 6]]


def unmasked(batch: Any) -> Tensor:
    return torch.where(batch.labels == -100, batch.ids, batch.labels)


def stretches(batch: Any) -> Iterator[tuple[list[int], list[int], int]]:
    """The ids of A and B of each pair, and its label."""
    for ids, types, label in zip(unmasked(batch), batch.types, batch.is_random, strict=True):
        row = ids[ids != TOKENIZER.pad_id].tolist()
        n_second = int(types.sum())
        first, second = row[: len(row) - n_second], row[len(row) - n_second :]
        assert (first[0], first[-1], second[-1]) == (TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.sep_id)
        assert TOKENIZER.sep_id not in (*first[1:-1], *second[:-1])
        yield first[1:-1], second[:-1], int(label)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("Mr. Bennet and Mrs. Hill met Dr. No.", ["Mr. Bennet and Mrs. Hill met Dr. No."]),
        ("It cost 3.50 in all, i.e. nothing.", ["It cost 3.50 in all, i.e. nothing."]),
        ("a line\nanother\n\n\nthird", ["a line", "another", "third"]),
        (
            "床前明月光，疑是地上霜。举头望明月？“是。”低头",
            ["床前明月光，疑是地上霜。", "举头望明月？", "“是。”", "低头"],
        ),
        ("", []),
        (" \n ", []),
    ],
    ids=["marks", "quotes", "titles", "numbers", "lines", "chinese", "empty", "space"],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_token_files_keep_sentences_apart() -> None:
    ids = SentenceTokenizer(TOKENIZER).encode("alpha has number 1 here. beta has number 2 here.\n\x00\n")
    sep = TOKENIZER.sep_id
    assert ids == [*TOKENIZER.encode("alpha has number 1 here. beta has number 2 here."), sep]
    ids = SentenceTokenizer(TOKENIZER).encode("Alpha has number 1 here. Beta has number 2 here.\n\x00\n")
    assert ids.count(sep) == 2
    assert ids[-1] == sep


def test_a_batch_is_a_function_of_seed_and_number(tokens: Path) -> None:
    one, other = dataset(tokens), dataset(tokens)
    late = 3 * one.pairs_per_epoch // 8 + 1  # in the fourth epoch
    for step in (0, late, 5, 0):
        assert all(map(torch.equal, one.batch(step), other.batch(step)))
    assert not torch.equal(one.batch(0).ids, dataset(tokens, seed=1).batch(0).ids)
    assert not torch.equal(one.batch(0).ids, one.batch(1).ids)


def test_the_pairs_are_the_ones_that_runs_are_made_with(tokens: Path) -> None:
    found = [pair for step in (0, 40) for pair in stretches(dataset(tokens).batch(step))]
    starts = [(*sentence(first)[0], label) for first, _, label in found if sentence(first)]
    assert starts == [
        *(("epsilon", 49, 1), ("gamma", 28, 0), ("beta", 0, 1), ("zeta", 9, 0), ("zeta", 33, 1)),
        *(("zeta", 5, 1), ("delta", 34, 1), ("delta", 16, 1), ("beta", 2, 1), ("zeta", 5, 0)),
        *(("zeta", 34, 0), ("epsilon", 41, 0), ("alpha", 8, 0), ("beta", 22, 0), ("gamma", 1, 0)),
        ("zeta", 41, 0),
    ]


def test_an_epoch_is_cut_and_hidden_anew(tokens: Path) -> None:
    data = dataset(tokens, batch_size=1)
    size = data.pairs_per_epoch
    first = {tuple(unmasked(data.batch(n))[0].tolist()) for n in range(size)}
    second = {tuple(unmasked(data.batch(size + n))[0].tolist()) for n in range(size)}
    assert len(first - second) > size / 2


def test_pairs_follow_or_are_random(tokens: Path) -> None:
    data = dataset(tokens)
    found = [pair for step in range(40) for pair in stretches(data.batch(step))]
    same = 0
    for first, second, is_random in found:
        assert len(first) + len(second) + 3 <= SEQ_LEN
        a, b = sentence(first), sentence(second)
        for run in (a, b):  # sentences in a row, of one document
            assert all(y == (x[0], x[1] + 1) for x, y in pairwise(run))
        if not (a and b):
            continue
        if is_random:
            same += a[0][0] == b[0][0]
        else:
            assert a[0][0] == b[0][0]
            assert 1 <= b[0][1] - a[-1][1] <= 3  # what lies between was cut off
    assert same == 0  # there are other documents to draw from
    share = sum(is_random for _, _, is_random in found) / len(found)
    assert abs(share - 0.5) < 3 * 0.5 / math.sqrt(len(found)) + 0.05  # single sentences are always random


def test_every_sentence_is_read(tokens: Path) -> None:
    data = dataset(tokens, batch_size=1)
    seen = {
        item
        for n in range(data.pairs_per_epoch)
        for first, second, _ in stretches(data.batch(n))
        for item in (*sentence(first), *sentence(second))
    }
    assert len(seen) > 0.75 * sum(30 + 5 * i for i in range(len(NAMES)))  # the rest is cut at edges


def test_lengths(tokens: Path) -> None:
    """Nine in ten pairs aim at all the room there is."""
    data = dataset(tokens, batch_size=data_size(tokens))
    lengths = (data.batch(0).ids != TOKENIZER.pad_id).sum(1)
    assert lengths.max() == SEQ_LEN
    assert 0.6 < (lengths > 0.8 * SEQ_LEN).float().mean() < 1


def data_size(tokens: Path) -> int:
    return dataset(tokens).pairs_per_epoch


def test_counts_of_hidden_words() -> None:
    """15 % of all tokens, rounded, at least one; 80 / 10 / 10 within three standard deviations."""
    vocab = TOKENIZER.vocab_size
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(5, vocab, (600, 64)))
    lengths = torch.from_numpy(draw.integers(3, 65, 600))
    place = torch.arange(64)
    ids = torch.where(place < lengths[:, None], ids, TOKENIZER.pad_id)
    ids[:, 0] = TOKENIZER.cls_id
    ids[torch.arange(600), lengths - 1] = TOKENIZER.sep_id
    after, labels = hide(ids, TOKENIZER, RandomStream(1, 2), limit=8)
    chosen = labels != -100
    assert chosen.sum(1).tolist() == [min(8, max(1, round(0.15 * n))) for n in lengths.tolist()]
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(after[~chosen], ids[~chosen])
    assert not chosen[(ids == TOKENIZER.cls_id) | (ids == TOKENIZER.sep_id) | (ids == 0)].any()
    total = int(chosen.sum())
    kept = after[chosen] == ids[chosen]
    masked = after[chosen] == TOKENIZER.mask_id
    replaced = ~kept & ~masked
    random_share = 0.1 * (1 - 2 / vocab)  # a random entry may be the same one, or [MASK]
    for found, share in ((masked, 0.8 + 0.1 / vocab), (kept, 0.1 + 0.1 / vocab), (replaced, random_share)):
        deviation = math.sqrt(share * (1 - share) / total)
        assert abs(found.float().mean().item() - share) < 3 * deviation
    assert (after[chosen][replaced] < 5).any() or vocab > 500, "special entries are drawn too"
    every = chosen[lengths == 64].float().mean(0)[1:63]  # no place is preferred
    assert every.max() < 0.6


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("alpha has number 1 here.")
    files = prepare(tmp_path / "text.txt", SentenceTokenizer(TOKENIZER), tmp_path / "data", valid_fraction=0)
    with pytest.raises(LongscanError, match="1 sentence: pairs need two"):
        dataset(files.train.path)


def test_too_little_room(tokens: Path) -> None:
    with pytest.raises(UsageError, match="seq_len: expected 8 or more"):
        PairDataset(tokens, TOKENIZER, 7, 2)


def test_one_document_gives_pairs_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(DOCUMENTS[0])
    files = prepare(tmp_path / "text.txt", SentenceTokenizer(TOKENIZER), tmp_path / "data", valid_fraction=0)
    data = dataset(files.train.path)
    assert set(data.batch(0).is_random.tolist() + data.batch(1).is_random.tolist()) == {0, 1}


# the run

TINY: dict[str, Any] = {
    "model": "bert",
    "preset": "tiny",
    "vocab_size": 120,
    "separator": "\n\n\n",
    "valid_fraction": 0.3,
    "seq_len": 32,
    "batch_size": 4,
    "accumulate": 2,
    "steps": 6,
    "lr": 1e-2,
    "save_every": 2,
    "eval_every": 3,
    "eval_windows": 8,
    "threads": 1,
}


@pytest.fixture(scope="module")
def config(corpus: Path) -> TrainConfig:
    return TrainConfig.from_dict({**TINY, "data": [str(corpus)]})


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    result = train(config, directory)
    assert (result.step, result.total, result.stopped_by) == (6, 6, None)
    return directory


def metrics(directory: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_run_measures_both_tasks_and_what_guessing_gives(whole: Path) -> None:
    [*_, last] = [record for record in metrics(whole) if "valid_loss" in record]
    assert last["step"] == 6
    assert last["valid_loss"] == pytest.approx(last["valid_word_loss"] + last["valid_next_loss"])
    assert 0 < last["valid_word_baseline"] < 1
    assert 0.5 <= last["valid_next_baseline"] < 1
    found = load_bert(whole / "model")
    assert (found.fresh, found.model.config.head) == ((), "pretraining")


def test_a_step_in_parts_is_the_whole_step(config: TrainConfig, tmp_path: Path) -> None:
    """Masked words are weighted by words, next sentences by pairs, however many of either a part has."""
    still = config.replace(option=("dropout=0", "attention_dropout=0"), steps=1)
    losses = []
    for batch_size, accumulate in ((8, 1), (2, 4), (1, 8)):
        directory = tmp_path / str(batch_size)
        train(still.replace(batch_size=batch_size, accumulate=accumulate), directory, figures=False)
        losses.append(metrics(directory)[0])
    assert [step["loss"] for step in losses] == pytest.approx(3 * [losses[0]["loss"]], rel=1e-5)
    assert [step["grad_norm"] for step in losses] == pytest.approx(3 * [losses[0]["grad_norm"]], rel=1e-4)
    assert len({step["tokens"] for step in losses}) == 1


@pytest.mark.parametrize("after", [1, 3])  # before the first checkpoint and behind it
def test_a_stopped_run_goes_on_bit_for_bit(
    after: int, config: TrainConfig, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)train --resume"):
        train(config, tmp_path / "run", PowerCut(after))
    assert resume(tmp_path / "run").step == 6
    names = ("model/model.safetensors", "checkpoints/step-000006/model.safetensors")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(tmp_path / "run") == metrics(whole)


def test_it_learns(tokens: Path) -> None:
    """Names repeat in a pair, so most words can be found; the next sentence takes longer than a test."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
    vocab = {"vocab_size": TOKENIZER.vocab_size, "max_positions": SEQ_LEN, "init_std": 0.1}
    model = Bert(BertConfig.from_dict(sizes | vocab), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    data = dataset(tokens, batch_size=16)
    for step in range(120):
        words, follows = model.losses(data.batch(step))
        optimizer.zero_grad()
        (words + follows).backward()
        optimizer.step()
    found = measure(model.eval(), dataset(tokens, seed=7).walk(64), TOKENIZER.encode("number")[0])
    assert found is not None
    assert 0.1 < found["valid_word_baseline"] < 0.3
    assert found["valid_word_accuracy"] > found["valid_word_baseline"] + 0.25
    assert found["valid_next_baseline"] >= 0.5


def test_misuse(cli: Any, corpus: Path, tmp_path: Path) -> None:
    flags = ["--model", "bert", "--preset", "tiny", "--out", tmp_path / "run"]
    for extra, words in (
        (["--seq-len", 65], "expected at most 64, the positions of the model"),
        (["--tokenizer", "bytes"], "expected WordPiece"),
        (["--d-state", 4], "d_state"),
        (["--n-heads", 3], "divisor of d_model"),
    ):
        done = cli("train", corpus, *flags, "--vocab-size", 100, *extra)
        assert (done.code, done.out) == (2, ""), extra
        assert words in done.err
        assert not (tmp_path / "run").exists()


# what it is good for


def test_fill_mask(cli: Any, whole: Path, tmp_path: Path) -> None:
    done = cli("fill-mask", whole / "model", "alpha has [MASK] 3 [MASK].", "--top-k", 2)
    lines = done.out.splitlines()
    assert (done.code, lines[0]) == (0, "alpha has [MASK] 3 [MASK].")
    assert [line.strip() for line in lines if "MASK" in line][1:] == ["[MASK] 1", "[MASK] 2"]
    assert len(lines) == 1 + 2 * 3
    done = cli("fill-mask", whole / "model", "--json", stdin="[MASK]\nalpha [MASK]\n")
    first, second = map(json.loads, done.out.splitlines())
    assert (first["text"], second["text"]) == ("[MASK]", "alpha [MASK]")
    shares = [guess["probability"] for guess in second["masks"][0]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)


def test_fill_mask_misuse(cli: Any, whole: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    model = Bert(BertConfig(d_model=8, n_layers=1, n_heads=1, vocab_size=TOKENIZER.vocab_size, head="none"))
    save(model, bare, TOKENIZER)
    for code, words, arguments in (
        (2, "no [MASK] in the text", (whole / "model", "alpha has number")),
        (2, "--top-k", (whole / "model", "[MASK]", "--top-k", 0)),
        (1, "64 positions", (whole / "model", "alpha " * 70 + "[MASK]")),
        (1, "has no cls.predictions.* weights", (bare, "[MASK]")),
    ):
        done = cli("fill-mask", *arguments)
        assert (done.code, done.out) == (code, ""), words
        assert words in done.err


def test_guesses_are_those_of_the_equation(whole: Path) -> None:
    from longscan.inference.bert import fill_mask

    found = load_bert(whole / "model")
    tokenizer: WordPieceTokenizer = found.tokenizer
    [guesses] = fill_mask(found, "alpha has [MASK] 3 here.", 3)
    ids = tokenizer.frame(tokenizer.encode_masked("alpha has [MASK] 3 here.")).ids
    place = ids.index(tokenizer.mask_id)
    w = load_file(whole / "model" / "model.safetensors")
    hidden = found.model(torch.tensor([ids])).hidden[0, place].detach()
    x = hidden @ w["cls.predictions.transform.dense.weight"].T + w["cls.predictions.transform.dense.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-12)
    x = x * w["cls.predictions.transform.LayerNorm.weight"] + w["cls.predictions.transform.LayerNorm.bias"]
    p = (w["bert.embeddings.word_embeddings.weight"] @ x + w["cls.predictions.bias"]).softmax(0)
    best = p.topk(3)
    assert [guess.token for guess in guesses] == [tokenizer.token(n) for n in best.indices.tolist()]
    assert [guess.probability for guess in guesses] == pytest.approx(best.values.tolist(), abs=1e-6)
