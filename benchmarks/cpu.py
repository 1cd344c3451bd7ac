"""The native CPU model against llama.cpp, the `rwkv` package, torch and the machine: the figures of the README.

    python benchmarks/cpu.py DIRECTORY [--models finch-1.6b ..] [--parts decode prefill ..] [--rounds N] [--out FILE]

DIRECTORY holds the random models of peers.py, or will. A comparison keeps both processes open and alternates them, so
that a neighbour slows both; figures are medians, ratios are of medians, left out where a peer is not installed. "dense"
reads all weights; "sparse" is what skipping the weights of zero inputs adds (random weights have half zeros, trained
ones more: see `roost bench`).

Refuses to know: how the peers run (peers.py) and how quantised weights do in quality (`roost evaluate-quant`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from common import alternate, write
from peers import Peer

import roost
from roost import PRESETS, native
from roost.formats import packed

RIVALS = {"bf16": ("fp16", "bf16"), "int8": ("q8_0",), "int4": ("q4_0", "q4_K")}
Row = dict[str, Any]


def roost_model(preset: str, directory: Path, weights: str, threads: int, skip_zeros: bool = True) -> Peer:
    """The native model, in a process of its own, from its packed file."""
    path = directory / f"{preset}.{weights}{packed.ENDING}"
    if not path.exists():
        roost.load(peers.files(preset, directory, ())["pth"], backend="native", weights=weights, threads=threads)
    return Peer("roost", str(path), str(threads), str(int(skip_zeros)))


def race(contestants: dict[str, Peer], what: str, count: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, peer in contestants.items():
            taken = peer.run(what, count)
            if turn:
                seconds[name].append(taken)
    return {name: round(count / statistics.median(all_), 2) for name, all_ in seconds.items()}


def here(package: str) -> bool:
    """Whether a peer's package is installed."""
    return importlib.util.find_spec(package) is not None


