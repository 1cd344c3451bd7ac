"""Model sizes: the numbers that define a network, and the arithmetic that follows from them.

Owns: parameters, FLOPs per token and state size as exact integers (paper appendix E, Table 11).
Refuses to know: tensors, files, devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from roost.checks import choice, instance, nearest, whole

Generation = Literal["dove", "eagle", "finch"]
"""dove = RWKV-4, eagle = RWKV-5 (5.0, 5.1, 5.2), finch = RWKV-6 (x060)."""

GROUP_NORM_EPS = 64e-5
"""1e-5 * 8 ** 2: RWKV-LM divides the head output by 8 and uses 1e-5, which is the same."""


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of one network. Zero means "the generation's rule"; what a generation lacks is 0 afterwards.

    generation   "dove", "eagle" or "finch"
    n_layer      L, number of blocks
    n_embd       D, width of the residual stream
    vocab_size   rows of the embedding and of the head
    dim_att      A, width of time mixing; D in every released model
    dim_ffn      F, width of channel mixing; 4D for dove, 32 * floor(3.5 D / 32) for eagle and finch
    head_size    N, channels per head, 64 in every released model; dove has no heads
    shift_rank   Rm, rank of finch's data-dependent token shift; 32, or 64 at D >= 4096
    decay_rank   Rd, rank of finch's data-dependent decay; 64, or 128 at D >= 4096
    gate         False only for RWKV-5.0, which has neither gate matrix nor SiLU
    time_state   True when the weights hold a tuned initial state per layer (eagle and finch)
    group_norm_eps  64e-5 for every real checkpoint (1e-5 * head_size_divisor ** 2, divisor 8)

    Raises ValueError when a number is not positive, of another type, or when dim_att is no multiple of head_size.
    """

    generation: Generation
    n_layer: int
    n_embd: int
    vocab_size: int = 65536
    dim_att: int = 0
    dim_ffn: int = 0
    head_size: int = 0
    shift_rank: int = 0
    decay_rank: int = 0
    gate: bool = True
    time_state: bool = False
    group_norm_eps: float = GROUP_NORM_EPS

    def __post_init__(self) -> None:
        choice("generation", self.generation, get_args(Generation))
        for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size", "shift_rank", "decay_rank"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        instance("gate", self.gate, bool)
        instance("time_state", self.time_state, bool)
        if not (isinstance(self.group_norm_eps, float) and 0 < self.group_norm_eps < 1):  # pyright: ignore[reportUnnecessaryIsInstance]  (untyped callers)
            raise ValueError(f"group_norm_eps is {self.group_norm_eps!r}; it must lie in 0..1, like {GROUP_NORM_EPS}")
        wide = self.n_embd >= 4096
        rules = {
            "dim_att": self.n_embd,
            "dim_ffn": 4 * self.n_embd if self.generation == "dove" else 7 * self.n_embd // 64 * 32,
            "head_size": 64,
            "shift_rank": 64 if wide else 32,
            "decay_rank": 128 if wide else 64,
        }
        unused = {"dove": ("head_size", "shift_rank", "decay_rank"), "eagle": ("shift_rank", "decay_rank"), "finch": ()}
        for name, value in rules.items():
            if name in unused[self.generation]:
                object.__setattr__(self, name, 0)
            elif getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        for name in ("n_layer", "n_embd", "vocab_size", *rules):
            if getattr(self, name) <= 0 and name not in unused[self.generation]:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.generation != "dove" and self.dim_att % self.head_size:
            raise ValueError(f"dim_att {self.dim_att} is not a multiple of head_size {self.head_size}")

    @property
    def n_head(self) -> int:
        """H, heads of time mixing; 0 for dove, whose state is a vector per channel."""
        return 0 if self.generation == "dove" else self.dim_att // self.head_size

    @property
    def parameters(self) -> int:
        """Exact number of parameters (appendix E; for dim_att = D and F = 3.5 D it equals Table 11)."""
        D, A, F, L = self.n_embd, self.dim_att, self.dim_ffn, self.n_layer
        time = 4 * D * A  # receptance, key, value, output
        channel = 2 * D * F + D * D
        vectors = 4 * D + 2 * D  # ln1, ln2; the two mixing vectors of the channel mix
        if self.generation == "dove":
            time += 3 * D + 2 * A  # mixing vectors; decay, bonus
        else:
            time += A * self.head_size if self.time_state else 0
            time += 4 * A + (D * A if self.gate else 0)  # decay, bonus, ln_x; gate
            time += (4 if self.gate else 3) * D if self.generation == "eagle" else 6 * D
        if self.generation == "finch":
            time += 10 * D * self.shift_rank + (D + A) * self.decay_rank
        return L * (time + channel + vectors) + 4 * D + 2 * self.vocab_size * D

    @property
    def state_size(self) -> int:
        """Floats in the state of one sequence: L (2 D + A N), or L (2 D + 3 A) for dove."""
        per_channel = 3 if self.generation == "dove" else self.head_size
        return self.n_layer * (2 * self.n_embd + self.dim_att * per_channel)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one sequence in fp32."""
        return 4 * self.state_size

    @property
    def inference_flops(self) -> int:
        """FLOPs per token of a forward pass: 2 parameters + 6 A N L (appendix E; the embedding counted as a matmul)."""
        recurrence = 0 if self.generation == "dove" else 6 * self.dim_att * self.head_size * self.n_layer
        return 2 * self.parameters + recurrence

    @property
    def training_flops(self) -> int:
        """FLOPs per token of forward and backward: three times inference."""
        return 3 * self.inference_flops


LARGEST = 2**48
"""Bytes (256 TiB) beyond which weights or a state are a mistake in the sizes."""


def check_config(config: object) -> None:
    """Raise ValueError unless `config` is a ModelConfig whose fp32 weights stay below LARGEST."""
    hint = f"write PRESETS[{nearest(config, PRESETS)!r}]" if isinstance(config, str) else "see PRESETS"
    instance("config", config, ModelConfig, hint)
    assert isinstance(config, ModelConfig)
    check_bytes("the weights", 4 * config.parameters)


def check_bytes(what: str, count: int) -> None:
    """Raise ValueError when `what` would need more than LARGEST bytes."""
    if count > LARGEST:
        raise ValueError(f"{what} would need {count:,} bytes; check the sizes")


class UnknownPreset(KeyError, ValueError):
    """No preset of that name; the message names the nearest."""

    __str__ = ValueError.__str__  # KeyError would show the message in quotes


class Presets(dict[str, ModelConfig]):
    """Sizes by name; an unknown name raises UnknownPreset."""

    def __missing__(self, name: object) -> ModelConfig:
        raise UnknownPreset(f"no preset {name!r}; did you mean {nearest(name, self)!r}?")


PRESETS = Presets(
    {
        "dove-tiny": ModelConfig("dove", 3, 64, vocab_size=257),
        "dove-0.1b": ModelConfig("dove", 12, 768),
        "dove-0.4b": ModelConfig("dove", 24, 1024),
        "dove-1.5b": ModelConfig("dove", 24, 2048),
        "dove-3b": ModelConfig("dove", 32, 2560),
        "dove-7b": ModelConfig("dove", 32, 4096),
        "dove-14b": ModelConfig("dove", 40, 5120, vocab_size=50277),
        "eagle-tiny": ModelConfig("eagle", 3, 64, vocab_size=257, head_size=32),
        "eagle-0.1b": ModelConfig("eagle", 12, 768),
        "eagle-0.4b": ModelConfig("eagle", 24, 1024),
        "eagle-1.5b": ModelConfig("eagle", 24, 2048),
        "eagle-3b": ModelConfig("eagle", 32, 2560),
        "eagle-7b": ModelConfig("eagle", 32, 4096),
        "finch-tiny": ModelConfig("finch", 3, 64, vocab_size=257, head_size=32, shift_rank=8, decay_rank=16),
        "finch-0.1b": ModelConfig("finch", 12, 768),
        "finch-1.6b": ModelConfig("finch", 24, 2048),
        "finch-3b": ModelConfig("finch", 32, 2560),
        "finch-7b": ModelConfig("finch", 32, 4096),
        "finch-14b": ModelConfig("finch", 61, 4096),
        "nestling": ModelConfig("finch", 4, 256, vocab_size=257),
        "nestling-eagle": ModelConfig("eagle", 4, 256, vocab_size=257, dim_ffn=1120),
        "nestling-dove": ModelConfig("dove", 4, 256, vocab_size=257, dim_ffn=1248),
    }
)
"""Every size of the paper, 0.1b of each generation, the RWKV-4 sizes, tiny twins for tests, and what ships, with its
older twins: channel mixing is wider in nestling-eagle and nestling-dove, so that all have 4.01 million parameters."""
