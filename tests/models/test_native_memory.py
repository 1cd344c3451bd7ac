"""The CPU model's memory: what is kept, who frees it, what may be copied; and which weights decoding leaves out."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from roost import PRESETS, State, native
from roost.formats.packed import open_packed, pack
from roost.formats.panels import pack_matrix
from roost.formats.slots import WeightsFormat
from roost.models.native import NativeModel, PackedTensor, Recycled
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())


def build(weights: WeightsFormat = "int8") -> NativeModel:
    model = tiny_model()
    with TemporaryDirectory() as place:
        path = pack(model.state_dict(), model.config, Path(place) / "m.roost", weights_format=weights)
        return NativeModel(model.config, open_packed(path).tensors, threads=1)


def text(rows: int = 2, T: int = 40) -> torch.Tensor:
    return torch.randint(0, 257, (rows, T), generator=torch.Generator().manual_seed(3))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(
    not Path("/proc/self/statm").is_file() or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs Linux; ASan keeps what is freed",
)
def test_memory_that_is_kept_is_bounded() -> None:
    """Neither many answers at once nor large ones stay when they are gone; what stays serves the next ones.

    In a process of its own: what glibc gives back depends on the sizes that were freed before.
    """
    code = """
        import test_native_memory as own
        memory, before = own.Recycled(), own.resident()
        for size in range(24, 34):  # MiB: each too large for the half of the bound, of sizes that never come again
            memory.empty(size, 1 << 18).fill_(1)
        many = [memory.empty(4, 1 << 18).fill_(1) for _ in range(100)]
        del many
        for _ in range(6):
            memory.empty(96, 1 << 18).fill_(1)
        print(own.resident() - before, sum(block.memory.nbytes for block in memory._free))
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    grown, held = map(int, done.stdout.split())
    assert grown < 100 << 20
    assert 32 << 20 < held <= 64 << 20


def test_the_oldest_memory_is_given_up_and_the_rest_is_used_again() -> None:
    memory = Recycled(most=4 << 20)
    sizes = [1 << 18, 3 << 16, 1 << 18, 1 << 18]  # floats: 1, 3/4, 1 and 1 MiB
    first, second, third, fourth = tensors = [memory.empty(size) for size in sizes]
    places = [tensor.data_ptr() for tensor in tensors]
    del tensors, first, second, third, fourth
    again = [memory.empty(size) for size in sizes]
    assert sorted(tensor.data_ptr() for tensor in again) == sorted(places)
    del again[0]
    newest = memory.empty(1 << 19).data_ptr(), memory.empty(3 << 18).data_ptr()  # 2 and 3 MiB, free again at once
    assert [block.memory.ctypes.data for block in memory._free] == [newest[1]]
    assert memory.empty((1 << 20) + 1).shape == (1048577,) and len(memory._free) == 1  # too large to be kept


def test_no_live_tensor_shares_memory_with_an_answer() -> None:
    """Whatever refers to an answer keeps its memory: the tensor, a view, a row of a state, an array."""
    model = build()
    ids, kept = text(8, 20), list[tuple[Any, Any]]()
    state, addresses = None, set[int]()
    for turn in range(30):
        logits, state = model(ids[:, :20], state)
        addresses.add(logits.data_ptr())
        views: list[Any] = [
            logits[3, -1],
            state.layers[1].wkv[2:3],
            logits.numpy()[1],
            logits.mT,
            state.select(0).layers[0].wkv,
        ]
        kept.append((np.asarray(views[turn % 5]), np.asarray(views[turn % 5]).copy()))
        del kept[:-6], views
        assert all(np.array_equal(now, then) for now, then in kept)
    assert len(addresses) < 15  # memory was indeed used again


def test_the_handle_outlives_every_copy_and_nothing_else_is_made_of_it() -> None:
    model, ids = build(), text()
    wanted, _ = model(ids)
    twin = copy.copy(model)
    handle = weakref.ref(model._handle)
    twin.threads = 2
    assert (model.threads, twin.threads) == (1, 2)
    del model
    gc.collect()
    assert handle() is not None and torch.equal(twin(ids)[0], wanted)
    with pytest.raises(TypeError, match=r"NativeModel cannot be copied deeply: .*copy\.copy shares it"):
        copy.deepcopy(twin)
    with pytest.raises(TypeError, match=r"NativeModel cannot be pickled: .*make it in the other process"):
        pickle.dumps(twin)
    del twin
    gc.collect()
    assert handle() is None


def test_the_library_itself_refuses_impossible_threads() -> None:
    model = build()
    for threads in (-1, 0, 257):
        with pytest.raises(ValueError, match=f"threads is {threads}; it must be at"):
            model.threads = threads
        model._threads = threads
        with pytest.raises(ValueError, match=f"threads is {threads}; it must be 1 to 256"):
            model(text())
    model.threads = 2
    model(text())


@pytest.mark.parametrize("kind", native.KINDS)
@pytest.mark.parametrize("isa", native.ISAS)
def test_skipping_zeros_changes_no_bit_in_any_kind_of_matrix(kind: str, isa: str) -> None:
    """Also those that no format has for ffn.value; and a tiny input beside a large one is not taken for zero."""
    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    mine, weights = dict(build("fp32")._tensors), tiny_model().state_dict()
    generator = torch.Generator().manual_seed(2)
    for layer in range(3):
        name = f"blocks.{layer}.ffn.key.weight"
        key = weights[name] * torch.rand(len(weights[name]), 1, generator=generator) ** 4  # of very different sizes
        mine[name] = PackedTensor("f32", tuple(key.shape), pack_matrix("f32", key))
        name = f"blocks.{layer}.ffn.value.weight"
        mine[name] = PackedTensor(kind, tuple(weights[name].shape), pack_matrix(kind, weights[name] * 30))
        key[torch.arange(len(key)) % 64 > 8] = -abs(key[:1])  # most blocks are empty, and skipping is worth it
        mine[f"blocks.{layer}.ffn.key.weight"] = PackedTensor("f32", tuple(key.shape), pack_matrix("f32", key))
    with native.forced_isa(isa):
        models = [NativeModel(PRESETS["finch-tiny"], mine, threads=1, skip_zeros=skip) for skip in (True, False)]
    ids = text(1)
    states: list[State | None] = [None, None]
    for token in ids.unbind(1):  # one by one: only then is anything skipped
        (skipping, states[0]), (plain, states[1]) = (
            model(token[:, None], state) for model, state in zip(models, states, strict=True)
        )
        assert torch.equal(skipping, plain)
