"""Which model a command line means, and how it runs.

Owns: the defaults of --backend, --weights and --threads.
Refuses to know: what is done with the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from roost import native
from roost.checkpoint import DTYPES, info
from roost.checks import whole
from roost.config import ModelConfig
from roost.formats import packed
from roost.formats.locate import SHIPPED, resolve
from roost.formats.slots import WeightsFormat
from roost.loading import Backend, load
from roost.models.native import LanguageModel
from roost.native import MOST_THREADS
from roost.tokenizer import WorldTokenizer

SMALL = 50_000_000
"""Parameters below which a token is so little work that threads mostly wait for each other."""


def open_model(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    weights: WeightsFormat | None = None,
    threads: int | None = None,
) -> tuple[LanguageModel, WorldTokenizer]:
    """A model with a tokenizer. --weights or --threads mean the native model, and so does a model that ships.

    Raises ValueError as `roost.load`, and for a model without a World vocabulary.
    """
    check_threads(threads)
    if weights is not None or threads is not None:
        if backend == "torch":
            raise ValueError("--weights and --threads belong to the native model: drop them, or --backend torch")
        backend = "native"
    ships = name in SHIPPED and not Path(name).exists()
    if backend is None and ships and device == "cpu" and dtype is None and native.available():
        backend, weights = "native", "fp32"  # packed in no time, the same numbers, several times as fast
    path = resolve(name, None, None)
    if backend is None and path.suffix == packed.ENDING and not path.is_dir():
        backend = "native"
    if backend == "native":
        threads = threads_for(info(path).config, threads)
        model, tokenizer = load(path, device, dtype, backend="native", weights=weights, threads=threads)
    else:
        model, tokenizer = load(path, device, dtype, backend=backend)
    if tokenizer is None:
        raise ValueError(
            f"{name} has {model.config.vocab_size} tokens, which is no World vocabulary: roost has no tokenizer for it;"
            " use roost.load and token ids in Python"
        )
    return model, tokenizer


def threads_for(config: ModelConfig, threads: int | None) -> int:
    """What --threads means for a native model of this config: without it torch's number, and one for a small model."""
    return threads or (1 if config.parameters < SMALL else min(torch.get_num_threads(), MOST_THREADS))


def check_threads(threads: int | None) -> None:
    """Raise ValueError unless --threads is absent or a number that the native pool takes."""
    if threads is not None:
        whole("--threads", threads, 1, MOST_THREADS)


def load_model(args: argparse.Namespace) -> tuple[LanguageModel, WorldTokenizer]:
    """MODEL and the options beside it."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    return open_model(args.model, args.device, dtype, args.backend, args.weights, args.threads)


@contextmanager
def one_thread(model: LanguageModel) -> Generator[None, None, None]:
    """Write with one torch thread where the model is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if model.config.parameters < SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
