"""What looks like a checkpoint and is not one this project reads: each by its name, with what to do instead.

Owns: the list of foreign formats (by first bytes) and unsupported variants (by key).
Refuses to know: tensors and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file under another name; give it the ending .gguf and load it by its own path"),
    (b"fmgg", "an rwkv.cpp file; load the .pth that it was converted from"),
    (b"lmgg", "a GGML file (rwkv.cpp, llama.cpp); load the .pth that it was converted from"),
    (b"tjgg", "a GGML file (llama.cpp); load the .pth that it was converted from"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run `git lfs pull`"),
    (b"<", "a web page, not the weights; the download went to an error or login page"),
)

_ELSEWHERE = "run it with the code that trained it"
_ONLY_X060 = f"only plain x060 can be loaded: {_ELSEWHERE}"

_KEYS: tuple[tuple[str, str], ...] = (
    (
        r"_(strategy|version|rescale_layer)",
        "converted by ChatRWKV for one strategy (LN0 folded, matrices transposed); load the original .pth",
    ),
    (
        r".*\.(att|attn|attention)\.(k_k|r_k|x_r)",
        "RWKV-7, which roost does not run; run it with the `rwkv` package, or use RWKV-4, 5 or 6 (x060)",
    ),
    (
        r".*\.time_maa_rkvw_w1",
        f"x060b or x060c (their keys are the same, their equations differ); {_ONLY_X060}",
    ),
    (r".*\.gate_w1", f"x060a (low-rank gate); {_ONLY_X060}"),
    (
        r".*\.att\.time_mix_(x|w|w1|w2)",
        "a web-rwkv (.st) file (low-rank matrices transposed, time_mix means 1 - mix); load the original .pth",
    ),
    (r"layers\.\d+\.(att_shift|wkv)", "a saved state, not a model; read it with roost.State.load"),
    (r".*\.ffnPre\..*", f"a variant with ffnPre in place of time mixing; {_ELSEWHERE}"),
    (r"head_[qk]\..*|copy_mask", f"a variant with a copy head (head_q, head_k); {_ELSEWHERE}"),
    (r"(.*\.)?tiny_.*", f"a variant with tiny attention; {_ELSEWHERE}"),
    (r"pos_emb_[xy]", f"a variant with position embeddings; {_ELSEWHERE}"),
    (r".*\.ffn\.(aa|bb)\..*", f"a variant with MishGLU; {_ELSEWHERE}"),
    (r".*\.att\.(qq|kk|vv|oo)(\..*)?", f"the RWKV-4 variant 'a' (extra attention); {_ELSEWHERE}"),
    (
        r".*\.(att|attention)\.(key|value|receptance|output|gate)\.bias",
        f"a hybrid with biases in its projections (such as RWKV6-Qwen2); {_ELSEWHERE}",
    ),
    (r".*\.(in_proj|out_proj)\..*", "a Mamba file, not an RWKV; load it with the library that wrote it"),
)
_ADAPTER = re.compile(r".*(\.|_)(lora_[AB]|lora\.[01]|disha)(\.weight)?")
_STATE = re.compile(r".*time_sta.*")


def refuse_magic(head: bytes, path: Path) -> None:
    """Raise ValueError when the first bytes of `path` belong to a format that is not read, or there are none."""
    if not head:
        raise ValueError(f"{path} is empty")
    for magic, what in _MAGICS:
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}")


def refuse_keys(keys: Collection[str], where: str) -> None:
    """Raise ValueError when a key belongs to a variant that is not supported; the message names both."""
    for pattern, what in _KEYS:
        found = next((key for key in keys if re.fullmatch(pattern, key)), None)
        if found is not None:
            raise ValueError(f"{where} is {what} (it has {found})")
    if not keys:
        raise ValueError(f"{where} holds no tensors; get the file again")
    if all(_STATE.fullmatch(key) for key in keys):
        raise ValueError(
            f"{where} is a tuned initial state ({len(keys)} layers), not a model: copy its tensors into the base"
            " model's file"
        )
    adapter = next((key for key in keys if _ADAPTER.fullmatch(key)), None)
    if adapter is not None and not any(key.startswith("model.layers.") for key in keys):
        base = any(key.endswith("emb.weight") for key in keys)
        raise ValueError(
            f"{where} {'holds an adapter beside the weights' if base else 'is an adapter, not a model'}"
            f" (it has {adapter}): merge it into the base model with the program that trained it, and load the result"
        )