def decode(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Writing, each format against the rival formats of its size."""
    made = peers.files(preset, options.directory, peers.GGUF_FORMATS if here("llama_cpp") else ())
    for weights, rivals in RIVALS.items():
        kinds = [kind for kind in rivals if kind in made] if here("llama_cpp") else []
        with ExitStack() as stack:  # each is entered as it is made: they end, too, when a later one cannot start
            dense = stack.enter_context(roost_model(preset, options.directory, weights, options.threads, False))
            sparse = stack.enter_context(roost_model(preset, options.directory, weights, options.threads))
            theirs = {kind: stack.enter_context(peers.llama_cpp(made[kind], options.threads)) for kind in kinds}
            speed = race({"dense": dense, "sparse": sparse, **theirs}, "decode", options.steps, options.rounds)
            best = max((speed[kind] for kind in kinds), default=None)
            ratios = {f"{one}_ratio": round(speed[one] / best, 3) for one in ("dense", "sparse")} if best else {}
            yield {
                "part": "decode", "model": preset, "weights": weights, "tokens_per_s": speed, **ratios,
                "peak_bytes": dense.peak_bytes(), "load_s": round(dense.load_s, 3),
                "file_bytes": (options.directory / f"{preset}.{weights}{packed.ENDING}").stat().st_size,
            }  # fmt: skip


def prefill(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Reading 512 and 2048 tokens, against llama.cpp's fastest format."""
    made = peers.files(preset, options.directory, peers.GGUF_FORMATS if here("llama_cpp") else ())
    with ExitStack() as stack:
        rivals = {
            f"llama.cpp {kind}": stack.enter_context(peers.best_llama_cpp(path, options.threads)[0])
            for kind, path in made.items()
            if kind != "pth" and here("llama_cpp")
        }
        ours = {
            weights: stack.enter_context(roost_model(preset, options.directory, weights, options.threads))
            for weights in RIVALS
        }
        first = race(rivals, "prefill", 512, 1)
        fastest = sorted(first, key=lambda kind: -first[kind])[:1]
        for count in (512, 2048):
            speed = race(ours | {kind: rivals[kind] for kind in fastest}, "prefill", count, options.rounds)
            row: Row = {"part": "prefill", "model": preset, "tokens": count, "tokens_per_s": speed}
            for kind in fastest:
                row["ratios"] = {weights: round(speed[weights] / speed[kind], 3) for weights in ours}
            yield row


def package(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Both against the `rwkv` package in its faster CPU strategy."""
    path = peers.files(preset, options.directory, ())["pth"]
    for strategy in peers.RWKV_STRATEGIES if here("rwkv") else ("",):
        with ExitStack() as stack:
            field = {"bf16": stack.enter_context(roost_model(preset, options.directory, "bf16", options.threads))}
            if strategy:
                field[strategy] = stack.enter_context(peers.rwkv_package(path, options.threads, strategy))
            for what, count in (("prefill", 512), ("decode", options.steps)):
                speed = race(field, what, count, options.rounds)
                ratio = {"ratio": round(speed["bf16"] / speed[strategy], 3)} if strategy else {}
                yield {"part": "rwkv package", "model": preset, "what": what, "tokens_per_s": speed, **ratio}


def products(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """The FLOP/s of reading 512 tokens, against torch's bf16 products alone at M = 512 on the same shapes."""
    c = PRESETS[preset]
    shapes = [(c.dim_att, c.n_embd)] * 4 + [(c.n_embd, c.dim_att), (c.dim_ffn, c.n_embd), (c.n_embd, c.n_embd)]
    shapes.append((c.n_embd, c.dim_ffn))
    flops = 2 * 512 * sum(n * k for n, k in shapes)
    pairs = [(torch.randn(512, k).bfloat16(), torch.randn(n, k).bfloat16()) for n, k in shapes]

    def multiply() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)

    with roost_model(preset, options.directory, "bf16", options.threads) as ours, torch.no_grad():
        ours.run("prefill", 512)
        alone, whole = [], []
        for _ in range(options.rounds):
            alone.append(alternate({"torch": multiply}, rounds=1)["torch"]["median_s"])
            whole.append(ours.run("prefill", 512))
    torch_flops = flops / statistics.median(alone)
    our_flops = flops * c.n_layer / statistics.median(whole)
    yield {
        "part": "products", "model": preset, "torch_gflops": round(torch_flops / 1e9, 1),
        "prefill_gflops": round(our_flops / 1e9, 1), "ratio": round(our_flops / torch_flops, 3),
    }  # fmt: skip


def read_bandwidth(threads: int) -> float:
    """Bytes per second of the best plain read: 2 MiB pages where there are some, one to four streams a thread."""
    size = 2 << 30
    area = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(area, np.uint8)
    data[:: 1 << 12] = 1
    read = native.function("roost_selftest_read", [c_void_p, c_long, c_int, c_int])
    best = float("inf")
    for streams in (1, 2, 4):
        for _ in range(4):
            began = time.perf_counter()
            native.check(read(data.ctypes.data, size, threads, streams))
            best = min(best, time.perf_counter() - began)
    return size / best


def bandwidth(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Bytes of weights that writing reads per second, against the best plain read here; alternating."""
    for weights in RIVALS:
        model, _ = roost.load(options.directory / f"{preset}.{weights}{packed.ENDING}", threads=options.threads)
        size = model.bytes_per_token()
        del model
        with roost_model(preset, options.directory, weights, options.threads, skip_zeros=False) as ours:
            ours.run("decode", options.steps)
            plain, used = [], []
            for _ in range(options.rounds):
                plain.append(read_bandwidth(options.threads))
                used.append(size * options.steps / ours.run("decode", options.steps))
        yield {
            "part": "bandwidth", "model": preset, "weights": weights, "bytes_per_token": size,
            "read_GB_per_s": round(max(plain) / 1e9, 2), "used_GB_per_s": round(statistics.median(used) / 1e9, 2),
            "ratio": round(statistics.median(used) / max(plain), 3),
        }  # fmt: skip


def rows(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Sixteen sequences at once against one, in tokens per second."""
    with roost_model(preset, options.directory, "int8", options.threads) as ours:
        one, many = [], []
        for _ in range(options.rounds + 1):
            one.append(options.steps / ours.run("decode", options.steps))
            many.append(16 * 8 / ours.run("decode 16", 8))
    ratio = statistics.median(many[1:]) / statistics.median(one[1:])
    yield {"part": "16 rows", "model": preset, "one": one[1:], "sixteen": many[1:], "ratio": round(ratio, 3)}


def neighbour(preset: str, options: argparse.Namespace) -> Iterator[Row]:
    """Writing while another process keeps the last core busy, against the own quiet speed; every engine."""
    made = peers.files(preset, options.directory, ("q8_0",) if here("llama_cpp") else ())
    core = (os.cpu_count() or 1) - 1
    field: dict[str, Callable[[], Peer]] = {
        "roost int8": lambda: roost_model(preset, options.directory, "int8", options.threads)
    }
    if here("llama_cpp") and "q8_0" in made:
        field["llama.cpp q8_0"] = lambda: peers.llama_cpp(made["q8_0"], options.threads)
    if here("rwkv"):
        field["rwkv cpu fp32"] = lambda: peers.rwkv_package(made["pth"], options.threads, "cpu fp32")
    for name, start in field.items():
        with start() as peer:
            peer.run("decode", options.steps)
            quiet, busy = [], []
            for _ in range(options.rounds):
                quiet.append(peer.run("decode", options.steps))
                spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
                other = subprocess.Popen([sys.executable, "-c", spin])
                time.sleep(0.3)
                busy.append(peer.run("decode", options.steps))
                other.kill()
                other.wait()
        ratio = statistics.median(quiet) / statistics.median(busy)
        yield {"part": "busy neighbour", "model": preset, "engine": name, "kept": round(ratio, 3)}


PARTS = {one.__name__: one for one in (decode, prefill, package, products, bandwidth, rows, neighbour)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the models are, or shall be")
    parser.add_argument("--models", nargs="+", default=["finch-0.1b", "finch-1.6b"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens written at a time")
    parser.add_argument("--out", help="write JSON here instead of standard output")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    for preset in options.models:
        for part in options.parts:
            for row in PARTS[part](preset, options):
                print(json.dumps(row), file=sys.stderr, flush=True)
                found.append(row)
    write("cpu", found, options.out)


if __name__ == "__main__":
    main()
