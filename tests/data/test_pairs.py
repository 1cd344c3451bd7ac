"""Pairs of answers: the shape of a line, one prompt for both, and batches that never divide a pair."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roost.data.pairs import PairBatch, PairLoader, Reference, parse_pair, read_pairs
from roost.data.sft import Documents
from roost.tokenizer import WorldTokenizer

BYTES = WorldTokenizer.byte_level()


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(documents: Documents, i: int) -> tuple[str, str]:
    """The whole text of a document, and what is learned of it."""
    found = documents[i]
    return BYTES.decode(found.ids), BYTES.decode(found.ids[found.loss])


def test_only_the_answers_are_learned(tmp_path: Path) -> None:
    """From text or messages; earlier answers, and messages with a weight of their own, belong to the prompt."""
    earlier = [
        {"role": "user", "content": "a", "loss": True},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"messages": earlier, "chosen": "yes", "rejected": "no"},
    )
    documents = read_pairs([path], BYTES, 100)
    assert texts(documents, 0) == ("User: q\n\nAssistant: yes\n\n", " yes\n\n")
    assert texts(documents, 1) == ("User: q\n\nAssistant: no\n\n", " no\n\n")
    long = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert texts(documents, 2) == (f"{long} yes\n\n", " yes\n\n")
    assert texts(documents, 3) == (f"{long} no\n\n", " no\n\n")
    assert all(documents[i].ids[-1] == 0 and documents[i].loss[-1] for i in range(4))
    assert documents.report.kept == 2
    plain = read_pairs([write(path, {"prompt": "Q:", "chosen": " y", "rejected": " n"})], BYTES, 9, template="plain")
    assert [texts(plain, i) for i in range(2)] == [("Q: y", " y"), ("Q: n", " n")]


def test_a_long_prompt_is_shortened_for_both(tmp_path: Path) -> None:
    """The longer answer decides, and both stand behind the same rest."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(5)]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "chosen": "y", "rejected": "n" * 20})
    rest = "User: 4\n\nAssistant:"
    documents = read_pairs([path], BYTES, len(rest) + 24)
    assert [texts(documents, i)[0] for i in range(2)] == [f"{rest} y\n\n", f"{rest} {'n' * 20}\n\n"]
    assert (documents.report.shortened, documents.report.turns_cut) == (1, 4)
    with pytest.raises(ValueError, match="0 bad lines, 1 too long for ctx"):
        read_pairs([path], BYTES, len(rest) + 22)


BAD: list[tuple[Any, str]] = [
    (3, "expected an object"),
    ({"prompt": "a", "chosen": "b"}, "not the keys"),
    ({"prompt": "a", "messages": [], "chosen": "b", "rejected": "c"}, "not the keys"),
    ({"prompt": "a", "chosen": "b", "rejected": "b "}, "the same text"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "chosen is"),
    ({"messages": [], "chosen": "b", "rejected": "c"}, "at least one message"),
    ({"messages": [{"role": "system", "content": " "}], "chosen": "b", "rejected": "c"}, "must end with one by"),
    (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "chosen": "b",
            "rejected": "c",
        },
        "must end with one by",
    ),
]


@pytest.mark.parametrize("record,message", BAD)
def test_bad_pairs(record: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pair(record)
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"}, record)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
        read_pairs([path], BYTES, 100)
    assert read_pairs([path], BYTES, 100, bad_lines="skip").report.bad_lines == 1


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Documents, Reference]:
    """Ten pairs; the reference value of document i is -i."""
    records = [{"prompt": f"q{i}" * (i + 1), "chosen": f"yes {i}", "rejected": "n" * (i + 1)} for i in range(10)]
    documents = read_pairs([write(tmp_path / "a.jsonl", *records)], BYTES, 200)
    return documents, Reference(-np.arange(20, dtype=np.float32), "abc")


def pairs_of(batch: Any) -> list[tuple[list[int], list[int], list[float]]]:
    """Inputs and targets of each pair, and its reference values."""
    assert isinstance(batch, PairBatch)
    assert batch.cu_seqlens is not None and batch.reference is not None
    spans = list(pairwise(batch.cu_seqlens[::2]))
    return [
        (batch.inputs[0, a:b].tolist(), batch.targets[0, a:b].tolist(), batch.reference[2 * i : 2 * i + 2].tolist())
        for i, (a, b) in enumerate(spans)
    ]


def test_batches(pairs: tuple[Documents, Reference]) -> None:
    """Each pair once an epoch, with its own reference; shares in order are the batch; the order is the seed's."""
    documents, reference = pairs
    loader = PairLoader(documents, reference, 4, seed=5)
    assert (loader.windows, loader.tokens_per_step) == (10, sum(documents.lengths) / 2.5)
    seen = [pair for step in range(5) for pair in pairs_of(loader.batch_at(step))]
    for epoch in (seen[:10], seen[10:]):
        assert sorted(values for _, _, values in epoch) == [[-2.0 * i, -2.0 * i - 1] for i in range(9, -1, -1)]
    assert seen[:10] != seen[10:]
    for inputs, targets, (first, _) in seen:
        i = int(-first) // 2
        assert inputs == [*documents[2 * i].ids[:-1].tolist(), *documents[2 * i + 1].ids[:-1].tolist()]
        assert sum(t >= 0 for t in targets) == int(documents[2 * i].loss.sum() + documents[2 * i + 1].loss.sum())
    whole = loader.batch_at(1)
    assert [pair for part in range(2) for pair in pairs_of(loader.batch_at(1, part, 2))] == pairs_of(whole)
    assert [pair for share in whole.split(4) for pair in pairs_of(share)] == pairs_of(whole)
    assert pairs_of(whole.to("cpu")) == pairs_of(whole)
    other = PairLoader(documents, reference, 4, seed=6)
    assert pairs_of(other.batch_at(0)) != pairs_of(loader.batch_at(0))


def test_identity_and_errors(pairs: tuple[Documents, Reference]) -> None:
    documents, reference = pairs
    variants = [
        PairLoader(documents, reference, 4),
        PairLoader(documents, reference, 2),
        PairLoader(documents, reference, 4, seed=1),
        PairLoader(documents, reference._replace(fingerprint="abd"), 4),
        PairLoader(documents, reference, 4, settings={"objective": "x"}),
    ]
    assert len({str(loader.identity) for loader in variants}) == len(variants)
    with pytest.raises(ValueError, match="are no pairs"):
        PairLoader(documents, Reference(reference.logprobs[:-2], "abc"), 4)
    with pytest.raises(ValueError, match="step is -1"):
        variants[0].batch_at(-1)
    with pytest.raises(ValueError, match="4 pairs cannot be cut in 3"):
        variants[0].batch_at(0, 0, 3)
    with pytest.raises(ValueError, match="4 pairs cannot be cut in 3"):
        variants[0].batch_at(0).split(3)
