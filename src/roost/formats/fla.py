"""The flash-linear-attention dialect of RWKV-6: other names, transposed low-rank matrices, and the order r, w, k, v, g.

Owns: the way from these names to the official ones. The group norm's eps is not read from the directory: it says 1e-5
where 64e-5 is meant, because fla's own converter changes the live module only.
Refuses to know: files, and how official weights are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_TOP = {"model.embeddings.": "emb.", "model.norm.": "ln_out.", "lm_head.": "head."}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OFFICIAL_ORDER = [1, 2, 3, 0, 4]  # w, k, v, r, g taken out of r, w, k, v, g
_SAME = {
    "pre_norm.weight": "ln0.weight",
    "pre_norm.bias": "ln0.bias",
    "attn_norm.weight": "ln1.weight",
    "attn_norm.bias": "ln1.bias",
    "ffn_norm.weight": "ln2.weight",
    "ffn_norm.bias": "ln2.bias",
    "attn.r_proj.linear.weight": "att.receptance.weight",
    "attn.k_proj.linear.weight": "att.key.weight",
    "attn.v_proj.linear.weight": "att.value.weight",
    "attn.g_proj.linear.weight": "att.gate.weight",
    "attn.o_proj.weight": "att.output.weight",
    "attn.g_norm.weight": "att.ln_x.weight",
    "attn.g_norm.bias": "att.ln_x.bias",
    "attn.bonus": "att.time_faaaa",
    "ffn.key.linear.weight": "ffn.key.weight",
    "ffn.receptance.linear.weight": "ffn.receptance.weight",
    "ffn.value.weight": "ffn.value.weight",
}
_VECTORS = {
    "attn.x_proj.0.mu": "att.time_maa_x",
    "attn.w_proj.linear.lora.2.bias": "att.time_decay",
    "ffn.key.mu": "ffn.time_maa_k",
    "ffn.receptance.mu": "ffn.time_maa_r",
}
_TRANSPOSED = {
    "attn.w_proj.linear.lora.0.weight": "att.time_decay_w1",
    "attn.w_proj.linear.lora.2.weight": "att.time_decay_w2",
}


def is_fla(names: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of fla's RWKV6ForCausalLM (the `model_type` of both dialects is rwkv6)."""
    return any(re.fullmatch(r"model\.layers\.\d+\.attn\.x_proj\..*", name) for name in names)


def to_official(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Official names and orientations. Raises ValueError for an unknown name or a matrix that is not five blocks."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        for theirs, ours in _TOP.items():
            if name.startswith(theirs):
                out[ours + name.removeprefix(theirs)] = value
                break
        else:
            match = _BLOCK.fullmatch(name)
            if match is None:
                raise ValueError(f"{where} does not fit fla's RWKV-6: unknown {name}")
            try:
                block = _block(match[2], value)
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"{where}: {name} has the impossible shape {list(value.shape)}") from error
            if block is None:
                raise ValueError(f"{where} does not fit fla's RWKV-6: unknown {name}")
            out |= {f"blocks.{match[1]}.{part}": tensor for part, tensor in block.items()}
    return out


def _block(part: str, value: Tensor) -> dict[str, Tensor] | None:
    if part in _SAME:
        return {_SAME[part]: value}
    if part in _VECTORS:
        return {_VECTORS[part]: value.reshape(1, 1, -1)}
    if part in _TRANSPOSED:
        return {_TRANSPOSED[part]: value.t().contiguous()}
    if part == "attn.x_proj.0.linear.weight":  # [5 Rm, D]
        blocks = value.reshape(5, -1, value.shape[1])[_OFFICIAL_ORDER]
        return {"att.time_maa_w1": blocks.flatten(0, 1).t().contiguous()}
    if part == "attn.x_proj.2.weight":  # [D, 5 Rm]
        blocks = value.reshape(value.shape[0], 5, -1).permute(1, 2, 0)
        return {"att.time_maa_w2": blocks[_OFFICIAL_ORDER].contiguous()}
    if part == "attn.x_bias":  # [5, D]
        rows = dict(zip("rwkvg", value.reshape(5, 1, 1, -1).unbind(0), strict=True))
        return {f"att.time_maa_{letter}": row.clone() for letter, row in rows.items()}
    return None
