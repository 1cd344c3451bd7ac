"""Speed of `roost prepare` on jsonl beside the tokenizer alone, on as many cores.

The text is the installed Python code, cut to documents at file borders, as lines {"text": ...}. The tokenizer's own
rate is that of `encode_arrays` over all documents, already in memory, on the same number of
threads; `prepare` reads the file, parses, encodes, writes shards and joins them. Rates are MB (10^6 bytes) of text a
second. Up to four workers are threads; more are processes, which load torch before they help.

    python benchmarks/prepare.py [--quick] [--out FILE] [--rounds N] [--megabytes M] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import alternate, write

from roost import WorldTokenizer
from roost.data.binidx import TokenFile
from roost.data.prepare import prepare


def python_files() -> Iterator[Path]:
    """The installed Python code, folder by folder."""
    for place in ("stdlib", "purelib"):
        for folder, inner, names in os.walk(sysconfig.get_path(place)):
            inner.sort()
            yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def documents(size: int) -> list[str]:
    """Python files of `size` bytes in all, repeated with another first line if too few."""
    found: list[str] = []
    total, turn = 0, 0
    while total < size:
        for path in python_files():
            text = f"# {turn}\n" * (turn > 0) + path.read_text(encoding="utf-8", errors="ignore")
            total += len(text.encode())
            if text:
                found.append(text)
            if total >= size:
                break
        turn += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little text, one round: only to see that it runs")
    parser.add_argument("--out", help="write JSON here instead of standard output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    size, rounds = (200_000, 1) if options.quick else (int(options.megabytes * 1e6), options.rounds)
    texts = documents(size)
    data = [text.encode() for text in texts]
    total = sum(map(len, data))
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place) / "x.jsonl", Path(place) / "out"
        source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        rows = []
        for workers in sorted({1, options.workers}):
            tokenizers = [WorldTokenizer() for _ in range(2 * rounds + 2)]  # with an empty memory, as the workers' are
            for tokenizer in tokenizers:
                tokenizer.encode_array("")
            taken = alternate(
                {
                    "tokenizer": lambda new=tokenizers, workers=workers: new.pop().encode_arrays(data, workers),
                    "prepare": lambda new=tokenizers, workers=workers: prepare(
                        [source], out, new.pop(), workers=workers
                    ),
                },
                rounds=rounds,
            )
            assert len(TokenFile(out)) == prepare([source], out, WorldTokenizer(), workers=1).total.tokens
            speed = {name: total / 1e6 / t["median_s"] for name, t in taken.items()}
            rows.append(
                {
                    "workers": workers,
                    "documents": len(texts),
                    "bytes": total,
                    "seconds": taken,
                    "mb_per_second": {name: round(value, 1) for name, value in speed.items()},
                    "share_of_tokenizer": round(speed["prepare"] / speed["tokenizer"], 3),
                }
            )
    write("prepare", rows, options.out)


if __name__ == "__main__":
    main()
