"""Original files and those that roost writes, also after training, read by the `rwkv` package: the same logits as
roost's on real text.

The package reads the first half in one call and the rest token by token, its two code paths. It guesses the version
from the order of the keys, so that is tested too. It runs alone because it reads the environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import READABLE, BonusName, Version, make_checkpoint
from roost import TokenLoader, TrainConfig, checkpoint, train
from roost.data.binidx import write_tokens

CASES: dict[str, tuple[Version, BonusName | None, bool]] = {
    **READABLE,
    "upcycled": ("5.2", None, False),
    "trained-5.2": ("5.2", None, False),
    "trained-6": ("6", None, False),
}
READ_AS = {"5.1": 5.2, "5.1-exp": 5.2, "upcycled": 6.0}
"""The versions that are written as another one: 5.1 as the 5.2 it equals."""
SPLIT = 150

PACKAGE = """
import sys, torch
torch.set_num_threads(1)
from rwkv.model import RWKV
tokens, out = torch.load(sys.argv[1], weights_only=True).tolist(), {}
for path in sys.argv[4:]:
    model = RWKV(path.removesuffix(".pth"), "cpu fp32", verbose=False)
    logits, state = model.forward(tokens[:int(sys.argv[2])], None, full_output=True)
    rows = [logits]
    for token in tokens[int(sys.argv[2]):]:
        logits, state = model.forward([token], state)
        rows.append(logits[None])
    out[path] = torch.cat(rows), torch.tensor(model.version)
torch.save(out, sys.argv[3])
"""


def text() -> Tensor:
    """300 byte tokens of the Universal Declaration, 100 from each of three languages."""
    lines = (Path(checkpoint.__file__).parent / "assets/udhr_subset.jsonl").read_text(encoding="utf-8").splitlines()
    articles = ["\n".join(json.loads(line)["articles"]).encode()[:100] for line in lines[:: len(lines) // 3][:3]]
    return torch.tensor([byte + 1 for byte in b"".join(articles)])


def train_further(path: Path) -> None:
    """Put the final.pth of a run of one step from a checkpoint in its place."""
    model, _ = checkpoint.load(path)
    before = model.emb.weight.detach().clone()
    write_tokens(path.with_suffix(""), [text()[:99].numpy()])
    run = TrainConfig(steps=1, lr=1e-3, warmup=0, pth=True, out=str(path.with_suffix("")))
    final = train(model, TokenLoader(path.with_suffix(""), 32, 2), run)
    assert not torch.equal(before, model.emb.weight)
    final.with_suffix(".pth").replace(path)


Read = tuple[Tensor, float]
"""The package's logits for a file, and the version that it takes it for."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Read, Read]]:
    """Per case: the original file, what the package makes of it, and what it makes of the file that roost wrote."""
    folder = tmp_path_factory.mktemp("package")
    torch.save(text(), folder / "tokens.pt")
    paths = {case: (folder / f"original-{case}.pth", folder / f"written-{case}.pth") for case in CASES}
    for seed, (case, (version, bonus_name, time_state)) in enumerate(CASES.items()):
        original, written = paths[case]
        torch.save(make_checkpoint(version, bonus_name=bonus_name, time_state=time_state, seed=seed), original)
        if case.startswith("trained"):
            train_further(original)
        if case == "upcycled":
            checkpoint.convert(original, written, to="finch")
        else:
            checkpoint.load(original)[0].save(written)
    files = [str(path) for pair in paths.values() for path in pair]
    subprocess.run(
        [sys.executable, "-c", PACKAGE, str(folder / "tokens.pt"), str(SPLIT), str(folder / "out.pt"), *files],
        env={**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    out = torch.load(folder / "out.pt", weights_only=True)
    read = {path: (logits, round(float(version), 1)) for path, (logits, version) in out.items()}
    return {case: (original, read[str(original)], read[str(written)]) for case, (original, written) in paths.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, package: dict[str, tuple[Path, Read, Read]]) -> None:
    path, original, written = package[case]
    model, _ = checkpoint.load(path)
    with torch.no_grad():
        ours = model(text()[None])[0][0]
    number = float(CASES[case][0])
    assert original[1] == number and written[1] == READ_AS.get(case, number)
    for name, (theirs, _) in {"original": original, "written": written}.items():
        assert ours.shape == theirs.shape == (300, 300)
        difference = float((ours - theirs).abs().max() / ours.std())
        print(f"RWKV-{case}, {name}: largest difference {difference:.1e} of the logits' standard deviation")
        assert difference <= 2e-4 and torch.equal(ours.argmax(-1), theirs.argmax(-1))
