"""GGUF as a container, against ggml's own Python package; damage of every sort is one ValueError."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from roost.formats.container import Container, Stored, Value, write
from roost.formats.ggml import KINDS

KEYS: dict[str, Value] = {
    "general.architecture": "rwkv6",
    "a.number": 7,
    "a.float": 1e-5,
    "a.truth": True,
    "texts": ["", "x", "\\xe4 é"],
    "numbers": [1, -2, 3],
}


def tensors() -> dict[str, Stored]:
    generator = torch.Generator().manual_seed(0)
    kinds = ("fp32", "fp16", "bf16", "q8_0", "q4_0")
    out = {f"{kind}.weight": Stored(torch.randn(3, 5, 32, generator=generator), kind) for kind in kinds}
    return out | {"vector": Stored(torch.randn(7, generator=generator), "fp32")}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "a.gguf"
    write(path, KEYS, tensors())
    return path


def test_the_gguf_package_reads_what_is_written(good: Path) -> None:
    reader = GGUFReader(good)
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == {**KEYS, "a.float": pytest.approx(1e-5)}
    for tensor in reader.tensors:
        value, kind = tensors()[tensor.name]
        assert tensor.shape.tolist() == list(value.shape)[::-1] and tensor.data_offset % 32 == 0
        assert KINDS[kind].code == tensor.tensor_type
    vector = next(tensor for tensor in reader.tensors if tensor.name == "vector")
    assert torch.equal(torch.from_numpy(vector.data.copy()), tensors()["vector"].value)


def test_what_is_written_is_read(good: Path) -> None:
    file = Container(good)
    assert file.keys == {**KEYS, "a.float": pytest.approx(1e-5)}
    for name, (value, kind) in tensors().items():
        found = file.tensor(name)
        assert file.entries[name].kind == kind and found.shape == value.shape
        if kind in ("fp32", "fp16", "bf16"):
            assert torch.equal(found, value.to(found.dtype))


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "rwkv6")
    writer.add_custom_alignment(64)
    for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -30000), ("int32", -9)):
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_uint64("uint64", 1 << 60)
    writer.add_float64("float64", 0.1)
    writer.add_array("floats", [0.5, 1.5])
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("first", np.arange(3, dtype=np.float32))
    writer.add_tensor("rows", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Container(tmp_path / "a.gguf")
    assert file.keys["general.alignment"] == 64 and file.entries["rows"].start % 64 == 0
    assert (file.keys["uint8"], file.keys["int8"], file.keys["uint16"], file.keys["int16"]) == (200, -3, 60000, -30000)
    assert (file.keys["int32"], file.keys["uint64"], file.keys["float64"]) == (-9, 1 << 60, 0.1)
    assert file.keys["floats"] == [0.5, 1.5] and np.array_equal(file.tensor("rows").numpy(), rows)


def test_reading_maps_and_never_writes(good: Path) -> None:
    before = good.read_bytes()
    Container(good).tensor("vector").zero_()
    assert good.read_bytes() == before


def opened(content: bytes, folder: Path) -> Container:
    (folder / "bad.gguf").write_bytes(content)
    return Container(folder / "bad.gguf")


@settings(max_examples=300)
@given(data=st.data())
def test_cut_anywhere_is_refused(data: st.DataObject, good: Path) -> None:
    content = good.read_bytes()
    with pytest.raises(ValueError, match=r"bad\.gguf is a truncated") as refused:
        opened(content[: data.draw(st.integers(0, len(content) - 5))], good.parent)  # the last 4 bytes are padding
    assert "\n" not in str(refused.value)


@settings(max_examples=500)
@given(data=st.data())
def test_flipped_bytes_give_one_clear_error_or_another_file(data: st.DataObject, good: Path) -> None:
    """Whatever is accepted stays within the file, so reading all of it is safe."""
    content = bytearray(good.read_bytes())
    header = len(content) - sum(entry.size for entry in Container(good).entries.values())
    for place in data.draw(st.lists(st.integers(0, header), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        file = opened(bytes(content), good.parent)
    except ValueError as error:
        assert "bad.gguf" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return
    for name, entry in file.entries.items():
        assert entry.start + entry.size <= len(content) and file.tensor(name).shape == entry.shape


HUGE = (1 << 63) + 5


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(*dims: int, kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "ends in its header"),
        (b"LLMA" + bytes(40), "does not begin with GGUF"),
        (header(version=1), "version 1 is not read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=HUGE), "claims"),
        (header(keys=HUGE), "claims"),
        (header(keys=1) + struct.pack("<Q", HUGE), "a key at byte 32 needs"),
        (header(keys=1) + text(b"k" * 300) + bytes(12), "a key has 300 letters"),
        (header(keys=1) + text(b"k") + struct.pack("<I", 99), "unknown type 99"),
        (header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 8, HUGE), "claims to hold"),
        (header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 23), "needs 33554432 bytes"),
        (header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (header(keys=1) + text(b"k") + struct.pack("<IQ", 8, HUGE), "needs"),
        (header(keys=2) + (text(b"k") + struct.pack("<II", 4, 1)) * 2, "there twice"),
        (header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "alignment is 0"),
        (header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 1 << 30), "alignment is"),
        (header(tensors=1) + text(b"t") + struct.pack("<I", 9), "9 dimensions"),
        (header(tensors=1) + tensor(1 << 62, 1 << 62), "impossible shape"),
        (header(tensors=1) + tensor(1 << 39, 1 << 39, 1 << 39), "ends at byte"),
        (header(tensors=1) + tensor(0), "impossible shape"),
        (header(tensors=1) + tensor(33, kind=8), "impossible shape"),
        (header(tensors=1) + tensor(4, offset=HUGE - 5), "ends at byte"),
        (header(tensors=1) + tensor(4, offset=4) + bytes(99), "no multiple of 32"),
        (header(tensors=1) + tensor(32, kind=6), "q5_0, which is not read"),
        (header(tensors=1) + tensor(32, kind=77), "of ggml's kind 77"),
        (header(tensors=2) + tensor(4) * 2 + bytes(99), "there twice"),
        (header(tensors=2) + tensor(9) + tensor(9, offset=32, name=b"u") + bytes(99), "overlap"),
    ],
)
def test_hostile_sizes(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        opened(content, tmp_path)
    assert "bad.gguf" in str(refused.value) and "\n" not in str(refused.value)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write(path, KEYS, tensors())
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"cannot write .*a\.gguf: bad\.weight is not finite"):
        write(path, KEYS, {**tensors(), "bad.weight": Stored(torch.full((1, 32), torch.inf), "q4_0")})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
