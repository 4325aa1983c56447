"""Tokenizers: nothing is lost, nothing is special in a user's text, and streams print what decode returns."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenizers
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import BPETokenizer, WindowStream, chop, load_tokenizer, train_bpe
from longscan.tokenizers.special_tokens import END_OF_TEXT
from tokenizers import decoders, models, normalizers, processors

SAMPLE = (
    "It was a bright morning, and the Captain, who had not spoken since the storm, spoke of the storm.\n\n"
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n🙂 🙃 🙂👩‍👩‍👧 naïve café — 3.14159\n"
) * 4
BPE = train_bpe([SAMPLE], 400)


def llama_like() -> BPETokenizer:
    """A vocabulary with marks for spaces and single bytes for the rest, whose decoder is not byte-level."""
    words = ["▁", "H", "i", "▁H", "▁Hi", "<eos>"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocab, merges=[("▁", "H"), ("▁H", "i")], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return BPETokenizer(tokenizer, eos_id=vocab["<eos>"])


TOKENIZERS: dict[str, Tokenizer] = {"bpe": BPE, "bytes": ByteTokenizer(), "llama-like": llama_like()}
BYTE_LEVEL = ["bpe", "bytes"]
TEXTS = st.lists(
    st.sampled_from([*"aé中🙂 \n\t\0", "the ", END_OF_TEXT, "👩‍👩‍👧", "storm", "\r\n"]) | st.text(max_size=8),
    max_size=12,
).map("".join)


def stream_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(text=TEXTS)
@settings(deadline=None)
def test_any_text_survives_and_holds_no_special_token(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.encode_batch([text, "x", text])[2] == ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=50, deadline=None)
def test_streams_of_text_hold_no_broken_character(name: str, text: str) -> None:
    assume("▁" not in text)  # this vocabulary cannot tell it from a space
    tokenizer = TOKENIZERS[name]
    pieces = stream_pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(data=st.data())
@settings(deadline=None)
def test_streams_of_random_ids_equal_decode_and_the_library(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    folder = tmp_path_factory.getbasetemp() / name
    if not folder.exists():
        tokenizer.save(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = library.decode([token for token in ids if token < tokenizer.vocab_size])
    assert tokenizer.decode(ids) == expected
    assert "".join(stream_pieces(tokenizer, ids)) == expected


@given(ids=st.lists(st.integers(0, 261), max_size=60))
@settings(max_examples=50, deadline=None)
def test_windows_stay_small(ids: list[int]) -> None:
    stream = TOKENIZERS["llama-like"].stream()
    assert isinstance(stream, WindowStream)
    for token in ids:
        stream.push(token)
        assert len(stream._window) < 2 * stream.HOLD


def test_a_stream_holds_back_a_character_until_its_last_byte() -> None:
    pieces = stream_pieces(ByteTokenizer(), [*"中🙂".encode(), 256, 300, 0xE4, 0xB8])
    assert pieces == ["", "", "中", "", "", "", "🙂", "", "", "", "", "\ufffd"]


def test_a_flushed_stream_starts_afresh() -> None:
    for tokenizer in TOKENIZERS.values():
        stream = tokenizer.stream()
        ids = tokenizer.encode("Hi 中")
        for _ in range(2):
            assert "".join(map(stream.push, ids)) + stream.flush() == "Hi 中"


def test_training_is_deterministic_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    pieces = [SAMPLE[i : i + 50] for i in range(0, len(SAMPLE), 50)]
    first, second = train_bpe(pieces, 300), train_bpe(iter(pieces), 300)
    assert first.vocab_size == second.vocab_size == 300
    assert first.fingerprint == second.fingerprint != BPE.fingerprint
    assert first.encode(SAMPLE) == second.encode(SAMPLE)
    assert len(BPE.encode(SAMPLE)) < len(SAMPLE.encode()) / 2
    assert first.eos_id == 0
    assert capfd.readouterr() == ("", "")


def test_text_without_spaces_is_chopped_for_training_only() -> None:
    genes = "".join(random.Random(0).choices("acgt", k=100_000))  # as one word this takes seconds
    assert list(chop([genes[:600], "a b"])) == [genes[:256], genes[256:512], genes[512:600], "a b"]
    tokenizer = train_bpe([genes], 300)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(genes)) < 50_000


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert train_bpe(["ab"], 1000).vocab_size == 257


@pytest.mark.parametrize("vocab_size", [-1, 256, 10**9])
def test_impossible_vocabularies_are_refused(vocab_size: int) -> None:
    with pytest.raises(UsageError, match="expected 257 to"):
        train_bpe([SAMPLE], vocab_size)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_loads_as_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path / "new" / "model")
    loaded = load_tokenizer(tmp_path / "new" / "model")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_a_tokenizer_file_by_itself_loads(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == BPE.fingerprint


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_transformers_reads_what_we_save(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos_id
    text = "  It's 3.14 , a café. 明月 🙂\n\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def saved_with(folder: Path, specials: list[str], configs: dict[str, Any]) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("specials", "configs", "eos_id"),
    [
        pytest.param(["<s>", "</s>"], {}, 3, id="usual-name"),
        pytest.param(["</s>", END_OF_TEXT], {}, 3, id="preferred-name"),
        pytest.param(["</s>", "X"], {"tokenizer_config": {"eos_token": "X"}}, 3, id="stated"),
        pytest.param(
            ["</s>", "X"], {"tokenizer_config": {"eos_token": {"content": "X"}}}, 3, id="stated-object"
        ),
        pytest.param(["</s>"], {"config": {"eos_token_id": 0}}, 2, id="name-before-config"),
        pytest.param(["X"], {"config": {"eos_token_id": 2}}, 2, id="config"),
        pytest.param(
            ["X"],
            {"generation_config": {"eos_token_id": [1, 2]}, "config": {"eos_token_id": 0}},
            1,
            id="list",
        ),
    ],
)
def test_the_end_of_text_is_found(
    specials: list[str], configs: dict[str, Any], eos_id: int, tmp_path: Path
) -> None:
    assert load_tokenizer(saved_with(tmp_path, specials, configs)).eos_id == eos_id


@pytest.mark.parametrize(
    "configs", [{}, {"config": {"eos_token_id": 99}}, {"tokenizer_config": {"eos_token": None}}]
)
def test_an_unknown_end_of_text_is_an_error(configs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match="which token ends a text"):
        load_tokenizer(saved_with(tmp_path, ["X"], configs))


def test_missing_tokenizers_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=r"expected tokenizer\.json, found nothing"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(LongscanError, match=r"found vocab\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "Nothing"}}'])
def test_damaged_tokenizers_are_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(LongscanError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_lone_surrogates_are_errors(name: str) -> None:
    with pytest.raises(LongscanError, match=r"U\+DCFF at character 2"):
        TOKENIZERS[name].encode("ab\udcff")


# ---- special tokens, and files that are not meant well


def with_template(folder: Path, **configs: dict[str, Any]) -> Path:
    """A byte-level vocabulary whose post-processor begins texts with <s>, as Llama's does."""
    TOKENIZERS["bytes"].save(folder)
    path = folder / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<s>", "</s>", "<unk>", "<|eot|>"])  # 257 to 260
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)]),
        ]
    )
    library.save(str(path))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, config in ({"tokenizer_config": names} | configs).items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def test_a_text_begins_as_the_post_processor_says_and_ends_with_any_stated_id(tmp_path: Path) -> None:
    ends = {"eos_token_id": [258, 260, 2**40], "bos_token_id": 257}
    tokenizer = load_tokenizer(with_template(tmp_path, generation_config=ends))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode_prompts(["Hi"])[0] == theirs("Hi")["input_ids"] == [257, 72, 105]
    assert (tokenizer.start, tokenizer.eos_ids) == ((257,), (258, 260))
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.prefix == (257,)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (257, 258, 259)
    assert theirs("Hi")["input_ids"] == [257, 72, 105]


