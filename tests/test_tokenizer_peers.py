"""roost.tokenizer against two independent implementations, on stress input and on real text.

They are the Rust one of `pyrwkv-tokenizer` and the original Python trie of the `rwkv` package.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import rwkv
from hypothesis import given
from hypothesis import strategies as st
from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from roost.tokenizer import WorldTokenizer

WORLD = WorldTokenizer()
RUST = RWKVTokenizer()
TRIE = TRIE_TOKENIZER(str(Path(str(rwkv.__file__)).with_name("rwkv_vocab_v20230424.txt")))


def udhr() -> list[dict[str, Any]]:
    lines = (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stress() -> Iterator[str]:
    """Inputs on which tokenizers break: long runs, every letter, back-off, controls, mixed scripts, random text."""
    yield from (" " * n for n in range(0, 5000, 7))
    yield from (chr(code) * (1 + code % 9) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    yield ("//" + "-" * 63 + "\n") * 300 + "//" + "-" * 64
    rng = random.Random(5)
    yield from ("".join(rng.choices("01 ", k=50)) for _ in range(300))
    yield from ("".join(rng.choices("\r\n\t ab.'\x00", k=50)) for _ in range(300))
    letters = "".join("".join(language["articles"]) for language in udhr())
    yield "".join(rng.sample(letters, 50_000))
    yield "".join(map(chr, (rng.randrange(0xE000, 0x110000) for _ in range(5_000))))
    texts = (WORLD.decode([number]) for number in range(1, 65530))
    valid = [text for text in texts if "\ufffd" not in text]
    yield "".join(rng.choices(valid, k=50_000))


def real_text() -> Iterator[str]:
    """The Universal Declaration of Human Rights in 102 languages, then what Python's installation holds.

    The declaration is read three times: language by language, article by article and word by word, the last two going
    through all languages in turn, so that scripts meet within a text and within a line. Then come the documentation
    (*.md, *.txt) of the installed packages, the standard library's *.py, and theirs, in the order of their paths; the
    folders are sysconfig's "purelib" and "stdlib". Files of 2 MB and more are left out.
    """
    languages = [language["articles"] for language in udhr()]
    yield from map("\n".join, languages)
    yield from map("\n".join, zip_longest(*languages, fillvalue=""))
    words = zip_longest(*(" ".join(articles).split() for articles in languages), fillvalue="")
    yield "\n".join(map(" ".join, words))
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    for folder, pattern in ((packages, "*.md"), (packages, "*.txt"), (library, "*.py"), (packages, "*.py")):
        for path in sorted(folder.rglob(pattern)):
            if path.is_file() and path.stat().st_size < 2_000_000:
                yield path.read_bytes().decode("utf-8", "replace")


def up_to(texts: Iterator[str], size: int) -> list[str]:
    """The first texts that have `size` bytes together."""
    chosen: list[str] = []
    for text in texts:
        chosen.append(text)
        size -= len(text.encode())
        if size <= 0:
            return chosen
    raise AssertionError(f"{size} bytes short: this machine has too little text")


@pytest.mark.slow
def test_agrees_with_both_on_stress_input_and_real_text() -> None:
    for text in (*stress(), *up_to(real_text(), 21_000_000)):
        ids = WORLD.encode(text)
        assert ids == RUST.encode(text), text[:80]
        assert ids == TRIE.encode(text), text[:80]


@given(st.text())
def test_agrees_with_both_on_any_text(text: str) -> None:
    assert WORLD.encode(text) == RUST.encode(text) == TRIE.encode(text)


@given(st.binary())
def test_agrees_with_the_trie_on_any_bytes(data: bytes) -> None:
    """The Rust tokenizer takes text only."""
    assert WORLD.encode(data) == TRIE.encodeBytes(data)


def test_agrees_with_the_trie_on_long_random_bytes() -> None:
    data = random.Random(8).randbytes(100_000)
    assert WORLD.encode(data) == TRIE.encodeBytes(data)
