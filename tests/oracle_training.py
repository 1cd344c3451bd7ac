"""The oracle of training: one step of RWKV-LM in NumPy float64, from the tokens to the new weights.

    loss      mean over the B T tokens of -log softmax(logits)[target]
    L2Wrap    1e-4 max_v logits / (B T) is added to the gradient of the largest logit of every token (class L2Wrap)
    clip      gradients times min(1, clip / (norm + 1e-6)), norm over all parameters together
    AdamW     theta <- theta (1 - lr wd) - lr m^ / (sqrt(v^) + eps), lr and wd by parameter group

Owns: Eagle (x052) and Finch (x060) of RWKV-LM's model.py a second time, on a small tape that differentiates them; that
formula of the loss; the groups, the schedule and the optimiser. The tests hold its forward pass against oracle.py and
its gradients against central differences of oracle.py.
Refuses to know: torch, roost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Weights: TypeAlias = dict[str, Array]
_order = count()


class Var:
    """A value on the tape, and how a gradient of it becomes gradients of what it was made from."""

    def __init__(self, value: Array, *parents: tuple[Var, Callable[[Array], Array]]) -> None:
        self.value, self.parents, self.number = value, parents, next(_order)
        self.grad: Array = np.zeros_like(value)

    def __add__(self, other: Var | float) -> Var:
        b = _var(other)
        return Var(self.value + b.value, (self, lambda g: g), (b, lambda g: g))

    def __mul__(self, other: Var | float) -> Var:
        b = _var(other)
        return Var(self.value * b.value, (self, lambda g: g * b.value), (b, lambda g: g * self.value))

    def __sub__(self, other: Var | float) -> Var:
        return self + _var(other) * -1.0

    def __matmul__(self, b: Var) -> Var:
        transposed = (self.value.swapaxes(-1, -2), b.value.swapaxes(-1, -2))
        return Var(self.value @ b.value, (self, lambda g: g @ transposed[1]), (b, lambda g: transposed[0] @ g))

    def __getitem__(self, index: Any) -> Var:
        def back(g: Array) -> Array:
            whole = np.zeros_like(self.value)
            np.add.at(whole, index, g)
            return whole

        return Var(self.value[index], (self, back))

    def view(self, *shape: int) -> Var:
        """The same elements in another shape."""
        return Var(self.value.reshape(shape), (self, lambda g: g.reshape(self.value.shape)))

    @property
    def T(self) -> Var:
        """A matrix transposed."""
        return Var(self.value.T, (self, lambda g: g.T))

    def sum(self, axis: int) -> Var:
        """Sum over one axis, which stays with length 1."""
        return Var(self.value.sum(axis, keepdims=True), (self, lambda g: np.broadcast_to(g, self.value.shape)))


def _var(x: Var | float) -> Var:
    return x if isinstance(x, Var) else Var(np.asarray(x, np.float64))


def apply(x: Var, value: Array, slope: Array) -> Var:
    """An elementwise function of x, given by its values and its derivative."""
    return Var(value, (x, lambda g: g * slope))


def exp(x: Var) -> Var:
    return apply(x, np.exp(x.value), np.exp(x.value))


def tanh(x: Var) -> Var:
    return apply(x, np.tanh(x.value), 1 - np.tanh(x.value) ** 2)


def sigmoid(x: Var) -> Var:
    y = 1 / (1 + np.exp(-x.value))
    return apply(x, y, y * (1 - y))


def relu_squared(x: Var) -> Var:
    return apply(x, np.maximum(x.value, 0) ** 2, 2 * np.maximum(x.value, 0))


def stack(parts: Sequence[Var]) -> Var:
    """Joined along a new axis 1."""
    joined = np.stack([part.value for part in parts], 1)
    return Var(joined, *((part, lambda g, i=i: g[:, i]) for i, part in enumerate(parts)))


def backward(root: Var, gradient: Array) -> None:
    """Add d <gradient, root> / d x to the `grad` of every x that root was made from."""
    found, waiting = {root.number: root}, [root]
    while waiting:
        for parent, _ in waiting.pop().parents:
            if parent.number not in found:
                found[parent.number] = parent
                waiting.append(parent)
    root.grad = gradient
    for number in sorted(found, reverse=True):  # what was made later needs its gradient first
        for parent, back in found[number].parents:
            g = back(found[number].grad)
            extra = g.ndim - parent.value.ndim
            g = g.sum(axis=tuple(range(extra)))
            wide = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and g.shape[i] > 1)
            parent.grad = parent.grad + g.sum(axis=wide, keepdims=True)


def norm(x: Var, weight: Var, bias: Var, eps: float) -> Var:
    """LayerNorm over the last axis."""
    n = x.value.shape[-1]
    centred = x - x.sum(-1) * (1 / n)
    variance = (centred * centred).sum(-1) * (1 / n) + eps
    scale = apply(variance, variance.value**-0.5, -0.5 * variance.value**-1.5)
    return centred * scale * weight + bias


def shift(x: Var) -> Var:
    """nn.ZeroPad2d((0, 0, 1, -1)): (B, T, D) one token later, zeros first."""
    value = np.concatenate([np.zeros_like(x.value[:, :1]), x.value[:, :-1]], 1)
    return Var(value, (x, lambda g: np.concatenate([g[:, 1:], np.zeros_like(g[:, :1])], 1)))


def wkv(r: Var, k: Var, v: Var, w: Var, u: Var) -> Var:
    """r, k, v (B, T, h, N), w the same or (1, 1, h, N), u (h, N): y_t = r_t (S + u k_t v_t), S = w_t S + k_t v_t."""
    B, T, h, N = r.value.shape
    S = Var(np.zeros((B, h, N, N)))
    out: list[Var] = []
    for t in range(T):
        kv = k[:, t].view(B, h, N, 1) * v[:, t].view(B, h, 1, N)
        out.append((r[:, t].view(B, h, N, 1) * (S + u.view(h, N, 1) * kv)).sum(2).view(B, h, N))
        decay = w[:, t if w.value.shape[1] > 1 else 0]
        S = decay.view(decay.value.shape[0], h, N, 1) * S + kv
    return stack(out)


def time_mix(p: Mapping[str, Var], x: Var, eps: float) -> Var:
    """RWKV_Tmix_x052 or RWKV_Tmix_x060, told apart by their tensors."""
    B, T, _ = x.value.shape
    h, N = p["time_faaaa"].value.shape
    before = shift(x)
    if "time_maa_x" in p:
        xx, w1, w2 = before - x, p["time_maa_w1"], p["time_maa_w2"]
        low, rank = tanh((x + xx * p["time_maa_x"]) @ w1), w2.value.shape[1]
        mixed = {
            c: x + xx * (p[f"time_maa_{c}"] + low[..., i * rank : (i + 1) * rank] @ w2[i])
            for i, c in enumerate("wkvrg")
        }
        raw = p["time_decay"] + tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
        w = exp(exp(raw) * -1.0).view(B, T, h, N)
    else:
        mixed = {c: x * p[f"time_mix_{c}"] + before * (p[f"time_mix_{c}"] * -1.0 + 1.0) for c in "kvrg"}
        w = exp(exp(p["time_decay"]) * -1.0).view(1, 1, h, N)
    matrices = {"r": "receptance", "k": "key", "v": "value", "g": "gate"}
    made = {c: mixed[c] @ p[f"{name}.weight"].T for c, name in matrices.items()}
    r, k, v = (made[c].view(B, T, h, N) for c in "rkv")
    y = wkv(r, k, v, w, p["time_faaaa"])
    y = norm(y, p["ln_x.weight"].view(h, N), p["ln_x.bias"].view(h, N), eps).view(B, T, h * N)
    return (y * (made["g"] * sigmoid(made["g"]))) @ p["output.weight"].T


def channel_mix(p: Mapping[str, Var], x: Var) -> Var:
    """RWKV_CMix_x052 or RWKV_CMix_x060."""
    before = shift(x)
    if "time_maa_k" in p:
        k, r = (x + (before - x) * p[f"time_maa_{c}"] for c in "kr")
    else:
        k, r = (x * p[f"time_mix_{c}"] + before * (p[f"time_mix_{c}"] * -1.0 + 1.0) for c in "kr")
    value = relu_squared(k @ p["key.weight"].T) @ p["value.weight"].T
    return sigmoid(r @ p["receptance.weight"].T) * value


def logits_of(weights: Mapping[str, Var], tokens: NDArray[np.int64]) -> Var:
    """(B, T) ids -> (B, T, V), every row from a state of zeros."""

    def under(prefix: str) -> dict[str, Var]:
        return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}

    def layer_norm(name: str, x: Var) -> Var:
        return norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = layer_norm("blocks.0.ln0", weights["emb.weight"][tokens])
    for i in range(sum(name.endswith(".ln1.weight") for name in weights)):
        x = x + time_mix(under(f"blocks.{i}.att."), layer_norm(f"blocks.{i}.ln1", x), 1e-5 * 8**2)
        x = x + channel_mix(under(f"blocks.{i}.ffn."), layer_norm(f"blocks.{i}.ln2", x))
    return layer_norm("ln_out", x) @ weights["head.weight"].T


def logit_gradient(logits: Array, targets: NDArray[np.int64], l2wrap: float) -> tuple[float, Array]:
    """Mean cross-entropy in nats and its gradient (B, T, V), with L2Wrap's own gradient added to the latter."""
    B, T, _ = logits.shape
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    p = odds / odds.sum(-1, keepdims=True)
    chosen = (*np.indices((B, T)), targets)
    loss = -np.log(p[chosen]).mean()
    gradient = p / (B * T)
    gradient[chosen] -= 1 / (B * T)
    gradient[(*np.indices((B, T)), logits.argmax(-1))] += l2wrap * logits.max(-1) / (B * T)
    return float(loss), gradient


