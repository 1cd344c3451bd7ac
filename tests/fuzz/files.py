"""Mutation fuzzing of the files that roost maps into memory, packed models and GGUF: a file runs, or is a ValueError.

    python tests/fuzz/files.py [--seconds 60] [--seed N] [--native-library FILE]
    python tests/fuzz/files.py --seed N --count 1        # one case again

Every case is a sound file of a tiny model with some of its bytes, numbers or fields changed; checksums and digests are
made right again, so that changes get behind them. What loads has to run: two tokens, at once and one by one, and where
all is finite both have the same bits. Any other exception, a crash, a hang or more than a GiB of memory is a failure;
the cases run in a child process, and the parent names the seed of the one that killed it.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from roost import WorldTokenizer, checkpoint, load, native
from roost.config import PRESETS, ModelConfig
from roost.formats import container, gguf, packed
from roost.formats.ggml import KINDS
from roost.formats.panels import checksum
from roost.formats.slots import WeightsFormat, slots
from roost.models.rwkv import RWKV
from tiny import tiny_model

HEAD, FIRST, PAGE = struct.Struct("<8sII8s"), 2 << 20, 4096
SLOW, ROOM = 60, 1 << 30
"""Seconds for one case, bytes for all of them beyond what was needed to run sound files."""

SIZES = [
    0,
    1,
    2,
    3,
    7,
    16,
    31,
    32,
    33,
    64,
    255,
    256,
    257,
    4096,
    65535,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
]
SIZES += [2**63 - 1, 2**63, 2**64 - 1]
ODD = [None, True, False, -1, 0.5, 1e308, "", "eagle", "int4", "rows16", "i8 fine", [], {}, [1, 2], "x" * 5000, 10**400]
PATTERNS = [b"\xff", b"\x00", b"\x7f\x80\x00\x00"[::-1], b"\x80\x7f", b"\x00\x00\x00\x80", b"\x7f", b"\x01\x00\x00\x00"]

# ---- bytes


def flip(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """Some bits."""
    for _ in range(rng.choice([1, 1, 2, 10])):
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)


def fill(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """A stretch of one pattern: NaN, infinity, denormals, the largest codes."""
    at = rng.randrange(first, last)
    size = min(last - at, rng.choice([4, 64, 4096, 1 << 20]))
    data[at : at + size] = (rng.choice(PATTERNS) * size)[:size]


def splice(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """A stretch of the file over another one."""
    size = min(last - first, rng.choice([1, 8, 64, 4096]))
    source, at = (rng.randrange(first, last - size + 1) for _ in range(2))
    data[at : at + size] = data[source : source + size]


def length(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """Cut off, cut out or put in some bytes."""
    at = rng.randrange(first, last)
    if rng.random() < 0.3:
        del data[at:]
    elif rng.random() < 0.5:
        del data[at : at + rng.choice([1, 4, 8, 32])]
    else:
        data[at:at] = rng.randbytes(rng.choice([1, 4, 8, 32]))


BYTES: list[Callable[[random.Random, bytearray, int, int], None]] = [flip, flip, fill, splice, length]

# ---- packed models


def header_of(data: bytes | bytearray) -> Any:
    """The JSON in a packed file."""
    return json.loads(data[HEAD.size : HEAD.size + HEAD.unpack_from(data)[2]])


def seal(data: bytearray, document: Any) -> bytearray:
    """The file with this header and right checksums, wherever the header still says where the tensors are."""
    entries: Any = document.get("tensors") if isinstance(document, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        with suppress(KeyError, TypeError):
            first, last = entry["offset"], entry["offset"] + entry["nbytes"]
            if 0 <= first < last <= len(data):
                entry["checksum"] = f"{checksum(np.frombuffer(data, np.uint8)[first:last]):016x}"
    text = json.dumps(document).encode()
    head = HEAD.pack(b"roost\r\n\x1a", 1, len(text), hashlib.sha256(text).digest()[:8]) + text
    return bytearray(head.ljust(FIRST, b"\0") + data[FIRST:])


def change_field(rng: random.Random, document: Any) -> None:
    """One field of the header becomes something else, or is gone."""
    entries: list[Any] = document["tensors"]
    where = rng.choice([document, document["config"], rng.choice(entries), rng.choice(entries), entries])
    key = rng.choice(list(where)) if isinstance(where, dict) else rng.randrange(len(where))
    if rng.random() < 0.15:
        del where[key]
    elif isinstance(where[key], int) and rng.random() < 0.4:
        where[key] += rng.choice([-PAGE, -64, -1, 1, 64, PAGE])
    else:
        where[key] = rng.choice(
            [rng.choice(SIZES), rng.choice(ODD), rng.choice(list(where) if where is entries else SIZES)]
        )


def other_sizes(rng: random.Random) -> bytearray:
    """A file that is right in everything but its numbers, which are noise, for a model of unusual sizes."""
    head = rng.choice([16, 32, 64])
    config = ModelConfig(
        rng.choice(["eagle", "finch"]), rng.randint(1, 2), rng.choice([1, 3, 16, 31, 64, 65, 200]),
        vocab_size=rng.choice([1, 2, 31, 33, 257]), head_size=head, dim_att=head * rng.randint(1, 3),
        dim_ffn=rng.choice([1, 31, 64, 129]), shift_rank=rng.randint(1, 9), decay_rank=rng.randint(1, 70),
        time_state=rng.random() < 0.2,
    )  # fmt: skip
    weights: WeightsFormat = rng.choice(get_args(WeightsFormat))
    data, entries = bytearray(FIRST), list[Any]()
    for slot in slots(config, weights):
        data += bytes(-len(data) % PAGE)
        kind = rng.choice(slot.kinds)
        noise = rng.randbytes(rng.choice([1, 2, 4, 64])) if rng.random() < 0.5 else rng.randbytes(slot.nbytes(kind))
        entry = {"name": slot.name, "kind": kind, "shape": slot.shape, "offset": len(data), "nbytes": slot.nbytes(kind)}
        entries.append(entry | {"checksum": ""})
        data += (noise * (entry["nbytes"] // len(noise) + 1))[: entry["nbytes"]]
    document = {"config": vars(config), "weights": weights, "fingerprint": "", "source": None, "tensors": entries}
    return seal(data, document)


def packed_case(rng: random.Random, sound: bytes) -> bytes:
    """A changed packed file; four in five have right checksums."""
    if rng.random() < 0.1:
        return bytes(other_sizes(rng))
    data, document = bytearray(sound), header_of(sound)
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.4:
            with suppress(LookupError, TypeError):  # what an earlier change left no place for
                change_field(rng, document)
        else:
            rng.choice(BYTES)(rng, data, FIRST, len(data))
        if len(data) <= FIRST + 1:
            break
    with suppress(ValueError):  # JSON that cannot be written
        data = seal(data, document)
    if rng.random() < 0.2:
        rng.choice(BYTES)(rng, data, 0, HEAD.unpack_from(data)[2] + HEAD.size)
    return bytes(data)


# ---- GGUF


class Recording(container._Cursor):
    """Notes where the numbers of a header are."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        self.numbers: list[tuple[int, str]] = []

    def number(self, code: str, what: str) -> Any:
        self.numbers.append((self.at, code))
        return super().number(code, what)


