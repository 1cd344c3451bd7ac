"""Chat and task formats of the World models: messages in, prompt text out, byte for byte.

Owns: the templates, and the cleaning that keeps a message from ending its own turn: a blank line separates turns, so no
message may contain one, and no prompt ends in a space, because an answer begins with a token that holds the space.
Refuses to know: tokens, models, sampling.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

SEPARATOR = "\n\n"
"""What ends every turn. After an answer it is not yet part of the state: the next turn begins with it."""

STOP: dict[str, tuple[str, ...]] = {
    "strict": (SEPARATOR,),
    "paragraphs": tuple(f"{SEPARATOR}{role}:" for role in ("User", "Assistant", "System", "Observation")),
    "runner": tuple(
        SEPARATOR + word
        for word in "User Question Q Human Bob Assistant Answer A Bot Alice Observation".split()  # noqa: SIM905
    ),
}
"""Stop strings by name: "strict" ends an answer at the first blank line, "paragraphs" allows blank lines until the next
role, "runner" is RWKV-Runner's list (without colons: it also stops before "A second point")."""

_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Observation"}


def clean(text: str) -> str:
    """Line ends become LF, every run of newlines becomes one, white space around the text goes (U+3000 too)."""
    return re.sub(r"\n{2,}", "\n", _newlines(text)).strip()


def render(messages: Sequence[Mapping[str, str]], *, add_reply: bool = True, prefix: bool = False) -> str:
    """`User: ...\\n\\nAssistant: ...\\n\\n` and so on, from {"role": ..., "content": ...}.

    Roles are system, user, assistant and tool (written `Observation:`). Assistant and system messages without text are
    left out. `add_reply` ends with `Assistant:`, where the model goes on. `prefix`: the last message is the beginning
    of the answer, and the model goes on right behind it.

    Raises ValueError for an unknown role or key, an empty user or tool message, no messages, a prefix that is not the
    assistant's.
    """
    if not messages:
        raise ValueError("there are no messages to render; give at least one")
    turns = [_message(number, message) for number, message in enumerate(messages)]
    last = ""
    if prefix:
        role, text = turns.pop()
        if role != "assistant":
            raise ValueError(f"prefix=True needs a last message by the assistant, not by {role!r}")
        last = f"Assistant: {text}" if text else "Assistant:"
    elif add_reply:
        last = "Assistant:"
    return "".join(f"{_ROLES[role]}: {text}{SEPARATOR}" for role, text in turns if text) + last


def instruct(task: str, text: str = "") -> str:
    """`Instruction: ...\\n\\nInput: ...\\n\\nResponse:`; the task comes first, because the model reads once.

    Raises ValueError without a task.
    """
    parts = [f"Instruction: {_some('task', clean(task))}"]
    if data := clean(text):
        parts.append(f"Input: {data}")
    return SEPARATOR.join([*parts, "Response:"])


def ask(question: str, material: str = "") -> str:
    """`Q: ...\\n\\nA:`, or with material to answer from `...\\n\\nQuestion: ...? Answer:` (it may hold blank lines).

    Raises ValueError without a question.
    """
    question = _some("question", clean(question))
    if text := _newlines(material).strip():
        return f"{text}{SEPARATOR}Question: {question.removesuffix('?')}? Answer:"
    return f"Q: {question}{SEPARATOR}A:"


def _message(number: int, message: Mapping[str, str]) -> tuple[str, str]:
    if set(message) != {"role", "content"}:
        raise ValueError(f"message {number} has the keys {sorted(message)}; it must have exactly role and content")
    role, text = message["role"], clean(message["content"])
    if role not in _ROLES:
        near = difflib.get_close_matches(role, _ROLES, 1, 0)[0]
        raise ValueError(f"message {number} has the role {role!r}; did you mean {near!r}? ({', '.join(_ROLES)})")
    if not text and role in ("user", "tool"):
        raise ValueError(f"message {number}, by {role!r}, is empty; leave it out")
    return role, text


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _some(name: str, text: str) -> str:
    if not text:
        raise ValueError(f"the {name} is empty")
    return text
