"""A state tuned by roost and merged, read by the `rwkv` package: the same logits, for both generations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roost import load
from roost.training.adapter_config import AdapterConfig
from roost.training.adapters import merge_files, prepare_model
from tiny import tiny_model

PACKAGE = """
import sys, torch
torch.set_num_threads(1)
from rwkv.model import RWKV
tokens = torch.load(sys.argv[1], weights_only=True).tolist()
model = RWKV(sys.argv[2].removesuffix(".pth"), "cpu fp32", verbose=False)
logits, state = model.forward(tokens, None, full_output=True)
torch.save(logits, sys.argv[3])
"""
TOKENS = torch.arange(40) * 7 % 250 + 1


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["eagle-tiny", "finch-tiny"])
def test_logits(generation: str, tmp_path: Path) -> None:
    tiny_model(generation).save(tmp_path / "base.pth")
    model = load(tmp_path / "base.pth")[0]
    plain = model(TOKENS[None])[0][0].detach()
    adapted = prepare_model(model, AdapterConfig(adapter="state"))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(4):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(TOKENS[None, :-1])[0][0], TOKENS[1:]).backward()
        adam.step()
    merged = merge_files(tmp_path / "base.pth", adapted.save_final(tmp_path), tmp_path / "merged.pth")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = [str(tmp_path / "tokens.pt"), str(merged), str(tmp_path / "out.pt")]
    subprocess.run(
        [sys.executable, "-c", PACKAGE, *paths],
        env={**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        ours = load(merged)[0](TOKENS[None])[0][0]
    difference = float((ours - theirs).abs().max() / ours.std())
    print(f"{generation}: largest difference {difference:.1e} of the logits' standard deviation")
    assert difference <= 2e-4 and torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert float((ours - plain).abs().max() / ours.std()) > 0.1  # the state matters
