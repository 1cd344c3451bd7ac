"""Claim: native WKV is 8x (forward) and 6x (with backward) as fast as eager chunked, 2x as fast as ggml's loop order.

Setting of the claim: B=1, T=512, H=16, K=64, fp32, one and two threads. Also: decays of 1e-10, whose products are
denormal; one token of 32 heads; static decay; bf16; and a training step of nestling's sizes with either backend.
Results are compared before anything is timed. The loop in ggml's order is compiled here (g++ -O3 -march=native).

    python benchmarks/wkv_native.py [--quick] [--out FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternate, write
from torch import Tensor

from roost import PRESETS, RWKV
from roost.ops import wkv, wkv_backend
from roost.training.loss import next_token_loss

Run = Callable[[], object]


def inputs(B: int, T: int, H: int, K: int, *, log_w: float | None = None, static: bool = False) -> list[Tensor]:
    """r, k, v, log_w, u and the state, fp32; decays -exp(x) with x around -3, or one number everywhere."""
    random = torch.Generator().manual_seed(0)
    shape = (B, T, H, K)
    r, k, v = (torch.randn(shape, generator=random) for _ in range(3))
    w = -(torch.randn((H, K) if static else shape, generator=random) * 2 - 3).exp()
    w = w if log_w is None else torch.full_like(w, log_w)
    return [r, k, v, w, torch.randn(H, K, generator=random), torch.randn(B, H, K, K, generator=random)]


def forward(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Output and state, without keeping anything for a backward pass."""
    with torch.no_grad(), wkv_backend(backend):
        return wkv(*tensors)


def forward_backward(backend: str, tensors: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of all six inputs for given gradients of output and state."""
    leaves = [x.requires_grad_() for x in tensors]
    with wkv_backend(backend):
        results = wkv(*leaves)
    return torch.autograd.grad(results, leaves, cotangents)


def ggml_order(folder: str, tensors: list[Tensor]) -> tuple[Run, Tensor] | None:
    """The loop of ggml_order.cpp on one thread, and where its output will be; None without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    library = Path(folder) / "ggml_order.so"
    source = Path(__file__).with_name("ggml_order.cpp")
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    r, k, v, log_w, u, state = tensors
    state, w, out = state.clone(), log_w.exp(), torch.empty_like(v)
    call = ctypes.CDLL(str(library)).ggml_order
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (r, k, v, w, u, state, out)]
    sizes = [ctypes.c_long(n) for n in r.shape[1:]]
    kept = (r, k, v, w, u, state, out)
    return lambda: (call(*pointers, *sizes), kept)[0], out


def agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    """Stop when two results differ by more than fp32 explains: there would be nothing to time."""
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    if not error < 1e-5:
        raise SystemExit(f"{what}: the results differ by {error:.1e}; there is nothing to time")


def row(name: str, threads: int, token_heads: int, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Times, nanoseconds per token and head of the native backend, and every other variant over it."""
    own = times["native"]["median_s"]
    ratios = {f"{other}_over_native": round(t["median_s"] / own, 2) for other, t in times.items() if other != "native"}
    return {"what": name, "threads": threads, "ns": round(own / token_heads * 1e9, 1), **ratios, **times}


def operator(T: int, H: int, K: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Forward, forward + backward, denormals, static decay and bf16 at one number of threads."""
    x = inputs(1, T, H, K)
    cotangents = [torch.randn_like(x[2]), torch.randn_like(x[5])]
    agree(forward("native", x), forward("chunked", x), "forward")
    both = partial(forward_backward, tensors=[t.clone() for t in x], cotangents=cotangents)
    agree(both("native"), both("chunked"), "forward and backward")
    variants: dict[str, Run] = {b: partial(forward, b, x) for b in ("native", "chunked")}
    with tempfile.TemporaryDirectory() as folder:
        loop = ggml_order(folder, x) if threads == 1 else None
        if loop is not None:
            run, out = loop
            run()
            agree((forward("native", x)[0],), (out,), "the loop in ggml's order")
            variants["ggml_order"] = run
        rows = [row("forward", threads, T * H, alternate(variants, rounds=rounds))]
    passes: dict[str, Run] = {b: partial(both, b) for b in ("native", "chunked")}
    rows.append(row("forward and backward", threads, T * H, alternate(passes, rounds=rounds)))
    tiny, eagle = inputs(1, T, H, K, log_w=-23.02585), inputs(1, T, H, K, static=True)
    half = [t.bfloat16() for t in x[:3]] + x[3:]
    others = {"native": x, "native_denormal": tiny, "native_static": eagle, "native_bf16": half}
    times = alternate({name: partial(forward, "native", y) for name, y in others.items()}, rounds=rounds)
    rows.append(row("forward: other inputs", threads, T * H, times))
    one = inputs(1, 1, 32, K)
    times = alternate({b: partial(forward, b, one) for b in ("native", "chunked")}, rounds=20 * rounds)
    rows.append(row("one token of 32 heads", threads, 32, times))
    return rows


def two_threads(T: int, H: int, K: int, rounds: int) -> dict[str, Any]:
    """The native backend on one thread over two threads."""
    x = inputs(1, T, H, K)
    cotangents = [torch.randn_like(x[2]), torch.randn_like(x[5])]
    leaves = [t.clone() for t in x]

    def on(threads: int, run: Run) -> None:
        torch.set_num_threads(threads)
        run()

    ratios: dict[str, float] = {}
    passes: dict[str, Run] = {
        "forward": partial(forward, "native", x),
        "forward_backward": partial(forward_backward, "native", leaves, cotangents),
    }
    for name, run in passes.items():
        times = alternate({str(n): partial(on, n, run) for n in (1, 2)}, rounds=2 * rounds)
        ratios[name] = round(times["1"]["median_s"] / times["2"]["median_s"], 2)
    return {"what": "one thread over two", **ratios}


def training(quick: bool, rounds: int, threads: int) -> dict[str, Any]:
    """Forward and backward of a model of nestling's sizes, bf16, with the batch of recipes/nestling.toml."""
    random = torch.Generator().manual_seed(0)
    model = RWKV(PRESETS["nestling"])
    batch, ctx = (1, 32) if quick else (8, 512)
    ids = torch.randint(0, model.config.vocab_size, (batch, ctx + 1), generator=random)

    def step(backend: str) -> None:
        with wkv_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model(ids[:, :-1])[0], ids[:, 1:])[0]
        loss.backward()
        model.zero_grad()

    times = alternate({b: partial(step, b) for b in ("native", "chunked")}, rounds=rounds)
    return row("training step of nestling's sizes", threads, batch * ctx * model.config.n_head, times)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="native WKV against chunked and a loop in ggml's order")
    parser.add_argument("--quick", action="store_true", help="T=64, H=2, K=32: does it run, not how fast")
    parser.add_argument("--out", help="JSON file; standard output without it")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    options = parser.parse_args()
    shape, rounds = ((64, 2, 32), 2) if options.quick else ((512, 16, 64), options.rounds)
    rows: list[dict[str, Any]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows += operator(*shape, rounds, threads)
    rows.append(two_threads(*shape, rounds))
    rows.append(training(options.quick, max(2, rounds // 3), 2))
    write("wkv_native", rows, options.out)


if __name__ == "__main__":
    main()
