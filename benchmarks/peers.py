"""The rivals on a CPU: llama.cpp (llama-cpp-python) and the `rwkv` package, on random models of official shapes.

Owns: those models as files, and a peer as a process of its own: it runs one piece of work at a time and says how long
it took, so that whoever measures can alternate between peers, and its peak memory is its own.
Refuses to know: roost's own speed.

    python benchmarks/peers.py DIRECTORY [--presets P ..] [--formats F ..] [--threads N] [--rounds N] [--out FILE]

Models that are in DIRECTORY already are used as they are. llama.cpp runs at its best setting: weights repacked for the
processor, and the n_ubatch that reads 512 tokens fastest. Eagle runs in llama.cpp as the Finch that it equals.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import write
from torch import Tensor

from roost import PRESETS, RWKV, ModelConfig, checkpoint
from roost.formats.gguf import Quantised
from roost.models.rwkv import save_weights

DTYPES: dict[str, torch.dtype | Quantised] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": "q8_0",
    "q4_0": "q4_0",
}
"""What roost writes of them."""
GGUF_FORMATS = ("fp16", "bf16", "q8_0", "q4_0", "q4_K")
RWKV_STRATEGIES = ("cpu fp32", "cpu bf16")
UBATCHES = (128, 256, 512, 2048)
Call = Callable[[str, int], float]
"""(what, tokens) -> seconds: "prefill" from an empty state, or "decode" one by one behind a few tokens."""


def weights(config: ModelConfig, seed: int = 1) -> Iterator[tuple[str, Tensor]]:
    """Plausible weights in bf16: the trainer's initial decays, mixing and bonus; every matrix N(0, 1 / fan-in).

    Half of channel mixing's keys are then negative, so relu leaves about half zeros.
    """
    small = replace(config, vocab_size=8, dim_ffn=8)  # its vectors are those of the whole, and quickly made
    vectors = RWKV(small, init="paper", seed=seed).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, value in RWKV(config, device="meta").state_dict().items():
        low_rank = name.endswith(("_w1", "_w2"))
        if value.dim() < 2 or 1 in value.shape or not (low_rank or name.endswith(".weight")):
            yield name, vectors[name].bfloat16()
            continue
        fan_in = value.shape[-2] if low_rank else value.shape[-1]
        out = torch.empty(value.shape, dtype=torch.bfloat16)
        for row in out:  # row by row, so that fp32 is never whole in memory
            row.copy_(torch.randn(row.shape, generator=generator) * (0.3 if name == "emb.weight" else fan_in**-0.5))
        yield name, out


def files(preset: str, directory: Path, formats: tuple[str, ...] = GGUF_FORMATS) -> dict[str, Path]:
    """{"pth" or a GGUF format: file}, made where missing. q4_0 and q4_K are llama.cpp's own, quantised from bf16."""
    found = {"pth": directory / f"{preset}.pth"}
    if not found["pth"].exists():
        save_weights(dict(weights(PRESETS[preset])), found["pth"])
    for kind in formats:
        found[kind] = path = directory / f"{preset}.{kind}.gguf"
        if path.exists():
            continue
        if kind in ("q4_0", "q4_K") and importlib.util.find_spec("llama_cpp"):
            exact = files(preset, directory, ("bf16",))["bf16"]
            part = path.with_suffix(".part")
            subprocess.run([sys.executable, __file__, "--worker", "quantise", exact, part, kind], check=True)
            part.replace(path)  # never half a file under its name
        elif kind == "q4_K":
            del found[kind]  # only llama.cpp writes it
        else:
            checkpoint.convert(found["pth"], path, dtype=DTYPES[kind])
    return found


