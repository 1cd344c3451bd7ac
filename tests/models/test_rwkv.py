"""The three generations: one function for training, prefill and decoding, equal however the text is cut."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roost import PRESETS, RWKV, State, wkv_backend
from roost.config import ModelConfig
from roost.models.dove import recurrence
from roost.models.rwkv import fingerprint_of

TINY = ["dove-tiny", "eagle-tiny", "finch-tiny"]
EXTRA = {
    "eagle 5.0": replace(PRESETS["eagle-tiny"], gate=False, dim_ffn=256),
    "finch A != D": ModelConfig("finch", 2, 48, vocab_size=257, dim_att=64, head_size=32, shift_rank=6, decay_rank=10),
    "finch tuned state": replace(PRESETS["finch-tiny"], time_state=True),
}
CONFIGS = {**{name: PRESETS[name] for name in TINY}, **EXTRA}


def trained(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> RWKV:
    """Fresh weights moved away from their zeros, so that every tensor matters."""
    model = RWKV(config, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)).to(dtype)
    return model


def text(rows: int = 2, T: int = 60, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 257, (rows, T), generator=torch.Generator().manual_seed(seed))


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.std()


def agree_states(a: State, b: State) -> None:
    assert a.tokens == b.tokens
    for p, q in zip(a.layers, b.layers, strict=True):
        for x, y in zip(p, q, strict=True):
            assert (x - y).abs().max() <= 1e-11 * y.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@given(cuts=st.lists(st.integers(0, 60), max_size=4).map(sorted))
@example(cuts=list(range(1, 60)))
@settings(max_examples=12)
@torch.no_grad()
def test_whole_is_any_split_is_token_by_token(name: str, cuts: list[int]) -> None:
    model, tokens = trained(CONFIGS[name]), text()
    whole, last = model(tokens)
    state, parts = None, []
    for piece in tokens.tensor_split(cuts, 1):
        logits, state = model(piece, state)
        parts.append(logits)
    agree(torch.cat(parts, 1), whole)
    agree_states(state, last)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_batched_is_alone_is_packed(name: str) -> None:
    model, tokens = trained(CONFIGS[name]), text(3)
    whole, state = model(tokens)
    for row in range(3):
        alone, own = model(tokens[row : row + 1])
        agree(alone[0], whole[row])
        agree_states(own, state.select(row))
    lengths = [60, 0, 1, 25]
    pieces = [tokens[0], tokens[1][:0], tokens[1][:1], tokens[2][:25]]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    start = State.cat([model(tokens[:1, :5])[1]] * 4)
    packed, states = model(torch.cat(pieces)[None], start, cu_seqlens=bounds)
    for d, piece in enumerate(pieces):
        alone, own = model(piece[None], start.select(d))
        if len(piece):
            agree(packed[0, bounds[d] : bounds[d + 1]], alone[0])
        agree_states(states.select(d), own)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_options(name: str) -> None:
    model, tokens = trained(CONFIGS[name]), text()
    whole, _ = model(tokens)
    agree(model(tokens, last_only=True)[0], whole[:, -1:])
    agree(model(embeddings=model.emb.weight[tokens])[0], whole)
    packed, _ = model(tokens.reshape(1, -1), cu_seqlens=[0, 60, 120], last_only=True)
    agree(packed[0], whole[:, -1])
    with wkv_backend("reference"):
        agree(model(tokens)[0], whole)
    empty, state = model(tokens[:, :0])
    assert empty.shape == (2, 0, 257) and state.tokens == (0, 0)
    assert model(tokens[:0])[0].shape == (0, 60, 257)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_state_is_never_changed(name: str) -> None:
    model = trained(PRESETS[name])
    _, state = model(text())
    before = [t.clone() for layer in state.layers for t in layer]
    _, after = model(text(seed=4), state)
    model(text(seed=4)[:, :1], state)
    for old, layer_tensor in zip(before, [t for layer in state.layers for t in layer], strict=True):
        assert torch.equal(old, layer_tensor)
    storages = [{t.untyped_storage().data_ptr() for layer in s.layers for t in layer} for s in (state, after)]
    assert not storages[0] & storages[1]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_state_holds_its_own_size(name: str) -> None:
    """No view of a long text hides in it: what is stored is what nbytes says."""
    model = trained(PRESETS[name], torch.float32)
    for tokens, bounds in ((text(2, 200), None), (text(1, 200), [0, 150, 200])):
        _, state = model(tokens, cu_seqlens=bounds)
        held = sum(t.untyped_storage().nbytes() for layer in state.layers for t in layer)
        assert held == state.nbytes == 2 * model.config.state_bytes


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter_and_cross_segments(name: str) -> None:
    """Two segments with the state carried along have the gradients of one: through the returned state."""
    model, tokens = trained(PRESETS[name]), text()
    model(tokens)[0].square().mean().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    first, state = model(tokens[:, :25])
    second, _ = model(tokens[:, 25:], state)
    torch.cat([first, second], 1).square().mean().backward()
    for n, parameter in model.named_parameters():
        assert whole[n].abs().max() > 0, n
        assert (parameter.grad - whole[n]).norm() <= 1e-11 * whole[n].norm(), n


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_lower_precision_stays_near(name: str) -> None:
    """bf16 weights and activations, and bf16 autocast over fp32 weights: near fp64, states in fp32."""
    exact = trained(PRESETS[name])
    wanted, _ = exact(text())
    half = trained(PRESETS[name]).to(torch.bfloat16)
    got, state = half(text())
    assert got.dtype == torch.bfloat16 and state.layers[0].wkv.dtype == torch.float32
    assert (got.double() - wanted).norm() <= 0.1 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = trained(PRESETS[name]).float()(text())
    assert state.layers[0].wkv.dtype == torch.float32
    assert (mixed.double() - wanted).norm() <= 0.05 * wanted.norm()


def test_autocast_keeps_the_decay_in_fp32() -> None:
    mix = trained(PRESETS["finch-tiny"]).float().blocks[0].att
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mix.log_decay(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, mix.log_decay(x))


def test_16_bit_weights_keep_the_decay_in_fp32() -> None:
    """Equal to the fp32 computation on the same rounded weights, bit for bit."""
    half = trained(PRESETS["finch-tiny"]).to(torch.bfloat16)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = half.blocks[0].att.log_decay(x)
    assert got.dtype == torch.float32 and torch.equal(got, half.float().blocks[0].att.log_decay(x.float()))


def test_rwkv_4_average_survives_huge_keys() -> None:
    """k = +-900 in fp32, where e^k itself overflows; against the oracle in fp64, gradients finite."""
    g = torch.Generator().manual_seed(0)
    k = (900 * torch.randn(1, 12, 4, generator=g)).requires_grad_()
    v, w, u = torch.randn(1, 12, 4, generator=g), torch.rand(4, generator=g), torch.randn(4, generator=g)
    start = torch.tensor([0.0, 0.0, -1e30])[None, :, None].expand(1, 3, 4)
    y, state = recurrence(k, v, w, u, start)
    y.sum().backward()
    assert torch.isfinite(k.grad).all() and torch.isfinite(state).all()
    exact, _ = recurrence(k.detach().double(), v.double(), w.double(), u.double(), start.double())
    a = k.detach().double()[0]
    for t in range(12):  # the sum of the paper, in logarithms
        weights = [a[i] - (t - 1 - i) * w.double() for i in range(t)] + [a[t] + u.double()]
        share = torch.softmax(torch.stack(weights), 0)
        assert torch.allclose((share * v[0, : t + 1].double()).sum(0), exact[0, t], atol=1e-12)
    assert torch.allclose(y.double(), exact, atol=1e-4)


def test_huge_decay_has_no_nan_gradient() -> None:
    """exp(x) overflows fp32 beyond 88.7; the decay is exactly 0 long before, and so is its gradient."""
    for name in TINY:
        model = trained(PRESETS[name], torch.float32)
        with torch.no_grad():
            model.blocks[0].att.time_decay.fill_(100.0)
        model(text())[0].sum().backward()
        assert torch.isfinite(model.blocks[0].att.time_decay.grad).all()


@pytest.mark.parametrize("name", ["eagle-tiny", "finch-tiny"])
@pytest.mark.usefixtures("unchecked")
def test_a_block_compiles_whole(name: str) -> None:
    model = trained(PRESETS[name])
    x = torch.randn(2, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = model.initial_state(2).layers[0]
    compiled = torch.compile(model.blocks[1], fullgraph=True, backend="aot_eager")
    agree(compiled(x, layer)[0], model.blocks[1](x, layer)[0])


def test_tuned_initial_state_is_transposed() -> None:
    """`time_state` is stored [value, key]; the start state is [key, value]."""
    model = trained(CONFIGS["finch tuned state"])
    state = model.initial_state(2)
    stored = model.blocks[1].att.time_state
    assert torch.equal(state.layers[1].wkv[1, 0, 3, 5], stored[0, 5, 3])
    assert not torch.equal(stored, stored.mT)
    zeros = State.zeros(model.config, 2, dtype=torch.float64)
    assert (model(text())[0] - model(text(), zeros)[0]).abs().max() > 1e-3


def test_the_norm_eps_matters() -> None:
    """With eps 1e-5, the value of several other engines, the logits differ."""
    for name in ("eagle-tiny", "finch-tiny"):
        model = trained(PRESETS[name])
        wanted = model(text())[0]
        for block in model.blocks:
            block.att.ln_x.eps = 1e-5
        assert (model(text())[0] - wanted).abs().max() > 1e-4 * wanted.std()


BAD = {
    "give either tokens or embeddings": lambda m: m(),
    "token id 257 is outside 0..256": lambda m: m(torch.tensor([[257]])),
    "token id -1 is outside": lambda m: m(torch.tensor([[-1, 3]])),
    r"integers of shape \(B, T\)": lambda m: m(torch.tensor([1, 2])),
    "they must be integers": lambda m: m(torch.zeros(1, 2)),
    "embeddings are": lambda m: m(embeddings=torch.zeros(1, 2, 3)),
    r"the state has 1 row\(s\), the input 2": lambda m: m(text(), m.initial_state(1)),
    "does not fit the model": lambda m: m(text(), State.zeros(PRESETS["eagle-0.1b"], 2)),
    "tokens are on meta, the model on cpu": lambda m: m(torch.zeros(1, 2, dtype=torch.long, device="meta")),
    "the state is torch.float64 on cpu": lambda m: m(text(), State.zeros(m.config, 2, dtype=torch.float64)),
    "made by another model": lambda m: m(text(), m.initial_state(2)._replace(fingerprint="0" * 64)),
    "at least one token": lambda m: m(text()[:, :0], last_only=True),
    "cu_seqlens": lambda m: m(text(), cu_seqlens=[0, 60]),
    "must rise": lambda m: m(text(1), cu_seqlens=[0, 61]),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(message: str) -> None:
    model = RWKV(PRESETS["finch-tiny"])
    model.fingerprint = "f" * 64
    with pytest.raises(ValueError, match=message):
        BAD[message](model)


def test_fingerprint() -> None:
    model = trained(PRESETS["finch-tiny"], torch.float32)
    mark = fingerprint_of(model.config, model.state_dict())
    assert mark == fingerprint_of(model.config, trained(PRESETS["finch-tiny"], torch.float32).bfloat16().state_dict())
    assert mark != fingerprint_of(model.config, trained(PRESETS["finch-tiny"], torch.float32, seed=1).state_dict())
    assert mark != fingerprint_of(replace(model.config, group_norm_eps=1e-5), model.state_dict())
    assert ModelConfig("dove", 2, 64, head_size=32, shift_rank=5) == ModelConfig("dove", 2, 64)  # it has neither


def test_default_device_is_honoured() -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in RWKV(PRESETS["finch-tiny"]).parameters())


def test_an_eps_that_no_file_can_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_norm_eps is 1e-05"):
        RWKV(replace(PRESETS["finch-tiny"], group_norm_eps=1e-5)).save(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_full_disk_is_an_os_error(tmp_path: Path, name: str) -> None:
    """A real write that the system cuts short: the old file survives, nothing is left behind."""
    model = RWKV(PRESETS["finch-tiny"])
    model.save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write|File too large"):
            RWKV(PRESETS["finch-tiny"], seed=1).save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
