"""Claims about the speed of training, as ratios in one run on one machine (variants in turn, medians).

    wkv     forward and backward of Finch L4 D256, vocabulary 256, T = 512, B = 8: the native WKV against the same model
            on the recurrence in torch with autograd (>= 8x, goal 10x; fp32) and on the chunked torch WKV in
            circulation (>= 1.7x fp32, >= 2x bf16), with our products of matrices and with torch's, which is what
            others run; with blocks compiled besides
    gpt     Finch and Eagle against a GPT of the same size (SDPA, same optimiser and vocabulary), T = 512 (>= 0.9x) and
            T = 4096 (>= 1.5x), fp32 and bf16: forward and backward, and the whole step with clipping and AdamW
    share   how much of a step is WKV (<= 25 %)
    memory  peak memory of a process that makes one step, T = 512 to 8192 with 8192 tokens (within 10 %)
    mfu     finch-0.1b in bf16: tokens/s and the share of the measured peak, eager and compiled (what a GPU is for)

    python benchmarks/train.py [PART ...] [--quick] [--out FILE] [--threads N] [--rounds N] [--device D]

bf16 is autocast over fp32 weights, as in the trainer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, write
from rivals import GPT, clamped_wkv
from torch import Tensor, nn

from roost.config import PRESETS, ModelConfig
from roost.data.batch import Batch
from roost.models.rwkv import RWKV
from roost.ops import product, wkv_around, wkv_backend
from roost.training.blocks import prepared
from roost.training.config import TrainConfig
from roost.training.heap import keep_freed_memory
from roost.training.loss import next_token_sums
from roost.training.metrics import flops_per_token, measured_peak, memory
from roost.training.optim import optimiser

PARTS = ("wkv", "gpt", "share", "memory", "mfu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = TrainConfig(steps=1)


class Trainee:
    """A model with its optimiser, a batch, and the two things that are timed."""

    def __init__(self, model: nn.Module, batch: Batch, precision: str) -> None:
        self.model, self.batch, self.precision = model, batch, precision
        self.adam = optimiser(model, CONFIG)

    def loss(self) -> Tensor:
        """Mean cross-entropy, with L2Wrap for RWKV."""
        with torch.autocast(self.batch.inputs.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            if isinstance(self.model, RWKV):
                return next_token_sums(self.model, self.batch, l2wrap=1e-4).loss / self.batch.targets.numel()
            logits = self.model(self.batch.inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), self.batch.targets.flatten())

    def forward_backward(self) -> Tensor:
        """Fresh gradients of the loss; returns it."""
        self.adam.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Forward, backward, clipping, AdamW."""
        self.forward_backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CONFIG.clip)
        self.adam.step()


