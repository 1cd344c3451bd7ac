"""The Hugging Face and fla dialects: the same network under other names, both ways where that is possible."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oracle
from checkpoints import Version, make_checkpoint
from roost import checkpoint
from roost.formats import fla, huggingface

TOKENS = list(range(3, 40))


def widths(version: Version) -> dict[str, int]:
    """Sizes the Hugging Face classes can express, of which no two agree by chance."""
    return {"n_embd": 96, "head_size": 16, "vocab": 70, "dim_ffn": 384 if version == "4" else 320}


def renamed(weights: dict[str, Tensor], version: Version) -> dict[str, Tensor]:
    """Section 6 of the formats page, written out a second time."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "emb.weight":
            name = "rwkv.embeddings.weight"
        elif name != "head.weight":
            name = f"rwkv.{name}"
        name = re.sub(r"\.att\.", ".attention.", re.sub(r"\.ffn\.", ".feed_forward.", name))
        name = name.replace("blocks.0.ln0", "blocks.0.pre_ln")
        if version != "6":
            for short, long in zip("kvrg", ("key", "value", "receptance", "gate"), strict=True):
                name = re.sub(rf"time_mix_{short}$", f"time_mix_{long}", name)
        out[name] = value
    return out


def agrees(source: Path, weights: dict[str, Tensor]) -> None:
    """The loaded model computes what the oracle computes from the official tensors."""
    model, _ = checkpoint.load(source)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]))[0][0].double().numpy()
    expected, _ = oracle.forward({name: value.numpy() for name, value in weights.items()}, TOKENS)
    assert abs(logits - expected).max() <= 2e-4 * expected.std()


@pytest.mark.parametrize("version", ["4", "5.2", "6"])
def test_import(version: Version, tmp_path: Path) -> None:
    weights = make_checkpoint(version, **widths(version))
    theirs = renamed(weights, version)
    assert not theirs.keys() & (weights.keys() - {"head.weight"})
    save_file(theirs, tmp_path / "model.safetensors")
    agrees(tmp_path, weights)
    assert checkpoint.info(tmp_path).dialect == "huggingface"


def test_import_of_sharded_bin_without_config(tmp_path: Path) -> None:
    weights = make_checkpoint("5.2", **widths("5.2"))
    theirs = renamed(weights, "5.2")
    for n in range(2):
        torch.save({k: theirs[k] for k in list(theirs)[n::2]}, tmp_path / f"pytorch_model-{n + 1:05d}-of-00002.bin")
    agrees(tmp_path, weights)


def test_import_of_a_decay_by_heads(tmp_path: Path) -> None:
    weights = make_checkpoint("6", **widths("6"))
    theirs = renamed(weights, "6")
    for name in theirs:
        if name.endswith("time_decay"):
            theirs[name] = theirs[name].reshape(6, 16).clone()
    save_file(theirs, tmp_path / "model.safetensors")
    agrees(tmp_path, weights)


@pytest.mark.parametrize("version", ["4", "5.1", "5.2", "6"])
def test_export_and_back(version: Version, tmp_path: Path) -> None:
    weights = make_checkpoint(version, **widths(version))
    torch.save(weights, tmp_path / "a.pth")
    folder = checkpoint.convert(tmp_path / "a.pth", tmp_path / "v-1.6B")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    if version != "5.1":
        stored, wanted = load_file(folder / "model.safetensors"), renamed(weights, version)
        assert stored.keys() == wanted.keys() and all(torch.equal(stored[name], wanted[name]) for name in wanted)
    agrees(folder, weights)
    checkpoint.convert(folder, tmp_path / "b.pth")
    assert checkpoint.load(tmp_path / "a.pth")[0].fingerprint == checkpoint.load(tmp_path / "b.pth")[0].fingerprint
    checkpoint.convert(tmp_path / "a.pth", folder)  # an earlier export is replaced


