"""The operator: every backend against the recurrence in fp64, in every decay regime, shape and gradient."""

from __future__ import annotations

import pytest
import torch

import roost
from roost.ops.library import wkv_chunked, wkv_chunked_backward, wkv_native, wkv_native_backward
from roost.ops.reference import wkv_reference
from wkv_cases import CASES, FAST, REGIMES, TOLERANCE, cast, close, constant, exact, inputs, needs_native, run


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
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("T", [0, 1, 5, 8])
def test_gradcheck(T: int, backend: str, static: bool) -> None:
    x = [t.requires_grad_() for t in inputs(T, K=3, V=4, static=static)]
    with roost.wkv_backend(backend):
        assert torch.autograd.gradcheck(lambda *a: roost.wkv(*a), x)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", FAST)
def test_every_regime(backend: str, dtype: torch.dtype, regime: str, static: bool) -> None:
    """fp32 and fp64 within their bound of the fp64 recurrence: output, state and every gradient, dx of exp(x) too."""
    if backend == "native" and dtype == torch.float64:
        pytest.skip("native computes in fp32")
    x = cast(inputs(300, B=1, K=32, V=32, log_w=REGIMES[regime], static=static), dtype)
    got, true = run(x, backend), exact(x)
    close(got, true, TOLERANCE[dtype])
    if x[3].isfinite().all():
        a, b = got[5].double() * x[3].double(), true[5] * x[3].double()
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm() + 1e-30


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str, static: bool) -> None:
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes fp32 and bf16")
    x = cast(inputs(130, B=1, K=32, V=32, static=static), dtype)
    got = run(x, backend)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert [t.dtype for t in got[2:]] == [dtype] * 3 + [torch.float32] * 3
    close(got, exact(x), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_changes_nothing(grad: bool, T: int, backend: str) -> None:
    """The model may compute its matrices in bf16; the recurrence and its state stay in fp32."""
    x = [t.requires_grad_(grad) for t in cast(inputs(T, K=32, V=32), torch.float32)]
    with torch.set_grad_enabled(grad), roost.wkv_backend(backend):
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


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130, 300])
@pytest.mark.parametrize("B,H,N", [(1, 1, 32), (0, 2, 64), (2, 3, 64), (3, 1, 128)])
def test_every_shape_natively(B: int, H: int, N: int, T: int, static: bool, dtype: torch.dtype) -> None:
    x = cast(inputs(T, B, H, N, N, static=static), dtype)
    close(run(x, "native"), exact(x), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_scaled_inputs(scale: float, backend: str) -> None:
    x = cast(inputs(100, K=32, V=32), torch.float32)
    x = [t * scale for t in x[:3]] + x[3:]
    close(run(x, backend), exact(x), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("decay", [-1e-4, -1e-6])
def test_no_drift_under_slow_decay(decay: float, backend: str) -> None:
    """T = 8192, where a scan that multiplies by fp32 w is wrong by 8e-5."""
    x = cast(inputs(8192, B=1, H=1, K=32, V=32, log_w=constant(decay)), torch.float32)
    with torch.no_grad(), roost.wkv_backend(backend):
        state = roost.wkv(*x)[1]
    with torch.no_grad(), roost.wkv_backend("reference"):
        true = roost.wkv(*[t.double() for t in x])[1]
    assert (state.double() - true).norm() <= 5e-6 * true.norm()


@pytest.mark.parametrize("backend,dtype,N", CASES)
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 50, 69, 70])
def test_split_anywhere(cut: int, backend: str, dtype: torch.dtype, N: int) -> None:
    """Two calls with the state between them equal one call, and so do their gradients."""
    x = cast(inputs(70, K=N, V=N), dtype)
    whole = run(x, backend)
    leaves = [t.detach().clone().requires_grad_() for t in x]
    r, k, v, log_w, u, state = leaves
    with roost.wkv_backend(backend):
        first, middle = roost.wkv(r[:, :cut], k[:, :cut], v[:, :cut], log_w[:, :cut], u, state)
        second, last = roost.wkv(r[:, cut:], k[:, cut:], v[:, cut:], log_w[:, cut:], u, middle)
    out = torch.cat([first, second], 1)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, last)]
    close([out, last, *torch.autograd.grad((out, last), leaves, cotangents)], whole, TOLERANCE[dtype])


@pytest.mark.parametrize("backend,dtype,N", CASES)
def test_eagle_is_finch_with_the_decay_repeated(backend: str, dtype: torch.dtype, N: int) -> None:
    x = cast(inputs(70, K=N, V=N, static=True), dtype)
    expanded = [*x[:3], x[3].expand(2, 70, 2, N), *x[4:]]
    static, per_token = run(x, backend), run(expanded, backend)
    per_token[5] = per_token[5].sum((0, 1))
    close(static, per_token, TOLERANCE[dtype])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("backend,dtype,N", CASES)
