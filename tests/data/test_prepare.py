"""One's own text to a token file: what is read, what is chosen, what survives a kill, what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import BYTES, jsonl, made, names, texts
from roost import WorldTokenizer
from roost.cli import main
from roost.data import shards
from roost.data.binidx import TokenFile
from roost.data.prepare import Progress, prepare
from roost.data.sources import Manifest, Source


def test_files_and_lines_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain \xff bytes")
    (tmp_path / "b.jsonl").write_text(jsonl("один", "", "two"))
    for tokenizer in (WorldTokenizer(), BYTES):
        total = prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", tokenizer).total
        file = TokenFile(tmp_path / "out")
        assert (total.documents, total.tokens, total.bytes) == (3, len(file), 13 + 8 + 3)
        assert total.dropped == {"empty": 1}
        read = [tokenizer.decode_bytes(file.documents(i)) for i in range(file.count)]
        assert read == [b"plain \xff bytes", "один".encode(), b"two"]
        assert all(file.documents(i)[-1] == 0 for i in range(3))
    assert names(tmp_path) == ["a.txt", "b.jsonl", "out.bin", "out.idx", "out.report.json"]


def test_the_bytes_of_make_data(tmp_path: Path) -> None:
    """RWKV-LM's make_data.py: every line's ids and a 0 as uint16; sizes, byte pointers and doc_idx, one item each."""
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n{"text": "\\u00e9", "other": 1}\n')
    source = Source("x", (str(tmp_path / "x.jsonl"),), min_bytes=0)
    prepare(Manifest((source,)), tmp_path / "x", BYTES)
    assert (tmp_path / "x.bin").read_bytes() == bytes.fromhex("6200 6300 0000 0000 c400 aa00 0000")
    assert (tmp_path / "x.idx").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00 0100000000000000 08 0300000000000000 0400000000000000"
        "03000000 01000000 03000000"
        "0000000000000000 0600000000000000 0800000000000000"
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
    )


def test_a_large_vocabulary_is_written_as_int32(tmp_path: Path) -> None:
    large = WorldTokenizer({**{b + 1: bytes([b]) for b in range(256)}, 70000: b"abc"})
    (tmp_path / "x.txt").write_text("abcd")
    prepare([tmp_path / "x.txt"], tmp_path / "x", large)
    assert TokenFile(tmp_path / "x").tokens.dtype == np.int32
    assert TokenFile(tmp_path / "x").tokens.tolist() == [70000, 101, 0]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Manifest, list[bytes]]:
    """A manifest of five kinds of files, and the documents in it."""
    (tmp_path / "code" / "sub").mkdir(parents=True)
    (tmp_path / "code" / ".git").mkdir()
    for name in ("a.py", "b.md", "sub/c.py", ".git/d.py"):
        (tmp_path / "code" / name).write_text(name)
    (tmp_path / "code" / "e.py").write_bytes(b"\x00binary")
    (tmp_path / "l.jsonl").write_text(jsonl(*(f"line {i} " * (i % 7) for i in range(60))))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(jsonl("zipped", "zipped again").encode()))
    (tmp_path / "m.toml").write_text(
        'bad_lines = "skip"\n'
        '[[source]]\nname = "code"\npath = "code"\ninclude = ["*.py"]\nlicence = "MIT"\ndomain = "code"\n'
        '[[source]]\nname = "lines"\npath = ["l*.jsonl"]\nlanguage = "en"\nmin_bytes = 8\nmax_bytes = 40\n'
        '[[source]]\nname = "zip"\npath = "z.jsonl.gz"\nlanguage = "en"\n'
    )
    lines = [f"line {i} " * (i % 7) for i in range(60)]
    kept = [line for line in lines if 8 <= len(line) <= 40]
    wanted = ["a.py", "sub/c.py", *kept, "zipped", "zipped again"]
    from roost.data.sources import read_manifest

    return read_manifest(tmp_path / "m.toml"), [text.encode() for text in wanted]


def test_a_manifest(tmp_path: Path, mixed: tuple[Manifest, list[bytes]]) -> None:
    manifest, wanted = mixed
    report = prepare(manifest, tmp_path / "out", BYTES)
    assert texts(tmp_path / "out") == wanted
    written = json.loads((tmp_path / "out.report.json").read_text())
    assert written["documents"] == len(wanted) and written["tokens"] == sum(map(len, wanted)) + len(wanted)
    assert written["bytes_per_token"] == 1.0 and written["seconds"] > 0
    code, lines, _ = written["sources"]
    assert code["licence"] == "MIT" and code["dropped"] == {"binary": 1} and code["documents"] == 2
    assert lines["dropped"]["empty"] == 9 and lines["dropped"]["short"] > 0 and lines["dropped"]["long"] > 0
    assert lines["documents"] + sum(lines["dropped"].values()) == 60
    assert written["languages"]["en"]["documents"] == len(wanted) - 2
    assert written["domains"]["unknown"]["documents"] == len(wanted) - 2 and "code" in written["domains"]
    assert report.total.dropped == written["dropped"]


def test_any_cut_writes_the_same(tmp_path: Path, mixed: tuple[Manifest, list[bytes]]) -> None:
    manifest, wanted = mixed
    for name, size in (("a", 61), ("b", 300), ("c", 1 << 25)):
        prepare(manifest, tmp_path / name, BYTES, shard_bytes=size)
        assert texts(tmp_path / name) == wanted
        assert not (tmp_path / f"{name}.parts").exists()
        assert (tmp_path / f"{name}.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


@pytest.mark.parametrize("shard_bytes", [20, 1 << 25])
def test_weights_and_budgets(tmp_path: Path, shard_bytes: int) -> None:
    manifest = made(tmp_path, {"weight": 2.5}, {"weight": 0.3}, {"budget": 10}, {"weight": 2, "budget": 33})
    report = prepare(manifest, tmp_path / "out", BYTES, shard_bytes=shard_bytes)
    read = texts(tmp_path / "out")
    of = [[text.decode()[1] for text in read if text[:1] == b"%d" % i] for i in range(4)]
    assert of[0][:20] == list("abcdefghij" * 2) and len(of[0]) == 25 and sorted(set(of[0][20:])) == of[0][20:]
    assert len(of[1]) == 3 and sorted(of[1]) == of[1]
    assert of[2] == list("abc")  # 3 tokens each
    assert of[3] == list("abcdefghija")
    assert [counts.documents for _, counts in report.sources] == [25, 3, 3, 11]
    assert report.sources[1][1].dropped == {"weight below 1": 7}
    assert report.sources[2][1].tokens == 9


def test_a_budget_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = shards.pieces
    monkeypatch.setattr(shards, "pieces", lambda *a: (read.append(str(a[2])), whole(*a))[1])
    manifest = made(tmp_path, {"budget": 3}, {})
    report = prepare(manifest, tmp_path / "out", BYTES, workers=1, shard_bytes=30)
    assert 1 + 5 <= len(read) <= 3 + 5  # of five, and all of the other source
    size = (tmp_path / "s0.jsonl").stat().st_size
    (_, some), (_, full) = report.sources
    assert size / 2 <= some.unread == report.total.unread < size and full.unread == 0
    written = json.loads((tmp_path / "out.report.json").read_text())
    assert [source["unread"] for source in written["sources"]] == [some.unread, 0]
    counted = some.documents + sum(some.dropped.values())
    assert counted < 10  # the others lie in what was not read
    again = prepare(manifest, tmp_path / "out", BYTES, workers=3, shard_bytes=30)
    assert again.sources == report.sources


def test_a_budget_counts_every_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many units there are: the finished ones are not counted anew for each."""
    counted: list[str] = []

    class Sizes(np.ndarray[Any, np.dtype[np.int64]]):
        def sum(self, *args: Any, **options: Any) -> Any:
            counted.append("")
            return super().sum(*args, **options)

    def find(*args: Any) -> shards.Shard | None:
        found = shards.find(*args)
        return found and found._replace(sizes=found.sizes.view(Sizes))

    monkeypatch.setattr("roost.data.prepare.find", find)
    manifest = made(tmp_path, {"budget": 29})
    prepare(manifest, tmp_path / "out", BYTES, workers=1, shard_bytes=16)
    assert len(texts(tmp_path / "out")) == 9 and 5 <= len(counted) <= 12


