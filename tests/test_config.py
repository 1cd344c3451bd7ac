"""Sizes: exact integers of the paper's Table 11 and of the official shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from roost import PRESETS, RWKV, ModelConfig

TABLE = {
    "eagle-0.1b": (192807936, 608256, 389154816),
    "eagle-0.4b": (461721600, 1622016, 932880384),
    "eagle-1.5b": (1577754624, 3244032, 3174383616),
    "eagle-3b": (3062999040, 5406720, 6157455360),
    "eagle-7b": (7518044160, 8650752, 15086419968),
    "finch-0.1b": (196955136, 608256, 397449216),
    "finch-1.6b": (1599873024, 3244032, 3218620416),
    "finch-3b": (3099863040, 5406720, 6231183360),
    "finch-7b": (7635746816, 8650752, 15321825280),
    "finch-14b": (14069088256, 16490496, 28234121216),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_11(name: str) -> None:
    config = PRESETS[name]
    assert (config.parameters, config.state_size, config.inference_flops) == TABLE[name]
    assert config.training_flops == 3 * config.inference_flops
    assert config.state_bytes == 4 * config.state_size


def test_other_published_counts() -> None:
    assert ModelConfig("dove", 12, 768, vocab_size=50277).parameters == 169342464
    for name, layers, width in (("0.4b", 24, 1024), ("1.5b", 24, 2048), ("3b", 32, 2560), ("7b", 32, 4096)):
        config = PRESETS[f"dove-{name}"]  # 13 D^2 L + 11 D L + 4 D + 2 D V, architecture of RWKV-v4neo
        assert config.parameters == (13 * width + 11) * width * layers + 4 * width + 2 * width * 65536
        assert config.inference_flops == 2 * config.parameters
    assert ModelConfig("finch", 12, 768, vocab_size=50277).parameters == 173517312
    assert ModelConfig("eagle", 24, 512, vocab_size=128).parameters == 82094080
    assert replace(PRESETS["finch-7b"], shift_rank=32, decay_rank=64).parameters == 7577026560
    assert PRESETS["dove-0.1b"].state_size == 5 * 768 * 12
    assert round(PRESETS["finch-1.6b"].state_bytes / 1e6, 2) == 12.98


ODD = [
    ModelConfig("finch", 1, 96, vocab_size=50, dim_att=64, dim_ffn=100, head_size=16, shift_rank=5, decay_rank=7),
    ModelConfig("eagle", 2, 64, vocab_size=50, dim_att=128, head_size=32, time_state=True),
    ModelConfig("eagle", 2, 64, vocab_size=50, dim_ffn=256, head_size=32, gate=False),
    ModelConfig("dove", 2, 64, vocab_size=50, dim_att=32),
]


@pytest.mark.parametrize("config", [*PRESETS.values(), *ODD], ids=repr)
def test_the_formula_counts_the_tensors(config: ModelConfig) -> None:
    model = RWKV(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters
    state = model.initial_state(1) if not config.time_state else None
    if state is not None:
        assert state.nbytes == config.state_bytes


@pytest.mark.parametrize(
    "numbers,message",
    [
        ({"generation": "raven"}, "generation is 'raven'"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"dim_att": 65}, "dim_att 65 is not a multiple of head_size 64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_sizes(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"generation": "finch", "n_layer": 2, "n_embd": 64, **numbers})
