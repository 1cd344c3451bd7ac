"""Packed model files that are cut short, changed, or written to do harm: one clear error, and nothing gets in."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost import native
from roost.config import PRESETS
from roost.formats.packed import Packed, open_packed, pack
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
FIRST = 2 << 20
HEAD = struct.Struct("<8sII8s")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny Finch, not to be changed."""
    path = tmp_path_factory.mktemp("packed") / "sound.roost"
    model = tiny_model()
    pack(model.state_dict(), model.config, path, weights_format="int8")
    return path


def header_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(data[HEAD.size : HEAD.size + HEAD.unpack_from(data)[2]])


def with_header(data: bytes, document: Any) -> bytes:
    """The file with another header, whose length and digest are right."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = HEAD.pack(b"roost\r\n\x1a", 1, len(text), hashlib.sha256(text).digest()[:8])
    return (head + text).ljust(FIRST, b"\0") + data[FIRST:]


def test_other_files(tmp_path: Path) -> None:
    for content in (b"", b"roost", b"PK\x03\x04" * 99, b"roost\r\n\x1b" + bytes(99)):
        (tmp_path / "x.roost").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a packed model; make one with: roost convert"):
            open_packed(tmp_path / "x.roost")


def test_other_version(sound: Path, tmp_path: Path) -> None:
    data = bytearray(sound.read_bytes())
    data[8] = 2
    (tmp_path / "x.roost").write_bytes(data)
    with pytest.raises(ValueError, match="has version 2, this roost reads version 1; make the file again"):
        open_packed(tmp_path / "x.roost")


@settings(max_examples=40)
@given(st.data())
def test_truncated(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = sound.read_bytes()
    size = data.draw(st.one_of(st.integers(0, 8000), st.integers(0, len(whole) - 1), st.just(len(whole) + 1)))
    path = tmp_path_factory.mktemp("cut") / "x.roost"
    path.write_bytes((whole + b"\0")[:size])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        open_packed(path)


@settings(max_examples=40)
@given(st.data())
def test_flipped_bits(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A changed bit is found wherever it means something; in the padding it means nothing."""
    whole, document = bytearray(sound.read_bytes()), header_of(sound)
    used = HEAD.unpack_from(whole)[2] + HEAD.size
    at = data.draw(st.one_of(st.integers(0, used - 1), st.integers(FIRST, len(whole) - 1)))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "x.roost"
    path.write_bytes(whole)
    inside = [one["name"] for one in document["tensors"] if 0 <= at - one["offset"] < one["nbytes"]]
    if at >= FIRST and not inside:
        assert isinstance(open_packed(path), Packed)
        return
    reason = f"{re.escape(inside[0])} does not match its checksum" if inside else ".*"
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + reason):
        open_packed(path)
    if inside:
        assert isinstance(open_packed(path, verify=False), Packed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40)
@given(st.data())
def test_hostile_headers(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any field replaced or removed: refused, or (a source, a fingerprint) only what the header may say."""
    document = header_of(sound)
    places: list[tuple[Any, Any]] = [(document, key) for key in document]
    places += [(document["config"], key) for key in document["config"]]
    entry = data.draw(st.sampled_from(document["tensors"]))
    places += [(entry, key) for key in entry] + [(document["tensors"], data.draw(st.integers(0, 20)))]
    for _ in range(data.draw(st.integers(1, 2))):
        where, key = data.draw(st.sampled_from(places))
        if data.draw(st.booleans()) and not (isinstance(where, dict) and key not in where):
            del where[key]
        else:
            where[key] = data.draw(JSON | st.sampled_from([0, -1, 1, 2**31, 2**63, 4096, 2**40, "i4", "int4", "eagle"]))
    path = tmp_path_factory.mktemp("hostile") / "x.roost"
    path.write_bytes(with_header(sound.read_bytes(), document))
    try:
        found = open_packed(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert found.config == PRESETS["finch-tiny"] and found.weights == "int8"


@pytest.mark.parametrize(
    "text",
    [b"[" * 100000, b"{}", b"[]", b"null", b"", b'{"tensors": 3}', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_headers_that_are_no_header(sound: Path, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.roost").write_bytes(with_header(sound.read_bytes(), text))
    with pytest.raises(ValueError, match=r"x\.roost has an impossible header"):
        open_packed(tmp_path / "x.roost")


@pytest.mark.parametrize(
    "source",
    [{}, [], 0, "m.pth", {"m.pth": 3}, {"m.pth": [3]}, {"m.pth": [3, 4.0]}, {"m.pth": [3, True]}, {"bytes": 3}],
)
def test_sources_that_name_no_files(sound: Path, tmp_path: Path, source: object) -> None:
    document = header_of(sound)
    (tmp_path / "x.roost").write_bytes(with_header(sound.read_bytes(), document | {"source": {"m.pth": [3, 4]}}))
    assert open_packed(tmp_path / "x.roost").source == {"m.pth": [3, 4]}
    (tmp_path / "x.roost").write_bytes(with_header(sound.read_bytes(), document | {"source": source}))
    with pytest.raises(ValueError, match=r"x\.roost has an impossible header \(source is"):
        open_packed(tmp_path / "x.roost")


@pytest.mark.parametrize(("field", "value"), [("dim_ffn", 0), ("dim_att", 0), ("n_layer", 3.0), ("gate", 1)])
def test_a_config_is_written_out(sound: Path, tmp_path: Path, field: str, value: float) -> None:
    """Zeros stand for defaults in Python; in a header they are not what `pack` writes."""
    document = header_of(sound)
    document["config"][field] = value
    (tmp_path / "x.roost").write_bytes(with_header(sound.read_bytes(), document))
    with pytest.raises(ValueError, match=r"x\.roost has an impossible header"):
        open_packed(tmp_path / "x.roost")


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "shift_rank", "head_size"])
@pytest.mark.parametrize("value", [2**20, 2**31, 2**62, 10**30])
def test_absurd_sizes(sound: Path, tmp_path: Path, field: str, value: int) -> None:
    document = header_of(sound)
    document["config"][field] = value
    (tmp_path / "x.roost").write_bytes(with_header(sound.read_bytes(), document))
    with pytest.raises(ValueError, match=r"x\.roost has an impossible header"):
        open_packed(tmp_path / "x.roost")
