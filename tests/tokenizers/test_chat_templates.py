"""Chat templates come back from a directory and from a GGUF file, and transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longscan import LongscanError
from longscan.checkpoints.gguf.tokenizer import describe_tokenizer, read_tokenizer
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import BPETokenizer, load_tokenizer, train_bpe

CHAT = "{% for message in messages %}<|{{ message.role }}|>\r\n{{ message.content }}é\n{% endfor %}"
TEMPLATES = {"default": CHAT, "tool_use": "{{ tools }}"}


@pytest.fixture(scope="module")
def plain() -> BPETokenizer:
    return train_bpe(["a text to learn from"], 270)


def with_templates(plain: BPETokenizer, folder: Path, stated: Any) -> Path:
    """A directory whose tokenizer_config.json holds a chat_template."""
    plain.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": stated}))
    return folder


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (CHAT, {"default": CHAT}),
        ([{"name": name, "template": text} for name, text in TEMPLATES.items()], TEMPLATES),
        (None, {}),
    ],
    ids=["text", "list", "none"],
)
def test_templates_of_the_configuration_become_files(
    plain: BPETokenizer, tmp_path: Path, stated: Any, expected: dict[str, str]
) -> None:
    tokenizer = load_tokenizer(with_templates(plain, tmp_path / "old", stated))
    assert tokenizer.chat_templates == expected
    tokenizer.save(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.chat_templates == expected
    assert again.fingerprint == plain.fingerprint
    assert (tmp_path / "new" / "chat_template.jinja").is_file() == bool(expected)


def test_a_file_goes_before_the_configuration(plain: BPETokenizer, tmp_path: Path) -> None:
    folder = with_templates(plain, tmp_path, "old")
    (folder / "chat_template.jinja").write_bytes(CHAT.encode())
    assert load_tokenizer(folder).chat_templates == {"default": CHAT}


def test_transformers_reads_the_templates(plain: BPETokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    load_tokenizer(
        with_templates(plain, tmp_path / "a", [{"name": n, "template": t} for n, t in TEMPLATES.items()])
    ).save(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    template = theirs.chat_template
    assert {name: text.replace("\r\n", "\n") for name, text in template.items()} == {
        name: text.replace("\r\n", "\n") for name, text in TEMPLATES.items()
    }
    theirs.save_pretrained(tmp_path / "c")
    assert set(load_tokenizer(tmp_path / "c").chat_templates) == set(TEMPLATES)


def test_templates_come_back_from_gguf(plain: BPETokenizer) -> None:
    tokenizer = BPETokenizer(plain._tokenizer, plain.eos_id, chat_templates=TEMPLATES)
    entries = describe_tokenizer(tokenizer, tokenizer.vocab_size)
    assert entries["tokenizer.chat_template"] == CHAT
    assert entries["tokenizer.chat_templates"] == ["tool_use"]
    del entries["tokenizer.ggml.token_type"]
    again = read_tokenizer(entries)
    assert again is not None
    assert again.chat_templates == TEMPLATES
    with pytest.raises(LongscanError, match="expected text of at most 1 MiB, got int"):
        read_tokenizer(entries | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (3, "expected text of at most 1 MiB, got int"),
        ("x" * (2**20 + 1), "expected text of at most 1 MiB, got more"),
        ([{"name": "../../x", "template": "y"}], "expected a name of letters"),
        ([{"template": "y"}], "got None"),
        ([3], "got list"),
        ([{"name": ["x"], "template": "y"}], "expected a name of letters"),
        ("\ud800 lone", "got a lone surrogate"),
    ],
    ids=["number", "huge", "path", "nameless", "numbers", "list", "surrogate"],
)
def test_templates_that_are_none_are_refused(
    plain: BPETokenizer, tmp_path: Path, stated: Any, words: str
) -> None:
    with pytest.raises(LongscanError, match=words):
        load_tokenizer(with_templates(plain, tmp_path, stated))


def test_a_file_with_an_impossible_name_is_named(plain: BPETokenizer, tmp_path: Path) -> None:
    plain.save(tmp_path)
    (tmp_path / "additional_chat_templates" / "folder.jinja").mkdir(parents=True)
    assert load_tokenizer(tmp_path).chat_templates == {}
    (tmp_path / "additional_chat_templates" / "my own.jinja").write_text("x")
    with pytest.raises(LongscanError, match=r"my own\.jinja: expected a name of letters"):
        load_tokenizer(tmp_path)


def test_bytes_have_templates_too(tmp_path: Path) -> None:
    ByteTokenizer(TEMPLATES).save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    assert again.chat_templates == TEMPLATES
    entries = describe_tokenizer(again, again.vocab_size)
    del entries["tokenizer.ggml.token_type"]
    from_gguf = read_tokenizer(entries)
    assert isinstance(from_gguf, ByteTokenizer)
    assert from_gguf.chat_templates == TEMPLATES


def test_a_file_that_is_not_text_is_refused(plain: BPETokenizer, tmp_path: Path) -> None:
    plain.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(LongscanError, match="expected a chat template in UTF-8"):
        load_tokenizer(tmp_path)
