"""The language model around a mixer: embedding -> [x + mixer(norm(x))] -> norm -> head, written once.

A model file brings its own Config and Mixer; everything about tokens, the residual stream, the state and
chunked reading is here. Parameters carry the names of the official Mamba checkpoints.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.models.common.layers import RMSNorm, WeightOnly, blank, linear, project, untouched
from longscan.models.common.losses import count, linear_loss, nats, next_tokens, row_chunks
from longscan.models.common.mixer import Block, Blocks, LanguageModelConfig, Mixer
from longscan.models.common.model import Model
from longscan.models.common.native_decode import Decoder
from longscan.models.common.state import State, latest
from longscan.ops._derivatives import composed


class Backbone(nn.Module):
    """From ids to the normalised residual stream that the head reads."""

    def __init__(
        self, config: LanguageModelConfig, blocks: Iterable[Block], generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.layers = Blocks(blocks)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.embedding = blank(nn.Embedding, config.padded_vocab_size, config.d_model)
        if not self.embedding.weight.is_meta:
            nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        streams: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Read tokens.

        Args:
            ids: (batch, seq_len) integers.
            state: what came before the first token; nothing if None.
            seq_idx: (batch, seq_len), see `Mixer.plan`.
            streams: a list that receives the residual stream before each block, (batch, seq_len, d_model).

        Returns:
            hidden: (batch, seq_len, d_model) in the type of the weights.
            state: after the last token.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        return self.mix(self._embed(ids), state, seq_idx, streams)

    def mix(
        self,
        x: Tensor,
        state: State | None = None,
        seq_idx: Tensor | None = None,
        streams: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Read vectors instead of tokens: what comes after the embedding.

        Args:
            x: (batch, seq_len, d_model).
            state: see `forward`.
            seq_idx: likewise.
            streams: likewise.

        Returns:
            hidden: (batch, seq_len, d_model).
            state: after the last vector.
        """
        before = [None] * len(self.layers) if state is None else state.layers
        plan, after = self._first.plan(x[..., 0], before[0], seq_idx), []
        for layer, layer_state in zip(self.layers, before, strict=True):
            if streams is not None:
                streams.append(x)
            x, layer_state = layer(x, layer_state, plan)
            after.append(layer_state)
        return self.norm_f(x), State(after, None if state is None else state.model)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Read one token per row, ids (batch,), into the state; return hidden (batch, d_model)."""
        state.reserve(1)
        x, plan = self._embed(ids), self._first.plan(ids, state.layers[0], None)
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, layer_state, plan)
        return cast(Tensor, self.norm_f(x))

    @property
    def _first(self) -> Mixer[Any]:
        """The mixer that speaks for all."""
        return next(iter(self.layers)).mixer

    def _embed(self, ids: Tensor) -> Tensor:
        """Start the residual stream, in float32 so that many small additions are not lost."""
        x: Tensor = self.embedding(ids)
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: (batch, seq_len, padded_vocab_size) in the type of the weights, or None if not asked for.
        loss: mean nats per predicted token, float32 at least, or None without labels.
        state: after the last token.
        hidden: n_layers + 1 tensors (batch, seq_len, d_model), the residual stream before each block and last
            what the head reads; or None if not asked for.
    """

    logits: Tensor | None
    loss: Tensor | None
    state: State
    hidden: tuple[Tensor, ...] | None


