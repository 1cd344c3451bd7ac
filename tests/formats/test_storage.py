"""Files and directories: mapping, shards, and everything that can be wrong with bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import make_checkpoint
from roost import checkpoint
from roost.formats import storage

WEIGHTS = make_checkpoint("6", n_embd=32, head_size=16, vocab=64, shift_rank=4, decay_rank=6)


def write(weights: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "no_ending"])
def test_a_file_is_recognised_by_its_bytes(name: str, tmp_path: Path) -> None:
    assert same(storage.read(write(WEIGHTS, tmp_path / name)))


def test_a_legacy_pickle_is_read(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(storage.read(tmp_path / "old.pth"))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_mapped_tensors_can_be_changed_without_changing_the_file(ending: str, tmp_path: Path) -> None:
    path = write(WEIGHTS, tmp_path / f"a{ending}")
    storage.read(path)["emb.weight"].zero_()
    assert same(storage.read(path))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@settings(max_examples=40)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_truncated_file_is_refused(ending: str, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(WEIGHTS, tmp_path_factory.mktemp("cut") / f"a{ending}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a\.(pth|safetensors).* is (empty|truncated|neither)") as refused:
        storage.read(path)
    assert "\n" not in str(refused.value)


@settings(max_examples=60)
@given(data=st.data(), ending=st.sampled_from([".pth", ".safetensors", ".old"]))
def test_a_damaged_beginning_or_end_never_escapes_as_another_error(
    data: st.DataObject, ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bad") / f"a{ending}"
    if ending == ".old":
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    else:
        write(WEIGHTS, path)
    content = bytearray(path.read_bytes())
    places = st.one_of(st.integers(0, 3000), st.integers(len(content) - 3000, len(content) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        storage.read(path)  # bytes of numbers or padding: nothing to notice
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (bytes.fromhex("666d6767650000000001000040000000"), r"rwkv\.cpp"),
        (b"lmgg\x00\x00", "GGML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"just some text, no weights", "neither a .pth nor a .safetensors"),
        (b"PK\x03\x04 not really a zip", "truncated or corrupt"),
        (b"\x80\x02garbage", "truncated or corrupt"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "truncated or corrupt"),
    ],
)
def test_other_formats_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "x.pth")


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_never_runs_code(zipped: bool, tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "x": Payload(tmp_path / "ran")}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="can run code"):
        storage.read(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3, "model": WEIGHTS}, r"'epoch' is a int, not a tensor: this is a trainer's own checkpoint"),
        ({1: torch.zeros(2)}, "1 is a int: names of tensors must be text"),
    ],
)
def test_what_is_no_flat_dict_of_tensors_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        storage.read(tmp_path / "x.pth")


def shard(folder: Path, ending: str, index: bool) -> list[Path]:
    """WEIGHTS in three files of a Hugging Face directory."""
    folder.mkdir(exist_ok=True)
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    names = list(WEIGHTS)
    paths = [folder / f"{stem}-{n + 1:05d}-of-00003{ending}" for n in range(3)]
    for n, path in enumerate(paths):
        write({name: WEIGHTS[name] for name in names[n::3]}, path)
    if index:
        table = {name: paths[n % 3].name for n, name in enumerate(names)}
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return paths


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards(ending: str, index: bool, tmp_path: Path) -> None:
    paths = shard(tmp_path, ending, index)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert same(storage.read(tmp_path)) and storage.files(tmp_path) == paths
    paths[1].unlink()
    with pytest.raises(ValueError, match=rf"incomplete: {paths[1].name} is missing \(1 of 3"):
        storage.read(tmp_path)


def test_shards_that_overlap_are_refused(tmp_path: Path) -> None:
    paths = shard(tmp_path, ".safetensors", index=True)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ValueError, match="again: the shards in"):
        storage.read(tmp_path)


def test_safetensors_come_before_bin_and_bin_before_pth(tmp_path: Path) -> None:
    write(WEIGHTS, tmp_path / "x.pth")
    assert storage.files(tmp_path) == [tmp_path / "x.pth"]
    shard(tmp_path, ".bin", index=False)
    assert storage.files(tmp_path)[0].suffix == ".bin"
    write(WEIGHTS, tmp_path / "model.safetensors")
    assert storage.files(tmp_path) == [tmp_path / "model.safetensors"]


def test_directories_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint.load(tmp_path)
    (tmp_path / "zero_to_fp32.py").touch()
    with pytest.raises(ValueError, match="DeepSpeed"):
        checkpoint.load(tmp_path)
    for n in range(10):
        write(WEIGHTS, tmp_path / f"m{n}.pth")
    with pytest.raises(ValueError, match=r"several models: name one, e\.g\. .*m0\.pth; .* and 2 more"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.bin"}}'])
def test_a_bad_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"not an index of shards|outside its directory"):
        storage.read(tmp_path)
