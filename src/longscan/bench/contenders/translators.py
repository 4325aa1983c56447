"""Translators as contenders: longscan's, torch.nn.Transformer, transformers' Marian. Runs in the workers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.bench.contenders import workloads
from longscan.bench.worker import Run
from longscan.inference.beam_search import translate_ids
from longscan.models import MODELS, Translator
from longscan.models.transformer import sinusoids

__all__ = [
    "TorchTransformer",
    "decode_ours",
    "marian",
    "ours",
    "sentences",
    "train_marian",
    "train_ours",
    "train_torch",
    "translate_marian",
    "translate_ours",
]

PAD, BOS, EOS = 0, 1, 2
SMOOTHING = 0.1


def sentences(n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return pairs of random sentences of 10 to 16 tokens.

    Args:
        n: pairs.
        vocab_size: tokens.

    Returns:
        source (n, 17) and target (n, 18), as a translator takes them.
    """
    random = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(2):
        ids = torch.randint(EOS + 1, vocab_size, (n, 17), generator=random)
        lengths = torch.randint(10, 17, (n, 1), generator=random)
        position = torch.arange(17)
        drawn.append(ids.masked_fill(position == lengths, EOS).masked_fill(position > lengths, PAD))
    return drawn[0], F.pad(drawn[1], (1, 0), value=BOS)


def ours(name: str, fields: dict[str, Any]) -> Translator:
    """Return one of our models with random weights.

    Args:
        name: in MODELS.
        fields: of its Config.
    """
    entry = MODELS[name]
    config = entry.config.from_dict(fields)
    return cast(Translator, entry.cls(config, torch.Generator().manual_seed(0)))


class TorchTransformer(nn.Module):
    """torch.nn.Transformer between an embedding and a tied head, as a user would write it.

    Args:
        fields: of TransformerConfig.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        d_model, n_layers, dropout = fields["d_model"], fields["n_layers"], fields["dropout"]
        self.dropout, self.scale = nn.Dropout(dropout), math.sqrt(d_model)
        self.embedding = nn.Embedding(fields["vocab_size"], d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        sizes = (d_model, fields["n_heads"], n_layers, n_layers, fields["d_ff"], dropout)
        self.body = nn.Transformer(*sizes, batch_first=True)
        self.register_buffer("positions", sinusoids(0, 64, d_model).float())

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """From ids (batch, src_len) and (batch, tgt_len) to logits (batch, tgt_len, vocab_size)."""
        x, y = (
            self.dropout(self.embedding(ids) * self.scale + cast(Tensor, self.positions)[: ids.shape[1]])
            for ids in (source, target)
        )
        padding = source == PAD
        future = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).triu(1)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        hidden = self.body(x, y, tgt_mask=future, tgt_is_causal=True, **masks)
        return F.linear(hidden, self.embedding.weight)


def marian(fields: dict[str, Any]) -> Any:
    """Return transformers' Marian of the sizes of TransformerConfig's fields."""
    from transformers import MarianConfig, MarianMTModel

    layers, heads = fields["n_layers"], fields["n_heads"]
    config = MarianConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["d_model"],
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=fields["d_ff"],
        decoder_ffn_dim=fields["d_ff"],
        dropout=fields["dropout"],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


def train_ours(name: str, fields: dict[str, Any], n: int) -> Run:
    """Prepare a training step of one of our models on n pairs."""
    model, pair = ours(name, fields).train(), sentences(n, fields["vocab_size"])
    return workloads.training(model.parameters(), lambda: model.loss(*pair, SMOOTHING))


def train_torch(fields: dict[str, Any], n: int) -> Run:
    """Prepare a training step of torch.nn.Transformer on n pairs."""
    model, (source, target) = TorchTransformer(fields).train(), sentences(n, fields["vocab_size"])
    return workloads.training(model.parameters(), lambda: _loss(model(source, target[:, :-1]), target))


def train_marian(fields: dict[str, Any], n: int) -> Run:
    """Prepare a training step of transformers' Marian on n pairs."""
    model, (source, target) = marian(fields).train(), sentences(n, fields["vocab_size"])
    inputs = {"attention_mask": (source != PAD).long(), "decoder_input_ids": target[:, :-1]}
    return workloads.training(
        model.parameters(), lambda: _loss(model(source, use_cache=False, **inputs).logits, target)
    )


def translate_ours(name: str, fields: dict[str, Any], n: int, beam_size: int, n_tokens: int) -> Run:
    """Prepare the translation of n sentences into n_tokens each, by one of our models."""
    model, (source, _) = ours(name, fields).eval(), sentences(n, fields["vocab_size"])
    with torch.no_grad():  # a random model ends anywhere: its eos_id is made unlikely, not forbidden
        (model.target_embedding if model.head is None else model.head).weight[EOS] = 0.0

    def run() -> dict[str, Any]:
        hypotheses = translate_ids(model, source, beam_size=beam_size, max_len=n_tokens)
        return {"tokens": min(len(hypothesis.ids) for hypothesis in hypotheses)}

    return run


def translate_marian(fields: dict[str, Any], n: int, beam_size: int, n_tokens: int) -> Run:
    """Prepare the same of transformers' Marian."""
    model, (source, _) = marian(fields).eval(), sentences(n, fields["vocab_size"])
    options = {"num_beams": beam_size, "min_new_tokens": n_tokens + 1, "max_new_tokens": n_tokens + 1}

    def run() -> dict[str, Any]:
        with torch.no_grad():
            output = model.generate(source, attention_mask=(source != PAD).long(), do_sample=False, **options)
        return {"tokens": output.shape[1] - 2}

    return run


def decode_ours(fields: dict[str, Any], n: int, n_tokens: int, cached: bool) -> Run:
    """Prepare our Transformer decoding n_tokens for n sentences, with its KV cache or without."""
    model, (source, target) = ours("transformer", fields).eval(), sentences(n, fields["vocab_size"])
    first = target[:, 0]

    def step_by_step() -> None:
        state = model.start(source)
        workloads.decoding(first, n_tokens, lambda ids: model.step(ids, state)[0])()

    def without() -> None:
        prefix = first[:, None]

        def advance(ids: Tensor) -> Tensor:
            nonlocal prefix
            logits = model(source, prefix).logits[:, -1]
            prefix = torch.cat([prefix, logits.argmax(-1, keepdim=True)], 1)
            return cast(Tensor, logits)

        workloads.decoding(first, n_tokens, advance)()

    return torch.no_grad()(step_by_step if cached else without)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean nats of target (batch, tgt_len + 1) from logits (batch, tgt_len, vocab_size)."""
    expected = target[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), expected, ignore_index=PAD, label_smoothing=SMOOTHING)