def change_number(rng: random.Random, data: bytearray, numbers: list[tuple[int, str]]) -> None:
    """One number of the header: a count, a length, a size, a kind, an offset. The vocabulary has most of them."""
    ends = numbers[:45] + numbers[-300:]
    at, code = rng.choice(ends if rng.random() < 0.9 else numbers)
    size = struct.calcsize("<" + code)
    if at + size > len(data):
        return
    if code in "fd":
        data[at : at + size] = struct.pack("<" + code, rng.choice([0.0, -1.0, 1e-5, float("nan"), float("inf")]))
        return
    value = int.from_bytes(data[at : at + size], "little")
    near = value + rng.choice([-32, -1, 1, 32])
    value = rng.choice(
        [rng.choice(SIZES), near, value * 2, rng.choice([kind.code for kind in KINDS.values()]), len(data)]
    )
    data[at : at + size] = (value % 256**size).to_bytes(size, "little")


def gguf_case(rng: random.Random, sound: bytes) -> bytes:
    """A changed GGUF file."""
    data, cursor = bytearray(sound), Recording(memoryview(sound))
    container._parse(cursor)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if rng.random() < 0.5:
            change_number(rng, data, cursor.numbers)
        elif len(data) > cursor.at:
            rng.choice(BYTES)(rng, data, *rng.choice([(0, cursor.at), (cursor.at, len(data))]))
    return bytes(data)


# ---- running


