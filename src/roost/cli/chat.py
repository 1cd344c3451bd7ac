"""`roost chat`: a conversation on a terminal.

Owns: the turns. A turn keeps the state before it and the state in front of its answer, so that undoing it, answering
again and keeping several answers side by side are all forks of a state, and nothing is ever read twice.
Refuses to know: sampling, templates.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module

from rich.console import Console
from torch import Tensor

from roost.chat import SEPARATOR, clean, render
from roost.cli.terminal import check_writable, size
from roost.inference.sampling import Sampling
from roost.inference.stream import Completion, Stream, read, stream
from roost.models.native import LanguageModel
from roost.state import State
from roost.tokenizer import WorldTokenizer

HELP = """\
/retry         answer again, in place of the last answer
++             answer again and keep both; ++ 1 goes back to the first answer, ++ 2 to the second ...
/undo          take back your last message and its answer
/reset         forget the conversation
/system TEXT   put TEXT before the conversation, which begins anew; without TEXT remove it
/save FILE     save the state: all that was said, in a file of constant size
/load FILE     go on from a saved state
/help  /quit   Ctrl-C stops an answer, Ctrl-D leaves"""

COMMANDS = ("/retry", "++", "/undo", "/reset", "/system", "/save", "/load", "/help", "/quit")


@dataclass(eq=False)
class Turn:
    """One message and its answers."""

    logits: Tensor
    ready: State  # has read everything up to "Assistant:"
    replies: list[Completion] = field(default_factory=list[Completion])
    chosen: int = 0

    @property
    def reply(self) -> Completion:
        """The answer the conversation goes on from."""
        return self.replies[self.chosen]


class Session:
    """A conversation without a terminal. `state` is what was read before it began, as one piece of text.

    `inputs` are files that `/save` must not write over.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: WorldTokenizer,
        params: Sampling,
        *,
        max_tokens: int = 256,
        system: str = "",
        state: State | None = None,
        inputs: tuple[str | None, ...] = (),
    ) -> None:
        self.inputs = inputs
        self.model, self.tokenizer, self.params, self.max_tokens = model, tokenizer, params, max_tokens
        self.system = system
        self.turns: list[Turn] = []
        self.start = state
        self._replies = 0

    @property
    def state(self) -> State | None:
        """Has read everything up to the end of the last answer (not the blank line behind it)."""
        return self.turns[-1].reply.state if self.turns else self.start

    def hear(self, text: str) -> Turn:
        """Read a message; the turn becomes part of the conversation with its first answer. Errors as `render`."""
        messages = [{"role": "user", "content": text}]
        if self.system and not self.turns:
            messages.insert(0, {"role": "system", "content": self.system})
        piece = render(messages) if self.state is None else SEPARATOR + render(messages)
        logits, ready = read(self.model, self.tokenizer.encode(piece), self.state)
        return Turn(logits, ready)

    def answer(self, turn: Turn) -> Stream:
        """Another answer to `turn`: a fork of the same state with another seed."""
        seed = self.params.seed
        params = self.params if seed is None else replace(self.params, seed=(seed + self._replies) % 2**64)
        self._replies += 1
        return stream(
            self.model,
            self.tokenizer,
            "",
            params,
            max_tokens=self.max_tokens,
            state=turn.ready,
            logits=turn.logits,
        )

    def keep(self, turn: Turn, found: Completion, *, instead: bool = False) -> None:
        """Make `found` the answer to `turn`, beside the others or in place of the chosen one."""
        if instead and turn.replies:
            turn.replies[turn.chosen] = found
        else:
            turn.replies.append(found)
            turn.chosen = len(turn.replies) - 1
        if not self.turns or self.turns[-1] is not turn:
            self.turns.append(turn)

    @property
    def last(self) -> Turn:
        """Raises ValueError before the first answer."""
        if not self.turns:
            raise ValueError("nothing was said yet")
        return self.turns[-1]

    def choose(self, number: int) -> Completion:
        """Go on from answer `number` (from 1) to the last message. Raises ValueError when there is none."""
        if not 1 <= number <= len(self.last.replies):
            raise ValueError(f"there is no answer {number}; there are {len(self.last.replies)}")
        self.last.chosen = number - 1
        return self.last.reply

    def restart(self, state: State | None) -> None:
        """Forget the conversation and begin after `state`. Raises ValueError when it is another model's."""
        if state is not None:
            read(self.model, [self.tokenizer.eod], state)  # only to see whether it fits
        self.turns, self.start = [], state


