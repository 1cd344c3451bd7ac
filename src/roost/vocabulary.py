"""Vocabularies as files: the official one as it ships, and the text form that everybody exchanges.

Owns: what makes a vocabulary usable (ids from 1, tokens not empty and all different, a token for each single byte), and
the text form: lines "ID LITERAL BYTES", the literal a Python str (its UTF-8 is the token), or bytes where the token is
not valid UTF-8. Literals are unescaped by a parser that knows the escapes which `repr` writes; nothing is evaluated.
Refuses to know: how text is matched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_LARGEST_ID = 2**24 - 1  # ids index a table; far beyond any real vocabulary, far below a gigabyte
_LINE = re.compile(r"""([0-9]+) (b?)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*") ([0-9]+)""", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t"}


def official() -> dict[int, bytes]:
    """id -> bytes of rwkv_vocab_v20230424: 65,529 tokens, ids from 1 in the order of (length, bytes).

    Packed: u16 number of lengths, u16 tokens of length 1, 2, ..., then the bytes of all tokens in the order of ids.
    """
    import lzma
    from importlib.resources import files

    packed = lzma.decompress((files("roost") / "assets" / "world.xz").read_bytes())
    longest = int.from_bytes(packed[:2], "little")
    start = 2 + 2 * longest
    tokens: list[bytes] = []
    for length, count in enumerate(np.frombuffer(packed, "<u2", longest, 2).tolist(), 1):
        end = start + length * count
        tokens += [packed[at : at + length] for at in range(start, end, length)]
        start = end
    return dict(enumerate(tokens, 1))


def invert(tokens: Mapping[int, bytes]) -> dict[bytes, int]:
    """bytes -> id. Raises ValueError unless the vocabulary can encode every byte string and decode it again."""
    ids = {token: number for number, token in tokens.items()}
    if len(ids) < len(tokens):
        number, token = next((number, token) for number, token in tokens.items() if ids[token] != number)
        raise ValueError(f"ids {number} and {ids[token]} are both the token {token!r}; one of them must go")
    if b"" in ids:
        raise ValueError(f"id {ids[b'']} is empty; every token needs at least one byte")
    for number in (min(tokens, default=1), max(tokens, default=1)):
        if not 1 <= number <= _LARGEST_ID:
            raise ValueError(f"id {number} is not in 1..{_LARGEST_ID} (0 is the document boundary)")
    for byte in range(256):
        if bytes([byte]) not in ids:
            raise ValueError(f"no token for the single byte 0x{byte:02x}; without it some text cannot be encoded")
    return ids


def read(path: Path) -> dict[int, bytes]:
    """id -> bytes of a text file. Raises ValueError, naming the line, when it is missing or malformed."""
    if not path.is_file():
        raise ValueError(f"no vocabulary file at {path}")
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")  # not splitlines: a token may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a vocabulary file: byte {error.start} is not UTF-8") from error
    tokens: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            id, token = _parse_line(line.removesuffix("\r"))
            if id in tokens:
                raise ValueError(f"id {id} already has the token {tokens[id]!r}")
            if token in seen:
                raise ValueError(f"the token {token!r} already has the id {seen[token]}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        tokens[id] = token
        seen[token] = id
    return tokens


def _parse_line(line: str) -> tuple[int, bytes]:
    fields = _LINE.fullmatch(line)
    if fields is None or (fields[2] and not line.isascii()):
        raise ValueError(f"{line[:80]!r} is not of the form ID 'TOKEN' BYTES")
    id, is_bytes, quoted, length = fields.groups()
    text = _ESCAPE.sub(_unescape, quoted[1:-1]) if "\\" in quoted else quoted[1:-1]
    token = text.encode("latin-1") if is_bytes else text.encode()
    if len(token) != int(length):
        raise ValueError(f"the token {token!r} has {len(token)} bytes, but the line says {length}")
    if not token or not 1 <= int(id) <= _LARGEST_ID:
        raise ValueError(f"id {id} must be in 1..{_LARGEST_ID}, and its token must have a byte")
    return int(id), token


def _unescape(match: re.Match[str]) -> str:
    two, four, eight, other = match.groups()
    if other is not None and other in _ESCAPED:
        return _ESCAPED[other]
    code = -1 if other is not None else int(two or four or eight, 16)
    if not 0 <= code <= sys.maxunicode:
        raise ValueError(f"unknown escape {match[0]}")
    return chr(code)
