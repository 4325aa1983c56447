"""The tokenizer inside a GGUF file: a list of tokens and merges, as llama.cpp wants it, and a tokenizer.json.

llama.cpp knows a byte-level BPE by its tokens, its merges and the name of the rule that cuts text into words.
The format also has a key for a whole tokenizer.json; files written here fill it, so that a tokenizer comes
back as it was. Files of others mostly have the lists only, and the tokenizer is built from them.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from longscan.checkpoints.gguf.parser import Value, short
from longscan.core.files import read_json
from longscan.errors import LongscanError
from longscan.tokenizers.base import BYTES_KIND, ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import BPETokenizer
from longscan.tokenizers.chat_templates import DEFAULT, check_templates
from longscan.tokenizers.rules import build_tokenizer
from longscan.tokenizers.special_tokens import END_NAMES
from tokenizers import decoders, models, pre_tokenizers

__all__ = ["describe_tokenizer", "read_tokenizer", "vocabulary_size"]

PREFIX = "tokenizer.ggml."
TOKENS, TYPES, MERGES, WORDS = PREFIX + "tokens", PREFIX + "token_type", PREFIX + "merges", PREFIX + "pre"
CHAT, CHATS = "tokenizer.chat_template", "tokenizer.chat_templates"  # the default one, names of the others
WHOLE, BYTES = "tokenizer.huggingface.json", "longscan.tokenizer"
ENDS, ALL_ENDS, ADD_BOS = ("eot_token_id", "eom_token_id"), "longscan.eos_token_ids", "add_bos_token"
ROLE_KEYS = {"bos_token": "bos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# how text is cut into words, by llama.cpp's names for it; files without a name are older than the names
LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2", "default", "")
LIKE_GPT2_BY_DIGIT = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
NO_MERGE = "<none> <none>"  # llama.cpp insists on one; no text has this pair


def read_tokenizer(metadata: Mapping[str, Value]) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file.

    Args:
        metadata: of the file.

    Returns:
        The tokenizer. None, with a warning, if the file has one of a kind that is not read here; None if it
        has none.

    Raises:
        LongscanError: its metadata contradict each other.
    """
    kind = metadata.get(PREFIX + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    words = metadata.get(WORDS, "")
    if kind != "gpt2" or (words not in (*LIKE_GPT2, *LIKE_GPT2_BY_DIGIT) and WHOLE not in metadata):
        what = f"kind {short(kind)}" if kind != "gpt2" else f"rule for words {short(words)}"
        warnings.warn(
            f"the model has no tokenizer: that of the file has the {what}, and only byte-level BPE that cuts "
            "words like GPT-2 is read. Put a tokenizer.json beside a converted copy of it.",
            stacklevel=3,
        )
        return None
    vocabulary = _vocabulary(metadata)
    if metadata.get(BYTES) == "bytes":
        if len(vocabulary) != ByteTokenizer.vocab_size:
            raise LongscanError(
                f"{BYTES}: expected {ByteTokenizer.vocab_size} tokens, got {len(vocabulary)}."
            )
        return ByteTokenizer(_chat_templates(metadata))
    try:
        built = _whole(metadata, vocabulary) if WHOLE in metadata else _built(metadata, vocabulary, words)
    except LongscanError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise LongscanError(f"the tokenizer is damaged ({error}): fetch the file again.") from error
    names, eos_id = {index: name for name, index in vocabulary.items()}, _eos(metadata, vocabulary)
    stated = {role: metadata.get(PREFIX + key) for role, key in ROLE_KEYS.items()}
    listed = metadata.get(ALL_ENDS)
    others = [metadata.get(PREFIX + key) for key in ENDS] + list(listed if isinstance(listed, array) else ())
    adds_bos = metadata.get(PREFIX + ADD_BOS)
    return BPETokenizer(
        built,
        eos_id,
        others=[index for index in others if type(index) is int and index in names],
        roles={role: names[index] for role, index in stated.items() if type(index) is int and index in names},
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        chat_templates=_chat_templates(metadata),
    )


def vocabulary_size(metadata: Mapping[str, Value]) -> int | None:
    """Return the number of tokens of a GGUF file without those that only fill up the embedding.

    Args:
        metadata: of the file.

    Returns:
        One more than the largest id in use; None if the file lists no tokens.
    """
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        return None
    types = _types(metadata, len(tokens))
    return next((index + 1 for index in reversed(range(len(types))) if types[index] != UNUSED), None)


def describe_tokenizer(tokenizer: Tokenizer | None, n_rows: int) -> dict[str, Any]:
    """Return a tokenizer as metadata.

    Args:
        tokenizer: byte-level BPE or bytes; None leaves a model that reads ids.
        n_rows: of the embedding; llama.cpp wants as many tokens.

    Returns:
        The entries.

    Raises:
        LongscanError: GGUF takes no such tokenizer.
    """
    if tokenizer is None:
        return {PREFIX + "model": "none"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        whole = read_json(Path(folder, "tokenizer.json"))
        stated = read_json(Path(folder, "tokenizer_config.json"))
    kind, special = stated.get(BYTES_KIND), tokenizer.special_ids
    if tokenizer.prefix not in ((), (special["bos_token_id"],)):
        raise LongscanError(
            "a GGUF file says only whether a text begins with bos_token, and this tokenizer begins one with "
            f"{len(tokenizer.prefix)} other tokens. Use a directory."
        )
    chats = {name: text for name, text in tokenizer.chat_templates.items() if name != DEFAULT}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"].get("merges", [])]
    added = {entry["content"]: entry["special"] for entry in whole["added_tokens"]}
    ids = {entry["content"]: entry["id"] for entry in whole["added_tokens"]}
    words = _words(whole, bool(merges))
    tokens = [f"[PAD{index}]" for index in range(n_rows)]
    types = [UNUSED] * n_rows
    for token, index in (whole["model"]["vocab"] | ids).items():
        tokens[index] = token
        types[index] = {None: NORMAL, True: CONTROL, False: USER_DEFINED}[added.get(token)]
    return {
        PREFIX + "model": "gpt2",
        WORDS: words,
        TOKENS: tokens,
        TYPES: types,
        MERGES: merges or [NO_MERGE],
        PREFIX + "bos_token_id": special["bos_token_id"],
        PREFIX + "eos_token_id": tokenizer.eos_id,
        PREFIX + ADD_BOS: bool(tokenizer.prefix),
        PREFIX + "add_eos_token": False,
        WHOLE: json.dumps(whole, ensure_ascii=False, separators=(",", ":")),
        **{PREFIX + name: index for name, index in zip(ENDS, tokenizer.eos_ids[1:], strict=False)},
        **({ALL_ENDS: list(tokenizer.eos_ids)} if tokenizer.eos_ids[1:] else {}),
        **{
            PREFIX + key: tokens.index(stated[role])
            for role, key in ROLE_KEYS.items()
            if role != "bos_token" and role in stated
        },
        **({BYTES: kind} if kind else {}),
        **{f"{CHAT}.{name}": text for name, text in chats.items()},
        **({CHATS: list(chats)} if chats else {}),
        **({CHAT: tokenizer.chat_templates[DEFAULT]} if DEFAULT in tokenizer.chat_templates else {}),
    }


def _chat_templates(metadata: Mapping[str, Value]) -> dict[str, str]:
    """Return the chat templates of a GGUF file."""
    names = metadata.get(CHATS, [])
    templates = {name: metadata.get(f"{CHAT}.{name}") for name in (names if isinstance(names, list) else [])}
    if CHAT in metadata:
        templates[DEFAULT] = metadata[CHAT]
    return check_templates(templates.items(), CHAT)


def _vocabulary(metadata: Mapping[str, Value]) -> dict[str, int]:
    """Return token -> id of the tokens in use."""
    tokens, size = metadata.get(TOKENS), vocabulary_size(metadata)
    if not isinstance(tokens, list) or size is None:
        raise LongscanError(f"{TOKENS}: expected a list of text: fetch the file again.")
    vocabulary = {token: index for index, token in enumerate(tokens[:size])}
    if len(vocabulary) != size:
        twice = next(token for index, token in enumerate(tokens) if vocabulary.get(token) != index)
        raise LongscanError(f"{TOKENS}: {short(twice)} is there twice: fetch the file again.")
    return vocabulary


def _types(metadata: Mapping[str, Value], n_tokens: int) -> Sequence[int]:
    """Return the type of each token."""
    types = metadata.get(TYPES)
    if types is None:
        return [NORMAL] * n_tokens
    if not isinstance(types, array) or types.typecode in "fd" or len(types) != n_tokens:
        raise LongscanError(f"{TYPES}: expected {n_tokens:,} whole numbers: fetch the file again.")
    return types


def _whole(metadata: Mapping[str, Value], vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Return the tokenizer of the tokenizer.json, which must be that of the list."""
    text = metadata[WHOLE]
    if not isinstance(text, str):
        raise LongscanError(f"{WHOLE}: expected text, got {type(text).__name__}.")
    try:
        built = build_tokenizer(text)
    except LongscanError as error:
        raise LongscanError(f"{WHOLE}: the tokenizer is damaged: {error}") from error
    if built.get_vocab() != vocabulary:
        raise LongscanError(
            f"{WHOLE} and {TOKENS} are different vocabularies: convert the original model again."
        )
    return built


def _built(metadata: Mapping[str, Value], vocabulary: dict[str, int], words: Value) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of the lists."""
    merges = metadata.get(MERGES)
    if not isinstance(merges, list):
        raise LongscanError(f"{MERGES}: expected a list of text: fetch the file again.")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    if merges == [NO_MERGE]:
        pairs = []
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    built.pre_tokenizer = _cutter(words in LIKE_GPT2_BY_DIGIT)
    built.decoder = decoders.ByteLevel()
    types = _types(metadata, len(metadata[TOKENS]))  # type: ignore[arg-type]
    names = {kind: [t for t, i in vocabulary.items() if types[i] == kind] for kind in (CONTROL, USER_DEFINED)}
    built.add_special_tokens(names[CONTROL])
    built.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names[USER_DEFINED]])
    return built


def _cutter(by_digit: bool) -> pre_tokenizers.PreTokenizer:
    """Return the rule that cuts text into words before merging."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if by_digit:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _words(whole: Mapping[str, Any], has_merges: bool) -> str:
    """Return llama.cpp's name for the rule of a tokenizer.json that cuts text into words."""
    model = whole["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(name)
        for name in (
            "dropout",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "byte_fallback",
            "ignore_merges",
        )
    )
    normalizer = (whole.get("normalizer") or {}).get("type", "NFC")  # llama.cpp takes text as it comes
    if plain and normalizer == "NFC":
        cutter = _steps(whole.get("pre_tokenizer"))
        if cutter == _steps(_json(_cutter(False))) or (not has_merges and _byte_level(cutter)):
            return "gpt-2"
        if cutter == _steps(_json(_cutter(True))):
            return "starcoder"
    raise LongscanError(
        "GGUF files get a byte-level BPE that cuts words like GPT-2, and this tokenizer is another. "
        "Leave it out, or convert the model directory with llama.cpp's own converter."
    )


def _steps(cutter: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """Return the steps of a pre-tokenizer of a tokenizer.json, without what does not change the ids."""
    if cutter is None:
        return []
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def _byte_level(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the rule only writes bytes as characters: enough if nothing is merged."""
    return [(s["type"], s.get("add_prefix_space")) for s in steps] == [("ByteLevel", False)]


def _json(cutter: pre_tokenizers.PreTokenizer) -> Any:
    """Return a pre-tokenizer as in a tokenizer.json."""
    blank = tokenizers.Tokenizer(models.BPE())
    blank.pre_tokenizer = cutter
    return json.loads(blank.to_str())["pre_tokenizer"]


def _eos(metadata: Mapping[str, Value], vocabulary: dict[str, int]) -> int:
    """Return the id that ends a text."""
    stated = metadata.get(PREFIX + "eos_token_id")
    if stated is None:
        stated = next((vocabulary[name] for name in END_NAMES if name in vocabulary), None)
    if type(stated) is not int or not 0 <= stated < len(vocabulary):
        raise LongscanError(
            f"{PREFIX}eos_token_id: expected an id below {len(vocabulary):,}, got {short(stated)}: "
            "nothing says which token ends a text."
        )
    return stated
