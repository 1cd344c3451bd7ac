"""The verbs: arguments in, library calls, text out. Each returns an exit code.

Owns: what is printed. Results go to stdout, everything about the run to stderr.
Refuses to know: how arguments are parsed (cli) and how anything is computed (the library).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from importlib.resources import files
from typing import Any

from roost.cli import terminal
from roost.cli.models import check_threads, load_model, one_thread
from roost.inference.sampling import Logprob, Sampling
from roost.inference.stream import Completion, stream
from roost.inference.stream import read as read_tokens
from roost.native import MOST_THREADS
from roost.state import State
from roost.tokenizer import WorldTokenizer

SAMPLING_FLAGS = ("temperature", "top_p", "min_p", "presence", "frequency", "penalty_decay", "top_k", "seed")


def sampling(args: argparse.Namespace, **more: Any) -> Sampling:
    """--preset and what overrules it. Raises ValueError as `Sampling`."""
    fields = {name: value for name in SAMPLING_FLAGS if (value := getattr(args, name)) is not None}
    fields["bans"] = tuple(args.ban or ())
    fields["stop"] = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in args.stop or ())
    return (Sampling.openai if args.preset == "openai" else Sampling.chatrwkv)(**{**fields, **more})


def suited(params: Sampling, args: argparse.Namespace, tokenizer: WorldTokenizer) -> Sampling:
    """Without --preset, a model of bytes gets no penalties but those given: they would forbid its commonest letters."""
    if args.preset or tokenizer.vocab_size > 257:
        return params
    return replace(params, presence=args.presence or 0.0, frequency=args.frequency or 0.0)


def generate(args: argparse.Namespace) -> int:
    """Write on from a prompt; Ctrl-C or a closed pipe ends the text, and the state of what was written is kept."""
    terminal.check_writable(args.save, args.model)
    params = sampling(args, logprobs=args.logprobs or 0)
    prompt = b"" if args.prompt is None else os.fsencode(args.prompt)
    if args.prompt == "-":
        prompt = terminal.read_bytes("-")
    model, tokenizer = load_model(args)
    params = suited(params, args, tokenizer)
    state = State.load(args.state, args.device) if args.state is not None else None
    if prompt.endswith(b": ") and tokenizer.vocab_size > 257:
        print("roost: note: the prompt ends in a space, and tokens begin with it: leave it out", file=sys.stderr)
    with terminal.reading("prompt", model.config.state_bytes, quiet=len(prompt) < 2000) as progress:
        running = stream(model, tokenizer, prompt, params, max_tokens=args.max_tokens, state=state, progress=progress)
    status = 0
    try:
        with one_thread(model):
            for piece in running:
                if not args.json:
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    found = running.close()
    if args.save:
        found.state.save(args.save)
    if status == 141:
        raise BrokenPipeError
    print(json.dumps(_as_json(found), ensure_ascii=False) if args.json else "")
    return status


def read(args: argparse.Namespace) -> int:
    """Read a file into a state, and say how fast; with --score also bits per byte."""
    if not args.save and not args.score:
        raise ValueError("what for? give --save FILE to keep the state, or --score to see bits per byte")
    terminal.check_writable(args.save, args.file, args.model)
    data = terminal.read_bytes(args.file)
    model, tokenizer = load_model(args)
    state = State.load(args.state, args.device) if args.state is not None else None
    started, line = time.perf_counter(), ""
    with terminal.reading("reading", model.config.state_bytes) as progress:
        if args.score:
            from roost.evaluation.loss import bits_per_byte

            score = bits_per_byte(model, tokenizer, data, state, chunk=args.chunk, progress=progress)
            tokens, state, line = score.tokens, score.state, f"; {score.bits_per_byte:.4f} bits per byte"
        else:
            ids = tokenizer.encode(data)
            tokens = len(ids)
            _, state = read_tokens(model, ids, state, chunk=args.chunk, progress=progress)
    seconds = time.perf_counter() - started
    if args.save:
        state.save(args.save)
        line += f"; state ({terminal.size(state.nbytes)}) saved to {args.save}"
    print(f"{tokens:,} tokens ({len(data):,} bytes) in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s{line}")
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk with a model."""
    from roost.chat import STOP
    from roost.cli.chat import Session, converse

    stop = STOP["paragraphs" if args.paragraphs else "strict"]
    params = sampling(args)
    params = replace(params, min_tokens=1, stop=(*stop, *params.stop))
    model, tokenizer = load_model(args)
    if tokenizer.vocab_size == 257 and sys.stdin.isatty():
        print("roost: note: a model of bytes such as nestling was never taught to converse", file=sys.stderr)
    params = suited(params, args, tokenizer)
    state = State.load(args.state, args.device) if args.state is not None else None
    options: dict[str, Any] = {"max_tokens": args.max_tokens, "system": args.system, "state": state}
    with one_thread(model):
        converse(Session(model, tokenizer, params, inputs=(args.model,), **options))
    return 0


