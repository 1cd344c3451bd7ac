"""Conversations as ids and masks, byte by byte; batches that pack them without a leak."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roost.chat import render
from roost.cli import chat
from roost.data.conversations import parse_conversation
from roost.data.sft import Document, Documents, Encoder, SftLoader, packed_batch, read_conversations
from roost.inference.sampling import Sampling
from roost.inference.stream import Completion, Usage
from roost.tokenizer import WorldTokenizer

HEADERS = {"system": b"System:", "user": b"User:", "assistant": b"Assistant:", "tool": b"Observation:"}
BYTES = WorldTokenizer.byte_level()


@cache
def world() -> WorldTokenizer:
    return WorldTokenizer()


@cache
def hostile() -> WorldTokenizer:
    """A vocabulary whose tokens cross every border that a conversation has."""
    crossing = [
        b": ",
        b": a",
        b"\n\nUser",
        b"!\n\nUser:",
        b"\n\nAssistant: a",
        b"a\n",
        b"a\n\n",
        b"\n\nUser: a\n\nAssistant:",
    ]
    return WorldTokenizer(
        {i + 1: bytes([i]) for i in range(256)} | {257 + i: token for i, token in enumerate(crossing)}
    )


def conversation(*contents: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turns."""
    front = [{"role": "system", "content": system}] if system else []
    return front + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def document(messages: list[dict[str, str]], tokenizer: WorldTokenizer, *loss_on: str, ctx: int = 10_000) -> Document:
    found = Encoder(tokenizer, ctx).encode(parse_conversation({"messages": messages}, loss_on or ("assistant",)))
    assert found is not None
    return found


def test_golden_ids() -> None:
    """The vector of the reference document, and the document boundary that ends a conversation."""
    found = document(conversation("hi", "Hi"), world())
    assert found.ids.tolist() == [24281, 59, 4571, 261, 5585, 41693, 59, 3880, 261, 0]
    assert found.loss.tolist() == [False] * 7 + [True] * 3
    assert found.ids.dtype == np.uint16


words = st.text(st.sampled_from("aU:!。… \n\r\u3000é🙂"), min_size=0, max_size=8).map(lambda text: "a" + text + "a!")
spoken = st.tuples(st.sampled_from([*HEADERS]), st.one_of(words, st.sampled_from(["a", "好。", "a…", "User: a", "a!"])))


@given(
    spoken=st.lists(spoken, min_size=0, max_size=5),
    loss_on=st.lists(st.sampled_from([*HEADERS]), min_size=1, unique=True),
    which=st.sampled_from(["bytes", "world", "hostile"]),
)
def test_every_byte_knows_its_role(spoken: list[tuple[str, str]], loss_on: list[str], which: str) -> None:
    """The bytes are those of chat.render, and a token is learned when its bytes are: all of them or none.

    Learned are the bytes behind `Role:` up to and with the blank line, of the roles wanted. The text ends with the last
    of them, and token 0 follows when that is the end of the conversation.
    """
    messages = [{"role": "user", "content": "q"}, *({"role": role, "content": text} for role, text in spoken)]
    roles = {"user", *(role for role, _ in spoken)}
    if not roles & set(loss_on):
        loss_on = ["user"]
    tokenizer = {"bytes": BYTES, "world": world(), "hostile": hostile()}[which]
    found = document(messages, tokenizer, *loss_on)

    text, expected = b"", []
    for message in messages:
        whole = render([message], add_reply=False).encode()
        header = len(HEADERS[message["role"]])
        text += whole
        expected += [False] * header + [message["role"] in loss_on] * (len(whole) - header)
    assert text == render(messages, add_reply=False).encode()
    end = len(expected) - expected[::-1].index(True)
    ids, loss = found.ids.tolist(), found.loss.tolist()
    if end == len(text):
        assert ids.pop() == 0
        assert loss.pop() is True
    pieces = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(pieces) == text[:end]
    by_byte = [learned for piece, learned in zip(pieces, loss, strict=True) for _ in piece]
    assert by_byte == expected[:end]
    assert all(pieces)


