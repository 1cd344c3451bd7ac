"""A run on paper: FLOPs by the reference's table, activations by counting, and what a plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roost import PRESETS, RWKV
from roost.cli import main
from roost.config import ModelConfig
from roost.training.adapters import count_parameters, prepare_model
from roost.training.metrics import flops_per_token
from roost.training.plan import across, activation_bytes, plan, scale_table
from roost.training.recipe import read_recipe
from tiny import tiny_model
from training_runs import RECIPE, corpus_in


@pytest.mark.parametrize(
    "name,flops",
    [
        *(("eagle-0.4b", 2.3986e9), ("eagle-1.5b", 8.7231e9), ("eagle-3b", 1.7475e10), ("eagle-7b", 4.3663e10)),
        *(("finch-1.6b", 8.8552e9), ("finch-3b", 1.7695e10), ("finch-7b", 4.4367e10)),
    ],
)
def test_flops(name: str, flops: float) -> None:
    assert flops_per_token(PRESETS[name]) == pytest.approx(flops, rel=3e-5)


@pytest.mark.parametrize("generation", ["eagle", "finch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(generation: str, precision: str) -> None:
    """Bytes of storages saved for the backward pass, parameters left out, within a tenth."""
    config, tokens = ModelConfig(generation, 3, 256, vocab_size=257), torch.zeros(2, 256, dtype=torch.long)
    model, kept = RWKV(config), dict[int, tuple[int, torch.Tensor]]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(tokens, head=False)
    logits = 12 * tokens.numel() * 257
    found = sum(size for size, _ in kept.values())
    assert activation_bytes(config, tokens.numel(), precision) - logits == pytest.approx(found, rel=0.1)
    assert activation_bytes(config, 512, recompute=True) < activation_bytes(config, 512)


def test_many_devices() -> None:
    """8 replicas send 7/4 of the fp32 gradients; shards hold an eighth of the 16 bytes a parameter."""
    config = PRESETS["finch-7b"]
    eight, many = across(config, 8), across(config, 64)
    assert eight["replica_traffic"] == 7 * config.parameters
    assert eight["shard_traffic"] == pytest.approx(10.5 * config.parameters)
    assert eight["shard_memory"] - many["shard_memory"] == pytest.approx(16 * config.parameters * (1 / 8 - 1 / 64))
    block, ends = config.parameters - 2 * 65536 * 4096, 2 * 65536 * 4096
    gathered = 8 * (block / 32 + ends)  # weights and gradients of a block, the embedding and the head
    activations = activation_bytes(config, 4096, "bf16", recompute=True)
    assert eight["shard_memory"] == pytest.approx(2 * config.parameters + gathered + activations)
    table = scale_table()
    assert len({len(row) for row in table}) == 1 and [row[0] for row in table[1:3]] == ["eagle-0.1b", "eagle-0.4b"]


def test_a_plan_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run"))
    lines = dict(plan(read_recipe(path)))
    assert "217,472" in lines["parameters"] and lines["steps"].startswith("60 of 128 tokens: 7,680 tokens")
    assert "magic prime 401" in lines["data"] and "s at 40% of" in lines["time"]
    assert main(["train", str(path), "--plan", "--set", "epochs=2", "--set", "steps=0"]) == 0
    out = capsys.readouterr().out
    assert "2.00 epochs" in out and "finch-14b" in out and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="needs at least 100001"):
        plan(read_recipe(path, {"ctx": 100000}))


def test_a_plan_says_what_the_run_does(tmp_path: Path) -> None:
    """Steps and tokens are those of the run's own data: prime orders, packed documents, both answers of a pair."""
    path, text = tmp_path / "r.toml", tmp_path / "text.jsonl"
    path.write_text(RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run").replace("steps = 60", "epochs = 1"))
    text.write_text('{"prompt": "q", "chosen": "yes", "rejected": "no"}\n' * 8)

    def found(**keys: Any) -> dict[str, str]:
        return dict(plan(read_recipe(path, {"valid": [], "peak_flops": 1.0, **keys})))

    assert found(order="magic")["steps"].startswith("101 of 128 tokens: 12,928 tokens, 1.01 epochs")
    packed = found(packing="documents", ctx=4000, batch=1)
    assert packed["steps"] == "4 of 4,000 tokens: 16,000 tokens, 1.00 epochs"
    assert packed["data"] == "13,203 tokens in 4 rows of 4000, 82.5% filled"
    pairs = found(task="dpo", data=str(text), batch=2)
    sizes = [len(f"User: q\n\nAssistant: {answer}\n\n") for answer in ("yes", "no")]
    assert pairs["steps"] == f"4 of {2 * sum(sizes)} tokens: {8 * sum(sizes)} tokens, 1.00 epochs"
    assert pairs["data"].startswith("8 pairs; ")


def test_memory_of_what_is_trained(tmp_path: Path) -> None:
    """4 bytes for every number, 12 more for one that is trained; a rank's share of the batch is what it keeps."""
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.format(data=corpus_in(tmp_path), out=tmp_path / "run"))
    kinds: list[dict[str, Any]] = [
        {"adapter": "full", "freeze": ["emb"]},
        {"adapter": "lora", "rank": 4, "train_also": ["ln1"]},
        {"adapter": "dora", "rank": 4, "dora_axis": "in", "targets": ["att.key"]},
        {"adapter": "pissa", "rank": 4},
        {"adapter": "state"},
    ]
    for keys in kinds:
        recipe, model = read_recipe(path, {**keys, "peak_flops": 1.0}), tiny_model()
        assert recipe.adapter
        adapted = prepare_model(model, recipe.adapter)
        trained = [p for p in model.parameters() if p.requires_grad]
        held = sum(p.numel() for p in (*model.parameters(), *model.buffers()))
        assert adapted.config.adapter == "full" or adapted.parameters == sum(p.numel() for p in trained)
        count = sum(p.numel() for p in trained)
        assert count_parameters(PRESETS["finch-tiny"], recipe.adapter) == (held, count)
        lines = dict(plan(recipe))
        assert lines["parameters"].startswith(f"{held:,}, {count:,} of them trained")
        assert lines["memory"].startswith(f"weights, gradients, moments {(4 * held + 12 * count) / 1e9:.2f} GB")
    recipe = read_recipe(path, {"batch": 64, "ctx": 512, "peak_flops": 1e12})
    alone, many = (dict(plan(recipe, ranks=ranks)) for ranks in (1, 8))
    config = PRESETS["finch-tiny"]
    for lines, tokens in ((alone, 64 * 512), (many, 8 * 512)):
        assert lines["memory"].endswith(f"activations about {activation_bytes(config, tokens) / 1e9:.2f} GB")
    assert many["ranks"].startswith("8 replicas") and "8 x cpu" in many["time"]
    with pytest.raises(ValueError, match="64 rows cannot be cut in 7"):
        plan(recipe, ranks=7)


def test_the_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["preset", "parameters"])
    table = scale_table()
    assert [rows[start], *rows[start + 2 : start + 1 + len(table)]] == table
