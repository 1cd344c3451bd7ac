"""The oracle against hand expansions, closed forms, its own state, and the `rwkv` package.

Owns: the tests that pin the definition of RWKV-4, 5.0, 5.1, 5.2 and 6. The known traps are in test_oracle_traps.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import READABLE, VERSIONS, Version, make_checkpoint, small_arrays
from roost.evaluation import oracle

Weights = dict[str, np.ndarray]

TEXT = (
    "All human beings are born free and equal in dignity and rights. "
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. 人人生而自由。"
)
TOKENS = [*TEXT.encode(), 0, 256, 299]
SPLIT = 100
"""The package reads TOKENS[:SPLIT] in one call and the rest one by one: its two code paths."""

PACKAGE = """
import sys, torch
torch.set_num_threads(1)
from rwkv.model import RWKV
out, split, tokens = {}, int(sys.argv[1]), [int(x) for x in sys.argv[2].split(",")]
for path in sys.argv[4:]:
    model = RWKV(path, "cpu fp32", verbose=False)
    logits, state = model.forward(tokens[:split], None, full_output=True)
    rows = [logits]
    for token in tokens[split:]:
        logits, state = model.forward([token], state)
        rows.append(logits[None])
    out[path] = {"logits": torch.cat(rows), "state": state, "version": model.version}
