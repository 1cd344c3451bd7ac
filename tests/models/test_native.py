"""The CPU model: the numbers of RWKV, and the same bits however the work is cut, batched and threaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from roost import PRESETS, RWKV, State, native
from roost.config import ModelConfig
from roost.formats.packed import open_packed, pack
from roost.formats.panels import pack_matrix
from roost.models.native import NativeModel, PackedTensor
from roost.models.rwkv import fingerprint_of
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

FORMATS = ["fp32", "bf16", "int8", "int4"]
MODELS = {
    "eagle-tiny": PRESETS["eagle-tiny"],
    "finch-tiny": PRESETS["finch-tiny"],
    "eagle 5.0": replace(PRESETS["eagle-tiny"], gate=False, dim_ffn=256),
    "finch A != D": ModelConfig("finch", 2, 48, vocab_size=257, dim_att=64, head_size=32, shift_rank=6, decay_rank=10),
    "finch tuned state": replace(PRESETS["finch-tiny"], time_state=True),
    "finch heads of 16": ModelConfig("finch", 2, 80, vocab_size=70, head_size=16, shift_rank=4, decay_rank=8),
}
# Relative error of logits against RWKV in fp32, by what is rounded: nothing, to 8 bits of mantissa, to int8, to int4.
TOLERANCE = {"fp32": 2e-6, "bf16": 6e-3, "int8": 2e-2, "int4": 0.2}


@cache
def torch_model(name: str) -> RWKV:
    if name in PRESETS:
        return tiny_model(name)
    model = RWKV(MODELS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5 / parameter.shape[-1] ** 0.5)
    model.fingerprint = fingerprint_of(model.config, model.state_dict())
    return model


@cache
def tensors(name: str, weights: str) -> dict[str, PackedTensor]:
    model = torch_model(name)
    with TemporaryDirectory() as place:
        path = pack(model.state_dict(), model.config, Path(place) / "m.roost", weights_format=weights)
        return open_packed(path).tensors


def build(name: str, weights: str, threads: int = 1, skip_zeros: bool = True) -> NativeModel:
    model = torch_model(name)
    return NativeModel(
        model.config,
        tensors(name, weights),
        fingerprint=model.fingerprint,
        weights=weights,
        threads=threads,
        skip_zeros=skip_zeros,
    )


def text(name: str, rows: int = 2, T: int = 40) -> torch.Tensor:
    return torch.randint(0, MODELS[name].vocab_size, (rows, T), generator=torch.Generator().manual_seed(3))


def same(a: State, b: State) -> bool:
    return a.tokens == b.tokens and all(
        torch.equal(x, y) for p, q in zip(a.layers, b.layers, strict=True) for x, y in zip(p, q, strict=True)
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_agrees_with_the_torch_model_on_every_instruction_set(name: str, weights: str, isa: str) -> None:
    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    ids = text(name)
    wanted, state = torch_model(name)(ids)
    with native.forced_isa(isa):
        model = build(name, weights)
    found, after = model(ids)
    assert error(found, wanted) < TOLERANCE[weights]
    assert after.tokens == state.tokens and after.fingerprint == state.fingerprint
    if weights == "fp32":
        for a, b in zip(after.layers, state.layers, strict=True):
            for x, y in zip(a, b, strict=True):
                assert error(x, y) < TOLERANCE[weights]


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
def test_agrees_with_the_independent_oracle(name: str) -> None:
    model = torch_model(name)
    ids = text(name, rows=1)
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    wanted, _ = oracle.forward(weights, ids[0].tolist())
    assert error(build(name, "fp32")(ids)[0][0], torch.from_numpy(wanted)) < TOLERANCE["fp32"]


def whole(model: NativeModel, ids: torch.Tensor) -> tuple[torch.Tensor, State]:
    return model(ids)


def token_by_token(model: NativeModel, ids: torch.Tensor) -> tuple[torch.Tensor, State]:
    return in_pieces(model, ids, [1] * ids.shape[1])


def in_pieces(model: NativeModel, ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, State]:
    state, out, at = None, [], 0
    for length in lengths:
        logits, state = model(ids[:, at : at + length], state)
        out.append(logits)
        at += length
    assert state is not None and at == ids.shape[1]
    return torch.cat(out, 1), state


def row_by_row(model: NativeModel, ids: torch.Tensor) -> tuple[torch.Tensor, State]:
    parts = [model(row[None]) for row in ids]
    return torch.cat([logits for logits, _ in parts]), State.cat([state for _, state in parts])


def packed_with_others(model: NativeModel, ids: torch.Tensor) -> tuple[torch.Tensor, State]:
    """The rows in the opposite order, between an empty sequence, a foreign one and one that is only decoding."""
    T, stranger = ids.shape[1], ids[0, :7].flip(0)
    row = torch.cat([stranger, ids[1], ids[0, :1], ids[0]])[None]
    offsets = [0, 0, 7, 7 + T, 8 + T, 8 + 2 * T]
    logits, state = model(row, cu_seqlens=offsets)
    return torch.stack([logits[0, 8 + T :], logits[0, 7 : 7 + T]]), state.select([4, 2])


WAYS: list[Callable[[NativeModel, torch.Tensor], tuple[torch.Tensor, State]]] = [
    whole,
    token_by_token,
    lambda model, ids: in_pieces(model, ids, [3, 1, 4, 0, 2, 13, 17]),
    row_by_row,
    packed_with_others,
]


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_do_not_depend_on_cuts_batch_order_or_threads(name: str, weights: str, isa: str) -> None:
    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    with native.forced_isa(isa):
        model = build(name, weights)
    ids = text(name)
    logits, state = model(ids)
    for threads in (1, 2, 3, 8):
        model.threads = threads
        for way in WAYS:
            found, after = way(model, ids)
            assert torch.equal(found, logits), (way, threads)
            assert same(after, state), (way, threads)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), threads=st.integers(1, 4), data=st.data())
@settings(max_examples=25)
def test_sequences_packed_at_random_are_each_alone(lengths: list[int], threads: int, data: st.DataObject) -> None:
    model = build("finch-tiny", data.draw(st.sampled_from(FORMATS)), threads)
    pieces = [torch.randint(0, 257, (length,)) for length in lengths]
    offsets = np.cumsum([0, *lengths]).tolist()
    before = [model(torch.randint(0, 257, (1, 3)))[1] for _ in lengths]
    logits, state = model(torch.cat(pieces)[None].long(), State.cat(before), cu_seqlens=offsets)
    for i, piece in enumerate(pieces):
        alone, after = model(piece[None], before[i])
        assert torch.equal(alone[0], logits[0, offsets[i] : offsets[i + 1]])
        assert same(after, state.select(i))


@pytest.mark.parametrize("weights", FORMATS)
def test_long_inputs_take_several_passes_and_nobody_notices(weights: str) -> None:
    model = build("finch-tiny", weights, 2)
    ids = text("finch-tiny", rows=3, T=300)  # 900 tokens, cut inside the first and the second row
    logits, state = model(ids)
    found, after = in_pieces(model, ids, [100, 100, 100])
    assert torch.equal(found, logits) and same(after, state)
    last, after = model(ids, last_only=True)
    assert torch.equal(last, logits[:, -1:]) and same(after, state)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("isa", native.ISAS)
def test_skipping_zeros_changes_no_bit(weights: str, isa: str) -> None:
    if isa not in native.supported_isas():
        pytest.skip(f"this machine has no {isa}")
    sparse = dict(tensors("finch-tiny", weights))
    quiet = torch_model("finch-tiny").state_dict()["blocks.1.ln2.bias"].clone().zero_()
    for layer in range(3):  # keys that are mostly negative: nothing but the mean of ln2's bias decides
        key = torch_model("finch-tiny").state_dict()[f"blocks.{layer}.ffn.key.weight"] - 0.02
        kind = sparse[f"blocks.{layer}.ffn.key.weight"].kind
        sparse[f"blocks.{layer}.ffn.key.weight"] = PackedTensor(kind, tuple(key.shape), pack_matrix(kind, key))
        sparse[f"blocks.{layer}.ln2.bias"] = PackedTensor("vector", (64,), (quiet + 1.5).numpy())
    with native.forced_isa(isa):
        models = [NativeModel(MODELS["finch-tiny"], sparse, threads=1, skip_zeros=skip) for skip in (True, False)]
    ids = text("finch-tiny", rows=1)
    skipping, plain = (token_by_token(model, ids) for model in models)
    assert torch.equal(skipping[0], plain[0]) and same(skipping[1], plain[1])
    rates = [model.zero_rate() for model in models]
    assert rates[0] == rates[1] > 0.8  # most blocks are empty, so they really were skipped
    assert models[0].zero_rate() == 0  # counting began anew


def test_zero_rate_counts_what_the_torch_model_shows() -> None:
    model, ids = build("finch-tiny", "fp32"), text("finch-tiny")
    zeros: list[torch.Tensor] = []
    reference = torch_model("finch-tiny")
    hooks = [
        block.ffn.value.register_forward_pre_hook(lambda _, x: zeros.append(x[0] == 0)) for block in reference.layers
    ]
    with torch.no_grad():
        reference(ids)
    for hook in hooks:
        hook.remove()
    model(ids)
    assert model.zero_rate() == pytest.approx(float(torch.stack(zeros).float().mean()), abs=1e-3)


def test_states_pass_between_the_torch_model_and_this_one() -> None:
    ids = text("finch-tiny")
    reference, model = torch_model("finch-tiny"), build("finch-tiny", "fp32")
    with torch.no_grad():
        wanted, _ = reference(ids)
        _, state = reference(ids[:, :20])
    assert error(model(ids[:, 20:], state)[0], wanted[:, 20:]) < TOLERANCE["fp32"]
    _, state = model(ids[:, :20])
    with torch.no_grad():
        assert error(reference(ids[:, 20:], state)[0], wanted[:, 20:]) < TOLERANCE["fp32"]


def test_embeddings_in_place_of_tokens() -> None:
    ids, model = text("eagle-tiny"), build("eagle-tiny", "int8")
    rows = torch_model("eagle-tiny").state_dict()["emb.weight"].bfloat16().float()[ids]  # stored in bf16
    assert torch.equal(model(embeddings=rows)[0], model(ids)[0])


def test_inputs_are_never_changed_and_results_are_fresh() -> None:
    model, ids = build("finch-tiny", "int8"), text("finch-tiny")
    _, state = model(ids)
    copy = [[part.clone() for part in layer] for layer in state.layers]
    logits, after = model(ids, state)
    assert all(
        torch.equal(a, b)
        for layer, saved in zip(state.layers, copy, strict=True)
        for a, b in zip(layer, saved, strict=True)
    )
    again, _ = model(ids, state)
    assert torch.equal(again, logits) and again.data_ptr() != logits.data_ptr()
    assert after.layers[0].wkv.data_ptr() != state.layers[0].wkv.data_ptr()


def test_nothing_to_read_gives_the_same_state_back() -> None:
    model = build("finch-tiny", "int8")
    _, state = model(text("finch-tiny"))
    logits, after = model(torch.zeros(2, 0, dtype=torch.long), state)
    assert logits.shape == (2, 0, 257) and same(after, state)
    assert model(torch.zeros(0, 5, dtype=torch.long))[0].shape == (0, 5, 257)


def test_a_view_that_promises_a_minus_is_read_with_it() -> None:
    model, x = build("finch-tiny", "int8"), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(embeddings=torch._neg_view(x))[0], model(embeddings=-x)[0])


def elsewhere(model: NativeModel, **to: Any) -> State:
    """A state of which a part of the last layer is on another device or of another type."""
    *rest, last = model.initial_state().layers
    last = last._replace(**{name: getattr(last, name).to(place) for name, place in to.items()})
    return model.initial_state()._replace(layers=(*rest, last))


BAD = {
    "ids out of range": lambda m: m(torch.tensor([[257]])),
    "floats": lambda m: m(torch.zeros(1, 2)),
    "nothing": lambda m: m(),
    "both": lambda m: m(torch.zeros(1, 1).long(), embeddings=torch.zeros(1, 1, 64)),
    "narrow embeddings": lambda m: m(embeddings=torch.zeros(1, 1, 63)),
    "embeddings elsewhere": lambda m: m(embeddings=torch.zeros(1, 1, 64, device="meta")),
    "a state elsewhere": lambda m: m(torch.zeros(1, 1).long(), elsewhere(m, wkv="meta")),
    "a shift elsewhere": lambda m: m(torch.zeros(1, 1).long(), elsewhere(m, ffn_shift="meta")),
    "a state in fp64": lambda m: m(torch.zeros(1, 1).long(), elsewhere(m, wkv=torch.float64)),
    "state of other rows": lambda m: m(torch.zeros(2, 1).long(), m.initial_state(1)),
    "last of nothing": lambda m: m(torch.zeros(1, 0).long(), last_only=True),
    "offsets that fall": lambda m: m(torch.zeros(1, 3).long(), cu_seqlens=[0, 2, 1, 3]),
    "state of another model": lambda m: m(torch.zeros(1, 1).long(), m.initial_state()._replace(fingerprint="f" * 64)),
    "no threads": lambda m: NativeModel(m.config, m._tensors, threads=0),
    "too many threads": lambda m: NativeModel(m.config, m._tensors, threads=1000),
    "dove": lambda m: NativeModel(PRESETS["dove-tiny"], m._tensors),
    "a tensor is missing": lambda m: NativeModel(m.config, {k: v for k, v in m._tensors.items() if "gate" not in k}),
    "a tensor too many": lambda m: NativeModel(m.config, {**m._tensors, "head.bias": m._tensors["ln_out.bias"]}),
    "another width": lambda m: NativeModel(replace(m.config, dim_ffn=96), m._tensors),
    "heads of 8": lambda m: NativeModel(replace(m.config, head_size=8), m._tensors),
    "a truncated matrix": lambda m: NativeModel(
        m.config,
        {**m._tensors, "head.weight": replace(m._tensors["head.weight"], data=m._tensors["head.weight"].data[:-1])},
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_clear_error(what: str) -> None:
    model = build("finch-tiny", "int8")
    with pytest.raises(ValueError, match=r"\w+"):
        BAD[what](model)
    model(text("finch-tiny"))  # and the model is as good as before


@pytest.mark.slow
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["eagle-0.1b", "finch-0.1b"])
def test_the_contract_holds_at_official_sizes(name: str, weights: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    generator = torch.Generator().manual_seed(5)
    values = {
        key: torch.randn(value.shape, generator=generator).mul_(
            0.5 / value.shape[-1] ** 0.5 if value.dim() == 2 else 0.3
        )
        for key, value in RWKV(config, device="meta").state_dict().items()
    }
    packed = open_packed(pack(values, config, tmp_path / "m.roost", weights_format=weights, threads=2))
    model = NativeModel(config, packed.tensors, threads=2)
    ids = torch.randint(0, 65536, (2, 9), generator=generator)
    logits, state = model(ids)
    assert bool(logits.isfinite().all())
    for way in (token_by_token, row_by_row):
        model.threads = 1
        found, after = way(model, ids)
        assert torch.equal(found, logits) and same(after, state)
