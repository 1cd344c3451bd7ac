"""Packed model files: what was put in comes out, and nothing that is damaged or hostile gets in."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import roost
from roost import native
from roost.checkpoint import convert, info
from roost.cli import main
from roost.config import PRESETS, ModelConfig
from roost.formats import packed
from roost.formats.packed import format_of, open_packed, pack, source_of, summary
from roost.formats.panels import pack_matrix
from roost.formats.slots import WeightsFormat, slots
from roost.models.rwkv import RWKV
from roost.native import KINDS
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
FIRST = 2 << 20
HEAD = struct.Struct("<8sII8s")


def write(path: Path, name: str = "finch-tiny", weights: WeightsFormat = "int8") -> RWKV:
    model = tiny_model(name)
    pack(model.state_dict(), model.config, path, weights_format=weights)
    return model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny Finch, not to be changed."""
    path = tmp_path_factory.mktemp("packed") / "sound.roost"
    write(path)
    return path


def header_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(data[HEAD.size : HEAD.size + HEAD.unpack_from(data)[2]])


@pytest.mark.parametrize("weights", get_args(WeightsFormat))
@pytest.mark.parametrize("name", ["finch-tiny", "eagle-tiny"])
def test_what_goes_in_comes_out(tmp_path: Path, name: str, weights: WeightsFormat) -> None:
    model = write(tmp_path / "m.roost", name, weights)
    found = open_packed(tmp_path / "m.roost", threads=2)
    assert (found.config, found.weights, found.fingerprint) == (model.config, weights, model.fingerprint)
    plan = slots(model.config, weights)
    assert list(found.tensors) == [slot.name for slot in plan] and found.source is None
    state = model.state_dict()
    for slot in plan:
        one, value = found.tensors[slot.name], slot.values(state)
        assert one.kind in slot.kinds and one.shape == slot.shape and not one.data.flags.writeable
        assert one.data.ctypes.data % 4096 == 0
        if one.kind in KINDS:
            assert np.array_equal(one.data, pack_matrix(one.kind, value))
        elif one.kind == "rows16":
            bits = value.bfloat16().view(torch.int16).numpy().view(np.uint16)
            assert one.data.dtype == np.uint16 and np.array_equal(one.data, bits)
        else:
            assert one.data.dtype == np.float32 and np.array_equal(one.data, value.float().reshape(slot.shape).numpy())


@pytest.mark.parametrize("weights", get_args(WeightsFormat))
@pytest.mark.parametrize(
    "name", ["emb.weight", "blocks.1.ffn.value.weight", "blocks.0.att.time_maa_w2", "blocks.2.ln1.bias", "head.weight"]
)
def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, weights: WeightsFormat) -> None:
    """A decoding step skips weights of inputs that are zero: 0 * infinity would be 0 there, and NaN in a whole text."""
    model = tiny_model()
    for value in (torch.nan, torch.inf, -torch.inf):
        state = {one: value.clone() for one, value in model.state_dict().items()}
        state[name].view(-1)[-1] = value
        with pytest.raises(ValueError, match=rf"{name}\S* cannot be packed as .* holds NaN(,| or) infinity"):
            pack(state, model.config, tmp_path / "m.roost", weights_format=weights)
    assert not list(tmp_path.iterdir())


def test_exact_kinds_follow_the_numbers(tmp_path: Path) -> None:
    """fp32 weights are 16 bits wide wherever that loses nothing."""
    model = tiny_model().bfloat16()
    state = model.state_dict()
    state["blocks.1.ffn.key.weight"] = state["blocks.1.ffn.key.weight"].float() + 1e-6
    state["blocks.0.att.time_maa_w2"] = state["blocks.0.att.time_maa_w2"].double()
    state["blocks.0.att.time_maa_w2"][3, 1, 2] += 1e-9
    pack(state, model.config, tmp_path / "m.roost", weights_format="fp32")
    kinds = {name: one.kind for name, one in open_packed(tmp_path / "m.roost").tensors.items()}
    finer = {"blocks.1.ffn.key.weight", "blocks.0.att.time_maa_w2.r"}
    assert {name for name, kind in kinds.items() if kind == "f32"} == finer
    assert kinds["emb.weight"] == "rows16" and "rows32" not in kinds.values()


