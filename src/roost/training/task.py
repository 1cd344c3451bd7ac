"""What a run learns from its data: "pretrain" on a token file, "sft" on conversations, "dpo" on pairs of answers.

Owns: the recipe keys that choose a task, their checks, and which data go with which objective.
Refuses to know: recipes as files, the loop, what a loss is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from roost.checks import choice, instance, whole
from roost.data.batch import Batch
from roost.data.conversations import BadLines, Template
from roost.data.loader import PackedLoader, TokenLoader
from roost.data.order import Order
from roost.data.pairs import PairLoader, Reference, read_pairs
from roost.data.sft import LongConversations, SftLoader, check_roles, read_conversations
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer
from roost.training.config import TrainConfig
from roost.training.dpo import Dpo, check_numbers, reference_logprobs
from roost.training.loss import Objective, Sums, next_token_sums, token_sums
from roost.training.streams import check_vocabulary

Kind = Literal["pretrain", "sft", "dpo"]
"""The tasks."""

Data = TokenLoader | PackedLoader | SftLoader | PairLoader
"""What a task reads from."""

_ONLY: dict[str, tuple[Kind, ...]] = {
    "loss_on": ("sft",),
    "template": ("sft", "dpo"),
    "long": ("sft", "dpo"),
    "bad_lines": ("sft", "dpo"),
    "beta": ("dpo",),
    "label_smoothing": ("dpo",),
    "normalise": ("dpo",),
    "reference": ("dpo",),
}


@dataclass(frozen=True)
class TaskConfig:
    """The keys of a recipe that say what is learned; a key of another task must keep its default.

    task             "pretrain", "sft" or "dpo"
    loss_on          sft: roles whose messages are learned
    template         of prompts: "chat" (`User: ...`) or "plain", as they are
    long             a conversation longer than ctx: "shorten" (its oldest exchanges go) or "drop"
    bad_lines        "fail" at a line that cannot be used, or "skip" and count
    beta, label_smoothing, normalise   see `Dpo`
    reference        file that keeps the reference's log-probabilities; "" = out/reference.safetensors

    Raises ValueError with the name and the value for anything unknown, out of range or without effect.
    """

    task: Kind = "pretrain"
    loss_on: tuple[str, ...] = ("assistant",)
    template: Template = "chat"
    long: LongConversations = "shorten"
    bad_lines: BadLines = "fail"
    beta: float = 0.1
    label_smoothing: float = 0.0
    normalise: bool = False
    reference: str = ""

    def __post_init__(self) -> None:
        choice("task", self.task, get_args(Kind))
        choice("template", self.template, get_args(Template))
        choice("long", self.long, get_args(LongConversations))
        choice("bad_lines", self.bad_lines, get_args(BadLines))
        object.__setattr__(self, "loss_on", check_roles(self.loss_on))
        for name in ("beta", "label_smoothing"):
            value = cast(object, getattr(self, name))
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} is {value!r}; it must be a number")
            object.__setattr__(self, name, float(value))
        check_numbers(self.beta, self.label_smoothing)
        instance("normalise", self.normalise, bool)
        instance("reference", self.reference, str)
        for field in fields(self):
            tasks, value = _ONLY.get(field.name), getattr(self, field.name)
            if tasks and self.task not in tasks and value != field.default:
                raise ValueError(
                    f"{field.name} is {value!r}, which task {self.task!r} ignores: {' and '.join(tasks)} use it"
                )


def open_data(
    task: TaskConfig,
    paths: Sequence[str],
    tokenizer: WorldTokenizer | None,
    *,
    ctx: int,
    batch: int,
    vocab_size: int,
    seed: int = 0,
    order: Order = "shuffle",
    packing: str = "windows",
) -> Data:
    """The data of a run, read and checked without the model. Pairs of "dpo" have no reference yet: see `begin`.

    paths      for "pretrain" one token file; else .jsonl, .jsonl.gz or text files
    tokenizer  of the model; only "pretrain" does without
    ctx        positions a row holds at most;  batch: rows a step ("dpo": pairs a step);  vocab_size: ids of the model
    order, packing   of "pretrain": see TokenLoader; packing "documents": PackedLoader

    Raises ValueError for unusable data, and when the vocabularies do not fit together.
    """
    ctx, batch = whole("ctx", ctx, 1), whole("batch", batch, 1)
    if not paths:
        raise ValueError("data is empty; name at least one file")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    if task.task == "pretrain":
        if len(paths) != 1:
            raise ValueError(f"data is {list(paths)}; pretraining reads one token file")
        if packing == "documents":
            data = PackedLoader(paths[0], ctx, batch, seed=seed)
        else:
            data = TokenLoader(paths[0], ctx, batch, seed=seed, order=order)
        check_vocabulary(data.file, tokenizer, vocab_size)
        return data
    if tokenizer is None:
        raise ValueError(f"task {task.task!r} reads text, and this model's vocabulary is not known: name its file")
    how: dict[str, Any] = {"template": task.template, "long": task.long, "bad_lines": task.bad_lines}
    if task.task == "sft":
        documents = read_conversations(paths, tokenizer, ctx, loss_on=task.loss_on, **how)
        return SftLoader(documents, ctx, batch, seed=seed)
    pairs = read_pairs(paths, tokenizer, ctx, **how)
    unknown = Reference(np.zeros(len(pairs), np.float32), "")
    return PairLoader(pairs, unknown, batch, seed=seed)


def begin(task: TaskConfig, data: Data, model: RWKV, config: TrainConfig, ctx: int) -> tuple[Data, Objective]:
    """The data and the objective of a run that starts from these weights; the reference of "dpo" is made or read here.

    config  its precision, l2wrap and out (the directory, for the reference)
    """
    if task.task == "pretrain":
        return data, partial(next_token_sums, l2wrap=config.l2wrap)
    if not isinstance(data, PairLoader):
        return data, partial(answer_sums, l2wrap=config.l2wrap)
    path = Path(task.reference) if task.reference else Path(config.out) / "reference.safetensors"
    if not task.reference:
        path.parent.mkdir(parents=True, exist_ok=True)
    objective, pairs = Dpo(task.beta, task.label_smoothing, task.normalise), data.documents
    reference = reference_logprobs(
        model, pairs, path, precision=config.precision, normalise=task.normalise, tokens=max(ctx, 8192)
    )
    return PairLoader(pairs, reference, data.batch, seed=data.seed, settings={"objective": repr(objective)}), objective


def summary(data: SftLoader | PairLoader) -> str:
    """One line on what became of the lines of a text."""
    report = data.documents.report
    found = [f"{report.kept:,} {'pairs' if isinstance(data, PairLoader) else 'conversations'}"]
    if report.bad_lines:
        found[0] += f", {report.bad_lines:,} bad line{'s' * (report.bad_lines > 1)}: {report.first_bad[0]}"
    found += [f"{report.shortened:,} shortened"] * (report.shortened > 0)
    found += [f"{report.too_long:,} too long"] * (report.too_long > 0)
    return "; ".join(found)


def answer_sums(model: RWKV, batch: Batch, l2wrap: float = 0.0) -> Sums:
    """`next_token_sums`, where only positions with a target reach the head: most have none in instruction data."""
    features, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens, head=False)
    kept = batch.targets >= 0
    return token_sums(model.head, features[kept][None], batch.targets[kept][None], l2wrap)
