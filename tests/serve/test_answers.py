"""The shapes of answers."""

from __future__ import annotations

from longscan.serve.answers import Listing, Scored
from longscan.tokenizers.base import ByteTokenizer


def test_offsets_count_characters_not_their_tokens() -> None:
    """A character of several tokens is one character, also if they come in several chunks."""
    tokenizer = ByteTokenizer()
    text = "aé€😀b"
    scored = [Scored(token, -1.0) for token in tokenizer.encode(text)]
    expected = [len(text[:i]) for i, char in enumerate(text) for _ in char.encode()]
    assert Listing(tokenizer).of(scored)["text_offset"] == expected
    listing = Listing(tokenizer)
    assert [listing.of([one])["text_offset"][0] for one in scored] == expected
