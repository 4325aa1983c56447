"""A random model that can chat: with a tokenizer and a chat template, in every server's layout.

The vocabulary is made up: bytes, and words of a space and letters, each longer one a merge of a shorter one
and a letter. So every word is one token in every program, and almost every token that a random model draws is
text.
"""

from __future__ import annotations

import itertools
import random
import string
from pathlib import Path
from typing import Any, cast

import tokenizers
from longscan.bench.contenders.longscan import ready
from longscan.checkpoints.gguf.model import GGUFType, save_gguf
from longscan.checkpoints.save import save
from longscan.tokenizers.base import byte_alphabet, byte_level
from longscan.tokenizers.bpe import BPETokenizer
from longscan.tokenizers.chat import BUILT_IN
from tokenizers import models

__all__ = ["GGUF", "export", "text", "tokenizer"]

SPECIAL = ("<|im_start|>", "<|im_end|>")
SPACE = "Ġ"  # a space in the alphabet of byte-level BPE
GGUF = {"float32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # our precision -> llama.cpp's


def export(model: dict[str, Any], folder: Path, gguf: str | None) -> tuple[Path, Path | None]:
    """Return a model directory, and a GGUF file if asked for.

    Args:
        model: see `contenders.longscan.fresh`.
        folder: to write into.
        gguf: the type of the file; None for none.
    """
    ours, words = ready(model), tokenizer(model["vocab_size"])
    save(ours, folder / "model", words)
    if gguf is None:
        return folder / "model", None
    path = folder / f"{gguf}.gguf"
    save_gguf(ours, path, words, cast(GGUFType, gguf.upper()))
    return folder / "model", path


def tokenizer(vocab_size: int) -> BPETokenizer:
    """Return the tokenizer.

    Args:
        vocab_size: at least 300, at most some 400,000.
    """
    alphabet = list(byte_alphabet().values())
    words = _words(vocab_size - len(alphabet) - len(SPECIAL))
    vocabulary = {token: index for index, token in enumerate([*alphabet, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    made = byte_level(models.BPE(vocab=vocabulary, merges=merges), use_regex=True)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL])
    end = made.token_to_id(SPECIAL[1])
    assert end == vocab_size - 1
    return BPETokenizer(made, end, chat_templates={"default": BUILT_IN["chatml"]})


def text(n_words: int, seed: int, vocab_size: int) -> str:
    """Return a text of as many tokens.

    Args:
        n_words: tokens.
        seed: of the choice; two texts with different seeds begin differently.
        vocab_size: of the tokenizer.
    """
    words = _words(vocab_size - 256 - len(SPECIAL))
    chosen = random.Random(seed).choices(words, k=n_words)
    return "".join(chosen).replace(SPACE, " ")


def _words(n: int) -> list[str]:
    """Return the first n words, short ones first."""
    lengths = (itertools.product(string.ascii_lowercase, repeat=k) for k in itertools.count(1))
    letters = itertools.chain.from_iterable(lengths)
    return [SPACE + "".join(word) for word in itertools.islice(letters, n)]
