"""What the tests of several ranks run, in a process of its own: `python ranks.py CASE DIRECTORY`.

The process imports torch once and forks two ranks, which takes seconds where torchrun takes many. Every case trains or
reads on them and compares with one process, for Eagle and Finch. A failing assertion on any rank ends the process with
1 and its traceback.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from roost.checkpoint import load
from roost.data.batch import Batch, check_parts
from roost.models.rwkv import RWKV
from roost.ops import wkv
from roost.training.config import TrainConfig
from roost.training.context_parallel import TimeShares, context_parallel, scanned_wkv, time_share
from roost.training.distributed import DataParallel, Sharded, process_group
from roost.training.loop import train
from roost.training.loss import next_token_sums
from roost.training.reducer import Reducer
from tiny import tiny_model

MODELS = ("eagle-tiny", "finch-tiny")


class Noise:
    """Random tokens, with unequal numbers of targets in the rows; at step `broken` the data fails."""

    identity: Mapping[str, int | str] = {"data": "noise"}

    def __init__(self, broken: int = -1, length: int = 33) -> None:
        self.broken, self.length = broken, length

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        if step == self.broken:
            raise RuntimeError("the data fails")
        ids = torch.randint(0, 257, (4, self.length + 1), generator=torch.Generator().manual_seed(step))
        targets = ids[:, 1:].clone()
        targets[:2, :20] = -1
        check_parts("rows", 4, parts, part)
        return Batch(ids[:, :-1], targets).split(parts)[part]


def config(out: Path, **numbers: object) -> TrainConfig:
    values = {"steps": 4, "out": str(out), "lr": 1e-3, "eps": 1e-4, "clip": 0.5, "log_every": 1, "peak_flops": 1.0}
    return TrainConfig(**{**values, "save_every": 2, **numbers})


def losses(out: Path) -> list[float]:
    """Loss and gradient norm of every step, in turn."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "gradient_norm")]


def alone(name: str, out: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The run of one process, made on every rank."""
    own = out / f"alone-{dist.get_rank()}"
    model = tiny_model(name)
    train(model, Noise(), config(own))
    return losses(own), dict(model.state_dict())


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp(min=1e-2), name


def close(found: list[float], wanted: list[float]) -> None:
    assert len(found) == len(wanted) and all(abs(a - b) < 5e-6 * b for a, b in zip(found, wanted, strict=True)), found


def together(name: str, out: Path, reducer: Callable[[RWKV], Reducer], accumulate: int = 1, seed: int = 0) -> None:
    """A run of two ranks makes the steps of one process; interrupted and resumed, it goes on."""
    wanted, weights = alone(name, out / "alone")
    shared = out / "shared"
    model = tiny_model(name, seed=seed)
    try:
        train(model, Noise(broken=3), config(shared, accumulate=accumulate), reduce=reducer(model))
    except RuntimeError as error:
        assert str(error) == "the data fails"
    model = tiny_model(name, seed=seed)  # of two seeds: a run goes on from its checkpoint, and replicas begin equal
    final = train(model, Noise(), config(shared, accumulate=accumulate), reduce=reducer(model), resume=True)
    close(losses(shared), wanted)
    same(dict(load(final)[0].state_dict()), weights)


def replicas(out: Path) -> None:
    for name in MODELS:
        together(name, out / name, DataParallel, accumulate=2, seed=dist.get_rank())


def sharded(out: Path) -> None:
    for name in MODELS:
        together(name, out / name, Sharded)
        kept = sorted(path.name for path in (out / name / "shared").glob("step-*"))
        assert kept == ["step-2.dcp"], kept
    model = tiny_model()
    reducer = Sharded(model)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert abs(held - sum(p.numel() for p in model.parameters()) / 2) < 2000  # half of everything
    try:
        train(model, Noise(), config(out / MODELS[1] / "shared", lr=2e-3), reduce=reducer, resume=True)
    except ValueError as error:
        assert "was trained with lr = 0.001, not 0.002" in str(error)
    else:
        raise AssertionError("a resume changed lr")
    try:
        train(tiny_model(), Noise(), config(out / MODELS[1] / "shared"), resume=True)
    except ValueError as error:
        assert "holds a sharded run" in str(error)
    else:
        raise AssertionError("a sharded run was resumed unsharded")


def context(out: Path) -> None:
    """The scan in fp64 and every regime of decay, gradients of a model, and a run through the loop."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(1)
    B, T, H, K = 2, 23, 2, 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    for static in (False, True):
        for shift in (-6.0, 0.0, 4.0, None):
            log_w = -(draw(*((H, K) if static else (B, T, H, K))) + (shift or 0.0)).exp()
            if shift is None:
                log_w[..., ::3] = -torch.inf
                log_w[..., 1::3] = 0.0
            inputs = [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, K), log_w, draw(H, K), draw(B, H, K, K)]
            d_out, d_state = draw(B, T, H, K), draw(B, H, K, K)
            whole = [x.clone().requires_grad_() for x in inputs]
            y, after = wkv(*whole)
            wanted = torch.autograd.grad((y * d_out).sum() + (after * d_state).sum(), whole)
            part = slice(rank * T // ranks, (rank + 1) * T // ranks)
            own = [x.clone().requires_grad_() for x in inputs]
            cut = [x[:, part] if i < 3 or (i == 3 and not static) else x for i, x in enumerate(own)]
            y_part, last = scanned_wkv(None, *cut)
            objective = (y_part * d_out[:, part]).sum()
            if rank == ranks - 1:
                objective = objective + (last * d_state).sum()
                assert torch.allclose(last, after, 1e-12, 1e-12)
            assert torch.allclose(y_part, y[:, part], 1e-12, 1e-12)
            objective.backward()
            for x, gradient in zip(own, wanted, strict=True):
                total = torch.zeros_like(x) if x.grad is None else x.grad
                dist.all_reduce(total)
                assert torch.allclose(total, gradient, 1e-11, 1e-11), (static, shift)
    for name in MODELS:
        rows, model = Noise().batch_at(0), tiny_model(name)
        sums = next_token_sums(model, rows, 1e-2)
        (sums.loss / sums.count).backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        reducer = DataParallel(model)
        with context_parallel(model):
            mine = next_token_sums(model, time_share(rows, rank, ranks), 1e-2)
            (mine.loss / sums.count).backward()
        reducer.reduce_gradients(model.parameters())
        same({n: p.grad for n, p in model.named_parameters()}, wanted, 2e-6)
        losses_alone, weights = alone(name, out / name)
        model = tiny_model(name)
        with context_parallel(model):
            train(
                model,
                TimeShares(Noise(), ranks),
                config(out / name / "cut", recompute=True),
                reduce=DataParallel(model),
            )
        close(losses(out / name / "cut"), losses_alone)
        same(dict(model.state_dict()), weights)


def fork_ranks(work: Callable[[], None], ranks: int) -> None:
    """Run `work` in `ranks` forked processes whose surroundings are those torchrun gives; exits 1 when one fails.

    Only for a process of its own that has started no threads.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), TORCHELASTIC_RUN_ID="test")
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    children: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the other ranks find the connection closed
        sys.stdout.flush()
        os._exit(0)
    failed = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(1 if any(failed) else 0)


def main() -> None:
    case, out = sys.argv[1:]
    torch.set_num_threads(1)

    def work() -> None:
        with process_group("cpu"):
            {"replicas": replicas, "sharded": sharded, "context": context}[case](Path(out))

    fork_ranks(work, 2)


if __name__ == "__main__":
    main()
