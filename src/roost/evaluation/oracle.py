"""The oracle: RWKV-4, 5.0, 5.1, 5.2 and 6 in NumPy float64, one equation after the other.

Owns: the definition of the networks as the paper (arXiv 2404.05892) writes it, from the original checkpoint tensors.
Time mixing runs token by token and head by head. `roost verify` and the tests hold every other implementation against
this one, so it shares no code with them and is written to be checked by eye, not to be fast.
Refuses to know: torch, the rest of roost, files, batches.

Letters: T time, D model width, A time-mix width, F channel-mix width, h heads, N = A / h, V vocabulary.
Row vectors: y = x W; a checkpoint stores W transposed, as [out, in], except the low-rank matrices `*_w1` and `*_w2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
LayerState: TypeAlias = dict[str, Array]
"""What one block carries between calls.

att_shift, ffn_shift  (D,) the last output of ln1 and of ln2
RWKV-5 and 6          wkv (h, N, N): key channel, value channel
RWKV-4                aa, bb, pp (A,): numerator aa e^pp and denominator bb e^pp of the average; pp = -1e30 when empty
"""
Trace: TypeAlias = Callable[[str, Array], None]

LAYER_NORM_EPS = 1e-5
GROUP_NORM_EPS = 64e-5
HEAD_ROWS = 8192  # rows of head.weight converted to float64 at a time


class Tensors:
    """The checkpoint, one tensor at a time as float64; remembers what was read, so that nothing can be ignored."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.weights = weights
        self.read: set[str] = set()

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as it is stored. Raises ValueError when the checkpoint lacks it."""
        if name not in self.weights:
            near = get_close_matches(name, self.weights, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"the checkpoint has no tensor {name}{hint}; the oracle reads RWKV-4, 5 and 6 (x060) only")
        self.read.add(name)
        return self.weights[name]

    def __call__(self, name: str) -> Array:
        """The tensor in float64, shape as stored."""
        return np.asarray(self.raw(name), dtype=np.float64)

    def vector(self, name: str) -> Array:
        """The tensor in float64, flat: [1, 1, D] and [D] are both stored."""
        return self(name).reshape(-1)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds `name`."""
        return name in self.weights


