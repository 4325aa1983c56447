"""The encoder-decoder translation model that papers fill in: special ids, loss, decoder state.

The encoder maps a source sentence to a memory; the decoder predicts each target token from the memory and the
target tokens before it. One vocabulary serves both languages. Source rows are tokens, eos_id, then pad_id;
target rows are bos_id, tokens, eos_id, then pad_id. Padding on the right changes no result.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models.common.layers import blank, project, untouched
from longscan.models.common.losses import linear_loss
from longscan.models.common.model import Model
from longscan.models.common.state import State
from longscan.ops import dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslatorConfig(Config):
    """The fields that all translation models share; each model's own Config adds its paper's.

    Attributes:
        vocab_size: number of tokens in the vocabulary, which both languages share.
        pad_id: padding, on the right.
        bos_id: the first token of a target sentence.
        eos_id: the last token of every sentence.
        dropout: dropout probability, applied where the model's file says.
    """

    vocab_size: int
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            LongscanError: a value is out of range.
        """
        super().__post_init__()
        self.check("vocab_size")
        special = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            limit = f"three different ids below vocab_size ({self.vocab_size})"
            raise LongscanError(f"pad_id, bos_id, eos_id: expected {limit}, got {special}.")
        self.check("dropout", least=0, below=1)


class TranslatorOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        logits: (batch, tgt_len, vocab_size): position t predicts target[t + 1].
        weights: name -> attention weights (batch, n_heads, q_len, k_len), or None if not requested. "cross",
            of one head, in a recurrent model with attention; "encoder.0", "decoder.0", "cross.0" ... in a
            Transformer.
    """

    logits: Tensor
    weights: dict[str, Tensor] | None


@dataclasses.dataclass(eq=False)
class DecoderState:
    """The state of decoding: that of the decoder, and the encoder's memory.

    Attributes:
        decoder: one row per hypothesis.
        memory: one row per source sentence; never modified. If `decoder` has more rows, those of one source
            are adjacent, and equally many for each source: the hypotheses of a beam share one memory.
        position: target tokens consumed, the same for all rows.
    """

    decoder: State
    memory: State
    position: int = 0

    @property
    def width(self) -> int:
        """Rows per source sentence: the beam size."""
        return self.decoder.batch_size // self.memory.batch_size

    def clone(self) -> "DecoderState":
        """Return an independent copy, which shares the memory."""
        return dataclasses.replace(self, decoder=self.decoder.clone())

    def fork(self, n: int) -> "DecoderState":
        """Return a state with n copies of every row, adjacent and sharing the memory.

        Args:
            n: copies of each row.
        """
        return dataclasses.replace(self, decoder=self.decoder.fork(n))

    def select(self, rows: Tensor | Sequence[int]) -> "DecoderState":
        """Return a copy of some rows, each with its own row of the memory.

        Args:
            rows: indices.
        """
        rows = torch.as_tensor(rows)
        return self.branch(rows, rows // self.width)

    def branch(self, rows: Tensor, sentences: Tensor | None = None) -> "DecoderState":
        """Return a new state of the surviving hypotheses of a beam search.

        Args:
            rows: (n,) indices, equally many for each remaining source sentence, in the order of the
                sentences.
            sentences: indices of the remaining source sentences; all if None, and the memory is not copied.
        """

        def pick(state: State, index: Tensor) -> State:  # several times as fast as State.select
            return state.map(lambda tensor: tensor.index_select(0, index))

        memory = self.memory if sentences is None else pick(self.memory, sentences)
        return dataclasses.replace(self, decoder=pick(self.decoder, rows), memory=memory)


class Translator(Model):
    """An encoder-decoder model for translation.

    A subclass defines `encode`, `decode` and `advance`; `head` turns their results into logits.

    Attributes:
        source_embedding: None if it is tied to the target embedding.
        target_embedding: of the decoder's input tokens.
        head: None if it is tied to the target embedding.
        max_positions: the longest supported sentence; None if there is no limit.
        embedding_scale: factor that input embeddings are multiplied by.
    """

    config: TranslatorConfig
    source_embedding: nn.Embedding | None
    target_embedding: nn.Embedding
    head: nn.Linear | None
    max_positions: int | None = None
    embedding_scale: float = 1.0

    def encode(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> DecoderState:
        """Return the decoder's initial state, before bos_id, for source sentences.

        Args:
            source: (batch, src_len) int64.
            weights: receives the attention weights.
        """
        raise NotImplementedError

    def decode(self, target: Tensor, state: DecoderState, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the head's input for whole target sentences (teacher forcing).

        Args:
            target: (batch, tgt_len) int64.
            state: of `encode`.
            weights: receives the attention weights.

        Returns:
            (batch, tgt_len, d_out).
        """
        raise NotImplementedError

    def advance(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Return the head's input after one more target token per row.

        Args:
            ids: (rows,) int64.
            state: overwritten with the state after the token.

        Returns:
            (rows, d_out).
        """
        raise NotImplementedError

    def forward(self, source: Tensor, target: Tensor, *, return_weights: bool = False) -> TranslatorOutput:
        """Return the logits of every next token of the target sentences.

        Args:
            source: (batch, src_len) int64: tokens, eos_id, then pad_id.
            target: (batch, tgt_len) int64: bos_id, tokens, eos_id or not, then pad_id.
            return_weights: whether to return the attention weights.

        Returns:
            logits, weights; see `TranslatorOutput`.

        Raises:
            ValueError: shapes do not fit.
        """
        weights: dict[str, Tensor] | None = {} if return_weights else None
        return TranslatorOutput(self._project(self._hidden(source, target, weights)), weights)

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of the target tokens in nats, without materialising all logits.

        Args:
            source: as in `forward`.
            target: likewise.
            label_smoothing: s: the target distribution gives 1 - s to the target token and s / (vocab_size -
                1) to each other token. This is the form of tensor2tensor, the code of Vaswani et al., 2017
                (section 5.4); the paper they cite, Szegedy et al., 2015, arXiv 1512.00567, gives
                s / vocab_size to every token, the target included.

        Returns:
            () mean over the tokens after bos_id, padding aside.

        Raises:
            ValueError: shapes do not fit, or there is no such token.
        """
        hidden = self._hidden(source, target[:, :-1], None)
        real = target[:, 1:] != self.config.pad_id
        if not bool(real.any()):
            raise ValueError("target: expected a token after bos_id, got none")
        hidden, truth, vocab_size = hidden[real], target[:, 1:][real], self.config.vocab_size
        if self.head is not None and not untouched(self.head):  # an adapted head must be called
            logits = self._project(hidden)
            scores: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            other = label_smoothing / (vocab_size - 1) if label_smoothing else 0.0
            own = (1 - label_smoothing - other) * scores.gather(1, truth[:, None])[:, 0]
            return -(own + other * scores.sum(-1)).mean()
        matrix = (self.target_embedding if self.head is None else self.head).weight
        return linear_loss(hidden, matrix, truth, vocab_size, label_smoothing)

    @torch.no_grad()
    def start(self, source: Tensor) -> DecoderState:
        """Return the decoder's initial state, before bos_id.

        Args:
            source: (batch, src_len) int64, as in `forward`.

        Raises:
            ValueError: the shape does not fit.
        """
        _check_ids("source", source)
        return self.encode(source)

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Decode one target token per row: the logits that `forward` gives at that position.

        Args:
            ids: (rows,) int64, bos_id first.
            state: overwritten with the state after the token.

        Returns:
            logits: (rows, vocab_size).
            state: the same object.
        """
        hidden = self.advance(ids, state)
        state.position += 1
        return self._project(hidden), state

    def table(self, side: Literal["source", "target"]) -> nn.Embedding:
        """Return the embedding of a side; with tied embeddings both sides have the same."""
        own = self.source_embedding if side == "source" else None
        return self.target_embedding if own is None else own

    @torch.no_grad()
    def load_vectors(self, ids: Tensor, vectors: Tensor, side: Literal["source", "target"]) -> None:
        """Initialise some embeddings with pretrained word vectors; `embedding_scale` is divided out.

        Args:
            ids: (n,) the tokens.
            vectors: (n, d_embedding).
            side: which embedding, if there are two.

        Raises:
            LongscanError: the vectors have another width than the embedding.
        """
        table = self.table(side).weight
        if vectors.shape[-1] != table.shape[1]:
            raise LongscanError(
                f"word vectors: expected a width of {table.shape[1]}, got {vectors.shape[-1]}. "
                "Use other vectors, or a model of their width."
            )
        table[ids] = vectors.to(table) / self.embedding_scale

    def drop(self, x: Tensor) -> Tensor:
        """Return x with dropout in training mode."""
        return dropout(x, self.config.dropout, self.training)

    def _hidden(self, source: Tensor, target: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
        """Return the head's input, (batch, tgt_len, d_out)."""
        _check_ids("source", source)
        _check_ids("target", target)
        if len(source) != len(target):
            raise ValueError(f"source, target: expected as many rows, got {len(source)} and {len(target)}")
        return self.decode(target, self.encode(source, weights), weights)

    def _project(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocab_size) of the decoder's outputs."""
        return project(hidden, self.target_embedding) if self.head is None else self.head(hidden)


def _check_ids(name: str, ids: Tensor) -> None:
    """Raise ValueError unless ids are a non-empty (batch, seq_len)."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{name}: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")


def embedding(vocab_size: int, width: int) -> nn.Embedding:
    """Return an uninitialised embedding.

    Args:
        vocab_size: rows.
        width: columns.
    """
    return blank(nn.Embedding, vocab_size, width)
