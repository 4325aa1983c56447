"""The errors a user can act on; any other exception is a bug in longscan."""

from __future__ import annotations

__all__ = ["LongscanError", "UsageError"]


class LongscanError(ValueError):
    """A problem the user can fix: the message says what, expected, got, and the remedy."""


class UsageError(LongscanError):
    """A flag or an argument has an invalid value; the command line exits with 2 instead of 1."""
