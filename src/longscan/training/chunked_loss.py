"""The loss of sequences without end: exact gradients through all of a sequence, in constant memory.

One pass over a sequence retains what its backward pass needs of every token. Here the sequence is cut into
chunks, as the state is all that a chunk needs of those before it:

    forward     chunk after chunk without autograd:  L_i, h_{i+1} = f(h_i, chunk i);  each h_i is stored
    backward    from the last chunk to the first:    f(h_i, chunk i) again, now with autograd, which turns the
                gradients of L_i and h_{i+1} into those of the weights, which are added up, and of h_i

These are the chain rule's own sums, so the gradients are those of one pass but for rounding: nothing is
truncated. The price is the second forward pass, a third of a training step. Memory holds the activations of
one chunk; the states, one per chunk, go to a temporary file once they take more than 16 MB.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.core.checks import check_whole
from longscan.errors import LongscanError
from longscan.models import LanguageModel, State
from longscan.models.common.losses import IGNORE, next_tokens
from longscan.models.common.packing import latest, restarts

__all__ = ["check_constant", "chunked_loss", "has_constant_state"]

SPOOL = 2**24  # bytes of states in memory, before they go to a file


def has_constant_state(model: LanguageModel) -> bool:
    """Return whether the state of a model has the same size after any number of tokens."""
    return not model.init_state(1).growth


def check_constant(model: LanguageModel) -> None:
    """Raise unless the state of a model has a constant size.

    Args:
        model: any language model.

    Raises:
        LongscanError: it grows with every token.
    """
    if not has_constant_state(model):
        raise LongscanError(
            f"expected a model whose state has a constant size; that of {type(model).__name__} grows with "
            "every token, as a KV cache does, and so would the memory. Leave that out and train on shorter "
            "sequences, or choose a model such as mamba."
        )


def chunked_loss(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor | None = None,
    *,
    chunk: int,
    state: State | None = None,
    seq_idx: Tensor | None = None,
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, State]:
    """Return the loss of `model(ids, labels=labels)` and the final state; memory does not grow with seq_len.

    Gradients of both reach the weights and the initial state, once (not twice): they are those of one pass.
    Random numbers, such as those of dropout, are the same in both forward passes over a chunk; the model must
    not change between training and evaluation mode before the backward pass.

    Args:
        model: a language model whose state has a constant size.
        ids: (batch, seq_len) int64.
        labels: (batch, seq_len) int64, see `LanguageModel.forward`; ids if None. One more per row, without
            seq_idx, and the last token predicts too.
        chunk: tokens per chunk; the last one may be shorter.
        state: before the first token; the initial state if None.
        seq_idx: (batch, seq_len), see `LanguageModel.forward`.
        directory: of the temporary file; the system's if None.
        progress: called after each chunk with the passes over chunks that are done, and all of them: with
            autograd two per chunk, forward and backward. What it raises ends the work.

    Returns:
        loss: () mean cross-entropy per predicted token in nats, at least float32.
        state: after the last token.

    Raises:
        LongscanError: the state of the model grows, or the chunk is no positive integer.
        ValueError: shapes do not fit.
        OSError: the temporary file cannot be written.
    """
    check_whole("chunk", chunk, 1)
    check_constant(model)
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"ids: expected a non-empty (batch, seq_len), got {tuple(ids.shape)}")
    if seq_idx is not None and seq_idx.shape != ids.shape:
        raise ValueError(f"seq_idx: expected shape {tuple(ids.shape)}, got {tuple(seq_idx.shape)}")
    labels = ids if labels is None else labels
    spare = 0 if seq_idx is not None else 1
    if labels.shape not in (ids.shape, (len(ids), ids.shape[1] + spare)):
        raise ValueError(f"labels: expected {tuple(ids.shape)}, got {tuple(labels.shape)}")
    rows = _Rows(model, ids, labels, seq_idx, chunk, progress)
    before = model.init_state(len(ids)) if state is None else state
    inputs = _tensors(before)
    if torch.is_grad_enabled():
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss, *final = cast(
            tuple[Tensor, ...],
            _ChunkedLoss.apply(rows, directory, len(inputs), *inputs, *parameters),  # type: ignore[no-untyped-call]
        )
        return loss, _filled(before, final)
    return rows.forward(before)


class _Rows:
    """Rows of tokens in chunks, and the model over them.

    Args:
        model: any.
        ids: (batch, seq_len).
        labels: (batch, seq_len).
        seq_idx: (batch, seq_len) or None.
        chunk: tokens.
        progress: see `chunked_loss`.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None,
        chunk: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.progress = progress
        self.model, self.ids, self.labels, self.seq_idx = model, ids, labels, seq_idx
        self.parts = [slice(i, i + chunk) for i in range(0, ids.shape[1], chunk)]
        self.count = max(1, sum(_predicted(self.targets(part)) for part in self.parts))
        self.last: list[Tensor | None] = [None]  # the sequence of each row that a chunk may continue
        if seq_idx is not None:
            for part in self.parts[:-1]:
                self.last.append(latest(self.last[-1], seq_idx[:, part], seq_idx[:, part]))

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self.parts)

    def targets(self, part: slice) -> Tensor:
        """Return what the tokens of a chunk predict, (batch, tokens); see `next_tokens`."""
        wider = slice(part.start, part.stop + 1)
        seq_idx = None if self.seq_idx is None else self.seq_idx[:, wider]
        n = min(part.stop, self.ids.shape[1]) - part.start
        return next_tokens(self.labels[:, wider], seq_idx)[:, :n]

    def __call__(self, index: int, state: State) -> tuple[Tensor, State]:
        """Return the share of a chunk in the mean loss, and the state after it.

        Args:
            index: of the chunk.
            state: before it.
        """
        part, seq_idx = self.parts[index], None
        if self.seq_idx is not None:
            seq_idx, last = self.seq_idx[:, part], self.last[index]
            if last is not None:
                state = state.restarted(restarts(last, seq_idx), self.model.init_state(len(seq_idx)))
        hidden, after = self.model.backbone(self.ids[:, part], state, seq_idx)
        targets = self.targets(part)
        loss = self.model.hidden_loss(hidden, targets)
        return loss * (_predicted(targets) / self.count), after

    def forward(self, state: State, stored: _Stored | None = None) -> tuple[Tensor, State]:
        """Return the loss and the final state, without autograd.

        Args:
            state: before the first token.
            stored: receives the state before each chunk, if the backward pass will need them.
        """
        losses = []
        for index in range(len(self)):
            if stored is not None:
                stored.append([*_tensors(state), *_random_state(self.ids.device)])
            loss, state = self(index, state)
            losses.append(loss)
            self.passed(index + 1, backward=stored is not None)
        return torch.stack(losses).sum(), state

    def passed(self, done: int, *, backward: bool) -> None:
        """Report progress.

        Args:
            done: passes over chunks so far.
            backward: whether there are those of a backward pass too.
        """
        if self.progress is not None:
            self.progress(done, len(self) * (2 if backward else 1))


