"""One model in several processes: whole in each (DDP), or sharded over them (FSDP2).

Both add gradients up instead of averaging them, as every process weights its loss by its share of the tokens.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longscan.models import Model
from longscan.models.common.mixer import Blocks
from longscan.training.distributed import ALONE, Group

__all__ = ["Replica", "ReplicatedModel", "ShardedModel", "SummedModel", "replica"]

BUCKET = 25 * 2**20  # bytes of gradients in one message; DDP's default


class Replica:
    """A model that one process trains: what several do differently.

    Args:
        model: the model.
        group: the processes.

    Attributes:
        model: whose parameters the optimizer updates.
        module: what computes the loss in training.
        plain: a model with ordinary parameters, to export and to generate with; None in processes that don't
            write.
    """

    module: nn.Module
    plain: Model | None

    def __init__(self, model: Model, group: Group = ALONE) -> None:
        self.group = group
        self.model = self.module = model
        self.plain = model if group.first else None

    def passing(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of a forward and a backward pass.

        Args:
            last: whether it is the last one before the optimizer's step.
        """
        return contextlib.nullcontext()

    def inference(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass without gradients."""
        return torch.inference_mode()

    def clip(self, norm: float) -> float:
        """Clip the gradient and return its norm before.

        Args:
            norm: the largest one allowed.
        """
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm).item()

    def collect(self, tensor: Tensor) -> Tensor:
        """Return a parameter or a moment in full, in the first process; every process calls it.

        Args:
            tensor: what this process has of it.
        """
        return tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return what this process has of a tensor.

        Args:
            whole: in full.
            like: the parameter that it belongs to.
        """
        return whole.to(like.device)

    def gather(self) -> None:
        """Update `plain`; every process calls it."""


class ReplicatedModel(Replica):
    """A model that every process has in full: DDP adds up the gradients.

    Args:
        model: the model, the same everywhere.
        group: the processes.
    """

    def __init__(self, model: Model, group: Group) -> None:
        super().__init__(model, group)
        warnings.filterwarnings("ignore", message=r"Grad strides do not match bucket view strides")  # a copy
        self.module = self._ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._ddp.register_comm_hook(group.size, lambda size, bucket: _sum(bucket.buffer(), size))

    def passing(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are exchanged in the last pass only."""
        return contextlib.nullcontext() if last else self._ddp.no_sync()


class SummedModel(Replica):
    """A model that every process has in full, with gradients that come all at once: they are added up then.

    DDP learns from the forward pass of the whole model which gradients to wait for; a loss that is computed
    in pieces has none.
    """

    @contextlib.contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Return a context at the end of which gradients are exchanged, in the last pass."""
        yield
        if last:
            for parameters in _buckets([p for p in self.model.parameters() if p.requires_grad]):
                own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                total = _sum(torch.cat([grad.flatten() for grad in own]), self.group.size).wait()
                sizes = [p.numel() for p in parameters]
                for parameter, grad in zip(parameters, torch.split(total, sizes), strict=True):
                    parameter.grad = grad.view_as(parameter).clone()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one dtype and device that are exchanged in one message, as DDP's buckets are."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.nbytes for p in bucket) + parameter.nbytes > BUCKET
        if bucket and (full or (parameter.dtype, parameter.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum(gradients: Tensor, size: int) -> torch.futures.Future[Tensor]:
    """Add up the gradients (n,) of a bucket over the processes.

    On a CPU in the order of the ranks: the sum then depends neither on where a gradient lies in a bucket,
    which changes after the first step of a process, nor on the backend's way to add. As many bytes travel as
    in a ring: each process receives the pieces that it adds up, and sends the sum.
    """
    if gradients.is_cuda:
        return _async_sum(gradients)
    pieces = torch.nn.functional.pad(gradients, (0, -len(gradients) % size))
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces)
    first, *others = received.chunk(size)
    for other in others:
        first += other
    dist.all_gather(list(pieces.chunk(size)), first)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients.copy_(pieces[: len(gradients)]))
    return future


def _async_sum(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Add up gradients while the backward pass goes on."""
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda done: done.value()[0])


class ShardedModel(Replica):
    """A model of which every process has a share of each parameter: FSDP2 collects them block by block.

    Args:
        model: the model, the same everywhere; it is changed in place.
        group: the processes.
    """

    def __init__(self, model: Model, group: Group) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(model, group)
        self.plain = copy.deepcopy(model).cpu() if group.first else None
        blocks = [block for layers in model.modules() if isinstance(layers, Blocks) for block in layers]
        uses = Counter(id(parameter) for block in blocks for parameter in block.parameters())
        # what several blocks share belongs to none of them
        common = {p for block in blocks for p in block.parameters() if uses[id(p)] > 1}
        mesh = init_device_mesh(model.device.type, (group.size,))  # its default is the machine's accelerator
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=common)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # no model changes a residual stream in place
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

    def inference(self) -> AbstractContextManager[None]:
        """Return a context in which FSDP2 may allocate what it uses in training too."""
        return torch.no_grad()

    def clip(self, norm: float) -> float:
        """Clip the gradient by its norm over all processes, which is returned."""
        return _full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)).item()

    def collect(self, tensor: Tensor) -> Tensor:
        """Collect a tensor from all processes, into the memory of the CPU."""
        whole = _full(tensor)
        return whole.cpu() if self.group.first else whole.new_empty(0)

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Take this process's share of a tensor."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        whole = whole.to(like.device)
        if not isinstance(like, DTensor) or whole.shape != like.shape:
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    @torch.no_grad()
    def gather(self) -> None:
        """Collect the weights in the first process, one at a time."""
        own = dict(self.plain.state_dict()) if self.plain is not None else {}
        for name, tensor in self.model.state_dict().items():
            whole = self.collect(tensor)
            if name in own:
                own[name].copy_(whole)


def _full(tensor: Tensor) -> Tensor:
    """Return a tensor of which each process has a share in full, any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replica(model: Model, group: Group, sharded: bool) -> Replica:
    """Return a model as this process trains it.

    Args:
        model: the model, the same in all processes.
        group: the processes.
        sharded: whether each has only a share of it.
    """
    if not group.several:
        return Replica(model)
    return ShardedModel(model, group) if sharded else ReplicatedModel(model, group)
