"""Small corpora of bytes for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from roost import WorldTokenizer
from roost.data.binidx import TokenFile
from roost.data.sources import Manifest, Source

BYTES = WorldTokenizer.byte_level()


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts(prefix: Path) -> list[bytes]:
    """The documents of a token file of bytes."""
    file = TokenFile(prefix)
    assert all(file.documents(i)[-1] == 0 for i in range(file.count))
    return [BYTES.decode_bytes(file.documents(i)) for i in range(file.count)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def made(tmp_path: Path, *sources: dict[str, Any], **options: Any) -> Manifest:
    """Sources s0, s1, ... of ten documents each: "0a", "0b", ... in the first."""
    for i in range(len(sources)):
        path, text = tmp_path / f"s{i}.jsonl", jsonl(*(f"{i}{letter}" for letter in "abcdefghij"))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return Manifest(
        tuple(Source(f"s{i}", (str(tmp_path / f"s{i}.jsonl"),), **more) for i, more in enumerate(sources)), **options
    )
