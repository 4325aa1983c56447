"""Byte-level BPE: training, loading, and streaming decoding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from longscan.core.checks import check_texts
from longscan.core.files import read_json
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import (
    BYTES_KIND,
    ByteStream,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    byte_alphabet,
    byte_level,
    save_files,
    utf8_bytes,
)
from longscan.tokenizers.chat_templates import read_templates
from longscan.tokenizers.rules import build_tokenizer, guarded
from longscan.tokenizers.special_tokens import (
    END_NAMES,
    END_OF_TEXT,
    IDS,
    check_ids,
    find_eos,
    find_others,
    find_roles,
    id_of,
    name_of,
    template,
)
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

__all__ = ["MAX_VOCAB_SIZE", "BPETokenizer", "WindowStream", "chop", "load_tokenizer", "train_bpe"]


MAX_VOCAB_SIZE = (
    2**20
)  # the trainer allocates for all at once, and running out of memory there is no exception

MAX_WORD = 256  # characters; only for learning merges


class BPETokenizer(Tokenizer):
    """A tokenizer.json, ours or published, through the `tokenizers` library.

    Args:
        tokenizer: of any model, not only BPE; it is changed: truncation and padding are switched off.
        eos_id: the id that ends a document.
        others: more ids that end a text.
        roles: names of special tokens by their role: bos_token, unk_token, pad_token.
        adds_bos: whether bos_token stands before every text; None leaves that to the post-processor.
        chat_templates: see `Tokenizer`.

    Raises:
        LongscanError: an id or a name is not in the vocabulary, or an added token is ambiguous.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_id: int,
        *,
        others: Sequence[int] = (),
        roles: Mapping[str, str] | None = None,
        adds_bos: bool | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        eos = name_of(tokenizer, eos_id)
        if eos is None:
            raise LongscanError(f"eos_id: expected an id of the vocabulary, got {eos_id}.")
        self._roles = dict(roles or {}) | {"eos_token": eos}
        self.chat_templates = dict(chat_templates or {})
        for role, name in self._roles.items():
            if tokenizer.token_to_id(name) is None:
                raise LongscanError(f"{role}: expected a token of the vocabulary, got {name!r}.")
        self._ends = tuple(dict.fromkeys([eos_id, *others]))
        if adds_bos is not None and bool(template(tokenizer)) != adds_bos:
            _put_bos(tokenizer, self._roles.get("bos_token", eos) if adds_bos else None)
        self.prefix = tuple(id_of(tokenizer, name) for name in template(tokenizer))
        tokenizer.encode_special_tokens = True  # spelled out in a text they are text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.eos_id = eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, encoded on all cores; see `Tokenizer.encode_batch`."""
        check_texts("texts", texts)
        try:
            with guarded():
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                utf8_bytes(text)  # says what is wrong
            raise
        return [encoding.ids for encoding in encodings]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text when they are generated, `eos_id` first."""
        return self._ends

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The names of the special tokens and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {entry.content: token for token, entry in added.items() if entry.special}

    @property
    def roles(self) -> dict[str, str]:
        """The names of special tokens by their role in chat templates."""
        return dict(self._roles)

    @property
    def special_ids(self) -> dict[str, int | list[int]]:
        """The ids of config.json and generation_config.json; a role that no token has falls to `eos_id`."""
        named = {f"{role}_id": id_of(self._tokenizer, name) for role, name in self._roles.items()}
        return super().special_ids | {
            name: index for name, index in named.items() if name in IDS and name != "eos_token_id"
        }

    def stream(self) -> StreamDecoder:
        """Return a decoder for one sequence of ids, in constant time per id."""
        if isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            return ByteStream(self._table)
        return WindowStream(self._tokenizer, self._special)

    def save(self, directory: str | Path) -> None:
        """Write the files that `load_tokenizer` and transformers read; see `Tokenizer.save`."""
        save_files(directory, self._tokenizer, self._roles, self.chat_templates)

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json` that `save` writes."""
        return self._tokenizer.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the ids."""
        start = f" {self.prefix}" if self.prefix else ""
        return hashlib.sha256(f"{self.eos_id}{start} {self._tokenizer.to_str()}".encode()).hexdigest()[:16]

    @cached_property
    def _special(self) -> frozenset[int]:
        """The ids that give no text."""
        return frozenset(self.special_tokens.values())

    @cached_property
    def _table(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary; an added token stands for itself."""
        byte_of = {char: byte for byte, char in byte_alphabet().items()}
        added = self._tokenizer.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab().items():
            if index in self._special:
                continue
            as_bytes = bytes([byte_of[char] for char in token]) if byte_of.keys() >= set(token) else None
            table[index] = token.encode() if index in added or as_bytes is None else as_bytes
            if index in added and as_bytes not in (None, table[index]) and self._merges_into(token, index):
                raise LongscanError(
                    f"the added token {token!r} has the id {index:,} of bytes that are other text: "
                    "what it stands for can't be known. Give it an id of its own."
                )
        return table

    def _merges_into(self, token: str, index: int) -> bool:
        """Return whether bytes in a text also become the id of an added token."""
        with guarded():
            return [piece.id for piece in self._tokenizer.model.tokenize(token)] == [index]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a model directory.

    Args:
        path: a directory with `tokenizer.json`, or such a file by itself.

    Returns:
        The tokenizer; its end-of-text id is the `eos_token` of tokenizer_config.json, else the first usual
        name in the vocabulary, else the `eos_token_id` of generation_config.json or config.json. (Last,
        because model configurations often carry a default that is not their tokenizer's.) The others that
        these two files list end a text too. A text begins with the special tokens that the post-processor
        puts there; as in transformers, `add_bos_token` beside a tokenizer.json changes nothing.

    Raises:
        LongscanError: no tokenizer there, a damaged file, an id that is none, or nothing says which token
            ends a text; or a chat template is no text.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    configs = {name: read_json(path / name) for name in names if (path / name).is_file()}
    check_ids(path, configs)
    stated = configs.get("tokenizer_config.json", {})
    chat_templates = read_templates(path, stated)
    if stated.get(BYTES_KIND) == "bytes":
        return ByteTokenizer(chat_templates)
    if not file.is_file():
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) if path.is_dir() else ""
        raise LongscanError(
            f"no tokenizer in {path}: expected tokenizer.json, found {found or 'nothing'}. "
            "Copy the one the model was trained with into the directory."
        )
    try:
        tokenizer = build_tokenizer(file.read_bytes())
    except LongscanError as error:
        raise LongscanError(f"{file}: {error}") from error
    eos_id = find_eos(tokenizer, configs)
    if eos_id is None:
        raise LongscanError(
            f"{file} does not say which token ends a text (none of {', '.join(END_NAMES)}). Name it in "
            'tokenizer_config.json beside it: {"eos_token": "..."}.'
        )
    return BPETokenizer(
        tokenizer,
        eos_id,
        others=find_others(tokenizer, configs),
        roles=find_roles(tokenizer, configs),
        chat_templates=chat_templates,
    )


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)) -> BPETokenizer:
    """Return a byte-pair encoding over UTF-8 bytes, trained on text; it is lossless for any text.

    Merges: Sennrich et al. 2016 (arXiv:1508.07909); over bytes inside words: GPT-2 (Radford et al. 2019).

    Args:
        texts: the training text in pieces of any length; cut them where words end.
        vocab_size: number of ids: the special tokens, 256 bytes, and merges. Little text gives fewer.
        special: tokens that are no text, with the ids from 0; the last one ends a text.

    Returns:
        The tokenizer; the same text gives the same one.

    Raises:
        UsageError: `vocab_size` is too small for the bytes, or absurdly large.
    """
    least = 256 + len(special)
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        raise UsageError(f"vocab_size: expected {least} to {MAX_VOCAB_SIZE:,}, got {vocab_size:,}.")
    tokenizer = byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chop(texts), trainer)
    return BPETokenizer(tokenizer, eos_id=len(special) - 1)


