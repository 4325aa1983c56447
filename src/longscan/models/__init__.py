"""Who computes it: one file per paper, oldest first."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..config import Config
from . import bahdanau, bert, llama, luong, mamba, seq2seq, transformer
from .backbone import LanguageModel, LanguageModelConfig, Output
from .bahdanau import Bahdanau, BahdanauConfig
from .bert import Bert, BertConfig
from .llama import Llama, LlamaConfig
from .luong import Luong, LuongConfig
from .mamba import Mamba, MambaConfig
from .model import Model
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .state import State
from .transformer import Transformer, TransformerConfig
from .translator import Translator, TranslatorConfig, TranslatorOutput, Writing

__all__ = [
    "LINEAGE",
    "MODELS",
    "Bahdanau",
    "BahdanauConfig",
    "Bert",
    "BertConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Llama",
    "LlamaConfig",
    "Luong",
    "LuongConfig",
    "Mamba",
    "MambaConfig",
    "Model",
    "ModelEntry",
    "ModelKind",
    "Output",
    "Seq2Seq",
    "Seq2SeqConfig",
    "State",
    "Transformer",
    "TransformerConfig",
    "Translator",
    "TranslatorConfig",
    "TranslatorOutput",
    "Writing",
    "entry_of",
]

ModelKind: TypeAlias = Literal["translation", "masked", "language"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One step of the history.

    Attributes:
        name: what commands and checkpoints call it.
        kind: what it is for: one sequence into another, words back under a mask, the next word.
        year: of the paper.
        paper: its title.
        arxiv: its number there.
        idea: what is new, as a predicate of "memory".
        parents: the names of the models it descends from, whether or not they are here.
        cls: the model.
        config: its Config.
        presets: known sizes, fields of the Config by name.
        verbs: the commands that accept it.
        rename: from the names of published checkpoints to ours, if there are any.
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
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict


LINEAGE: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="seq2seq",
        kind="translation",
        year=2014,
        paper="Sequence to Sequence Learning with Neural Networks",
        arxiv="1409.3215",
        idea="one vector for a sentence",
        parents=("lstm",),
        cls=Seq2Seq,
        config=Seq2SeqConfig,
        presets=seq2seq.PRESETS,
        verbs=("translate",),
    ),
    ModelEntry(
        name="bahdanau",
        kind="translation",
        year=2014,
        paper="Neural Machine Translation by Jointly Learning to Align and Translate",
        arxiv="1409.0473",
        idea="where I look before each word",
        parents=("seq2seq",),
        cls=Bahdanau,
        config=BahdanauConfig,
        presets=bahdanau.PRESETS,
        verbs=("translate",),
    ),
    ModelEntry(
        name="luong",
        kind="translation",
        year=2015,
        paper="Effective Approaches to Attention-based Neural Machine Translation",
        arxiv="1508.04025",
        idea="where I look, and where I looked",
        parents=("seq2seq", "bahdanau"),
        cls=Luong,
        config=LuongConfig,
        presets=luong.PRESETS,
        verbs=("translate",),
    ),
    ModelEntry(
        name="transformer",
        kind="translation",
        year=2017,
        paper="Attention Is All You Need",
        arxiv="1706.03762",
        idea="every pair of words",
        parents=("bahdanau", "luong"),
        cls=Transformer,
        config=TransformerConfig,
        presets=transformer.PRESETS,
        verbs=("translate",),
    ),
    ModelEntry(
        name="bert",
        kind="masked",
        year=2018,
        paper="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        arxiv="1810.04805",
        idea="both sides of every word",
        parents=("transformer",),
        cls=Bert,
        config=BertConfig,
        presets=bert.PRESETS,
        verbs=("train", "classify", "fill-mask", "embed"),
        rename=bert.rename,
    ),
    ModelEntry(
        name="llama",
        kind="language",
        year=2023,
        paper="LLaMA: Open and Efficient Foundation Language Models",
        arxiv="2302.13971",
        idea="every token before, rotated by its distance",
        parents=("transformer",),
        cls=Llama,
        config=LlamaConfig,
        presets=llama.PRESETS,
        verbs=("train", "generate", "evaluate"),
        rename=llama.rename,
    ),
    ModelEntry(
        name="mamba",
        kind="language",
        year=2023,
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        idea="a state that chooses",
        parents=("h3", "s4d"),
        cls=Mamba,
        config=MambaConfig,
        presets=mamba.PRESETS,
        verbs=("train", "generate", "evaluate"),
        rename=mamba.rename,
    ),
)

MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in LINEAGE}


def entry_of(model: Model) -> ModelEntry:
    """Return the entry of a model.

    Args:
        model: of a class of the line.

    Raises:
        LookupError: of none.
    """
    for entry in LINEAGE:
        if entry.cls is type(model):
            return entry
    raise LookupError(f"{type(model).__name__} is not in LINEAGE")
