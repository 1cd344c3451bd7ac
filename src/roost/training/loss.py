"""The training loss: cross-entropy of the next token, and L2Wrap, as sums over tokens.

L2Wrap keeps logits from drifting: RWKV-LM adds factor * max_logit / (B T) to the gradient of the largest logit, which
is the gradient of 0.5 * factor * mean(max_logit ** 2). Written as that loss it scales with accumulation and respects
masks. Sums, not means: whoever holds all parts of an optimiser step divides by the count of all of them, so N parts
weigh exactly as one.

Owns: both formulas, and that logits of a large batch are never held whole: beyond LARGEST_LOGITS elements they are made
in pieces, each made again in the backward pass.
Refuses to know: equations of models, optimisers, ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from roost.data.batch import Batch
from roost.models.rwkv import RWKV

LARGEST_LOGITS = 2**25
"""Elements of logits held at once; 128 MiB in fp32."""


@dataclass(frozen=True)
class Sums:
    """Sums over the targets of a batch.

    loss     () fp32, differentiable: cross-entropy in nats plus every other term of the objective
    entropy  () fp32, detached: cross-entropy alone, in nats; what is reported
    count    how many targets are not masked; a tensor () on the device, so that nothing waits for it, or an int. The
             loop divides by what it counts itself, over all parts of a step (see `Objective`)
    """

    loss: Tensor
    entropy: Tensor
    count: int | Tensor


Objective = Callable[[RWKV, Batch], Sums]
"""What a run minimises: sums over one part of a step.

The loop divides by the number of targets >= 0 in the whole step; an objective with another unit (pairs, say) has an
attribute `count`, a function of one part of the batch that gives the number of units in it. With an attribute
`figures`, the numbers it returns by name are part of every log line, where finite; it is given a function that adds up
a small tensor over the ranks, and is called on every rank, also after a skipped step, to forget that one.
"""


def next_token_sums(model: RWKV, batch: Batch, l2wrap: float = 0.0, largest: int = LARGEST_LOGITS) -> Sums:
    """Read a batch and predict its targets. Logits beyond `largest` elements are made in pieces (`token_sums`)."""
    features, _ = model(batch.inputs, cu_seqlens=batch.cu_seqlens, head=False)
    return token_sums(model.head, features, batch.targets, l2wrap, largest)


def token_sums(
    head: Callable[[Tensor], Tensor],
    features: Float[Tensor, "B T D"],
    targets: Int[Tensor, "B T"],
    l2wrap: float = 0.0,
    largest: int = LARGEST_LOGITS,
    vocab: int = 0,
) -> Sums:
    """The sums of `logit_sums(head(features), targets, l2wrap)`, without logits of more than `largest` elements.

    `head` is (n, D) -> (n, V); `vocab` is V, by default the rows of head.weight. Pieces are recomputed in the backward
    pass, so the peak holds one piece; values and gradients are those of the whole, to the rounding of the sums.
    """
    count = (targets >= 0).sum()
    flat, wanted = features.flatten(0, 1), targets.flatten()
    vocab = vocab or int(head.weight.shape[0])  # pyright: ignore[reportFunctionMemberAccess]  (a torch module)
    rows = max(1, largest // vocab)
    if len(flat) <= rows:
        whole = logit_sums(head(flat), wanted, l2wrap)
        return Sums(whole[0], whole[1], count)
    loss, entropy = flat.new_zeros((), dtype=torch.float32), flat.new_zeros((), dtype=torch.float32)
    for x, y in zip(flat.split(rows), wanted.split(rows), strict=True):
        piece: tuple[Tensor, Tensor]
        piece = checkpoint(_pieces, head, x, y, l2wrap, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        loss, entropy = loss + piece[0], entropy + piece[1].detach()
    return Sums(loss, entropy, count)


def _pieces(head: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor, l2wrap: float) -> tuple[Tensor, Tensor]:
    return logit_sums(head(x), wanted, l2wrap)


def logit_sums(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], l2wrap: float = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(sum to differentiate, summed cross-entropy in nats), fp32 (fp64 for fp64); targets below 0 count in neither."""
    flat = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets >= 0
    entropy = F.cross_entropy(flat, targets.masked_fill(~kept, -100), reduction="sum")
    if l2wrap == 0:
        return entropy, entropy.detach()
    pull = (flat.max(-1).values.square() * kept).sum()  # the gradient of max goes to one logit, as in RWKV-LM
    return entropy + 0.5 * l2wrap * pull, entropy.detach()


def next_token_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], l2wrap: float = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(loss to differentiate, cross-entropy in nats per token) of logits that are held whole: `logit_sums` / count."""
    loss, entropy = logit_sums(logits.flatten(0, 1), targets.flatten(), l2wrap)
    count = (targets >= 0).sum().clamp(min=1)
    return loss / count, entropy / count
