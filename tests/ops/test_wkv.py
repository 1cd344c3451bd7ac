"""The operator: every backend against the recurrence in fp64, in every decay regime, shape and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import roost
from roost.ops import BACKENDS
from roost.ops.library import wkv_chunked, wkv_chunked_backward
from roost.ops.reference import wkv_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
NAMES = ("out", "state", "dr", "dk", "dv", "dlog_w", "du", "dstate")
Inputs = list[Tensor]


def uniform(low: float, high: float) -> Callable[..., Tensor]:
    return lambda shape, g: -torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=g).exp()


def constant(value: float) -> Callable[..., Tensor]:
    return lambda shape, g: torch.full(shape, value, dtype=torch.float64)


def resets(depth: float) -> Callable[..., Tensor]:
    def make(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        hit = torch.rand(shape, generator=g, dtype=torch.float64) < 0.05
        return torch.where(hit, depth, -0.01).double()

    return make


REGIMES = {
    "U(-6,-1)": uniform(-6, -1),
    "U(-8,2)": uniform(-8, 2),
    "U(-10,5)": uniform(-10, 5),
    "5 % at -1e4": resets(-1e4),
    "5 % at -inf": resets(-torch.inf),
    "all -1e-6": constant(-1e-6),
    "all -30": constant(-30.0),
    "w = 1": constant(0.0),
    "w = 0": constant(-torch.inf),
    "w = 1e-10": constant(-23.02585),
}


def inputs(
    T: int, B: int = 2, H: int = 2, K: int = 8, V: int = 8, *, log_w=None, static=False, rows=None, seed=0
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    w = (log_w or uniform(-8, 2))((H, K) if static else (B, T, H, K), g)
    return [normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), w, normal(H, K), normal(rows or B, H, K, V)]


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    """r, k, v in dtype; the rest in fp32 (fp64 for fp64), as the contract asks."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in x[:3]] + [t.to(precise) for t in x[3:]]


def run(x: Inputs, backend: str, seed: int = 1, **options: object) -> list[Tensor]:
    """out, state and the six gradients, with a gradient on both results."""
    leaves = [t.detach().clone().requires_grad_() for t in x]
    with roost.wkv_backend(backend):
        out, state = roost.wkv(*leaves, **options)
    g = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, state)]
    gradients = torch.autograd.grad((out, state), leaves, cotangents, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [out.detach(), state.detach(), *(torch.zeros_like(t) if d is None else d for d, t in pairs)]


def close(got: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, exact, strict=True):
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        error, size = (a.double() - b.double()).norm(), b.double().norm()
        assert error <= tolerance * size + 1e-30, f"{name}: {error / size:.1e}"


def test_reference_is_the_written_out_sum() -> None:
    """Paper Table 8: out_t = sum over j < t of r_t . (prod of w between) k_j v_j, plus the bonus and the old state."""
    r, k, v, log_w, u, state = (x[0] if i < 4 else x for i, x in enumerate(inputs(7, B=1, H=1, K=4, V=3)))
    out, after = wkv_reference(r[None], k[None], v[None], log_w[None], u, state)
    w = log_w.exp()
    for t in range(7):
        total = torch.zeros(3, dtype=torch.float64)
        for n in range(4):
            for m in range(3):
                total[m] += r[t, 0, n] * w[:t, 0, n].prod() * state[0, 0, n, m]
                total[m] += r[t, 0, n] * u[0, n] * k[t, 0, n] * v[t, 0, m]
                for j in range(t):
                    total[m] += r[t, 0, n] * w[j + 1 : t, 0, n].prod() * k[j, 0, n] * v[j, 0, m]
        assert torch.allclose(out[0, t, 0], total, rtol=1e-12)
    last = w[:, 0].prod(0)[:, None] * state[0, 0]
    for j in range(7):
        last = last + w[j + 1 :, 0].prod(0)[:, None] * k[j, 0, :, None] * v[j, 0, None, :]
    assert torch.allclose(after[0, 0], last, rtol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 5, 8])