class Peer:
    """A peer in a process of its own; `run` is one timed piece of work. Raises RuntimeError when it dies."""

    def __init__(self, *worker: str) -> None:
        environment = {**os.environ, "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        pipe, command = subprocess.PIPE, [sys.executable, __file__, "--worker", *worker]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.load_s: float = self._answer()["seconds"]

    def run(self, what: str, tokens: int) -> float:
        """Seconds for `tokens` tokens of "prefill" or "decode"."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([what, tokens]) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def peak_bytes(self) -> int:
        """The largest resident memory until now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit code {self._process.wait()}")
        return json.loads(line)


def llama_cpp(path: Path, threads: int, ubatch: int = 512) -> Peer:
    """llama.cpp on a GGUF file."""
    return Peer("llama", str(path), str(threads), str(ubatch))


def rwkv_package(path: Path, threads: int, strategy: str) -> Peer:
    """The `rwkv` package on a .pth file."""
    return Peer("rwkv", str(path), str(threads), strategy)


def best_llama_cpp(path: Path, threads: int, rounds: int = 2, prompt: int = 512) -> tuple[Peer, int]:
    """llama.cpp with the n_ubatch that reads `prompt` tokens fastest, and that number."""
    best: tuple[float, int] = (float("inf"), 0)
    for ubatch in sorted({min(size, prompt) for size in UBATCHES}):
        with llama_cpp(path, threads, ubatch) as peer:
            peer.run("prefill", prompt)
            best = min(best, (min(peer.run("prefill", prompt) for _ in range(rounds)), ubatch))
    return llama_cpp(path, threads, best[1]), best[1]


def measure(peer: Peer, rounds: int, prompts: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Median tokens per second of each kind of work, and the peer's memory."""
    row: dict[str, Any] = {"load_s": round(peer.load_s, 3)}
    for what, count in (*(("prefill", n) for n in prompts), ("decode", steps)):
        peer.run(what, count)
        seconds = [peer.run(what, count) for _ in range(rounds)]
        row[f"{what}_{count}"] = round(count / statistics.median(seconds), 2)
        row[f"{what}_{count}_best"] = round(count / min(seconds), 2)
    return {**row, "peak_bytes": peer.peak_bytes()}


def _work(start: Callable[[], Call]) -> None:
    """The loop of a worker: one line in, one line out."""
    began = time.perf_counter()
    call = start()
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        what, tokens = json.loads(line)
        print(json.dumps({"seconds": call(what, tokens)}), flush=True)


def _llama(path: str, threads: str, ubatch: str) -> Call:
    import llama_cpp as L

    _silence(L)
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    assert model, f"llama.cpp cannot load {path}"
    params = L.llama_context_default_params()
    params.n_ctx = params.n_batch = 4096
    params.n_ubatch = int(ubatch)
    params.n_threads = params.n_threads_batch = int(threads)
    context = L.llama_init_from_model(model, params)
    vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    memory = L.llama_get_memory(context)
    batch = L.llama_batch_init(4096, 0, 1)

    def read(start: int, count: int) -> None:
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = (start + i) * 7919 % (vocab - 1) + 1, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == count - 1
        assert L.llama_decode(context, batch) == 0
        L.llama_get_logits(context)

    def call(what: str, tokens: int) -> float:
        L.llama_memory_clear(memory, True)
        return _timed(read, what, tokens)

    return call


def _rwkv(path: str, threads: str, strategy: str) -> Call:
    from rwkv.model import RWKV as Package

    torch.set_num_threads(int(threads))
    model: Any = Package(path.removesuffix(".pth"), strategy, verbose=False)
    vocab = model.w["emb.weight"].shape[0]
    state: Any = None

    def read(start: int, count: int) -> None:
        nonlocal state
        ids = [(start + i) * 7919 % (vocab - 1) + 1 for i in range(count)]
        _, state = model.forward(ids, None if start == 0 else state)

    return lambda what, tokens: _timed(read, what, tokens)


def _roost(path: str, threads: str, skip_zeros: str) -> Call:
    from roost.formats.packed import open_packed
    from roost.models.native import NativeModel

    opened = open_packed(Path(path), threads=int(threads))
    model = NativeModel(opened.config, opened.tensors, threads=int(threads), skip_zeros=skip_zeros == "1")
    vocab = opened.config.vocab_size
    state: Any = None

    def read(start: int, count: int, rows: int = 1) -> None:
        nonlocal state
        ids = torch.arange(start, start + count).mul(7919).remainder(vocab - 1).add(1).expand(rows, -1)
        _, state = model(ids, None if start == 0 else state, last_only=True)

    def call(what: str, tokens: int) -> float:
        name, _, rows = what.partition(" ")
        return _timed(lambda start, count: read(start, count, int(rows or 1)), name, tokens)

    return call


def _timed(read: Callable[[int, int], None], what: str, tokens: int) -> float:
    first = 16
    if what == "decode":
        read(0, first)
    began = time.perf_counter()
    if what == "prefill":
        read(0, tokens)
    else:
        for step in range(tokens):
            read(first + step, 1)
    return time.perf_counter() - began


def _quantise(source: str, target: str, kind: str) -> None:
    import llama_cpp as L

    _silence(L)
    params = L.llama_model_quantize_default_params()
    params.ftype = L.LLAMA_FTYPE_MOSTLY_Q4_0 if kind == "q4_0" else L.LLAMA_FTYPE_MOSTLY_Q4_K_M
    status = L.llama_model_quantize(source.encode(), target.encode(), params)
    assert status == 0, f"llama.cpp could not quantise {source}"


def _silence(L: Any) -> None:
    L.llama_log_set(_no_log(L), None)


@cache  # ctypes needs the callback to stay alive
def _no_log(L: Any) -> Any:
    return L.llama_log_callback(lambda level, text, data: None)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    prompts, steps = ((32,), 4) if options.quick else ((512, 2048), 32)
    rounds = 1 if options.quick else options.rounds
    for preset in options.presets:
        made = files(preset, options.directory, tuple(options.formats))
        for kind in options.formats if importlib.util.find_spec("llama_cpp") else ():
            if kind in made:
                peer, ubatch = best_llama_cpp(made[kind], options.threads, rounds=rounds, prompt=prompts[0])
                with peer:
                    row = {"model": preset, "peer": "llama.cpp", "format": kind, "threads": options.threads}
                    row |= {"ubatch": ubatch, "file_bytes": made[kind].stat().st_size}
                    yield row | measure(peer, rounds, prompts, steps)
        for strategy in RWKV_STRATEGIES if importlib.util.find_spec("rwkv") else ():
            with rwkv_package(made["pth"], options.threads, strategy) as peer:
                row = {"model": preset, "peer": "rwkv", "format": strategy, "threads": options.threads}
                yield row | measure(peer, rounds, prompts, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the models are, or shall be")
    parser.add_argument("--presets", nargs="+", default=["finch-0.1b", "eagle-0.1b", "finch-1.6b", "eagle-1.5b"])
    parser.add_argument("--formats", nargs="+", default=list(GGUF_FORMATS), choices=GGUF_FORMATS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="write JSON here instead of standard output")
    parser.add_argument("--quick", action="store_true", help="a few tokens, one round: only to see that it runs")
    options = parser.parse_args()
    write("peers", list(_rows(options)), options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        kind, *arguments = sys.argv[2:]
        if kind == "quantise":
            _quantise(*arguments)
        else:
            _work(lambda: {"llama": _llama, "rwkv": _rwkv, "roost": _roost}[kind](*arguments))
    else:
        main()
