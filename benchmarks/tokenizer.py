"""Figures of docs/measurements.md: encoding speed beside the `rwkv` package's Python trie and `pyrwkv-tokenizer`.

Three texts: the Universal Declaration of Human Rights in 102 languages, Python's standard library, and a table of
numbers that all differ, the worst case of a memo. Every round of roost starts with a new tokenizer: the honest figure
for one pass over data. All ids are compared before anything is timed.

    python benchmarks/tokenizer.py [--quick] [--out FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any

import rwkv
from common import alternate, write
from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from roost import WorldTokenizer


def texts(size: int) -> dict[str, str]:
    """About `size` bytes of each kind."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = "".join(path.read_text("utf-8", errors="replace") for path in library)
    kinds = {
        "UDHR, 102 languages": (files("roost") / "assets" / "udhr_subset.jsonl").read_text("utf-8"),
        "Python standard library": code,
        "table of numbers": "".join(f"{n * n * 7919:>12} {n:>8}\n" for n in range(size // 22)),
    }
    return {name: text.encode()[:size].decode("utf-8", errors="ignore") for name, text in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little text, one round: only to see that it runs")
    parser.add_argument("--out", help="write JSON here instead of standard output")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trie = TRIE_TOKENIZER(str(Path(str(rwkv.__file__)).with_name("rwkv_vocab_v20230424.txt")))
    rust, rows = RWKVTokenizer(), list[dict[str, Any]]()
    rounds = 1 if options.quick else options.rounds
    for name, text in texts(20_000 if options.quick else 1_400_000).items():
        wanted = WorldTokenizer().encode(text)
        assert wanted == trie.encode(text) == rust.encode(text)
        fresh = iter([WorldTokenizer() for _ in range(rounds + 1)])
        variants = {
            "roost": lambda text=text, fresh=fresh: next(fresh).encode(text),
            "rwkv": lambda text=text: trie.encode(text),
            "pyrwkv_tokenizer": lambda text=text: rust.encode(text),
        }
        taken = alternate(variants, rounds=rounds)
        size = len(text.encode())
        speed = {variant: round(size / t["median_s"] / 1e6, 2) for variant, t in taken.items()}
        ratio = round(speed["roost"] / speed["rwkv"], 2)
        rows.append({"text": name, "bytes": size, "seconds": taken, "mb_per_second": speed, "roost_over_rwkv": ratio})
    write("tokenizer", rows, options.out)


if __name__ == "__main__":
    main()
