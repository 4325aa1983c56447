"""Help texts use the field's standard words; a private one may stand beside the term, never instead of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from longscan import cli

# private word -> what to say instead; the one list of them
PRIVATE = {
    r"reads?|reading": "prefill, process, load",
    r"writes?|writing|written": "decode, generate, save",
    r"tells?|telling|told": "reconstruct, print, log, distinguish",
    r"places?": "position, index",
    r"words?": "names, ids, tokens",
    r"kept": "stored, cached, retained",
    r"found": "result, got",
    r"wanted": "requested, expected",
    r"rooms?": "capacity",
    r"parted": "separated",
    r"hidden words?": "masked tokens",
    r"sitting": "run",
    r"races?": "comparison, measurement",
    r"enough": "early stopping, or the number",
    # the rest of what a native reader stumbles over in help texts
    r"as torch likes|if not given": "default: ...",
    r"as they are stored": "default: ...",
    r"alike": "similar, similarity",
    r"guess(?:es)?": "predict, draft",
    r"memory of the gradient": "AdamW beta1, AdamW beta2",
    r"smallest divisor": "AdamW eps",
    r"look(?:s|ing)? (?:at|back)": "attend to, window",
    r"by people": "reference translations",
    r"their numbers": "published results",
    r"in fewer bits": "quantised",
    r"kind or unkind": "sentiment",
    r"seen|foreseen": "held out, unexpected",
    r"goes? on|going on": "resume, continue",
    r"begins?|beginnings?": "start, prefix",
    r"(?:a|one JSON object|one) (?:text|line|pair|row)\.": "per text",
}
# contexts in which such a word is itself the standard one: files are read and written, and words can be words
FILES = r"(?:files?|director(?:y|ies)|stdin|stdout|checkpoints?|figure|GGUF|TOML)\b"
ALLOWED = (
    rf"(?:reads?|writes?|written) (?:\S+ ){{0,4}}{FILES}",
    rf"{FILES} to write",
    r"write (?:the vectors|them)",
    r"(?:masked|source|target|English|most frequent|instead of|each) words?",
    r"word[ -](?:vectors?|embeddings?|pieces?|level)|words? (?:per|in a sentence|of the source)",
    r"in place",
    r"not found",
)


def help_texts() -> Iterator[tuple[str, str]]:
    """Every verb, subcommand, argument and flag with its help text."""
    for verb, (_, line) in cli.VERBS.items():
        yield f"longscan --help, {verb}", line
        yield from _texts(f"longscan {verb}", cli._load(verb))


def _texts(path: str, command: Any) -> Iterator[tuple[str, str]]:
    yield path, command.help or ""
    for parameter in command.params:
        name = max(parameter.opts, key=len)
        yield f"{path} {name}", getattr(parameter, "help", None) or ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from _texts(f"{path} {name}", inner)


def private_words(text: str) -> list[str]:
    """What is wrong with a text: each private word outside of the allowed contexts."""
    plain = re.sub("|".join(ALLOWED), "", " ".join(text.split()), flags=re.IGNORECASE)
    return [
        f"{match[0]!r} (say: {instead})"
        for word, instead in PRIVATE.items()
        for match in re.finditer(rf"(?<![\w-])(?:{word})(?![\w-])", plain, re.IGNORECASE)
    ]


TEXTS = list(help_texts())


@pytest.mark.parametrize("text", [text for _, text in TEXTS], ids=[name for name, _ in TEXTS])
def test_help_uses_standard_words(text: str) -> None:
    assert not private_words(text), text


@pytest.mark.parametrize("text", [text for _, text in TEXTS], ids=[name for name, _ in TEXTS])
def test_everything_has_help(text: str) -> None:
    assert text.strip()


def test_the_list_catches_what_it_should() -> None:
    assert private_words("Seconds that the others look back; as torch likes if not given.")
    assert not private_words("Read a TOML file; prefill in chunks, decode with a KV cache.")
