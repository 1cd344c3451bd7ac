"""The native library: finding it, its errors, instruction sets, and a pool that neither loses nor mixes up anything."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from roost import WorldTokenizer, load, native

SOURCES = Path(__file__).parents[1] / "src/native"

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_not())


def test_a_missing_library_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "places", lambda: [tmp_path / "_native.so"])
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    assert not native.available() and "without a C++ compiler" in native.why_not()
    with pytest.raises(ValueError, match="not available: roost was installed without"):
        native.library()
    with pytest.raises(ValueError, match="not available"), native.forced_isa("scalar"):
        raise AssertionError("entered")


def test_a_file_that_cannot_be_loaded_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF and then nothing")
    monkeypatch.setattr(native, "places", lambda: [tmp_path / "none.so", broken])
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    assert not native.available() and str(broken) in native.why_not()


def test_a_foreign_library_has_a_reason() -> None:
    foreign = Path(sys.modules["_ctypes"].__file__ or "")
    library, reason = native.opened(foreign)
    assert library is None and str(foreign) in reason and "roost_error" in reason


def built_from(interface: str, folder: Path) -> Path:
    """A library that can be loaded and in which no call would survive but the one that says what it was built from."""
    code = "".join(f"const char* {name}() {{ return 0; }}\n" for name in ("roost_error", "roost_isa", "roost_best_isa"))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    made = folder / "_native.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(made)]
    subprocess.run(command, input=code + interface, text=True, check=True, timeout=60)
    return made


STALE = [
    ("", "older sources (interface 0, not"),
    ("int roost_abi() { return -1; }", "older sources (interface -1, not"),
    ("int roost_abi() { return 1000000; }", "newer sources (interface 1000000, not"),
]


@pytest.mark.parametrize(("interface", "reason"), STALE, ids=["none", "older", "newer"])
def test_a_library_of_other_sources_is_not_used(
    interface: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """roost goes on in Python, with the same results, and says why."""
    from roost.cli import main

    stale = built_from(interface, tmp_path)
    monkeypatch.setattr(native, "places", lambda: [stale])
    monkeypatch.setattr(native, "_load", cache(native._load.__wrapped__))
    assert not native.available() and f"{stale} was built from {reason}" in native.why_not()
    assert "install roost again" in native.why_not()
    assert main(["info"]) == 0 and native.why_not() in capsys.readouterr().out
    tokenizer = WorldTokenizer()
    assert tokenizer.decode(tokenizer.encode("Hüpf, Häschen!")) == "Hüpf, Häschen!"
    with pytest.raises(ValueError, match="interface"):
        load("nestling", backend="native")
    model, _ = load("nestling")
    assert model(torch.tensor([[72, 105]]))[0].isfinite().all()


@needs_library
def test_a_stale_file_does_not_hide_a_good_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = Path(native.library()._name)
    monkeypatch.setattr(native, "places", lambda: [built_from("", tmp_path), good])
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    assert native.available() and not native.why_not() and native.library()._name == str(good)


INTERFACES = {3: "698897757b28cdd1"}


def test_the_interface_has_a_number_of_its_own() -> None:
    """Exported functions, and the struct that Python fills, are what they were when the number was last raised."""
    sources = "".join(re.sub(r"//.*", "", path.read_text()) for path in sorted(SOURCES.glob("*.cpp")))
    declared = re.findall(r"ROOST_API [^{;]*(?=[{;])", sources) + re.findall(r'extern "C" \{.*?\n\}', sources, re.S)
    digest = hashlib.sha256(" ".join(" ".join(declared).split()).encode()).hexdigest()[:16]
    number = int(re.findall(r"constexpr int abi = (\d+);", (SOURCES / "common.h").read_text())[0])
    assert number == native.ABI, "abi in src/native/common.h and ABI in roost/native.py are one number"
    assert {number: digest} == INTERFACES, "the interface changed: raise both numbers and write down the new digest"


def test_the_place_is_beside_the_package(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--native-library"):
        pytest.skip("another place was asked for")
    assert any((place.parent / "native.py").is_file() for place in native.places())
    assert {place.name for place in native.places()} == {"_native.so"}


@needs_library
def test_a_function_of_newer_sources() -> None:
    with pytest.raises(ValueError, match="no roost_not_yet: it was built from older sources"):
        native.function("roost_not_yet", [])


@needs_library
def test_instruction_sets() -> None:
    supported = native.supported_isas()
    assert supported == native.ISAS[: len(supported)] and native.isa() == supported[-1]
    if platform.machine() not in ("x86_64", "AMD64"):
        assert supported == ("scalar",)
    for name in supported:
        with native.forced_isa(name):
            assert native.isa() == name
            with native.forced_isa("scalar"):
                assert native.isa() == "scalar"
            assert native.isa() == name
    assert native.isa() == supported[-1]


@needs_library
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_the_system_names_the_same_instruction_sets() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wanted = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"},
    }
    expected = ["scalar", *(name for name, names in wanted.items() if names <= flags)]
    assert [name for name in native.supported_isas() if name != "amx"] == expected


@needs_library
def test_instruction_sets_that_are_refused() -> None:
    missing = [name for name in native.ISAS if name not in native.supported_isas()]
    cases = [("sse9", "no instruction set is called sse9"), *((name, f"no {name}") for name in missing)]
    for name, message in cases:
        with pytest.raises(ValueError, match=message), native.forced_isa(name):
            raise AssertionError("entered")
    assert native.isa() == native.supported_isas()[-1]


def pool(threads: int, rounds: int, room: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cells after a self-test, and whether each thread computed in the right mode."""
    run = native.function("roost_selftest_pool", [ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p])
    cells = np.arange(1, (threads if room is None else room) + 1, dtype=np.uint64)
    modes = np.zeros(len(cells), np.int32)
    native.check(run(threads, rounds, cells.ctypes.data, modes.ctypes.data))
    return cells, modes


