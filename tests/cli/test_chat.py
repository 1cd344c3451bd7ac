"""`roost chat`: what the model has read is exactly the conversation, whatever was undone, retried or stopped."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from roost.chat import STOP
from roost.cli import main
from roost.cli.chat import Session, converse
from roost.inference.sampling import Sampling
from roost.inference.stream import read
from roost.models.rwkv import RWKV
from roost.state import State
from roost.tokenizer import WorldTokenizer
from tiny import tiny_model

BYTES = WorldTokenizer.byte_level()
LETTERS = tuple(id for id in range(1, 257) if not 97 < id < 123)  # ban all but b..z: every answer is text


@pytest.fixture
def model() -> RWKV:
    return tiny_model()


def session(model: RWKV, **rest: Any) -> Session:
    params = Sampling(seed=1, bans=LETTERS, stop=STOP["strict"], stop_ids=())
    return Session(model, BYTES, params, max_tokens=6, **rest)


def talk(talking: Session, *lines: str | type[BaseException]) -> str:
    """Type these lines; the screen."""
    typed = iter(lines)

    def line() -> str:
        given = next(typed, EOFError)
        if isinstance(given, str):
            return given
        raise given

    screen = io.StringIO()
    converse(talking, Console(file=screen, highlight=False, width=100), line)
    return screen.getvalue()


def same(state: State | None, text: str, model: RWKV) -> bool:
    """Whether the state is that of reading `text`."""
    assert state is not None
    _, expected = read(model, BYTES.encode(text))
    assert state.tokens == expected.tokens
    return all(
        torch.allclose(a, b, atol=1e-4, rtol=1e-4)
        for layer, other in zip(state.layers, expected.layers, strict=True)
        for a, b in zip(layer, other, strict=True)
    )


def test_the_state_has_read_the_conversation(model: RWKV) -> None:
    talking = session(model, system="Be kind.")
    screen = talk(talking, "hi\r\n", "", "how are you?")
    one, two = (turn.reply.text for turn in talking.turns)
    assert one in screen and two in screen
    text = f"System: Be kind.\n\nUser: hi\n\nAssistant:{one}\n\nUser: how are you?\n\nAssistant:{two}"
    assert same(talking.state, text, model)


def test_retry_alternatives_and_undo_fork_the_state(model: RWKV) -> None:
    talking = session(model)
    talk(talking, "hi")
    first = talking.last.reply.text
    assert same(talking.state, f"User: hi\n\nAssistant:{first}", model)
    talk(talking, "/retry")
    second = talking.last.reply.text
    assert second != first and len(talking.last.replies) == 1
    screen = talk(talking, "++", "++")
    assert len({reply.text for reply in talking.last.replies}) == 3 and "(answer 3 of 3)" in screen
    assert same(talking.state, f"User: hi\n\nAssistant:{talking.last.replies[2].text}", model)
    assert second in talk(talking, "++ 1") and same(talking.state, f"User: hi\n\nAssistant:{second}", model)
    talk(talking, "more", "/undo")
    assert same(talking.state, f"User: hi\n\nAssistant:{second}", model)
    talk(talking, "/undo")
    assert talking.state is None and "nothing was said yet" in talk(talking, "/undo", "/retry", "++", "++ 1")


def test_seeds_make_the_conversation_repeatable(model: RWKV) -> None:
    texts = []
    for _ in range(2):
        talking = session(model)
        talk(talking, "a", "++", "b")
        texts.append([reply.text for turn in talking.turns for reply in turn.replies])
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_save_load_reset_and_system(model: RWKV, tmp_path: Path) -> None:
    file = tmp_path / "talk.state"
    talking = session(model)
    assert "nothing was said yet" in talk(talking, f"/save {file}") and not file.exists()
    talk(talking, "hi", f"/save {file}")
    said = f"User: hi\n\nAssistant:{talking.last.reply.text}"
    other = session(model)
    talk(other, f"/load {file}", "on")
    assert same(other.state, f"{said}\n\nUser: on\n\nAssistant:{other.last.reply.text}", model)
    talk(other, "/reset")
    assert same(other.state, said, model) and other.turns == []
    talk(talking, "/system Be brief.", "yes")
    assert same(talking.state, f"System: Be brief.\n\nUser: yes\n\nAssistant:{talking.last.reply.text}", model)
    talk(talking, "/system", "no")
    assert same(talking.state, f"User: no\n\nAssistant:{talking.last.reply.text}", model)


def test_wrong_commands_are_explained_and_change_nothing(model: RWKV, tmp_path: Path) -> None:
    strange = tmp_path / "strange.state"
    State.zeros(tiny_model("eagle-tiny").config, fingerprint="e" * 64).save(strange)
    talking = session(model)
    talk(talking, "hi")
    before = talking.state
    screen = talk(
        talking,
        "/retyr",
        "++ x",
        "++ 9",
        "/load",
        "/load nowhere",
        f"/load {strange}",
        f"/save {tmp_path}",
        "/save no/such/place",
        "/help",
    )
    for message in (
        "no command /retyr; did you mean /retry?",
        "wants the number of an answer",
        "there is no answer 9; there are 1",
        "/load wants a file name",
        "no state file at 'nowhere'",
        "made by another model",
        "it is a directory",
        "does not exist",
        "/system TEXT",
    ):
        assert message in screen
    assert talking.state is before


@pytest.fixture
def interrupt(model: RWKV, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C at the n-th call of the model from now on."""

    def at(call: int) -> None:
        calls, forward = iter(range(10**6)), type(model).forward

        def interrupted(*args: Any, **rest: Any) -> Any:
            if next(calls) == call:
                raise KeyboardInterrupt
            return forward(model, *args, **rest)

        monkeypatch.setattr(model, "forward", interrupted)

    return at


