"""BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding.

Jacob Devlin, Ming-Wei Chang, Kenton Lee and Kristina Toutanova, 2018, arXiv 1810.04805.

Parent: the encoder of the Transformer, post-norm.
Kept: multi-head attention, the position-wise feed-forward network, a norm after each residual sum.
Changed: no decoder and no causal mask, every token attends to all others; position embeddings are learned,
and summed and normed with those of words and token types (first or second text); GELU for ReLU. Pre-training
is masked language modelling and next-sentence prediction (label 0 = the second text follows the first, 1 = it
is a random one).

Deviations from the original code: GELU is exact (`gelu`), as in published checkpoints; the original's tanh
approximation is `gelu_tanh`. Padding is masked out, not biased by -10000. Dropout is as in the original.

    x = LN(word[id] + position[t] + type[s])
    x = LN(x + W_O attention(W_Q x, W_K x, W_V x))        n_layers times, d_head = d_model / n_heads
    x = LN(x + W_2 gelu(W_1 x))
    pooled = tanh(W_p x_[CLS])
    masked token: softmax(E LN(gelu(W x)) + b), E the word embeddings;    next sentence, class: W pooled + b

Glossary: H = d_model, L = n_layers, A = n_heads; 4H = d_ff. Parameters have the names of Hugging Face's
BertForPreTraining and BertForSequenceClassification.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import Linear, blank, project
from longscan.models.common.losses import IGNORE
from longscan.models.common.model import Model
from longscan.ops import attention, attention_ref

Head: TypeAlias = Literal["none", "pretraining", "classifier"]
Score: TypeAlias = Literal["softmax", "sigmoid", "none"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 257, "max_positions": 64},
    "tiny-lm": {
        "d_model": 256,
        "n_layers": 4,
        "n_heads": 4,
        "vocab_size": 4096,
    },  # "mini" in the paper's code
    "minilm-l6": {"d_model": 384, "n_layers": 6, "n_heads": 12, "vocab_size": 30522},
    "base": {"d_model": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 30522},
    "large": {"d_model": 1024, "n_layers": 24, "n_heads": 16, "vocab_size": 30522},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The configuration of a BERT and its head; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: int  # H
    n_layers: int  # L
    n_heads: int  # A
    vocab_size: int
    d_ff: int | None = None  # None is 4 H
    max_positions: int = 512
    n_types: int = 2
    pad_id: int = 0
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02  # of a normal distribution truncated at two standard deviations
    head: Head = "pretraining"
    labels: tuple[str, ...] = ()  # of the classifier, in the order of its outputs
    score: Score = (
        "softmax"  # scores of the classifier: one class of all, independent classes, the raw logits
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_model", "n_layers", "n_heads", "vocab_size", "max_positions", "n_types", "d_ff")
        if self.d_model % self.n_heads:
            raise LongscanError(
                f"n_heads: expected a divisor of d_model = {self.d_model}, got {self.n_heads}."
            )
        self.check("pad_id", least=0, below=self.vocab_size)
        self.check("dropout", "attention_dropout", least=0, below=1)
        self.check("norm_eps", "init_std", above=0)
        if (self.head == "classifier") != bool(self.labels):
            raise LongscanError(
                "labels: expected names with the head 'classifier' and none otherwise, got "
                f"{len(self.labels)} with {self.head!r}."
            )
        if self.score != "softmax" and self.head != "classifier":
            raise LongscanError(
                f"score: expected 'softmax' unless the head is 'classifier', got {self.score!r} with "
                f"{self.head!r}."
            )
        if self.score == "softmax" and len(self.labels) == 1:
            raise LongscanError(
                "score: expected 'sigmoid' or 'none' with a single label, got 'softmax', which is always 1."
            )
        if len(set(self.labels)) < len(self.labels):
            raise LongscanError(f"labels: expected distinct names, got {self.labels}.")

    @property
    def d_inner(self) -> int:
        """Width inside the position-wise feed-forward network: d_ff or its default."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class BertOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        hidden: (batch, seq_len, d_model) final hidden states.
        pooled: (batch, d_model), from [CLS].
        weights: "encoder.0" ... -> attention weights (batch, n_heads, seq_len, seq_len), or None if not
            requested.
    """

    hidden: Tensor
    pooled: Tensor
    weights: dict[str, Tensor] | None


class PretrainingBatch(NamedTuple):
    """Pairs of texts with masked tokens.

    Attributes:
        ids: (batch, seq_len) int64, the masked input.
        types: (batch, seq_len) int64, the token types.
        labels: (batch, seq_len) int64, the original token where one was masked, else -100.
        is_random: (batch,) int64, 1 where the second text does not follow the first.
    """

    ids: Tensor
    types: Tensor
    labels: Tensor
    is_random: Tensor


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = blank(nn.Embedding, config.vocab_size, config.d_model)
        self.position_embeddings = blank(nn.Embedding, config.max_positions, config.d_model)
        self.token_type_embeddings = blank(nn.Embedding, config.n_types, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        """Return the embeddings (batch, seq_len, d_model) of ids and types (batch, seq_len)."""
        positions = self.position_embeddings.weight[: ids.shape[1]]  # (seq_len, d_model)
        x = self.word_embeddings(ids) + positions + self.token_type_embeddings(types)
        return cast(Tensor, self.dropout(self.LayerNorm(x)))


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention, with padding masked out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.attention_dropout
        self.query, self.key, self.value = (blank(Linear, config.d_model, config.d_model) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return the concatenated heads, and the attention weights if requested.

        Args:
            x: (batch, seq_len, d_model).
            mask: (batch, 1, 1, seq_len) bool, False in padding; no padding if None.
            return_weights: whether to return the attention weights.

        Returns:
            y: (batch, seq_len, d_model).
            weights: (batch, n_heads, seq_len, seq_len), or None.
        """
        heads = (map_to(x).unflatten(-1, (self.n_heads, -1)) for map_to in (self.query, self.key, self.value))
        q, k, v = heads  # (batch, seq_len, n_heads, d_head) each
        dropout = self.dropout if self.training else 0.0
        if return_weights:
            y, weights = attention_ref(q, k, v, mask=mask, dropout=dropout)
            return y.flatten(2), weights
        return attention(q, k, v, mask=mask, dropout=dropout).flatten(2), None


