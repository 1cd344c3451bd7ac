"""The command line: one thin verb per capability.

    roost generate MODEL "Once upon a time"        roost chat MODEL        roost info FILE

Owns: the arguments, the exit codes (0 good, 1 `verify` found a difference, 2 an error, 130 Ctrl-C) and that an error is
one line on stderr; only `--debug` shows a traceback.
Refuses to know: how anything is done (verbs.py calls the library).
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NamedTuple, NoReturn, get_args

from roost.cli import measure, prepare, training, tuning, verbs
from roost.formats.slots import WeightsFormat

WEIGHTS: tuple[WeightsFormat, ...] = get_args(WeightsFormat)
Arguments = Callable[[argparse.ArgumentParser], None]


class Verb(NamedTuple):
    """One word of the command line: what it is for, its arguments, and what it calls."""

    help: str
    arguments: Arguments
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (try: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's) and return its exit code. Never raises without `--debug`."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "r+" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(file, TextIOWrapper) and file.errors != "replace":
            file.reconfigure(errors="replace")  # text is data here; a terminal that lacks a character is no error
    try:
        with _sigterm_unwinds(), warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            status = _run([word for word in given if word != "--debug"])
            sys.stdout.flush()
            return status
    except SystemExit as asked:  # --help, --version, SIGTERM
        return int(asked.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone; what is still buffered must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, OSError)):
            line = f"{type(error).__name__}: {line} (--debug shows where)"
        print(f"roost: error: {line}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    if given and given[0] == "help":
        given = [*given[1:2], "--help"]
    if not given or given[0].startswith("-"):
        top = _top()
        _, unknown = top.parse_known_args(given)
        _refuse(top, unknown)
        top.print_help()
        return 0
    verb, args = parse(given)
    return verb.run(args)


def parse(given: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb that a command line names, and its arguments. Raises ValueError for what it does not know."""
    name = given[0]
    if name not in VERBS:
        raise ValueError(f"no command {name!r}; did you mean {_nearest(name, VERBS)!r}? (try: roost --help)")
    verb = VERBS[name]
    parser = _Parser(prog=f"roost {name}", description=verb.help, allow_abbrev=False)
    verb.arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_intermixed_args(given[1:])
    _refuse(parser, unknown)
    return verb, args


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    for word in unknown:
        if not word.startswith("-"):
            parser.error(f"unexpected argument {word!r}")
        flags = [flag for action in parser._actions for flag in action.option_strings]  # pyright: ignore[reportPrivateUsage]  (there is no public list)
        parser.error(f"no option {word}; did you mean {_nearest(word.partition('=')[0], flags)}?")


def _top() -> argparse.ArgumentParser:
    from roost import __version__

    width = max(len(name) for name in VERBS)
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    parser = _Parser(
        prog="roost",
        usage="roost COMMAND ... [--debug]",
        description="Run, train and study Eagle and Finch.",
        epilog=f"commands:\n{verbs}\n\nroost COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"roost {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@contextmanager
def _sigterm_unwinds() -> Generator[None, None, None]:
    """SIGTERM ends the command as Ctrl-C does, through every `finally`, so that nothing half-written stays."""

    def leave(_signal: int, _frame: object) -> NoReturn:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), 1, 0)[0]


def _show_warning(message: Warning | str, *_where: object) -> None:
    print(f"roost: warning: {' '.join(str(message).split())}", file=sys.stderr)


_SOURCES = "a checkpoint, a directory, a hub name"
_THREADS = "default: as many as torch uses, but one below 50 million parameters"


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_SOURCES}, a packed .roost file, or nestling")
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp64"), help="of torch; default: the file's")
    what = "native: the faster model for CPUs; default: native for nestling, .roost files, --weights and --threads"
    parser.add_argument("--backend", choices=("torch", "native"), help=what)
    what = "form of the weights of the native model: fp32 is exact, int4 the smallest; default: bf16 (nestling: fp32);"
    what += " made once and kept, for NAME.pth in NAME.int8.roost"
    parser.add_argument("--weights", choices=WEIGHTS, help=what)
    parser.add_argument("--threads", type=int, metavar="N", help=f"of the native model; {_THREADS}")


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (what is not given comes from the preset)")
    what = "default: chatrwkv; for models of bytes without its penalties"
    group.add_argument("--preset", choices=("chatrwkv", "openai"), help=what)
    for flag, what in (
        ("--temperature", "0 = always the most probable token"),
        ("--top-p", "size of the nucleus, 0 to 1"),
        ("--min-p", "drop what is less probable than this times the best"),
        ("--presence", "subtracted from the logit of tokens already written"),
        ("--frequency", "subtracted once more for every time they were"),
        ("--penalty-decay", "how fast that is forgotten: factor per token"),
    ):
        group.add_argument(flag, type=float, metavar="X", help=what)
    group.add_argument("--top-k", type=int, metavar="N", help="keep only the N most probable")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")
    group.add_argument("--ban", type=int, action="append", metavar="ID", help="a token id never to draw; may repeat")
    group.add_argument("--stop", action="append", metavar="TEXT", help=r"end before this text (\n is a newline)")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default: 256")