class _ChunkedLoss(torch.autograd.Function):
    """(rows, directory, n, n tensors of the initial state, parameters) -> (loss, *those of the final one)."""

    @staticmethod
    def forward(
        ctx: Any, rows: _Rows, directory: Path | None, n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.n, ctx.stored = rows, n, _Stored(directory)
        ctx.like = rows.model.init_state(0)
        # changed in place before the backward pass: autograd's own error
        ctx.save_for_backward(*tensors, *(t for t in (rows.ids, rows.labels, rows.seq_idx) if t is not None))
        ctx.n_parameters = len(tensors) - n
        kind = rows.ids.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,  # what is cast without autograd must not be used with it
        }
        with torch.autocast(**ctx.autocast):
            loss, state = rows.forward(_filled(ctx.like, tensors[:n]), ctx.stored)
        final = _tensors(state)
        ctx.mark_non_differentiable(*(tensor for tensor in final if not tensor.is_floating_point()))
        return loss, *final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *dfinal: Tensor) -> tuple[Tensor | None, ...]:
        rows, n = cast(_Rows, ctx.rows), cast(int, ctx.n)
        parameters = ctx.saved_tensors[n : n + ctx.n_parameters]
        sums: list[Tensor | None] = [None] * len(parameters)
        dstate: Sequence[Tensor | None] = dfinal
        for index in reversed(range(len(rows))):
            stored = ctx.stored[index]
            state, random = stored[:n], stored[n:]
            leaves = [tensor.requires_grad_() for tensor in state if tensor.is_floating_point()]
            with torch.enable_grad(), _replayed(random, rows.ids.device), torch.autocast(**ctx.autocast):
                loss, after = rows(index, _filled(ctx.like, state))
            ends = [(loss, dloss), *zip(_tensors(after), dstate, strict=True)]
            ends = [(end, d) for end, d in ends if d is not None and end.requires_grad]
            outputs, doutputs = zip(*ends, strict=True)
            grads = torch.autograd.grad(outputs, [*leaves, *parameters], doutputs, allow_unused=True)
            of_leaves = iter(grads)
            dstate = [next(of_leaves) if tensor.requires_grad else None for tensor in state]
            for i, grad in enumerate(of_leaves):
                if grad is not None:  # hundreds of chunks are added up, in at least float32
                    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                    so_far = sums[i]
                    sums[i] = wide.clone() if so_far is None else so_far.add_(wide)
            rows.passed(2 * len(rows) - index, backward=True)
        dparameters = (
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, parameters, strict=True)
        )
        return None, None, None, *dstate, *dparameters


