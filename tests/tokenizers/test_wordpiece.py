"""WordPiece: the ids of transformers, frames around texts and pairs, and the same vocabulary every time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenizers
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.bpe import train_bpe
from longscan.tokenizers.wordpiece import WordPieceTokenizer, fit, load_wordpiece, train_wordpiece

TEXT = (
    "The captain spoke of the storm; the storm had not spoken of the captain.\n"
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n"
    "Naïve cafés unaffordable, affordable, afford. 3.14159 [MASK] and [SEP] are text here!\n"
) * 3
SAMPLES = [
    *("", "   ", "the Storm", "unaffordable café", "明月 of the storm", "🙂 ?", "x" * 101),
    *("\x00 a\tb\r\n", "spoken"),
]
TRAINED = train_wordpiece([TEXT], 200)


def test_the_vocabulary() -> None:
    assert [TRAINED.token(number) for number in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = (TRAINED.pad_id, TRAINED.unk_id, TRAINED.cls_id, TRAINED.sep_id, TRAINED.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert TRAINED.vocab_size <= 200
    words = [TRAINED.token(token) for token in TRAINED.encode("The STORM of the captain")]
    assert words == ["the", "storm", "of", "the", "captain"]
    assert TRAINED.token(10**6) == ""


def test_the_same_text_gives_the_same_vocabulary(tmp_path: Path) -> None:
    """The library alone does not: it numbers letters in the order of a hash table, new in each process."""
    (tmp_path / "text.txt").write_text(TEXT)
    code = (
        "import sys; from pathlib import Path; from longscan.tokenizers.wordpiece import train_wordpiece;"
        "print(train_wordpiece([Path(sys.argv[1]).read_text()], 200).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "text.txt")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == TRAINED.fingerprint


def test_case_is_folded_or_kept() -> None:
    kept = train_wordpiece([TEXT], 200, lowercase=False)
    assert TRAINED.encode("The THE the") == TRAINED.encode("the the the")
    assert kept.encode("The") != kept.encode("the")


def test_little_text_and_rare_letters() -> None:
    tiny = train_wordpiece(["aa bb aa bb", "z" * 150, "q"], 40)
    assert tiny.unk_id in tiny.encode("q")  # seen once
    assert tiny.unk_id not in tiny.encode("aa bb abba")
    assert tiny.vocab_size < 40
    assert train_wordpiece([], 40).vocab_size == 5
    assert train_wordpiece(["".join(map(chr, range(0x4E00, 0x4F00))) * 2], 64).vocab_size <= 64


@pytest.mark.parametrize("size", [-1, 31, 2**21])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(UsageError, match="vocab_size: expected 32"):
        train_wordpiece([TEXT], size)


def test_frames() -> None:
    storm, captain = TRAINED.encode("storm"), TRAINED.encode("captain")
    assert TRAINED.frame(storm) == ([2, *storm, 3], [0, 0, 0], 0)
    assert TRAINED.frame(storm, captain) == ([2, *storm, 3, *captain, 3], [0, 0, 0, 1, 1], 0)
    assert TRAINED.frame([]) == ([2, 3], [0, 0], 0)
    assert TRAINED.frame([], []) == ([2, 3, 3], [0, 0, 1], 0)
    assert TRAINED.frame([7, 8, 9, 10], max_length=4) == ([2, 7, 8, 3], [0] * 4, 2)
    assert TRAINED.frame([7, 8, 9, 10], [11], max_length=6) == ([2, 7, 8, 3, 11, 3], [0, 0, 0, 0, 1, 1], 2)
    with pytest.raises(ValueError, match="at least 3 ids, got 2"):
        TRAINED.frame([7], [8], max_length=2)
    ids, types = TRAINED.collate(TRAINED.frame_batch(["storm", ""], ["captain", ""]))
    assert torch.equal(ids, torch.tensor([[2, *storm, 3, *captain, 3], [2, 3, 3, 0, 0]]))
    assert torch.equal(types, torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_the_longer_loses_first(n_first: int, n_second: int, room: int) -> None:
    first, second = n_first, n_second
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    assert fit(n_first, n_second, room) == (first, second)


def test_only_encode_masked_knows_the_mask() -> None:
    assert TRAINED.mask_id not in TRAINED.encode("the [MASK] and [SEP]")
    assert TRAINED.sep_id not in TRAINED.encode_masked("the [MASK] and [SEP]")
    the, storm = TRAINED.encode("the"), TRAINED.encode("storm")
    assert TRAINED.encode_masked("the [MASK] storm [MASK]") == [*the, 4, *storm, 4]
    assert TRAINED.encode_masked("[MASK]") == [4]
    assert TRAINED.encode_masked("the storm") == [*the, *storm]


def test_decode_and_stream() -> None:
    ids = TRAINED.frame(TRAINED.encode("the unaffordable storm")).ids
    assert TRAINED.decode(ids) == "the unaffordable storm"


# files


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_transformers_reads_what_is_saved(lowercase: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = train_wordpiece([TEXT], 200, lowercase)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.BertTokenizer)
    for text in [*SAMPLES, TEXT.replace("[MASK]", "").replace("[SEP]", "")]:
        for pair in (None, "the captain"):
            expected = theirs(text, pair)
            [framed] = ours.frame_batch([text], None if pair is None else [pair])
            assert framed.ids == expected["input_ids"], text
            assert framed.types == expected["token_type_ids"], text


def test_the_files_agree(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "whole")
    assert load_wordpiece(tmp_path / "whole").fingerprint == TRAINED.fingerprint
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole" / "vocab.txt", tmp_path / "bare")
    bare = load_wordpiece(tmp_path / "bare")
    assert bare.encode_batch(SAMPLES) == TRAINED.encode_batch(SAMPLES)
    assert bare.decode(TRAINED.encode(TEXT)) == TRAINED.decode(TRAINED.encode(TEXT))


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_tokenizer_config_says_whether_case_is_folded(file: str, tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    (tmp_path / {"tokenizer.json": "vocab.txt", "vocab.txt": "tokenizer.json"}[file]).unlink()
    configure(tmp_path, do_lower_case=False)
    assert load_wordpiece(tmp_path).encode("THE") != TRAINED.encode("THE")
    configure(tmp_path, do_lower_case=True)
    assert load_wordpiece(tmp_path).encode("THE") == TRAINED.encode("THE")


def test_special_tokens_may_have_other_names(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocab = (tmp_path / "vocab.txt").read_text().replace("[MASK]", "<blank>")
    (tmp_path / "vocab.txt").write_text(vocab)
    configure(tmp_path, mask_token={"content": "<blank>"})
    renamed = load_wordpiece(tmp_path)
    assert (renamed.mask_token, renamed.mask_id) == ("<blank>", 4)
    assert renamed.encode_masked("<blank>") == [4]


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_wordpiece(tmp_path).encode(TEXT) == TRAINED.encode(TEXT)


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gone(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").unlink()


def cut(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:-100])


def of_another_kind(directory: Path) -> None:
    train_bpe([TEXT], 300).save(directory)


def without_a_mask(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    path = directory / "vocab.txt"
    path.write_text(path.read_text().replace("[MASK]\n", ""))


def twice(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with open(directory / "vocab.txt", "a") as file:
        file.write("storm\n")


def not_utf8(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (gone, "no tokenizer"),
        (cut, "cut short"),
        (of_another_kind, "expected a WordPiece vocabulary, got BPE"),
        (without_a_mask, r"has no \[MASK\]"),
        (twice, "'storm' occurs twice"),
        (not_utf8, "not UTF-8"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_files_that_are_no_vocabulary(damage: Any, words: str, tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(LongscanError, match=words) as caught:
        load_wordpiece(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_vocabulary_for_another_model() -> None:
    size = TRAINED.vocab_size
    for fits in (size, size + 1, size + 127):
        TRAINED.check(fits, "here")
    for other in (size - 1, size + 128, 30_522):
        with pytest.raises(LongscanError, match=f"here: the tokenizer has {size} ids, the model {other:,}"):
            TRAINED.check(other, "here")


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(LongscanError, match="lone surrogate"):
        TRAINED.frame_batch(["a\ud800"])


def test_it_is_a_wordpiece_model_or_nothing() -> None:
    with pytest.raises(LongscanError, match="WordPiece"):
        WordPieceTokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram()))