def info(args: argparse.Namespace) -> int:
    """What a checkpoint is; without one, what this installation is and which backends are active."""
    from roost.checkpoint import info as look

    lines = _installation() if args.model is None else look(args.model).lines()
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        print(f"{what:<{width}}  {value}")
    return 0


def _installation() -> list[tuple[str, str]]:
    import platform

    import torch

    from roost import __version__, native
    from roost.backends import backends

    lines = [("roost", f"{__version__}, torch {torch.__version__}, Python {platform.python_version()}")]
    sets = f"{native.isa()} (of {', '.join(native.supported_isas())})" if native.available() else "none"
    lines.append(("native library", sets))
    before = ""
    for one in backends():
        status = "active" if one.active else "not active"
        lines.append(("" if one.part == before else one.part, f"{one.name:<9}  {status:<10}  {one.note}".rstrip()))
        before = one.part
    reasons = {one.why_not for one in backends() if not one.active}
    return [*lines, *(("why not", reason) for reason in sorted(reasons))]


def convert(args: argparse.Namespace) -> int:
    """Write a checkpoint in another form."""
    from roost.checkpoint import DTYPES
    from roost.checkpoint import convert as write

    check_threads(args.threads)
    threads = args.threads or min(os.cpu_count() or 1, MOST_THREADS)
    packing: dict[str, Any] = {"weights_format": args.weights, "threads": threads}
    dtype = DTYPES.get(args.dtype, args.dtype)
    print(f"wrote {write(args.source, args.target, to=args.to, dtype=dtype, **packing)}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare with the oracle on real text; exit code 1 names the first tensor that differs."""
    from roost.checkpoint import DTYPES
    from roost.checkpoint import info as look
    from roost.evaluation.verify import verify as compare

    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; it must be at least 1")
    verdict = compare(args.model, _real_text(look(args.model).config.vocab_size, args.tokens), DTYPES[args.dtype])
    width = max(len(one.name) for one in verdict.tensors)
    for one in verdict.tensors:
        print(f"{one.name:<{width}}  {one.error:9.2e}  {'agrees' if one.agrees else 'DIFFERS'}")
    if verdict.first is not None:
        print(f"the first tensor that differs is {verdict.first.name}")
    elif not verdict.argmax_agrees:
        print("the logits agree within the tolerance, but the most probable token does not")
    else:
        print(f"all {len(verdict.tensors)} tensors agree with the oracle over {args.tokens} tokens")
    return int(verdict.first is not None or not verdict.argmax_agrees)


def demo(args: argparse.Namespace) -> int:
    """The demonstration of `make demo`."""
    from roost.cli.demo import run

    return run(args.model, args.file)


def _real_text(vocab: int, count: int) -> list[int]:
    """Ids of the document that ships, in the model's own vocabulary where roost knows it."""
    data = (files("roost") / "assets" / "example.txt").read_bytes()
    if vocab == 257 or vocab >= 65536:
        ids = (WorldTokenizer.byte_level() if vocab == 257 else WorldTokenizer()).encode(data)
    else:
        ids = [byte * 256 % (vocab - 1) + 1 for byte in data]
    if count > len(ids):
        raise ValueError(f"--tokens is {count}, but the document that ships has only {len(ids)} tokens")
    return ids[:count]


def _as_json(found: Completion) -> dict[str, Any]:
    def entry(one: Logprob) -> dict[str, Any]:
        return {"id": one.id, "bytes": list(one.bytes), "logprob": one.logprob}

    return {
        "text": found.text,
        "tokens": found.tokens,
        "finish_reason": found.finish_reason,
        "usage": {
            "prompt_tokens": found.usage.prompt_tokens,
            "completion_tokens": found.usage.completion_tokens,
        },
        "seed": found.seed,
        "logprobs": [{**entry(one.token), "top": [entry(other) for other in one.top]} for one in found.logprobs],
    }
