"""Who computes it: one file per paper, oldest first. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longscan.core.lazy import lazy_names

if TYPE_CHECKING:
    from longscan.models.bahdanau import Bahdanau, BahdanauConfig
    from longscan.models.bert import Bert, BertConfig
    from longscan.models.cnn import CNN, CNNConfig
    from longscan.models.common.encoder_decoder import (
        DecoderState,
        Translator,
        TranslatorConfig,
        TranslatorOutput,
    )
    from longscan.models.common.entry import ModelEntry, ModelKind
    from longscan.models.common.language_model import LanguageModel, Output
    from longscan.models.common.mixer import LanguageModelConfig
    from longscan.models.common.model import Model
    from longscan.models.common.state import State
    from longscan.models.gau import GAU, GAUConfig
    from longscan.models.h3 import H3, H3Config
    from longscan.models.hippo import HippoConfig, HippoRNN
    from longscan.models.hybrid import Hybrid
    from longscan.models.hybrid_config import HybridConfig
    from longscan.models.hyena import Hyena, HyenaConfig
    from longscan.models.linear_attention import LinearAttentionConfig, LinearTransformer
    from longscan.models.llama import Llama, LlamaConfig
    from longscan.models.lssl import LSSL, LSSLConfig
    from longscan.models.lstm import LSTM, LSTMConfig
    from longscan.models.luong import Luong, LuongConfig
    from longscan.models.mamba import Mamba, MambaConfig
    from longscan.models.mamba2 import Mamba2, Mamba2Config
    from longscan.models.mamba3 import Mamba3, Mamba3Config
    from longscan.models.neural_ode import ODERNN, NeuralODEConfig, ODERNNConfig
    from longscan.models.registry import MODELS, entry_of, preset_owner
    from longscan.models.resnet import ResNet, ResNetConfig
    from longscan.models.s4 import S4, S4Config
    from longscan.models.s4d import S4D, S4DConfig
    from longscan.models.seq2seq import Seq2Seq, Seq2SeqConfig
    from longscan.models.transformer import Transformer, TransformerConfig
    from longscan.models.videomamba import VideoMamba, VideoMambaConfig
    from longscan.models.vim import Vim, VimConfig
    from longscan.models.vit import ViT, ViTConfig
    from longscan.models.vmamba import VMamba, VMambaConfig
    from longscan.models.zamba2 import Zamba2, Zamba2Config

_HOME = {
    "bahdanau": ("Bahdanau", "BahdanauConfig"),
    "bert": ("Bert", "BertConfig"),
    "cnn": ("CNN", "CNNConfig"),
    "common.encoder_decoder": ("DecoderState", "Translator", "TranslatorConfig", "TranslatorOutput"),
    "common.entry": ("ModelEntry", "ModelKind"),
    "common.language_model": ("LanguageModel", "Output"),
    "common.mixer": ("LanguageModelConfig",),
    "common.model": ("Model",),
    "common.state": ("State",),
    "gau": ("GAU", "GAUConfig"),
    "h3": ("H3", "H3Config"),
    "hippo": ("HippoConfig", "HippoRNN"),
    "hybrid": ("Hybrid",),
    "hybrid_config": ("HybridConfig",),
    "hyena": ("Hyena", "HyenaConfig"),
    "linear_attention": ("LinearAttentionConfig", "LinearTransformer"),
    "llama": ("Llama", "LlamaConfig"),
    "lssl": ("LSSL", "LSSLConfig"),
    "lstm": ("LSTM", "LSTMConfig"),
    "luong": ("Luong", "LuongConfig"),
    "mamba": ("Mamba", "MambaConfig"),
    "mamba2": ("Mamba2", "Mamba2Config"),
    "mamba3": ("Mamba3", "Mamba3Config"),
    "neural_ode": ("ODERNN", "NeuralODEConfig", "ODERNNConfig"),
    "registry": ("MODELS", "entry_of", "preset_owner"),
    "resnet": ("ResNet", "ResNetConfig"),
    "s4": ("S4", "S4Config"),
    "s4d": ("S4D", "S4DConfig"),
    "seq2seq": ("Seq2Seq", "Seq2SeqConfig"),
    "transformer": ("Transformer", "TransformerConfig"),
    "videomamba": ("VideoMamba", "VideoMambaConfig"),
    "vim": ("Vim", "VimConfig"),
    "vit": ("ViT", "ViTConfig"),
    "vmamba": ("VMamba", "VMambaConfig"),
    "zamba2": ("Zamba2", "Zamba2Config"),
}

__all__ = [
    "CNN",
    "GAU",
    "H3",
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
    "DecoderState",
    "GAUConfig",
    "H3Config",
    "HippoConfig",
    "HippoRNN",
    "Hybrid",
    "HybridConfig",
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
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "MambaConfig",
    "Model",
    "ModelEntry",
    "ModelKind",
    "NeuralODEConfig",
    "ODERNNConfig",
    "Output",
    "ResNet",
    "ResNetConfig",
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
    "VMamba",
    "VMambaConfig",
    "ViT",
    "ViTConfig",
    "VideoMamba",
    "VideoMambaConfig",
    "Vim",
    "VimConfig",
    "Zamba2",
    "Zamba2Config",
    "entry_of",
    "preset_owner",
]

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    """List the public names, imported or not, beside what is there."""
    return sorted({*globals(), *__all__})