def generation(weights: Mapping[str, NDArray[Any]]) -> int:
    """4, 5 or 6, from the tensors of block 0: data-dependent shift is 6, else a group norm is 5, else 4."""
    if any(".time_maa_" in name for name in weights):
        return 6
    return 5 if "blocks.0.att.ln_x.weight" in weights else 4


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def layer_norm(get: Tensors, name: str, x: Array) -> Array:
    """LayerNorm over D, biased variance, eps 1e-5; (T, D) -> (T, D)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + LAYER_NORM_EPS) * get(f"{name}.weight") + get(f"{name}.bias")


def group_norm(get: Tensors, name: str, y: Array, eps: float) -> Array:
    """Each head normalised alone, biased variance, weight and bias per channel; (T, h, N) -> (T, A)."""
    centred = y - y.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    flat = (centred / np.sqrt(variance + eps)).reshape(len(y), y.shape[1] * y.shape[2])
    return flat * get(f"{name}.weight") + get(f"{name}.bias")


def previous(a: Array, carried: Array) -> Array:
    """a_{t-1} for every t: the carried row, then all rows but the last; (T, D)."""
    return np.concatenate([carried[None], a])[:-1]


def last(a: Array, carried: Array) -> Array:
    """The row to carry on: a_{T-1}, or the carried one when T = 0."""
    return np.concatenate([carried[None], a])[-1].copy()


def wkv_heads(r: Array, k: Array, v: Array, w: Array, u: Array, start: Array) -> tuple[Array, Array]:
    """Equations 6 and 19: r, k, v, w (T, h, N), u (h, N), start (h, N, N) -> y (T, h, N), state (h, N, N).

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t): the output reads the state before w_t is applied
    S_t = diag(w_t) S_{t-1} + k_t^T v_t
    """
    state = start.copy()
    y = np.zeros_like(v)
    for t in range(r.shape[0]):
        for head in range(r.shape[1]):
            outer = np.outer(k[t, head], v[t, head])
            y[t, head] = r[t, head] @ (state[head] + u[head][:, None] * outer)
            state[head] = w[t, head][:, None] * state[head] + outer
    return y, state


def wkv_average(k: Array, v: Array, w: Array, u: Array, start: LayerState) -> tuple[Array, LayerState]:
    """RWKV-4's weighted average (equation 2): k, v (T, A), decay rate w > 0 and bonus u (A,) -> y (T, A), state.

    y_t = (alpha_{t-1} + e^{u + k_t} v_t) / (beta_{t-1} + e^{u + k_t})
    alpha_t = e^-w alpha_{t-1} + e^{k_t} v_t        beta_t = e^-w beta_{t-1} + e^{k_t}
    carried as alpha = aa e^pp and beta = bb e^pp, pp the largest exponent so far, so that no exponential overflows.
    """
    aa, bb, pp = start["aa"].copy(), start["bb"].copy(), start["pp"].copy()
    y = np.zeros_like(v)
    for t in range(k.shape[0]):
        top = np.maximum(pp, u + k[t])
        old, new = np.exp(pp - top), np.exp(u + k[t] - top)
        y[t] = (old * aa + new * v[t]) / (old * bb + new)
        top = np.maximum(pp - w, k[t])
        old, new = np.exp(pp - w - top), np.exp(k[t] - top)
        aa, bb, pp = old * aa + new * v[t], old * bb + new, top
    return y, {"aa": aa, "bb": bb, "pp": pp}


def time_mix_4(get: Tensors, att: str, a: Array, state: LayerState) -> tuple[Array, LayerState]:
    """RWKV-4: scalar heads, sigmoid receptance, no norm and no gate; (T, D) -> (T, D)."""
    before = previous(a, state["att_shift"])

    def project(letter: str, matrix: str) -> Array:
        mix = get.vector(f"{att}.time_mix_{letter}")
        return (a * mix + before * (1 - mix)) @ get(f"{att}.{matrix}.weight").T

    r, k, v = project("r", "receptance"), project("k", "key"), project("v", "value")
    w, u = np.exp(get.vector(f"{att}.time_decay")), get.vector(f"{att}.time_first")
    y, carried = wkv_average(k, v, w, u, state)
    return (sigmoid(r) * y) @ get(f"{att}.output.weight").T, carried


def time_mix_5(get: Tensors, att: str, a: Array, state: LayerState, eps: float) -> tuple[Array, LayerState]:
    """RWKV-5 (equations 3-9): static shift, static decay; 5.0 has no gate; 5.0 and 5.1 have one w and u per head."""
    before = previous(a, state["att_shift"])

    def project(letter: str, matrix: str) -> Array:
        mix = get.vector(f"{att}.time_mix_{letter}")
        return (a * mix + before * (1 - mix)) @ get(f"{att}.{matrix}.weight").T

    r, k, v = project("r", "receptance"), project("k", "key"), project("v", "value")
    h, N = state["wkv"].shape[:2]
    w = np.exp(-np.exp(get(f"{att}.time_decay").reshape(h, -1)))
    if get.has(f"{att}.time_first"):
        u = np.exp(get(f"{att}.time_first").reshape(h, -1))  # the name, not the version, says that it is a logarithm
    else:
        u = get(f"{att}.time_faaaa").reshape(h, -1)
    y, wkv = wkv_heads(
        r.reshape(-1, h, N),
        k.reshape(-1, h, N),
        v.reshape(-1, h, N),
        np.broadcast_to(w, (len(a), h, N)),
        np.broadcast_to(u, (h, N)),
        state["wkv"],
    )
    out = group_norm(get, f"{att}.ln_x", y, eps)
    if get.has(f"{att}.gate.weight"):
        g = project("g", "gate")
        out = g * sigmoid(g) * out
    return out @ get(f"{att}.output.weight").T, {"wkv": wkv}


def time_mix_6(get: Tensors, att: str, a: Array, state: LayerState, eps: float) -> tuple[Array, LayerState]:
    """RWKV-6 (equations 14-22): data-dependent shift, one decay per token and channel."""
    delta = previous(a, state["att_shift"]) - a
    z = a + delta * get.vector(f"{att}.time_maa_x")
    down, up = get(f"{att}.time_maa_w1"), get(f"{att}.time_maa_w2")  # [D, 5 Rm], [5, Rm, D]: both w, k, v, r, g
    rank = up.shape[1]
    shifted: dict[str, Array] = {}
    for i, letter in enumerate("wkvrg"):
        m = np.tanh(z @ down[:, i * rank : (i + 1) * rank]) @ up[i]
        shifted[letter] = a + delta * (get.vector(f"{att}.time_maa_{letter}") + m)
    r = shifted["r"] @ get(f"{att}.receptance.weight").T
    k = shifted["k"] @ get(f"{att}.key.weight").T
    v = shifted["v"] @ get(f"{att}.value.weight").T
    g = shifted["g"] @ get(f"{att}.gate.weight").T
    low = np.tanh(shifted["w"] @ get(f"{att}.time_decay_w1"))
    w = np.exp(-np.exp(get.vector(f"{att}.time_decay") + low @ get(f"{att}.time_decay_w2")))
    h, N = state["wkv"].shape[:2]
    y, wkv = wkv_heads(
        r.reshape(-1, h, N),
        k.reshape(-1, h, N),
        v.reshape(-1, h, N),
        w.reshape(-1, h, N),
        get(f"{att}.time_faaaa").reshape(h, N),
        state["wkv"],
    )
    out = g * sigmoid(g) * group_norm(get, f"{att}.ln_x", y, eps)
    return out @ get(f"{att}.output.weight").T, {"wkv": wkv}


def channel_mix(get: Tensors, ffn: str, a: Array, carried: Array) -> Array:
    """Equations 10-13, all versions: (T, D) -> (T, D). `mix` weights this token, `maa` = 1 - mix the one before."""
    before = previous(a, carried)

    def shifted(letter: str) -> Array:
        if get.has(f"{ffn}.time_maa_{letter}"):
            return a + (before - a) * get.vector(f"{ffn}.time_maa_{letter}")
        mix = get.vector(f"{ffn}.time_mix_{letter}")
        return a * mix + before * (1 - mix)

    k = shifted("k") @ get(f"{ffn}.key.weight").T
    r = shifted("r") @ get(f"{ffn}.receptance.weight").T
    return sigmoid(r) * (np.maximum(k, 0) ** 2 @ get(f"{ffn}.value.weight").T)


def block(get: Tensors, i: int, x: Array, layer: LayerState, eps: float, say: Trace) -> tuple[Array, LayerState]:
    """x + TimeMix(LN1(x)), then x + ChannelMix(LN2(x)): the residual stream (T, D) and the block's state."""
    name, version = f"blocks.{i}", generation(get.weights)
    a = layer_norm(get, f"{name}.ln1", x)
    if version == 4:
        out, carried = time_mix_4(get, f"{name}.att", a, layer)
    elif version == 5:
        out, carried = time_mix_5(get, f"{name}.att", a, layer, eps)
    else:
        out, carried = time_mix_6(get, f"{name}.att", a, layer, eps)
    say(f"{name}.att", out)
    x = x + out
    b = layer_norm(get, f"{name}.ln2", x)
    out = channel_mix(get, f"{name}.ffn", b, layer["ffn_shift"])
    say(f"{name}.ffn", out)
    x = x + out
    say(name, x)
    return x, {"att_shift": last(a, layer["att_shift"]), "ffn_shift": last(b, layer["ffn_shift"]), **carried}


