"""A larger vocabulary: what stays, what the new rows are, what is refused. Both generations throughout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roost.models.rwkv import fingerprint_of
from roost.training.adapter_config import AdapterConfig
from roost.training.adapters import prepare_model
from roost.training.resize import resize_vocabulary
from tiny import tiny_model

TOKENS = torch.tensor([[72, 101, 108, 108, 111, 33, 10, 200, 3, 256]])

every_generation = pytest.mark.parametrize("generation", ["eagle-tiny", "finch-tiny"])


@every_generation
@pytest.mark.parametrize("init", ["mean", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_tokens_stay(generation: str, init: str, dtype: torch.dtype) -> None:
    """What the head reads, its old rows and so the old logits are the same bits; the wider product, to its rounding."""
    model = tiny_model(generation).to(dtype)
    new = resize_vocabulary(model, 300, init)  # pyright: ignore[reportArgumentType]
    assert new.config.vocab_size == 300 and new.head.weight.shape == new.emb.weight.shape == (300, 64)
    with torch.no_grad():
        before, after = model(TOKENS)[0], new(TOKENS)[0]
        features = new(TOKENS, head=False)[0]
        assert torch.equal(features, model(TOKENS, head=False)[0])
        assert torch.equal(F.linear(features, new.head.weight[:257]), before)
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    assert (after[..., :257] - before).abs().max() <= bound * before.abs().max()
    for mine, old in ((new.emb.weight, model.emb.weight), (new.head.weight, model.head.weight)):
        assert torch.equal(mine[:257], old)
        row = old.detach().double().numpy().mean(0) if init == "mean" else np.zeros(64)
        for made in mine[257:].detach().double().numpy():
            np.testing.assert_allclose(made, row, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    if init == "zero":
        assert bool((after[..., 257:] == 0).all())
    assert new.fingerprint == fingerprint_of(new.config, new.state_dict()) != model.fingerprint
    with torch.no_grad():
        new.get_parameter("blocks.0.att.key.weight").zero_()
        new.emb.weight.zero_()
        assert torch.equal(model(TOKENS)[0], before)  # no memory is shared
    assert all(parameter.requires_grad for parameter in new.parameters())


@every_generation
def test_rows_by_a_function(generation: str) -> None:
    model = tiny_model(generation)

    def copy_of_the_letter_a(name: str, rows: Tensor, count: int) -> Tensor:
        return rows[98].expand(count, -1) * (1 if name == "emb.weight" else 2)

    new = resize_vocabulary(model, 260, copy_of_the_letter_a)
    with torch.no_grad():
        old_id, new_id = new(torch.tensor([[98]]))[0], new(torch.tensor([[259]]))[0]
        assert torch.equal(old_id, new_id)
        assert torch.equal(new.head.weight[257:], 2 * model.head.weight[[98] * 3])


@every_generation
def test_shrinking_is_asked_for(generation: str) -> None:
    model = tiny_model(generation)
    with pytest.raises(
        ValueError, match="size is 200, and the model knows 257 ids: shrink=True drops those from 200 on"
    ):
        resize_vocabulary(model, 200)
    small = resize_vocabulary(model, 200, shrink=True)
    assert torch.equal(small.emb.weight, model.emb.weight[:200]) and small.head.weight.shape == (200, 64)
    same = resize_vocabulary(model, 257)
    assert same.fingerprint == model.fingerprint and same.emb.weight.data_ptr() != model.emb.weight.data_ptr()
    back = resize_vocabulary(resize_vocabulary(model, 300), 257, shrink=True)
    with torch.no_grad():
        assert torch.equal(back(TOKENS)[0], model(TOKENS)[0])


def test_what_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="init is 'men'; did you mean 'mean'"):
        resize_vocabulary(model, 300, "men")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"init gave \(1, 64\) for emb.weight; it must give \(43, 64\) finite numbers"):
        resize_vocabulary(model, 300, lambda name, old, count: old[:1])
    with pytest.raises(ValueError, match="finite"):
        resize_vocabulary(model, 300, lambda name, old, count: torch.full((count, 64), torch.nan))
    with pytest.raises(ValueError, match="size is 0; it must be at least 1"):
        resize_vocabulary(model, 0, shrink=True)
    prepare_model(model, AdapterConfig(adapter="lora"))
    with pytest.raises(ValueError, match="the model has an adapter: merge or remove it"):
        resize_vocabulary(model, 300)
