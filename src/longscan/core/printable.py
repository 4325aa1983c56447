"""Text of strangers on a terminal: what would steer it is left out."""

from __future__ import annotations

import re

__all__ = ["printable"]

# controls such as ESC; what changes the direction of text; line separators and tags, which nobody sees
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return a text without the characters that steer a terminal; tabs and line breaks stay.

    Args:
        text: any.
    """
    return _CONTROLS.sub("", text)
