"""Lines of files become turns: three shapes, one text, and every line that cannot be used is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from roost.chat import render
from roost.data.conversations import Faults, Segment, Turn, parse_conversation, read_records, split_text

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi"}
TURNS = [
    Turn("user", (Segment("User:", False), Segment(" hi\n\n", False))),
    Turn("assistant", (Segment("Assistant:", False), Segment(" Hi", True), Segment("\n\n", True))),
]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT], "id": 3},
        {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]},
        {"prompt": " hi\r\n", "completion": "Hi "},
        {"text": "User: hi\n\nAssistant: Hi"},
        {"text": "\nUser:hi\r\n\r\n\r\nAssistant:  Hi\n\n"},
    ],
)
def test_three_shapes_are_one_conversation(record: object) -> None:
    assert parse_conversation(record) == TURNS


def test_plain_prompts_stay_as_they_are() -> None:
    record = {"prompt": "Q: a\n\n\nA:", "completion": " b \n"}
    assert parse_conversation(record, template="plain") == [
        Turn("user", (Segment("Q: a\n\n\nA:", False),)),
        Turn("assistant", (Segment(" b \n", True),)),
    ]


def test_loss_by_role_and_by_message() -> None:
    """A role in loss_on learns what follows `Role:`; "loss" and "weight" decide for one message."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "loss": True},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b"},
    ]

    def learned(*roles: str) -> str:
        turns = parse_conversation({"messages": messages}, roles)
        return "|".join(segment.text for turn in turns for segment in turn.segments if segment.loss)

    assert learned("assistant") == " u\n\n| b|\n\n"
    assert learned("system", "tool") == " s\n\n| u\n\n| t\n\n"


def test_text_of_several_turns() -> None:
    """A role begins a turn only behind a blank line; blank lines inside a message become one line end, as in chat."""
    text = "System: s\n\nUser: a\nUser: b\n\nc Assistant: d\n\nAssistant: e\n\nObservation: f\n\nAssistant: g"
    messages = split_text(text)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == " a\nUser: b\n\nc Assistant: d"
    turns = parse_conversation({"text": text})
    assert "".join(s.text for turn in turns for s in turn.segments) == render(messages, add_reply=False)


BAD = [
    ("[]", "expected an object"),
    ("{", "not JSON"),
    ('{"a": "\\xff"}', "not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a"}', "not the keys"),
    ('{"prompt": "a", "completion": 3}', "completion is 3; it must be text"),
    ('{"prompt": "a", "completion": " "}', "completion is empty"),
    ('{"prompt": "a\\ud800", "completion": "b"}', "prompt holds a lone surrogate at index 1"),
    ('{"messages": []}', "at least one message"),
    ('{"messages": "hi"}', "it must be a list"),
    ('{"messages": ["hi"]}', "message 0 is 'hi'"),
    ('{"messages": [{"role": "user"}]}', "message 0 has the keys"),
    ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "message 0 has the keys"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 0: role is"),
    ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "message 0: content is"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
        "message 1 has the role 'bot'",
    ),
    ('{"messages": [{"role": "user", "content": "\\n"}]}', "message 0, by 'user', is empty"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\n"}]}',
        "message 1, by 'assistant', is empty",
    ),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with the assistant"),
    (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}',
        "begins with the assistant",
    ),
    ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn: no message by assistant"),
    ('{"messages": [{"role": "user", "content": "a", "weight": 2}]}', "must be 0 or 1"),
    ('{"messages": [{"role": "user", "content": "a", "weight": 1, "loss": true}]}', "one of loss and weight"),
    ('{"text": "hi"}', "the text begins with 'hi'"),
    ('{"text": "User: a\\n\\nAssistant:"}', "message 1, by 'assistant', is empty"),
]


@pytest.mark.parametrize("line,message", BAD, ids=[message for _, message in BAD])
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": [USER, ASSISTANT]})
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=message) as caught:
        list(read_records([path], parse_conversation, Faults()))
    assert str(caught.value).startswith(f"{path}, line 3: ")
    faults = Faults("skip")
    assert list(read_records([path], parse_conversation, faults)) == [TURNS, TURNS]
    assert faults.count == 1
    assert faults.first[0].startswith(f"{path}, line 3: ")


def test_files(tmp_path: Path) -> None:
    """Lines of jsonl, packed or not; any other file is one text. Bytes that are no UTF-8 are a bad line."""
    line = json.dumps({"messages": [USER, ASSISTANT]}).encode() + b"\n"
    plain, packed, text = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.txt"
    plain.write_bytes(line * 2)
    packed.write_bytes(gzip.compress(line * 3))
    text.write_text("User: hi\n\nAssistant: Hi\n")
    assert list(read_records([plain, packed, text], parse_conversation, Faults())) == [TURNS] * 6
    plain.write_bytes(line + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not UTF-8"):
        list(read_records([plain], parse_conversation, Faults()))
    packed.write_bytes(gzip.compress(line * 3)[:-9])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz is damaged"):
        list(read_records([packed], parse_conversation, Faults("skip")))
    plain.write_bytes(b"")
    for path, message in [(plain, "is empty"), (tmp_path / "missing.jsonl", "no such file")]:
        with pytest.raises(ValueError, match=message):
            list(read_records([path], parse_conversation, Faults("skip")))


def test_ten_bad_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("no\n" * 25)
    faults = Faults("skip")
    assert list(read_records([path], parse_conversation, faults)) == []
    assert (faults.count, len(faults.first)) == (25, 10)
