"""Context parallelism: one long row cut over ranks, exactly, for Eagle and Finch.

Decays are diagonal, so what a rank's tokens do to the state is a pair that composes along the ranks:

    S -> diag(D) S + L        D the product of its decays, L the state it reaches from zero

Every rank runs WKV on its own tokens from zero, all pairs are gathered (A (N + 1) floats a row, layer and rank), every
rank folds those before it into the state S it should have begun from, and adds what S contributes:

    out_t += r_t^T diag(decays before t) S        every factor is a product of decays <= 1: no overflow, no division

A token shift needs one vector of the rank before. Both gathers add the gradients of all ranks in their backward pass,
so the gradients of the ranks add up to those of one process, to rounding.

Owns: the scan, the two exchanges, and the cut of a batch along time.
Refuses to know: the models' equations (hooks and `wkv_around` apply this from outside) and the loop.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roost.data.batch import Batch, Batches
from roost.models.rwkv import RWKV
from roost.ops import wkv, wkv_around
from roost.training.config import TrainConfig
from roost.training.distributed import DataParallel

Group = dist.ProcessGroup | None


@contextmanager
def context_parallel(model: RWKV, group: dist.ProcessGroup | None = None) -> Generator[DataParallel]:
    """Inside, `model` in training mode reads rank p's part of rows that are cut along time over the ranks of `group`.

    Gives the ranks of a run: `with context_parallel(model) as ranks: train(model, data, config, reduce=ranks)`.

    In evaluation mode (validation, samples) it reads whole rows, as outside. Every rank reads at the same time, forward
    and backward; where blocks are recomputed in the backward pass, this has to enclose it, as it does around `train`.
    A row begins from the initial state of the model; the state that rank p returns is that after its tokens, so the
    last rank's is that of the row. Gradients of parameters are to be added over the ranks, as with data parallelism.

    Raises ValueError for Dove, whose recurrence is another one; inside, in training mode, for a given state (of a
    segment, say), for cu_seqlens, for ranks without tokens, and for `train` with config.compile.
    """
    if model.config.generation == "dove":
        raise ValueError("context parallelism is for Eagle and Finch; this model is Dove (RWKV-4)")

    def outer(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return scanned_wkv(group, *inputs, **options) if model.training else wkv(*inputs, **options)

    mixers = [mixer for block in model.layers for mixer in (block.att, block.ffn)]
    hooks = [mixer.register_forward_pre_hook(partial(_shift, group)) for mixer in mixers]
    hooks.append(model.register_forward_hook(_refuse_state, with_kwargs=True))
    try:
        with wkv_around(outer):
            yield _Along(model, group)
    finally:
        for hook in hooks:
            hook.remove()


class _Along(DataParallel):
    """Replicas that read parts of the time of all rows in place of shares of the rows."""

    def shares(self, data: Batches, config: TrainConfig) -> Batches:
        """The data, cut along time. Raises ValueError for compiled blocks, which cannot hold the exchanges."""
        if config.compile:
            raise ValueError("context parallelism does not go with compile = True")
        return TimeShares(data, self.ranks, config.accumulate)


class TimeShares:
    """`Batches` whose shares are parts of time: groups of `ranks` neighbouring ranks read the same rows.

    Rank p reads part p mod ranks of the time of the rows of group p // ranks; every part has T / ranks tokens, up to
    one more. `accumulate` is that of the run: a rank's own shares of the loop are shares of its group's rows.
    """

    def __init__(self, data: Batches, ranks: int, accumulate: int = 1) -> None:
        self.data, self.ranks, self.accumulate = data, ranks, accumulate

    @property
    def identity(self) -> Mapping[str, int | str]:
        """That of the data: the cut changes no step."""
        return self.data.identity

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Share `part` of `parts`; the whole batch for parts = 1. Raises ValueError where `ranks` does not divide."""
        if parts == 1:
            return self.data.batch_at(step)
        if parts % (self.ranks * self.accumulate):
            each = f", {self.accumulate} shares each" if self.accumulate > 1 else ""
            raise ValueError(f"{parts} shares cannot hold groups of {self.ranks} ranks that cut the time{each}")
        rank, turn = divmod(part, self.accumulate)
        group, place = divmod(rank, self.ranks)
        rows = self.data.batch_at(step, group * self.accumulate + turn, parts // self.ranks)
        return time_share(rows, place, self.ranks)


def time_share(batch: Batch, rank: int, ranks: int) -> Batch:
    """The tokens of rank `rank` of `ranks`, in every row. Raises ValueError for packed sequences and too few tokens."""
    length = batch.inputs.shape[1]
    if batch.cu_seqlens is not None or length < ranks:
        packed = "packs several sequences" if batch.cu_seqlens is not None else f"has rows of {length} token(s)"
        raise ValueError(f"this batch {packed}: its time cannot be cut over {ranks} ranks")
    part = slice(rank * length // ranks, (rank + 1) * length // ranks)
    return Batch(batch.inputs[:, part], batch.targets[:, part])


def scanned_wkv(
    group: Group, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, *,
    cu_seqlens: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`roost.wkv` of this rank's tokens in a recurrence that runs through all ranks, from the `state` of rank 0."""
    if cu_seqlens is not None:
        raise ValueError("context parallelism reads one sequence a row: cu_seqlens cannot be cut over ranks")
    rank = dist.get_rank(group)
    out, after = wkv(r, k, v, log_w, u, state if rank == 0 else None)
    with torch.autocast(r.device.type, enabled=False):
        steps = log_w if log_w.dim() == 4 else log_w.expand(1, r.shape[1], *log_w.shape)
        decay = steps.sum(1).exp().expand(len(r), -1, -1)[..., None]  # (B, H, K, 1)
        pairs = gather(torch.cat([after, decay], -1), group)
        before = pairs[:0].sum(0)[..., :-1]  # zeros, in every rank's graph: all take part in the backward pass
        for pair in pairs[:rank]:
            before = torch.addcmul(pair[..., :-1], pair[..., -1:], before)
        reach = F.pad(steps, (0, 0, 0, 0, 1, 0))[:, :-1].cumsum(1).exp()  # decays before each token
        share = torch.einsum("bthk,bhkv->bthv", r.to(after.dtype) * reach, before)
        return (out.to(after.dtype) + share).to(out.dtype), torch.addcmul(after, decay, before)


def _refuse_state(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> None:
    """After the forward pass, since other hooks before it (those of segments) may have put the state there."""
    if model.training and (len(args) > 1 or kwargs.get("state") is not None):
        raise ValueError(
            "context parallelism begins every row from the initial state: it does not go with a given state, and so"
            " not with segments"
        )


def _shift(group: Group, mixer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a mixer (x, last, ..): on every rank but the first, `last` is the rank before's last x."""
    if not mixer.training:
        return args
    x, last, *rest = args
    if x.shape[1] == 0:
        raise ValueError("a rank has no tokens: context parallelism needs at least one on each")
    ends = gather(x[:, -1], group)
    rank = dist.get_rank(group)
    return (x, last + ends[:0].sum(0) if rank == 0 else ends[rank - 1], *rest)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_x = d_out.new_empty(d_out.shape[1:])
        dist.reduce_scatter(d_x, list(d_out.contiguous().unbind()), group=ctx.group)
        return d_x, None


def gather(x: Tensor, group: Group = None) -> Tensor:
    """x (..) of every rank as (ranks, ..); in the backward pass a rank gets the sum of what all ranks send to its x."""
    return _Gather.apply(x, group)  # pyright: ignore[reportReturnType]