@pytest.mark.parametrize("first", ["folder", "file"])
def test_a_named_file_is_kept_whatever_another_source_found(tmp_path: Path, first: str) -> None:
    """A zero byte drops a file found in a directory, and not the same file where it is named, however it is written."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"\x00a")
    folder, file = Source("folder", (f"{tmp_path}/d",)), Source("file", (f"{tmp_path}/./d//x",))
    report = prepare(Manifest((folder, file) if first == "folder" else (file, folder)), tmp_path / "out", BYTES)
    assert texts(tmp_path / "out") == [b"\x00a"]
    assert {source.name: counts.dropped for source, counts in report.sources} == {"folder": {"binary": 1}, "file": {}}


def test_shuffle_mixes_the_documents(tmp_path: Path) -> None:
    prepare(made(tmp_path, {}, {"weight": 2}), tmp_path / "plain", BYTES)
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        prepare(made(tmp_path, {}, {"weight": 2}, shuffle=seed), tmp_path / name, BYTES, shard_bytes=40)
        assert sorted(texts(tmp_path / name)) == sorted(texts(tmp_path / "plain"))
    assert texts(tmp_path / "one") == texts(tmp_path / "same") != texts(tmp_path / "two")
    assert len({text[:1] for text in texts(tmp_path / "one")[:10]}) == 2


@pytest.mark.parametrize("shard_bytes", [20, 1 << 25])
def test_duplicates_are_dropped_after_the_first(tmp_path: Path, shard_bytes: int) -> None:
    (tmp_path / "x.jsonl").write_text(jsonl("a", "b", "a", "c"))
    (tmp_path / "y.jsonl").write_text(jsonl("d", "b", "e", "d"))
    sources = tuple(Source(name, (str(tmp_path / f"{name}.jsonl"),)) for name in "xy")
    report = prepare(Manifest(sources, dedup=True), tmp_path / "out", BYTES, shard_bytes=shard_bytes)
    assert texts(tmp_path / "out") == [b"a", b"b", b"c", b"d", b"e"]
    assert [counts.dropped for _, counts in report.sources] == [{"duplicate": 1}, {"duplicate": 2}]


def test_normal_form_on_request(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"e\xcc\x81\r\n\r\n\r\n\r\nx  ")
    prepare(Manifest((Source("x", (str(tmp_path / "x.txt"),), normalise=True),)), tmp_path / "out", BYTES)
    assert texts(tmp_path / "out") == ["é\n\nx\n".encode()]


def test_progress_has_speed_and_time_left(tmp_path: Path) -> None:
    told: list[Progress] = []
    prepare(made(tmp_path, {}, {}), tmp_path / "out", BYTES, shard_bytes=50, progress=told.append)
    total = sum((tmp_path / f"s{i}.jsonl").stat().st_size for i in range(2))
    assert told[0] == (0, total, 0.0, 0.0)
    assert [now.done for now in told] == sorted(now.done for now in told)
    assert any(now.speed > 0 and now.left > 0 for now in told) and told[-1].done == total == told[-1].total


def test_a_file_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed run: the finished shards of other files are kept, those of the changed file are not."""
    manifest = made(tmp_path, {}, {})
    (tmp_path / "s1.jsonl").write_text(jsonl("good") + "{\n")
    with pytest.raises(ValueError, match=r"s1.jsonl, line 2: expected an object"):
        prepare(manifest, tmp_path / "out", BYTES)
    assert len(list((tmp_path / "out.parts").glob("*.npz"))) == 1
    (tmp_path / "s1.jsonl").write_text(jsonl("good", "again"))
    units: list[str] = []
    make = shards.make
    monkeypatch.setattr("roost.data.workers.make", lambda unit, *a: (units.append(unit.source.name), make(unit, *a)))
    prepare(manifest, tmp_path / "out", BYTES)
    assert units == ["s1"] and texts(tmp_path / "out")[10:] == [b"good", b"again"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text(jsonl("more", "than", "before")), "changed during the run"),
        (lambda path: path.unlink(), "vanished during the run"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_files_that_change_during_a_run(
    tmp_path: Path, change: Callable[[Path], Any], message: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a shard reads the file, or when the shard is finished and the run is not."""
    manifest = made(tmp_path, {}, {})
    make = shards.make

    def strike(unit: shards.Unit, *rest: Any) -> None:
        if unit.source.name == "s1":
            change(tmp_path / ("s1.jsonl" if when == "before" else "s0.jsonl"))
        make(unit, *rest)

    monkeypatch.setattr("roost.data.workers.make", strike)
    with pytest.raises(ValueError, match=message):
        prepare(manifest, tmp_path / "out", BYTES)
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()


@pytest.mark.parametrize(
    "line", [b'{"text": "\\ud800"}', b"{", b"[]", b'{"txt": "a"}', b'{"text": 3}', b'{"text": "\xff"}']
)
def test_bad_lines_are_named_or_skipped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl("good").encode() + line + b"\n" + jsonl("too").encode())
    with pytest.raises(ValueError, match="line 2: expected an object"):
        prepare([tmp_path / "b.jsonl"], tmp_path / "out", BYTES)
    assert names(tmp_path) == ["b.jsonl"]
    manifest = Manifest((Source("b", (str(tmp_path / "b.jsonl"),)),), bad_lines="skip")
    for size in (4, 20, 1 << 25):  # the number of a line counts from the file's beginning, not the shard's
        report = prepare(manifest, tmp_path / "out", BYTES, shard_bytes=size)
        assert texts(tmp_path / "out") == [b"good", b"too"]
        assert report.total.dropped == {"bad line": 1}
        assert report.bad_lines == [f'{tmp_path}/b.jsonl, line 2: expected an object with a string "text" in UTF-8']


def test_nothing_to_write(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "short.txt").write_text("a")
    for name, message in (("none", "no such file"), ("empty.txt", "is empty"), ("empty.jsonl", "is empty")):
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / name], tmp_path / "out", BYTES)
    source = Source("short", (str(tmp_path / "short.txt"),), min_bytes=2)
    with pytest.raises(ValueError, match=r"no documents to write \(dropped: 1 short\)"):
        prepare(Manifest((source,)), tmp_path / "out", BYTES)


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("text in a file of that name")
    (tmp_path / "y.txt").write_text("text")
    (tmp_path / "y.idx").mkdir()
    with pytest.raises(ValueError, match="it is what is being read"):
        prepare([tmp_path / "x.bin"], tmp_path / "x", BYTES)
    with pytest.raises(ValueError, match="does not exist"):
        prepare([tmp_path / "y.txt"], tmp_path / "none" / "y", BYTES)
    with pytest.raises(ValueError, match="not a regular file"):
        prepare([tmp_path / "y.txt"], tmp_path / "y", BYTES)
    with pytest.raises(ValueError, match="workers is 0"):
        prepare([tmp_path / "y.txt"], tmp_path / "z", BYTES, workers=0)
    assert names(tmp_path) == ["x.bin", "y.idx", "y.txt"]


def test_from_own_text_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands of the README."""
    (tmp_path / "book.txt").write_text("A short book, read again and again. " * 60)
    book = str(tmp_path / "book")
    assert main(["prepare", f"{book}.txt", "-o", book, "--bytes"]) == 0
    assert "1 document, 2,161 tokens" in capsys.readouterr().out
    recipe = tmp_path / "book.toml"
    recipe.write_text(f'model = "finch-tiny"\ndata = "{book}"\nctx = 32\nbatch = 2\nsteps = 3\nout = "{book}-run"\n')
    assert main(["train", str(recipe)]) == 0
    assert "loss" in capsys.readouterr().out and (tmp_path / "book-run" / "final.safetensors").is_file()
