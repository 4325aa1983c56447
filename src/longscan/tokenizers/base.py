"""The interface of a tokenizer, and the simplest one: plain bytes.

Two rules hold for every tokenizer here. Input is text: a special token spelled out in it is encoded letter by
letter and never becomes the special id. And `decode` runs the stream to its end, so streaming gives the same
text.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import tokenizers
from longscan.core.checks import check_texts
from longscan.core.files import atomic_write, write_json
from longscan.errors import LongscanError
from longscan.tokenizers.chat_templates import write_templates
from longscan.tokenizers.special_tokens import (
    END_OF_TEXT,
    IDS,
)
from tokenizers import decoders, models, pre_tokenizers

__all__ = [
    "BYTES_KIND",
    "ByteStream",
    "ByteTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "byte_alphabet",
    "byte_level",
    "save_files",
    "utf8_bytes",
]


BYTES_KIND = "longscan_tokenizer"  # a key in tokenizer_config.json: "bytes" there means ByteTokenizer


class StreamDecoder(ABC):
    """Decodes ids one at a time, and holds back characters whose bytes are incomplete."""

    @abstractmethod
    def push(self, token: int) -> str:
        """Return the text that the next id completes: often a word, "" while a character is incomplete.

        Args:
            token: a token id; special tokens and ids outside the vocabulary give no text.
        """

    @abstractmethod
    def flush(self) -> str:
        """Return the text held back at the end, with U+FFFD for an incomplete character, and reset."""


class Tokenizer(ABC):
    """The interface of all tokenizers."""

    vocab_size: int  # one more than the largest id
    eos_id: int  # ends a document
    chat_templates: Mapping[str, str] = MappingProxyType({})  # name -> Jinja; "default" is the usual one
    prefix: tuple[int, ...] = ()  # the special ids a text begins with, such as that of <s>; often none

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text when they are generated, `eos_id` first."""
        return (self.eos_id,)

    @property
    def start(self) -> tuple[int, ...]:
        """The context of the first token of a text: the prefix, or else the end-of-text id."""
        return self.prefix or (self.eos_id,)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The names of the special tokens and their ids."""
        return {}

    @property
    def roles(self) -> dict[str, str]:
        """The names of special tokens by their role in chat templates: bos_token, eos_token, ..."""
        return {}

    @property
    def special_ids(self) -> dict[str, int | list[int]]:
        """bos_token_id, eos_token_id and pad_token_id, as a config.json has them."""
        ends = self.eos_ids
        return dict.fromkeys(IDS, self.eos_id) | {"eos_token_id": list(ends) if ends[1:] else ends[0]}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, encoded in parallel where that helps.

        Args:
            texts: any Unicode; no special token is recognised or added.

        Raises:
            LongscanError: a text holds a lone surrogate, so it is not Unicode.
        """

    @abstractmethod
    def stream(self) -> StreamDecoder:
        """Return a decoder for one sequence of ids."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and chat templates as transformers reads them.

        Args:
            directory: where to; created if missing.
        """

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json` that `save` writes.

        Raises:
            LongscanError: this tokenizer has none.
        """
        raise LongscanError(f"a {type(self).__name__} is not what a tokenizer.json describes.")

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash: equal fingerprints mean that equal text gives equal ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts: `encode_batch` with `prefix` before each."""
        return [[*self.prefix, *ids] for ids in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with U+FFFD in place of bytes that are not UTF-8.

        Args:
            ids: token ids; special tokens and ids outside the vocabulary give no text.
        """
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.flush()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and an end-of-text id: no training, no files, four times the tokens.

    Args:
        chat_templates: see `Tokenizer`.
    """

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes-1"

    def __init__(self, chat_templates: Mapping[str, str] | None = None) -> None:
        self.chat_templates = dict(chat_templates or {})

    @property
    def special_tokens(self) -> dict[str, int]:
        """The name of the end of a text."""
        return {END_OF_TEXT: self.eos_id}

    @property
    def roles(self) -> dict[str, str]:
        """See `Tokenizer.roles`."""
        return {"eos_token": END_OF_TEXT}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the UTF-8 bytes of each text; see `Tokenizer.encode_batch`."""
        check_texts("texts", texts)
        return [list(utf8_bytes(text)) for text in texts]

    def stream(self) -> StreamDecoder:
        """Return a decoder for one sequence of ids."""
        return ByteStream([bytes([byte]) for byte in range(256)])

    def save(self, directory: str | Path) -> None:
        """Save as a BPE without merges, which other programs can read; see `Tokenizer.save`."""
        special = {"eos_token": END_OF_TEXT, BYTES_KIND: "bytes"}
        save_files(directory, self._twin(), special, self.chat_templates)

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json` that `save` writes."""
        return self._twin().to_str()

    def _twin(self) -> tokenizers.Tokenizer:
        """Return a BPE without merges that gives the same ids."""
        alphabet = byte_alphabet()
        model = models.BPE(vocab={char: byte for byte, char in alphabet.items()}, merges=[])
        twin = byte_level(model, use_regex=False)
        twin.add_special_tokens([END_OF_TEXT])
        return twin


class ByteStream(StreamDecoder):
    """Each id stands for bytes; Python's incremental decoder keeps at most three of them back."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that the next id completes."""
        return self._utf8.decode(self._table[token]) if 0 <= token < len(self._table) else ""

    def flush(self) -> str:
        """Return the text held back at the end, and reset."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def byte_level(model: models.Model, *, use_regex: bool) -> tokenizers.Tokenizer:
    """Return a lossless byte-level tokenizer of a model; `use_regex` keeps merges inside words."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """Return byte -> the character that byte-level vocabularies write for it.

    Visible Latin-1 characters stand for themselves; the 68 other bytes take the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def save_files(
    directory: str | Path,
    tokenizer: tokenizers.Tokenizer,
    special: Mapping[str, str],
    chat_templates: Mapping[str, str],
) -> None:
    """Write the two files of a Hugging Face tokenizer, and its chat templates."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,  # or transformers drops the space in "a ,"
    }
    write_json(directory / "tokenizer_config.json", config)
    write_templates(directory, chat_templates)


def utf8_bytes(text: str) -> bytes:
    """Return the UTF-8 bytes of a text; raise LongscanError if it holds lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise LongscanError(
            f"the text is not Unicode: lone surrogate U+{code:04X} at character {error.start}. "
            "It came from bytes that are not UTF-8: convert them first, e.g. with iconv."
        ) from error
