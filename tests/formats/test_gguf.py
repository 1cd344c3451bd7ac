"""rwkv6 GGUF files: as llama.cpp's converter lays them out, as roost writes them, there and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import make_checkpoint
from roost import checkpoint
from roost.formats import gguf
from roost.tokenizer import WorldTokenizer

TYPES = {"fp16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
SIZES: dict[str, Any] = {"n_embd": 64, "head_size": 16, "dim_ffn": 96, "shift_rank": 6, "decay_rank": 11}
MATRIX = r"(emb|head|.*\.(receptance|key|value|gate|output))\.weight"
TOKENS = torch.randint(0, 257, (1, 60), generator=torch.Generator().manual_seed(0))


def finch(**options: Any) -> dict[str, Tensor]:
    """Every size another number, where GGUF can express it."""
    return make_checkpoint("6", **{**SIZES, "n_layer": 3, "vocab": 257, **options})


def save(weights: object, folder: Path, name: str = "model.pth") -> Path:
    torch.save(weights, folder / name)
    return folder / name


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file under official names, as they are loaded."""
    return checkpoint.stored_weights(path)


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return checkpoint.load(path, dtype=torch.float64)[0](TOKENS)[0]


NAMES = {
    "ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1", "att.time_maa_w2": "time_mix_w2", "att.time_faaaa": "time_mix_first",
    "att.time_decay": "time_mix_decay", "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2", "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r", "att.receptance": "time_mix_receptance", "att.key": "time_mix_key",
    "att.value": "time_mix_value", "att.gate": "time_mix_gate", "att.output": "time_mix_output",
    "ffn.receptance": "channel_mix_receptance", "ffn.key": "channel_mix_key", "ffn.value": "channel_mix_value",
}  # fmt: skip


