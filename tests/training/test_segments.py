"""Back-propagation through segments: gradients of the row in one piece, at the graph of one segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roost.config import PRESETS
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.training.loss import Sums, next_token_sums
from roost.training.segments import segmented_sums
from tiny import tiny_model

BOTH = pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
OBJECTIVE = partial(next_token_sums, l2wrap=1e-2)


def batch(B: int, T: int, cu_seqlens: tuple[int, ...] | None = None) -> Batch:
    ids = torch.randint(0, 257, (B, T + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, 5:9] = -1
    return Batch(ids[:, :-1], targets, cu_seqlens)


def gradients(model: RWKV, run: Callable[[], Sums]) -> tuple[Sums, dict[str, Tensor]]:
    model.zero_grad()
    sums = run()
    (sums.loss / sums.count).backward()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@BOTH
@pytest.mark.parametrize(
    "rows",
    [batch(2, 50), batch(1, 50, (0, 3, 3, 16, 17, 40, 50)), batch(1, 50, (0, 50))],
    ids=["rows", "packed", "one document"],
)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_gradients_are_those_of_the_row_in_one_piece(
    name: str, rows: Batch, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model(name).to(dtype)
    whole, wanted = gradients(model, lambda: OBJECTIVE(model, rows))
    cut, found = gradients(model, lambda: segmented_sums(model, rows, 16, objective=OBJECTIVE))
    assert (cut.loss - whole.loss).abs() <= tolerance * whole.loss and cut.count == whole.count
    assert (cut.entropy - whole.entropy).abs() <= tolerance * whole.entropy and not cut.entropy.requires_grad
    check(found, wanted, tolerance)


def by_hand(model: RWKV, rows: Batch, segment: int, truncate: int) -> Sums:
    """Segments in one graph, the state detached where the gradient is to be cut."""
    loss, state = torch.zeros(()), None
    for start in range(0, rows.inputs.shape[1], segment):
        part = slice(start, start + segment)
        if state is not None and start % truncate == 0:
            state = state.detach()
        logits, state = model(rows.inputs[:, part], state)
        loss = loss + F.cross_entropy(
            logits.flatten(0, 1).float(), rows.targets[:, part].flatten(), reduction="sum", ignore_index=-1
        )
    return Sums(loss, loss.detach(), int((rows.targets >= 0).sum()))


@BOTH
@pytest.mark.parametrize("truncate", [16, 32])
def test_truncated(name: str, truncate: int) -> None:
    model, rows = tiny_model(name), batch(2, 70)
    whole, wanted = gradients(model, lambda: by_hand(model, rows, 16, truncate))
    cut, found = gradients(model, lambda: segmented_sums(model, rows, 16, truncate=truncate))
    assert (cut.loss - whole.loss).abs() <= 2e-6 * whole.loss
    check(found, wanted, 2e-6)


def test_dropout_and_autocast_are_the_same_in_both_passes() -> None:
    model, rows = tiny_model(), batch(2, 48)
    for block in model.layers:
        block.ffn.value.register_forward_hook(lambda _, args, out: F.dropout(out, 0.3))

    def run(objective: Callable[[], Sums]) -> Sums:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return objective()

    _, wanted = gradients(model, lambda: run(lambda: by_hand(model, rows, 16, 10**6)))
    after = torch.get_rng_state()
    _, found = gradients(model, lambda: run(lambda: segmented_sums(model, rows, 16)))
    assert torch.equal(torch.get_rng_state(), after)
    check(
        found, wanted, 2e-2
    )  # gradients of bf16 products are rounded once per segment in one, once in all in the other
    torch.manual_seed(4)
    _, other = gradients(model, lambda: segmented_sums(model, rows, 16))
    assert (other["head.weight"] - wanted["head.weight"]).norm() > 0.1 * wanted["head.weight"].norm()


@pytest.mark.parametrize("cu_seqlens", [None, (0, 20, 40)], ids=["rows", "packed"])
def test_only_what_is_trained_gets_a_gradient(cu_seqlens: tuple[int, ...] | None) -> None:
    model = RWKV(replace(PRESETS["finch-tiny"], time_state=True))
    model.load_state_dict(tiny_model().state_dict(), strict=False)
    model.requires_grad_(False)
    model.layers[1].att.time_state.requires_grad_(True)
    rows = batch(1 if cu_seqlens else 2, 40, cu_seqlens)
    _, wanted = gradients(model, lambda: OBJECTIVE(model, rows))
    _, found = gradients(model, lambda: segmented_sums(model, rows, 16, objective=OBJECTIVE))
    assert set(found) == {"blocks.1.att.time_state"} and found["blocks.1.att.time_state"].norm() > 0
    check(found, wanted, 2e-6)


def test_one_segment_at_a_time() -> None:
    """First all segments without a graph, then from the last to the first with one; and micro-batches accumulate."""
    model, seen = tiny_model(), []

    def spy(model: RWKV, part: Batch) -> Sums:
        seen.append((torch.is_grad_enabled(), part.inputs.shape[1]))
        return OBJECTIVE(model, part)

    sums = segmented_sums(model, batch(2, 40), 16, objective=spy)
    assert seen == [(False, 16), (False, 16), (False, 8)]
    sums.loss.backward()
    assert seen[3:] == [(True, 8), (True, 16), (True, 16)]
    once = model.head.weight.grad.clone()
    segmented_sums(model, batch(2, 40), 16, objective=spy).loss.backward()
    assert (model.head.weight.grad - 2 * once).norm() < 1e-6 * once.norm()
    seen.clear()
    segmented_sums(model, batch(2, 40), 40, objective=spy)
    assert seen == [(True, 40)]


def test_bad_input() -> None:
    model, rows = tiny_model(), batch(1, 40)
    with pytest.raises(ValueError, match="segment"):
        segmented_sums(model, rows, 0)
    with pytest.raises(ValueError, match="truncate is 24; it must be a multiple of segment = 16"):
        segmented_sums(model, rows, 16, truncate=24)

    def twice(model: RWKV, part: Batch) -> Sums:
        OBJECTIVE(model, part)
        return OBJECTIVE(model, part)

    class Pairs:
        """Counts pairs, as DPO does."""

        def __call__(self, model: RWKV, part: Batch) -> Sums:
            return OBJECTIVE(model, part)

        def count(self, part: Batch) -> int:
            return 1

    with pytest.raises(ValueError, match="counts in its own unit"):
        segmented_sums(model, rows, 16, objective=Pairs())
    with pytest.raises(ValueError, match="reads the model 2 times"):
        segmented_sums(model, rows, 16, objective=twice)
    assert not model._forward_hooks and not model._forward_pre_hooks
