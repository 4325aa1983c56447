"""Context parallelism: several processes share each sequence, and all that passes between them are states.

Each process has a contiguous part of the sequence. What a layer knows of the tokens before a part is its
state, so the part begins with the final state of the same layer in the process before it:

    process 0    layer 0, its state ->  layer 1, its state ->  layer 2 ...
    process 1                           layer 0, its state ->  layer 1 ...
    process 2                                                  layer 0 ...

Process k is k layers behind the first one, and all compute at the same time: n_layers + n - 1 turns of 1/n of
a layer's work, instead of n_layers turns of all of it. In the backward pass the gradients of the states take
the way back. These are the sums of one process, so the result is exact for every model whose state has a
constant size, and what a layer sends does not depend on the length of the sequence.

Sun and others, 2024 (arXiv 2404.02882) do so for linear attention. Others gather the states of all processes
at once, which takes linear recurrences, a second scan of each part and n times the communication, and has no
process wait for its turn: of use where there are as many processes as layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.errors import UsageError
from longscan.models import MODELS, LanguageModel, Model
from longscan.models.common.losses import IGNORE, next_tokens
from longscan.models.common.packing import latest, restarts
from longscan.models.common.state import over
from longscan.training.chunked_loss import has_constant_state
from longscan.training.distributed import Group
from longscan.training.replicas import SummedModel

__all__ = ["Neighbours", "PartedModel", "check_context", "part_loss"]


class Neighbours:
    """The processes that have the parts of a sequence before and after this one's.

    Args:
        group: the processes.

    Attributes:
        sent: bytes of states, and of their gradients, that this process has sent.
        fresh: (batch,) bool, rows in which this part starts another sequence than the one before ended with;
            None if none does.
    """

    def __init__(self, group: Group) -> None:
        self.sent = 0
        self.fresh: Tensor | None = None
        rank, number, n = group.rank, group.context_rank, group.context_size
        self._before = rank - 1 if number > 0 else None
        self._after = rank + 1 if number < n - 1 else None
        self._pending: list[tuple[Any, Tensor]] = []

    def receive(self, state: Any) -> Any:
        """Return the state of a layer before the first token of this part.

        Args:
            state: the layer's initial state, with which a sequence starts.
        """
        if self._before is None or not state:
            return state
        anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
        received = cast(tuple[Tensor, ...], _Receive.apply(self, anchor, *state))  # type: ignore[no-untyped-call]
        if self.fresh is not None:
            rows = self.fresh
            pairs = zip(state, received, strict=True)
            received = tuple(torch.where(over(rows, new), new, old) for new, old in pairs)
        return state._make(received)

    def send(self, x: Tensor, state: Any) -> Tensor:
        """Send the state of a layer after the last token of this part.

        Args:
            x: (batch, seq_len, d_model) the layer's output.
            state: the layer's.

        Returns:
            x, whose gradient waits for that of the state.
        """
        if self._after is None or not state:
            return x
        return cast(Tensor, _Send.apply(self, x, *state))  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until all that was sent has arrived."""
        pending, self._pending = self._pending, []
        for work, _ in pending:
            work.wait()

    def _put(self, tensors: Sequence[Tensor], to: int | None) -> None:
        """Send tensors in one message; the computation goes on meanwhile."""
        assert to is not None
        flat = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
        message = torch.cat(flat)
        self._pending.append((dist.isend(message, to), message))
        self.sent += message.nbytes

    def _get(self, like: Sequence[Tensor], source: int | None) -> list[Tensor]:
        """Receive tensors of these shapes."""
        assert source is not None
        sizes = [tensor.nbytes for tensor in like]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=like[0].device)
        dist.recv(message, source)
        parts = zip(torch.split(message, sizes), like, strict=True)
        return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in parts]