def initial_state(weights: Mapping[str, NDArray[Any]]) -> list[LayerState]:
    """The state before the first token: zeros, or the checkpoint's `time_state` ([h, value, key], transposed here)."""
    return _initial_state(Tensors(weights))


def _initial_state(get: Tensors) -> list[LayerState]:
    version = generation(get.weights)
    D = get.raw("emb.weight").shape[1]
    layers = 1 + max((int(name.split(".")[1]) for name in get.weights if name.startswith("blocks.")), default=-1)
    states: list[LayerState] = []
    for i in range(layers):
        att = f"blocks.{i}.att"
        A = get.raw(f"{att}.key.weight").shape[0]
        state: LayerState = {"att_shift": np.zeros(D), "ffn_shift": np.zeros(D)}
        if version == 4:
            state |= {"aa": np.zeros(A), "bb": np.zeros(A), "pp": np.full(A, -1e30)}
        else:
            h = get.raw(f"{att}.time_faaaa" if version == 6 else f"{att}.time_decay").shape[0]
            state["wkv"] = np.zeros((h, A // h, A // h))
            if get.has(f"{att}.time_state"):
                state["wkv"] = get(f"{att}.time_state").transpose(0, 2, 1).copy()
        states.append(state)
    return states


def forward(
    weights: Mapping[str, NDArray[Any]],
    tokens: Sequence[int],
    state: Sequence[Mapping[str, Array]] | None = None,
    *,
    group_norm_eps: float = GROUP_NORM_EPS,
    trace: Trace | None = None,
) -> tuple[Array, list[LayerState]]:
    """Logits of every token, float64 (T, V), and the state after the last one.

    weights         official checkpoint names and shapes as stored, any float dtype; version and sizes are read from
                    them, each tensor becomes float64 only while its layer runs
    tokens          T >= 0 ids below V
    state           what an earlier call returned (see `LayerState`), never changed; None = `initial_state(weights)`
    group_norm_eps  64e-5 for every real checkpoint of RWKV-5 and 6; RWKV-4 has no group norm
    trace           called with (name, value stacked over T), in this order: "emb", "ln0"; per block i
                    "blocks.{i}.att" and "blocks.{i}.ffn" (what each sub-layer adds), "blocks.{i}" (the residual
                    stream after the block); "ln_out", "logits"

    Raises ValueError for a missing tensor, one that no equation reads, a token outside the vocabulary, or a state of
    another depth.
    """
    get = Tensors(weights)
    say: Trace = trace if trace is not None else lambda name, value: None
    fresh = _initial_state(get)
    states = [dict(layer) for layer in (fresh if state is None else state)]
    if len(states) != len(fresh):
        raise ValueError(f"the state has {len(states)} layers, the checkpoint {len(fresh)}")
    ids = np.asarray(tokens, dtype=np.int64)
    table = get.raw("emb.weight")
    if ids.size and (ids.min() < 0 or ids.max() >= len(table)):
        raise ValueError(f"tokens span {ids.min()}..{ids.max()}; they must be in 0..{len(table) - 1}")

    x = np.asarray(table[ids], dtype=np.float64)
    say("emb", x)
    x = layer_norm(get, "blocks.0.ln0", x)
    say("ln0", x)
    for i, layer in enumerate(states):
        x, states[i] = block(get, i, x, layer, group_norm_eps, say)
    x = layer_norm(get, "ln_out", x)
    say("ln_out", x)
    head = get.raw("head.weight")
    rows = range(0, len(head), HEAD_ROWS)
    logits = np.concatenate([x @ np.asarray(head[n : n + HEAD_ROWS], dtype=np.float64).T for n in rows], axis=1)
    say("logits", logits)
    unread = ", ".join(sorted(set(weights) - get.read))
    if unread:
        raise ValueError(
            f"no equation of RWKV-{generation(weights)} reads {unread}; the oracle does not know this model"
        )
    return logits, states
