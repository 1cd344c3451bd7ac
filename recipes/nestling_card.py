"""Measure nestling and write its model card: docs/nestling.md and docs/nestling.png.

    python recipes/nestling_card.py --run runs/nestling --eagle runs/nestling-eagle --corpus corpus/nestling

Every figure after the card's mark is measured here: bits per byte of the held-out texts, each document read from its
boundary, beside xz -9e, an Eagle of the same size and training, adaptive byte models of order 0 to 3 that start
untrained like xz does, and the untrained network.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from collections import defaultdict
from pathlib import Path

import torch

import roost
from roost.data.binidx import TokenFile
from roost.training.plot import read_log

EXAMPLE = Path(roost.__file__).parent / "assets" / "example.txt"
PROMPTS = ("It is a truth universally acknowledged, that ", "And it came to pass, that ", "HAMLET. ", "Call me ")


def xz(text: bytes) -> float:
    """Bits per byte of xz -9e, container included."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def adaptive(text: bytes, order: int) -> float:
    """Bits per byte of a byte model that counts as it reads: P(b | last `order` bytes) = (n_b + 1/2) / (n + 128)."""
    counts: dict[bytes, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    totals: dict[bytes, int] = defaultdict(int)
    bits = 0.0
    for i, byte in enumerate(text):
        context = text[max(0, i - order) : i]
        bits -= math.log2((counts[context][byte] + 0.5) / (totals[context] + 128))
        counts[context][byte] += 1
        totals[context] += 1
    return bits / len(text)


def documents(corpus: Path) -> dict[str, list[bytes]]:
    """The documents of the held-out texts, and the demo's document."""
    out: dict[str, list[bytes]] = {}
    for path in sorted(corpus.glob("valid-*.bin")):
        file = TokenFile(path)
        out[path.stem] = [bytes(int(id) - 1 for id in file.documents(i) if id) for i in range(file.count)]
    out["example.txt"] = [EXAMPLE.read_bytes()]
    return out


def predicted(model: roost.RWKV, texts: list[bytes]) -> float:
    """Bits per byte over all documents."""
    tokenizer = roost.WorldTokenizer.byte_level()
    scores = [roost.bits_per_byte(model, tokenizer, text) for text in texts]
    return sum(score.bits for score in scores) / sum(score.bytes for score in scores)


def table(model: roost.RWKV, eagle: roost.RWKV, fresh: roost.RWKV, texts: dict[str, list[bytes]]) -> str:
    """Markdown: one row per text."""
    rows = [
        "| text | bytes | nestling | xz -9e | nestling-eagle | order 0 | order 1 | order 2 | order 3 | untrained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, parts in texts.items():
        text, scores = b"".join(parts), [predicted(m, parts) for m in (model, eagle, fresh)]
        orders = [adaptive(text, order) for order in range(4)]
        others = (xz(text), scores[1], *orders, scores[2])
        cells = [f"**{scores[0]:.3f}**", *(f"{bits:.3f}" for bits in others)]
        rows.append(f"| {name} | {len(text):,} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return "\n".join(rows)


def samples(model: roost.RWKV) -> str:
    """Unedited continuations with fixed seeds."""
    tokenizer = roost.WorldTokenizer.byte_level()
    blocks = []
    for seed, prompt in enumerate(PROMPTS):
        params = roost.Sampling.openai(temperature=0.8, top_p=0.9, seed=seed)
        text = roost.generate(model, tokenizer, prompt, params, max_tokens=350).text
        blocks.append(f"> **{prompt}**" + text.replace("\n", "\n> "))
    return "\n\n".join(blocks)


def plot(logs: dict[str, list[dict[str, float | str]]], path: Path) -> None:
    """Held-out bits per byte over steps, the first run drawn through, the second dashed; the training loss behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    width = 10
    for (run, log), line, grey in zip(logs.items(), ("-", "--"), ("0.6", "0.8"), strict=True):
        steps = [entry["step"] for entry in log if "lr" in entry]
        bits = [entry["loss"] / math.log(2) for entry in log if "lr" in entry]
        smooth = [sum(bits[max(0, i - width) : i + 1]) / len(bits[max(0, i - width) : i + 1]) for i in range(len(bits))]
        axes.plot(steps, smooth, color=grey, label=f"{run}: training (running mean)", zorder=0)
        for i, name in enumerate(sorted({entry["validation"] for entry in log if "validation" in entry})):
            points = [(entry["step"], entry["bits_per_byte"]) for entry in log if entry.get("validation") == name]
            axes.plot(*zip(*points, strict=True), line, color=f"C{i}", marker="o", markersize=3, label=f"{run}: {name}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1.2, 4.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/nestling"))
    parser.add_argument("--eagle", type=Path, default=Path("runs/nestling-eagle"))
    parser.add_argument("--corpus", type=Path, default=Path("corpus/nestling"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    started = time.perf_counter()
    runs = {"nestling": options.run, "nestling-eagle": options.eagle}
    model = roost.load("nestling")[0]  # as it ships: rounded to bf16
    eagle = roost.load(options.eagle / "final.safetensors", dtype=torch.float32)[0]
    fresh = roost.RWKV(roost.PRESETS["nestling"], seed=7)
    plot({name: read_log(run) for name, run in runs.items()}, options.docs / "nestling.png")
    card = options.docs / "nestling.md"
    before, marker, _ = card.read_text(encoding="utf-8").partition("<!-- measured -->\n")
    text = "\n\n".join([table(model, eagle, fresh, documents(options.corpus)), "## Samples", samples(model)])
    card.write_text(before + marker + "\n" + text + "\n", encoding="utf-8")
    print(f"{card} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