def test_layout_of_the_file(sound: Path) -> None:
    document, size = header_of(sound), sound.stat().st_size
    end = FIRST
    for entry in document["tensors"]:
        assert entry["offset"] == -(-end // 4096) * 4096
        end = entry["offset"] + entry["nbytes"]
    assert end == size
    config = PRESETS["finch-tiny"]
    assert ModelConfig(**document["config"]) == config
    matrices = {one["name"]: one for one in document["tensors"]}
    assert matrices["blocks.0.att.key.weight"]["nbytes"] == 64 * 64 * 33 // 32
    numbers = summary(sound).numbers
    assert sum(numbers.values()) == config.parameters
    assert set(numbers) == {"i8", "i8 fine", "f32", "vector", "rows16"}


def test_refused(tmp_path: Path) -> None:
    model = tiny_model()
    state, config, path = model.state_dict(), model.config, tmp_path / "m.roost"
    bad = dict(state) | {"blocks.1.att.key.weight": state["blocks.1.att.key.weight"] / 0}
    more = dict(state) | {"x": state["ln_out.bias"]}
    less = {name: value for name, value in state.items() if name != "ln_out.bias"}
    for call, message in (
        (lambda: pack(less, config, path, weights_format="int8"), "ln_out.bias is missing"),
        (lambda: pack(more, config, path, weights_format="int8"), "x is missing, unknown"),
        (lambda: pack(bad, config, path, weights_format="int4"), "blocks.1.att.key.weight cannot be packed as i4"),
        (lambda: pack(state, config, path, weights_format="int5"), "weights_format is 'int5'; did you mean 'int"),  # pyright: ignore[reportArgumentType]
        (lambda: pack(state, config, tmp_path / "no/m.roost", weights_format="int8"), "directory .* does not exist"),
        (lambda: pack(tiny_model("dove-tiny").state_dict(), PRESETS["dove-tiny"], path, weights_format="int8"), "Dove"),
        (lambda: open_packed(tmp_path / "none.roost"), "no such file"),
        (lambda: open_packed(tmp_path), "is a directory"),
        (lambda: format_of("m.int8.roost", "int4"), "name of int8 weights, and int4 are asked"),
        (lambda: format_of("model.roost"), r"model.int8.roost\) or with --weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_without_the_native_library(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    for call in (lambda: open_packed(sound), lambda: write(tmp_path / "x.roost")):
        with pytest.raises(ValueError, match="not available: no compiler"):
            call()
    assert summary(sound).weights == "int8" and not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from tiny import tiny_model
from roost.formats import packed
count, real = 0, packed.pack_matrix
def counting(*args, **named):
    global count
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **named)
packed.pack_matrix = counting
model = tiny_model()
packed.pack(model.state_dict(), model.config, sys.argv[1], weights_format="int8")
"""

FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from tiny import tiny_model
from roost.formats import packed
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
model = tiny_model()
try:
    packed.pack(model.state_dict(), model.config, sys.argv[1], weights_format="int8")
except OSError as error:
    sys.exit(f"OSError {error}")
"""


def other_process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("old", [b"", b"the old file"])
def test_a_killed_process_leaves_no_half_file(tmp_path: Path, old: bytes) -> None:
    target = tmp_path / "m.roost"
    if old:
        target.write_bytes(old)
    done = other_process(KILLED, target, Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert target.read_bytes() == old if old else not target.exists()
    write(target)
    assert open_packed(target).weights == "int8"


@pytest.mark.parametrize("limit", [1000, FIRST + 100_000])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, limit: int) -> None:
    target = tmp_path / "m.roost"
    target.write_bytes(b"the old file")
    done = other_process(FULL, target, Path(__file__).parents[1], limit)
    assert done.returncode == 1 and "OSError" in done.stderr and str(target) in done.stderr, done.stderr
    assert target.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".roost-{dead.pid}-0.tmp").write_bytes(b"half a file")
    (tmp_path / f".roost-{os.getpid()}-0.tmp").write_bytes(b"of one that lives")
    write(tmp_path / "m.roost")
    assert {one.name for one in tmp_path.iterdir()} == {"m.roost", f".roost-{os.getpid()}-0.tmp"}


def test_two_processes_share_a_file_that_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "m.roost"
    write(target)
    mine = open_packed(target)
    before = mine.tensors["head.weight"].data.tobytes()
    code = "import sys, hashlib; from roost.formats.packed import open_packed; found = open_packed(sys.argv[1]);"
    code += "print(hashlib.sha256(found.tensors['head.weight'].data.tobytes()).hexdigest())"
    done = other_process(code, target)
    assert done.stdout.strip() == hashlib.sha256(before).hexdigest(), done.stderr
    write(target, "eagle-tiny", "int4")
    assert mine.tensors["head.weight"].data.tobytes() == before
    assert open_packed(target).config.generation == "eagle"


def test_checking_does_not_grow_the_process(tmp_path: Path) -> None:
    """The file is read through small buffers: what is not used takes no memory."""
    config = ModelConfig("eagle", 1, 64, vocab_size=600_000, head_size=32)
    weights = {name: value.bfloat16() for name, value in RWKV(config).state_dict().items()}
    pack(weights, config, tmp_path / "m.roost", weights_format="bf16")
    assert (tmp_path / "m.roost").stat().st_size > 150e6
    code = """
import resource, sys
from roost.formats.packed import open_packed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = open_packed(sys.argv[1], threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = other_process(code, tmp_path / "m.roost")
    assert int(done.stdout) < 40_000, done  # kB


def test_convert_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("eagle-tiny")
    model.save(tmp_path / "m.pth")
    target = tmp_path / "m.int4.roost"
    assert main(["convert", str(tmp_path / "m.pth"), str(target)]) == 0
    found = open_packed(target)
    assert (found.weights, found.source, found.fingerprint) == (
        "int4",
        source_of(tmp_path / "m.pth"),
        model.fingerprint,
    )
    about = info(target)
    assert (about.version, about.dialect, about.config) == ("5.2", "packed, int4", model.config)
    assert about.parameters == model.config.parameters and about.file_bytes == target.stat().st_size
    assert about.memory == {"int4": about.file_bytes + about.state_bytes}
    capsys.readouterr()
    assert main(["info", str(target)]) == 0
    assert "packed, int4" in capsys.readouterr().out
    assert convert(tmp_path / "m.pth", tmp_path / "m.roost", weights_format="bf16", to="finch").is_file()
    upcycled = open_packed(tmp_path / "m.roost")
    assert upcycled.weights == "bf16" and upcycled.config.generation == "finch"
    (tmp_path / "m.pth").write_bytes((tmp_path / "m.pth").read_bytes() + b" ")
    os.utime(tmp_path / "m.pth", ns=(1, 1))
    assert source_of(tmp_path / "m.pth") != found.source
    assert source_of(tmp_path / "m.pth") == {"m.pth": [(tmp_path / "m.pth").stat().st_size, 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "m.roost"}, r"say which weights, in the name \(such as m\.int8\.roost\)"),
        ({"target": "m.int8.roost", "dtype": torch.bfloat16}, "a .roost file has weights_format in its place"),
        ({"target": "m.pth", "weights_format": "int8"}, "does not end in .roost"),
        ({"target": "m.int8.roost", "threads": 0}, "threads is 0"),
    ],
)
def test_bad_conversions(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    target = tmp_path / arguments.pop("target")
    with pytest.raises(ValueError, match=message):
        convert("nestling", target, **arguments)
    assert not list(tmp_path.iterdir())


def test_every_shipped_model_and_a_dove(tmp_path: Path) -> None:
    model, _ = roost.load("nestling")
    assert convert("nestling", tmp_path / "n.fp32.roost", threads=2).is_file()
    found = open_packed(tmp_path / "n.fp32.roost")
    assert (found.config, found.fingerprint) == (model.config, model.fingerprint)
    assert {one.kind for one in found.tensors.values()} == {"w16", "rows16", "vector"}  # it is stored in bf16
    tiny_model("dove-tiny").save(tmp_path / "d.pth")
    with pytest.raises(ValueError, match="only Eagle and Finch are packed"):
        convert(tmp_path / "d.pth", tmp_path / "d.int8.roost")


def test_format_of() -> None:
    assert [format_of(f"a.b.{one}.roost") for one in get_args(WeightsFormat)] == list(get_args(WeightsFormat))
    assert packed.ENDING == ".roost"
