"""`longscan bench text`: counting as the textbook counts, probabilities that sum to one, one honest table."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longscan import save
from longscan.bench import runner
from longscan.bench.contenders import ngram
from longscan.bench.contenders.ngram import NGram
from longscan.bench.suites import text
from longscan.data.documents import Corpus
from longscan.evaluation.perplexity import evaluate
from longscan.models import Mamba, MambaConfig
from longscan.tokenizers.base import ByteTokenizer

EOS, VOCAB = 3, 9  # the last id never occurs
Gram = tuple[int, ...]


def documents(seed: int, count: int = 60) -> list[list[int]]:
    """Random texts in which some words follow others more often, one of them empty."""
    draw = np.random.default_rng(seed)
    words = [word for word in range(VOCAB - 1) if word != EOS]
    found: list[list[int]] = [[]]
    for _ in range(count):
        place, ids = 0, []
        for step in draw.geometric(0.5, size=draw.integers(1, 14)):
            place = (2 * place + int(step)) % len(words)
            ids.append(words[place])
        found.append(ids)
    return found


def stream(texts: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Lay documents end to end as token files hold them."""
    return np.array([token for ids in texts for token in (*ids, EOS)], dtype=np.uint16)


class Textbook:
    """The same model in dictionaries, one n-gram at a time; a document opens with None."""

    def __init__(self, texts: Sequence[Sequence[int]], order: int) -> None:
        seen: Counter[tuple[Any, ...]] = Counter()
        for ids in texts:
            sentence = [None, *ids, EOS]
            for end in range(2, len(sentence) + 1):
                for start in range(max(0, end - order), end):
                    seen[tuple(sentence[start:end])] += 1
        lefts = defaultdict(set)
        for gram in seen:
            lefts[gram[1:]].add(gram[0])
        self.followers: dict[Any, dict[int, int]] = defaultdict(dict)
        sizes: dict[int, Counter[int]] = defaultdict(Counter)
        for gram, count in seen.items():
            whole = len(gram) == order or gram[0] is None
            value = self.followers[gram[:-1]][gram[-1]] = count if whole else len(lefts[gram])
            sizes[len(gram)][value] += 1
        self.order = order
        self.discounts = {length: self.estimate(sizes[length]) for length in range(1, order + 1)}

    @staticmethod
    def estimate(sizes: Counter[int]) -> list[float]:
        one, two, three, four = (sizes[i] for i in (1, 2, 3, 4))
        if one and two and three and four:
            y = one / (one + 2 * two)
            found = [1 - 2 * y * two / one, 2 - 3 * y * three / two, 3 - 4 * y * four / three]
            if min(found) > 0:
                return found
        return [0.5, 1.0, 1.5]

    def p(self, token: int, context: tuple[Any, ...]) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        shorter = self.p(token, context[1:]) if context else 1 / VOCAB
        values = self.followers.get(context)
        if not values:
            return shorter
        off = self.discounts[len(context) + 1]
        taken = sum(off[min(value, 3) - 1] for value in values.values())
        mine = values[token] - off[min(values[token], 3) - 1] if token in values else 0.0
        return (mine + taken * shorter) / sum(values.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_textbook(order: int, seed: int) -> None:
    train, test = documents(seed), [*documents(seed + 10, 15), [VOCAB - 1, 0, 1]]
    book, model = Textbook(train, order), NGram(stream(train), VOCAB, EOS, order)
    expected = [
        book.p(token, (None, *ids[:place])) for ids in test for place, token in enumerate([*ids, EOS])
    ]
    np.testing.assert_allclose(model.probabilities(stream(test)), expected, rtol=1e-12)


def test_both_kinds_of_discounts_were_tested() -> None:
    discounts = Textbook(documents(0), 5).discounts
    estimated = [found for found in discounts.values() if tuple(found) != ngram.USUAL]
    assert 0 < len(estimated) < len(discounts)
    for found in estimated:
        assert all(0 < off <= i for i, off in enumerate(found, 1))


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("train", [documents(0), documents(2, 2), [[0]], [[]]], ids=["60", "2", "1", "none"])
def test_probabilities_sum_to_one(train: list[list[int]], order: int) -> None:
    model = NGram(stream(train), VOCAB, EOS, order)
    known = [ids[: 1 + number % 5] for number, ids in enumerate(train) if ids]
    unseen = [[VOCAB - 1], [0, VOCAB - 1], [VOCAB - 1, 0], [1] * 8, [VOCAB - 1, *known[0]] if known else [2]]
    for context in [[], *known, *unseen]:
        # every word of the vocabulary after the same context; the end of text once more closes a document
        each = stream([[*context, word] for word in range(VOCAB)]).reshape(VOCAB, -1)
        found = model.probabilities(each.ravel()).reshape(each.shape)[:, len(context)]
        assert found.min() > 0
        assert found.sum() == pytest.approx(1, abs=1e-12)


def test_documents_do_not_know_each_other() -> None:
    model = NGram(stream(documents(0)), VOCAB, EOS)
    first, second = [0, 1, 2, 0], [4, 5, 0]
    apart = [model.probabilities(stream([ids])) for ids in (first, second)]
    np.testing.assert_array_equal(model.probabilities(stream([first, second])), np.concatenate(apart))


def test_longer_contexts_help_where_the_text_has_them() -> None:
    train = stream([[0, 1, 2, 4, 5, 1, 2, 6] * 3] * 8)
    bits = [-np.log2(NGram(train, VOCAB, EOS, order).probabilities(train)).mean() for order in (1, 2, 3, 4)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 2 > 0.2 > bits[-1]


# --- the command --------------------------------------------------------------------------------------------

BYTES = ByteTokenizer()
PARTS = ["The captain had not spoken since the morning. " * 6, "Nobody asked\nhim why. " * 4, "Zoë smiled."]
HELD_OUT = ["The captain smiled. Nobody asked Zoë why. " * 3, "It was morning."]


@pytest.fixture(scope="module")
def model() -> Mamba:
    config = MambaConfig(d_model=16, n_layers=1, d_state=4, vocab_size=BYTES.vocab_size)
    return Mamba(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Mamba) -> Path:
    """A model, a training text in two files, and a held-out text."""
    path = tmp_path_factory.mktemp("text")
    save(model, path / "model", BYTES)
    (path / "texts").mkdir()
    (path / "texts" / "a.txt").write_text("\n\n\n".join(PARTS[:2]), encoding="utf-8")
    (path / "texts" / "b.txt").write_text(PARTS[2], encoding="utf-8")
    (path / "texts" / "test.txt").write_text("\n\n\n".join(HELD_OUT), encoding="utf-8")
    return path


def flags(folder: Path) -> list[object]:
    texts = folder / "texts"
    return ["--train", texts / "a.txt", "--train", texts / "b.txt", "--test", texts / "test.txt"]


def test_everyone_predicts_the_same_bytes(cli: Any, folder: Path, model: Mamba) -> None:
    done = cli("bench", "text", *flags(folder), "--model", folder / "model", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert {"machine", "versions", "model"} < set(report)
    (suite,) = report["suites"]
    ours, counted, alone, after = suite["rows"]
    size = len("".join(HELD_OUT).encode())
    for row in suite["rows"]:
        assert (row["tokens"], row["bytes"]) == (size, size)
        assert row["train_tokens"] == row["train_bytes"] == len("".join(PARTS).encode())
        assert row["seconds"] >= 0
    expected = evaluate(model, BYTES, HELD_OUT)
    assert ours["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert ours["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)

    def ids(texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([token for one in texts for token in (*BYTES.encode(one), BYTES.eos_id)])

    test = ids(HELD_OUT)
    found = NGram(ids(PARTS), BYTES.vocab_size, BYTES.eos_id).probabilities(test)[test != BYTES.eos_id]
    assert counted["bits_per_byte"] == pytest.approx(-np.log2(found).sum() / size)
    assert counted["perplexity"] == pytest.approx(math.exp(-np.log(found).mean()))

    def xz(texts: list[str]) -> int:
        return len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))

    assert alone["bits_per_byte"] == pytest.approx(8 * xz(HELD_OUT) / size)
    assert after["bits_per_byte"] == pytest.approx(8 * (xz(PARTS + HELD_OUT) - xz(PARTS)) / size)
    assert alone["perplexity"] is after["perplexity"] is None
    assert suite["ratios"][0]["measured"] == pytest.approx(ours["bits_per_byte"] / counted["bits_per_byte"])


def test_the_table(cli: Any, folder: Path) -> None:
    # the held-out file lies in the training folder, and is not counted in
    done = cli("bench", "text", "--train", folder / "texts", *flags(folder)[4:], "--model", folder / "model")
    assert done.code == 0, done.err
    size, train = len("".join(HELD_OUT).encode()), len("".join(PARTS).encode())
    assert f"held-out text: {size:,} tokens, {size:,} bytes" in done.out
    assert f"Training text: {train:,} tokens, {train:,} bytes." in done.out
    for words in (
        "bits/byte",
        "5-gram, modified Kneser-Ney",
        "xz -9e, held-out text alone",
        "after the training",
    ):
        assert words in done.out
    assert "text: 5-gram" in done.err


def test_what_xz_cannot_look_back_on_is_not_measured(folder: Path, model: Mamba) -> None:
    texts = folder / "texts"
    corpus = Corpus([texts / "a.txt", texts / "b.txt"], texts / "test.txt")
    report = text.run("small", model, BYTES, corpus, xz_window=100)
    assert [row["contender"] for row in report.rows][2:] == [text.ALONE]
    assert any("larger than its window" in note for note in report.notes)


def test_a_separator_parts_the_documents(cli: Any, folder: Path) -> None:
    wide = cli("bench", "text", *flags(folder), "--model", folder / "model", "--separator", "Zoë", "--json")
    row = json.loads(wide.out)["suites"][0]["rows"][0]
    whole = "\n\n\n".join(HELD_OUT)
    assert row["bytes"] == len(whole.replace("Zoë", "").encode())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("text",), 2, "expected --train FILE and --test FILE"),
        (("text", "--train", "a.txt"), 2, "expected --train FILE and --test FILE"),
        (("text", "--test", "a.txt"), 2, "expected --train FILE and --test FILE"),
        (("text", "ops"), 2, "expected no other suite beside it"),
        (("text", "--quick"), 2, "no options but --train"),
        (("text", "--figure", "a.png"), 2, "no options but --train"),
        (("ops", "--test", "a.txt"), 2, "are for the suites text and quality"),
        (("--model", "mine"), 2, "is for the suites text and quality"),
        (("texd",), 2, "did you mean 'text'"),
        (("text", "--train", "none.txt", "--test", "none.txt"), 1, "no such file or folder: none.txt"),
    ],
    ids=["neither", "no-test", "no-train", "two", "quick", "figure", "ops", "all", "name", "file"],
)
def test_misuse(cli: Any, argv: tuple[object, ...], code: int, words: str) -> None:
    done = cli("bench", *argv)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_a_damaged_text_is_found_before_the_model_is_loaded(cli: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    done = cli("bench", "text", *flags(folder), "--test", tmp_path / "bad.txt", "--model", "/no/model")
    assert (done.code, done.out) == (1, "")
    assert "is not UTF-8 text" in done.err


def test_all_suites_are_those_that_need_no_files() -> None:
    suites = [
        "ops",
        "train",
        "finetune",
        "generate",
        "translate",
        "shipped",
        "position",
        "stream",
        "vision",
        "serve",
        "grammar",
        "evaluate",
    ]
    assert list(runner.SUITES) == suites
