"""Speed of the tokenizer beside `pyrwkv-tokenizer` (Rust) and the `rwkv` package's Python trie.

Texts that every machine has: the Universal Declaration of Human Rights in 102 languages (1.4 MB, as it ships), Python's
standard library and then the installed packages (*.py in the order of their paths, up to the size), a table of numbers
that all differ (the worst case of a memory), and `//` with 63 dashes (the longest back-off). More come with
--text NAME=FILE; the result holds the sha256 of each. Every round of roost starts with a new tokenizer whose tables are
built and whose memory is empty: the honest figure for one pass over data. Ids are compared before anything is timed.

    python benchmarks/tokenizer.py [--quick] [--out FILE] [--rounds N] [--megabytes M] [--text NAME=FILE ...]
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import rwkv
from common import alternate, write
from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from roost import WorldTokenizer
from roost.matching import PythonMatcher

VOCABULARY = str(Path(str(rwkv.__file__)).with_name("rwkv_vocab_v20230424.txt"))


def python_files() -> Iterator[bytes]:
    """The standard library, then the installed packages."""
    for place in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(place)).rglob("*.py")):
            if place == "purelib" or "site-packages" not in path.parts:
                yield path.read_bytes()


def up_to(size: int, pieces: Iterator[bytes]) -> bytes:
    """The first pieces that have `size` bytes together."""
    data = b""
    for piece in pieces:
        data += piece
        if len(data) >= size:
            break
    return data


def texts(size: int, own: list[str]) -> dict[str, str]:
    """At most `size` bytes of each kind."""
    kinds = {
        "UDHR, 102 languages": (files("roost") / "assets" / "udhr_subset.jsonl").read_bytes(),
        "Python code": up_to(size, python_files()),
        "table of numbers": b"".join(b"%12d %8d\n" % (n * n * 7919, n) for n in range(size // 22 + 1)),
        "longest back-off": (b"//" + b"-" * 63) * (size // 65 + 1),
    }
    kinds |= {name: Path(path).read_bytes() for name, _, path in (text.partition("=") for text in own)}
    return {name: data[:size].decode("utf-8", errors="ignore") for name, data in kinds.items()}


def measure(text: str, rounds: int, peers: dict[str, Any], python: PythonMatcher) -> dict[str, Any]:
    """One row: seconds, MB/s and ratios."""
    data = text.encode()
    world = WorldTokenizer()
    ids = world.encode_array(text)
    for peer in peers.values():
        assert np.array_equal(ids, np.array(peer.encode(text), ids.dtype))
    assert world.decode_bytes(ids) == data and np.array_equal(ids, world.encode_array(text, 2))
    new = {name: [WorldTokenizer() for _ in range(rounds + 1)] for name in ("roost", "threads_2", "list")}
    for tokenizer in (tokenizer for several in new.values() for tokenizer in several):
        tokenizer.encode_array("")
    variants = {
        "roost": lambda: new["roost"].pop().encode_array(text),
        "roost_2_threads": lambda: new["threads_2"].pop().encode_array(text, 2),
        "roost_list": lambda: new["list"].pop().encode(text),
        "roost_python": lambda: python.encode(data),
        "roost_decode": lambda: world.decode_bytes(ids),
        **{name: lambda peer=peer: peer.encode(text) for name, peer in peers.items()},
    }
    taken = alternate(variants, rounds=rounds)
    speed = {name: round(len(data) / t["median_s"] / 1e6, 2) for name, t in taken.items()}
    over = {f"roost_over_{name}": round(speed["roost"] / speed[name], 2) for name in peers}
    return {
        "bytes": len(data),
        "tokens": len(ids),
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": taken,
        "mb_per_second": speed,
        **over,
        "threads_2_over_1": round(speed["roost_2_threads"] / speed["roost"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little text, one round: only to see that it runs")
    parser.add_argument("--out", help="write JSON here instead of standard output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=10, help="of each text, at most")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another text in UTF-8")
    options = parser.parse_args()
    rounds, size = (1, 20_000) if options.quick else (options.rounds, int(options.megabytes * 1e6))
    makers: dict[str, Callable[[], Any]] = {
        "rwkv": lambda: TRIE_TOKENIZER(VOCABULARY),
        "pyrwkv_tokenizer": RWKVTokenizer,
    }
    peers = {name: make() for name, make in makers.items()}
    world = WorldTokenizer()
    python = PythonMatcher([world.token_bytes(id) for id in range(world.vocab_size)])
    rows = [{"text": name, **measure(text, rounds, peers, python)} for name, text in texts(size, options.text).items()]
    own: dict[str, Callable[[], Any]] = {"roost": lambda: WorldTokenizer().encode_array("")}
    construction = alternate(own if options.quick else own | makers, rounds=rounds)
    write("tokenizer", [*rows, {"construction": construction}], options.out)


if __name__ == "__main__":
    main()
