"""Which network a set of official tensors is: versions, sizes, upgrades, and everything that is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import VERSIONS, BonusName, Version, make_checkpoint
from roost import checkpoint
from roost.config import ModelConfig
from roost.formats import official

ODD = {"n_embd": 64, "head_size": 16, "dim_att": 48, "dim_ffn": 80, "shift_rank": 6, "decay_rank": 11}


def odd(version: Version, **options: object) -> dict[str, Tensor]:
    """A checkpoint in which no two sizes agree by chance."""
    return make_checkpoint(version, **{**ODD, **options})  # type: ignore[arg-type]


def save(weights: object, folder: Path, name: str = "model.pth") -> Path:
    torch.save(weights, folder / name)
    return folder / name


@pytest.mark.parametrize("version", VERSIONS)
def test_version_and_sizes_come_from_the_tensors(version: Version) -> None:
    weights = odd(version, n_layer=3, vocab=111)
    found = official.version_of(weights)
    assert found == version
    generation = "dove" if version == "4" else "finch" if version == "6" else "eagle"
    wanted = ModelConfig(
        generation, 3, 64, vocab_size=111, dim_att=48, dim_ffn=80,
        head_size=64 if version == "4" else 16,
        shift_rank=6 if version == "6" else 32, decay_rank=11 if version == "6" else 64, gate=version != "5.0",
    )  # fmt: skip
    assert official.config_of(weights, found) == wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_the_order_of_keys_does_not_matter(version: Version) -> None:
    weights = odd(version, n_layer=1)
    for names in (sorted(weights), sorted(weights, reverse=True)):
        assert official.version_of({name: weights[name] for name in names}) == version


@pytest.mark.parametrize(("version", "name"), [("5.0", "time_first"), ("5.0", "time_faaaa"), ("5.1", "time_first")])
def test_the_name_decides_what_the_bonus_means(version: Version, name: BonusName) -> None:
    weights = odd(version, bonus_name=name)
    stored = weights[f"blocks.1.att.{name}"]
    up = official.upgrade(weights, version, official.config_of(weights, version))
    wanted = torch.exp(stored) if name == "time_first" else stored
    assert torch.equal(up["blocks.1.att.time_faaaa"], wanted[:, None].expand(-1, 16))
    assert torch.equal(up["blocks.1.att.time_decay"], weights["blocks.1.att.time_decay"][:, None].expand(-1, 16))
    assert not any(key.endswith("time_first") for key in up)


def test_a_column_per_head_is_a_number_per_head() -> None:
    weights = odd("5.1")
    column = {k: v[:, None] if k.endswith(("time_decay", "time_faaaa")) else v for k, v in weights.items()}
    assert official.version_of(column) == "5.1"
    config = official.config_of(column, "5.1")
    a, b = (official.upgrade(w, "5.1", config) for w in (weights, column))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_exp_of_the_bonus_keeps_fp32(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in odd("5.1", bonus_name="time_first").items()}
    model, _ = checkpoint.load(save(weights, tmp_path))
    bonus = model.state_dict()["blocks.0.att.time_faaaa"]
    assert bonus.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert torch.equal(bonus[:, 0], torch.exp(weights["blocks.0.att.time_first"].float()))


@pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "_forward_module.model."])
def test_prefixes_are_stripped(prefix: str, tmp_path: Path) -> None:
    weights = odd("6")
    plain, _ = checkpoint.load(save(weights, tmp_path))
    prefixed, _ = checkpoint.load(save({prefix + name: value for name, value in weights.items()}, tmp_path, "b.pth"))
    assert plain.fingerprint == prefixed.fingerprint != ""
    both = {**weights, prefix + "emb.weight": weights["emb.weight"]}
    with pytest.raises(ValueError, match=r"emb\.weight is there twice"):
        checkpoint.load(save(both, tmp_path, "c.pth"))


V6, V5, V4 = odd("6"), odd("5.2"), odd("4")
ONE = torch.zeros(3)
VARIANTS: list[tuple[dict[str, Tensor], str]] = [
    ({**V6, "blocks.1.att.k_k": ONE}, "RWKV-7"),
    ({**V6, "blocks.1.att.r_k": ONE}, "RWKV-7"),
    ({"model.layers.0.attn.x_r": ONE}, "RWKV-7"),
    ({**V6, "blocks.0.att.time_maa_rkvw_w1": ONE}, "x060b or x060c"),
    ({**V6, "blocks.0.att.gate_w1": ONE}, "x060a"),
    ({**V5, "blocks.0.att.time_mix_x": ONE}, "web-rwkv"),
    ({**V5, "blocks.0.ffnPre.key.weight": ONE}, "ffnPre"),
    ({**V4, "head_q.weight": ONE}, "copy head"),
    ({**V4, "copy_mask": ONE}, "copy head"),
    ({**V4, "blocks.1.tiny_q.weight": ONE}, "tiny attention"),
    ({**V4, "pos_emb_x": ONE}, "position embeddings"),
    ({**V4, "blocks.0.ffn.aa.weight": ONE}, "MishGLU"),
    ({**V4, "blocks.0.att.qq.weight": ONE}, "variant 'a'"),
    ({**V6, "blocks.0.att.key.bias": ONE}, "RWKV6-Qwen2"),
    ({"blocks.0.in_proj.weight": ONE, "emb.weight": ONE}, "Mamba"),
    ({"blocks.0.att.key.lora_A": ONE, "blocks.0.att.key.lora_B": ONE}, "is an adapter, not a model"),
    ({"blocks.0.att.key.disha": ONE}, "is an adapter, not a model"),
    ({**V6, "blocks.0.att.key.lora_A": ONE}, "holds an adapter beside the weights"),
    ({"blocks.0.att.time_state": ONE, "blocks.1.att.time_state": ONE}, r"tuned initial state \(2 layers\)"),
    ({"layers.0.att_shift": ONE, "layers.0.wkv": ONE}, r"roost\.State\.load"),
    ({"transformer.h.0.attn.weight": ONE}, "not an RWKV checkpoint"),
    ({}, "no tensors"),
]
ACTION = re.compile(r"[;:,] (run it|load it|load the|read it|merge it|copy its|get the|give it) ?")


@pytest.mark.parametrize(("weights", "message"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_unsupported_variants_are_named(weights: dict[str, Tensor], message: str, ending: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"odd{ending}"
    if ending == ".pth":
        torch.save(weights, path)
    else:
        save_file({name: value.clone() for name, value in weights.items()}, path)
    with pytest.raises(ValueError, match=message) as refused:
        checkpoint.load(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert ACTION.search(str(refused.value)), refused.value


def test_a_file_converted_by_chatrwkv_is_named(tmp_path: Path) -> None:
    converted = {**V5, "_strategy": "cpu fp32", "_version": "0.7", "_rescale_layer": 0}
    with pytest.raises(ValueError, match=r"converted by ChatRWKV.*load the original"):
        checkpoint.load(save(converted, tmp_path))


def test_a_web_rwkv_file_of_5_2_is_named(tmp_path: Path) -> None:
    weights = {name.replace("time_faaaa", "time_first"): value for name, value in V5.items()}
    with pytest.raises(ValueError, match="web-rwkv"):
        checkpoint.load(save(weights, tmp_path))


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    weights = {**V6, "head.weight": V6["head.weight"].to(torch.int8)}
    with pytest.raises(ValueError, match=r"head\.weight is int8"):
        checkpoint.load(save(weights, tmp_path))


@given(version=st.sampled_from(VERSIONS), data=st.data())
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_listed(version: Version, data: st.DataObject) -> None:
    weights: dict[str, Tensor] = {name: value.to("meta") for name, value in odd(version).items()}
    names = data.draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=3, unique=True))
    change = data.draw(st.sampled_from(["missing", "unknown", "wrong shape", "no axes", "empty"]))
    for name in names:
        value = weights.pop(name)
        if change == "unknown":
            weights[name], weights[name + "_more"] = value, value
        elif change == "wrong shape":
            weights[name] = torch.empty(*value.shape, 2, device="meta")
        elif change == "no axes":
            weights[name] = torch.empty((), device="meta")
        elif change == "empty":
            weights[name] = torch.empty(0, *value.shape[1:], device="meta")
    with pytest.raises(ValueError) as refused:
        found = official.version_of(weights)
        config = official.config_of(weights, found)
        ready = official.upgrade(weights, found, config)
        official.check(ready, checkpoint.RWKV(config, device="meta").state_dict(), found, "it")
    message = str(refused.value)
    if len(names) == 1:
        part = names[0].removesuffix(".weight").split(".", 2)[-1] if names[0].startswith("blocks") else names[0]
        assert part.replace("time_first", "time_f").replace("time_faaaa", "time_f") in message.replace(
            "time_first", "time_f"
        ).replace("time_faaaa", "time_f")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    weights = {name: value for name, value in odd("6", n_layer=4).items() if not name.startswith("blocks.2.att")}
    with pytest.raises(ValueError, match=r"missing blocks\.2\.att\.time_maa_x, .* and \d+ more \(19 in all\)"):
        checkpoint.load(save(weights, tmp_path))


def test_a_gap_between_the_layers_is_found_before_anything_is_built(tmp_path: Path) -> None:
    weights = {**V6, "blocks.999999999.att.key.weight": V6["blocks.0.att.key.weight"]}
    with pytest.raises(ValueError, match=r"missing blocks\.2, although blocks\.999999999"):
        checkpoint.load(save(weights, tmp_path))


def test_impossible_sizes_are_refused() -> None:
    weights = {**V5, "blocks.0.att.time_decay": torch.zeros(5, 16), "blocks.1.att.time_decay": torch.zeros(5, 16)}
    with pytest.raises(ValueError, match="impossible sizes: dim_att 48"):
        official.config_of(weights, "5.2")