class AddNorm(nn.Module):
    """LN(residual + dropout(W x + b)), the end of both sublayers."""

    def __init__(self, config: BertConfig, d_in: int) -> None:
        super().__init__()
        self.dense = blank(Linear, d_in, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the normed sum of the residual (..., d_model) and the projection of x (..., d_in)."""
        return cast(Tensor, self.LayerNorm(residual + self.dropout(self.dense(x))))


class Dense(nn.Module):
    """A linear map and an activation, named as in checkpoints."""

    def __init__(self, d_in: int, d_out: int, activation: str) -> None:
        super().__init__()
        self.dense = blank(Linear, d_in, d_out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        x = self.dense(x)
        if self.activation == "tanh":
            return torch.tanh(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Transform(Dense):
    """A `Dense` and a norm: the hidden layer of the masked LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.d_model, config.d_model, config.activation)
        self.LayerNorm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        return cast(Tensor, self.LayerNorm(super().forward(x)))


class Layer(nn.Module):
    """Self-attention, then the position-wise feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        parts = {"self": SelfAttention(config), "output": AddNorm(config, config.d_model)}
        self.attention = nn.ModuleDict(parts)
        self.intermediate = Dense(config.d_model, config.d_inner, config.activation)
        self.output = AddNorm(config, config.d_inner)

    def forward(self, x: Tensor, mask: Tensor | None, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden states (batch, seq_len, d_model); see `SelfAttention.forward`."""
        y, weights = self.attention["self"](x, mask, return_weights)
        x = self.attention["output"](y, x)
        return self.output(self.intermediate(x), x), weights


class Encoder(nn.Module):
    """Embeddings, layers and the pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.n_layers))})
        self.pooler = Dense(config.d_model, config.d_model, "tanh")


class MaskedWordHead(nn.Module):
    """The masked LM head: a hidden layer, then the word embeddings and a bias per token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, embedding: nn.Module) -> Tensor:
        """Map (..., d_model) to logits (..., vocab_size)."""
        return project(self.transform(hidden), embedding) + self.bias


