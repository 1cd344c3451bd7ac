"""Chat templates, byte by byte and id by id."""

from __future__ import annotations

from typing import Any

import pytest

from roost.chat import SEPARATOR, STOP, ask, clean, instruct, render
from roost.tokenizer import WorldTokenizer

WORLD = WorldTokenizer()


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


def test_one_turn_and_its_ids() -> None:
    prompt = render(said("hi"))
    assert prompt == "User: hi\n\nAssistant:"
    assert WORLD.encode(prompt) == [24281, 59, 4571, 261, 5585, 41693, 59]
    assert WORLD.encode(SEPARATOR + "User:") == [261, 24281, 59]


def test_history_system_and_tool() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *said("1 + 1?", " 2. "),
        {"role": "tool", "content": "clock: 12"},
        {"role": "user", "content": "thanks"},
    ]
    whole = "System: Be brief.\n\nUser: 1 + 1?\n\nAssistant: 2.\n\nObservation: clock: 12\n\nUser: thanks\n\n"
    assert render(messages) == whole + "Assistant:"
    assert render(messages, add_reply=False) == whole
    assert WORLD.encode("System:") == [40812, 59] and WORLD.encode("Observation:") == [40640, 33944, 59]


def test_state_after_an_answer_and_the_next_turn_make_the_same_text() -> None:
    first = render(said("a")) + " b"
    assert first + SEPARATOR + render(said("c")) == render(said("a", "b", "c"))


def test_empty_answers_are_left_out_and_prefixes_are_open() -> None:
    assert render(said("a", " \n ", "b")) == "User: a\n\nUser: b\n\nAssistant:"
    assert render([{"role": "system", "content": ""}, *said("a")]) == "User: a\n\nAssistant:"
    assert render(said("a", "Sure, \n"), prefix=True) == "User: a\n\nAssistant: Sure,"
    assert render(said("a", ""), prefix=True) == "User: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\n\r\nb", "a\nb"),  # collapsing before converting would leave a blank line
        ("a\n\n\nb\n\n\n\nc", "a\nb\nc"),  # one replacement would leave one
        ("a\rb\r\rc", "a\nb\nc"),
        ("\u3000 a \u3000\n", "a"),
        ("a\n \nb", "a\n \nb"),
        ("\x00", "\x00"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert SEPARATOR not in clean(text) and clean(cleaned) == cleaned


def test_task_templates() -> None:
    assert instruct("Translate.\n\n", "Guten\r\n\r\nTag") == (
        "Instruction: Translate.\n\nInput: Guten\nTag\n\nResponse:"
    )
    assert instruct("Sing") == "Instruction: Sing\n\nResponse:"
    assert [WORLD.encode(word) for word in ("Instruction:", "Input:", "Response:")] == [
        [62994, 59],
        [33192, 59],
        [53671, 59],
    ]
    assert ask("Why?") == "Q: Why?\n\nA:" and WORLD.encode("Q:A:") == [82, 59, 66, 59]
    for question in ("Who", "Who?"):
        assert ask(question, "One.\r\n\r\nTwo. ") == "One.\n\nTwo.\n\nQuestion: Who? Answer:"
    assert WORLD.encode("Question:") == [53648, 59] and WORLD.encode(" Answer:") == [43965, 59]


def test_no_prompt_ends_in_a_space() -> None:
    for prompt in (render(said("a ")), render(said("a", "b "), prefix=True), instruct("t "), ask("q "), ask("q", "m ")):
        assert prompt == prompt.rstrip()


def test_stop_strings() -> None:
    assert STOP["strict"] == ("\n\n",)
    assert STOP["paragraphs"] == ("\n\nUser:", "\n\nAssistant:", "\n\nSystem:", "\n\nObservation:")
    assert len(STOP["runner"]) == 11 and "\n\nQ" in STOP["runner"]
    blank = [id for id in range(65536) if b"\n\n" in WORLD.token_bytes(id)]
    assert len(blank) == 34  # so that a test for id 261 would not do


BAD: list[tuple[str, list[dict[str, str]], dict[str, Any]]] = [
    ("no messages", [], {}),
    ("message 0, by 'user', is empty", said(" "), {}),
    (
        "message 1 has the role 'asistant'; did you mean 'assistant'",
        [*said("a"), {"role": "asistant", "content": ""}],
        {},
    ),
    (r"message 0 has the keys \['content'\]", [{"content": "x"}], {}),
    ("prefix=True needs a last message by the assistant, not by 'user'", said("a"), {"prefix": True}),
]


@pytest.mark.parametrize(("message", "messages", "options"), BAD)
def test_bad_messages(message: str, messages: list[dict[str, str]], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        render(messages, **options)


def test_bad_tasks() -> None:
    with pytest.raises(ValueError, match="the task is empty"):
        instruct("\n")
    with pytest.raises(ValueError, match="the question is empty"):
        ask("", "m")
