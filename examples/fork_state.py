"""Read once, write many times: a state is a value, so a fork costs nothing. python examples/fork_state.py [MODEL]"""

from __future__ import annotations

import sys

import roost

OPENING = "Enter HAMLET.\n\nHAMLET.\n"


def main(name: str = "nestling") -> None:
    """Three continuations of one reading, and two different questions to it."""
    model, tokenizer = roost.load(name)
    assert tokenizer is not None, "this model's vocabulary is not the World's"
    logits, state = roost.read(model, tokenizer.encode(OPENING))

    for seed in range(3):  # the logits came with the state, so nothing has to be read again
        params = roost.Sampling(top_p=0.8, seed=seed)
        found = roost.generate(model, tokenizer, "", params, state=state, logits=logits, max_tokens=60)
        print(f"--- seed {seed}, {found.finish_reason} after {found.usage.completion_tokens} tokens\n{found.text}")

    for prompt in ("To be", "My lord"):  # the same state again: no call has changed it
        found = roost.generate(model, tokenizer, prompt, roost.Sampling(temperature=0.0), state=state, max_tokens=40)
        print(f"--- {prompt}{found.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
