"""Conversations from files: every shape of a line becomes turns, and every turn knows which of its bytes are learned.

Three shapes of a jsonl line, told apart by their keys:

    {"messages": [{"role": "user", "content": ...}, ...]}     OpenAI's; "loss" or "weight", 0 or 1, overrides a role
    {"prompt": ..., "completion": ...}                        one exchange
    {"text": "User: ...\\n\\nAssistant: ..."}                   RWKV's; any other file is one such text

Owns: these shapes, what is refused, and where the text of a conversation is cut before it is tokenised. The text is
`roost.chat.render`'s, byte for byte. It is cut between turns, behind each `Role:`, and in front of the blank line that
ends an answer; no token crosses a cut. That is where `roost chat` cuts (it reads up to `Assistant:`, writes the answer,
then reads the blank line), and no token of the World vocabulary crosses the others anyway.
Refuses to know: tokens, batches.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from roost.chat import SEPARATOR, clean, render
from roost.data.sources import BadLines

Template = Literal["chat", "plain"]
"""Of prompt and completion: a user's and an assistant's message, or both as they are, without `Role:`."""

ROLES = ("system", "user", "assistant", "tool")

Item = TypeVar("Item")

_NAMES = {"System": "system", "User": "user", "Assistant": "assistant", "Observation": "tool"}
_TURN = re.compile(rf"(?:\A|\n\n)({'|'.join(_NAMES)}):")
_SHOWN = 10


class Segment(NamedTuple):
    """Text that is tokenised by itself, all of it learned (a token of it is a target) or none."""

    text: str
    loss: bool


class Turn(NamedTuple):
    """One message: its segments joined are `Role: content` and a blank line."""

    role: str
    segments: tuple[Segment, ...]


@dataclass
class Faults:
    """Lines that could not be used: what to do with them, how many there were, and the first ten messages."""

    policy: BadLines = "fail"
    count: int = 0
    first: list[str] = field(default_factory=list[str])

    def refuse(self, where: str, error: Exception) -> None:
        """Count a line. Raises ValueError with its place when the policy is "fail"."""
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        if self.policy == "fail":
            raise ValueError(f"{where}: {reason} (bad_lines='skip' counts such lines and goes on)") from error
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {reason}")


def read_records(
    paths: Sequence[str | os.PathLike[str]], parse: Callable[[object], Item], faults: Faults
) -> Iterator[Item]:
    """`parse` of every record: the lines of .jsonl and .jsonl.gz files, and {"text": ...} for any other file.

    What `parse` refuses with ValueError, and lines that are not JSON, go to `faults`; blank lines are passed over.
    Raises ValueError for a missing, empty or damaged file.
    """
    for path in paths:
        for where, load in _records(Path(path)):
            try:
                item = parse(load())
            except (ValueError, RecursionError) as error:
                faults.refuse(where, error)
                continue
            yield item


def _records(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        data = path.read_bytes()
        if not data.strip():
            raise ValueError(f"{path} is empty")
        yield str(path), lambda: {"text": data.decode()}
        return
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", lambda line=line: _json(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged behind line {number}: {error}") from error
    if not number:
        raise ValueError(f"{path} is empty")


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def parse_conversation(
    record: object, loss_on: Sequence[str] = ("assistant",), template: Template = "chat"
) -> list[Turn]:
    """The turns of one record of any of the three shapes.

    loss_on   roles whose text is learned, with the blank line that ends it, and never its `Role:`
    template  of the shape prompt and completion

    Raises ValueError for another shape, an unknown role, text that is none, an empty message (an empty system message
    is left out), a conversation that begins with the assistant, and one without anything to learn.
    """
    given = object_of(record)
    if "messages" in given:
        turns = message_turns(given["messages"], loss_on)
    elif "prompt" in given and "completion" in given:
        prompt, completion = text_of(given, "prompt"), text_of(given, "completion")
        if template == "plain":
            turns = [
                Turn("user", (Segment(prompt, "user" in loss_on),)),
                Turn("assistant", (Segment(completion, "assistant" in loss_on),)),
            ]
        else:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            turns = message_turns(messages, loss_on)
    elif "text" in given:
        turns = message_turns(split_text(text_of(given, "text")), loss_on)
    else:
        raise ValueError(f'expected "messages", "prompt" and "completion", or "text", not the keys {sorted(given)}')
    if not any(segment.loss for turn in turns for segment in turn.segments):
        raise ValueError(f"nothing to learn: no message by {' or '.join(loss_on)}")
    return turns


def object_of(record: object) -> dict[str, Any]:
    """The record, when it is a JSON object. Raises ValueError otherwise."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, not {_short(record)}")
    return cast("dict[str, Any]", record)


def text_of(record: dict[str, Any], key: str) -> str:
    """A string that has UTF-8 and is not empty. Raises ValueError naming the key."""
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_short(value)}; it must be text")
    _encodable(key, value)
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value


def message_turns(messages: object, loss_on: Sequence[str]) -> list[Turn]:
    """The turns of messages in OpenAI's shape. Raises ValueError as `parse_conversation`."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {_short(messages)}; it must be a list of at least one message")
    plain: list[dict[str, str]] = []
    learned: list[bool | None] = []
    for number, message in enumerate(cast("list[Any]", messages)):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is {_short(message)}; it must be an object with role and content")
        rest = dict(cast("dict[str, Any]", message))
        choices = [value for key in ("loss", "weight") if (value := rest.pop(key, None)) is not None]
        if len(choices) > 1 or not all(type(value) in (bool, int) and value in (0, 1) for value in choices):
            raise ValueError(f"message {number}: one of loss and weight may be given, and must be 0 or 1")
        for key in ("role", "content"):
            if key in rest and not isinstance(rest[key], str):
                raise ValueError(f"message {number}: {key} is {_short(rest[key])}; it must be text")
        _encodable(f"message {number}", rest.get("content", ""))
        plain.append(rest)
        learned.append(bool(choices[0]) if choices else None)
    render(plain)  # refuses unknown roles and keys, and empty messages of most roles, by number
    turns: list[Turn] = []
    for number, (message, wanted) in enumerate(zip(plain, learned, strict=True)):
        role = message["role"]
        if role == "assistant":
            if not clean(message["content"]):
                raise ValueError(f"message {number}, by 'assistant', is empty; leave it out")
            if all(turn.role == "system" for turn in turns):
                raise ValueError("the conversation begins with the assistant; a message must come first")
        if text := render([message], add_reply=False):
            turns.append(_turn(role, text, role in loss_on if wanted is None else wanted))
    return turns


def _turn(role: str, text: str, loss: bool) -> Turn:
    border = text.index(":") + 1
    header, body = Segment(text[:border], False), text[border:].removesuffix(SEPARATOR)
    if role == "assistant":
        return Turn(role, (header, Segment(body, loss), Segment(SEPARATOR, loss)))
    return Turn(role, (header, Segment(body + SEPARATOR, loss)))


def split_text(text: str) -> list[dict[str, str]]:
    """The messages of RWKV's chat text, in which `User:`, `Assistant:` and so on begin one behind a blank line.

    Raises ValueError when the text begins with none of them.
    """
    whole = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    parts = _TURN.split(whole)
    if parts[0]:
        raise ValueError(
            f"the text begins with {parts[0][:20]!r}; it must begin with one of {', '.join(_NAMES)} and ':'"
        )
    return [{"role": _NAMES[name], "content": content} for name, content in zip(parts[1::2], parts[2::2], strict=True)]


def _encodable(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds a lone surrogate at index {error.start}, which has no UTF-8") from error


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"a {type(value).__name__}"
