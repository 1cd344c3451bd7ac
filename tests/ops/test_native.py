"""The native kernels: every instruction set, any threads and company to the bit, memory bounds, and what is refused."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import roost
from roost import native
from roost.ops import native as kernels
from wkv_cases import REGIMES, TOLERANCE, Inputs, cast, close, constant, exact, inputs, needs_native, run

pytestmark = needs_native
ISAS = native.supported_isas() if native.available() else ()
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("N", kernels.SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, N: int, static: bool, dtype: torch.dtype) -> None:
    with native.forced_isa(isa):
        for T in (1, 2, 67, 130):
            x = cast(inputs(T, B=1, K=N, V=N, static=static), dtype)
            close(run(x, "native"), exact(x), TOLERANCE[dtype])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_regime_of_every_instruction_set(isa: str, regime: str) -> None:
    x = cast(inputs(130, B=1, H=1, K=32, V=32, log_w=REGIMES[regime]), F32)
    with native.forced_isa(isa):
        close(run(x, "native"), exact(x), TOLERANCE[F32])


@pytest.mark.parametrize("isa", ISAS)
def test_the_exponential(isa: str) -> None:
    """One token from a state of ones with r = k = 0 leaves 1 + expm1(log_w): the whole range of the exponential."""
    log_w = torch.cat(
        [-torch.logspace(-44, 2.2, 4000), torch.tensor([0.0, -0.0, -1e-45, -87.3, -88.0, -104.0, -torch.inf])]
    )
    log_w = torch.nn.functional.pad(log_w, (0, -len(log_w) % 32)).view(1, 1, -1, 32)
    heads = log_w.shape[2]
    zero = torch.zeros(1, 1, heads, 32)
    with native.forced_isa(isa):
        state = kernels.forward(zero, zero, zero, log_w, zero[0, 0], torch.ones(1, heads, 32, 32), None, False)[1]
    true = log_w.double().exp()[0, 0, :, :, None].expand(state[0].shape)
    assert (state[0] - true).abs().max() <= 1.2e-7
    assert (state[0][log_w[0, 0] == -torch.inf] == 0).all() and (state[0][log_w[0, 0] == 0] == 1).all()


@pytest.mark.parametrize("T", [1, 70, 200])
@pytest.mark.parametrize("B,H", [(1, 1), (1, 3), (3, 2)])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits(B: int, H: int, T: int) -> None:
    x = cast(inputs(T, B, H, 64, 64), F32)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(x, "native"))
        with torch.no_grad(), roost.wkv_backend("native"):
            same(list(roost.wkv(*x)), results[-1][:2])
    same(results[0], results[1])
    same(results[0], results[2])


def alone(x: Inputs, b: int) -> Inputs:
    return [t if t.dim() == 2 else t[b : b + 1] for t in x]


@pytest.mark.parametrize("T", [1, 5, 130])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_does_not_see_its_company(dtype: torch.dtype, T: int) -> None:
    """Bitwise: a row in a batch, alone, and as a document in a packed row; the sums over rows aside."""
    x = cast(inputs(T, 3, 2, 64, 64), dtype)
    own = [0, 1, 2, 3, 4, 5, 7]  # not du, a sum over rows
    together = run(x, "native")
    packed = [t.flatten(0, 1)[None] if t.dim() == 4 and i < 4 else t for i, t in enumerate(x)]
    with roost.wkv_backend("native"):
        out, state = roost.wkv(*packed, cu_seqlens=[0, T, 2 * T, 3 * T])
        same([out.view(3, T, 2, 64), state], together[:2])
        leaves = [t.clone().requires_grad_() for t in x]
        for b in range(3):
            row = [t.detach().clone().requires_grad_() for t in alone(x, b)]
            result = roost.wkv(*row)
            same([t.detach() for t in result], [t[b : b + 1] for t in together[:2]])
            g = [torch.ones_like(t) for t in result]
            mine = torch.autograd.grad(result, row, g)
            whole = roost.wkv(*leaves)
            theirs = torch.autograd.grad(whole, leaves, [torch.ones_like(t) for t in whole])
            same([mine[i - 2] for i in own[2:]], [theirs[i - 2][b : b + 1] for i in own[2:]])


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor between two bands of a known number, and all of it."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), 7.0, dtype=dtype)
    return whole, whole[64 : 64 + size].view(shape)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("T", [0, 1, 3, 65, 129])
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_the_results_is_written(
    isa: str, T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result lies between guard bands, and every number of it is written (unwritten memory is NaN here)."""
    x = cast(inputs(T, 2, 2, 32, 32), dtype)
    bands: list[torch.Tensor] = []

    def empty(*shape: object, dtype: torch.dtype = F32) -> torch.Tensor:
        dims = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        whole, inner = guarded(tuple(dims), dtype)  # type: ignore[arg-type]
        bands.append(whole)
        return inner.fill_(torch.nan)

    monkeypatch.setattr(kernels.torch, "empty", empty)
    with native.forced_isa(isa):
        out, state, saved = kernels.forward(*x, None, True)
        gradients = kernels.backward(torch.ones_like(x[2]), torch.ones_like(x[5]), saved, *x, None)
    assert len(bands) == 9
    for whole in bands:
        assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()
    assert all(torch.isfinite(t).all() for t in (out, state, saved, *gradients))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("T", [1, 64, 65])
