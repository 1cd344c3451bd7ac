"""Sums over tokens: pieces equal the whole, masks count nowhere, L2Wrap is RWKV-LM's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roost.data.batch import Batch
from roost.training.loss import logit_sums, next_token_sums
from tiny import tiny_model


def batch(rows: int = 2, length: int = 11) -> Batch:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 257, (rows, length), generator=g)
    targets[0, 3:6] = -1
    return Batch(torch.randint(0, 257, (rows, length), generator=g), targets)


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-2])
def test_pieces_equal_the_plain_formula(name: str, l2wrap: float) -> None:
    """Loss and every gradient, against -log softmax written out over whole logits."""
    model, given = tiny_model(name), batch()
    logits, _ = model(given.inputs)
    kept = given.targets >= 0
    chosen = logits.log_softmax(-1).gather(-1, given.targets.clamp(min=0)[..., None])[..., 0]
    plain = -chosen[kept].sum() + 0.5 * l2wrap * (logits.amax(-1)[kept] ** 2).sum()
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    for largest in (10**9, 257 * 5, 1):  # whole, five rows at a time, one row at a time
        sums = next_token_sums(model, given, l2wrap, largest)
        assert int(sums.count) == kept.sum()
        torch.testing.assert_close(sums.loss, plain, rtol=2e-6, atol=0)
        torch.testing.assert_close(sums.entropy, -chosen[kept].sum(), rtol=2e-6, atol=0)
        assert not sums.entropy.requires_grad
        for found, right in zip(torch.autograd.grad(sums.loss, list(model.parameters())), wanted, strict=True):
            assert (found - right).abs().max() <= 5e-6 * right.abs().max() + 1e-9


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In neither pass does the head see more rows than fit; the backward pass makes every piece once more."""
    model, given, rows = tiny_model(), batch(), list[int]()

    def spy(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    model.head.register_forward_pre_hook(spy)
    sums = next_token_sums(model, given, 0.1, 257 * 4)
    assert rows == [4, 4, 4, 4, 4, 2]
    sums.loss.backward()
    assert sorted(rows) == sorted([4, 4, 4, 4, 4, 2] * 2)


def test_packed_documents_are_read_apart() -> None:
    """cu_seqlens reaches the model: the sums of a packed row are those of its documents."""
    model, row = tiny_model(), batch(1, 12)
    packed = next_token_sums(model, Batch(row.inputs, row.targets, (0, 5, 12)), 0.1)
    apart = [next_token_sums(model, Batch(row.inputs[:, a:b], row.targets[:, a:b]), 0.1) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(packed.loss, apart[0].loss + apart[1].loss, rtol=1e-6, atol=0)


def test_ties_pull_one_logit_only() -> None:
    logits = torch.ones(1, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(logit_sums(logits, torch.tensor([0]))[0], logits)
    (pulled,) = torch.autograd.grad(logit_sums(logits, torch.tensor([0]), 1.0)[0], logits)
    assert sorted((pulled - plain)[0].tolist()) == [0, 0, 0, 1]