def test_ctrl_c_stops_the_answer_and_not_the_program(model: RWKV, interrupt: Callable[[int], None]) -> None:
    talking = session(model)
    interrupt(3)  # the message, then two letters
    screen = talk(talking, "hi", KeyboardInterrupt, "again")
    assert "(stopped)" in screen and "Ctrl-D or /quit leaves" in screen and len(talking.turns) == 2
    short, whole = (turn.reply.text for turn in talking.turns)
    assert 1 <= len(short) <= 3 and len(whole) == 6
    assert same(talking.state, f"User: hi\n\nAssistant:{short}\n\nUser: again\n\nAssistant:{whole}", model)


def test_ctrl_c_while_reading_the_message_takes_it_back(model: RWKV, interrupt: Callable[[int], None]) -> None:
    talking = session(model)
    interrupt(0)
    talk(talking, "hi")
    assert talking.turns == [] and talking.state is None


def test_an_empty_answer_is_no_turn(model: RWKV) -> None:
    talking = session(model)
    talking.max_tokens = 0
    assert "no answer" in talk(talking, "hi") and talking.turns == []


def test_an_answer_shows_no_leading_space(model: RWKV) -> None:
    talking = session(model)
    talking.params = Sampling(temperature=0.0, stop_ids=(), bans=tuple(id for id in range(1, 257) if id != 33))
    screen = talk(talking, "hi")
    assert " \n" not in screen and "no answer" in screen  # spaces only are no answer


@pytest.mark.parametrize("ending", [b"/quit\nnever read\n", b""])
def test_the_verb_with_a_piped_input(
    ending: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, state = tmp_path / "tiny.pth", tmp_path / "s.state"
    tiny_model().save(file)
    typed = io.TextIOWrapper(io.BytesIO(b"hi \xff\n/save " + str(state).encode() + b"\n" + ending), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    bans = [flag for id in (0, *LETTERS) for flag in ("--ban", str(id))]
    assert main(["chat", str(file), "--seed", "1", "--max-tokens", "5", "--system", "S", *bans]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"to {state})" in out and "never" not in out
    read_so_far = len("System: S\n\nUser: hi \ufffd\n\nAssistant:".encode()) + 5
    assert State.load(state).tokens == (read_so_far,)
    assert main(["chat", str(file), "--state", str(state), "--paragraphs"]) == 0