class LanguageModel(Model):
    """A causal language model around a stack of blocks.

    Args:
        config: the model's Config, kept as `model.config`.
        generator: randomness of the start; torch's global one if None.
    """

    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self._decoder: Decoder | None = None
        self.backbone = Backbone(config, self.blocks(config, generator), generator)
        self.lm_head = None  # tied: the head is the embedding, so no copy can drift and files hold it once
        if not config.tie_embeddings:
            self.lm_head = linear(config.d_model, config.padded_vocab_size, False, generator)

    @staticmethod
    def block(config: Any, generator: torch.Generator | None = None) -> Block:
        """Make one block of this model: what other bodies, not of language, are made of too.

        Args:
            config: the sizes.
            generator: randomness of the start; torch's global one if None.
        """
        raise NotImplementedError

    @classmethod
    def blocks(cls, config: Any, generator: torch.Generator | None = None) -> list[Block]:
        """Make all n_layers blocks; a model whose blocks differ by their place says so here.

        Args:
            config: the sizes.
            generator: randomness of the start; torch's global one if None.
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
        """Read tokens and predict the next one at every position.

        Args:
            ids: (batch, seq_len) int64.
            state: what came before the first token; gradients flow into it and out of the returned one.
            seq_idx: (batch, seq_len) int32 or int64 for packed and padded rows: a new value starts a new
                sequence, negative means padding. The first sequence of a row continues `state`.
            labels: (batch, seq_len) int64, usually ids: position t predicts labels[t + 1]. -100 is ignored;
                so is, with seq_idx, what lies in padding or in another sequence than the position before it.
            return_hidden: whether to return the residual streams.
            return_logits: without them the loss is computed in pieces, far below the memory of the logits.

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
                loss = self._loss(hidden, targets)
            else:
                losses = nats(logits.flatten(0, 1), targets.flatten(), self.config.vocab_size)
                loss = losses.sum() / count(targets)
        return Output(logits, loss, state, None if streams is None else (*streams, hidden))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding, also of one that is stored in fewer bits."""
        return self.backbone.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text it was made for, if there is such a length."""
        return None

    def head(self, hidden: Tensor) -> Tensor:
        """Turn what the backbone returns into logits.

        Args:
            hidden: (..., d_model).

        Returns:
            (..., padded_vocab_size); entries from vocab_size on belong to no token.
        """
        if self.lm_head is None:
            return project(hidden, self.backbone.embedding)
        return cast(Tensor, self.lm_head(hidden))

    def init_state(self, batch_size: int) -> State:
        """Return the state before any token.

        Args:
            batch_size: rows.
        """
        mixers = [layer.mixer for layer in self.backbone.layers]
        return State([mixer.init_state(batch_size) for mixer in mixers], self)

    @torch.no_grad()
    def prefill(
        self, ids: Tensor, state: State | None = None, seq_idx: Tensor | None = None, chunk_size: int = 1024
    ) -> tuple[Tensor, State]:
        """Read a prompt of any length in constant memory.

        Args:
            ids: (batch, seq_len) int64.
            state: what came before, left as it is; nothing if None.
            seq_idx: (batch, seq_len), see `forward`; padding may stand anywhere.
            chunk_size: tokens read at a time.

        Returns:
            logits: (batch, padded_vocab_size) after the last token of each row that is not padding.
            state: after it.

        Raises:
            ValueError: shapes do not fit, or a row holds nothing but padding.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        if seq_idx is not None and bool((seq_idx < 0).all(1).any()):
            raise ValueError("seq_idx: expected a token in every row, got a row of nothing but padding")
        state = self.init_state(ids.shape[0]) if state is None else state
        last, last_idx = None, None
        for begin in range(0, ids.shape[1], chunk_size):
            chunk = slice(begin, begin + chunk_size)
            if seq_idx is None:
                hidden, state = self.backbone(ids[:, chunk], state)
                last = hidden[:, -1]
            else:
                state = self._restart(state, last_idx, seq_idx[:, chunk])
                hidden, state = self.backbone(ids[:, chunk], state, seq_idx[:, chunk])
                last = latest(last, hidden, seq_idx[:, chunk])
                last_idx = latest(last_idx, seq_idx[:, chunk], seq_idx[:, chunk])
        if last is None:
            raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
        return self.head(last), state

    @torch.no_grad()
    def step(self, ids: Tensor, state: State, unchanged: bool = False) -> tuple[Tensor, State]:
        """Read one token per row, in one native call if the model can be decoded natively.

        Args:
            ids: (batch,) int64.
            state: overwritten with the state after the token.
            unchanged: the caller's word that weights, modules and hooks are as they were at the last step.
                To look at them all takes longer than everything else that Python does for a token.

        Returns:
            logits: (batch, padded_vocab_size).
            state: the same object.
        """
        logits = self._decode(ids[:, None], state, unchanged)
        return (self.head(self.backbone.step(ids, state)) if logits is None else logits[:, 0]), state

    @torch.no_grad()
    def advance(self, ids: Tensor, state: State, unchanged: bool = False) -> tuple[Tensor, State]:
        """Read a few tokens per row: bit for bit what as many steps give, while the weights are read once.

        Args:
            ids: (batch, steps) int64; for long texts `prefill` is faster.
            state: overwritten with the state after the last token.
            unchanged: see `step`.

        Returns:
            logits: (batch, steps, padded_vocab_size), after each token.
            state: the same object.

        Raises:
            ValueError: there are no tokens.
        """
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids: expected a non-empty (batch, steps), got {tuple(ids.shape)}")
        logits = self._decode(ids, state, unchanged)
        if logits is None:
            steps = [self.head(self.backbone.step(column, state)) for column in ids.unbind(1)]
            logits = torch.stack(steps, 1)
        return logits, state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model; the decoder is for the weights as they were."""
        self._decoder = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def stack(self) -> tuple[ops.MambaStack, list[Tensor]] | None:
        """Describe the weights to the native decoder, if it can run this model as it is.

        Returns:
            stack: the weights.
            copied: the parameters it holds in another form.
        """
        return None

    def _decode(self, ids: Tensor, state: State, unchanged: bool) -> Tensor | None:
        """Read ids (batch, steps) natively; None if that is not possible."""
        if torch.compiler.is_compiling() or composed():
            return None
        if self._decoder is None or not (unchanged or self._decoder.fresh()):
            described = self.stack()
            self._decoder = None if described is None else Decoder(described[0], self, described[1])
            if self._decoder is None or not self._decoder.fresh():
                return None
        return self._decoder.run(ids, state)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the nats of each target without holding all logits at once.

        Args:
            hidden: (..., d_model) from the backbone.
            targets: (...) int64 below vocab_size, already aligned: what follows the token at each position.

        Returns:
            (...) float32 at least; 0 where the target is -100.
        """
        vocab_size = self.config.vocab_size
        pieces = [nats(self.head(h), t, vocab_size) for h, t in row_chunks(hidden, targets, vocab_size)]
        return torch.cat(pieces).view(targets.shape)

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrence, which set time scales."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.recurrence)

    def slow(self) -> Iterable[nn.Parameter]:
        """Return A, B and dt of state spaces, which learn at a lower rate."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return (mixer.get_parameter(name) for mixer in mixers for name in mixer.slow)

    def _restart(self, state: State, last_idx: Tensor | None, seq_idx: Tensor) -> State:
        """Forget rows whose next token opens a new sequence: the ops can't see that across chunks."""
        if last_idx is None:
            return state
        first = seq_idx.gather(1, (seq_idx >= 0).int().argmax(1, keepdim=True))[:, 0]  # (batch,), < 0 if none
        fresh = (first >= 0) & (last_idx >= 0) & (first != last_idx)  # (batch,)
        return state.restarted(fresh, self.init_state(state.batch_size))

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per target without ever holding all logits."""
        if isinstance(self.backbone.embedding, WeightOnly):
            weight: Tensor | None = None
        elif self.lm_head is None:
            weight = self.backbone.embedding.weight
        else:  # an adapted head (LoRA, parametrised, hooked) is more than its weight and must be called
            weight = self.lm_head.weight if untouched(self.lm_head) else None
        if "head" in self.__dict__ or type(self).head is not LanguageModel.head:
            weight = None
        if weight is None or not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
            return self.token_losses(hidden, targets).sum() / count(targets)
        return linear_loss(hidden, weight, targets, self.config.vocab_size)