class _Receive(torch.autograd.Function):
    """(neighbours, anchor, *initial state) -> the final state of the part before.

    The anchor has no values: it only makes the result require gradients.
    """

    @staticmethod
    def forward(ctx: Any, neighbours: Neighbours, _: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.neighbours = neighbours
        received = neighbours._get(state, neighbours._before)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        floating = [gradient for gradient in gradients if gradient.is_floating_point()]
        ctx.neighbours._put(floating, ctx.neighbours._before)
        return (None, None, *(None for _ in gradients))


class _Send(torch.autograd.Function):
    """(neighbours, x, *final state) -> x."""

    @staticmethod
    def forward(ctx: Any, neighbours: Neighbours, x: Tensor, *state: Tensor) -> Tensor:
        ctx.neighbours, ctx.device = neighbours, x.device
        ctx.like = [torch.empty_like(tensor, device="meta") for tensor in state]
        neighbours._put(state, neighbours._after)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        like = [tensor.new_empty(tensor.shape, device=ctx.device) for tensor in ctx.like]
        floating = [tensor for tensor in like if tensor.is_floating_point()]
        received = iter(ctx.neighbours._get(floating, ctx.neighbours._after))
        return None, dx, *(next(received) if tensor.is_floating_point() else None for tensor in like)


class PartedModel(SummedModel):
    """A model that every process has in full, for its part of each sequence.

    Args:
        model: the model, the same everywhere.
        group: the processes.
        neighbours: those of this one.
    """

    def __init__(self, model: Model, group: Group, neighbours: Neighbours) -> None:
        super().__init__(model, group)
        self.neighbours = neighbours

    @contextlib.contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Return a context at the end of which all states have arrived, and gradients in the last pass."""
        with super().passing(last):
            yield
            self.neighbours.wait()


def part_loss(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor | None = None,
    *,
    group: Group,
    neighbours: Neighbours,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Return the mean loss of this process's part of the tokens, and how many it predicts.

    Weighted by these numbers, the losses add up to that of `model(ids, labels=labels)`, and their gradients
    to its gradients. All processes that share a sequence call it, then `backward` of the loss (not
    `torch.autograd.grad`, which leaves out what no gradient is asked of), then `neighbours.wait`.

    Args:
        model: a language model whose state has a constant size.
        ids: (batch, seq_len) int64, all tokens.
        labels: (batch, seq_len) int64, see `LanguageModel.forward`; ids if None. One more per row, without
            seq_idx, and the last token predicts too.
        group: the processes.
        neighbours: those of this one.
        seq_idx: (batch, seq_len), see `LanguageModel.forward`.

    Returns:
        loss: () mean cross-entropy in nats, at least float32; 0 if nothing is predicted.
        n: the number of predicted tokens.

    Raises:
        UsageError: there are fewer tokens than processes.
    """
    labels = ids if labels is None else labels
    part = group.part(ids.shape[1])
    wider = slice(part.start, part.stop + 1)
    its = None if seq_idx is None else seq_idx[:, part]
    neighbours.fresh = _fresh(seq_idx, part)
    state = model.init_state(len(ids))
    hidden, _ = model.backbone(ids[:, part], state, its, neighbours=neighbours)
    targets = next_tokens(labels[:, wider], None if seq_idx is None else seq_idx[:, wider])
    targets = targets[:, : part.stop - part.start]
    return model.hidden_loss(hidden, targets), int((targets != IGNORE).sum())


def _fresh(seq_idx: Tensor | None, part: slice) -> Tensor | None:
    """Return the rows (batch,) in which a part starts another sequence than the tokens before it ended."""
    if seq_idx is None or part.start == 0:
        return None
    before = seq_idx[:, : part.start]
    return restarts(latest(None, before, before), seq_idx[:, part])


def check_context(model: LanguageModel) -> None:
    """Raise unless processes can share the sequences of a model.

    Args:
        model: any language model, also without values.

    Raises:
        UsageError: its state grows.
    """
    if has_constant_state(model):
        return
    kind = type(model).__name__
    raise UsageError(
        f"--context-parallel: expected a model whose state has a constant size, as it passes from process to "
        f"process; that of {kind} grows with every token. Leave it out, or choose one of {', '.join(_fit())}."
    )


def _fit() -> list[str]:
    """Return the names of the language models whose state has a constant size."""
    names = []
    with torch.device("meta"):
        for name, entry in MODELS.items():
            if entry.kind == "language":
                sizes = {**entry.presets["tiny"], "vocab_size": 8}
                if has_constant_state(cast(LanguageModel, entry.cls(entry.config.from_dict(sizes)))):
                    names.append(name)
    return names
