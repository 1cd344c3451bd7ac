"""Claim: eager chunked WKV, forward and backward, is at least 10x faster than the reference with autograd.

Setting of the claim: B=4, T=512, H=8, K=64, fp32. Finch decays (B,T,H,K) spread over what trained models use; Eagle
decays (H,K). Both variants see the same tensors; their outputs and gradients are compared before anything is timed.

    python benchmarks/wkv.py [--quick] [--out FILE] [--threads N] [--rounds N] [--device D]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from common import alternate, write
from torch import Tensor

from roost.ops import wkv, wkv_backend

Generation = Literal["eagle", "finch"]


def inputs(generation: Generation, B: int, T: int, H: int, K: int, device: str) -> list[Tensor]:
    """r, k, v (B,T,H,K), log_w, u (H,K) and the state (B,H,K,K), all fp32 leaves that require gradients."""
    random = torch.Generator().manual_seed(0)
    shape = (B, T, H, K)
    r, k, v = (torch.randn(shape, generator=random) for _ in range(3))
    x = torch.randn((H, K) if generation == "eagle" else shape, generator=random) * 2 - 3  # log_w = -exp(x)
    u, state = torch.randn(H, K, generator=random), torch.randn(B, H, K, K, generator=random)
    return [tensor.to(device).requires_grad_() for tensor in (r, k, v, -x.exp(), u, state)]


def forward(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Output and state, without keeping anything for a backward pass."""
    with torch.no_grad(), wkv_backend(backend):
        return wkv(*tensors)


def forward_backward(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the sum of output and state with respect to all six inputs."""
    with wkv_backend(backend):
        out, state = wkv(*tensors)
    return torch.autograd.grad(out.sum() + state.sum(), tensors)


def difference(run: Callable[[str, list[Tensor]], tuple[Tensor, ...]], tensors: list[Tensor]) -> float:
    """Largest relative L2 distance between what the two backends return."""
    pairs = zip(run("chunked", tensors), run("reference", tensors), strict=True)
    return max(float(((a - b).square().sum() / b.square().sum()).sqrt()) for a, b in pairs)


def measure(generation: Generation, B: int, T: int, H: int, K: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row for the forward pass, one for forward and backward."""
    tensors = inputs(generation, B, T, H, K, device)
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    rows: list[dict[str, Any]] = []
    for name, run in (("forward", forward), ("forward_backward", forward_backward)):
        error = difference(run, tensors)
        if not error < 1e-4:
            raise SystemExit(f"{generation} {name}: the backends differ by {error:.1e}; there is nothing to time")
        times = alternate({b: partial(run, b, tensors) for b in ("chunked", "reference")}, rounds=rounds, sync=sync)
        speedup = times["reference"]["median_s"] / times["chunked"]["median_s"]
        shape = {"B": B, "T": T, "H": H, "K": K, "device": device}
        rows.append(
            {
                "generation": generation,
                "pass": name,
                **shape,
                **times,
                "speedup": round(speedup, 2),
                "difference": error,
            }
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="chunked WKV against the reference")
    parser.add_argument("--quick", action="store_true", help="B=1, T=64, H=2, K=32: does it run, not how fast")
    parser.add_argument("--out", help="JSON file; standard output without it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (1, 64, 2, 32) if options.quick else (4, 512, 8, 64)
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    generations: tuple[Generation, ...] = ("finch", "eagle")
    write("wkv", [row for g in generations for row in measure(g, *shape, options.device, rounds)], options.out)


if __name__ == "__main__":
    main()
