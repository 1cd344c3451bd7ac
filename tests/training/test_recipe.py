"""Recipes: keys, types, precedence, and what is refused before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx
from safetensors import safe_open

from corpora import made
from roost import PRESETS, RWKV, load
from roost.cli import main
from roost.data.binidx import write_tokens
from roost.data.prepare import prepare
from roost.tokenizer import WorldTokenizer
from roost.training import recipe as recipe_module
from roost.training.recipe import read_recipe, run_recipe
from roost.training.resize import resize_vocabulary
from tiny import tiny_model
from training_runs import RECIPE, corpus_in, log, losses


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_in(tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        (("steps = 60", "stpes = 60"), "did you mean 'steps'"),
        (("steps = 60", ""), "'steps', 'tokens' or 'epochs', one of them above 0: none"),
        (("steps = 60", "steps = 60\ntokens = 9"), "steps = 60 and tokens = 9"),
        (("ctx = 32", "ctx = 32\npth = 1"), "pth is 1; it must be bool"),
        (("ctx = 32", "ctx = 32\nschedule = 'cosin'"), "did you mean 'cosine'"),
        (("ctx = 32", "ctx = 32\nprecision = 'fp16'"), "fp16' on a CPU"),
        (("ctx = 32", "ctx = 32\nadapter = 'lora'\npth = true"), "roost merge"),
        (("ctx = 32", "ctx = 32\nsegment = 8\ntruncate = 12"), "multiple of segment"),
        (("ctx = 32", "ctx = 32\ncompile = true\npacking = 'documents'"), "compile is for windows"),
        (("ctx = 32", "ctx = 32\nrank = 4"), "rank = 4 means nothing"),
        (("ctx = 32", "ctx = 'long'"), "ctx is 'long'; it must be int"),
        (("ctx = 32", "ctx = true"), "it must be int"),
        (("ctx = 32", "ctx = 0"), "ctx is 0"),
        (("ctx = 32", "ctx = 10000000"), "needs at least"),
        (("lr = 3e-3", "lr = -1.0"), "lr is -1.0"),
        (("lr = 3e-3", "beta2 = 1.5"), "beta2 is 1.5"),
        (("lr = 3e-3", "precision = 'int4'"), "precision is 'int4'"),
        (("keep = 1", "keep = 0"), "keep is 0"),
        (("lr = 3e-3", "lr = inf"), "lr is inf"),
        (("lr = 3e-3", f"lr = 1{'0' * 400}"), "lr is 1000"),
        (("keep = 1", "init = 'newest'"), "init is 'newest'"),
        (("valid = [", "valid = [1, "), "valid holds 1; it must hold strings, or tables"),
        (("valid = [", "valid = [{domain = 'law'}, "), "valid holds {'domain': 'law'}"),
        (("valid = [", "valid = [{path = 'x', langauge = 'en'}, "), "valid holds .*langauge"),
        (("keep = 1", "freeze = ['embb']"), "nothing is called 'embb'; did you mean 'emb'"),
        (("keep = 1", "adapter = 'lora'\nrank = 900"), "rank is 900"),
        (("keep = 1", "accumulate = 3"), "4 rows cannot be cut in 3"),
        (("keep = 1", "vocabulary = 'none.txt'"), "none.txt"),
        (("lr = 3e-3", "lr_final = 1e-3"), "lr_final is 0.001, above lr"),
        (("keep = 1", "warmup = -1"), "warmup is -1"),
        (("finch-tiny", "finch-tny"), "did you mean 'finch-tiny'"),
        (("ctx = 32", "ctx = = 32"), "is not a recipe"),
    ],
)
def test_wrong_recipes(tmp_path: Path, corpus: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=corpus, out=tmp_path / "run").replace(*change))
    with pytest.raises(ValueError, match=message):
        run_recipe(path)


def test_orders_and_packing(tmp_path: Path, corpus: Path) -> None:
    """The keys reach the data: three orders and packed documents give different losses after the same start."""
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=corpus, out=tmp_path / "run").replace(f'valid = ["{corpus}"]', ""))
    first: set[float] = set()
    for number, keys in enumerate(({}, {"order": "sequential"}, {"order": "magic"}, {"packing": "documents"})):
        out = tmp_path / f"run{number}"
        run_recipe(path, {"steps": 1, "out": str(out), **keys})
        first.update(losses(out))
    assert len(first) == 4
    for keys, message in (
        ({"order": "magik"}, "did you mean 'magic'"),
        ({"packing": "documents", "order": "magic"}, "onl"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(path, keys)


def test_recipe_precedence_and_start_from_a_file(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=corpus, out=tmp_path / "run"))
    recipe = read_recipe(path, {"steps": 2, "lr": 1e-3})
    assert recipe.config.steps == 2 and recipe.config.lr == 1e-3 and recipe.config.keep == 1
    first = run_recipe(path, {"steps": 2})
    again = run_recipe(path, {"steps": 1, "model": str(first), "out": str(tmp_path / "more"), "lr": 1e-9})
    a, b = load(first)[0].state_dict(), load(again)[0].state_dict()
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)
    with pytest.raises(ValueError, match="no recipe at"):
        read_recipe(tmp_path / "none.toml")


def test_rates_to_begin_with(tmp_path: Path, corpus: Path) -> None:
    """Only fresh models that are pretrained begin at 6e-4; an adapter's rates keep their ratio."""
    path, saved = tmp_path / "r.toml", str(tmp_path / "model.pth")
    path.write_text(RECIPE.format(data=corpus, out=tmp_path / "run").replace("lr = 3e-3\n", ""))
    tiny_model().save(saved)

    def rates(**keys: Any) -> tuple[float, float, float]:
        config = read_recipe(path, keys).config
        return config.lr, config.lr_final, config.weight_decay

    assert rates() == approx((6e-4, 6e-5, 0.001))
    assert rates(lr=1e-5) == approx((1e-5, 1e-6, 0.001))
    assert rates(model=saved) == rates(task="sft") == approx((3e-5, 3e-5, 0.001))
    assert rates(model=saved, lr=1e-4) == approx((1e-4, 1e-4, 0.001))
    assert rates(model=saved, lr=1e-4, lr_final=0) == approx((1e-4, 0, 0.001))
    assert rates(task="dpo") == approx((3e-6, 3e-6, 0.001))
    assert rates(adapter="lora", lr=1e-3) == approx((1e-3, 1e-4, 0.001))
    assert rates(adapter="state") == approx((1, 0.01, 0))
    assert rates(adapter="state", lr=0.1, weight_decay=0.5) == approx((0.1, 1e-3, 0.5))