class Bert(Model):
    """A BERT with the head that its configuration names.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None, which dropout always
            uses.
    """

    config: BertConfig

    def __init__(self, config: BertConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.bert = Encoder(config)
        if config.head == "pretraining":
            words, follows = MaskedWordHead(config), blank(Linear, config.d_model, 2)
            self.cls = nn.ModuleDict({"predictions": words, "seq_relationship": follows})
        elif config.head == "classifier":
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = blank(Linear, config.d_model, len(config.labels))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
                self._init_weights(module, generator)

    @torch.no_grad()
    def _init_weights(self, module: nn.Linear | nn.Embedding, generator: torch.Generator | None) -> None:
        """Initialise a matrix with a truncated normal distribution, and its bias with 0."""
        std = self.config.init_std
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self,
        ids: Tensor,
        types: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> BertOutput:
        """Return the hidden states of texts; see `BertOutput`.

        Args:
            ids: (batch, seq_len) int64, starting with [CLS].
            types: (batch, seq_len) int64, the token types; 0 if None.
            mask: (batch, seq_len) bool, False in padding; False where ids are pad_id if None. The content of
                padding changes no result.
            return_weights: whether to return the attention weights.

        Raises:
            ValueError: there are no tokens, or more than max_positions.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        if ids.shape[1] > self.config.max_positions:
            raise ValueError(f"ids: expected at most {self.config.max_positions} per row, got {ids.shape[1]}")
        mask = ids != self.config.pad_id if mask is None else mask
        allowed = None if bool(mask.all()) else mask[:, None, None]  # (batch, 1, 1, seq_len)
        x = self.bert.embeddings(ids, torch.zeros_like(ids) if types is None else types)
        seen = {}
        for number, layer in enumerate(cast(nn.ModuleList, self.bert.encoder["layer"])):
            x, seen[f"encoder.{number}"] = layer(x, allowed, return_weights)
        return BertOutput(x, self.bert.pooler(x[:, 0]), seen if return_weights else None)

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocab_size) of masked language modelling.

        Args:
            hidden: (..., d_model) of `forward`.

        Raises:
            ValueError: the model has no such head.
        """
        self._need("pretraining")
        return cast(Tensor, self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings))

    def nsp_logits(self, pooled: Tensor) -> Tensor:
        """Return the logits (batch, 2) of next-sentence prediction: the text follows, or is a random one.

        Args:
            pooled: (batch, d_model) of `forward`.

        Raises:
            ValueError: the model has no such head.
        """
        self._need("pretraining")
        return cast(Tensor, self.cls["seq_relationship"](pooled))

    def classify(self, pooled: Tensor) -> Tensor:
        """Return the logits of the classes, (batch, len(config.labels)).

        Args:
            pooled: (batch, d_model) of `forward`.

        Raises:
            ValueError: the model has no such head.
        """
        self._need("classifier")
        return cast(Tensor, self.classifier(self.dropout(pooled)))

    def losses(self, batch: PretrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the two losses whose sum pre-training minimises.

        Args:
            batch: on the model's device.

        Returns:
            words: () mean cross-entropy of the masked tokens in nats, 0 if there are none.
            follows: () mean cross-entropy of the next-sentence labels in nats.
        """
        output = self(batch.ids, batch.types)
        masked = batch.labels != IGNORE
        logits = self.mlm_logits(output.hidden[masked])  # (n_masked, vocab_size)
        words = F.cross_entropy(logits, batch.labels[masked], reduction="sum") / masked.sum().clamp(min=1)
        return words, F.cross_entropy(self.nsp_logits(output.pooled), batch.is_random)

    def _need(self, head: str) -> None:
        """Raise ValueError unless the model has this head."""
        if self.config.head != head:
            raise ValueError(f"head: expected a model with {head!r}, got {self.config.head!r}")


ENTRY = ModelEntry(
    name="bert",
    kind="masked",
    year=2018,
    paper="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    arxiv="1810.04805",
    idea="both sides of every word",
    parents=("transformer",),
    cls=Bert,
    config=BertConfig,
    presets=PRESETS,
    verbs=("train", "classify", "fill-mask", "embed"),
)