@pytest.mark.parametrize("answers", [("Hi!", "Yes."), ("好。", "对，"), ("a…", "1\n2")])
def test_the_ids_are_those_of_roost_chat(answers: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a chat session reads and writes, turn after turn, is what is trained on; 。 and a line end are one token."""
    messages = conversation("hi。", answers[0], "and then?\n\n\nso", answers[1], system="Be brief。")
    heard: list[int] = []

    def read(_: object, ids: list[int], __: object) -> tuple[torch.Tensor, Any]:
        heard.extend(ids)
        return torch.zeros(1), object()

    monkeypatch.setattr(chat, "read", read)
    session = chat.Session(cast(Any, None), world(), Sampling(), system="Be brief。")
    for question, answer in zip(messages[1::2], messages[2::2], strict=True):
        turn = session.hear(question["content"])
        written = world().encode(" " + answer["content"])
        heard.extend(written)
        cost = Usage(0, len(written))
        state = cast(Any, object())
        session.keep(turn, Completion(answer["content"], tuple(written), "stop", cost, (), state, torch.zeros(1), 0))
    assert document(messages, world()).ids.tolist() == [*heard, 261, 0]


def test_no_token_of_the_world_vocabulary_crosses_a_cut() -> None:
    """Why cutting between turns and behind `Role:` changes nothing: no `: `, no line end before a letter."""
    for number in range(world().vocab_size):
        token = world().token_bytes(number)
        assert b": " not in token
        assert not any(token[i : i + 1] == b"\n" and token[i + 1 : i + 2].isalpha() for i in range(len(token)))


def test_what_follows_the_last_answer_is_left_out() -> None:
    found = document(conversation("a", "b", "c"), BYTES)
    assert bytes(i - 1 for i in found.ids) == b"User: a\n\nAssistant: b\n\n"
    weighted: list[dict[str, Any]] = conversation("a", "b", "c", "d")
    weighted[3]["weight"] = 0
    assert document(weighted, BYTES).ids.tolist() == found.ids.tolist()


def text(found: Document | None) -> str:
    assert found is not None
    return BYTES.decode_bytes(found.ids).decode()


def test_long_conversations_lose_their_oldest_exchanges() -> None:
    """The system message stays, whole turns go, the rest begins with a user, and as little as possible is lost."""
    messages = conversation("first", "1", "second", "2", "third", "3", system="s")
    turns = parse_conversation({"messages": messages})
    keep = [conversation(*rest, system="s") for rest in (["second", "2", "third", "3"], ["third", "3"])]
    for kept in keep:
        exact = len(render(kept, add_reply=False))  # bytes; with token 0 one more id, and one position less
        encoder = Encoder(BYTES, exact)
        assert text(encoder.encode(turns)) == render(kept, add_reply=False)
        assert (encoder.shortened, encoder.turns_cut, encoder.too_long) == (1, 6 - len(kept) + 1, 0)
    encoder = Encoder(BYTES, len(render(keep[-1], add_reply=False)) - 1)
    assert encoder.encode(turns) is None
    assert (encoder.shortened, encoder.turns_cut, encoder.too_long) == (0, 0, 1)
    encoder = Encoder(BYTES, len(render(messages, add_reply=False)) - 1, "drop")
    assert encoder.encode(turns) is None
    assert (encoder.shortened, encoder.too_long) == (0, 1)
    assert text(Encoder(BYTES, len(render(messages, add_reply=False)), "drop").encode(turns)) == render(
        messages, add_reply=False
    )


def test_only_system_messages_at_the_front_outlive_what_came_before_them() -> None:
    """One in the middle goes with its exchange: what is left fits, so that it can be packed."""
    instruction = {"role": "system", "content": "s" * 60}
    front, middle, last = conversation(system="f"), [*conversation("a", "1"), instruction], conversation("b", "2")
    kept = render([*front, *last], add_reply=False)
    encoder = Encoder(BYTES, len(kept))
    found = encoder.encode(parse_conversation({"messages": [*front, *middle, *last]}))
    assert text(found) == kept and (encoder.shortened, encoder.turns_cut) == (1, 3)


def write(path: Path, conversations: list[list[dict[str, str]]], extra: str = "") -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations) + extra)
    return path


def test_report(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [conversation("a", "b"), conversation("a" * 90, "b", "c", "d"), conversation("a" * 90, "b")],
        "broken\n",
    )
    documents = read_conversations([path], BYTES, 40, bad_lines="skip")
    report = documents.report
    assert len(documents) == report.kept == 2
    assert (report.shortened, report.turns_cut, report.too_long, report.bad_lines) == (1, 2, 1, 1)
    assert report.first_bad[0].startswith(f"{path}, line 4: not JSON")
    assert (report.tokens, report.learned) == (2 * 24, 2 * 5)
    assert documents.lengths.tolist() == [23, 23]
    assert text(documents[1]) == "User: c\n\nAssistant: d\n\n"
    with pytest.raises(ValueError, match="line 4: not JSON"):
        read_conversations([path], BYTES, 40)
    with pytest.raises(ValueError, match="no conversation is left to train on: 1 bad lines, 3 too long for ctx 5"):
        read_conversations([path], BYTES, 5, bad_lines="skip")
    for wrong in ({"loss_on": ["bot"]}, {"loss_on": []}, {"template": "x"}, {"long": "x"}, {"bad_lines": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_conversations([path], BYTES, 40, **cast(Any, wrong))


def test_a_vocabulary_beyond_16_bits() -> None:
    tokens = {i + 1: bytes([i]) for i in range(256)} | {70_000: b" b"}
    found = document(conversation("a", "b"), WorldTokenizer(tokens))
    assert found.ids.dtype == np.uint32
    assert 70_000 in found.ids.tolist()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """37 conversations that differ in length and in their bytes."""
    path = tmp_path_factory.mktemp("sft") / "a.jsonl"
    write(path, [conversation(f"question {i}" * (1 + i % 5), f"answer {i}" * (1 + i % 7)) for i in range(37)])
    return read_conversations([path], BYTES, 256)


def sequences(loader: SftLoader, step: int, part: int = 0, parts: int = 1) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every sequence of a batch."""
    batch = loader.batch_at(step, part, parts)
    offsets = batch.cu_seqlens
    assert offsets is not None
    assert batch.inputs.shape == batch.targets.shape == (1, offsets[-1])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    inputs, targets = batch.inputs[0].tolist(), batch.targets[0].tolist()
    return [(inputs[a:b], targets[a:b]) for a, b in pairwise(offsets)]


def test_targets_are_the_learned_ids_moved_by_one(documents: Documents) -> None:
    batch = packed_batch(documents, [3, 5])
    a, b = documents[3], documents[5]
    assert batch.cu_seqlens == (0, len(a.ids) - 1, len(a.ids) + len(b.ids) - 2)
    assert batch.inputs[0].tolist() == [*a.ids[:-1].tolist(), *b.ids[:-1].tolist()]
    expected = [t if learned else -1 for d in (a, b) for t, learned in zip(d.ids[1:].tolist(), d.loss[1:], strict=True)]
    assert batch.targets[0].tolist() == expected
    assert b"".join(BYTES.token_bytes(t) for t in expected if t >= 0).startswith(b" answer 3")


def test_an_epoch_reads_every_conversation_once(documents: Documents) -> None:
    """Rows hold at most ctx positions, packed well; the next epoch packs and orders anew; no position is padding."""
    loader = SftLoader(documents, 256, 1, seed=3)
    everything = sorted(documents[i].ids[:-1].tolist() for i in range(len(documents)))
    epochs = [[sequences(loader, epoch * loader.windows + k) for k in range(loader.windows)] for epoch in range(2)]
    for rows in epochs:
        assert sorted(inputs for row in rows for inputs, _ in row) == everything
        assert max(sum(len(inputs) for inputs, _ in row) for row in rows) <= 256
    assert sum(documents.lengths) / (loader.windows * 256) > 0.9
    assert {str(row) for row in epochs[0]} != {str(row) for row in epochs[1]}
    assert loader.tokens_per_step == pytest.approx(sum(documents.lengths) / loader.windows)


@given(step=st.integers(0, 50), batch=st.sampled_from([1, 4, 12]), seed=st.integers(0, 2**64 - 1))
def test_batches_are_a_function_of_the_step(documents: Documents, step: int, batch: int, seed: int) -> None:
    """Whatever was read before; in any number of shares; a batch of b rows is b batches of one."""
    loader, other = (SftLoader(documents, 256, batch, seed=seed) for _ in range(2))
    wanted = sequences(loader, step)
    for before in (step + 9, 0, step):
        other.batch_at(before)
    assert sequences(other, step) == wanted
    for parts in (n for n in (2, 4) if batch % n == 0):
        assert [s for part in range(parts) for s in sequences(other, step, part, parts)] == wanted
    single = SftLoader(documents, 256, 1, seed=seed)
    assert [s for k in range(step * batch, (step + 1) * batch) for s in sequences(single, k)] == wanted


def test_identity_and_errors(documents: Documents, tmp_path: Path) -> None:
    """Other text, another mask and other numbers are other data."""
    path = write(tmp_path / "a.jsonl", [conversation("a", "b"), conversation("a", "b")])
    first = read_conversations([path], BYTES, 64)
    masked = read_conversations([path], BYTES, 64, loss_on=["user", "assistant"])
    identities = [
        SftLoader(data, ctx, batch, seed=seed).identity
        for data, ctx, batch, seed in [
            (first, 64, 1, 0),
            (documents, 256, 1, 0),
            (masked, 64, 1, 0),
            (first, 65, 1, 0),
            (first, 64, 2, 0),
            (first, 64, 1, 1),
        ]
    ]
    assert len({str(identity) for identity in identities}) == len(identities)
    assert SftLoader(read_conversations([path], BYTES, 64), 64, 1).identity == identities[0]
    with pytest.raises(ValueError, match="holds 1 to 16"):
        SftLoader(documents, 16, 1)
    loader = SftLoader(documents, 256, 4)
    for arguments, message in [((-1,), "step is -1"), ((0, 0, 3), "4 rows"), ((0, 2, 2), "part is 2")]:
        with pytest.raises(ValueError, match=message):
            loader.batch_at(*arguments)
    for wrong in ({"ctx": 0, "batch": 1}, {"ctx": 256, "batch": 0}, {"ctx": 256, "batch": 1, "seed": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            SftLoader(documents, **wrong)
