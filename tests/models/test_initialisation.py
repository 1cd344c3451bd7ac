"""Every row of the initialisation table (RWKV-LM today, RWKV-LM in early 2024, the paper's appendix I)."""

from __future__ import annotations

from math import log

import pytest
import torch

from roost import PRESETS, RWKV, ModelConfig

L, D, V = 3, 64, 257


def built(generation: str, init: str = "current", seed: int = 0, **numbers: int) -> RWKV:
    config = ModelConfig(generation, **{"n_layer": L, "n_embd": D, "vocab_size": V, "head_size": 32, **numbers})
    return RWKV(config, init=init, seed=seed)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.allclose(a.detach().flatten(), b.flatten().float(), atol=1e-6)


def gain(weight: torch.Tensor) -> float:
    """The gain of an orthogonal matrix, after checking that it is one."""
    w = weight.detach().double()
    small = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    scale = small.diagonal().mean()
    assert (small - scale * torch.eye(len(small))).abs().max() < 1e-5 * max(1.0, scale)
    return scale.sqrt().item()


def is_uniform(weight: torch.Tensor, bound: float) -> None:
    w = weight.detach().abs()
    assert 0.9 * bound < w.max() <= bound * (1 + 1e-6)
    assert abs(w.mean() / bound - 0.5) < 0.1


d = torch.arange(D, dtype=torch.float64) / D
i = torch.arange(D, dtype=torch.float64) / (D - 1)
zigzag = torch.tensor([((n + 1) % 3) - 1.0 for n in range(D)], dtype=torch.float64)


@pytest.mark.parametrize("init", ["current", "legacy", "paper"])
@pytest.mark.parametrize("layer", range(L))
def test_finch(layer: int, init: str) -> None:
    rho0, rho1 = layer / (L - 1), 1 - layer / L
    block = built("finch", init).blocks[layer]
    att, ffn = block.att, block.ffn
    for name in ("x", "w", "k"):
        close(getattr(att, f"time_maa_{name}"), 1 - d**rho1)
    close(att.time_maa_v, 1 - d**rho1 - 0.3 * rho0)
    for name in ("r", "g"):
        close(getattr(att, f"time_maa_{name}"), 1 - d ** (rho1 / 2))
    close(att.time_decay, -6 + 5 * i ** (0.7 + 1.3 * rho0))
    close(att.time_faaaa, rho0 * (1 - i) + 0.1 * (zigzag + (1 if init == "paper" else 0)))
    for name in ("time_maa", "time_decay"):
        w1, w2 = getattr(att, f"{name}_w1"), getattr(att, f"{name}_w2")
        if init == "current":
            assert not w1.any()
            is_uniform(w2, 0.01)
        else:
            is_uniform(w1, 1e-4)
            is_uniform(w2, 1e-4)
    exponent = rho1**3 if init == "current" else rho1
    close(ffn.time_maa_k, 1 - d**exponent)
    close(ffn.time_maa_r, 1 - d**exponent)
    matrices(block, layer, init)


@pytest.mark.parametrize("init", ["current", "legacy", "paper"])
@pytest.mark.parametrize("layer", range(L))
def test_eagle(layer: int, init: str) -> None:
    rho0, rho1 = layer / (L - 1), 1 - layer / L
    block = built("eagle", init).blocks[layer]
    close(block.att.time_mix_k, d**rho1)
    close(block.att.time_mix_v, d**rho1 + 0.3 * rho0)
    close(block.att.time_mix_r, d ** (rho1 / 2))
    close(block.att.time_mix_g, d ** (rho1 / 2))
    close(block.att.time_decay, -6 + 5 * i ** (0.7 + 1.3 * rho0))
    close(block.att.time_faaaa, rho0 * (1 - i) + 0.1 * (zigzag + (1 if init == "paper" else 0)))
    close(block.ffn.time_mix_k, d**rho1)
    close(block.ffn.time_mix_r, d**rho1)
    matrices(block, layer, init)


