"""What comes in wrong is refused where it comes in: a ValueError that names the argument, and says what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import roost
from roost import PRESETS, RWKV, ModelConfig, Sampling, State, TrainConfig, WorldTokenizer
from roost.cli import main
from roost.config import UnknownPreset
from tiny import tiny_model

CONFIG = PRESETS["finch-tiny"]
HUGE = ModelConfig("finch", 10**6, 10**6)
BYTES = WorldTokenizer.byte_level()
TOKENS = torch.ones(1, 2, dtype=torch.int64)
X = torch.zeros(1, 2, 1, 4)
U = torch.zeros(1, 4)

WRONG: dict[str, tuple[Callable[[RWKV, Path], Any], str]] = {
    "unknown preset": (lambda m, p: PRESETS["finch-tny"], r"^no preset 'finch-tny'; did you mean 'finch-tiny'\?$"),
    "generation": (lambda m, p: ModelConfig("raven", 2, 64), "generation is 'raven'; did you mean 'dove'"),
    "width as text": (lambda m, p: ModelConfig("finch", 2, "64"), "n_embd is '64'; it must be a whole number"),
    "fractional layers": (lambda m, p: ModelConfig("finch", 2.5, 64), "n_layer is 2.5; it must be a whole number"),
    "model of a name": (lambda m, p: RWKV("finch-tiny"), r"config is 'finch-tiny'.*write PRESETS\['finch-tiny'\]"),
    "model of a near name": (lambda m, p: RWKV("finchtiny"), r"write PRESETS\['finch-tiny'\]"),
    "model of nothing": (lambda m, p: RWKV(None), "config is None; it must be a ModelConfig"),
    "huge model": (lambda m, p: RWKV(HUGE, device="meta"), "the weights would need [0-9,]+ bytes; check the sizes"),
    "init": (lambda m, p: RWKV(CONFIG, init="newest"), "init is 'newest'; did you mean '"),
    "dtype as text": (lambda m, p: RWKV(CONFIG, dtype="bf16"), "dtype is 'bf16'; it must be a dtype: torch.float32"),
    "negative seed": (lambda m, p: RWKV(CONFIG, seed=-1), "seed is -1; it must be at least 0"),
    "huge seed": (lambda m, p: RWKV(CONFIG, seed=2**64), "it must be at most 18446744073709551615"),
    "device": (lambda m, p: RWKV(CONFIG, device="foo"), "device 'foo' is unknown; it must be 'cpu', 'cuda'"),
    "huge state": (lambda m, p: State.zeros(HUGE), "would need [0-9,]+ bytes"),
    "huge batch": (lambda m, p: State.zeros(CONFIG, 10**12), r"a state of 1000000000000 row\(s\) would need"),
    "state of a name": (lambda m, p: State.zeros("finch-tiny"), r"write PRESETS\['finch-tiny'\]"),
    "fractional batch": (lambda m, p: State.zeros(CONFIG, 1.5), "batch is 1.5; it must be a whole number"),
    "row": (lambda m, p: m.initial_state().select("a"), "rows must be integers"),
    "fractional row": (lambda m, p: m.initial_state().select(0.0), "rows must be integers"),
    "state directory": (lambda m, p: State.load(p), "is a directory; name a state file"),
    "tokens as a list": (lambda m, p: m([[1, 2]]), r"tokens is \[\[1, 2\]\].*write torch.tensor\(\[ids\]\)"),
    "tokens as text": (lambda m, p: m("abc"), "tokens is 'abc'; it must be a Tensor"),
    "tokens as NumPy has them": (
        lambda m, p: m(TOKENS.to(torch.uint16)),
        r"tokens are torch.uint16 \(1, 2\); they must be integers of shape \(B, T\), signed or uint8",
    ),
    "embeddings": (lambda m, p: m(embeddings="abc"), "embeddings is 'abc'; it must be a Tensor"),
    "state as text": (lambda m, p: m(TOKENS, "state"), "state is 'state'; it must be a State: .*State.load"),
    "operator": (lambda m, p: roost.wkv(None, X, X, X, U), "r is None; it must be a Tensor"),
    "operator's decay": (lambda m, p: roost.wkv(X, X, X, -1.0, U), "log_w is -1.0; it must be a Tensor"),
    "operator's state": (lambda m, p: roost.wkv(X, X, X, X, U, "s"), "state is 's'; it must be a Tensor"),
    "no tokenizer": (lambda m, p: roost.generate(m, None, "a"), "tokenizer is None.*without a World vocabulary"),
    "nothing to score with": (lambda m, p: roost.bits_per_byte(m, None, "a"), "without a World vocabulary"),
    "params": (lambda m, p: roost.generate(m, BYTES, "a", 0.8), "params is 0.8; it must be a Sampling"),
    "max_tokens": (lambda m, p: roost.generate(m, BYTES, "a", max_tokens=1.5), "max_tokens is 1.5; .* whole number"),
    "no prompt": (lambda m, p: roost.generate(m, BYTES, None), "prompt must be integers"),
    "fractional id": (lambda m, p: roost.read(m, [1.5]), "tokens must be integers"),
    "nothing to read": (lambda m, p: roost.read(m, None), "tokens must be integers"),
    "chunk": (lambda m, p: roost.read(m, [1], chunk=0.5), "chunk is 0.5; it must be a whole number"),
    "steps": (lambda m, p: TrainConfig(steps="3"), "steps is '3'; it must be a whole number"),
    "rate": (lambda m, p: TrainConfig(3, lr="1e-3"), "lr is '1e-3'; it must be a finite number"),
    "place": (lambda m, p: TrainConfig(3, out=None), "out is None; it must be a str"),
    "precision": (lambda m, p: TrainConfig(3, precision="fp8"), "precision is 'fp8'; did you mean 'fp"),
    "no data": (lambda m, p: roost.train(m, None, TrainConfig(3, out=str(p))), "data is None.*TokenLoader"),
    "no numbers": (lambda m, p: roost.train(m, Data(), {}), r"config is \{\}; it must be a TrainConfig"),
}


class Data:
    """The least that `train` accepts."""

    identity: dict[str, int | str] = {}  # noqa: RUF012  (never changed)

    def batch_at(self, step: int, part: int = 0, parts: int = 1) -> roost.data.batch.Batch:
        raise NotImplementedError


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_refused(name: str, tmp_path: Path) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(tiny_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_is_a_key_error_too() -> None:
    with pytest.raises(KeyError) as caught:
        PRESETS["nestlign"]
    assert str(caught.value) == "no preset 'nestlign'; did you mean 'nestling'?"
    assert "nestlign" not in PRESETS and PRESETS.get("nestlign") is None
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), UnknownPreset)


def test_whole_numbers_of_other_kinds_are_accepted() -> None:
    """NumPy's and torch's integers, which become ints."""
    one = torch.tensor([1, 2]).numpy()
    config = ModelConfig("finch", one[1], 64)
    assert type(config.n_layer) is int and config == ModelConfig("finch", 2, 64)
    model = tiny_model()
    assert torch.equal(roost.read(model, one)[0], roost.read(model, [1, 2])[0])
    assert model.initial_state(2).select(one[0]).batch == 1
    params = Sampling(temperature=0.0)
    assert len(roost.generate(model, BYTES, one, params, max_tokens=torch.tensor(2)).tokens) == 2


def test_an_unknown_device_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nestling", "x", "--device", "foo"]) == 2
    error = capsys.readouterr().err
    assert error == "roost: error: device 'foo' is unknown; it must be 'cpu', 'cuda', 'cuda:1' ...\n"