torch.save(out, sys.argv[3])
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Weights, np.ndarray, list[np.ndarray]]]:
    """Per case: the checkpoint, and the `rwkv` package's logits and final state for it (fp32, CPU, own process)."""
    folder = tmp_path_factory.mktemp("package")
    made: dict[str, dict[str, torch.Tensor]] = {}
    for case, (version, bonus_name, time_state) in READABLE.items():
        made[case] = make_checkpoint(version, bonus_name=bonus_name, time_state=time_state, seed=len(made))
        torch.save(made[case], folder / f"{case}.pth")
    paths = {case: str(folder / case) for case in READABLE}
    subprocess.run(
        [
            sys.executable,
            "-c",
            PACKAGE,
            str(SPLIT),
            ",".join(str(token) for token in TOKENS),
            str(folder / "out.pt"),
            *paths.values(),
        ],
        env={**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    out = torch.load(folder / "out.pt", weights_only=True)
    for case, path in paths.items():
        assert out[path]["version"] == float(READABLE[case][0])
    return {
        case: (
            {name: value.numpy() for name, value in made[case].items()},
            out[path]["logits"].numpy(),
            [value.numpy() for value in out[path]["state"]],
        )
        for case, path in paths.items()
    }


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference in units of b's standard deviation."""
    return float(np.abs(a - b).max() / b.std())


@pytest.mark.parametrize("case", READABLE)
def test_agrees_with_the_rwkv_package(
    case: str, package: dict[str, tuple[Weights, np.ndarray, list[np.ndarray]]]
) -> None:
    weights, expected, theirs = package[case]
    logits, state = oracle.forward(weights, TOKENS)
    assert distance(expected, logits) <= 2e-4
    assert (expected.argmax(1) == logits.argmax(1)).all()
    rows = ["att_shift", "aa", "bb", "pp", "ffn_shift"] if case == "4" else ["att_shift", "wkv", "ffn_shift"]
    flat = [layer[name] for layer in state for name in rows]
    assert len(flat) == len(theirs)
    for ours, value in zip(flat, theirs, strict=True):
        assert distance(value, ours) <= 2e-4


# The recurrences against formulas that do not recur.


def random_heads(T: int, h: int = 2, N: int = 5) -> tuple[np.ndarray, ...]:
    """r, k, v, w (T, h, N), u (h, N), start (h, N, N); w over [0, 1], both ends included."""
    rng = np.random.default_rng(T)
    w = np.exp(-np.exp(rng.uniform(-8, 3, (T, h, N))))
    w[:, 0, 0], w[:, 0, 1] = 0.0, 1.0
    return (*(rng.normal(size=(T, h, N)) for _ in range(3)), w, rng.normal(size=(h, N)), rng.normal(size=(h, N, N)))


def test_table_8_expansion() -> None:
    r, k, v, w, u, start = random_heads(4)
    y, _ = oracle.wkv_heads(r, k, v, w, u, 0 * start)
    for n in range(2):
        kv = [np.outer(k[t, n], v[t, n]) for t in range(4)]
        U, W = np.diag(u[n]), [np.diag(w[t, n]) for t in range(4)]
        expanded = [
            U @ kv[0],
            U @ kv[1] + kv[0],
            U @ kv[2] + kv[1] + W[1] @ kv[0],
            U @ kv[3] + kv[2] + W[2] @ kv[1] + W[2] @ W[1] @ kv[0],
        ]
        for t in range(4):
            np.testing.assert_allclose(y[t, n], r[t, n] @ expanded[t], rtol=1e-13, atol=1e-13)


def test_closed_form_with_a_carried_state() -> None:
    T = 37
    r, k, v, w, u, start = random_heads(T)
    y, state = oracle.wkv_heads(r, k, v, w, u, start)

    def read(t: int, n: int) -> np.ndarray:
        """S_{t-1} as a sum over all earlier tokens."""
        total = np.prod(w[:t, n], axis=0)[:, None] * start[n]
        for i in range(t):
            total = total + np.prod(w[i + 1 : t, n], axis=0)[:, None] * np.outer(k[i, n], v[i, n])
        return total

    for n in range(2):
        for t in range(T):
            bonus = (r[t, n] * u[n] * k[t, n]).sum() * v[t, n]
            np.testing.assert_allclose(y[t, n], r[t, n] @ read(t, n) + bonus, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state[n], read(T, n), rtol=1e-12, atol=1e-12)


def test_rwkv_4_average_is_the_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    T, A = 30, 6
    k, v, u, w = rng.normal(size=(T, A)), rng.normal(size=(T, A)), rng.normal(size=A), np.exp(rng.uniform(-5, 2, A))
    empty = {"aa": np.zeros(A), "bb": np.zeros(A), "pp": np.full(A, -1e30)}
    y, state = oracle.wkv_average(k, v, w, u, empty)
    for t in range(T):
        weight = np.exp(np.concatenate([k[:t] - w * np.arange(t - 1, -1, -1)[:, None], (u + k[t])[None]]))
        np.testing.assert_allclose(y[t], (weight * v[: t + 1]).sum(0) / weight.sum(0), rtol=1e-12)
    weight = np.exp(k - w * np.arange(T - 1, -1, -1)[:, None])
    np.testing.assert_allclose(state["aa"] * np.exp(state["pp"]), (weight * v).sum(0), rtol=1e-12)
    np.testing.assert_allclose(state["bb"] * np.exp(state["pp"]), weight.sum(0), rtol=1e-12)


def test_rwkv_4_average_survives_large_keys() -> None:
    k, v = np.array([[900.0], [-900.0], [899.0]]), np.array([[1.0], [2.0], [3.0]])
    y, _ = oracle.wkv_average(
        k, v, np.array([0.5]), np.array([0.0]), {"aa": np.zeros(1), "bb": np.zeros(1), "pp": np.full(1, -1e30)}
    )
    share = 1 / (1 + np.exp(899.0 - 899.5))
    np.testing.assert_allclose(y[:, 0], [1.0, 1.0, share * 1 + (1 - share) * 3])


# The state, the trace, the sizes.


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_split_gives_the_same_logits_and_state(version: Version) -> None:
    weights = small_arrays(version, time_state=version == "6")
    tokens = TOKENS[:20]
    whole, after = oracle.forward(weights, tokens)
    for cuts in ([0, 7, 20], [0, 0, 1, 19, 20, 20], list(range(21))):
        state, parts = None, []
        for start, stop in pairwise(cuts):
            logits, state = oracle.forward(weights, tokens[start:stop], state)
            parts.append(logits)
        assert state is not None
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-10, atol=1e-10)
        same(state, after)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_passed_in_is_left_alone(version: Version) -> None:
    weights = small_arrays(version)
    _, state = oracle.forward(weights, TOKENS[:5])
    before = [{name: value.copy() for name, value in layer.items()} for layer in state]
    _, empty = oracle.forward(weights, [], state)
    _, after = oracle.forward(weights, TOKENS[5:9], state)
    for layer, kept in zip([*empty, *after], [*before, *before], strict=True):
        for value in layer.values():
            value += 1
        assert kept.keys() == layer.keys()
    for layer, kept in zip(state, before, strict=True):
        for name, value in layer.items():
            np.testing.assert_array_equal(value, kept[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_trace_names_every_step_and_adds_up(version: Version) -> None:
    weights = small_arrays(version)
    seen: dict[str, np.ndarray] = {}
    logits, _ = oracle.forward(weights, TOKENS[:9], trace=lambda name, value: seen.update({name: value}))
    blocks = [f"blocks.{i}{part}" for i in range(2) for part in (".att", ".ffn", "")]
    assert list(seen) == ["emb", "ln0", *blocks, "ln_out", "logits"]
    assert all(value.dtype == np.float64 and len(value) == 9 for value in seen.values())
    x = seen["ln0"]
    for i in range(2):
        x = x + seen[f"blocks.{i}.att"] + seen[f"blocks.{i}.ffn"]
        np.testing.assert_allclose(seen[f"blocks.{i}"], x, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(seen["logits"], logits)


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_come_from_the_tensors(version: Version) -> None:
    weights = small_arrays(version, dim_att=48, dim_ffn=80)
    logits, state = oracle.forward(weights, TOKENS[:3])
    assert logits.shape == (3, 300)
    if version == "4":
        assert state[0]["aa"].shape == (48,)
    else:
        assert state[0]["wkv"].shape == (3, 16, 16)
    assert state[1]["ffn_shift"].shape == (64,)


def test_5_1_is_5_2_with_decay_and_bonus_repeated() -> None:
    weights = small_arrays("5.1")
    repeated = {
        name: np.repeat(value[:, None], 16, axis=1) if name.endswith(("time_decay", "time_faaaa")) else value
        for name, value in weights.items()
    }
    np.testing.assert_array_equal(oracle.forward(weights, TOKENS[:9])[0], oracle.forward(repeated, TOKENS[:9])[0])


def test_time_state_starts_the_recurrence_transposed() -> None:
    weights = small_arrays("6", time_state=True)
    bare = {name: value for name, value in weights.items() if not name.endswith("time_state")}
    start = oracle.initial_state(bare)
    for i, layer in enumerate(start):
        for head in range(4):
            layer["wkv"][head] = weights[f"blocks.{i}.att.time_state"][head].T
    np.testing.assert_array_equal(oracle.forward(weights, TOKENS[:9])[0], oracle.forward(bare, TOKENS[:9], start)[0])


def test_a_head_longer_than_one_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = small_arrays("5.2")
    expected, _ = oracle.forward(weights, TOKENS[:3])
    monkeypatch.setattr(oracle, "HEAD_ROWS", 64)
    np.testing.assert_allclose(oracle.forward(weights, TOKENS[:3])[0], expected, rtol=1e-12, atol=1e-12)


# Refusals.


def test_a_missing_tensor_is_named() -> None:
    weights = small_arrays("6")
    del weights["blocks.1.att.gate.weight"]
    with pytest.raises(ValueError, match=r"no tensor blocks\.1\.att\.gate\.weight"):
        oracle.forward(weights, [1])


def test_a_tensor_that_nothing_reads_is_named() -> None:
    weights = {**small_arrays("5.2"), "blocks.0.att.extra": np.zeros(3)}
    with pytest.raises(ValueError, match=r"blocks\.0\.att\.extra"):
        oracle.forward(weights, [1])


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.299"):
        oracle.forward(small_arrays("4"), [1, token])


def test_a_state_of_another_depth_is_refused() -> None:
    weights = small_arrays("5.2")
    with pytest.raises(ValueError, match="1 layers, the checkpoint 2"):
        oracle.forward(weights, [1], oracle.initial_state(weights)[:1])


def test_the_oracle_is_alone() -> None:
    """The copy that ships and the copy the tests use are one file, and it imports nothing but NumPy."""
    path = Path(__file__).with_name("oracle.py")
    assert path.is_symlink()
    assert path.samefile(str(oracle.__file__))
    heads = [
        line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
    ]
    assert set(heads) <= {"__future__", "collections", "difflib", "typing", "numpy"}
