"""What the registry knows about a model: its entry, which stands in the paper's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from longscan.core.config import Config
from longscan.models.common.model import Model

__all__ = ["LANGUAGE", "ModelEntry", "ModelKind"]

ModelKind: TypeAlias = Literal["translation", "masked", "language", "image"]
LANGUAGE = ("train", "generate", "evaluate", "classify")  # the verbs of all language models


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One step of the history.

    Attributes:
        name: what commands and checkpoints call it.
        kind: what it is for: translation, masked words, the next word, or images and videos.
        year: of the paper.
        paper: its title.
        arxiv: its number there.
        idea: what is new, as a predicate of "memory".
        parents: the names of the models it descends from; its file may import these and their ancestors.
        cls: the model.
        config: its Config.
        presets: known sizes, fields of the Config by name.
        verbs: the commands that accept it.
    """

    name: str
    kind: ModelKind
    year: int
    paper: str
    arxiv: str
    idea: str
    parents: tuple[str, ...]
    cls: Callable[..., Model]
    config: type[Config]
    presets: Mapping[str, dict[str, Any]]
    verbs: tuple[str, ...]
