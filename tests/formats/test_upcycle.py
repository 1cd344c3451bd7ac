"""Eagle as Finch: exact, with the free tensors at their initial values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import Version, make_checkpoint
from roost import checkpoint
from roost.models.rwkv import RWKV

TOKENS = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0))


def logits(path: Path, dtype: torch.dtype | None = None) -> Tensor:
    model, _ = checkpoint.load(path, dtype=dtype)
    with torch.no_grad():
        return model(TOKENS)[0].double()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time_state", [False, True])
def test_logits_stay(stored: torch.dtype, time_state: bool, tmp_path: Path) -> None:
    weights = make_checkpoint("5.2", n_layer=3, time_state=time_state)
    torch.save({name: value.to(stored) for name, value in weights.items()}, tmp_path / "eagle.pth")
    checkpoint.convert(tmp_path / "eagle.pth", tmp_path / "finch.pth", to="finch")
    before, after = (logits(tmp_path / name, torch.float32) for name in ("eagle.pth", "finch.pth"))
    assert (before - after).abs().max() <= 1e-6 * before.abs().max()
    before, after = (logits(tmp_path / name, torch.float64) for name in ("eagle.pth", "finch.pth"))
    exact = 1e-12 if stored == torch.bfloat16 else 1e-6  # 1 - mix is exact in fp32 for a bf16 mix only
    assert (before - after).abs().max() <= exact * before.abs().max()


@pytest.mark.parametrize("bonus", ["time_first", "time_faaaa"])
def test_5_1_too(bonus: str, tmp_path: Path) -> None:
    weights = make_checkpoint("5.1", bonus_name=bonus)  # type: ignore[arg-type]
    torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", to="finch")
    before, after = (logits(tmp_path / name, torch.float64) for name in ("a.pth", "b.safetensors"))
    assert (before - after).abs().max() <= 1e-12 * before.abs().max()


def test_free_tensors_and_dtypes(tmp_path: Path) -> None:
    torch.save(make_checkpoint("5.2", n_embd=64, head_size=16), tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.pth", to="finch", dtype=torch.bfloat16)
    made: dict[str, Tensor] = torch.load(tmp_path / "b.pth", weights_only=True)
    for name, value in made.items():
        maa = ".time_maa_" in name and name[-1] in "xwkvrg"
        assert value.dtype == (torch.float32 if maa else torch.bfloat16), name
        if name.endswith(("time_maa_w1", "time_decay_w1")):
            assert not value.any()
        if name.endswith(("time_maa_w2", "time_decay_w2")):
            assert 0.009 < value.abs().max() <= 0.0101
    fresh = RWKV(checkpoint.info(tmp_path / "b.pth").config).state_dict()
    assert made.keys() == fresh.keys() and list(made) == list(fresh)
    assert torch.equal(made["blocks.1.att.time_maa_x"], fresh["blocks.1.att.time_maa_x"])


def test_16_bit_models_run_with_their_fp32_maa(tmp_path: Path) -> None:
    weights = make_checkpoint("5.2")
    torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.pth", to="finch")
    model, _ = checkpoint.load(tmp_path / "b.pth")
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert model.dtype == torch.bfloat16 and kinds["blocks.0.ffn.time_maa_k"] == torch.float32
    out, state = model(TOKENS)
    assert out.dtype == torch.bfloat16 and state.layers[0].att_shift.dtype == torch.bfloat16
    exact = logits(tmp_path / "a.pth", torch.float64)
    finch, eagle = ((out.double() - exact).std() / exact.std() for out in (out, logits(tmp_path / "a.pth")))
    assert finch < 1.3 * eagle < 0.03


@pytest.mark.parametrize(("version", "message"), [("4", "RWKV-4"), ("5.0", "no gate"), ("6", "RWKV-6 already")])
def test_what_cannot_become_finch(version: Version, message: str, tmp_path: Path) -> None:
    torch.save(make_checkpoint(version, n_embd=64, head_size=16), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(tmp_path / "a.pth", tmp_path / "b.pth", to="finch")
    assert not (tmp_path / "b.pth").exists()