def converse(session: Session, console: Console | None = None, line: Callable[[], str] | None = None) -> None:
    """Talk until the input ends. `line` gives the next line and raises EOFError at the end; None = standard input."""
    console = console or Console(highlight=False)
    if line is None:
        line = _standard_input(console)
    console.out(f"everything said is kept in {size(session.model.config.state_bytes)}; /help lists the commands")
    while True:
        try:
            text = line().strip()
            if text == "/quit":
                return
            if text:
                _obey(session, console, text)
        except EOFError:
            console.out("")
            return
        except KeyboardInterrupt:
            console.out("\n(Ctrl-D or /quit leaves)")
        except (ValueError, OSError) as error:
            console.out(f"({' '.join(str(error).split())})")


def _obey(session: Session, console: Console, text: str) -> None:
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if not word.startswith("/") and word != "++":
        _speak(session, console, session.hear(text))
    elif word == "/retry":
        _speak(session, console, session.last, instead=True)
    elif word == "++" and rest:
        if not rest.isdecimal():
            raise ValueError(f"++ wants the number of an answer, not {rest!r}")
        console.out(clean(session.choose(int(rest)).text))
    elif word == "++":
        _speak(session, console, session.last)
        console.out(f"(answer {session.last.chosen + 1} of {len(session.last.replies)})")
    elif word == "/undo":
        session.last  # noqa: B018  (raises when there is nothing to undo)
        session.turns.pop()
        console.out("(your last message is taken back)")
    elif word == "/reset":
        session.restart(session.start)
        console.out("(forgotten)")
    elif word == "/system":
        session.restart(session.start)
        session.system = rest
        console.out("(a new conversation)")
    elif word in ("/save", "/load"):
        _file(session, console, word, rest)
    elif word == "/help":
        console.out(HELP)
    else:
        near = difflib.get_close_matches(word, COMMANDS, 1, 0)[0]
        raise ValueError(f"no command {word}; did you mean {near}? /help lists them")


def _file(session: Session, console: Console, word: str, path: str) -> None:
    if not path:
        raise ValueError(f"{word} wants a file name")
    if word == "/load":
        session.restart(State.load(path, session.model.device))
        console.out(f"(going on from {path})")
    elif session.state is None:
        raise ValueError("nothing was said yet")
    else:
        check_writable(path, *session.inputs)
        session.state.save(path)
        console.out(f"(saved {size(session.state.nbytes)} to {path})")


def _speak(session: Session, console: Console, turn: Turn, *, instead: bool = False) -> None:
    """Write an answer to the terminal as it comes; Ctrl-C keeps what was written so far."""
    running = session.answer(turn)
    begun = False
    with _stoppable(console):
        for piece in running:
            shown = piece if begun else piece.lstrip()  # an answer begins with a space
            begun = begun or bool(shown)
            console.out(shown, end="")
            console.file.flush()
    found = running.close()
    console.out("")
    if clean(found.text):
        session.keep(turn, found, instead=instead)
    else:
        console.out("(no answer; the conversation is as it was before)")


@contextmanager
def _stoppable(console: Console) -> Generator[None, None, None]:
    try:
        yield
    except KeyboardInterrupt:
        console.out(" (stopped)", end="")


def _standard_input(console: Console) -> Callable[[], str]:
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):  # line editing where the platform has it
        import_module("readline")
    return lambda: console.input("> ")