def test_config_json(tmp_path: Path) -> None:
    torch.save(make_checkpoint("6", **widths("6")), tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "rwkv6" and config["architectures"] == ["Rwkv6ForCausalLM"]
    wanted = {
        "vocab_size": 70, "hidden_size": 96, "attention_hidden_size": 96, "head_size": 16, "num_hidden_layers": 2,
        "intermediate_size": None, "layer_norm_epsilon": 1e-5, "rescale_every": 6, "bos_token_id": 0, "eos_token_id": 0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("5.2", {"dim_ffn": 384}, "dim_ffn is 384, the class always takes 320"),
        ("6", {"shift_rank": 16}, r"the ranks are 16 and 64, the class always takes \(32, 64\)"),
        ("5.0", {}, "it has no gate"),
        ("6", {"time_state": True}, "tuned initial state"),
    ],
)
def test_export_refuses_what_the_classes_cannot_express(
    version: Version, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    torch.save(make_checkpoint(version, **{**widths(version), **options}), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_to_mix_two_models(tmp_path: Path) -> None:
    torch.save(make_checkpoint("6", **widths("6")), tmp_path / "a.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"already holds pytorch_model\.bin"):
        checkpoint.convert(tmp_path / "a.pth", tmp_path / "out")


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(weights)
    for name, value in weights.items():
        if name.endswith(("att.output.weight", "ffn.value.weight")):
            out[name] = value / 2 ** (int(name.split(".")[1]) // 6)
    return out


@pytest.mark.parametrize("layers", [7, 12, 24])
def test_weights_saved_after_halving_are_noticed(layers: int, tmp_path: Path) -> None:
    weights = make_checkpoint("6", n_layer=layers, n_embd=64, head_size=32, vocab=30)
    for scaled in (False, True):
        chosen = halved(weights) if scaled else weights
        assert huggingface.looks_rescaled(chosen, layers) is scaled
        save_file(renamed(chosen, "6"), tmp_path / "model.safetensors")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.info(tmp_path)
        assert [str(w.message).startswith(f"{tmp_path}: att.output") for w in caught] == [True] * scaled


def test_ordinary_sizes_do_not_look_halved() -> None:
    weights = make_checkpoint("6", n_layer=12, n_embd=64, head_size=32, vocab=30)
    smooth, zero, short = dict(weights), dict(weights), dict(weights)
    for name, value in weights.items():
        if name.endswith(("att.output.weight", "ffn.value.weight")):
            smooth[name] = value * 0.85 ** int(name.split(".")[1])
            zero[name] = torch.zeros_like(value)
    assert not huggingface.looks_rescaled(smooth, 12)
    assert not huggingface.looks_rescaled(zero, 12)
    assert not huggingface.looks_rescaled(short, 6)


def to_fla(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fla converter's map from official tensors, written from its table: five blocks in the order r, w, k, v, g."""
    out = {
        "model.embeddings.weight": weights["emb.weight"],
        "lm_head.weight": weights["head.weight"],
        "model.norm.weight": weights["ln_out.weight"],
        "model.norm.bias": weights["ln_out.bias"],
    }
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks"))
    for layer in range(layers):
        get = {name.split(".", 2)[2]: v for name, v in weights.items() if name.startswith(f"blocks.{layer}.")}
        norms = {"ln1": "attn_norm", "ln2": "ffn_norm", "ln0": "pre_norm", "att.ln_x": "attn.g_norm"}
        block = {
            f"{new}.{k}": get[f"{old}.{k}"]
            for old, new in norms.items()
            for k in ("weight", "bias")
            if f"{old}.{k}" in get
        }
        w, k, v, r, g = get["att.time_maa_w1"].chunk(5, dim=1)
        block["attn.x_proj.0.linear.weight"] = torch.cat([r, w, k, v, g], 1).t()
        w, k, v, r, g = get["att.time_maa_w2"]
        block["attn.x_proj.2.weight"] = torch.cat([r, w, k, v, g], 0).t()
        block["attn.x_proj.0.mu"] = get["att.time_maa_x"].flatten()
        block["attn.x_bias"] = torch.stack([get[f"att.time_maa_{x}"].flatten() for x in "rwkvg"])
        for short, long in zip("rkvg", ("receptance", "key", "value", "gate"), strict=True):
            block[f"attn.{short}_proj.linear.weight"] = get[f"att.{long}.weight"]
        block["attn.o_proj.weight"] = get["att.output.weight"]
        block["attn.w_proj.linear.lora.0.weight"] = get["att.time_decay_w1"].t()
        block["attn.w_proj.linear.lora.2.weight"] = get["att.time_decay_w2"].t()
        block["attn.w_proj.linear.lora.2.bias"] = get["att.time_decay"].flatten()
        block["attn.bonus"] = get["att.time_faaaa"]
        for part, letter in (("key", "k"), ("receptance", "r")):
            block[f"ffn.{part}.linear.weight"] = get[f"ffn.{part}.weight"]
            block[f"ffn.{part}.mu"] = get[f"ffn.time_maa_{letter}"].flatten()
        block["ffn.value.weight"] = get["ffn.value.weight"]
        out |= {f"model.layers.{layer}.{name}": value for name, value in block.items()}
    return {name: value.clone().contiguous() for name, value in out.items()}


def test_fla_import(tmp_path: Path) -> None:
    weights = make_checkpoint("6", n_embd=96, head_size=16, vocab=70, dim_att=64, shift_rank=6, decay_rank=10)
    save_file(to_fla(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv6", "norm_eps": 1e-5}')
    agrees(tmp_path, weights)
    assert checkpoint.info(tmp_path).dialect == "fla"
    ours = fla.to_official(to_fla(weights), "it")
    assert ours.keys() == weights.keys() and all(torch.equal(ours[name], weights[name]) for name in weights)
    checkpoint.convert(tmp_path, tmp_path / "a.safetensors")
    agrees(tmp_path / "a.safetensors", weights)


@pytest.mark.parametrize("source", ["fla", "Hugging Face", "Hugging Face, sharded .bin"])
@pytest.mark.parametrize("target", ["a.pth", "a.safetensors", "folder"])
def test_every_dialect_converts_into_every_form(source: str, target: str, tmp_path: Path) -> None:
    weights = make_checkpoint("6", **widths("6"))
    theirs, folder = to_fla(weights) if source == "fla" else renamed(weights, "6"), tmp_path / "source"
    folder.mkdir()
    if source.endswith(".bin"):
        for n in range(2):
            torch.save({k: theirs[k] for k in list(theirs)[n::2]}, folder / f"pytorch_model-{n + 1:05d}-of-00002.bin")
    else:
        save_file(theirs, folder / "model.safetensors")
    out = checkpoint.convert(folder, tmp_path / target)
    tokens = torch.tensor([TOKENS])
    before, after = (checkpoint.load(path)[0](tokens)[0] for path in (folder, out))
    assert torch.equal(before, after)
    agrees(out, weights)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.attn.surprise", (3,), r"unknown model\.layers\.0\.attn\.surprise"),
        ("surprise", (3,), "unknown surprise"),
        ("model.layers.0.attn.x_bias", (4, 3), r"x_bias has the impossible shape \[4, 3\]"),
        ("model.layers.0.attn.x_proj.0.linear.weight", (7,), "impossible shape"),
    ],
)
def test_fla_refusals(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    weights = to_fla(make_checkpoint("6", n_embd=32, head_size=16, vocab=30))
    save_file({**weights, name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)
