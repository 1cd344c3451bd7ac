"""A run on paper: sizes, work, memory, time and communication, without a step of training.

    memory     4 bytes a parameter (fp32 weight), 12 more for one that is trained (gradient, two moments), and
               activations: A D bytes per token and layer, measured (ACTIVATIONS); with recomputation 4 D, and one block
    replicas   a rank sends 2 (R - 1) / R of the fp32 gradients per step
    shards     1 / R of these bytes; a rank receives (R - 1) / R of the weights twice and sends as much of the
               gradients, per part of a step

Owns: these formulas, and the tables for 8 and 64 devices. Data and the number of steps are the run's own: its files are
opened and its first batch is made.
Refuses to know: how a step is made; what a device really reaches (a share of its peak is assumed and said).
"""

from __future__ import annotations

import torch

from roost.checks import usable_device, whole
from roost.config import PRESETS, ModelConfig
from roost.data.loader import PackedLoader
from roost.data.order import magic_prime
from roost.data.pairs import PairLoader
from roost.data.sft import SftLoader
from roost.training.adapters import count_parameters
from roost.training.loop import DTYPES
from roost.training.loss import LARGEST_LOGITS
from roost.training.metrics import flops_per_token, measured_peak
from roost.training.recipe import Recipe, open_files
from roost.training.start import check_precision, length_of
from roost.training.task import Data, summary

ACTIVATIONS = {
    "dove": {"fp32": 124, "bf16": 80},
    "eagle": {"fp32": 124, "bf16": 80},
    "finch": {"fp32": 158, "bf16": 113},
}
"""Bytes kept for the backward pass per token, layer and channel of D: counted from saved tensors, native WKV.

Dove's recurrence in plain torch keeps more; it is not counted.
"""

REACHED = 0.4
"""The share of the peak that a time estimate assumes."""


def activation_bytes(config: ModelConfig, tokens: int, precision: str = "fp32", *, recompute: bool = False) -> int:
    """Bytes of activations of one forward pass over so many tokens, with the logits of one piece of the loss."""
    D, L = config.n_embd, config.n_layer
    block = ACTIVATIONS[config.generation]["fp32" if precision == "fp32" else "bf16"] * D
    layers = 4 * D * L + block if recompute else block * L
    logits = 12 * min(LARGEST_LOGITS, tokens * config.vocab_size)
    casts = 0 if precision == "fp32" else 2 * config.parameters
    return tokens * (layers + 8 * D) + logits + casts


def across(config: ModelConfig, ranks: int, tokens: int = 4096, parts: int = 1) -> dict[str, float]:
    """Bytes of one rank of `ranks`, bf16 with recomputation, `parts` times `tokens` a step on each.

    replica_memory, shard_memory   weights, gradients, moments and activations
    replica_traffic, shard_traffic   sent and received per step
    """
    P = config.parameters
    share = (ranks - 1) / ranks
    activations = activation_bytes(config, tokens, "bf16", recompute=True)
    layer = (P - 2 * config.vocab_size * config.n_embd) / config.n_layer
    gathered = 8 * (layer + 2 * config.vocab_size * config.n_embd)  # weights and gradients, whole: a block, the ends
    return {
        "replica_memory": 16 * P + activations,
        "shard_memory": 16 * P / ranks + gathered + activations,
        "replica_traffic": 2 * share * 4 * P,
        "shard_traffic": parts * share * 3 * 4 * P,
    }


def scale_table(tokens: int = 4096) -> list[list[str]]:
    """The table of docs/training.md: a head and one row per preset, memory and traffic on 8 and 64 devices."""
    head = ["preset", "parameters", "FLOPs/token"]
    for ranks in (8, 64):
        head += [f"{ranks} replicas: GB", "GB/step", f"{ranks} shards: GB", "GB/step"]
    rows = [head]
    for name, config in PRESETS.items():
        if config.generation == "dove" or config.vocab_size < 1000:
            continue
        row = [name, f"{config.parameters / 1e9:.2f} B", f"{flops_per_token(config):.2e}"]
        for ranks in (8, 64):
            found = across(config, ranks, tokens)
            keys = ("replica_memory", "replica_traffic", "shard_memory", "shard_traffic")
            row += [f"{found[key] / 1e9:.1f}" for key in keys]
        rows.append(row)
    return rows


def plan(recipe: Recipe, device: torch.device | str = "cpu", ranks: int = 1) -> list[tuple[str, str]]:
    """What a run on `ranks` devices will take, as (what, value) lines; reads the data, measures the device's peak.

    Raises ValueError as the run itself would for files that do not exist or do not fit, and for a batch that has no
    equal shares.
    """
    train, device = recipe.config, usable_device(device)
    config, _, data, _ = open_files(recipe)
    check_precision(train, device)
    length = length_of(data, train)
    inputs = data.batch_at(0, 0, whole("ranks", ranks, 1) * train.accumulate).inputs
    part = inputs.shape[0] * min(inputs.shape[1], recipe.segment or inputs.shape[1])
    numbers, trained = count_parameters(config, recipe.adapter)
    epochs = length.steps * recipe.batch / data.windows
    total, flops = length.steps * length.tokens, flops_per_token(config)
    activations = activation_bytes(config, part, train.precision, recompute=train.recompute)
    peak = train.peak_flops or measured_peak(device, DTYPES[train.precision])
    seconds = total * flops / (ranks * peak * REACHED)
    devices = f"one {device}, measured" if ranks == 1 else f"{ranks} x {device}, one measured"
    lines = [
        ("model", f"{recipe.model}: {config.generation}, {config.n_layer} layers of {config.n_embd}"),
        ("parameters", f"{numbers:,}, {trained:,} of them trained; the state of a row {config.state_bytes:,} bytes"),
        ("data", _data(data)),
        ("steps", f"{length.steps:,} of {length.tokens:,.0f} tokens: {total:,.0f} tokens, {epochs:.2f} epochs"),
        ("work", f"{flops:.4g} FLOPs a token, {total * flops:.4g} in all"),
        (
            "memory",
            f"weights, gradients, moments {_gb(4 * numbers + 12 * trained)}; activations about {_gb(activations)}",
        ),
        ("time", f"about {_hours(seconds)} at {REACHED:.0%} of {ranks * peak / 1e12:.3g} TFLOP/s ({devices})"),
    ]
    if ranks > 1:
        sent = 2 * (ranks - 1) / ranks * 4 * trained
        lines.append(
            ("ranks", f"{ranks} replicas, each of that memory, send {_gb(sent)} a step; shards: see the table")
        )
    return lines


def _data(data: Data) -> str:
    if isinstance(data, (SftLoader, PairLoader)):
        documents = data.documents
        return f"{summary(data)}; {len(documents.ids):,} tokens, {documents.report.learned:,} of them learned"
    if isinstance(data, PackedLoader):
        return f"{len(data.file):,} tokens in {data.windows:,} rows of {data.ctx}, {data.filled:.1%} filled"
    prime = _prime(len(data.file) // data.ctx)
    return f"{len(data.file):,} tokens, {data.windows:,} windows of {data.ctx}; {prime}"


def _prime(windows: int) -> str:
    try:
        return f"magic prime {magic_prime(windows):,}"
    except ValueError:
        return "too few for a magic prime"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
