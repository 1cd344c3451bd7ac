"""The verbs of training: a run, its plan, its curves.

Owns: what is printed about a run, and how the processes of torchrun become its ranks.
Refuses to know: recipes and the loop (roost.training).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roost.cli import terminal

if TYPE_CHECKING:
    from roost.models.rwkv import RWKV
    from roost.training.reducer import Reducer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `roost train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a .toml file")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    what = "a key of the recipe, overruled; may repeat"
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help=what)
    parser.add_argument("--plan", action="store_true", help="only say what the run would take, on paper")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    what = "under torchrun: every process holds a share of the model (FSDP2), not all of it"
    parser.add_argument("--shard", action="store_true", help=what)


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `roost plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run, or its log")
    parser.add_argument("-o", "--out", default="curves.png", metavar="FILE", help="default: curves.png")


def train(args: argparse.Namespace) -> int:
    """Train as a recipe says, or with --plan say what that would take."""
    from roost.training.guards import Interrupted
    from roost.training.heap import keep_freed_memory
    from roost.training.loop import Progress
    from roost.training.recipe import run_recipe

    overrides = _overrides(args.set or ())
    if args.plan:
        return _plan(args.recipe, overrides, args.device)
    keep_freed_memory()
    last = ""
    with _ranks(args.device, shard=args.shard) as (device, main, reduce), terminal.training() as show:

        def progress(at: Progress) -> None:
            nonlocal last
            last = f" after step {at.step}, loss {at.loss:.4f}"
            if main:
                show(at.step, at.steps, at.loss, at.tokens_per_second)

        several: dict[str, Any] = {"reduce": reduce} if reduce else {}
        try:
            final = run_recipe(args.recipe, overrides, resume=args.resume, device=device, progress=progress, **several)
        except Interrupted as stopped:
            print(f"roost: {stopped}", file=sys.stderr)
            return 128 + stopped.signum
    if main:
        print(f"wrote {final}{last}")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw the curves of runs."""
    from roost.training.plot import plot as draw

    terminal.check_writable(args.out)
    draw(args.runs, args.out)
    print(f"wrote {Path(args.out)}")
    return 0


def _plan(recipe: str, overrides: dict[str, Any], device: str) -> int:
    from roost.training.plan import plan, scale_table
    from roost.training.recipe import read_recipe

    lines = plan(read_recipe(recipe, overrides), device)
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
def _ranks(device: str, *, shard: bool) -> Generator[tuple[Any, bool, Callable[[RWKV], Reducer] | None], None, None]:
    """(device, whether this process speaks, what makes the ranks); alone unless torchrun started this process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        if shard:
            raise ValueError("--shard is for several processes: torchrun --nproc-per-node N -m roost train RECIPE")
        yield device, True, None
        return
    from roost.training.distributed import DataParallel, Sharded, process_group

    with process_group(device.partition(":")[0]) as own:
        yield own, dist.get_rank() == 0, Sharded if shard else DataParallel


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
