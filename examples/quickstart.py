"""Load a model, read, write, keep the state: python examples/quickstart.py [MODEL]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import roost


def main(name: str = "nestling") -> None:
    """The calls a first program needs."""
    model, tokenizer = roost.load(name)  # generation and sizes come from the tensors
    assert tokenizer is not None, "this model's vocabulary is not the World's"

    ids = torch.tensor([tokenizer.encode("In the beginning God created")])
    with torch.no_grad():
        logits, state = model(ids)  # (B, T, V) and the state: parallel over time
        logits, state = model(ids[:, -1:], state)  # the same call with T = 1 is the RNN
    print(f"logits {tuple(logits.shape)}; the state of {state.tokens[0]} tokens has {state.nbytes:,} bytes")

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "beginning.state"
        state.save(file)
        state = roost.State.load(file)

    params = roost.Sampling(temperature=1.0, top_p=0.5, seed=7)  # or roost.Sampling.chatrwkv() / .openai()
    for piece in roost.stream(model, tokenizer, " the", params, max_tokens=100, state=state):
        print(piece, end="", flush=True)
    print()

    score = roost.bits_per_byte(model, tokenizer, "All human beings are born free and equal.")
    print(f"{score.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main(*sys.argv[1:])
