"""Sampling: from the logits of one position to one token.

Owns: the order of operations, which is what the numbers mean. Mask and bans, then penalties, then one of

    temperature_last    q = softmax(z);  nucleus, top-k, min-p of q;  q^(1/T)      (the `rwkv` package)
    temperature_first   q = softmax(z/T);  top-k, nucleus, min-p of q              (vLLM and other OpenAI-style servers)

in float64, tokens ordered by probability and then by lower id; and the draw: the inverse of that cumulative sum at one
uniform number that depends on (seed, step) alone, so neighbours in a batch cannot change it.
Refuses to know: models, states, text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from operator import index
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roost.tokenizer import WorldTokenizer

Order = Literal["temperature_last", "temperature_first"]
"""When the temperature is applied: after truncation (the nucleus is always that of T = 1), or before."""

_UNCOUNTED = b" \t0123456789"


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults sample from the model as it is; `chatrwkv` and `openai` are presets.

    temperature    >= 0; 0 takes the most probable token, the lowest id among equals
    top_p          0..1, the nucleus; 1 keeps all
    top_k          keep the k most probable; 0 keeps all
    min_p          0..1, drop what is less probable than min_p times the best; 0 keeps all
    presence       subtracted from the logit of every token generated before
    frequency      subtracted once more per count of that token
    penalty_decay  0..1, all counts are multiplied by it after every token; 1 = plain counts
    spare_digits   space, tab and digits are not counted (presence still applies to them)
    bans           ids that are never drawn
    stop           strings that end the text; they are never part of it
    stop_ids       ids that end the text; an id without bytes, such as 0, can only be drawn when it is one of these
    min_tokens     no stop id is drawn before this many tokens
    seed           0..2^64 - 1; None takes a fresh one, which the result reports
    logprobs       n > 0: report the log-probability of each token and the n best alternatives, from the raw logits
    order          "temperature_last" or "temperature_first"
    strict_ties    compute as the `rwkv` package does, in fp32: at T = 0 equal maxima are drawn at random, and top_p
                   near 1 may turn greedy (its sum may never reach top_p); temperature_last only, without min_p

    Raises ValueError naming the field, the value and the legal range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    penalty_decay: float = 1.0
    spare_digits: bool = False
    bans: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = (0,)
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int = 0
    order: Order = "temperature_last"
    strict_ties: bool = False

    @classmethod
    def chatrwkv(cls, **overrides: Any) -> Sampling:
        """The `rwkv` package's defaults: T 1, top_p 0.85, presence and frequency 0.2 with decay 0.996."""
        defaults = {"top_p": 0.85, "presence": 0.2, "frequency": 0.2, "penalty_decay": 0.996, "spare_digits": True}
        return cls._preset(defaults, overrides)

    @classmethod
    def openai(cls, **overrides: Any) -> Sampling:
        """Temperature first, nothing truncated, no penalties: what an OpenAI-style request means by default."""
        return cls._preset({"order": "temperature_first"}, overrides)

    @classmethod
    def _preset(cls, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Sampling:
        known = [entry.name for entry in fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0)[0]
                raise ValueError(f"Sampling has no field {name!r}; did you mean {near!r}?")
        return cls(**{**defaults, **overrides})

    def __post_init__(self) -> None:
        for name, low, high in _NUMBERS:
            object.__setattr__(self, name, _number(name, getattr(self, name), low, high))
        for name in ("top_k", "min_tokens", "logprobs"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        if self.seed is not None and _integer("seed", self.seed) >= 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be below 2^64")
        for name in ("bans", "stop_ids"):
            ids = tuple(_integer(f"an id in {name}", id) for id in _items(name, getattr(self, name)))
            object.__setattr__(self, name, ids)
        object.__setattr__(self, "stop", _items("stop", self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]  (untyped callers)
                raise ValueError(f"stop holds {text!r}; stop strings must be strings that are not empty")
        if self.order not in get_args(Order):
            near = difflib.get_close_matches(str(self.order), get_args(Order), 1, 0)[0]
            raise ValueError(f"order is {self.order!r}; did you mean {near!r}? There are {', '.join(get_args(Order))}")
        if self.strict_ties and (self.order != "temperature_last" or self.min_p):
            raise ValueError("strict_ties copies the `rwkv` package: it needs order='temperature_last' and min_p=0")


_NUMBERS = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence", -math.inf, math.inf),
    ("frequency", -math.inf, math.inf),
    ("penalty_decay", 0.0, 1.0),
)


@dataclass(frozen=True)
class Penalties:
    """What was generated so far, as the penalties see it; a value: `after` returns a new one.

    counts    (decayed) count of every token generated in this call; being a key is enough for `presence`
    uncounted ids that never add to their count (`uncounted_ids`)
    """

    counts: Mapping[int, float] = field(default_factory=dict[int, float])
    uncounted: frozenset[int] = frozenset()

    def after(self, token: int, decay: float) -> Penalties:
        """The penalties once `token` was generated: all counts decay, then this one grows by 1 (or by 0)."""
        counts = {known: count * decay for known, count in self.counts.items()}
        counts[token] = counts.get(token, 0.0) + (0.0 if token in self.uncounted else 1.0)
        return Penalties(counts, self.uncounted)


class Logprob(NamedTuple):
    """One token with its bytes and its natural log-probability under the raw logits."""

    id: int
    bytes: bytes
    logprob: float


class TokenLogprobs(NamedTuple):
    """The token that was drawn, and the best alternatives (it may be among them), most probable first."""

    token: Logprob
    top: tuple[Logprob, ...]


def probabilities(
    logits: Tensor | NDArray[Any],
    params: Sampling,
    penalties: Penalties | None = None,
    forbidden: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """The distribution a token is drawn from, (V,) float64, sum 1. `logits` (V,), any float dtype, is not changed.

    forbidden  (V,) True where a token must not be drawn, beside `params.bans`
    Raises ValueError when logits are NaN or +inf, when nothing is left to draw, or when an id is out of range.
    """
    z = _plain(logits, np.float32 if params.strict_ties else np.float64)
    if z.ndim != 1 or not z.size:
        raise ValueError(f"logits have shape {z.shape}; sampling wants the (V,) logits of one position")
    if forbidden is not None:
        z[forbidden] = -np.inf
    if params.bans:
        if max(params.bans) >= z.size:
            raise ValueError(f"bans holds {max(params.bans)}, but the model has only {z.size} tokens")
        z[list(params.bans)] = -np.inf
    if penalties is not None and penalties.counts and (params.presence or params.frequency):
        counts = np.fromiter(penalties.counts.values(), np.float64)
        z[list(penalties.counts)] -= (params.presence + params.frequency * counts).astype(z.dtype)
    best = z.max()
    if not np.isfinite(best):
        raise ValueError("nothing to draw: every token is banned" if best == -np.inf else "the logits are NaN or inf")
    if params.strict_ties:
        return _strict(z, params)
    if params.temperature == 0:
        return np.eye(1, z.size, int(z.argmax()))[0]
    if params.order == "temperature_first":
        return _temperature_first(z - best, params)
    return _temperature_last(z - best, params)


def draw(p: NDArray[np.float64], seed: int, step: int) -> int:
    """One id from `p` (V,): the inverse CDF, most probable first, at the uniform number of (seed, step)."""
    falling = -np.sort(-p[p > 0])
    cumulative = np.cumsum(falling)
    at = int(np.searchsorted(cumulative, uniform(seed, step) * float(cumulative[-1]), side="right"))
    at = min(at, falling.size - 1)
    before = int(np.count_nonzero(falling > falling[at]))  # the others in front of it are its equals, by id
    return int(np.flatnonzero(p == falling[at])[at - before])


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that belongs to (seed, step): Philox keyed by the seed at counter `step`."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def logprobs(logits: Tensor | NDArray[Any], token: int, n: int, tokenizer: WorldTokenizer) -> TokenLogprobs:
    """Log-softmax of the raw logits (V,) at `token` and at its `n` best, ties by lower id."""
    z = _plain(logits, np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    n = min(n, z.size)
    candidates = np.flatnonzero(z >= np.partition(z, z.size - n)[z.size - n]) if n else np.zeros(0, np.int64)
    best = candidates[np.argsort(-z[candidates], kind="stable")][:n]

    def entry(id: int) -> Logprob:
        return Logprob(id, tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b"", float(z[id]))

    return TokenLogprobs(entry(token), tuple(entry(int(id)) for id in best))


@lru_cache(maxsize=4)
def silent_ids(tokenizer: WorldTokenizer, vocab: int) -> NDArray[np.bool_]:
    """(vocab,) True for the ids that stand for no bytes (World: 0 and 65530..65535); do not write to it."""
    known = min(vocab, tokenizer.vocab_size)
    silent = np.ones(vocab, np.bool_)
    silent[:known] = [not tokenizer.token_bytes(id) for id in range(known)]
    silent.flags.writeable = False
    return silent


def uncounted_ids(tokenizer: WorldTokenizer) -> frozenset[int]:
    """The ids whose text is a substring of space, tab, 0123456789: 22 ids of the World vocabulary."""
    ends = range(len(_UNCOUNTED) + 1)
    encoded = [tokenizer.encode(_UNCOUNTED[start:end]) for start in ends for end in ends if start < end]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)


def _temperature_last(z: NDArray[np.float64], params: Sampling) -> NDArray[np.float64]:
    q = np.exp(z)
    q /= q.sum()
    if params.top_p < 1:
        falling = -np.sort(-q)
        at = int(np.searchsorted(np.cumsum(falling), params.top_p))
        if at < q.size:  # what ties with the token that crosses top_p stays
            q[q < falling[at]] = 0
    if params.top_k:
        _keep_best(q, params.top_k)
    q[q < params.min_p * q.max()] = 0
    if params.temperature != 1:
        kept = q > 0
        log_q = np.log(q[kept])
        with np.errstate(over="ignore"):
            q[kept] = np.exp((log_q - log_q.max()) / params.temperature)  # q^(1/T) itself underflows at small T
    return q / q.sum()


def _temperature_first(z: NDArray[np.float64], params: Sampling) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # -inf is right there
        q = np.exp(z / params.temperature)
    if params.top_k:
        _keep_best(q, params.top_k)
    q /= q.sum()
    if params.top_p < 1:
        crossing = int(np.searchsorted(np.cumsum(-np.sort(-q)), params.top_p))
        _keep_best(q, crossing + 1)
    q[q < params.min_p * q.max()] = 0
    return q / q.sum()


def _keep_best(q: NDArray[np.float64], count: int) -> None:
    """Zero all but the `count` largest; of equals the lower ids stay."""
    if count < q.size:
        cutoff = np.partition(q, q.size - count)[q.size - count]
        q[q < cutoff] = 0
        equal = np.flatnonzero(q == cutoff)
        surplus = int(np.count_nonzero(q >= cutoff)) - count
        q[equal[equal.size - surplus :]] = 0


def _strict(z: NDArray[Any], params: Sampling) -> NDArray[np.float64]:
    greedy = params.temperature == 0
    q: NDArray[Any] = torch.softmax(torch.as_tensor(z), -1).numpy()
    rising = np.argsort(q)
    sorted_q = q[rising][::-1]
    reached = np.cumsum(sorted_q) >= (0.0 if greedy else params.top_p)
    q[q < sorted_q[reached.argmax()]] = 0  # argmax of nothing but False is 0: the package's fault, kept here
    if 0 < params.top_k < q.size:
        q[rising[: -params.top_k]] = 0
    if not greedy and params.temperature != 1:
        q = q ** (1.0 / params.temperature)
    total = q.sum()
    if total == 0:
        raise ValueError(f"temperature {params.temperature} underflows in fp32; use strict_ties=False")
    return (q / total).astype(np.float64)


def _plain(logits: Tensor | NDArray[Any], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """A writable copy on the CPU."""
    if isinstance(logits, Tensor):
        logits = logits.detach().to("cpu", torch.float64).numpy()
    return np.array(logits, dtype=dtype)


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (low <= number <= high and math.isfinite(number)):
        limits = [f">= {low:g}"] * math.isfinite(low) + [f"<= {high:g}"] * math.isfinite(high)
        raise ValueError(f"{name} is {value!r}; it must be a number{' ' * bool(limits)}{' and '.join(limits)}")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number >= 0")
    return number


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)):
        raise ValueError(f"{name} is {value!r}; it must be a tuple, such as ({value!r},)")
    try:
        return tuple(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; it must be a tuple") from error
