"""WordPiece, the vocabulary of BERT: words, and pieces of words that begin with ##.

A text, or a pair of them, is framed as [CLS] A [SEP] or [CLS] A [SEP] B [SEP]; the token type is 0 up to the
first [SEP], then 1. As with every tokenizer here a "[MASK]" that somebody writes is text; only
`encode_masked` takes it for the token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenizers
from longscan.core.files import atomic_write, read_json, write_json
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.bpe import MAX_VOCAB_SIZE, BPETokenizer
from longscan.tokenizers.rules import build_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["Framed", "WordPieceTokenizer", "load_wordpiece", "train_wordpiece"]

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")  # in tokenizer_config.json
MAX_WORD = 100  # characters; a longer word is [UNK], as in the original code
PADDING = 127  # rows that a checkpoint may add to its vocabulary to reach a round number


class Framed(NamedTuple):
    """The input ids of a text or a pair.

    Attributes:
        ids: with [CLS] and [SEP].
        types: token types, 0 up to the first [SEP], then 1.
        cut: number of truncated tokens.
    """

    ids: list[int]
    types: list[int]
    cut: int


class WordPieceTokenizer(BPETokenizer):
    """A WordPiece vocabulary through the `tokenizers` library.

    Args:
        tokenizer: of a WordPiece model; it is changed: the frame is put around texts here.
        lowercase: whether it folds case; None leaves that to its normalizer.
        special: the names of the padding, unknown, [CLS], [SEP] and [MASK] tokens.

    Raises:
        LongscanError: it is no WordPiece vocabulary, or a special token is missing.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        lowercase: bool | None = None,
        special: Sequence[str] = SPECIAL,
    ) -> None:
        if not isinstance(tokenizer.model, models.WordPiece):
            kind = type(tokenizer.model).__name__
            raise LongscanError(f"expected a WordPiece vocabulary, got {kind}: that is another model's.")
        vocab = tokenizer.get_vocab()
        if missing := [name for name in special if name not in vocab]:
            raise LongscanError(
                f"the vocabulary has no {', '.join(missing)}. Every BERT has them: is it the right file?"
            )
        if lowercase is not None and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
            tokenizer.normalizer.lowercase = lowercase
        tokenizer.add_special_tokens(list(special))  # those in the vocabulary keep their ids
        ids = [vocab[name] for name in special]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.mask_token = special[4]
        tokenizer.post_processor = processors.BertProcessing((special[3], ids[3]), (special[2], ids[2]))
        self._names = dict(zip(ROLES, special, strict=True))
        super().__init__(tokenizer, eos_id=self.sep_id)
        self.prefix = ()  # `frame` puts it there

    def frame(
        self, first: Sequence[int], second: Sequence[int] | None = None, max_length: int = 512
    ) -> Framed:
        """Return a text or a pair with [CLS] and [SEP], truncated at the end of the longer one.

        Args:
            first: ids of the text.
            second: ids of the other text of a pair.
            max_length: the most ids, special tokens included.

        Raises:
            ValueError: max_length is too small for the special tokens.
        """
        left = max_length - (2 if second is None else 3)
        if left < 0:
            raise ValueError(f"max_length: expected at least {max_length - left} ids, got {max_length}")
        n_first, n_second = fit(len(first), len(second or ()), left)
        head = [self.cls_id, *first[:n_first], self.sep_id]
        tail = [] if second is None else [*second[:n_second], self.sep_id]
        cut = len(first) + len(second or ()) - n_first - n_second
        return Framed(head + tail, [0] * len(head) + [1] * len(tail), cut)

    def frame_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512
    ) -> list[Framed]:
        """Return several texts or pairs encoded and framed; see `frame`.

        Args:
            texts: any Unicode.
            pairs: the other text of each.
            max_length: the most ids, special tokens included.
        """
        first = self.encode_batch(texts)
        second = [None] * len(texts) if pairs is None else self.encode_batch(pairs)
        return [self.frame(a, b, max_length) for a, b in zip(first, second, strict=True)]

    def collate(self, framed: Sequence[Framed]) -> tuple[Tensor, Tensor]:
        """Return a batch, padded to the longest.

        Args:
            framed: at least one.

        Returns:
            ids: (batch, seq_len) int64, ending in padding.
            types: likewise, 0 at padding.
        """
        length = max(len(one.ids) for one in framed)
        ids = [one.ids + [self.pad_id] * (length - len(one.ids)) for one in framed]
        types = [one.types + [0] * (length - len(one.types)) for one in framed]
        return torch.tensor(ids), torch.tensor(types)

    def encode_masked(self, text: str) -> list[int]:
        """Return the ids of a text in which "[MASK]" stands for the mask token; see `encode_batch`."""
        first, *rest = self.encode_batch(text.split(self.mask_token))
        return [*first, *(token for ids in rest for token in (self.mask_id, *ids))]

    def token(self, token: int) -> str:
        """Return the entry of an id, such as "##ing"; "" for an id outside the vocabulary."""
        return self._tokenizer.id_to_token(token) or ""

    def check(self, vocab_size: int, where: object) -> None:
        """Raise LongscanError unless a model was made for this vocabulary.

        Args:
            vocab_size: rows of the model's embedding.
            where: the checkpoint, for the message.

        Raises:
            LongscanError: the sizes differ by more than padding to a round number.
        """
        if not 0 <= vocab_size - self.vocab_size <= PADDING:
            raise LongscanError(
                f"{where}: the tokenizer has {self.vocab_size:,} ids, the model {vocab_size:,}. They do not "
                "belong together: put the tokenizer.json or vocab.txt the model was trained with there."
            )

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `vocab.txt`; see `Tokenizer.save`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        normalizer = self._tokenizer.normalizer
        lowercase = {"do_lower_case": normalizer.lowercase} if hasattr(normalizer, "lowercase") else {}
        kind = {"tokenizer_class": "BertTokenizer"}
        write_json(directory / "tokenizer_config.json", kind | lowercase | self._names)
        vocab = sorted(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        atomic_write(directory / "vocab.txt", "".join(f"{token}\n" for token, _ in vocab))


def fit(n_first: int, n_second: int, max_length: int) -> tuple[int, int]:
    """Return the lengths of a truncated pair: the longer text loses a token until both fit.

    Args:
        n_first: tokens of the first; of two equally long texts the second is truncated.
        n_second: tokens of the second.
        max_length: the most tokens of both.
    """
    excess = max(0, n_first + n_second - max_length)
    level = min(excess, abs(n_first - n_second))  # until they are equal
    if n_first > n_second:
        n_first -= level
    else:
        n_second -= level
    rest = excess - level
    return n_first - rest // 2, n_second - (rest - rest // 2)


def load_wordpiece(directory: str | Path) -> WordPieceTokenizer:
    """Return the tokenizer of a model directory.

    Args:
        directory: with tokenizer.json or vocab.txt. tokenizer_config.json may say whether case is folded
            (else tokenizer.json knows; a bare vocab.txt means that it is) and how special tokens are called.

    Returns:
        The tokenizer.

    Raises:
        LongscanError: there is none, it is damaged, or it is no WordPiece vocabulary.
    """
    directory = Path(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    names = [config.get(role) or name for role, name in zip(ROLES, SPECIAL, strict=True)]
    special = [str(name.get("content") if isinstance(name, dict) else name) for name in names]
    for role, name in zip(ROLES, special, strict=True):
        if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            raise LongscanError(f"{path}: {role}: expected Unicode, got {name!r}.")
    file = next(
        (directory / name for name in ("tokenizer.json", "vocab.txt") if (directory / name).is_file()), None
    )
    if file is None:
        raise LongscanError(
            f"no tokenizer in {directory}: expected tokenizer.json or vocab.txt. "
            "Copy the one the model was trained with into the directory."
        )
    try:
        if file.suffix == ".json":
            tokenizer = build_tokenizer(file.read_bytes())
        else:
            tokenizer = _frame_of_bert(_read_vocab(file), special[1], config)
        return WordPieceTokenizer(tokenizer, config.get("do_lower_case"), special)
    except OSError:
        raise
    except LongscanError as error:
        raise LongscanError(f"{file}: {error}") from error
    except Exception as error:  # the library raises nothing more precise
        raise LongscanError(
            f"{file} is not a tokenizer ({error}). Was it cut short? Fetch it again."
        ) from error


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> WordPieceTokenizer:
    """Return a WordPiece tokenizer trained on text: merges by frequency, encoding by longest match first.

    Args:
        texts: the training text in pieces of any length; cut them where words end.
        vocab_size: number of entries, five special ones included. Little text gives fewer.
        lowercase: whether to fold case and drop accents.

    Returns:
        The tokenizer; the same text gives the same one.

    Raises:
        UsageError: `vocab_size` is too small or absurdly large.
    """
    if not 32 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UsageError(f"vocab_size: expected 32 to {MAX_VOCAB_SIZE:,}, got {vocab_size:,}.")
    tokenizer = _frame_of_bert({}, UNK, {"do_lower_case": lowercase})
    words = _count_words(texts, tokenizer)
    chars: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            chars[char] += count
    ranked = sorted(chars, key=lambda char: (-chars[char], char))
    alphabet = {char for char in ranked[: (vocab_size - len(SPECIAL)) // 2] if chars[char] > 1}
    words = Counter({word: count for word, count in words.items() if alphabet.issuperset(word)})
    inner = {char for word in words for char in word[1:]}
    # The library numbers ##x in the order of a hash table, and breaks ties by number. So the letters go in as
    # special tokens, which are numbered in order; the vocabulary is then taken out of this tokenizer.
    letters = [*sorted(alphabet), *(f"##{char}" for char in sorted(inner))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *letters],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{word} " * words[word] for word in sorted(words)), trainer)
    return WordPieceTokenizer(_frame_of_bert(tokenizer.get_vocab(), UNK, {"do_lower_case": lowercase}))


def _count_words(texts: Iterable[str], tokenizer: tokenizers.Tokenizer) -> Counter[str]:
    """Return the number of occurrences of each normalised word and punctuation mark."""
    runs: Counter[str] = Counter()
    for text in texts:
        runs.update(tokenizer.normalizer.normalize_str(text).split())
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(run):
            if len(word) <= MAX_WORD:
                words[word] += count
    return words


def _frame_of_bert(vocab: dict[str, int], unknown: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return a vocabulary with BERT's normalizer, pre-tokenizer and decoder."""
    model = models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=MAX_WORD)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _read_vocab(file: Path) -> dict[str, int]:
    """Return the vocabulary of a vocab.txt: one entry per line, the id is the line number."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise LongscanError(f"not UTF-8 ({error.reason} at byte {error.start:,}). Fetch it again.") from error
    tokens = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise LongscanError(f"{twice!r} occurs twice. Fetch it again.")
    return vocab
