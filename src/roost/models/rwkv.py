"""The skeleton of all generations: training, prefill and decoding are one function, (tokens, state) -> (logits, state).

    x = LN0(Emb[token])
    x = x + TimeMix(LN1(x));  x = x + ChannelMix(LN2(x))          for every block
    logits = Head(LN_out(x))                                      (paper section 3, figure 10)

Owns: this order, the checks of what goes in, and the model's own file.
Refuses to know: the equations inside the mixers, and every foreign format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from roost.checks import choice, instance, usable_device, whole
from roost.config import GROUP_NORM_EPS, ModelConfig, check_config
from roost.files import disk_errors, replacing
from roost.models import dove, eagle, finch
from roost.models.parts import Init, fill, linear, orthogonal, uniform
from roost.ops import document_offsets
from roost.state import LayerState, State

LAYER_NORM_EPS = 1e-5
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Of token ids; torch has no arithmetic for other unsigned ones."""


class Block(nn.Module):
    """One layer: time mixing and channel mixing on the residual stream; block 0 also holds LN0."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, device=device, dtype=dtype)

        generation = {"dove": dove, "eagle": eagle, "finch": finch}[config.generation]
        self.ln1, self.ln2 = norm(), norm()
        if layer == 0:
            self.ln0 = norm()
        self.att = generation.TimeMix(config, layer, device, dtype)
        self.ffn = generation.ChannelMix(config, layer, device, dtype)

    def forward(self, x: Tensor, state: LayerState, offsets: Sequence[int] | None = None) -> tuple[Tensor, LayerState]:
        """x (B, T, D) and the layer's state -> the same after this layer."""
        att, att_shift, wkv = self.att(self.ln1(x), state.att_shift, state.wkv, offsets)
        x = x + att
        ffn, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, offsets)
        return x + ffn, LayerState(att_shift, wkv, ffn_shift)


