"""Loading, looking inside and converting: the numbers survive, the memory stays small, bad input is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oracle
from checkpoints import VERSIONS, Version, make_checkpoint
from roost import checkpoint
from roost.config import PRESETS
from roost.models.rwkv import RWKV
from roost.state import State

TOKENS = list(range(5, 60))
ODD = {"n_embd": 64, "head_size": 16, "dim_att": 48, "dim_ffn": 80, "shift_rank": 6, "decay_rank": 11}


def odd(version: Version, **options: object) -> dict[str, Tensor]:
    return make_checkpoint(version, **{**ODD, **options})  # type: ignore[arg-type]


def save(weights: dict[str, Tensor], folder: Path, name: str = "model.pth") -> Path:
    torch.save(weights, folder / name)
    return folder / name


def logits(model: RWKV) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS]))[0][0].double()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_loaded_model_computes_what_the_oracle_computes(version: Version, tmp_path: Path) -> None:
    weights = odd(version, n_layer=3)
    model, tokenizer = checkpoint.load(str(save(weights, tmp_path)))
    expected = torch.from_numpy(oracle.forward({name: value.numpy() for name, value in weights.items()}, TOKENS)[0])
    assert (logits(model) - expected).abs().max() <= 2e-4 * expected.std()
    assert tokenizer is None and model.dtype == torch.float32
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2", "6"])
def test_a_tuned_state_is_stored_value_before_key(version: Version, tmp_path: Path) -> None:
    weights = odd(version, time_state=True)
    tuned, _ = checkpoint.load(save(weights, tmp_path, "tuned.pth"))
    bare, _ = checkpoint.load(save({k: v for k, v in weights.items() if "time_state" not in k}, tmp_path, "bare.pth"))
    start = State.zeros(bare.config)
    layers = [
        layer._replace(wkv=torch.stack([head.T for head in weights[f"blocks.{n}.att.time_state"]])[None])
        for n, layer in enumerate(start.layers)
    ]
    tokens = torch.tensor([TOKENS])
    explicit = bare(tokens, start._replace(layers=tuple(layers)))[0]
    untransposed = [layer._replace(wkv=layer.wkv.mT.contiguous()) for layer in layers]
    wrong = bare(tokens, start._replace(layers=tuple(untransposed)))[0]
    assert tuned.config.time_state and torch.equal(tuned(tokens)[0], explicit)
    assert (wrong - explicit).abs().max() > 0.01 * explicit.std()
    tuned.save(tmp_path / "again.safetensors")
    again, _ = checkpoint.load(tmp_path / "again.safetensors")
    assert torch.equal(again(tokens)[0], explicit) and again.fingerprint == tuned.fingerprint


def test_the_tokenizer_follows_the_vocabulary(tmp_path: Path) -> None:
    for vocab, size in ((257, 257), (65536, 65536), (50277, None)):
        weights = make_checkpoint("6", n_embd=32, head_size=16, vocab=vocab, shift_rank=2, decay_rank=2)
        _, tokenizer = checkpoint.load(save(weights, tmp_path))
        assert (tokenizer and tokenizer.vocab_size) == size


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", VERSIONS)
def test_save_and_load_change_nothing(version: Version, ending: str, tmp_path: Path) -> None:
    weights = odd(version)
    model, _ = checkpoint.load(save(weights, tmp_path))
    model.save(tmp_path / f"again{ending}")
    again, _ = checkpoint.load(tmp_path / f"again{ending}")
    assert torch.equal(logits(model), logits(again))
    assert again.fingerprint == model.fingerprint and again.config == model.config


def test_5_0_is_written_as_official_tools_read_it(tmp_path: Path) -> None:
    weights = odd("5.0", bonus_name="time_faaaa")
    model, _ = checkpoint.load(save(weights, tmp_path))
    model.save(tmp_path / "again.pth")
    written: dict[str, Tensor] = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(written) == list(weights) and all(torch.equal(written[name], weights[name]) for name in weights)
    with torch.no_grad():
        model.state_dict()["blocks.1.att.time_decay"][0, 3] += 1  # trained further: no longer one number per head
    model.save(tmp_path / "free.pth")
    free, _ = checkpoint.load(tmp_path / "free.pth")
    assert checkpoint.info(tmp_path / "free.pth").version == "5.0" and torch.equal(logits(free), logits(model))


@pytest.mark.parametrize("version", ["5.0", "5.2", "6"])
def test_files_are_in_the_trainers_order(version: Version, tmp_path: Path) -> None:
    weights = odd(version, bonus_name="time_faaaa" if version == "5.0" else None)
    path = save({name: weights[name] for name in sorted(weights)}, tmp_path)
    checkpoint.convert(path, tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    written: dict[str, Tensor] = torch.load(tmp_path / "b.pth", weights_only=True)
    assert list(written) == list(weights) and all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes(version: Version, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(odd(version), tmp_path)
    model, _ = checkpoint.load(path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    checkpoint.convert(path, tmp_path / "b.pth", dtype=dtype)
    kept, _ = checkpoint.load(tmp_path / "b.pth")
    assert kept.dtype == dtype and torch.equal(logits(kept), logits(model))
    exact = logits(checkpoint.load(path, dtype=torch.float64)[0])
    assert (logits(kept) - exact).std() <= 0.03 * exact.std()


def test_fp16_is_stored_but_not_run(tmp_path: Path) -> None:
    """fp16 overflows in the residual stream of real models: such files load in fp32, exactly."""
    path = save(odd("6"), tmp_path)
    checkpoint.convert(path, tmp_path / "b.safetensors", dtype=torch.float16)
    model, _ = checkpoint.load(tmp_path / "b.safetensors")
    stored = checkpoint.stored_weights(tmp_path / "b.safetensors")
    for name, value in model.state_dict().items():
        assert stored[name].dtype == torch.float16 and value.dtype == torch.float32
        assert torch.equal(stored[name].float(), value)
    with pytest.raises(ValueError, match="does not run in fp16"):
        checkpoint.load(path, dtype=torch.float16)


@pytest.mark.parametrize("version", VERSIONS)
def test_mixed_dtypes_load_and_run(version: Version, tmp_path: Path) -> None:
    fine = ("time_decay", "time_first", "time_faaaa", "ln_x.weight", "time_state")
    weights = {
        name: value if name.endswith(fine) else value.bfloat16()
        for name, value in odd(version, time_state=version != "4").items()
    }
    model, _ = checkpoint.load(save(weights, tmp_path))
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert model.dtype == torch.bfloat16 and kinds["blocks.1.att.time_decay"] == torch.float32
    exact = logits(checkpoint.load(tmp_path / "model.pth", dtype=torch.float64)[0])
    assert (logits(model) - exact).std() <= 0.03 * exact.std()
    weights["head.weight"] = weights["head.weight"].float()  # a matrix: it cannot differ from the others
    widest, _ = checkpoint.load(save(weights, tmp_path, "widest.pth"))
    assert {parameter.dtype for parameter in widest.parameters()} == {torch.float32}
    weights["blocks.0.att.time_decay"] = weights["blocks.0.att.time_decay"].double()
    narrowed, _ = checkpoint.load(save(weights, tmp_path, "narrowed.pth"))
    assert torch.equal(logits(narrowed), logits(widest))


def test_one_fingerprint_for_one_set_of_weights(tmp_path: Path) -> None:
    path = save(odd("6"), tmp_path)
    marks = {checkpoint.load(path, dtype=dtype)[0].fingerprint for dtype in (None, torch.float64, torch.bfloat16)}
    other = checkpoint.load(save(odd("6", seed=1), tmp_path, "other.pth"))[0].fingerprint
    assert len(marks) == 1 and other not in marks


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from roost import checkpoint
from roost.models.rwkv import RWKV
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
RWKV(checkpoint.ModelConfig("finch", 1, 64, vocab_size=70))(torch.tensor([[1, 2, 3]]))
start = peak()
checkpoint.info(sys.argv[1])
print(peak() - start)
model, _ = checkpoint.load(sys.argv[1])
print(peak() - start)
with torch.no_grad():
    model(torch.arange(8)[None])
assert {str(p.dtype) for p in model.parameters()} == {sys.argv[2]}
assert sum(float(p.detach().sum()) for p in model.parameters()) != 0.0
print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
@pytest.mark.parametrize("form", ["a.pth", "a.safetensors", "bf16", "Hugging Face, two shards"])
def test_memory(form: str, tmp_path: Path) -> None:
    """In a process per form: `info` costs next to nothing; loading, even using every number, 1.15 times the file.

    Mapped pages count once they are touched, and the fingerprint touches some of every tensor.
    """
    model = RWKV(checkpoint.ModelConfig("finch", 5, 768, vocab_size=12000), device="meta")
    torch.save({name: torch.full(value.shape, 0.01) for name, value in model.state_dict().items()}, tmp_path / "a.pth")
    target, dtype = {
        "a.pth": ("a.pth", torch.float32),
        "a.safetensors": ("a.safetensors", torch.float32),
        "bf16": ("b.safetensors", torch.bfloat16),
        "Hugging Face, two shards": ("shards", torch.float32),
    }[form]
    if target != "a.pth":
        checkpoint.convert(tmp_path / "a.pth", tmp_path / target, dtype=dtype)
    if target == "shards":
        weights = load_file(tmp_path / "shards/model.safetensors")
        (tmp_path / "shards/model.safetensors").unlink()
        for n in range(2):
            part = {name: weights[name] for name in list(weights)[n::2]}
            save_file(part, tmp_path / f"shards/model-{n + 1:05d}-of-00002.safetensors")
    size = checkpoint.info(tmp_path / target).file_bytes
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / target), str(dtype)], capture_output=True, text=True, check=True
    )
    seen, loaded, used = (int(line) / size for line in done.stdout.split())
    print(f"{form}, {size / 1e6:.0f} MB: peak memory / file size {seen:.3f}, {loaded:.3f}, {used:.3f}")
    assert size > 100e6 and seen <= 0.1 and loaded <= 1.15
    assert 0.9 <= used <= 1.15  # below 0.9 the measurement would be broken


def test_info(tmp_path: Path) -> None:
    config = PRESETS["finch-tiny"]
    RWKV(config).save(tmp_path / "a.pth")
    found = checkpoint.info(tmp_path / "a.pth")
    assert (found.version, found.label, found.dialect) == ("6", "RWKV-6 (Finch)", "official")
    assert found.config == config and found.parameters == config.parameters
    assert found.dtypes == {"fp32": config.parameters}
    assert found.file_bytes == (tmp_path / "a.pth").stat().st_size
    assert found.state_bytes == config.state_bytes == State.zeros(config).nbytes
    assert list(found.memory) == ["fp32", "bf16"]  # fp16 is not run
    assert found.memory["fp32"] == 4 * config.parameters + config.state_bytes
    assert found.memory["bf16"] == 2 * config.parameters + config.state_bytes
    lines = dict(found.lines())
    assert lines["generation"] == "RWKV-6 (Finch)" and lines["parameters"] == f"{config.parameters:,}"
    assert lines["sizes"].startswith("3 layers, width 64") and lines["sizes"].endswith("2 heads of 32, ranks 8 and 16")
    assert lines["state"] == "26.1 kB per sequence" and lines["dtype"] == "fp32"


@pytest.mark.parametrize(("version", "label"), [("4", "RWKV-4 (Dove)"), ("5.0", "RWKV-5.0"), ("5.1", "RWKV-5.1")])
def test_info_of_older_versions(version: Version, label: str, tmp_path: Path) -> None:
    weights = odd(version, time_state=version != "4")
    weights["ln_out.bias"] = weights["ln_out.bias"].bfloat16()
    found = checkpoint.info(save(weights, tmp_path))
    total = sum(value.numel() for value in weights.values())
    assert found.label == label and found.parameters == total and found.dtypes == {"fp32": total - 64, "bf16": 64}
    lines = dict(found.lines())
    assert lines["dtype"] == f"fp32 ({total - 64:,}), bf16 (64)" and "time mixing 48" in lines["sizes"]
    assert ("tuned initial state" in lines["sizes"]) is (version != "4")


def test_one_layer_warns(tmp_path: Path) -> None:
    for version in ("4", "5.2"):
        path = save(odd(version, n_layer=1), tmp_path)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.convert(path, tmp_path / "b.pth")
        assert [str(w.message).endswith("may take it for another one") for w in caught] == [True] * (version == "5.2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b.onnx",), r"\.onnx is no format that roost writes"),
        (("nowhere/b.pth",), "the directory .*nowhere does not exist"),
        (("nowhere/b",), "the directory .*nowhere does not exist"),
        (("text.txt",), r"must end in \.pth, \.safetensors, \.gguf or \.roost"),
        (("b.pth", "dove"), "to is 'dove'"),
        (("b.pth", None, torch.int8), r"dtype is torch\.int8"),
    ],
)
def test_bad_conversions(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    path = save(odd("6", shift_rank=32, decay_rank=64, dim_ffn=224), tmp_path)
    (tmp_path / "text.txt").write_text("kept")
    target, to, dtype = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(path, tmp_path / str(target), to=to, dtype=dtype)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth", "text.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(odd("6"), tmp_path)
    checkpoint.convert(path, tmp_path / "b.pth")
    old = (tmp_path / "b.pth").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.convert(path, tmp_path / "b.pth", dtype=torch.bfloat16)
    assert (tmp_path / "b.pth").read_bytes() == old and len(list(tmp_path.iterdir())) == 2


def test_a_file_can_be_converted_into_itself(tmp_path: Path) -> None:
    path = save(odd("5.2"), tmp_path)
    mark = checkpoint.load(path)[0].fingerprint
    checkpoint.convert(path, path)
    assert checkpoint.load(path)[0].fingerprint == mark


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("warp", None, "device 'warp' is unknown"), ("cpu", torch.int8, r"dtype is torch\.int8; it must be one of")],
)
def test_bad_devices_and_dtypes(device: str, dtype: torch.dtype | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "unread.pth", device, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_accelerator_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable CUDA device"):
        checkpoint.load(tmp_path / "unread.pth", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("version", VERSIONS)
def test_load_onto_cuda(version: Version, tmp_path: Path) -> None:
    path = save(odd(version), tmp_path)
    model, _ = checkpoint.load(path, "cuda", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    assert model.fingerprint == checkpoint.load(path)[0].fingerprint
