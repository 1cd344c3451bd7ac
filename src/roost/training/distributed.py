"""Many devices: replicas that add up their gradients, and sharded models (FSDP2), for the loop's one `Reducer`.

Every rank divides its sums by the count of all ranks, so the gradient of a step is the sum over ranks, never a mean,
and any number of ranks makes the step that one process makes, to the rounding of the sums.

    torchrun --nproc-per-node 8 train.py        and there: with process_group("cuda") as device:
                                                               train(model, ..., reduce=DataParallel(model))

Owns: the process group, which gradients are added when, and how FSDP2 is applied to a model from outside.
Refuses to know: how a step is made, and what a checkpoint holds (resume.py, sharded_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from roost.checks import choice
from roost.data.batch import Batches
from roost.models.rwkv import RWKV
from roost.training.config import TrainConfig
from roost.training.resume import Position, Settings, Trained, checkpoints, restore, save
from roost.training.sharded_checkpoint import restore_sharded, save_sharded

LARGE = 2**20
"""Gradients of so many elements travel alone and in place; smaller ones are gathered until they are as many."""


@contextmanager
def process_group(kind: str = "cpu") -> Generator[torch.device]:
    """Join the processes that torchrun started; gives this process's device ("cpu", or the GPU of its local rank).

    Raises ValueError when torchrun did not start this process, and for another kind of device.
    """
    choice("kind", kind, ("cpu", "cuda"))
    if not dist.is_torchelastic_launched():
        raise ValueError("this process has no others to work with: start it with `torchrun --nproc-per-node N`")
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", get_node_local_rank())
    dist.init_process_group("gloo" if kind == "cpu" else "nccl", device_id=None if kind == "cpu" else device)
    try:
        yield device
        dist.barrier()  # a rank that leaves early closes connections that others still use
    finally:
        dist.destroy_process_group()


class _Ranks:
    """What replicas and shards have in common: who this is, and small sums."""

    def __init__(self, model: RWKV, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: enter `process_group(...)` first")
        self.group, self.device = group, model.device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs, checkpoints and the model."""
        return self.rank == 0

    def shares(self, data: Batches, config: TrainConfig) -> Batches:
        """The data: a rank has neighbouring rows."""
        return data

    def sum_counts(self, count: int) -> int:
        """The sum over ranks."""
        return int(self.sum_values(torch.tensor(count, dtype=torch.int64)))

    def max_counts(self, count: int) -> int:
        """The largest over ranks."""
        largest = torch.tensor(count, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def sum_values(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks of a small tensor, on its own device."""
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_counts(0)

    def on_main(self, action: Callable[[], Path]) -> Path:
        """The answer of rank 0's `action` on every rank; where it fails, every rank raises: OSError, or ValueError."""
        answer: list[Any] = [None, None]
        failed: Exception | None = None
        if self.is_main:
            try:
                answer[0] = action()
            except Exception as error:  # whatever it is: the others are waiting
                failed, answer[1] = error, (isinstance(error, OSError), f"{type(error).__name__} on rank 0: {error}")
        dist.broadcast_object_list(answer, group=self.group, group_src=0, device=self.device)
        if failed is not None:
            raise failed
        if answer[1] is not None:
            disk, text = answer[1]
            raise OSError(text) if disk else ValueError(text)
        return answer[0]

    def check_shared(self, out: Path, newest: Path | None) -> None:
        """Raise ValueError, on every rank, unless all ranks see the same newest checkpoint."""
        steps = torch.zeros(self.ranks, dtype=torch.int64)
        steps[self.rank] = 0 if newest is None else int(newest.stem.removeprefix("step-"))
        seen = self.sum_values(steps).tolist()
        if len(set(seen)) > 1:
            raise ValueError(
                f"the newest checkpoint in {out} is of step {seen[0]} on rank 0 and of step"
                f" {next(step for step in seen if step != seen[0])} on another:"
                " out must be on a file system that all ranks share"
            )


class DataParallel(_Ranks):
    """Replicas: every rank holds the whole model, and gradients are added once per step, after the last micro-batch.

    Making one copies the weights of rank 0, an adapter's too, to every rank. What a rank sends per step is
    2 (R - 1) / R of the gradients.
    """

    def __init__(self, model: RWKV, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(model, group)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):  # a state dict leaves adapters out
                dist.broadcast(tensor, group=group, group_src=0)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; None counts as zero where another rank has a gradient."""
        trained = list(parameters)
        present = self.sum_values(torch.tensor([p.grad is not None for p in trained], dtype=torch.int64))
        gradients: list[Tensor] = []
        for parameter, ranks in zip(trained, present.tolist(), strict=True):
            if ranks and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self.group)
            for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def save(self, out: Path, position: Position, trained: Trained, settings: Settings, keep: int) -> Path:
        """Rank 0 writes step-N.pt, the same as of a run on one device."""
        return self.on_main(lambda: save(out, position, trained, settings, keep))

    def restore(self, out: Path, trained: Trained, settings: Settings) -> Position:
        """Every rank reads the newest step-N.pt. Raises ValueError where ranks see different ones."""
        self.barrier()
        self.check_shared(out, next(reversed(checkpoints(out)), None))
        return restore(out, trained, settings)

    def export(self, write: Callable[[], Path]) -> Path:
        """Rank 0 writes."""
        return self.on_main(write)


class Sharded(_Ranks):
    """FSDP2: every rank holds 1 / R of parameters, gradients and moments; blocks are gathered while they are read.

    Making one shards `model` in place, so the optimiser has to be made afterwards. FSDP2 adds the gradients during the
    backward pass of every micro-batch. Per micro-batch a rank receives (R - 1) / R of the parameters twice (once with
    reshard=False) and sends as much of the gradients. Parameters stay fp32: `autocast` casts products, not decays.

    model    with equal weights on every rank (the same seed or file)
    mesh     of the ranks; 1-D shards over all, 2-D ("replicate", "shard") copies the shards between nodes (hybrid)
    reshard  let go of a block's weights after its forward pass

    Raises ValueError for a tuned `time_state`, whose initial state is made outside the blocks.
    """

    def __init__(self, model: RWKV, mesh: DeviceMesh | None = None, *, reshard: bool = True) -> None:
        super().__init__(model, None)
        self.model = model
        if model.config.time_state:
            raise ValueError(
                "a model with time_state cannot be sharded (its initial state is made outside the blocks): train it"
                " with replicas, DataParallel or without --shard; a tuned state is small"
            )
        mesh = mesh or init_device_mesh(model.device.type, (self.ranks,))
        parts: list[nn.Module] = [model.layers[0].ln0, *model.layers]  # LN0 is read outside its block
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head once more
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: FSDP2 has added them."""

    def save(self, out: Path, position: Position, trained: Trained, settings: Settings, keep: int) -> Path:
        """Every rank writes its shards into step-N.dcp."""
        self._reshard()
        return save_sharded(out, position, trained, settings, keep, self.on_main)

    def restore(self, out: Path, trained: Trained, settings: Settings) -> Position:
        """Every rank reads its shards of the newest step-N.dcp, whatever number of ranks wrote it.

        Raises ValueError where ranks see different ones.
        """
        self.barrier()
        self.check_shared(out, next(reversed(checkpoints(out, "dcp")), None))
        return restore_sharded(out, trained, settings)

    def export(self, write: Callable[[], Path]) -> Path:
        """Rank 0 writes while its model holds whole parameters, in the memory of its CPU."""
        self._reshard()
        places = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        gathered = [(module, name, self._gathered(parameter)) for module, name, parameter in places]

        def swapped() -> Path:
            for module, name, parameter in gathered:
                setattr(module, name, parameter)
            try:
                return write()
            finally:
                for module, name, parameter in places:
                    setattr(module, name, parameter)

        return self.on_main(swapped)

    def _gathered(self, parameter: nn.Parameter) -> nn.Parameter | None:
        full = whole(parameter.detach())  # every rank takes part, one keeps it
        return nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad) if self.is_main else None

    def _reshard(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks where `tensor` is one rank's shard of it (a collective call), else `tensor`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _buckets(gradients: Iterable[Tensor]) -> Generator[list[Tensor]]:
    """Groups that can share one message: of one dtype, LARGE elements or a single tensor that is larger."""
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() >= LARGE:
            yield [gradient]
            continue
        bucket = waiting.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(tensor.numel() for tensor in bucket) >= LARGE:
            yield waiting.pop(gradient.dtype)
    yield from waiting.values()
