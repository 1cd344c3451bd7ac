"""Recipes: keys, types, precedence, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roost import load
from roost.data.binidx import write_tokens
from roost.training.recipe import read_recipe, run_recipe
from training_runs import RECIPE, corpus_in, losses


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
        (("valid = [", "valid = [1, "), "must hold strings only"),
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


def test_tokens_the_model_does_not_know(tmp_path: Path, corpus: Path) -> None:
    write_tokens(tmp_path / "world", [[300] * 100], vocab_size=65536)
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=tmp_path / "world", out=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"holds token id 300; the model knows 0\.\.256"):
        run_recipe(path)
