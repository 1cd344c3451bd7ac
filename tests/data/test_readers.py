"""Files to documents: every kind, compressed, cut, damaged."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from roost.data.readers import Bad, check_readable, cuts, kind, pieces

TEXTS = ["one", "deux\n", "três", "", "cinco " * 50]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(path: Path, start: int = 0, end: int = -1) -> list[bytes | Bad]:
    return [piece.document for piece in pieces(path, "text", start, end)]


def test_lines_plain_and_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.ZstdCompressor().compress
    for name, data in (
        ("a.jsonl", LINES),
        ("b.ndjson", LINES[:-1]),  # no newline at the end
        ("c.jsonl.gz", gzip.compress(LINES)),
        ("d.jsonl.zst", frames(LINES[:20]) + frames(LINES[20:])),
    ):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == [text.encode() for text in TEXTS]
        assert [*pieces(tmp_path / name, "text")][-1].position == len(data)


@pytest.mark.parametrize("parser", ["orjson", "json"])
def test_the_same_with_and_without_orjson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parser: str) -> None:
    if parser == "json":
        monkeypatch.setitem(sys.modules, "orjson", None)
    else:
        pytest.importorskip("orjson")
    lines = {
        rb'{"text": "a", "text": "b"}': b"b",
        rb'{"n": NaN, "text": "x\ud83d\ude00y"}': "x\U0001f600y".encode(),
        b'\xef\xbb\xbf{"text": "after a mark"}': b"after a mark",
        b'{"text": "' + b"[" * 5000 + b'"}': b"[" * 5000,
        rb'{"text": "\ud83d"}': None,
        b'{"text": "\xff"}': None,
        b'{"text": 1}': None,
        b'["text"]': None,
        b" ": b"",
    }
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    found = read(tmp_path / "a.jsonl")
    assert [None if isinstance(one, Bad) else one for one in found] == [*lines.values()][:-1]  # a blank line is none
    assert [one.line for one in found if isinstance(one, Bad)] == [5, 6, 7, 8]


@pytest.mark.parametrize("size", [1, 5, 17, 100, 10_000])
def test_the_parts_of_a_file_are_the_file(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{\n")
    parts = cuts(tmp_path / "a.jsonl", size)
    found = [document for start, end in parts for document in read(tmp_path / "a.jsonl", start, end)]
    assert found[:-1] == [text.encode() for text in TEXTS]
    assert isinstance(found[-1], Bad) and found[-1].line == 6
    assert len(parts) == -(-(len(LINES) + 2) // size)


def test_other_files_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n\xff")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text"))
    assert read(tmp_path / "a.py") == [b"x = 1\n\xff"] and read(tmp_path / "b.txt.gz") == [b"text"]
    assert [kind(Path(n)) for n in ("a.jsonl.zst", "a.parquet", "a.json", "a")] == ["jsonl", "parquet", "text", "text"]


def test_rows_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "other": [1] * 6}), path, row_group_size=2)
    found = read(path)
    assert found[:5] == [text.encode() for text in TEXTS]
    assert found[5] == Bad(str(path), 6, "column 'text' holds None, not text")
    parts = cuts(path, 300)
    assert len(parts) == 3 and [one for part in parts for one in read(path, *part)] == found
    with pytest.raises(ValueError, match="has no column 'body'; it has text, other"):
        list(pieces(path, "body"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or no parquet"):
        read(path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_an_archive_that_was_cut_short_is_noticed(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("zstandard")
    import zstandard

    whole = gzip.compress(LINES) if ending == "gz" else zstandard.ZstdCompressor().compress(LINES)
    path = tmp_path / f"a.jsonl.{ending}"
    for data in (whole[:-4], whole[: len(whole) // 2], b"no archive at all"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            read(path)


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_readable(Path(name))


def test_a_missing_file_has_vanished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vanished"):
        read(tmp_path / "none.txt")