def matrices(block: torch.nn.Module, layer: int, init: str) -> None:
    """The rows that Eagle and Finch share."""
    for name in ("receptance", "value", "key", "gate"):
        weight = getattr(block.att, name).weight
        if init == "paper":
            is_uniform(weight, D**-0.5)
        else:
            assert gain(weight) == pytest.approx(0.1 if init == "current" and name in ("key", "gate") else 1, rel=1e-5)
    wanted = {"current": 1, "legacy": 3.5**0.5, "paper": 3.5}[init]
    assert gain(block.ffn.key.weight) == pytest.approx(wanted, rel=1e-5)
    for zero in (block.att.output, block.ffn.value, block.ffn.receptance):
        assert not zero.weight.any()
    close(block.att.ln_x.weight, torch.full((D,), ((1 + layer) / L) ** 0.7))
    assert not block.att.ln_x.bias.any()


@pytest.mark.parametrize("init", ["current", "legacy", "paper"])
@pytest.mark.parametrize("layer", range(L))
def test_dove(layer: int, init: str) -> None:
    """RWKV-v4neo's one rule, whatever the name."""
    rho0, rho1 = layer / (L - 1), 1 - layer / L
    block = built("dove", init).blocks[layer]
    close(block.att.time_decay, -5 + 8 * i ** (0.7 + 1.3 * rho0))
    close(block.att.time_first, log(0.3) + 0.5 * zigzag)
    close(block.att.time_mix_k, d**rho1)
    close(block.att.time_mix_v, d**rho1 + 0.3 * rho0)
    close(block.att.time_mix_r, d ** (rho1 / 2))
    close(block.ffn.time_mix_k, d**rho1)
    assert gain(block.att.value.weight) == pytest.approx(1, rel=1e-5)
    assert gain(block.ffn.key.weight) == pytest.approx(2, rel=1e-5)
    for zero in (block.att.key, block.att.receptance, block.att.output, block.ffn.value, block.ffn.receptance):
        assert not zero.weight.any()


@pytest.mark.parametrize("init,head,emb", [("current", 1, 1e-4), ("legacy", 1, 4e-4), ("paper", 0, 4e-4)])
def test_edges(init: str, head: int, emb: float) -> None:
    model = built("finch", init)
    is_uniform(model.emb.weight, emb)
    assert gain(model.head.weight) == pytest.approx(0.5 * (V / D) ** (head / 2), rel=1e-5)
    for norm in (model.ln_out, model.blocks[0].ln0, model.blocks[1].ln1, model.blocks[2].ln2):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_a_narrow_head() -> None:
    """V < D: today's gain is 0.5; the old rule had none of that test."""
    assert gain(built("finch", "current", vocab_size=16).head.weight) == pytest.approx(0.5, rel=1e-5)
    assert gain(built("finch", "legacy", vocab_size=16).head.weight) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("generation", ["dove", "eagle", "finch"])
def test_one_layer_and_one_head_are_finite(generation: str) -> None:
    model = built(generation, n_layer=1, n_embd=32)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.long))[0]).all()


def test_seed_and_dtype() -> None:
    one, same, other = built("finch"), built("finch"), built("finch", seed=1)
    weights = [m.state_dict() for m in (one, same, other)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])
    assert RWKV(PRESETS["finch-tiny"], dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.usefixtures("unchecked")
def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="init is 'newest'"):
        built("finch", "newest")


def test_meta_device_allocates_nothing() -> None:
    model = RWKV(PRESETS["finch-14b"], device="meta")
    assert model.device.type == "meta" and all(p.is_meta for p in model.parameters())


def test_trainer_key_order() -> None:
    names = list(built("finch").state_dict())
    assert names[0] == "emb.weight" and names[-3:] == ["ln_out.weight", "ln_out.bias", "head.weight"]
    assert [n for n in names if n.startswith("blocks.0.")][:6] == [
        f"blocks.0.{norm}.{part}" for norm in ("ln1", "ln2", "ln0") for part in ("weight", "bias")
    ]
    att = [n.removeprefix("blocks.1.att.") for n in names if n.startswith("blocks.1.att.")]
    assert att[-7:] == [
        "receptance.weight", "key.weight", "value.weight", "output.weight", "gate.weight", "ln_x.weight", "ln_x.bias",
    ]  # fmt: skip
