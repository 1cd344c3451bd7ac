"""The verbs of training: a run, its plan, its curves.

Owns: what is printed about a run, and how the processes of torchrun become its ranks.
Refuses to know: recipes and the loop (roost.training).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roost.cli import terminal

if TYPE_CHECKING:
    from roost.models.rwkv import RWKV
    from roost.training.loop import Progress
    from roost.training.reducer import Reducer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `roost train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    what = "a key of the recipe, overruled; may repeat"
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help=what)
    parser.add_argument("--plan", action="store_true", help="only say what the run would take, on paper")
    what = "with --plan: the devices that share the batch"
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help=what)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    ranks = parser.add_mutually_exclusive_group()
    what = "under torchrun: every process holds a share of the model (FSDP2), not all of it"
    ranks.add_argument("--shard", action="store_true", help=what)
    what = "under torchrun: every process reads a part of the time of all rows (context parallelism)"
    ranks.add_argument("--context", action="store_true", help=what)
    parser.epilog = (
        "Several devices: torchrun --nproc-per-node N --max-restarts 3 -m roost train RECIPE --resume. With --resume a"
        " run whose process was lost goes on from its newest checkpoint when torchrun starts it again."
    )


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `roost plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run, or its log")
    parser.add_argument("-o", "--out", default="curves.png", metavar="FILE", help="default: curves.png")


def train(args: argparse.Namespace) -> int:
    """Train as a recipe says, or with --plan say what that would take."""
    from roost.training.guards import Interrupted
    from roost.training.heap import keep_freed_memory
    from roost.training.recipe import run_recipe

    overrides = _overrides(args.set or ())
    if args.plan:
        return _plan(args.recipe, overrides, args.device, args.ranks)
    if args.ranks != 1:
        raise ValueError(f"--ranks {args.ranks} goes with --plan; a run's ranks are torchrun's: --nproc-per-node N")
    keep_freed_memory()
    kind = "shard" if args.shard else "context" if args.context else ""
    with _ranks(args.device, kind) as (device, main, reduce), terminal.training(quiet=not main) as show:
        view = View(show)
        several: dict[str, Any] = {"reduce": reduce} if reduce else {}
        if main:
            several["notice"] = partial(print, file=sys.stderr)
        try:
            final = run_recipe(args.recipe, overrides, resume=args.resume, device=device, progress=view, **several)
        except Interrupted as stopped:
            print(f"roost: {stopped}", file=sys.stderr)
            return 128 + stopped.signum
    if main:
        print(f"wrote {final}{view.last}")
    return 0


class View:
    """What is shown of a run while it goes on: its last figures, and the last loss of the first held-out streams."""

    def __init__(self, show: Callable[[int, int, str, str], None]) -> None:
        self.show, self.figures, self.last, self.held = show, "", "", dict[str, str]()

    def __call__(self, at: Progress) -> None:
        line = at.line
        if "warning" in line:
            text = f"warning: {line['warning']}"
        elif "validation" in line:
            text = self.held[line["validation"]] = f"{line['validation']} {line['loss']:.4f}"
        elif "loss" in line:
            norm = f"  norm {line['gradient_norm']:.3g}" if "gradient_norm" in line else ""
            speed = f"  {line['tokens_per_second']:,.0f} tokens/s"
            text = self.figures = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}{norm}{speed}"
            self.last = f" after step {at.step}, loss {line['loss']:.4f}"
        else:  # a sample: it is in the log
            text = ""
        self.show(at.step, at.steps, "  ".join([self.figures, *list(self.held.values())[:2]]), text)


def plot(args: argparse.Namespace) -> int:
    """Draw the curves of runs."""
    from roost.training.plot import plot as draw

    terminal.check_writable(args.out)
    draw(args.runs, args.out)
    print(f"wrote {Path(args.out)}")
    return 0


def _plan(recipe: str, overrides: dict[str, Any], device: str, ranks: int) -> int:
    from roost.training.plan import plan, scale_table
    from roost.training.recipe import read_recipe

    lines = plan(read_recipe(recipe, overrides), device, ranks)
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        print(f"{what:<{width}}  {value}")
    rows = scale_table()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("\nper device, bf16 with recomputation, 4,096 tokens each:")
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return 0


@contextmanager
def _ranks(device: str, kind: str) -> Generator[tuple[Any, bool, Callable[[RWKV], Reducer] | None], None, None]:
    """(device, whether this process speaks, what makes the ranks); alone unless torchrun started this process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        if kind:
            raise ValueError(f"--{kind} is for several processes: torchrun --nproc-per-node N -m roost train RECIPE")
        yield device, True, None
        return
    from roost.training.context_parallel import context_parallel
    from roost.training.distributed import DataParallel, Sharded, process_group

    with process_group(device.partition(":")[0]) as own, ExitStack() as entered:

        def along_time(model: RWKV) -> Reducer:
            return entered.enter_context(context_parallel(model))

        yield own, dist.get_rank() == 0, {"": DataParallel, "shard": Sharded, "context": along_time}[kind]


def _overrides(settings: list[str] | tuple[()]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} must be of the form KEY=VALUE")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value  # a bare word is a string
    return overrides
