"""Rows of any length at the memory of one segment: back-propagation through segments that carry the state.

The forward pass keeps no graph, only the state at every border (66 L D floats a row, as much as about one token's
activations). The backward pass goes from the last segment to the first: it reads the segment again from its border, and
differentiates its loss together with what the later segments sent back,

    loss_i + <dS_i, S_i>                  and the gradient of the border before it is dS_{i-1}

so that the gradients are those of the row in one piece, to rounding. Truncated back-propagation is the same with dS = 0
at some borders. The price is one more forward pass; nothing grows with T but the borders.

Owns: that order, and carried states in documents packed in one row.
Refuses to know: the objective (any that reads its model once per batch) and the loop.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from roost.checks import whole
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.state import LayerState, State
from roost.training.loss import Objective, Sums, next_token_sums


def segmented_sums(
    model: RWKV, batch: Batch, segment: int, *, truncate: int | None = None, objective: Objective = next_token_sums
) -> Sums:
    """`objective(model, batch)` at the activation memory of `segment` tokens a row; an `Objective` when bound.

    segment    tokens per segment; rows that are not longer are read as they are
    truncate   None: exact gradients. Otherwise the carried state is detached every so many tokens, a multiple of
               `segment`; the loss keeps the value it had, since the state itself is always carried
    objective  sums over tokens; reads the model once, as `model(inputs, cu_seqlens=..., ...)`; dropout is drawn again
               as it was

    `loss.backward()` adds to `.grad` of whatever requires it and may be called once; torch.autograd.grad sees nothing.
    Packed documents (cu_seqlens) may lie across borders. Raises ValueError for sizes that do not fit, and for an
    objective that reads the model more than once.
    """
    segment = whole("segment", segment, 1)
    if truncate is not None and whole("truncate", truncate, 1) % segment:
        raise ValueError(f"truncate is {truncate}; it must be a multiple of segment = {segment}")
    if hasattr(objective, "count"):
        raise ValueError("the objective counts in its own unit, not in tokens: segments are for sums over tokens")
    if batch.inputs.shape[1] <= segment:
        return objective(model, batch)
    run = _Run(model, objective, _cut(batch, segment), None if truncate is None else truncate // segment)
    anchor = torch.zeros((), device=batch.inputs.device, requires_grad=True)  # parameters are not arguments
    loss, entropy = _Segments.apply(anchor, run)  # pyright: ignore[reportGeneralTypeIssues]  (untyped in torch)
    return Sums(loss, entropy, run.count)


@dataclass
class _Run:
    """One row in segments: what is read, and between the passes what the backward pass begins each segment from."""

    model: RWKV
    objective: Objective
    parts: Sequence[tuple[Batch, bool]]
    cut_every: int | None
    count: int | Tensor = 0

    def read(self, index: int, before: State | None) -> tuple[Sums, State]:
        """One segment from its border (None: from the initial state)."""
        part, _ = self.parts[index]
        with carried(self.model, before) as after:
            sums = self.objective(self.model, part)
        if len(after) != 1:
            raise ValueError(
                f"the objective reads the model {len(after)} times; segments carry the state of one reading"
            )
        return sums, after[0]


class _Kept:
    """Copies of states, in memory set aside for all of them: left among activations, each would split the heap."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self.places: list[Tensor] = []

    def add(self, state: State) -> State:
        if not self.places:
            self.places = [tensor.new_empty(self.room, *tensor.shape) for tensor in _tensors(state)]
        copies = [place[self.used].copy_(x) for place, x in zip(self.places, _tensors(state), strict=True)]
        self.used += 1
        return state._replace(layers=tuple(LayerState(*copies[i : i + 3]) for i in range(0, len(copies), 3)))


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
        kind = anchor.device.type
        cast: dict[str, Any] = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        ctx.run, ctx.cast, ctx.borders, ctx.draws = run, cast, [], []
        loss = entropy = torch.zeros((), device=anchor.device)
        state: State | None = None
        kept = _Kept(len(run.parts))
        with torch.autocast(kind, **cast, cache_enabled=False):  # weights cast without a graph must not be kept
            for index, (_, continues) in enumerate(run.parts):
                before = kept.add(state) if continues and state else None
                ctx.borders.append(before)
                ctx.draws.append((torch.get_rng_state(), get_device_states(anchor)))
                sums, state = run.read(index, before)
                loss, entropy, run.count = loss + sums.loss, entropy + sums.entropy, run.count + sums.count
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run, kind = ctx.run, d_loss.device.type
        sent: list[Tensor] | None = None
        while ctx.borders:
            before = _leaves(ctx.borders.pop())
            index, draw = len(ctx.borders), ctx.draws.pop()
            with torch.enable_grad(), _drawn_again(kind, *draw), torch.autocast(kind, **ctx.cast):
                sums, after = run.read(index, before)
            roots, gradients = [sums.loss], [d_loss.to(sums.loss.dtype)]
            if sent is not None:
                roots, gradients = roots + _tensors(after), gradients + sent
            kept = [i for i, root in enumerate(roots) if root.requires_grad]
            if kept:
                torch.autograd.backward([roots[i] for i in kept], [gradients[i] for i in kept])
            del sums, after, roots
            cut = before is None or (run.cut_every is not None and index % run.cut_every == 0)
            sent = None if cut else [x.new_zeros(x.shape) if x.grad is None else x.grad for x in _tensors(before)]
        return None, None