def batch(config: ModelConfig, B: int, T: int, device: str) -> Batch:
    """Random tokens."""
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def shaken(config: ModelConfig, device: str) -> RWKV:
    """Fresh weights, but no output matrix of zeros, behind which every gradient is zero."""
    model = RWKV(config, device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@contextmanager
def recurrence(name: str) -> Generator[None, None, None]:
    """Every WKV call inside by this variant: a backend of ours, "clamped 16" (fp32) or "clamped 128" (fp64 factors);
    with ", torch's products" after it, also every product with a matrix by torch, as in other trainers."""
    name, _, products = name.partition(", ")
    ours, product.ONEDNN = product.ONEDNN, product.ONEDNN and not products
    try:
        if name.startswith("clamped"):
            chunk = int(name.split()[1])
            with wkv_around(partial(clamped_wkv, chunk=chunk, exact=chunk > 24)):
                yield
        else:
            with wkv_backend(name):
                yield
    finally:
        product.ONEDNN = ours


def speeds(times: dict[str, dict[str, float]], tokens: int) -> dict[str, Any]:
    """Seconds of every variant, and tokens per second of its median."""
    return {"tokens_per_second": {name: round(tokens / t["median_s"]) for name, t in times.items()}, "times": times}


def differences(trainee: Trainee, variants: list[str]) -> dict[str, float]:
    """Relative L2 distance of all gradients from those of the first variant."""
    found: dict[str, Tensor] = {}
    for name in variants:
        with recurrence(name):
            trainee.forward_backward()
        gradients = [p.grad for p in trainee.model.parameters() if p.grad is not None]
        found[name] = torch.cat([g.flatten().double() for g in gradients])
    first = found[variants[0]]
    return {name: float((g - first).norm() / first.norm()) for name, g in found.items()}


def measure_wkv(B: int, T: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row a precision: native against the recurrence and the chunked form in circulation."""
    config, rows = ModelConfig("finch", 4, 256, vocab_size=256), []
    for precision, bound in (("fp32", 1e-4), ("bf16", 5e-2)):
        trainee = Trainee(shaken(config, device), batch(config, B, T, device), precision)
        ours = "native" if device == "cpu" else "chunked"
        others = ["clamped 16", f"clamped {min(T, 128)}"]
        plain = [f"{name}, torch's products" for name in (*others, "reference")]
        variants = [ours, *others, "reference"]
        apart = differences(Trainee(trainee.model, batch(config, 1, min(T, 128), device), precision), variants)
        if not max(apart.values()) < bound:
            raise SystemExit(f"{precision}: the gradients differ: {apart}; there is nothing to time")

        def run(name: str, trainee: Trainee = trainee) -> None:
            with recurrence(name):
                trainee.forward_backward()

        compiled = Trainee(shaken(config, device), trainee.batch, precision)
        calls: dict[str, Callable[[], object]] = {name: partial(run, name) for name in (ours, *others, *plain[:2])}
        with prepared(compiled.model, replace(CONFIG, compile=True)):  # pyright: ignore[reportArgumentType]
            calls = {**calls, f"{ours}, blocks compiled": compiled.forward_backward}
            fast = alternate(calls, rounds=rounds, sync=waiter(device))
        slow = alternate(
            {n: partial(run, n) for n in (ours, "reference", plain[2])}, rounds=min(rounds, 3), sync=waiter(device)
        )
        rival, plainly = (min(fast[name]["median_s"] for name in names) for names in (others, plain[:2]))
        rows.append(
            {
                "part": "wkv", "precision": precision, "B": B, "T": T, "parameters": config.parameters,
                **speeds({**fast, **{n: slow[n] for n in ("reference", plain[2])}}, B * T), "gradients_apart": apart,
                "over_recurrence": round(slow["reference"]["median_s"] / slow[ours]["median_s"], 2),
                "over_recurrence_with_torchs_products": round(slow[plain[2]]["median_s"] / slow[ours]["median_s"], 2),
                "over_chunked_in_circulation": round(rival / fast[ours]["median_s"], 2),
                "over_chunked_with_torchs_products": round(plainly / fast[ours]["median_s"], 2),
                "compiled_over_chunked_in_circulation": round(
                    rival / fast[f"{ours}, blocks compiled"]["median_s"], 2
                ),
            }
        )  # fmt: skip
    return rows


def measure_gpt(tokens: int, contexts: tuple[int, ...], rounds: int, device: str) -> list[dict[str, Any]]:
    """One row for each precision, context and pass: Eagle and Finch against the GPTs of their sizes."""
    rows: list[dict[str, Any]] = []
    for precision in DTYPES:
        for T in contexts:
            trainees: dict[str, Trainee] = {}
            for generation in ("finch", "eagle"):
                config = ModelConfig(generation, 4, 256, vocab_size=256)  # pyright: ignore[reportArgumentType]
                data = batch(config, tokens // T, T, device)
                gpt = GPT(config, T).to(device)
                assert abs(sum(p.numel() for p in gpt.parameters()) / config.parameters - 1) < 0.005
                trainees[generation] = Trainee(shaken(config, device), data, precision)
                trainees[f"gpt of {generation}'s size"] = Trainee(gpt, data, precision)
            for name in ("forward_backward", "step"):
                calls: dict[str, Callable[[], object]] = {who: getattr(t, name) for who, t in trainees.items()}
                times = alternate(calls, rounds=rounds, sync=waiter(device))
                medians = {who: t["median_s"] for who, t in times.items()}
                rows.append(
                    {
                        "part": "gpt", "precision": precision, "T": T, "B": tokens // T, "pass": name,
                        **speeds(times, tokens),
                        **{f"{g}_over_gpt": round(medians[f"gpt of {g}'s size"] / medians[g], 2)
                           for g in ("finch", "eagle")},
                    }
                )  # fmt: skip
    return rows


def measure_share(tokens: int, T: int, steps: int) -> list[dict[str, Any]]:
    """Time inside the operator (forward and backward, its registration included) over the whole step, by the profiler;
    and the operations that take longest."""
    from torch.profiler import ProfilerActivity, profile

    rows: list[dict[str, Any]] = []
    for generation in ("finch", "eagle"):
        for precision in DTYPES:
            config = ModelConfig(generation, 4, 256, vocab_size=256)  # pyright: ignore[reportArgumentType]
            trainee = Trainee(shaken(config, "cpu"), batch(config, tokens // T, T, "cpu"), precision)
            trainee.step()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(steps):
                    with torch.profiler.record_function("the whole step"):
                        trainee.step()
            events = {event.key: event for event in profiled.key_averages()}
            whole = events["the whole step"].cpu_time_total
            inside = sum(event.cpu_time_total for key, event in events.items() if key in OPERATORS)
            longest = sorted(events.values(), key=lambda event: -event.self_cpu_time_total)[:16]
            shares = {event.key: round(event.self_cpu_time_total / whole, 4) for event in longest}
            row = {
                "part": "share",
                "model": generation,
                "precision": precision,
                "T": T,
                "share": round(inside / whole, 4),
            }
            rows.append({**row, "longest": shares})
    return rows


OPERATORS = ("roost::wkv_native", "roost::wkv_native_backward")
ONE_STEP = """
import sys; sys.path.insert(0, {folder!r})
from pathlib import Path
import torch, train
torch.set_num_threads({threads})
train.keep_freed_memory()
config = train.ModelConfig({generation!r}, 4, 256, vocab_size=256)
trainee = train.Trainee(train.shaken(config, "cpu"), train.batch(config, {B}, {T}, "cpu"), {precision!r})
trainee.step()
lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would begin at the peak of the parent
print(*(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def measure_memory(tokens: int, contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak bytes of a fresh process after its first step, for every context; the least and the most compared."""
    rows: list[dict[str, Any]] = []
    for generation in ("finch", "eagle"):
        for precision in DTYPES:
            peaks: dict[int, int] = {}
            for T in contexts:
                code = ONE_STEP.format(
                    folder=sys.path[0], threads=torch.get_num_threads(), generation=generation, B=tokens // T, T=T,
                    precision=precision,
                )  # fmt: skip
                done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
                peaks[T] = int(done.stdout)
            spread = max(peaks.values()) / min(peaks.values()) - 1
            row = {"part": "memory", "model": generation, "precision": precision, "tokens": tokens}
            rows.append({**row, "peak_bytes": peaks, "spread": round(spread, 4)})
    return rows


def measure_mfu(preset: str, B: int, T: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Tokens/s of a bf16 step, and FLOP/s over what a large product reaches, eager and compiled block by block."""
    config, rows = PRESETS[preset], []
    peak = measured_peak(torch.device(device), torch.bfloat16)
    for compiled in (False, True):
        trainee = Trainee(shaken(config, device), batch(config, B, T, device), "bf16")
        with prepared(trainee.model, replace(CONFIG, compile=compiled)):  # pyright: ignore[reportArgumentType]
            trainee.step()
            trainee.step()  # optimiser states exist from here on
            times = alternate({"step": trainee.step}, rounds=rounds, sync=waiter(device))
        speed = B * T / times["step"]["median_s"]
        row = {"part": "mfu", "model": preset, "B": B, "T": T, "compiled": compiled, **speeds(times, B * T)}
        reached = speed * flops_per_token(config)
        used = {"peak_flops": round(peak), "mfu": round(reached / peak, 4), "bytes": memory(torch.device(device))}
        rows.append({**row, "flops_per_second": round(reached), **used})
    return rows


def waiter(device: str) -> Callable[[], object]:
    """What to call before the clock is read."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="the speed of training")
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; all but mfu without any"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    parser.add_argument("--out", help="JSON file; standard output without it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (there: mfu)")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    keep_freed_memory()  # as `roost train` does
    parts, rounds = o.parts or (PARTS[:4] if o.device == "cpu" else PARTS[4:]), 1 if o.quick else o.rounds
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "wkv": lambda: measure_wkv(*((1, 32) if o.quick else (8, 512)), rounds, o.device),
        "gpt": lambda: measure_gpt(*((64, (32, 64)) if o.quick else (4096, (512, 4096))), rounds, o.device),
        "share": lambda: measure_share(*((64, 32, 1) if o.quick else (4096, 512, 5))),
        "memory": lambda: measure_memory(*((64, (32, 64)) if o.quick else (8192, (512, 1024, 2048, 4096, 8192)))),
        "mfu": lambda: measure_mfu(*(("finch-tiny", 1, 32) if o.quick else ("finch-0.1b", 8, 1024)), rounds, o.device),
    }
    write("train", [row for part in parts for row in measures[part]()], o.out)


if __name__ == "__main__":
    main()