class WindowStream(StreamDecoder):
    """Streaming for other vocabularies: decodes a window of the last tokens with and without the new ones.

    The text of a token may depend on its left neighbour (a space, a byte of the same character), so the
    tokens printed last stay in the window as context.
    """

    HOLD = 8  # tokens kept back while the text ends in U+FFFD; a character has 4 bytes, so more is not UTF-8

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._window: list[int] = []
        self._printed = 0  # how many tokens of the window are context

    def push(self, token: int) -> str:
        """Return the text that the next id completes."""
        if token in self._special or self._tokenizer.id_to_token(token) is None:
            return ""
        self._window.append(token)
        piece = self._fresh()
        if (not piece or piece.endswith("\ufffd")) and len(self._window) - self._printed < self.HOLD:
            return ""
        self._window = self._window[self._printed :]
        self._printed = len(self._window)
        return piece

    def flush(self) -> str:
        """Return the text held back at the end, and reset."""
        piece = self._fresh()
        self._window, self._printed = [], 0
        return piece

    def _fresh(self) -> str:
        """Return what the tokens after the context add to its text."""
        with guarded():
            context = self._tokenizer.decode(self._window[: self._printed])
            return self._tokenizer.decode(self._window)[len(context) :]


def _put_bos(tokenizer: tokenizers.Tokenizer, bos: str | None) -> None:
    """Set the token that the post-processor puts before a text, or none."""
    byte_level_only = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        special = [(bos, id_of(tokenizer, bos))]
        frame = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=special
        )
        tokenizer.post_processor = processors.Sequence([byte_level_only, frame])
    else:
        tokenizer.post_processor = byte_level_only


def chop(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts with long words (Chinese, genes) cut: training is quadratic in the length of a word."""
    for text in texts:
        start = 0
        if max(map(len, text.split()), default=0) > MAX_WORD:
            for match in re.finditer(rf"\S{{{MAX_WORD}}}", text):
                yield text[start : match.end()]
                start = match.end()
        yield text[start:]