def _generate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to write on from; - = standard input")
    parser.add_argument("--state", metavar="FILE", help="what was read before the prompt")
    parser.add_argument("--save", metavar="FILE", help="save the state after the text")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: the N best alternatives of every token")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    _sampling(parser)


def _read(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("file", metavar="FILE", help="the text, in any encoding of bytes; - = standard input")
    parser.add_argument("--save", metavar="FILE", help="save the state after the text")
    parser.add_argument("--state", metavar="FILE", help="what was read before")
    parser.add_argument("--score", action="store_true", help="print bits per byte; id 0 is read before the text")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens at a time (default: 512)")


def _chat(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--state", metavar="FILE", help="what was read before the conversation")
    parser.add_argument("--system", metavar="TEXT", default="", help="a message that comes first")
    parser.add_argument("--paragraphs", action="store_true", help="answers may hold blank lines")
    _sampling(parser)


def _info(parser: argparse.ArgumentParser) -> None:
    what = f"{_SOURCES}, a packed .roost file, or nestling; without one: this installation and its backends"
    parser.add_argument("model", metavar="FILE", nargs="?", help=what)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"{_SOURCES}, or nestling")
    parser.add_argument("target", metavar="TARGET", help="NAME.pth, .safetensors, .gguf, .int8.roost, or a directory")
    parser.add_argument("--to", choices=("finch",), help="RWKV-5.1 and 5.2 become RWKV-6, with the same logits")
    kinds = ("fp32", "bf16", "fp16", "q8_0", "q4_0")
    parser.add_argument("--dtype", choices=kinds, help="default: each tensor's own; q8_0 and q4_0 for .gguf only")
    what = "form of the weights in a .roost file; default: what its name says, as in NAME.int8.roost"
    parser.add_argument("--weights", choices=WEIGHTS, help=what)
    what = "to pack a .roost file with; default: all cores"
    parser.add_argument("--threads", type=int, metavar="N", help=what)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FILE", help="a checkpoint")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="how much real text (default: 16)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp64"), default="fp32", help="default: fp32")


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"{_SOURCES}, or nestling: the model the adapter was trained on")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter.safetensors of a run, or a tuned state as .pth")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="NAME.pth or NAME.safetensors")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp64"), help="default: the base's")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nestling", help="default: nestling")
    parser.add_argument("--file", metavar="FILE", help="default: the document that ships")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_SOURCES}, a packed .roost file, or nestling")
    _measured(parser)
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="to write one by one (default: 32)")


def _evaluate_quant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{_SOURCES}, or nestling; not a packed .roost file")
    what = "a file to read, - = standard input; default: a text that ships, in 16 languages"
    parser.add_argument("text", metavar="TEXT", nargs="?", help=what)
    _measured(parser)
    what = "read no more than the first N tokens of TEXT (default: 4096)"
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help=what)


def _measured(parser: argparse.ArgumentParser) -> None:
    what = f"forms of the weights to compare, with commas between them; default: {','.join(WEIGHTS)}"
    parser.add_argument("--weights", metavar="LIST", help=what)
    parser.add_argument("--threads", type=int, metavar="N", help=_THREADS)
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")


VERBS = {
    "chat": Verb("talk with a model", _chat, verbs.chat),
    "generate": Verb("write on from a prompt", _generate, verbs.generate),
    "read": Verb("read a file of any length into a state of constant size", _read, verbs.read),
    "info": Verb("what a checkpoint is, without loading it; alone: which backends are active", _info, verbs.info),
    "convert": Verb("write a checkpoint in another form", _convert, verbs.convert),
    "verify": Verb("compare a checkpoint's logits, layer by layer, with the NumPy oracle", _verify, verbs.verify),
    "prepare": Verb("turn text into the tokens that training reads", prepare.arguments, prepare.prepare),
    "train": Verb("train as a recipe says", training.arguments, training.train),
    "plot": Verb("draw the curves of one or more training runs", training.plot_arguments, training.plot),
    "merge": Verb("write a model with its adapter built in", _merge, tuning.merge),
    "bench": Verb(
        "how fast the native model (the one for CPUs) reads and writes on this machine", _bench, measure.bench
    ),
    "evaluate-quant": Verb(
        "what rounding the weights costs: KL divergence and bits per byte", _evaluate_quant, measure.evaluate_quant
    ),
    "demo": Verb("read a document, save the state, write on in a second process", _demo, verbs.demo),
}
"""Every command."""
