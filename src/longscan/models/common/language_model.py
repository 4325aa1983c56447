"""The language model around a mixer: embedding -> [x + mixer(norm(x))] -> norm -> head, written once.

A model file brings its own Config and Mixer. The loss, prefill, decoding and state are here, the residual
stream in `backbone`. Parameters have the names of the official Mamba checkpoints.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.models.common.backbone import Backbone
from longscan.models.common.layers import WeightOnly, linear, project, untouched
from longscan.models.common.losses import count, linear_loss, nats, next_tokens, row_chunks
from longscan.models.common.mixer import Block, LanguageModelConfig, Mixer
from longscan.models.common.model import Model
from longscan.models.common.native_decode import Decoder
from longscan.models.common.native_stack import stack_of
from longscan.models.common.packing import latest, restarts, warn_beyond
from longscan.models.common.state import State
from longscan.ops._derivatives import composed

CHUNK = 512  # tokens per prefill pass: at 130m, 512 cost 3 to 8 % of the speed of 1,024, 256 9 to 18 %


class Output(NamedTuple):
    """The result of a forward pass.

    Attributes:
        logits: (batch, seq_len, padded_vocab_size) in the dtype of the weights, or None if not requested.
        loss: mean cross-entropy per predicted token in nats, at least float32, or None without labels.
        state: after the last token.
        hidden: n_layers + 1 tensors (batch, seq_len, d_model): the residual stream before each block, then
            the final hidden state, the input of the head; or None if not requested.
    """

    logits: Tensor | None
    loss: Tensor | None
    state: State
    hidden: tuple[Tensor, ...] | None


class LanguageModel(Model):
    """A causal language model around a stack of blocks.

    Args:
        config: available as `model.config`.
        generator: randomness of the initialisation; torch's global one if None.

    Attributes:
        decodable: the model's own module types, if the native decoder knows them.
    """

    config: LanguageModelConfig
    decodable: tuple[type[nn.Module], ...] = ()
    body: ClassVar[type[Backbone]] = Backbone

    def __init__(self, config: LanguageModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self._decoder: Decoder | None = None
        self.backbone = self.body(config, self.blocks(config, generator), generator)
        self.lm_head = None  # tied: no copy that could drift, and files hold the embedding once
        if not config.tie_embeddings:
            self.lm_head = linear(config.d_model, config.padded_vocab_size, False, generator)

    @staticmethod
    def block(config: Any, generator: torch.Generator | None = None) -> Block:
        """Return one block of this model; sequence classifiers are built from them too.

        Args:
            config: the sizes.
            generator: randomness of the initialisation; torch's global one if None.
        """
        raise NotImplementedError

    @classmethod
    def blocks(cls, config: Any, generator: torch.Generator | None = None) -> list[Block]:
        """Return all n_layers blocks; a model whose blocks differ by depth overrides this.

        Args:
            config: the sizes.
            generator: randomness of the initialisation; torch's global one if None.
        """
        return [cls.block(config, generator) for _ in range(config.n_layers)]

    def forward(
        self,
        ids: Tensor,
        *,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        return_hidden: bool = False,
        return_logits: bool = True,
    ) -> Output:
        """Return the logits of the next token at every position, and the loss if there are labels.

        Args:
            ids: (batch, seq_len) int64.
            state: before the first token; the initial state if None. Gradients flow into it and out of the
                returned one.
            seq_idx: (batch, seq_len) int32 or int64 for packed and padded rows: a new value starts a new
                sequence, negative means padding. The first sequence of a row continues `state`.
            labels: (batch, seq_len) int64, usually ids: position t predicts labels[t + 1]. -100 is ignored;
                with seq_idx, so are labels in padding and those at the start of a sequence.
            return_hidden: whether to return the residual streams.
            return_logits: if False, the loss is computed in chunks, with far less memory than the logits
                take.

        Returns:
            logits, loss, state, hidden; see `Output`.

        Raises:
            ValueError: shapes do not fit.
        """
        streams: list[Tensor] | None = [] if return_hidden else None
        hidden, state = self.backbone(ids, state, seq_idx, streams)
        logits = self.head(hidden) if return_logits else None
        loss = None
        if labels is not None:
            targets = next_tokens(labels, seq_idx)
            if logits is None:
                loss = self.hidden_loss(hidden, targets)
            else:
                losses = nats(logits.flatten(0, 1), targets.flatten(), self.config.vocab_size)
                loss = losses.sum() / count(targets)
        return Output(logits, loss, state, None if streams is None else (*streams, hidden))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, also of a quantised one."""
        return self.backbone.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.backbone.embedding.weight.device

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was trained for; None if there is no limit."""
        return None

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of final hidden states.

        Args:
            hidden: (..., d_model) of the backbone.

        Returns:
            (..., padded_vocab_size); entries from vocab_size on belong to no token.
        """
        if self.lm_head is None:
            return project(hidden, self.backbone.embedding)
        return cast(Tensor, self.lm_head(hidden))

    def init_state(self, batch_size: int) -> State:
        """Return the initial state.

        Args:
            batch_size: rows.
        """
        mixers = [layer.mixer for layer in self.backbone.layers]
        return State([mixer.init_state(batch_size) for mixer in mixers], self)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        chunk_size: int = 2 * CHUNK,
    ) -> tuple[Tensor, State]:
        """Return the logits after a prompt, and the state; chunks keep the activation memory constant.

        Args:
            ids: (batch, seq_len) int64.
            state: before the prompt, not modified; the initial state if None.
            seq_idx: (batch, seq_len), see `forward`; padding may be anywhere.
            chunk_size: tokens per forward pass.

        Returns:
            logits: (batch, padded_vocab_size) after the last token of each row, padding aside.
            state: after that token.

        Raises:
            ValueError: shapes do not fit, or a row is all padding.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        if seq_idx is not None and bool((seq_idx < 0).all(1).any()):
            raise ValueError("seq_idx: expected a token in every row, got a row of only padding")
        state = self.init_state(ids.shape[0]) if state is None else state
        last, last_idx = None, None
        for begin in range(0, ids.shape[1], chunk_size):
            chunk = slice(begin, begin + chunk_size)
            if seq_idx is None:
                hidden, state = self.backbone(ids[:, chunk], state)
                last = hidden[:, -1]
            else:
                if last_idx is not None:
                    fresh = self.init_state(state.batch_size)
                    state = state.restarted(restarts(last_idx, seq_idx[:, chunk]), fresh)
                hidden, state = self.backbone(ids[:, chunk], state, seq_idx[:, chunk])
                last = latest(last, hidden, seq_idx[:, chunk])
                last_idx = latest(last_idx, seq_idx[:, chunk], seq_idx[:, chunk])
        if last is None:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        return self.head(last), state

    @torch.no_grad()
    def step(self, ids: Tensor, state: State, assume_unchanged: bool = False) -> tuple[Tensor, State]:
        """Decode one token per row, in one native call where the model allows it.

        Args:
            ids: (batch,) int64.
            state: overwritten with the state after the token.
            assume_unchanged: skip the check that weights, modules and hooks are those of the last step. The
                check takes longer than all other Python code for a token.

        Returns:
            logits: (batch, padded_vocab_size).
            state: the same object.
        """
        logits = self._decode(ids[:, None], state, assume_unchanged)
        return (self.head(self.backbone.step(ids, state)) if logits is None else logits[:, 0]), state

    @torch.no_grad()
    def advance(self, ids: Tensor, state: State, assume_unchanged: bool = False) -> tuple[Tensor, State]:
        """Decode several known tokens per row in one pass over the weights; bit-exact with as many steps.

        Args:
            ids: (batch, steps) int64; for long texts `prefill` is faster.
            state: overwritten with the state after the last token.
            assume_unchanged: see `step`.

        Returns:
            logits: (batch, steps, padded_vocab_size), after each token.
            state: the same object.

        Raises:
            ValueError: there are no tokens.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, steps), got {tuple(ids.shape)}")
        logits = self._decode(ids, state, assume_unchanged)
        if logits is None:
            steps = [self.head(self.backbone.step(column, state)) for column in ids.unbind(1)]
            logits = torch.stack(steps, 1)
        return logits, state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model, and drop the native decoder, which points to the old weights."""
        self._decoder = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _decode(self, ids: Tensor, state: State, assume_unchanged: bool) -> Tensor | None:
        """Return the logits of ids (batch, steps) from the native decoder; None if it does not apply."""
        if torch.compiler.is_compiling() or composed():
            return None
        if self._decoder is None or not (assume_unchanged or self._decoder.fresh()):
            usual = type(self).head is LanguageModel.head and self.decodable
            described = stack_of(self, self.decodable) if usual else None
            self._decoder = None if described is None else Decoder(described[0], self, described[1])
            if self._decoder is None or not self._decoder.fresh():
                return None
        logits = self._decoder.run(ids, state)
        if logits is not None and self.max_positions is not None:
            warn_beyond(self._decoder.longest, self.max_positions)
        return logits

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each target, in nats, without materialising all logits at once.

        Args:
            hidden: (..., d_model) of the backbone.
            targets: (...) int64 below vocab_size, aligned: the token that follows each position.

        Returns:
            (...) at least float32; 0 where the target is -100.
        """
        vocab_size = self.config.vocab_size
        chunks = [nats(self.head(h), t, vocab_size) for h, t in row_chunks(hidden, targets, vocab_size)]
        return torch.cat(chunks).view(targets.shape)

    @torch.no_grad()
    def token_scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each target, in nats, and whether it is the most likely token.

        Args:
            hidden: (n, d_model) of the backbone.
            targets: (n,) int64 below vocab_size: the token that follows each position.

        Returns:
            losses: (n,) at least float32.
            hits: (n,) bool.
        """
        vocab_size = self.config.vocab_size
        losses, hits = [hidden.new_zeros(0)], [targets.new_zeros(0, dtype=torch.bool)]
        for h, t in row_chunks(hidden, targets, vocab_size):
            logits = self.head(h)[:, :vocab_size]
            losses.append(nats(logits, t, vocab_size))
            hits.append(logits.argmax(-1) == t)
        return torch.cat(losses), torch.cat(hits)

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrence, which set its time scales."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.recurrence)

    def slow(self) -> Iterable[nn.Parameter]:
        """Return A, B and dt of state spaces, which have a lower learning rate."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.slow)

    def hidden_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats without materialising all logits at once.

        Args:
            hidden: (..., d_model) of the backbone.
            targets: (...) int64 below vocab_size, aligned: the token that follows each position, or -100.

        Returns:
            () at least float32; 0 if there is no target.
        """
        matrix = self.backbone.embedding if self.lm_head is None else self.lm_head
        weight: Tensor | None = matrix.weight
        if isinstance(matrix, WeightOnly):  # under adapters; it has no gradient of its own
            trains = torch.is_grad_enabled() and hidden.requires_grad and not matrix._forward_hooks
            weight = ops.dequantize(matrix.weight, matrix.scale) if trains else None
        elif self.lm_head is not None and not untouched(self.lm_head):
            weight = None  # an adapted head (LoRA, parametrised, hooked) does more than its weight
        if "head" in self.__dict__ or type(self).head is not LanguageModel.head:
            weight = None
        if weight is None or not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
            return self.token_losses(hidden, targets).sum() / count(targets)
        return linear_loss(hidden, weight, targets, self.config.vocab_size)
