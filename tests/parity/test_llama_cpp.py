"""llama.cpp reads what roost exports: the same logits as roost's in fp32, and the same tokens, for Finch and Eagle.

Runs where llama-cpp-python is installed; no extra installs it, because it has to be compiled. llama.cpp reads 400
tokens in one call, then in calls of 64 and of one, and runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import make_checkpoint
from roost import checkpoint
from roost.config import PRESETS
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"),
]
COUNT = 400
CASES = ("finch", "finch-ranks", "eagle", "eagle-5.1", "nestling", "finch-0.1b", "eagle-0.1b")
FP32 = 1e-3
"""Largest difference of the logits / their standard deviation: the promise."""
ROUNDED = {"fp16": 2e-3, "bf16": 2e-2, "q8_0": 6e-2, "q4_0": 6e-2}
"""Root mean square of the difference / standard deviation: what llama.cpp's own rounding of activations, to the dtype
of the matrices or to 8 bits, may add for a model of the same numbers (measured: at most a third)."""

LLAMA = """
import ctypes, json, sys
import llama_cpp as L, numpy as np

def quiet(level, text, data): pass
log = L.llama_log_callback(quiet)
L.llama_log_set(log, None)
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    model = L.llama_model_load_from_file(job["path"].encode(), L.llama_model_default_params())
    assert model, "cannot be loaded"
    vocab = L.llama_model_get_vocab(model)
    size = L.llama_vocab_n_tokens(vocab)
    if "text" in job:
        data = bytes.fromhex(job["text"])
        found = (L.llama_token * (len(data) + 1))()
        count = L.llama_tokenize(vocab, data, len(data), found, len(found), False, False)
        assert count >= 0
        np.save(job["out"], np.array(found[:count]))
        continue
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = 1
    rows = []
    context = L.llama_init_from_model(model, params)
    for start in range(0, len(job["tokens"]), job["chunk"]):
        part = job["tokens"][start : start + job["chunk"]]
        batch = L.llama_batch_init(len(part), 0, 1)
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        assert L.llama_decode(context, batch) == 0
        rows.append(np.ctypeslib.as_array(L.llama_get_logits(context), (len(part), size)).copy())
        L.llama_batch_free(batch)
    np.save(job["out"], np.concatenate(rows))
    L.llama_free(context)
    L.llama_model_free(model)
"""


def llama(jobs: list[dict[str, Any]], folder: Path) -> list[np.ndarray]:
    """What llama.cpp makes of each job: {"path", "tokens", "chunk"} or {"path", "text"}."""
    for number, job in enumerate(jobs):
        job["out"] = str(folder / f"{number}.npy")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", LLAMA, str(folder / "jobs.json")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(job["out"]) for job in jobs]


def source(case: str, folder: Path) -> str | Path:
    """The checkpoint of a case. Those of 0.1B take the trainer's initial decays and mixing, and matrices of size 1."""
    if case == "nestling":
        return case
    if case in PRESETS:
        model = RWKV(PRESETS[case])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and parameter.shape[-2] > 1 else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
        model.save(folder / "model.pth")
    else:
        ranks = {"shift_rank": 6, "decay_rank": 11} if case == "finch-ranks" else {}
        version = {"finch": "6", "finch-ranks": "6", "eagle": "5.2", "eagle-5.1": "5.1"}[case]
        torch.save(make_checkpoint(version, n_layer=3, **ranks), folder / "model.pth")  # type: ignore[arg-type]
    return folder / "model.pth"


def ours(path: str | Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return checkpoint.load(path, dtype=torch.float32)[0](tokens[None])[0][0]


def difference(theirs: np.ndarray, wanted: Tensor) -> float:
    return float((torch.from_numpy(theirs) - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    path = source(case, tmp_path)
    checkpoint.convert(path, tmp_path / "a.gguf", dtype=torch.float32)
    vocab = checkpoint.info(path).config.vocab_size
    tokens = torch.randint(1, min(vocab, 65530), (COUNT,), generator=torch.Generator().manual_seed(0))
    job = {"path": str(tmp_path / "a.gguf"), "tokens": tokens.tolist()}
    wanted = ours(path, tokens)
    for chunk, found in zip(
        (COUNT, 64, 1), llama([{**job, "chunk": n} for n in (COUNT, 64, 1)], tmp_path), strict=True
    ):
        error = difference(found, wanted)
        print(f"{case}, {chunk} at a time: largest difference {error:.1e} of the logits' standard deviation")
        assert error <= FP32


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("case", ["finch", "eagle", "nestling"])
def test_every_kind_is_read_the_same(case: str, kind: str, tmp_path: Path) -> None:
    """roost's fp32 on the numbers in the file: what stays is that llama.cpp rounds activations."""
    dtype: Any = checkpoint.DTYPES.get(kind, kind)
    checkpoint.convert(source(case, tmp_path), tmp_path / "a.gguf", dtype=dtype)
    tokens = torch.randint(1, 257, (COUNT,), generator=torch.Generator().manual_seed(0))
    job = {"path": str(tmp_path / "a.gguf"), "tokens": tokens.tolist(), "chunk": COUNT}
    wanted = ours(tmp_path / "a.gguf", tokens)
    error = float((torch.from_numpy(llama([job], tmp_path)[0]) - wanted).square().mean().sqrt() / wanted.std())
    print(f"{case}, {kind}: root mean square difference {error:.1e} of the logits' standard deviation")
    assert error <= ROUNDED[kind]


@pytest.mark.parametrize("vocab", [257, 65536])
def test_tokens(vocab: int, tmp_path: Path) -> None:
    torch.save(make_checkpoint("6", n_embd=64, vocab=vocab), tmp_path / "a.pth")
    checkpoint.convert(tmp_path / "a.pth", tmp_path / "a.gguf")
    text = "".join(map(chr, range(32, 0x800))).encode() + bytes(range(1, 256)) + b"it's \\n \\x41 \"q\" '\r\n\t\n\n"
    tokenizer = WorldTokenizer.byte_level() if vocab == 257 else WorldTokenizer()
    found = llama([{"path": str(tmp_path / "a.gguf"), "text": text.hex()}], tmp_path)[0]
    assert found.tolist() == tokenizer.encode(text)
