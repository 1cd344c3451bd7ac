"""roost.tokenizer against two independent implementations, on stress input and on real text."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from roost.tokenizer import WorldTokenizer

WORLD = WorldTokenizer()


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
    """Mixed text of this machine, in a fixed order: the UDHR, installed documentation and data, sources."""
    for language in udhr():
        yield "\n".join(language["articles"])
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


def test_agrees_with_pyrwkv_tokenizer_on_stress_input_and_real_text() -> None:
    peer = pytest.importorskip("pyrwkv_tokenizer", reason="the independent Rust implementation").RWKVTokenizer()
    for text in (*stress(), *up_to(real_text(), 21_000_000)):
        assert WORLD.encode(text) == peer.encode(text), text[:80]


def test_agrees_with_the_rwkv_package_on_stress_input_and_real_text() -> None:
    module = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the original Python trie")
    peer = module.TRIE_TOKENIZER(str(Path(module.__file__).with_name("rwkv_vocab_v20230424.txt")))
    rng = random.Random(8)
    for data in [rng.randbytes(200) for _ in range(500)]:
        assert WORLD.encode(data) == peer.encodeBytes(data)
    for text in (*islice(stress(), 0, None, 3), *up_to(real_text(), 2_000_000)):
        assert WORLD.encode(text) == peer.encode(text), text[:80]