def as_the_converter_writes(weights: dict[str, Tensor], path: Path, *, rescale: int, fused: bool, **keys: Any) -> None:
    """A file as llama.cpp's converter lays it out, by ggml's own writer."""
    writer = GGUFWriter(path, keys.pop("arch", "rwkv6"))
    for name, value in keys.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_float32(name, value)
    if rescale:
        writer.add_rescale_every_n_layers(rescale)
    lerps: dict[str, list[np.ndarray]] = {}
    for name, value in weights.items():
        stem, ending = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        array = value.numpy()
        if not stem.startswith("blocks.") or ".ln0" in stem:
            whole = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}
            writer.add_tensor(f"{whole[stem]}.{ending}", array)
            continue
        _, layer, part = stem.split(".", 2)
        if part in ("att.output", "ffn.value") and rescale:
            array = array / 2 ** (int(layer) // rescale)
        if part.endswith(("time_maa_w1", "decay_w1", "decay_w2")):
            array = array.T
        if part.endswith("time_maa_w2"):
            array = array.transpose(0, 2, 1)
        if part.endswith("time_decay") or "time_maa" in part:
            array = array.squeeze()
        if part in [f"att.time_maa_{x}" for x in "wkvrg"]:
            if not fused:
                writer.add_tensor(f"blk.{layer}.time_mix_lerp_{part[-1]}.weight", np.ascontiguousarray(array))
            lerps.setdefault(layer, []).append(array)
            continue
        writer.add_tensor(f"blk.{layer}.{NAMES[part]}.{ending}", np.ascontiguousarray(array))
    for layer, parts in lerps.items() if fused else ():  # in the order of the checkpoint: w, k, v, r, g
        writer.add_tensor(f"blk.{layer}.time_mix_lerp_fused.weight", np.stack(parts)[:, None, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("rescale", "fused"), [(0, True), (1, True), (2, False), (6, True)])
def test_a_file_of_the_converter(rescale: int, fused: bool, tmp_path: Path) -> None:
    weights = finch()
    as_the_converter_writes(weights, tmp_path / "a.gguf", rescale=rescale, fused=fused)
    found = tensors(tmp_path / "a.gguf")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(logits(tmp_path / "a.gguf"), logits(save(weights, tmp_path)))


def test_what_is_written_is_laid_out_as_the_converter_does(tmp_path: Path) -> None:
    as_the_converter_writes(finch(), tmp_path / "theirs.gguf", rescale=0, fused=True)
    checkpoint.convert(save(finch(), tmp_path), tmp_path / "ours.gguf")
    ours, theirs = ({t.name: t for t in GGUFReader(tmp_path / f"{x}.gguf").tensors} for x in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape.tolist() == tensor.shape.tolist() and np.array_equal(ours[name].data, tensor.data), name


def test_keys(tmp_path: Path) -> None:
    checkpoint.convert(save(finch(), tmp_path), tmp_path / "a.gguf", dtype="q4_0")
    keys = {name: field.contents() for name, field in GGUFReader(tmp_path / "a.gguf").fields.items()}
    wanted = {
        "context_length": 1 << 20, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96,
        "attention.layer_norm_epsilon": pytest.approx(1e-5), "attention.head_count": 0, "rescale_every_n_layers": 0,
        "wkv.head_size": 16, "time_mix_extra_dim": 6, "time_decay_extra_dim": 11,
    }  # fmt: skip
    assert {name.removeprefix("rwkv6."): keys[name] for name in keys if name.startswith("rwkv6.")} == wanted
    assert keys["general.architecture"] == "rwkv6" and keys["general.file_type"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp32 through F32, bf16 through BF16, where what the format has to store in fp32 comes back as bf16."""
    weights = {name: value.to(dtype) for name, value in finch().items()}
    path = save(weights, tmp_path)
    mark = checkpoint.load(path)[0].fingerprint
    checkpoint.convert(path, tmp_path / "a.gguf")
    checkpoint.convert(tmp_path / "a.gguf", tmp_path / "b.pth")
    found: dict[str, Tensor] = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(found) == list(weights)
    for name, value in weights.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name
        assert found[name].untyped_storage().nbytes() == value.untyped_storage().nbytes(), "a file must not grow"
    model, _ = checkpoint.load(tmp_path / "a.gguf")
    assert model.fingerprint == mark and model.dtype == dtype


@pytest.mark.parametrize("kind", TYPES)
def test_kinds(kind: str, tmp_path: Path) -> None:
    """Matrices as the gguf package stores them; the rest as it is; embedding and head of q4_0 in q8_0."""
    import re

    weights = finch()
    dtype: Any = kind if kind in gguf.QUANTISED else checkpoint.DTYPES[kind]
    checkpoint.convert(save(weights, tmp_path), tmp_path / "a.gguf", dtype=dtype)
    found = tensors(tmp_path / "a.gguf")
    for name, value in weights.items():
        wanted = value
        if re.fullmatch(MATRIX, name):
            used = Type.Q8_0 if kind == "q4_0" and name in ("emb.weight", "head.weight") else TYPES[kind]
            wanted = torch.from_numpy(quants.dequantize(quants.quantize(value.numpy(), used), used))
            assert not torch.equal(wanted, value)
        assert torch.equal(found[name].float(), wanted), name
    info = checkpoint.info(tmp_path / "a.gguf")
    matrices = sum(value.numel() for name, value in weights.items() if re.fullmatch(MATRIX, name))
    assert info.parameters == sum(value.numel() for value in weights.values()) and info.dialect == "gguf"
    assert sum(count for name, count in info.dtypes.items() if name != "fp32") == matrices
    assert kind in dict(info.lines())["dtype"] and info.version == "6"


def test_dtype_of_a_load(tmp_path: Path) -> None:
    checkpoint.convert(save(finch(), tmp_path), tmp_path / "a.gguf", dtype="q8_0")
    wide, _ = checkpoint.load(tmp_path / "a.gguf")
    narrow, _ = checkpoint.load(tmp_path / "a.gguf", dtype=torch.bfloat16)
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    for name, value in wide.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], value.bfloat16())


def test_rows_that_are_no_blocks_are_fp16(tmp_path: Path) -> None:
    checkpoint.convert(save(finch(n_embd=48, dim_ffn=80), tmp_path), tmp_path / "a.gguf", dtype="q4_0")
    assert set(checkpoint.info(tmp_path / "a.gguf").dtypes) == {"fp16", "fp32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logits(tmp_path / "a.gguf").isfinite().all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_eagle_is_written_as_the_finch_that_it_equals(stored: torch.dtype, tmp_path: Path) -> None:
    weights = make_checkpoint("5.2", n_layer=3, n_embd=64, head_size=16, vocab=257)
    path = save({name: value.to(stored) for name, value in weights.items()}, tmp_path)
    checkpoint.convert(path, tmp_path / "a.gguf")
    before, after = logits(path), logits(tmp_path / "a.gguf")
    exact = 1e-12 if stored == torch.bfloat16 else 1e-6  # 1 - mix is exact in fp32 for a bf16 mix only
    assert (before - after).abs().max() <= exact * before.abs().max()
    found = tensors(tmp_path / "a.gguf")
    assert not found["blocks.1.att.time_maa_w1"].any() and not found["blocks.1.att.time_decay_w1"].any()


@pytest.mark.parametrize(("vocab", "tokenizer"), [(257, WorldTokenizer.byte_level()), (65540, WorldTokenizer())])
def test_vocabulary(vocab: int, tokenizer: WorldTokenizer, tmp_path: Path) -> None:
    """Tokens as Python writes bytes, id 0 a control token, what has no bytes unused; they come back the same."""
    checkpoint.convert(save(finch(vocab=vocab, n_layer=2), tmp_path), tmp_path / "a.gguf")
    keys = {name: field.contents() for name, field in GGUFReader(tmp_path / "a.gguf").fields.items()}
    texts, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.model"] == "rwkv" and (texts[0], kinds[0]) == ("<s>", 3)
    assert len(texts) == len(kinds) == vocab
    for id in (1, 10, 11, 35, 40, 93, 128, 256):
        assert texts[id] == repr(tokenizer.token_bytes(id))[2:-1] and kinds[id] == 1
    loaded = checkpoint.load(tmp_path / "a.gguf")[1]
    assert loaded is not None and loaded.vocab_size == vocab
    assert all(loaded.token_bytes(id) == tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))
    if vocab > 257:
        assert (texts[65530], kinds[65530]) == ("[PAD65530]", 5) and keys["tokenizer.ggml.eot_token_id"] == 261
        assert keys["tokenizer.chat_template"] == "rwkv-world"


def test_a_vocabulary_of_its_own_comes_from_the_file(tmp_path: Path) -> None:
    """And it is what an export of that file holds; a model without one gets a file of ids."""
    tokens = {id: bytes([id - 1]) for id in range(1, 257)} | {258: b"\n\n", 259: b"\\x'\"\xff"}
    path = save(finch(vocab=300), tmp_path)
    opened = checkpoint.info(path).config
    gguf.save(tmp_path / "a.gguf", opened, torch.load(path, weights_only=True), WorldTokenizer(tokens, 260))
    checkpoint.convert(tmp_path / "a.gguf", tmp_path / "b.gguf", dtype=torch.float16)
    found = checkpoint.load(tmp_path / "b.gguf")[1]
    assert found == WorldTokenizer(tokens, 300)
    checkpoint.convert(path, tmp_path / "c.gguf")
    keys = {name: field.contents() for name, field in GGUFReader(tmp_path / "c.gguf").fields.items()}
    assert keys["tokenizer.ggml.model"] == "no_vocab" and keys["rwkv6.vocab_size"] == 300
    assert checkpoint.load(tmp_path / "c.gguf")[1] is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (make_checkpoint("4"), "it is dove"),
        (make_checkpoint("5.0"), r"RWKV-5\.0 \(it has no gate\)"),
        (finch(dim_att=48), "time mixing has width 48, the residual 64"),
        (finch(time_state=True), r"tuned initial state \(time_state\)"),
        ({**finch(), "head.weight": torch.full((257, 64), 1e6)}, r"output\.weight is a number .* not fit fp16"),
    ],
)
def test_what_cannot_be_expressed(weights: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = save(weights, tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(path, tmp_path / "a.gguf", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    ("target", "dtype", "message"),
    [
        ("a.pth", "q8_0", r"cannot write q8_0 to .*: only \.gguf files hold it"),
        ("a.gguf", "q5_0", "dtype is q5_0; it must be one of q8_0, q4_0"),
        ("a.gguf", torch.float64, "fp64 is no kind of GGUF file"),
    ],
)
def test_kinds_that_are_not_written(target: str, dtype: Any, message: str, tmp_path: Path) -> None:
    path = save(finch(), tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(path, tmp_path / target, dtype=dtype)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arch": "llama"}, "'llama', and only rwkv6 is read; run it with llama"),
        ({"arch": "rwkv7"}, "roost does not run RWKV-7"),
        ({"rwkv6.attention.layer_norm_epsilon": 1e-6}, "wants a layer norm eps"),
        ({"rwkv6.rescale_every_n_layers": "six"}, "rescale_every_n_layers is 'six'"),
        ({"tokenizer.ggml.model": "rwkv"}, "the vocabulary has not 257 tokens"),
    ],
)
def test_other_files_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    as_the_converter_writes(finch(), tmp_path / "a.gguf", rescale=0, fused=True, **keys)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "a.gguf")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = finch()
    weights["blocks.1.att.key.weight"] = torch.zeros(64, 32)
    del weights["blocks.2.ffn.value.weight"]
    as_the_converter_writes(weights, tmp_path / "a.gguf", rescale=0, fused=True)
    with pytest.raises(ValueError, match=r"missing blocks\.2\.ffn\.value\.weight; wrong shape: blocks\.1\.att\.key"):
        checkpoint.load(tmp_path / "a.gguf")


def test_info_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.convert(save(finch(), tmp_path), tmp_path / "a.gguf", dtype="q8_0")
    monkeypatch.setattr(gguf.GGUF, "weights", None)
    assert checkpoint.info(tmp_path / "a.gguf").config.n_layer == 3


def test_a_file_can_be_converted_into_itself(tmp_path: Path) -> None:
    checkpoint.convert(save(finch(), tmp_path), tmp_path / "a.gguf", dtype="q8_0")
    before = tensors(tmp_path / "a.gguf")
    checkpoint.convert(tmp_path / "a.gguf", tmp_path / "a.gguf", dtype=torch.float32)
    after = tensors(tmp_path / "a.gguf")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    sizes: dict[str, Any] = {"n_embd": 32, "dim_ffn": 32, "head_size": 8, "n_layer": 2}
    checkpoint.convert(save(finch(**sizes), folder), folder / "a.gguf", dtype="q8_0")
    return folder / "a.gguf"


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_one_clear_error_or_another_model(data: st.DataObject, good: Path) -> None:
    """Cut anywhere, and bytes changed in header, keys, vocabulary and tensor list."""
    content = bytearray(good.read_bytes())
    for place in data.draw(st.lists(st.integers(0, 9000), min_size=1, max_size=5)):
        content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = good.parent / "bad.gguf"
    path.write_bytes(content[:cut])
    try:
        model, _ = checkpoint.load(path)
    except ValueError as error:
        assert "bad.gguf" in str(error) and "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert model.config.n_layer == 2