@contextmanager
def carried(model: RWKV, before: State | None) -> Generator[list[State]]:
    """Inside, every reading of `model` begins from `before`, and the states after them are appended to the list.

    before   of B rows. With cu_seqlens, of one row: that of the first document; the others begin from the initial
             state, and the state that is appended is that of the last document. None: the initial state for all.
    """
    after: list[State] = []

    def enter(module: RWKV, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        offsets = kwargs.get("cu_seqlens")
        if before is None or offsets is None or len(offsets) == 2:
            return args, {**kwargs, "state": before}
        return args, {**kwargs, "state": State.cat([before, module.initial_state(len(offsets) - 2)])}

    def leave(_: RWKV, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, State]) -> None:
        state = output[1]
        after.append(state if kwargs.get("cu_seqlens") is None else state.select(state.batch - 1))

    hooks = (
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, with_kwargs=True),
    )
    try:
        yield after
    finally:
        for hook in hooks:
            hook.remove()


def _cut(batch: Batch, segment: int) -> list[tuple[Batch, bool]]:
    """The segments of a batch, each with whether it begins inside a sequence."""
    length, parts = batch.inputs.shape[1], []
    borders = {0} if batch.cu_seqlens is None else set(batch.cu_seqlens)
    for start in range(0, length, segment):
        end = min(start + segment, length)
        inside: tuple[int, ...] | None = None
        if batch.cu_seqlens is not None:
            inside = tuple(at - start for at in sorted({start, end} | {at for at in borders if start < at < end}))
        part = Batch(batch.inputs[:, start:end], batch.targets[:, start:end], inside)
        parts.append((part, start not in borders))
    return parts


def _tensors(state: State | None) -> list[Tensor]:
    return [] if state is None else [tensor for layer in state.layers for tensor in layer]


def _leaves(state: State | None) -> State | None:
    """The same values as leaves of a new graph."""
    if state is None:
        return None
    layers = tuple(LayerState(*(x.detach().requires_grad_() for x in layer)) for layer in state.layers)
    return state._replace(layers=layers)


@contextmanager
def _drawn_again(kind: str, host: Tensor, devices: tuple[list[int], list[Tensor]]) -> Generator[None]:
    """Dropout inside draws what it drew when the generators were in these states."""
    with torch.random.fork_rng(devices[0], device_type=kind if devices[0] else "cuda"):
        torch.set_rng_state(host)
        set_device_states(*devices, device_type=kind if devices[0] else None)
        yield