def test_nothing_beyond_the_inputs_matters(isa: str, T: int) -> None:
    """Inputs between bands of NaN: reading one number too many would show."""
    x = cast(inputs(T, 1, 2, 32, 32), F32)
    banded = []
    for t in x:
        whole, inner = guarded(tuple(t.shape), t.dtype)
        whole.fill_(torch.nan)
        banded.append(inner.copy_(t))
    with native.forced_isa(isa):
        same(run(banded, "native"), run(x, "native"))


@pytest.mark.parametrize("isa", ISAS)
def test_floating_point_mode_is_restored(isa: str) -> None:
    """Denormals are flushed inside a call and exact again after it."""
    x = cast(inputs(70, K=32, V=32), F32)
    small = torch.tensor([1e-40])
    with native.forced_isa(isa):
        run(x, "native")
    assert (small * 0.5).item() == pytest.approx(5e-41, rel=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("decay", [-1e-4, -1e-2])
@pytest.mark.slow
def test_gradients_over_many_tokens(decay: float, dtype: torch.dtype) -> None:
    x = cast(inputs(8192, B=1, H=1, K=32, V=32, log_w=constant(decay)), dtype)
    reference = run([t.double() for t in x], "chunked", rounded_to=x)
    close(run(x, "native"), reference, 5e-6 if dtype == F32 else TOLERANCE[dtype])


def test_a_hundred_thousand_tokens() -> None:
    """Far more than any table could hold: outputs stay right to the end."""
    x = cast(inputs(100_000, B=1, H=1, K=32, V=32), F32)
    with torch.no_grad(), roost.wkv_backend("native"):
        out, state = roost.wkv(*x)
        middle = roost.wkv(*(t[:, :99_900] for t in x[:4]), x[4], x[5])[1]
    tail = [t[:, 99_900:].double() for t in x[:4]]
    with roost.wkv_backend("reference"):
        true, last = roost.wkv(*tail, x[4].double(), middle.double())
    assert (out[:, 99_900:] - true).norm() <= 2e-6 * true.norm() and (state - last).norm() <= 2e-6 * last.norm()


def test_only_the_states_between_blocks_are_kept() -> None:
    """Between the passes: the inputs, and one state per 64 tokens beyond the first 64."""
    for T, blocks in ((64, 0), (65, 1), (200, 3)):
        x = [t.requires_grad_() for t in cast(inputs(T, 2, 2, 32, 32), F32)]
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            roost.wkv(*x)
        own = {t.data_ptr() for t in x}
        kept = [t for t in saved if t.data_ptr() not in own]
        assert sum(t.numel() for t in kept) == 2 * blocks * 2 * 32 * 32


def test_native_is_the_default_and_says_why_it_cannot_serve() -> None:
    x = cast(inputs(70, K=32, V=32), F32)
    plain = roost.wkv(*x)
    with roost.wkv_backend("native"):
        same(list(roost.wkv(*x)), list(plain))
        for bad, why in (
            (cast(inputs(5, K=32, V=32), torch.float64), "it takes fp32 and bf16"),
            (cast(inputs(5, K=8, V=8), F32), "8 x 8; it has kernels for K = V"),
            (cast(inputs(5, K=32, V=64), F32), "32 x 64"),
            ([t.to("meta") for t in x], "the tensors are on meta"),
        ):
            with pytest.raises(ValueError, match=why):
                roost.wkv(*bad)
    with roost.wkv_backend("chunked"):
        assert not torch.equal(roost.wkv(*x)[0], plain[0])


def test_without_the_library_chunked_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cast(inputs(70, K=32, V=32), F32)
    with roost.wkv_backend("chunked"):
        expected = roost.wkv(*x)
    monkeypatch.setattr(kernels.native, "why_not", lambda: "no compiler here")
    same(list(roost.wkv(*x)), list(expected))
    with pytest.raises(ValueError, match="no compiler here"), roost.wkv_backend("native"):
        roost.wkv(*x)


def test_impossible_calls_of_the_library() -> None:
    call = kernels._Call(size=48, threads=1)
    with pytest.raises(ValueError, match="no kernel for heads of 48"):
        native.check(kernels._function("roost_wkv_forward")(ctypes.addressof(call)))


def test_more_torch_threads_than_the_pool_has(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cast(inputs(130, B=1, K=32, V=32), F32)
    wanted = run(x, "native")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert kernels._threads() == 256
    same(run(x, "native"), wanted)


FORK = """
import os, signal, sys, warnings
from pathlib import Path
import torch
from roost import native
warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads: that is the test
native.places = lambda: [Path(sys.argv[1])]
from roost.ops import native as kernels
torch.set_num_threads(2)
r, k, v = torch.randn(3, 2, 200, 4, 64, generator=torch.Generator().manual_seed(1))
given = r, k, v, torch.full((4, 64), -0.5), torch.ones(4, 64), torch.zeros(2, 4, 64, 64), None, False
wanted = kernels.forward(*given)[0]
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if kernels.forward(*given)[0].numpy().tobytes() == wanted.numpy().tobytes() else 3)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_computes_with_threads_of_its_own() -> None:
    command = [sys.executable, "-c", FORK, str(native.library()._name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")