def sound_files(folder: Path) -> list[Path]:
    """Packed files and GGUF files of tiny models in every format."""
    made: list[Path] = []
    for name in ("finch-tiny", "eagle-tiny"):
        model = tiny_model(name)
        for weights in get_args(WeightsFormat):
            made.append(
                packed.pack(
                    model.state_dict(), model.config, folder / f"{name}.{weights}.roost", weights_format=weights
                )
            )
    wide = ModelConfig("finch", 1, 256, vocab_size=257, dim_ffn=256, shift_rank=4, decay_rank=4)
    for config, kinds in ((PRESETS["finch-tiny"], ("fp32", "fp16", "bf16", "q8_0", "q4_0")), (wide, ("q8_0",))):
        for kind in kinds:
            made.append(folder / f"{config.n_embd}.{kind}.gguf")
            gguf.save(made[-1], config, RWKV(config, seed=1).state_dict(), WorldTokenizer.byte_level(), kind)
    return made


def run(path: Path, rng: random.Random) -> bool:
    """Read a file and two tokens; False for a file that is refused. Raises what no file may cause."""
    options: dict[str, Any] = {}
    if rng.random() < 0.5 or path.suffix == packed.ENDING:
        options = {"backend": "native", "threads": rng.choice([1, 1, 2, 3])}
    if options and path.suffix != packed.ENDING:
        options |= {"weights": rng.choice(get_args(WeightsFormat)), "keep": False}
    try:
        with native.forced_isa(rng.choice(native.supported_isas())):
            checkpoint.info(path)
            model, tokenizer = load(path, **options)
            ids = torch.tensor([[rng.randrange(model.config.vocab_size) for _ in range(2)]])
            with torch.no_grad():
                first, state = model(ids[:, :1])
                second, state = model(ids[:, 1:], state)
                whole, other = model(ids)
            if tokenizer is not None:
                tokenizer.decode(tokenizer.encode("two tokens"))
    except ValueError as error:
        if "not enough memory" in str(error):
            raise MemoryError from error
        return False
    pairs = [(torch.cat([first, second], 1), whole)]
    pairs += [pair for one, two in zip(state.layers, other.layers, strict=True) for pair in zip(one, two, strict=True)]
    finite = all(bool(one.isfinite().all()) and bool(two.isfinite().all()) for one, two in pairs)
    if options and finite and not all(torch.equal(one, two) for one, two in pairs):
        raise AssertionError("at once and one by one differ")
    return True


def limit_memory() -> None:
    """No more than ROOM beyond what is in use. Not under ASan, which reserves terabytes."""
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def child(seed: int, count: int, seconds: float) -> None:
    """Cases from `seed` on, each announced before it begins."""
    torch.set_num_threads(1)
    counts = {True: 0, False: 0}
    with tempfile.TemporaryDirectory(prefix="roost-fuzz-") as place:
        sources = sound_files(Path(place))
        for path in sources:
            assert run(path, random.Random(0)), path.name
        contents = [path.read_bytes() for path in sources]
        limit_memory()
        end = time.monotonic() + seconds
        for case in range(seed, seed + count):
            if time.monotonic() > end:
                break
            print("case", case, flush=True)
            faulthandler.dump_traceback_later(SLOW, exit=True)
            rng = random.Random(case)
            index = rng.randrange(len(sources))
            path = Path(place) / f"case{sources[index].suffix}"
            path.unlink(missing_ok=True)  # never written in place: a model may still have it mapped
            path.write_bytes((packed_case if path.suffix == packed.ENDING else gguf_case)(rng, contents[index]))
            counts[run(path, rng)] += 1
        faulthandler.cancel_dump_traceback_later()
    print(f"{sum(counts.values()):,} files: {counts[False]:,} refused, {counts[True]:,} ran", flush=True)


def main() -> int:
    """Run the child and report; 1 when a case failed."""
    parser = argparse.ArgumentParser(description="Mutation fuzzing of packed and GGUF files.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="the first case; by default another one every time")
    parser.add_argument("--count", type=int, default=1 << 40, help="the most cases")
    parser.add_argument("--native-library", type=Path, help="a build that is not installed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.native_library:
        native.places = lambda: [options.native_library]
    native.library()
    seed: int = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    if options.child:
        child(seed, options.count, options.seconds)
        return 0
    command = [sys.executable, "-X", "faulthandler", *sys.argv, "--child", "--seed", str(seed)]
    last = "nothing yet"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip()
    if process.returncode != 0:
        again = f"python tests/fuzz/files.py --seed {last.split()[-1]} --count 1"
        last = f"FAILED in {last} (exit status {process.returncode}); again with: {again}"
    print(last)
    return int(process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
