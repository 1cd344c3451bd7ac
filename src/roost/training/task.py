"""What a run learns from its data: "pretrain" on a token file, "sft" on conversations, "dpo" on pairs of answers.

Owns: the recipe keys that choose a task, their checks, and which data go with which objective.
Refuses to know: recipes as files, the loop, what a loss is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

from roost.checks import choice, instance, whole
from roost.data.batch import Batch, Batches
from roost.data.conversations import BadLines, Template
from roost.data.loader import TokenLoader
from roost.data.pairs import PairLoader, read_pairs
from roost.data.sft import LongConversations, SftLoader, check_roles, read_conversations
from roost.models.rwkv import RWKV
from roost.tokenizer import WorldTokenizer
from roost.training.config import TrainConfig
from roost.training.dpo import Dpo, check_numbers, reference_logprobs
from roost.training.loss import Objective, Sums, next_token_sums, token_sums

Kind = Literal["pretrain", "sft", "dpo"]
"""The tasks."""

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


def open_task(
    task: TaskConfig,
    data: tuple[str, ...],
    model: RWKV,
    tokenizer: WorldTokenizer | None,
    config: TrainConfig,
    *,
    ctx: int,
    batch: int,
) -> tuple[Batches, Objective]:
    """The data and the objective of a run. Call it with the weights that training starts from.

    data       for "pretrain" one token file; else .jsonl, .jsonl.gz or text files
    tokenizer  of the model; only "pretrain" does without
    config     its seed, precision, l2wrap and out (the directory, for the reference of "dpo")
    ctx        positions a row holds at most;  batch: rows a step ("dpo": pairs a step)

    What was read, cut and left out: `documents.report` of the data, for sft and dpo. Raises ValueError for unusable
    data, and when the vocabularies do not fit together.
    """
    ctx, batch = whole("ctx", ctx, 1), whole("batch", batch, 1)
    if task.task == "pretrain":
        if len(data) != 1:
            raise ValueError(f"data is {list(data)}; pretraining reads one token file")
        return TokenLoader(data[0], ctx, batch, seed=config.seed), partial(next_token_sums, l2wrap=config.l2wrap)
    if not data:
        raise ValueError("data is empty; name at least one file")
    instance("tokenizer", tokenizer, WorldTokenizer, "conversations are text: the model needs its vocabulary")
    assert tokenizer is not None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}")
    if task.task == "sft":
        documents = read_conversations(
            data,
            tokenizer,
            ctx,
            loss_on=task.loss_on,
            template=task.template,
            long=task.long,
            bad_lines=task.bad_lines,
        )
        return SftLoader(documents, ctx, batch, seed=config.seed), partial(answer_sums, l2wrap=config.l2wrap)
    pairs = read_pairs(data, tokenizer, ctx, template=task.template, long=task.long, bad_lines=task.bad_lines)
    path = Path(task.reference) if task.reference else Path(config.out) / "reference.safetensors"
    if not task.reference:
        path.parent.mkdir(parents=True, exist_ok=True)
    objective = Dpo(task.beta, task.label_smoothing, task.normalise)
    reference = reference_logprobs(
        model, pairs, path, precision=config.precision, normalise=task.normalise, tokens=max(ctx, 8192)
    )
    return PairLoader(pairs, reference, batch, seed=config.seed, settings={"objective": repr(objective)}), objective


def answer_sums(model: RWKV, batch: Batch, l2wrap: float = 0.0) -> Sums:
    """`next_token_sums`, where only positions with a target reach the head: most have none in instruction data."""
    features, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens, head=False)
    kept = batch.targets >= 0
    return token_sums(model.head, features[kept][None], batch.targets[kept][None], l2wrap)
