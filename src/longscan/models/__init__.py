"""Who computes it: one file per paper, oldest first."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from . import mamba
from .backbone import LanguageModel, LanguageModelConfig, Output
from .mamba import Mamba, MambaConfig
from .state import State

__all__ = [
    "LINEAGE",
    "MODELS",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba",
    "MambaConfig",
    "ModelEntry",
    "Output",
    "State",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One step of the history.

    Attributes:
        name: what commands and checkpoints call it.
        year: of the paper.
        paper: its title.
        arxiv: its number there.
        idea: what is new, as a predicate of "memory".
        parents: the names of the models it descends from, whether or not they are here.
        cls: the model.
        config: its Config.
        presets: known sizes, fields of the Config by name.
        rename: from the names of published checkpoints to ours.
        verbs: the commands that accept it.
    """

    name: str
    year: int
    paper: str
    arxiv: str
    idea: str
    parents: tuple[str, ...]
    cls: Callable[..., LanguageModel]
    config: type[LanguageModelConfig]
    presets: Mapping[str, dict[str, Any]]
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    verbs: tuple[str, ...]


LINEAGE: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="mamba",
        year=2023,
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        idea="a state that chooses",
        parents=("h3", "s4d"),
        cls=Mamba,
        config=MambaConfig,
        presets=mamba.PRESETS,
        rename=mamba.rename,
        verbs=("train", "generate", "evaluate"),
    ),
)

MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in LINEAGE}
