"""The errors a user can act on; anything else that escapes is a bug of ours."""

from __future__ import annotations

__all__ = ["LongscanError", "UsageError"]


class LongscanError(ValueError):
    """Something the user can put right; the message says what, expected, got, and the remedy."""


class UsageError(LongscanError):
    """A flag or an argument has a value that makes no sense; the command line exits with 2 instead of 1."""