class _Stored:
    """Lists of tensors of the same shapes, in memory while they are few, then in a temporary file.

    Args:
        directory: of the file; the system's if None.
    """

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 (lives as long as this)
            SPOOL, dir=None if directory is None else str(directory)
        )
        self._like: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._where = tempfile.gettempdir() if directory is None else str(directory)
        weakref.finalize(self, _close, self._file)

    def append(self, tensors: Sequence[Tensor]) -> None:
        """Store tensors behind the others."""
        like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        assert self._like in ([], like), "the state of a model changed its size"
        self._like = like
        try:
            for tensor in tensors:
                self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            what = f"{error.strerror or error} for the states before each chunk: free some, or enlarge chunks"
            raise OSError(error.errno, what, self._where) from error

    def __getitem__(self, index: int) -> list[Tensor]:
        """Return new copies of the tensors that were stored as number `index`."""
        sizes = [shape.numel() * dtype.itemsize for shape, dtype, _ in self._like]
        self._file.seek(index * sum(sizes))
        tensors = []
        for size, (shape, dtype, device) in zip(sizes, self._like, strict=True):
            flat = torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype) if size else None
            empty = torch.empty(shape, dtype=dtype, device=device)
            tensors.append(empty if flat is None else flat.view(shape).to(device))
        return tensors


def _close(file: Any) -> None:
    """Close a temporary file; what a full disk did not take is of no use any more."""
    with contextlib.suppress(OSError):
        file.close()


def _predicted(targets: Tensor) -> int:
    """Return the number of targets."""
    return int((targets != IGNORE).sum())


def _tensors(state: State) -> list[Tensor]:
    """Return the tensors of a state, in order."""
    return [tensor for _, tensor in state.named_tensors()]


def _filled(like: State, tensors: Sequence[Tensor]) -> State:
    """Return tensors, in the order of `_tensors`, as a state of the form of another."""
    rest = iter(tensors)
    return State([layer._make(next(rest) for _ in layer) for layer in like.layers], like.model)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators that a pass on a device draws from."""
    own = [torch.get_rng_state()]
    return own if device.type == "cpu" else [*own, torch.get_device_module(device).get_rng_state(device)]


@contextlib.contextmanager
def _replayed(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Draw again the random numbers that followed `_random_state`, and leave the generators as they were."""
    before = _random_state(device)
    _draw_from(states, device)
    try:
        yield
    finally:
        _draw_from(before, device)


def _draw_from(states: Sequence[Tensor], device: torch.device) -> None:
    """Set the states of torch's generators."""
    torch.set_rng_state(states[0].cpu())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1].cpu(), device)
