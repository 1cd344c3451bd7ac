"""Text files to a token file: the smallest way from one's own text to `roost train`.

Owns: what a document is: every line of a .jsonl file ({"text": ...}), every other file whole.
Refuses to know: filters, mixtures, shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from roost.data.binidx import write_tokens
from roost.tokenizer import WorldTokenizer


def documents(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The documents of one file, as bytes. Raises ValueError for a missing or empty file, or a bad line of jsonl."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no such file: {path}")
    if file.suffix != ".jsonl":
        data = file.read_bytes()
        if not data:
            raise ValueError(f"{path} is empty")
        yield data
        return
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{path}, line {number}: expected an object with a string "text" in UTF-8') from error
    if not number:
        raise ValueError(f"{path} is empty")


def prepare(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], tokenizer: WorldTokenizer
) -> tuple[int, int]:
    """Write the pair out.bin and out.idx from all documents of `paths`, in order; (documents, tokens) written.

    Token 0 closes every document. Raises ValueError as `documents`, and without any document.
    """
    count = 0

    def ids() -> Iterator[NDArray[Any]]:
        nonlocal count
        for path in paths:
            for document in documents(path):
                count += 1
                yield tokenizer.encode_array(document)
        if not count:
            raise ValueError("there are no documents to write")

    tokens = write_tokens(out, ids(), vocab_size=tokenizer.vocab_size)
    return count, tokens