def test_gradcheck(T: int, backend: str, static: bool) -> None:
    x = [t.requires_grad_() for t in inputs(T, K=3, V=4, static=static)]
    with roost.wkv_backend(backend):
        assert torch.autograd.gradcheck(lambda *a: roost.wkv(*a), x)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_regime(dtype: torch.dtype, regime: str, static: bool) -> None:
    """fp32 and fp64 within their bound of the fp64 recurrence: output, state and every gradient."""
    x = cast(inputs(300, B=1, K=32, V=32, log_w=REGIMES[regime], static=static), dtype)
    close(run(x, "chunked"), run([t.double() for t in x], "reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = cast(inputs(130, B=1, K=32, V=32), dtype)
    got = run(x, "chunked")
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert [t.dtype for t in got[2:]] == [dtype] * 3 + [torch.float32] * 3
    close(got, run([t.double() for t in x], "reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_changes_nothing(grad: bool, T: int) -> None:
    """The model may compute its matrices in bf16; the recurrence and its state stay in fp32."""
    x = [t.requires_grad_(grad) for t in cast(inputs(T, K=16, V=16), torch.float32)]
    with torch.set_grad_enabled(grad):
        plain = roost.wkv(*x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = roost.wkv(*x)
            if grad:
                gradients = torch.autograd.grad(inside[0].sum() + inside[1].sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    if grad:
        expected = torch.autograd.grad(plain[0].sum() + plain[1].sum(), x)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("B,H,K,V", [(1, 1, 8, 8), (3, 2, 5, 7), (0, 2, 8, 8), (2, 3, 64, 64), (1, 1, 128, 32)])
def test_every_shape(T: int, B: int, H: int, K: int, V: int) -> None:
    x = inputs(T, B, H, K, V)
    close(run(x, "chunked"), run(x, "reference"), TOLERANCE[torch.float64])


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_scaled_inputs(scale: float) -> None:
    x = cast(inputs(100, K=16, V=16), torch.float32)
    x = [t * scale for t in x[:3]] + x[3:]
    close(run(x, "chunked"), run([t.double() for t in x], "reference"), TOLERANCE[torch.float32])


def test_no_drift_under_slow_decay() -> None:
    """T = 8192 at log_w = -1e-4, where a scan that multiplies by fp32 w is wrong by 8e-5."""
    x = cast(inputs(8192, B=1, H=1, K=16, V=16, log_w=constant(-1e-4)), torch.float32)
    with torch.no_grad():
        exact = roost.wkv(*[t.double() for t in x])[1]
        state = roost.wkv(*x)[1]
    assert (state.double() - exact).norm() <= 5e-6 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 50, 69, 70])
def test_split_anywhere(cut: int, backend: str) -> None:
    """Two calls with the state between them equal one call, and so do their gradients."""
    x = inputs(70)
    whole = run(x, backend)
    leaves = [t.detach().clone().requires_grad_() for t in x]
    r, k, v, log_w, u, state = leaves
    with roost.wkv_backend(backend):
        first, middle = roost.wkv(r[:, :cut], k[:, :cut], v[:, :cut], log_w[:, :cut], u, state)
        second, last = roost.wkv(r[:, cut:], k[:, cut:], v[:, cut:], log_w[:, cut:], u, middle)
    out = torch.cat([first, second], 1)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (out, last)]
    close([out, last, *torch.autograd.grad((out, last), leaves, cotangents)], whole, 1e-12)


def test_eagle_is_finch_with_the_decay_repeated() -> None:
    x = inputs(70, static=True)
    expanded = [*x[:3], x[3].expand(2, 70, 2, 8).contiguous(), *x[4:]]
    static, per_token = run(x, "chunked"), run(expanded, "chunked")
    per_token[5] = per_token[5].sum((0, 1))
    close(static, per_token, 1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0, 40], [0, 0, 1, 33, 33, 40], [0, 8, 16, 40], [0, 40, 40]])
def test_packed_documents(bounds: list[int], backend: str, static: bool) -> None:
    """cu_seqlens equals a loop over the documents: outputs, states and every gradient."""
    n = len(bounds) - 1
    x = inputs(40, B=1, rows=n, static=static)
    packed = run(x, backend, cu_seqlens=torch.tensor(bounds))
    leaves = [t.detach().clone().requires_grad_() for t in x]
    r, k, v, log_w, u, state = leaves
    outs, states = [], []
    for d in range(n):
        a, b = bounds[d], bounds[d + 1]
        w = log_w if static else log_w[:, a:b]
        out, after = wkv_reference(r[:, a:b], k[:, a:b], v[:, a:b], w, u, state[d : d + 1])
        outs.append(out)
        states.append(after)
    results = torch.cat(outs, 1), torch.cat(states)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in results]
    close(packed, [*results, *torch.autograd.grad(results, leaves, cotangents)], 1e-12)


def test_no_documents_at_all() -> None:
    x = inputs(0, B=1)
    out, state = roost.wkv(*x[:5], torch.empty(0, 2, 8, 8, dtype=torch.float64), cu_seqlens=[0])
    assert out.shape == (1, 0, 2, 8) and state.shape == (0, 2, 8, 8)


