"""What every translator here has: the ids around it, its loss, its state while it writes.

A translator reads a source sentence and writes a target sentence, each token given the source and the tokens
before it. One vocabulary serves both languages. Source rows are tokens, eos_id, then pad_id; target rows are
bos_id, tokens, eos_id, then pad_id. Padding stands on the right and changes nothing: neither what a row gives
nor what its neighbours give.
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
    """What every translator here has; a model's own Config adds its letters.

    Attributes:
        vocab_size: tokens the tokenizer knows, of both languages.
        pad_id: fills rows up on the right.
        bos_id: what a target sentence starts with.
        eos_id: what every sentence ends with.
        dropout: share of the numbers that is dropped in training, where the model says.
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
        self.check_counts("vocab_size")
        special = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(special)) < 3 or not all(0 <= token < self.vocab_size for token in special):
            limit = f"three different ids below vocab_size ({self.vocab_size})"
            raise LongscanError(f"pad_id, bos_id, eos_id: expected {limit}, got {special}.")
        if not 0 <= self.dropout < 1:
            raise LongscanError(f"dropout: expected a share from 0 to below 1, got {self.dropout}.")

    def check_counts(self, *names: str) -> None:
        """Insist that fields are whole numbers of at least 1.

        Args:
            names: the fields.

        Raises:
            LongscanError: one is not.
        """
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LongscanError(f"{name}: expected a whole number of at least 1, got {value!r}.")


class TranslatorOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: (batch, tgt_len, vocab_size): position t predicts target[t + 1].
        weights: name -> (batch, n_heads, who looks, what at), or None if not asked for. "cross", of one head,
            in a recurrent model with attention; "encoder.0", "decoder.0", "cross.0" ... in a Transformer.
    """

    logits: Tensor
    weights: dict[str, Tensor] | None


@dataclasses.dataclass(eq=False)
class Writing:
    """A sentence half written: what the decoder remembers, and the source it looks at.

    Attributes:
        decoder: one row per sentence that is written.
        memory: one row per source sentence; nothing changes it. If there are more rows in `decoder`, those of
            one source stand together, as many of each: so the hypotheses of a beam share one memory.
        position: target tokens read, the same for all rows.
    """

    decoder: State
    memory: State
    position: int = 0

    @property
    def width(self) -> int:
        """Rows of each source sentence."""
        return self.decoder.batch_size // self.memory.batch_size

    def clone(self) -> "Writing":
        """Return a copy that further steps on this state do not touch."""
        return dataclasses.replace(self, decoder=self.decoder.clone())

    def fork(self, n: int) -> "Writing":
        """Copy every row n times; the copies stand together and share the memory.

        Args:
            n: copies of each row.
        """
        return dataclasses.replace(self, decoder=self.decoder.fork(n))

    def select(self, rows: Tensor | Sequence[int]) -> "Writing":
        """Copy some rows, each with a memory of its own.

        Args:
            rows: indices.
        """
        rows = torch.as_tensor(rows)
        return self.branch(rows, rows // self.width)

    def branch(self, rows: Tensor, sentences: Tensor | None = None) -> "Writing":
        """Copy the rows that a beam goes on with.

        Args:
            rows: (n,) indices, as many for each source sentence that stays, in the order of the sentences.
            sentences: indices of the source sentences that stay; all if None, and none of them is copied.

        Returns:
            A new state.
        """

        def pick(state: State, index: Tensor) -> State:  # several times as fast as State.select
            return state.map(lambda tensor: tensor.index_select(0, index))

        memory = self.memory if sentences is None else pick(self.memory, sentences)
        return dataclasses.replace(self, decoder=pick(self.decoder, rows), memory=memory)


class Translator(Model):
    """A model that writes one sentence while it looks at another.

    A subclass brings `read`, `write` and `advance`; what they return becomes logits through `head`.

    Attributes:
        source_embedding: None if it is the target embedding.
        target_embedding: of the words that were written.
        head: None if it is the target embedding.
        max_positions: longest sentence it can take; None if there is no limit.
        embedding_scale: what embeddings are multiplied with on their way in.
    """

    config: TranslatorConfig
    source_embedding: nn.Embedding | None
    target_embedding: nn.Embedding
    head: nn.Linear | None
    max_positions: int | None = None
    embedding_scale: float = 1.0

    def read(self, source: Tensor, weights: dict[str, Tensor] | None = None) -> Writing:
        """Read source sentences.

        Args:
            source: (batch, src_len) int64.
            weights: receives the attention weights.

        Returns:
            The state before bos_id.
        """
        raise NotImplementedError

    def write(self, target: Tensor, state: Writing, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Read whole target sentences from the start.

        Args:
            target: (batch, tgt_len) int64.
            state: of `read`.
            weights: receives the attention weights.

        Returns:
            (batch, tgt_len, d_out), what the head reads.
        """
        raise NotImplementedError

    def advance(self, ids: Tensor, state: Writing) -> Tensor:
        """Read one target token per row.

        Args:
            ids: (rows,) int64.
            state: overwritten with the state after the token.

        Returns:
            (rows, d_out), what the head reads.
        """
        raise NotImplementedError

    def forward(self, source: Tensor, target: Tensor, *, return_weights: bool = False) -> TranslatorOutput:
        """Predict every next token of the target sentences.

        Args:
            source: (batch, src_len) int64: tokens, eos_id, then pad_id.
            target: (batch, tgt_len) int64: bos_id, tokens, eos_id or not, then pad_id.
            return_weights: whether to return where the model looked.

        Returns:
            logits, weights; see `TranslatorOutput`.

        Raises:
            ValueError: shapes do not fit.
        """
        weights: dict[str, Tensor] | None = {} if return_weights else None
        return TranslatorOutput(self._project(self._hidden(source, target, weights)), weights)

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Compute the mean nats of the target tokens, without holding all logits.

        Args:
            source: as in `forward`.
            target: likewise.
            label_smoothing: s: the target token is to have 1 - s and each of the other vocab_size - 1
                tokens s / (vocab_size - 1). This is the form of tensor2tensor, the code of Vaswani et al.,
                2017 (section 5.4); the paper they cite, Szegedy et al., 2015, arXiv 1512.00567, gives
                s / vocab_size to every token, the target included.

        Returns:
            () mean over the tokens after bos_id that are no padding.

        Raises:
            ValueError: shapes do not fit, or there is no such token.
        """
        hidden = self._hidden(source, target[:, :-1], None)
        wanted = target[:, 1:] != self.config.pad_id
        if not bool(wanted.any()):
            raise ValueError("target: expected a token after bos_id, got none")
        hidden, truth, vocab_size = hidden[wanted], target[:, 1:][wanted], self.config.vocab_size
        if self.head is not None and not untouched(self.head):  # more than its weight, and must be called
            logits = self._project(hidden)
            scores: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            other = label_smoothing / (vocab_size - 1) if label_smoothing else 0.0
            own = (1 - label_smoothing - other) * scores.gather(1, truth[:, None])[:, 0]
            return -(own + other * scores.sum(-1)).mean()
        matrix = (self.target_embedding if self.head is None else self.head).weight
        return linear_loss(hidden, matrix, truth, vocab_size, label_smoothing)

    @torch.no_grad()
    def start(self, source: Tensor) -> Writing:
        """Read source sentences, before anything is written.

        Args:
            source: (batch, src_len) int64, as in `forward`.

        Returns:
            The state before bos_id.

        Raises:
            ValueError: the shape does not fit.
        """
        _check_ids("source", source)
        return self.read(source)

    @torch.no_grad()
    def step(self, ids: Tensor, state: Writing) -> tuple[Tensor, Writing]:
        """Read one target token per row: what `forward` gives at that position.

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
        """Return the embedding of a side, which may be one and the same."""
        own = self.source_embedding if side == "source" else None
        return self.target_embedding if own is None else own

    @torch.no_grad()
    def load_vectors(self, ids: Tensor, vectors: Tensor, side: Literal["source", "target"]) -> None:
        """Start some embeddings from known word vectors, so that the network reads them as they are.

        Args:
            ids: (n,) the tokens.
            vectors: (n, width of the embedding).
            side: which table, if there are two.

        Raises:
            LongscanError: the width is another.
        """
        table = self.table(side).weight
        if vectors.shape[-1] != table.shape[1]:
            raise LongscanError(
                f"word vectors: expected a width of {table.shape[1]}, got {vectors.shape[-1]}. "
                "Use other vectors, or a model of their width."
            )
        table[ids] = vectors.to(table) / self.embedding_scale

    def drop(self, x: Tensor) -> Tensor:
        """Drop a share of the numbers, in training."""
        return dropout(x, self.config.dropout, self.training)

    def _hidden(self, source: Tensor, target: Tensor, weights: dict[str, Tensor] | None) -> Tensor:
        """Compute what the head reads, (batch, tgt_len, d_out)."""
        _check_ids("source", source)
        _check_ids("target", target)
        if len(source) != len(target):
            raise ValueError(f"source, target: expected as many rows, got {len(source)} and {len(target)}")
        return self.write(target, self.read(source, weights), weights)

    def _project(self, hidden: Tensor) -> Tensor:
        """Turn what the decoder returns into logits (..., vocab_size)."""
        return project(hidden, self.target_embedding) if self.head is None else self.head(hidden)


def _check_ids(name: str, ids: Tensor) -> None:
    """Insist on (batch, seq_len) ids, at least one."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{name}: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")


def embedding(vocab_size: int, width: int) -> nn.Embedding:
    """Make an embedding whose entries the model sets.

    Args:
        vocab_size: rows.
        width: columns.

    Returns:
        The layer.
    """
    return blank(nn.Embedding, vocab_size, width)
