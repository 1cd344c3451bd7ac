"""What the tests of several ranks run, in a process of its own: `python ranks.py CASE DIRECTORY`.

The process imports torch once and forks two ranks, which takes seconds where torchrun takes many. Every case trains or
reads on them and compares with one process, for Eagle and Finch. A failing assertion on any rank ends the process with
1 and its traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from roost.data.batch import Batch, check_parts
from roost.data.pairs import PairLoader, Reference, read_pairs
from roost.data.sft import packed_batch
from roost.models.rwkv import RWKV
from roost.ops import wkv
from roost.tokenizer import WorldTokenizer
from roost.training.adapter_config import AdapterConfig
from roost.training.adapters import prepare_model
from roost.training.config import TrainConfig
from roost.training.context_parallel import context_parallel, scanned_wkv, time_share
from roost.training.distributed import DataParallel, Sharded, process_group
from roost.training.dpo import Dpo, answer_logprobs, reference_logprobs
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


def made(name: str, adapter: str, seed: int = 0) -> tuple[RWKV, Callable[[Path], Path] | None]:
    """A model, with "lora", "dora" or frozen parts ("full") where asked, and what writes the result."""
    model = tiny_model(name, seed=seed)
    if not adapter:
        return model, None
    keys = {"freeze": ("emb", "blocks.0")} if adapter == "full" else {"rank": 4}
    return model, prepare_model(model, AdapterConfig(adapter=adapter, **keys), seed=seed).save_final


def alone(name: str, out: Path, adapter: str = "") -> tuple[list[float], dict[str, Tensor]]:
    """The run of one process, made on every rank."""
    own = out / f"alone-{dist.get_rank()}"
    model, save_final = made(name, adapter)
    final = train(model, Noise(), config(own), save_final=save_final)
    return losses(own), tensors_of(final)


def tensors_of(final: Path) -> dict[str, Tensor]:
    """What a run has written."""
    return dict(load_file(final))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp(min=1e-2), name


def close(found: list[float], wanted: list[float]) -> None:
    assert len(found) == len(wanted) and all(abs(a - b) < 5e-6 * b for a, b in zip(found, wanted, strict=True)), found


def together(
    name: str, out: Path, reducer: Callable[[RWKV], Reducer], accumulate: int = 1, seed: int = 0, adapter: str = ""
) -> None:
    """A run of two ranks makes the steps of one process; interrupted and resumed, it goes on."""
    wanted, weights = alone(name, out / "alone", adapter)
    shared = out / "shared"
    model, save_final = made(name, adapter, seed)
    numbers = {"accumulate": accumulate}
    try:
        train(model, Noise(broken=3), config(shared, **numbers), save_final=save_final, reduce=reducer(model))
    except RuntimeError as error:
        assert str(error) == "the data fails"
    if dist.get_rank() == 0:
        shutil.copytree(shared, out / "half")
    model, save_final = made(name, adapter, seed)  # of two seeds: a run goes on from its checkpoint, replicas are equal
    reduce, run = reducer(model), config(shared, **numbers)
    final = train(model, Noise(), run, save_final=save_final, reduce=reduce, resume=True)
    close(losses(shared), wanted)
    same(tensors_of(final), weights)


def replicas(out: Path) -> None:
    for name, adapter in zip(MODELS, ("", "lora"), strict=True):
        together(name, out / name, DataParallel, accumulate=2, seed=dist.get_rank(), adapter=adapter)
    refusals(out)
    references(out)
    figures(out)


def one_replica(out: Path) -> None:
    """What two ranks have begun, one process without ranks finishes."""
    model = tiny_model(MODELS[0], seed=5)
    finished(out / MODELS[0], train(model, Noise(), config(out / MODELS[0] / "half", accumulate=4), resume=True))


def finished(out: Path, final: Path) -> None:
    close(losses(final.parent), losses(out / "alone/alone-0"))
    same(tensors_of(final), tensors_of(out / "alone/alone-0" / final.name))


def refusals(out: Path) -> None:
    """Whatever fails on rank 0 fails everywhere, and no rank waits; ranks that see different files are refused."""
    rank, model = dist.get_rank(), tiny_model()
    ranks = DataParallel(model)
    for error, kind in ((OSError("full"), OSError), (ValueError("gone"), ValueError), (KeyError("odd"), Exception)):

        def failing(error: Exception = error) -> Path:
            raise error

        try:
            ranks.on_main(failing)
        except kind as raised:
            assert error.args[0] in str(raised), raised
        else:
            raise AssertionError(f"rank {rank} goes on")
    assert ranks.on_main(lambda: out) == out
    for kind, ending in ((DataParallel, "pt"), (Sharded, "dcp")):
        own = out / f"disk-{ending}-{rank}"  # of a node that shares nothing
        own.mkdir()
        if rank == 0:
            (own / f"step-7.{ending}").touch()
        try:
            train(model, Noise(), config(own), reduce=kind(model), resume=True)
        except ValueError as error:
            assert "out must be on a file system that all ranks share" in str(error), error
        else:
            raise AssertionError(f"rank {rank} starts anew")


def references(out: Path) -> None:
    """Each rank computes a share of DPO's reference, all have the whole, and one writes it."""
    rank, model = dist.get_rank(), tiny_model()
    lines = [json.dumps({"prompt": f"q{i}", "chosen": "yes" * (i + 1), "rejected": "no"}) for i in range(5)]
    (out / f"pairs-{rank}.jsonl").write_text("\n".join(lines))
    pairs = read_pairs([out / f"pairs-{rank}.jsonl"], WorldTokenizer.byte_level(), 64)
    read: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    found = reference_logprobs(model, pairs, out / f"reference-{rank}", tokens=64).logprobs
    dist.barrier()
    assert sum(read) < 0.7 * sum(pairs.lengths.tolist()), read
    assert [path.name for path in out.glob("reference-*")] == ["reference-0"]
    with torch.no_grad():
        for i in range(len(pairs)):
            wanted = answer_logprobs(model, packed_batch(pairs, [i]))
            assert abs(found[i] - float(wanted)) < 1e-5 * abs(float(wanted)), i