def test_a_separator_token_resets_outputs() -> None:
    """One token with r = k = v = 0 and log_w = -inf between documents gives the outputs of separate documents."""
    x = inputs(41, B=1)
    for t in x[:3]:
        t[:, 20] = 0
    x[3][:, 20] = -torch.inf
    out, _ = roost.wkv(*x)
    alone, _ = roost.wkv(*(t[:, 21:] for t in x[:4]), x[4])
    assert (out[:, 21:] - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_strides_and_aliasing() -> None:
    """Any strides give the same result; inputs stay as they were; the returned state is new, also at T = 0."""
    x = inputs(33)
    odd = [torch.stack([t, t], -2)[..., 0, :] if t.dim() == 4 else t for t in x[:4]] + x[4:]
    assert not odd[0].is_contiguous()
    before = [t.clone() for t in odd]
    for a, b in zip(roost.wkv(*odd), roost.wkv(*x), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(odd, before, strict=True))
    for backend in BACKENDS:
        with roost.wkv_backend(backend):
            empty = inputs(0)
            assert roost.wkv(*empty)[1].untyped_storage().data_ptr() != empty[5].untyped_storage().data_ptr()


def test_two_runs_and_any_batch_are_the_same() -> None:
    x = cast(inputs(77, B=3, K=32, V=32), torch.float32)
    first, again = run(x, "chunked"), run(x, "chunked")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_missing_state_is_zeros() -> None:
    x = inputs(9)
    assert torch.equal(roost.wkv(*x[:5])[0], roost.wkv(*x[:5], torch.zeros_like(x[5]))[0])


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.usefixtures("unchecked")
def test_registered_with_torch_library(T: int) -> None:
    x = [t.requires_grad_() for t in inputs(T)]
    torch.library.opcheck(wkv_chunked, (*x, None))
    packed = [t.requires_grad_() for t in inputs(T, B=1, rows=2)]
    torch.library.opcheck(wkv_chunked, (*packed, [0, 0, T]))
    d = [t.detach() for t in x]
    torch.library.opcheck(wkv_chunked_backward, (torch.ones_like(d[2]), torch.ones_like(d[5]), *d, None))


@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    x = inputs(20)
    compiled = torch.compile(lambda *a: roost.wkv(*a), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in x]
    out, state = compiled(*leaves)
    gradients = torch.autograd.grad(out.sum() + state.sum(), leaves)
    plain = [t.clone().requires_grad_() for t in x]
    out, state = roost.wkv(*plain)
    for a, b in zip(gradients, torch.autograd.grad(out.sum() + state.sum(), plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_saves_its_inputs_only() -> None:
    """The backward pass recomputes: nothing of the size of a chunk's products is kept between the passes."""
    x = [t.requires_grad_() for t in inputs(70)]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        roost.wkv(*x)
    assert sorted(saved) == sorted(t.data_ptr() for t in x)


@pytest.mark.usefixtures("unchecked")
def test_packed_documents_compile_too() -> None:
    x = inputs(20, B=1, rows=2)
    plain = roost.wkv(*x, cu_seqlens=[0, 7, 20])
    compiled = torch.compile(lambda *a: roost.wkv(*a, cu_seqlens=[0, 7, 20]), fullgraph=True, backend="aot_eager")(*x)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    x, plain = ([t.clone().requires_grad_() for t in inputs(40)] for _ in range(2))
    out, state = checkpoint(roost.wkv, *x, use_reentrant=False)
    expected, expected_state = roost.wkv(*plain)
    a = torch.autograd.grad(out.sum() + state.sum(), x)
    b = torch.autograd.grad(expected.sum() + expected_state.sum(), plain)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


BAD = {
    "r has shape": lambda x: [x[0][0], *x[1:]],
    "do not fit together": lambda x: [x[0], x[1][:, :3], *x[2:]],
    "share one float dtype": lambda x: [x[0].float(), *x[1:]],
    "log_w has shape": lambda x: [*x[:3], x[3][:, :2], *x[4:]],
    "decays near 1 need it": lambda x: [*x[:3], x[3].bfloat16(), *x[4:]],
    "u has shape": lambda x: [*x[:4], x[4][:1], x[5]],
    "state is": lambda x: [*x[:5], x[5].float()],
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.usefixtures("unchecked")
def test_impossible_inputs(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roost.wkv(*BAD[message](inputs(5)))


def test_offsets_are_integers() -> None:
    with pytest.raises(ValueError, match="must be integers"):
        roost.ops.document_offsets([0, 2.7, 5], 1, 5)  # type: ignore[list-item]


@pytest.mark.parametrize("offsets,B", [([0, 5], 2), ([0, 4], 1), ([1, 5], 1), ([0, 3, 2, 5], 1), ([], 1)])
def test_impossible_offsets(offsets: list[int], B: int) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        roost.wkv(*inputs(5, B=B)[:5], cu_seqlens=offsets)


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'chunked'"), roost.wkv_backend("chunk"):
        pass
    with roost.wkv_backend("reference"):
        with pytest.raises(ZeroDivisionError), roost.wkv_backend("chunked"):
            raise ZeroDivisionError
        from roost import ops

        assert ops._forced == "reference"
    assert ops._forced is None