class RWKV(nn.Module):
    """A Dove, Eagle or Finch network with fresh weights; `roost.load` makes one from a file.

    init "current" (RWKV-LM today), "legacy" (early 2024) or "paper" (appendix I); `seed` decides every draw. On
    device "meta" nothing is initialised. Parameter names and shapes are those of official checkpoints.
    Raises ValueError for arguments that are none of these, and for absurd sizes.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        init: Init = "current",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_config(config)
        choice("init", init, get_args(Init))
        instance("dtype", dtype, torch.dtype, "torch.float32, torch.bfloat16 or torch.float64")
        seed, device = whole("seed", seed, 0, 2**64 - 1), usable_device(device)
        self.config = config
        self.fingerprint = ""
        self.emb = nn.Embedding(config.vocab_size, config.n_embd, device="meta", dtype=dtype).to_empty(device=device)
        self.blocks = nn.ModuleList(Block(config, layer, device, dtype) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.head = linear(config.n_embd, config.vocab_size, device, dtype)
        if self.device.type != "meta":
            self._initialise(init, torch.Generator().manual_seed(seed))

    def _initialise(self, init: Init, generator: torch.Generator) -> None:
        V, D = self.config.vocab_size, self.config.n_embd
        uniform(self.emb.weight, 1e-4 if init == "current" else 4e-4, generator)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                fill(module.weight, 1.0)
                fill(module.bias, 0.0)
        for block in self.layers:
            block.att.initialise(init, generator)
            block.ffn.initialise(init, generator)
        gain = {"current": max(1.0, V / D) ** 0.5, "legacy": (V / D) ** 0.5, "paper": 1.0}[init]
        orthogonal(self.head.weight, 0.5 * gain, generator)

    @property
    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the residual stream."""
        return self.emb.weight.dtype

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros, or the tuned `time_state` when the weights hold one."""
        state = State.zeros(self.config, batch, self.device, self.dtype, self.fingerprint)
        if not self.config.time_state:
            return state
        layers = [
            layer._replace(
                wkv=block.att.get_parameter("time_state").mT.to(layer.wkv.dtype).expand_as(layer.wkv).clone()
            )
            for block, layer in zip(self.layers, state.layers, strict=True)
        ]
        return state._replace(layers=tuple(layers))

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        state: State | None = None,
        *,
        embeddings: Float[Tensor, "B T D"] | None = None,
        cu_seqlens: Int[Tensor, " offsets"] | Sequence[int] | None = None,
        last_only: bool = False,
        head: bool = True,
    ) -> tuple[Float[Tensor, "B t V"], State]:
        """Read T tokens of B sequences: T = 1 is decoding, T large is prefill or training.

        tokens      (B, T) ids, or embeddings (B, T, D) in their place (they still pass LN0)
        state       of B rows, never changed; None = `initial_state`
        cu_seqlens  n + 1 offsets with B = 1: n documents packed in one row, nothing leaks between them, state of n rows
        last_only   logits of the last position (of every document) only
        head        False: what the head reads, LN_out(x) (B, T, D), in place of logits

        Returns logits (B, T, V) (last_only: (B, 1, V), with cu_seqlens (1, n, V)) and the state after the last token.
        Raises ValueError for ids out of range (checked on the CPU only), wrong shapes, or a state of another model.
        """
        given = check_input(tokens, embeddings, self.config, self.device)
        offsets, lengths = check_sequences(given, cu_seqlens, last_only)
        if state is None:
            state = self.initial_state(len(lengths))
        check_state(state, len(lengths), self.config, self.fingerprint, self.dtype, self.device)

        layers: list[LayerState] = []
        x = given.to(self.dtype) if tokens is None else F.embedding(given.long(), self.emb.weight)
        x = self.layers[0].ln0(x)
        for block, layer in zip(self.layers, state.layers, strict=True):
            x, layer = block(x, layer, offsets)
            layers.append(layer)
        if last_only:
            x = x[:, -1:] if offsets is None else x[:, [end - 1 for end in offsets[1:]]]
        tokens_read = tuple(n + length for n, length in zip(state.tokens, lengths, strict=True))
        x = self.ln_out(x)
        return (self.head(x) if head else x), State(tuple(layers), tokens_read, state.fingerprint or self.fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights with their official names: `.pth` (RWKV-LM's state dict) or `.safetensors`; atomic.

        Raises ValueError for another ending or a missing directory; an old file survives any failure.
        """
        save_weights(official_weights(self.config, self.state_dict()), path)
        self.fingerprint = fingerprint_of(self.config, self.state_dict())


def check_input(tokens: Tensor | None, embeddings: Tensor | None, config: ModelConfig, device: torch.device) -> Tensor:
    """The one that is given: ids (B, T) on the model's device, or embeddings (B, T, D).

    Raises ValueError for both, for none, and for other shapes or ids out of range (checked on the CPU only).
    """
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens or embeddings")
    if tokens is None:
        instance("embeddings", embeddings, Tensor)
        assert embeddings is not None
        if embeddings.dim() != 3 or embeddings.shape[-1] != config.n_embd:
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}; they must be (B, T, {config.n_embd})")
        if embeddings.device != device or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings are {embeddings.dtype} on {embeddings.device}; they must be floats on {device}"
            )
        return embeddings
    instance("tokens", tokens, Tensor, "write torch.tensor([ids]), of shape (B, T)")
    if tokens.dim() != 2 or tokens.dtype not in ID_DTYPES:
        raise ValueError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be integers of shape (B, T), signed or uint8"
        )
    if tokens.device != device:
        raise ValueError(f"tokens are on {tokens.device}, the model on {device}: move one of them")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside 0..{config.vocab_size - 1}")
    return tokens


def check_sequences(
    given: Tensor, cu_seqlens: Tensor | Sequence[int] | None, last_only: bool
) -> tuple[list[int] | None, list[int]]:
    """The offsets of packed documents (None: rows of equal length), and the tokens of every sequence.

    Raises ValueError for offsets that do not fit, and with last_only for a sequence that has no last token.
    """
    B, T = given.shape[:2]
    offsets = None if cu_seqlens is None else document_offsets(cu_seqlens, B, T)
    lengths = [T] * B if offsets is None else [b - a for a, b in pairwise(offsets)]
    if last_only and 0 in lengths:
        raise ValueError("last_only needs at least one token in every sequence")
    return offsets, lengths


