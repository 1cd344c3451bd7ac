"""Adapter files: complete, bound to their base, safe from damage; merging by command; exact resume of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from adapted import KINDS, every_generation, every_kind, logits, same, shake, snapshot
from commands import error
from roost import TokenLoader, TrainConfig, load, train
from roost.cli import main
from roost.data.binidx import write_tokens
from roost.training.adapter_config import AdapterConfig
from roost.training.adapter_file import AdapterFile, write_adapter
from roost.training.adapters import apply, prepare_model
from roost.training.loop import Progress
from roost.training.lora import LowRank
from tiny import tiny_model


@every_generation
@every_kind
def test_file(kind: str, generation: str, tmp_path: Path) -> None:
    """One file holds everything: applied to a fresh base it computes the same bits; it says what it is."""
    adapted = prepare_model(tiny_model(generation), KINDS[kind])
    shake(adapted)
    path = adapted.save_final(tmp_path)
    assert path == tmp_path / "adapter.safetensors"
    base = tiny_model(generation)
    mark = base.fingerprint
    applied = apply(base, path)
    assert torch.equal(logits(base), logits(adapted.model))
    assert applied.config == KINDS[kind] and base.fingerprint not in ("", mark)
    applied.merge()
    adapted.merge()
    assert same(snapshot(base), snapshot(adapted.model))
    applied.remove()
    assert same(snapshot(base), snapshot(tiny_model(generation))) and base.fingerprint == mark

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["roost"])
    config = KINDS[kind]
    assert about["base"] == mark and about["adapter"] == config.adapter and about["rank"] == config.rank == 4
    assert about["alpha"] == config.alpha and tuple(about["targets"]) == config.targets


@every_generation
def test_another_base_or_a_damaged_file_is_refused(generation: str, tmp_path: Path) -> None:
    adapted = prepare_model(tiny_model(generation), KINDS["lora"])
    path = adapted.save_final(tmp_path)
    other = tiny_model(generation, seed=1)
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"adapter.safetensors was trained on another model \(fingerprint \w{12}, this"
    ):
        apply(other, path)
    with pytest.raises(ValueError, match="already has an adapter: merge or remove it first"):
        apply(adapted.model, path)
    with pytest.raises(ValueError, match="no adapter at"):
        apply(other, tmp_path / "none.safetensors")
    other.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not an adapter that roost wrote"):
        apply(other, tmp_path / "model.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    (tmp_path / "short.safetensors").write_bytes(data[:-7])
    with pytest.raises(ValueError, match=r"flipped.safetensors is damaged: its checksum"):
        apply(tiny_model(generation), tmp_path / "flipped.safetensors")
    with pytest.raises(ValueError, match=r"short.safetensors is not a readable adapter"):
        apply(tiny_model(generation), tmp_path / "short.safetensors")
    assert same(snapshot(other), before) and not any(isinstance(module, LowRank) for module in other.modules())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A right checksum, a wrong content: a file of another program, or of another version."""
    model = tiny_model()
    tensors = prepare_model(tiny_model(), KINDS["lora"]).tensors()
    gone = {name: value for name, value in tensors.items() if name != "blocks.1.att.key.lora_B"}
    for content, config, message in (
        (gone, {}, "has no blocks.1.att.key.lora_B: the file is incomplete"),
        ({**tensors, "blocks.0.att.kez.lora_A": torch.zeros(4, 64)}, {}, "the model has no such place"),
        ({**tensors, "blocks.0.att.key.lora_A": torch.zeros(3, 64)}, {}, r"is \[3, 64\], the model needs \[4, 64\]"),
        (tensors, {"colour": "blue"}, "written by another version of roost"),
        (tensors, {"rank": -1}, "rank is -1"),
    ):
        file = AdapterFile({**asdict(KINDS["lora"]), **config}, model.fingerprint, content)
        write_adapter(tmp_path / "odd.safetensors", file)
        with pytest.raises(ValueError, match=message):
            apply(model, tmp_path / "odd.safetensors")
    assert torch.equal(logits(model), logits(tiny_model()))


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = prepare_model(tiny_model(), KINDS["lora"])
    path = adapted.save_final(tmp_path)
    before = path.read_bytes()
    shake(adapted)

    def full(*_: object) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not write .*adapter.safetensors: No space left"):
        adapted.save_final(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    for name, message in (("a.pth", "tuned states only"), ("a.bin", "ends in .safetensors")):
        with pytest.raises(ValueError, match=message):
            adapted.save(tmp_path / name)


@every_generation
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merge_on_the_command_line(
    generation: str, stored: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on an fp32 copy of a file; merged into the file itself, in its dtype or in another."""
    base = tmp_path / "base.pth"
    tiny_model(generation).to(stored).save(base)
    adapted = prepare_model(load(base, dtype=torch.float32)[0], KINDS["pissa"])
    shake(adapted)
    adapter = adapted.save_final(tmp_path)
    exact = snapshot(adapted.merge())
    for name, flags, dtype in (("out.pth", [], stored), ("out.safetensors", ["--dtype", "fp32"], torch.float32)):
        out = tmp_path / name
        assert main(["merge", str(base), str(adapter), "-o", str(out), *flags]) == 0
        assert capsys.readouterr().out == f"wrote {out}\n"
        written = torch.load(out, weights_only=True) if out.suffix == ".pth" else load_file(out)
        assert all(torch.equal(written[key], value.to(dtype)) for key, value in exact.items())
        assert load(out)[0].state_dict().keys() == exact.keys()
    assert "already has" not in error(capsys, "merge", str(tmp_path / "out.pth"), str(adapter), "-o", str(base))
    assert "another model" in error(capsys, "merge", str(out), str(adapter), "-o", str(tmp_path / "x.pth"))
    assert "must end in" in error(capsys, "merge", str(base), str(adapter), "-o", str(tmp_path / "x.gguf"))
    assert "it is what is being read" in error(capsys, "merge", str(base), str(adapter), "-o", str(base))


class Interruption(Exception):
    pass


@every_generation
@pytest.mark.parametrize("config", [replace(KINDS["lora"], dropout=0.2), AdapterConfig(adapter="state")])
def test_a_run_resumes_exactly(generation: str, config: AdapterConfig, tmp_path: Path) -> None:
    """Through the loop, with dropout, two micro-batches and recomputed activations: the same adapter, byte for byte."""
    write_tokens(tmp_path / "data", [list(range(1, 200))], vocab_size=257)

    def run(name: str, interrupt: int = 0, resume: bool = False) -> bytes:
        out = tmp_path / name
        numbers = TrainConfig(steps=5, lr=1e-2, save_every=2, log_every=1, accumulate=2, recompute=True, out=str(out))
        adapted = prepare_model(tiny_model(generation), config)
        data = TokenLoader(tmp_path / "data", ctx=16, batch=2, seed=0)

        def progress(at: Progress) -> None:
            if at.step == interrupt:
                raise Interruption

        save = adapted.save_final
        final = train(adapted.model, data, numbers, save_final=save, resume=resume, progress=progress)
        assert final == out / "adapter.safetensors"
        return final.read_bytes()

    whole = run("whole")
    with pytest.raises(Interruption):
        run("cut", interrupt=3)
    assert run("cut", resume=True) == whole
    start = prepare_model(tiny_model(generation), config).save_final(tmp_path)
    assert start.read_bytes() != whole


def test_save_file_of_another_program_is_no_adapter(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not say roost-adapter-1"):
        apply(tiny_model(), tmp_path / "x.safetensors")