@pytest.mark.parametrize("eos", [2**40, -1, [2**70], "\ud800"])
def test_impossible_ends_are_passed_over(eos: Any, tmp_path: Path) -> None:
    configs = {"tokenizer_config": {"eos_token": eos}}
    if not isinstance(eos, str):  # which is refused as an id
        configs["config"] = {"eos_token_id": eos}
    assert load_tokenizer(saved_with(tmp_path, ["</s>"], configs)).eos_ids == (2,)


@pytest.mark.parametrize("text", ["xcaféy", "đem café", "隱é"])
def test_added_tokens_with_accents_come_back(text: str) -> None:
    library = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    library.add_tokens(["café", "đem"])
    tokenizer = BPETokenizer(library, BPE.eos_id)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(stream_pieces(tokenizer, ids)) == text


def test_an_added_token_that_is_a_byte_too_is_refused() -> None:
    library = tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    library.add_tokens(["é"])  # the name of byte 0xE9: one id, two meanings
    with pytest.raises(LongscanError, match="an id of its own"):
        BPETokenizer(library, BPE.eos_id).decode([0])


@pytest.mark.parametrize("value", ["x", True, 2.0, {"id": 2}, [2, "x"], [2, None]], ids=str)
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_ids_that_are_none_are_refused(value: Any, file: str, tmp_path: Path) -> None:
    directory = saved_with(tmp_path, ["</s>"], {file: {"eos_token_id": value}})
    with pytest.raises(
        LongscanError, match=rf"/{file}\.json: eos_token_id: expected an id, a list of ids or null"
    ):
        load_tokenizer(directory)


HOSTILE: dict[str, dict[str, Any]] = {
    "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAECA2p1bms="}},
    "empty-pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}},
    "multiplied": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 8,
        }
    },
    "multiplied-in-two-parts": {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 60},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 6,
        },
    },
    "one-letter-of-33-bytes": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": letter}, "content": "\ufdfa"}
                for letter in "a\u0644"
            ]
            + [{"type": "NFKC"}] * 3,
        }
    },
    "a-space-for-each-piece": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always", "split": True}
                for mark in "▁_" * 40
            ],
        }
    },
    "many-rules": {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 65}},
    "five-times-the-text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        },
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 60},
    },
    "bytes-of-bytes": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 14}},
    "bytes-of-pieces": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}] * 14,
        }
    },
    "empty-suffix": {"decoder": {"type": "BPEDecoder", "suffix": ""}},
    "empty-delimiter": {
        "decoder": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True}
    },
    "expression": {"decoder": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 1000}},
    "fixed-length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "strip": {"decoder": {"type": "Strip", "content": "a", "start": 10, "stop": 2**40}},
    "large-id": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**32 - 1}, "unk_token": "a"}},
    "panic": {
        "model": {
            "type": "BPE",
            "vocab": {"é": 0, "éb": 1, "b": 2},
            "merges": [["é", "b"]],
            "continuing_subword_prefix": "ab",
        }
    },
    "deep": {"normalizer": {"type": "Sequence", "normalizers": [[[[]]]]}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_files_that_are_not_meant_well_are_errors(changes: dict[str, Any], tmp_path: Path) -> None:
    path = saved_with(tmp_path, ["</s>"], {}) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LongscanError):
        load_tokenizer(tmp_path).encode("ab" * 50)