def check_state(
    state: State, rows: int, config: ModelConfig, fingerprint: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless `state` has `rows` rows and belongs to a model of these sizes, weights and dtype."""
    instance("state", state, State, "give one that a model returned, State.load(path) or None")
    if state.fingerprint and fingerprint and state.fingerprint != fingerprint:
        raise ValueError(
            f"this state was made by another model (fingerprint {state.fingerprint[:12]}, this one is"
            f" {fingerprint[:12]}): read the text again with this model"
        )
    if state.batch != rows:
        raise ValueError(f"the state has {state.batch} row(s), the input {rows}")
    c = config
    shift = (rows, c.n_embd)
    wkv = (rows, 3, c.dim_att) if c.generation == "dove" else (rows, c.n_head, c.head_size, c.head_size)
    fits = all(
        layer.att_shift.shape == layer.ffn_shift.shape == shift and layer.wkv.shape == wkv for layer in state.layers
    )
    if len(state.layers) != c.n_layer or not fits:
        raise ValueError("this state does not fit the model: its layers have other sizes")
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for layer in state.layers:
        found = layer.wkv
        shifts = all(part.device == device and part.is_floating_point() for part in (layer.att_shift, layer.ffn_shift))
        if found.dtype != wanted or found.device != device or not shifts:
            where = ", ".join(sorted({f"{part.dtype} on {part.device}" for part in layer}))
            raise ValueError(f"the state is {where}; this model needs {wanted} on {device}")


def check_storable(config: ModelConfig) -> None:
    """Raise ValueError for a model that no checkpoint can express: another group norm eps than every reader uses."""
    if config.generation != "dove" and config.group_norm_eps != GROUP_NORM_EPS:
        raise ValueError(
            f"group_norm_eps is {config.group_norm_eps}, and a checkpoint cannot say so: readers use {GROUP_NORM_EPS}"
        )


def official_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as official tools expect them in a file; `weights` is a state dict of this model.

    RWKV-5.0 has one decay and one bonus per head there, so [h, N] becomes [h] where all N are equal (a model trained
    further from 5.0 keeps [h, N], which only roost reads). Every other generation is stored as it is. Raises ValueError
    for a group norm eps that no file can express.
    """
    check_storable(config)
    if config.generation != "eagle" or config.gate:
        return dict(weights)
    per_head = [name for name in weights if name.endswith(("att.time_decay", "att.time_faaaa"))]
    if not all(bool((weights[name] == weights[name][:, :1]).all()) for name in per_head):
        return dict(weights)
    return {name: value[:, 0].clone() if name in per_head else value for name, value in weights.items()}


def save_weights(weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write official names to `.pth` or `.safetensors`, in the trainer's key order, through a temporary file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    ending = Path(path).suffix
    if ending not in (".pth", ".safetensors"):
        raise ValueError(f"cannot save to {path}: the name must end in .pth or .safetensors")
    with replacing(path) as temporary, disk_errors(path):
        if ending == ".pth":
            torch.save(tensors, temporary)
        else:
            from safetensors.torch import save_file

            save_file(tensors, temporary, {"format": "pt"})


def fingerprint_of(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """64 hex digits that tell one set of weights from another, the same in fp32 and bf16 and in every file format.

    Hashes the sizes and 64 evenly spaced elements of every tensor, rounded to bf16: two models that differ only
    elsewhere are not told apart, and a 3 GB file need not be read. Of sharded weights every rank gives it, together.
    """
    digest = hashlib.sha256(repr(astuple(config)).encode())
    for name in sorted(weights):
        weight = weights[name].detach()
        gathered: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)  # of one rank's shard
        flat = (gathered() if gathered else weight).reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()