def expected(threads: int, rounds: int) -> np.ndarray:
    """What the self-test computes, in NumPy."""
    cells = np.arange(1, threads + 1, dtype=np.uint64)
    for _ in range(rounds):
        cells = np.uint64(5) * cells + np.uint64(2) * np.roll(cells, -1)
    return cells


def sound(threads: int, rounds: int) -> bool:
    cells, modes = pool(threads, rounds)
    return bool((cells == expected(threads, rounds)).all() and modes.all())


@needs_library
def test_threads_fewer_and_more_than_cores() -> None:
    for threads in (1, 2, 3, 8, 2, 5, 1, 8, 64):
        for rounds in (0, 1, 300):
            assert sound(threads, rounds), f"{rounds} stages with {threads} threads"


@needs_library
def test_short_regions_of_changing_size() -> None:
    """A region that leaves out workers is followed at once by one that needs them."""
    for step in range(3000):
        assert sound(2 + step * 7 % 5, step % 3)


@needs_library
@pytest.mark.parametrize("threads", [0, -1, 257, 2**31 - 1])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}; it must be 1 to 256"):
        pool(threads, 1, room=1)


@needs_library
def test_python_threads_share_the_pool() -> None:
    wrong: list[int] = []

    def call(threads: int) -> None:
        wrong.extend(step for step in range(100) if not sound(threads, step % 7))

    callers = [threading.Thread(target=call, args=(threads,)) for threads in (2, 3, 1, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers) and not wrong


@needs_library
def test_the_caller_keeps_its_denormals() -> None:
    for threads in (1, 2):
        assert sound(threads, 3)
        assert np.float32(1e-30) * np.float32(1e-10) > 0


def program(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own with the same library."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_native as t, os, signal\n"
    start += f"from pathlib import Path\nt.native.places = lambda: [Path({native.library()._name!r})]\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120, check=False
    )


FORK = """
import threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads: that is the test
assert t.sound(4, 10)
stop = False
def busy():
    while not stop:
        t.pool(3, 200)
other = threading.Thread(target=busy)
other.start()
for _ in range(20):  # the other thread holds the pool most of the time
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if t.sound(4, 10) and t.sound(2, 10) else 3)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
assert t.sound(4, 10)
"""

LIMIT = """
import resource
t.pool(2, 1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
try:
    t.pool(250, 1)
except ValueError as error:
    print(error)
assert t.sound(2, 10)
"""

SIGNALS = """
signal.signal(signal.SIGUSR1, lambda *_: None)
t.pool(4, 1)
print(*sorted({int(line.split()[1], 16) >> signal.SIGINT - 1 & 1 for task in Path("/proc/self/task").iterdir()
               if task.name != str(os.getpid()) and task.name not in before
               for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk")}))
"""


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_a_fork_have_their_own_pool() -> None:
    done = program(FORK)
    assert (done.returncode, done.stderr) == (0, "")


def under_asan() -> bool:
    return "asan" in os.environ.get("LD_PRELOAD", "")


@needs_library
@pytest.mark.skipif(
    not Path("/proc/self/statm").is_file() or under_asan(), reason="needs Linux; ASan reserves terabytes"
)
def test_threads_that_the_system_refuses() -> None:
    done = program(LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the system gives only" in done.stdout and "of 250 threads" in done.stdout


@needs_library
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_workers_take_no_signals() -> None:
    """An interrupt that a worker took would not end the read of Python's main thread."""
    done = program('before = {task.name for task in Path("/proc/self/task").iterdir()}\n' + SIGNALS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_every_backend_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from roost.backends import backends
    from roost.ops import BACKENDS

    names = {
        part: [one.name for one in backends() if one.part == part] for part in ("tokenizer", "WKV operator", "model")
    }
    assert sorted(names["WKV operator"]) == sorted(BACKENDS)
    assert names["tokenizer"] == ["native", "python"] and names["model"] == ["native", "torch"]
    for reason in ("", "because"):
        monkeypatch.setattr(native, "why_not", lambda reason=reason: reason)
        monkeypatch.setattr(native, "isa", lambda: "avx2")
        assert {one.name for one in backends() if not one.active} == ({"native"} if reason else set())
        assert {one.why_not for one in backends() if one.name == "native"} == {reason}
