"""The training loss: cross-entropy of the next token, and L2Wrap.

L2Wrap keeps logits from drifting: RWKV-LM adds factor * max_logit / (B T) to the gradient of the largest logit, which
is the gradient of 0.5 * factor * mean(max_logit ** 2). Written as that loss it scales with accumulation and respects
masks.

Owns: both formulas. Refuses to know: models and optimisers.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], l2wrap: float = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(loss to differentiate, cross-entropy in nats per token); targets below 0 are masked in both terms, in fp32."""
    flat, wanted = logits.flatten(0, 1).float(), targets.flatten()
    kept = wanted >= 0
    entropy = F.cross_entropy(flat, wanted.masked_fill(~kept, -100)) if bool(kept.any()) else flat.sum() * 0
    if l2wrap == 0:
        return entropy, entropy.detach()
    pull = (flat.amax(-1).square() * kept).sum() / kept.sum().clamp(min=1)
    return entropy + 0.5 * l2wrap * pull, entropy.detach()
