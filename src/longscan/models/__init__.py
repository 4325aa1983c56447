"""Who computes it: one file per paper, oldest first."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from longscan.core.config import Config
from longscan.models import (
    bahdanau,
    bert,
    cnn,
    gau,
    h3,
    hippo,
    hyena,
    linear_attention,
    llama,
    lssl,
    lstm,
    luong,
    mamba,
    s4,
    s4d,
    seq2seq,
    transformer,
)
from longscan.models.bahdanau import Bahdanau, BahdanauConfig
from longscan.models.bert import Bert, BertConfig
from longscan.models.cnn import CNN, CNNConfig
from longscan.models.common.encoder_decoder import Translator, TranslatorConfig, TranslatorOutput, Writing
from longscan.models.common.language_model import LanguageModel, Output
from longscan.models.common.mixer import LanguageModelConfig
from longscan.models.common.model import Model
from longscan.models.common.state import State
from longscan.models.gau import GAU, GAUConfig
from longscan.models.h3 import H3, H3Config
from longscan.models.hippo import HippoConfig, HippoRNN
from longscan.models.hyena import Hyena, HyenaConfig
from longscan.models.linear_attention import LinearAttentionConfig, LinearTransformer
from longscan.models.llama import Llama, LlamaConfig
from longscan.models.lssl import LSSL, LSSLConfig
from longscan.models.lstm import LSTM, LSTMConfig
from longscan.models.luong import Luong, LuongConfig
from longscan.models.mamba import Mamba, MambaConfig
from longscan.models.neural_ode import ODERNN, NeuralODEConfig, ODERNNConfig
from longscan.models.s4 import S4, S4Config
from longscan.models.s4d import S4D, S4DConfig
from longscan.models.seq2seq import Seq2Seq, Seq2SeqConfig
from longscan.models.transformer import Transformer, TransformerConfig

__all__ = [
    "CNN",
    "GAU",
    "H3",
    "LINEAGE",
    "LSSL",
    "LSTM",
    "MODELS",
    "ODERNN",
    "S4",
    "S4D",
    "Bahdanau",
    "BahdanauConfig",
    "Bert",
    "BertConfig",
    "CNNConfig",
    "GAUConfig",
    "H3Config",
    "HippoConfig",
    "HippoRNN",
    "Hyena",
    "HyenaConfig",
    "LSSLConfig",
    "LSTMConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LinearAttentionConfig",
    "LinearTransformer",
    "Llama",
    "LlamaConfig",
    "Luong",
    "LuongConfig",
    "Mamba",
    "MambaConfig",
    "Model",
    "ModelEntry",
    "ModelKind",
    "NeuralODEConfig",
    "ODERNNConfig",
    "Output",
    "S4Config",
    "S4DConfig",
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
LANGUAGE = ("train", "generate", "evaluate", "classify")  # the verbs of all language models


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
        name="lstm",
        kind="language",
        year=1997,
        paper="Long Short-Term Memory",
        arxiv="",
        idea="a gated feature",
        parents=(),
        cls=LSTM,
        config=LSTMConfig,
        presets=lstm.PRESETS,
        verbs=LANGUAGE,
    ),
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
        name="cnn",
        kind="language",
        year=2018,
        paper="An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling",
        arxiv="1803.01271",
        idea="a window that doubles with each layer",
        parents=(),
        cls=CNN,
        config=CNNConfig,
        presets=cnn.PRESETS,
        verbs=LANGUAGE,
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
        name="linear_attention",
        kind="language",
        year=2020,
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        arxiv="2006.16236",
        idea="a sum over all pairs of features",
        parents=("transformer",),
        cls=LinearTransformer,
        config=LinearAttentionConfig,
        presets=linear_attention.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="hippo",
        kind="language",
        year=2020,
        paper="HiPPO: Recurrent Memory with Optimal Polynomial Projections",
        arxiv="2008.07669",
        idea="the best polynomial fit of the past",
        parents=("lstm",),
        cls=HippoRNN,
        config=HippoConfig,
        presets=hippo.PRESETS,
        verbs=(*LANGUAGE, "remember"),
    ),
    ModelEntry(
        name="lssl",
        kind="language",
        year=2021,
        paper="Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
        arxiv="2110.13985",
        idea="a linear system, step by step or all at once",
        parents=("hippo",),
        cls=LSSL,
        config=LSSLConfig,
        presets=lssl.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="s4",
        kind="language",
        year=2021,
        paper="Efficiently Modeling Long Sequences with Structured State Spaces",
        arxiv="2111.00396",
        idea="a linear system in O(N + L)",
        parents=("hippo", "lssl"),
        cls=S4,
        config=S4Config,
        presets=s4.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="gau",
        kind="language",
        year=2022,
        paper="Transformer Quality in Linear Time",
        arxiv="2202.10447",
        idea="every token before, behind one wide gate",
        parents=("linear_attention", "transformer"),
        cls=GAU,
        config=GAUConfig,
        presets=gau.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="s4d",
        kind="language",
        year=2022,
        paper="On the Parameterization and Initialization of Diagonal State Space Models",
        arxiv="2206.11893",
        idea="a sum of fading waves",
        parents=("s4",),
        cls=S4D,
        config=S4DConfig,
        presets=s4d.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="h3",
        kind="language",
        year=2022,
        paper="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        arxiv="2212.14052",
        idea="a state between two products",
        parents=("s4d", "linear_attention"),
        cls=H3,
        config=H3Config,
        presets=h3.PRESETS,
        verbs=LANGUAGE,
    ),
    ModelEntry(
        name="hyena",
        kind="language",
        year=2023,
        paper="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        arxiv="2302.10866",
        idea="the whole past through a filter",
        parents=("h3",),
        cls=Hyena,
        config=HyenaConfig,
        presets=hyena.PRESETS,
        verbs=LANGUAGE,
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
        verbs=LANGUAGE,
        rename=llama.rename,
    ),
    ModelEntry(
        name="mamba",
        kind="language",
        year=2023,
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        idea="a state that chooses",
        parents=("h3", "gau"),
        cls=Mamba,
        config=MambaConfig,
        presets=mamba.PRESETS,
        verbs=LANGUAGE,
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