TURN = {"prompt": "who?", "completion": "a bird"}
PAIR = {"prompt": "who?", "chosen": "a bird", "rejected": "a fly"}
RUNS = {
    "sft": ({"task": "sft", "adapter": "lora", "rank": 2, "segment": 8, "sample": "Once"}, TURN, {"lora_A", "lora_B"}),
    "dpo": ({"task": "dpo", "adapter": "lora", "rank": 2, "accumulate": 2}, PAIR, {"lora_A", "lora_B"}),
    "state": ({"task": "sft", "adapter": "state", "long": "drop"}, TURN, {"time_state"}),
    "truncated": ({"segment": 8, "truncate": 16, "adapter": "full", "freeze": ["emb"]}, None, {"weight"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_keys_reach_the_run(name: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of every task and kind of adapter: what is written, logged and called."""
    keys, record, trained = RUNS[name]
    path, out, text = tmp_path / "r.toml", tmp_path / "run", tmp_path / "text.jsonl"
    path.write_text(RECIPE.format(data=corpus, out=out).replace("lr = 3e-3\n", ""))
    text.write_text(f"{json.dumps(record)}\n" * 8)
    segments, told = list[tuple[int, int | None]](), list[str]()
    original = recipe_module.segmented_sums

    def segmented(*args: Any, segment: int, truncate: int | None, objective: Any) -> Any:
        segments.append((segment, truncate))
        return original(*args, segment=segment, truncate=truncate, objective=objective)

    monkeypatch.setattr(recipe_module, "segmented_sums", segmented)
    short = {"steps": 2, "peak_flops": 1.0, "valid": [], **({"data": str(text)} if record else {})}
    if keys["adapter"] != "full":
        with pytest.raises(ValueError, match="'finch-tiny' is a fresh model of that size, and an adapter needs"):
            run_recipe(path, {**short, **keys})
        RWKV(PRESETS["finch-tiny"]).save(tmp_path / "base.pth")
        short["model"] = str(tmp_path / "base.pth")
    final = run_recipe(path, {**short, **keys}, notice=told.append)
    assert final == out / ("final.safetensors" if name == "truncated" else "adapter.safetensors")
    with safe_open(final, "numpy") as file:
        assert {key.rpartition(".")[2] for key in file.keys()} >= trained  # noqa: SIM118
    assert segments == {"sft": [(8, None)] * 2, "truncated": [(8, 16)] * 2}.get(name, [])
    lines = log(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["sample"][:4] for line in lines if "sample" in line] == ["Once"] * (name == "sft")
    assert ("reward_accuracy" in lines[0]) == (name == "dpo")
    kept = {"sft": "8 conversations", "dpo": "8 pairs", "state": "8 conversations"}
    assert told == [kept[name] for name in kept.keys() & {name}]
    assert (out / "data.json").exists() == (record is not None)
    if record:
        assert json.loads((out / "data.json").read_text()).items() >= {"files": [str(text)], "kept": 8}.items()


def test_validation_by_domain_and_language(tmp_path: Path, corpus: Path) -> None:
    path, out = tmp_path / "r.toml", tmp_path / "run"
    path.write_text(RECIPE.format(data=corpus, out=out))
    valid = [{"path": str(corpus), "domain": "myth", "language": "en"}, {"path": f"{corpus}.bin", "language": "en"}]
    run_recipe(path, {"steps": 1, "valid": valid})
    found = {line["validation"]: line["tokens"] for line in log(out) if "validation" in line}
    assert list(found) == ["corpus", "corpus.bin", "domain myth", "language en"]
    assert found["language en"] == 2 * found["domain myth"]


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    """A model of 300 ids: its vocabulary is the file's, or unknown."""
    model, words, out = tmp_path / "m.pth", tmp_path / "words.txt", tmp_path / "run"
    resize_vocabulary(tiny_model(), 300).save(model)
    words.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)) + "257 b'ab' 2\n")
    prepare(made(tmp_path, {}), tmp_path / "corpus", WorldTokenizer.from_file(words), workers=1)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=tmp_path / "corpus", out=out).replace("finch-tiny", str(model)))
    run_recipe(path, {"steps": 1, "ctx": 8, "vocabulary": str(words), "sample": "ab"})
    run_recipe(path, {"steps": 1, "ctx": 8, "out": f"{out}2"})
    assert [
        line["bits_per_byte"] is None for at in (out, f"{out}2") for line in log(Path(at)) if "validation" in line
    ] == [
        False,
        True,
    ]
    bytes_only = tmp_path / "bytes.txt"
    bytes_only.write_text(words.read_text().rpartition("257 ")[0])
    for keys, message in (
        ({"sample": "ab"}, "vocabulary is not known"),
        ({"task": "sft"}, "vocabulary is not known"),
        ({"vocabulary": str(bytes_only)}, "corpus.bin was made with a vocabulary of 258 ids .*the model's has 257 ids"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(path, {"steps": 1, "ctx": 8, "out": f"{out}3", **keys})


def test_weights_are_read_last(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be refused is refused before any weight is read; files come before `out`."""
    path, out = tmp_path / "r.toml", tmp_path / "run"
    path.write_text(RECIPE.format(data=corpus, out=out))

    def read(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(recipe_module, "open_model", read)
    monkeypatch.setitem(sys.modules, "wandb", None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": str(tmp_path / "none")}, "no token file"),
        ({"task": "dpo", "data": str(tmp_path / "none"), "valid": []}, "no such file"),
        ({"data": []}, "data is empty"),
        ({"valid": [str(tmp_path / "none")]}, "no token file"),
        ({"precision": "fp16"}, "fp16"),
        ({"wandb": "mine"}, "pip install wandb"),
    ]
    for keys, message in cases:
        assert not out.exists()
        with pytest.raises(ValueError, match=message):
            run_recipe(path, keys)
    (out / "log.jsonl").touch()
    with pytest.raises(ValueError, match="already holds a run"):
        run_recipe(path)
    with pytest.raises(AssertionError, match="weights were read"):
        run_recipe(path, resume=True)


def test_bad_lines_are_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text, out = tmp_path / "r.toml", tmp_path / "text.jsonl", tmp_path / "run"
    path.write_text(RECIPE.format(data=text, out=out).replace(f'valid = ["{text}"]', 'task = "sft"'))
    text.write_text(f"{json.dumps(TURN)}\n[]\n" * 2)
    arguments = ("train", str(path), "--set", "steps=1", "--set", "bad_lines=skip")
    assert main(arguments) == 0
    assert f"2 conversations, 2 bad lines: {text}, line 2: " in capsys.readouterr().err
    found = json.loads((out / "data.json").read_text())
    assert (found["bad_lines"], len(found["first_bad"])) == (2, 2)
    assert main((*arguments, "--plan", "--ranks", "2")) == 0
    assert "2 conversations, 2 bad lines: " in capsys.readouterr().out
    assert main((*arguments, "--ranks", "2")) == 2


def test_tokens_the_model_does_not_know(tmp_path: Path, corpus: Path) -> None:
    write_tokens(tmp_path / "world", [[300] * 100], vocab_size=65536)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=tmp_path / "world", out=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"world.bin holds token id 300 .*outside 0\.\.256"):
        run_recipe(path)