@pytest.mark.parametrize("bounds", [[0, 40], [0, 0, 1, 33, 33, 40], [0, 8, 16, 40], [0, 40, 40], [0, 130, 131, 300]])
def test_packed_documents(bounds: list[int], backend: str, dtype: torch.dtype, N: int, static: bool) -> None:
    """cu_seqlens equals a loop over the documents: outputs, states and every gradient."""
    n, T = len(bounds) - 1, bounds[-1]
    x = cast(inputs(T, B=1, K=N, V=N, rows=n, static=static), dtype)
    packed = run(x, backend, cu_seqlens=torch.tensor(bounds))
    leaves = [t.detach().double().requires_grad_() for t in x]
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
    cotangents[0] = cotangents[0].to(dtype).double()
    cotangents[1] = cotangents[1].to(packed[1].dtype).double()
    close(packed, [*results, *torch.autograd.grad(results, leaves, cotangents)], TOLERANCE[dtype])


@pytest.mark.parametrize("backend,dtype,N", CASES)
def test_no_documents_at_all(backend: str, dtype: torch.dtype, N: int) -> None:
    x = cast(inputs(0, B=1, K=N, V=N), dtype)
    with roost.wkv_backend(backend):
        out, state = roost.wkv(*x[:5], x[5][:0], cu_seqlens=[0])
    assert out.shape == (1, 0, 2, N) and state.shape == (0, 2, N, N)


def test_a_separator_token_resets_outputs() -> None:
    """One token with r = k = v = 0 and log_w = -inf between documents gives the outputs of separate documents."""
    x = inputs(41, B=1)
    for t in x[:3]:
        t[:, 20] = 0
    x[3][:, 20] = -torch.inf
    out, _ = roost.wkv(*x)
    alone, _ = roost.wkv(*(t[:, 21:] for t in x[:4]), x[4])
    assert (out[:, 21:] - alone).abs().max() <= 1e-12 * alone.abs().max()


@pytest.mark.parametrize("backend,dtype,N", CASES)
def test_strides_and_aliasing(backend: str, dtype: torch.dtype, N: int) -> None:
    """Any strides give the same result; inputs stay as they were; the returned state is new, also at T = 0."""
    x = cast(inputs(33, K=N, V=N), dtype)
    odd = [torch.stack([t, t], -2)[..., 0, :] if t.dim() == 4 else t for t in x[:4]] + x[4:]
    assert not odd[0].is_contiguous()
    apart = [torch.stack([t, t], -1)[..., 0] for t in x]  # the last dimension is not contiguous
    before = [t.clone() for t in odd]
    with roost.wkv_backend(backend):
        plain = roost.wkv(*x)
        for other in (odd, apart):
            assert all(torch.equal(a, b) for a, b in zip(roost.wkv(*other), plain, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(odd, before, strict=True))
        for T in (0, 1, 2):
            some = [t[:, :T] if t.dim() == 4 and i < 4 else t for i, t in enumerate(x)]
            assert roost.wkv(*some)[1].untyped_storage().data_ptr() != x[5].untyped_storage().data_ptr()
    for a, b in zip(run(odd, backend), run(x, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_the_same(backend: str) -> None:
    x = cast(inputs(77, B=3, K=32, V=32), torch.float32)
    first, again = run(x, backend), run(x, backend)
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


@needs_native
@pytest.mark.parametrize("T", [1, 20, 70])
@pytest.mark.usefixtures("unchecked")
def test_native_registered_with_torch_library(T: int) -> None:
    x = [t.requires_grad_() for t in cast(inputs(T, K=32, V=32), torch.float32)]
    torch.library.opcheck(wkv_native, (*x, None, True))
    packed = [t.requires_grad_() for t in cast(inputs(T, B=1, K=32, V=32, rows=2), torch.float32)]
    torch.library.opcheck(wkv_native, (*packed, [0, 0, T], True))
    d = [t.detach() for t in x]
    saved = wkv_native(*d, None, True)[2]
    torch.library.opcheck(wkv_native_backward, (torch.ones_like(d[2]), torch.ones_like(d[5]), saved, *d, None))


@pytest.mark.parametrize("backend,dtype,N", CASES[1:])
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break(backend: str, dtype: torch.dtype, N: int) -> None:
    x = cast(inputs(70, K=N, V=N), dtype)
    with roost.wkv_backend(backend):
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
@pytest.mark.parametrize("backend,dtype,N", CASES[1:])
def test_packed_documents_compile_too(backend: str, dtype: torch.dtype, N: int) -> None:
    x = cast(inputs(20, B=1, K=N, V=N, rows=2), dtype)
    call = lambda *a: roost.wkv(*a, cu_seqlens=[0, 7, 20])  # noqa: E731
    with roost.wkv_backend(backend):
        plain, compiled = call(*x), torch.compile(call, fullgraph=True, backend="aot_eager")(*x)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("backend,dtype,N", CASES)
def test_checkpointing_gives_the_same_gradients(backend: str, dtype: torch.dtype, N: int) -> None:
    from torch.utils.checkpoint import checkpoint

    x, plain = ([t.clone().requires_grad_() for t in cast(inputs(130, K=N, V=N), dtype)] for _ in range(2))
    with roost.wkv_backend(backend):
        out, state = checkpoint(roost.wkv, *x, use_reentrant=False)
        a = torch.autograd.grad(out.sum() + state.sum(), x)
        expected, expected_state = roost.wkv(*plain)
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
