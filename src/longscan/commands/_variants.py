"""Who may answer in a conversation: a base, and its adapters by name."""

from __future__ import annotations

from typing import NamedTuple

from longscan.errors import UsageError
from longscan.inference.chat import Conversation
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate

__all__ = ["Variant", "Variants"]


class Variant(NamedTuple):
    """One that may answer.

    Attributes:
        model: of it.
        tokenizer: with its chat templates.
        template: how it wants to be talked to.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    template: ChatTemplate


class Variants:
    """All that may answer, and the one that does.

    Args:
        variants: by name.
        current: the name of the one that answers.
    """

    def __init__(self, variants: dict[str, Variant], current: str) -> None:
        self._variants, self.current = variants, current

    def list(self) -> str:
        """Return the names, one a line; a star marks the one that answers."""
        return "\n".join(f"{'*' if name == self.current else ' '} {name}" for name in self._variants)

    def choose(self, name: str, conversation: Conversation) -> bool:
        """Let another one answer from now on; return whether it is another one.

        Args:
            name: of it.
            conversation: which it takes over.

        Raises:
            UsageError: there is none of this name.
        """
        if name not in self._variants:
            known = ", ".join(self._variants)
            raise UsageError(f"/adapter {name[:80]}: there is none of this name: expected {known}.")
        if name == self.current:
            return False
        self.current = name
        conversation.switch(*self._variants[name])
        return True