def gradients(
    weights: Mapping[str, Array], inputs: NDArray[np.int64], targets: NDArray[np.int64], l2wrap: float = 1e-4
) -> tuple[float, Weights]:
    """The loss of one batch and what RWKV-LM's backward pass leaves in every parameter's `grad`, before clipping."""
    leaves = {name: Var(np.asarray(value, np.float64)) for name, value in weights.items()}
    logits = logits_of(leaves, inputs)
    loss, gradient = logit_gradient(logits.value, targets, l2wrap)
    backward(logits, gradient)
    return loss, {name: leaf.grad for name, leaf in leaves.items()}


@dataclass(frozen=True)
class Recipe:
    """Numbers of a run: cosine by tokens with a linear warm-up, AdamW, the largest gradient norm, L2Wrap."""

    steps: int
    lr: float
    lr_final: float
    warmup: int
    warmup_from: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    l2wrap: float


DECAYED = ("emb", "head", "receptance", "key", "value", "gate", "output")
"""Modules whose weight matrices decay."""


def rate(step: int, r: Recipe) -> float:
    """RWKV-LM's learning rate of one step, before the factor of the group."""
    q = min(max((step - r.warmup) / (r.steps - r.warmup), 0.0), 1.0)
    phi = r.lr_final / r.lr
    lr = r.lr * ((0.5 + phi / 2) + (0.5 - phi / 2) * np.cos(np.pi * q))
    return lr * (r.warmup_from + (1 - r.warmup_from) * step / r.warmup) if step < r.warmup else lr