def figures(out: Path) -> None:
    """Those of DPO are of the pairs of all ranks, and so is the largest of a count."""
    rank, model = dist.get_rank(), tiny_model()
    ranks = DataParallel(model)
    assert ranks.max_counts(2 * rank) == 2
    pairs = read_pairs([out / f"pairs-{rank}.jsonl"], WorldTokenizer.byte_level(), 64)
    values = np.linspace(-20, 0, len(pairs), dtype=np.float32)
    loader, whole, share = PairLoader(pairs, Reference(values, ""), 4), Dpo(), Dpo()
    with torch.no_grad():
        whole(model, loader.batch_at(0))
        share(model, loader.batch_at(0, rank, 2))
    found, wanted = share.figures(ranks.sum_values), whole.figures()
    assert wanted["reward_margin"] and all(abs(found[key] - wanted[key]) <= 1e-5 * abs(wanted[key]) for key in wanted)


def sharded(out: Path) -> None:
    for name in MODELS:
        together(name, out / name, Sharded)
        kept = sorted(path.name for path in (out / name / "shared").glob("step-*"))
        assert kept == ["step-2.dcp"], kept
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    together(MODELS[0], out / "lora", Sharded, adapter="lora")
    together(MODELS[1], out / "dora", Sharded, adapter="dora")
    together(MODELS[1], out / "freeze", partial(Sharded, mesh=mesh, reshard=False), adapter="full")
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
    if dist.get_rank() == 0:  # one process at a time writes there
        try:
            train(tiny_model(), Noise(), config(out / MODELS[1] / "shared"), resume=True)
        except ValueError as error:
            assert "holds a sharded run" in str(error)
        else:
            raise AssertionError("a sharded run was resumed unsharded")


def one_shard(out: Path) -> None:
    """What two ranks have begun, one rank finishes."""
    for name in MODELS:
        model = tiny_model(name, seed=5)
        run = config(out / name / "half")
        finished(out / name, train(model, Noise(), run, reduce=Sharded(model), resume=True))


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
        with context_parallel(model) as reducer:
            mine = next_token_sums(model, time_share(rows, rank, ranks), 1e-2)
            (mine.loss / sums.count).backward()
        reducer.reduce_gradients(model.parameters())
        same({n: p.grad for n, p in model.named_parameters()}, wanted, 2e-6)
        losses_alone, weights = alone(name, out / name)
        model = tiny_model(name)
        with context_parallel(model) as reducer:
            run = config(out / name / "cut", recompute=True, accumulate=2)
            train(model, Noise(), run, reduce=reducer)
        close(losses(out / name / "cut"), losses_alone)
        same(dict(model.state_dict()), weights)


def fork_ranks(work: Callable[[], None], ranks: int) -> bool:
    """Run `work` in `ranks` forked processes whose surroundings are those torchrun gives; whether all came to the end.

    Only for a process of its own that has started no threads.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(WORLD_SIZE=str(ranks), TORCHELASTIC_RUN_ID="test")
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
    ends = [os.waitpid(child, 0)[1] for child in children]
    return not any(ends)


def main() -> None:
    case, out = sys.argv[1:]
    torch.set_num_threads(1)

    cases = {"replicas": (replicas, one_replica), "sharded": (sharded, one_shard), "context": (context,)}

    def work(part: Callable[[Path], None]) -> None:
        with process_group("cpu"):
            part(Path(out))

    sys.exit(0 if all(fork_ranks(partial(work, part), 2 - i) for i, part in enumerate(cases[case])) else 1)


if __name__ == "__main__":
    main()
