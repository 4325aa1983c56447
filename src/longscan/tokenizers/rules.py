"""Checks of a tokenizer.json, on which the `tokenizers` library may panic or exhaust the memory.

The library trusts its file. A rule that replaces one letter by ten, eight times over, turns a line of text
into gigabytes, and running out of memory there ends the process without an exception. So the rules are
checked before the library sees them, and remaining panics become a LongscanError.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from longscan.errors import LongscanError

__all__ = ["build_tokenizer", "guarded", "template_prefix"]

MAX_GROWTH = 256  # bytes that all rules together may make of one byte of text; real ones stay below 100
MAX_RULES = 64  # in one part: some add a space to every piece; real files have at most 20
UNICODE = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 12}  # bytes for one
MAX_ID = 2**22  # the largest published vocabularies have 2**18 ids
MAX_TEMPLATE = 64  # special tokens around a text
NOT_ONE = "it is not a tokenizer ({}). Was it cut short? Fetch it again."
LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turn a panic of the library, which is a BaseException, into a LongscanError.

    Raises:
        LongscanError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LongscanError(
            f"the tokenizers library panicked ({error}): the tokenizer.json is damaged or malicious. "
            "Fetch it again."
        ) from error


def build_tokenizer(data: bytes | str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Args:
        data: the content of the file, which may be untrusted.

    Raises:
        LongscanError: its rules could multiply a text, or can't be checked; or it is no tokenizer.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object {{...}}, got {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise LongscanError(NOT_ONE.format(error)) from error
    _check_rules(content)
    with guarded():
        try:
            built = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise LongscanError(NOT_ONE.format(error)) from error
    largest = max(built.get_vocab().values(), default=0)
    if largest > MAX_ID:
        raise LongscanError(f"expected ids up to {MAX_ID:,}, got {largest:,}: fetch the file again.")
    return built


def template_prefix(processor: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of the special tokens that a post-processor puts before a text.

    Args:
        processor: `post_processor` of a tokenizer.json.

    Returns:
        Their names, such as ("<s>",); nothing if it adds none.
    """
    names: tuple[str, ...] = ()
    for step in _steps(processor, "post_processor"):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            names = (str(step["cls"][0]), *names)
        elif step.get("type") == "TemplateProcessing":
            before: list[str] = []
            for piece in step["single"]:
                if "Sequence" in piece:
                    break
                before += step["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
            names = (*before, *names)
    return names


def _check_rules(content: Mapping[str, Any]) -> None:
    """Raise LongscanError if rules multiply the length of a text, or cannot be checked."""
    growth = 1  # of a text that is encoded: one part works on what the one before made of it
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1 if part == "decoder" else growth
        steps = _steps(content.get(part), part)
        if len(steps) > MAX_RULES:
            raise LongscanError(f"{part}: expected at most {MAX_RULES} rules, got {len(steps):,}.")
        for step in steps:
            growth *= _growth(step, part)
            if growth > MAX_GROWTH:
                raise LongscanError(
                    f"{part}: with its rules a text may become {growth:,} times longer, expected at most "
                    f"{MAX_GROWTH}. Such a file may be malicious: use the original one."
                )
    for token in content.get("added_tokens") or ():
        if isinstance(token, Mapping) and token.get("content") == "":
            raise LongscanError("added_tokens: expected names, got an empty one. Fetch the file again.")


def _steps(rule: Any, part: str) -> list[Mapping[str, Any]]:
    """Return the rules of a part, those inside Sequences too."""
    waiting, steps = [rule], []
    while waiting:
        step = waiting.pop(0)
        if not isinstance(step, Mapping):
            continue  # null, or what the library refuses
        if step.get("type") == "Sequence":
            inner = step.get(LISTS[part])
            waiting[:0] = inner if isinstance(inner, list) else []
        else:
            steps.append(step)
    return steps


def _growth(step: Mapping[str, Any], part: str) -> int:
    """Return how many times more bytes a rule may make of a text, at most."""
    kind = step.get("type")
    if kind == "Precompiled":
        raise LongscanError(
            f"{part}: Precompiled is a table of SentencePiece that can't be checked, and no model here comes "
            "with one. Expected NFC, Replace and the like."
        )
    if kind == "FixedLength" and step.get("length") == 0:
        raise LongscanError(f"{part}: FixedLength: expected a length of at least 1, got 0.")
    if kind == "Strip" and part == "decoder":
        counts = (step.get("start", 0), step.get("stop", 0))
        if not all(type(count) is int and 0 <= count <= 1 for count in counts):
            raise LongscanError(f"{part}: Strip: expected start and stop of 0 or 1, got {counts}.")
    if kind == "TemplateProcessing" and isinstance(single := step.get("single"), list):
        if len(single) > MAX_TEMPLATE:
            raise LongscanError(f"{part}: expected at most {MAX_TEMPLATE} special tokens, got {len(single)}.")
        return max(1, sum(isinstance(piece, Mapping) and "Sequence" in piece for piece in single))
    if kind in ("BPEDecoder", "CTC") and "" in (step.get("suffix"), step.get("word_delimiter_token")):
        raise LongscanError(f"{part}: {kind} puts a space for every empty text. Fetch the file again.")
    return _bytes_for_one(step, part)


def _bytes_for_one(step: Mapping[str, Any], part: str) -> int:
    """Return how many bytes a rule that is allowed may make of one, at most."""
    kind = step.get("type")
    if kind == "ByteLevel" and part in ("normalizer", "pre_tokenizer"):
        # a letter of two bytes for each byte, and for the space before a piece, which may be one letter
        return 4 if part == "pre_tokenizer" and step.get("add_prefix_space", True) else 2
    if kind == "Metaspace" and part == "pre_tokenizer":
        return 1 + _size(step.get("replacement", ""))
    if kind == "Prepend":
        return 1 + _size(step.get("prepend", ""))
    if kind == "Replace":
        pattern, new = step.get("pattern"), _size(step.get("content", ""))
        old = pattern.get("String") if isinstance(pattern, Mapping) else None
        if old == "":
            raise LongscanError(f"{part}: Replace has an empty pattern. Fetch the file again.")
        if isinstance(old, str):
            return max(1, -(-new // _size(old)))
        return 1 + new  # an expression may match the nothing between two letters
    return UNICODE.get(str(kind), 1)


def _size(text: Any) -> int:
    """Return the bytes of a text in UTF-8; half a surrogate pair, which JSON can spell, has three."""
    return len(str(text).encode(errors="surrogatepass"))