@dataclass(frozen=True)
class Step:
    """What one step saw and left: loss before it, gradient norm before clipping, the weights after it."""

    loss: float
    norm: float
    weights: Weights


def train(
    weights: Mapping[str, NDArray[Any]], batches: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], recipe: Recipe
) -> list[Step]:
    """One optimiser step for each (inputs, targets), both (B, T)."""
    theta = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    m, v = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    done: list[Step] = []
    for s, (inputs, targets) in enumerate(batches):
        loss, g = gradients(theta, inputs, targets, recipe.l2wrap)
        length = np.sqrt(sum((x**2).sum() for x in g.values()))
        theta = dict(theta)
        for name, x in g.items():
            x = x * min(1.0, recipe.clip / (length + 1e-6))
            m[name] = recipe.beta1 * m[name] + (1 - recipe.beta1) * x
            v[name] = recipe.beta2 * v[name] + (1 - recipe.beta2) * x**2
            lr = rate(s, recipe) * (2.0 if name.endswith("att.time_decay") else 1.0)
            decay = recipe.weight_decay if name.split(".")[-2] in DECAYED else 0.0
            move = (m[name] / (1 - recipe.beta1 ** (s + 1))) / (
                np.sqrt(v[name] / (1 - recipe.beta2 ** (s + 1))) + recipe.eps
            )
            theta[name] = theta[name] * (1 - lr * decay) - lr * move
        done.append(Step(loss, float(length), theta))
    return done
