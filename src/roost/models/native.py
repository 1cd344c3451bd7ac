"""The CPU model: Eagle and Finch over packed weights in the native library, called exactly as `RWKV` is.

Owns the invariant that for one weight format and one instruction set the logits and the state have the same bits
however the work is cut: whole, in chunks or token by token, alone or beside other sequences, on any number of threads.
Refuses to know: where packed tensors come from (roost.formats.packed), and the equations (src/native/forward.inl, stage
by stage those of eagle.py and finch.py).
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from roost import native
from roost.checks import choice, whole
from roost.config import ModelConfig
from roost.models.rwkv import RWKV, check_input, check_sequences, check_state
from roost.native import KINDS, MOST_THREADS
from roost.state import LayerState, State


@dataclass(frozen=True)
class PackedTensor:
    """One tensor as the native library reads it.

    kind    one of native.KINDS, or "vector" (fp32), or the rows of the embedding: "rows32" (fp32), "rows16" (bf16 bits)
    shape   (outputs, inputs) of a matrix y = W x, (V, D) of the embedding, or that of the vector
    data    the numbers, C-contiguous; usually a view of a memory-mapped file
    """

    kind: str
    shape: tuple[int, ...]
    data: NDArray[Any]


def _plain(x: Tensor) -> Tensor:
    """`x` as its memory is: fp32, contiguous, no view that only promises to be negated."""
    if x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg():
        return x
    return x.detach().resolve_neg().float().contiguous()


@dataclass(eq=False)
class _Block:
    """Memory that can be used again; equal to itself only."""

    memory: NDArray[np.float32]


class _Lease:
    """Memory of an array that goes back to `home` when nothing refers to the array any more."""

    def __init__(self, block: _Block, home: Recycled) -> None:
        self.__array_interface__ = block.memory.__array_interface__
        self._block, self._home = block, home

    def __del__(self) -> None:
        self._home.take_back(self._block)


class Recycled:
    """Large tensors in memory that is used again: fresh memory costs a page fault for every 4 KiB of every answer.

    Tensors of which nothing is left are kept for the next one of the same size, at most 16 of them and at most `most`
    bytes in all; the oldest is dropped for a new one, and a larger one never kept. Python threads may share it: every
    step is one call of the deque, since a tensor can end anywhere, even inside another step.
    """

    def __init__(self, most: int = 64 << 20) -> None:
        self._most = most
        self._free: deque[_Block] = deque(maxlen=16)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised fp32 tensor."""
        count = math.prod(shape)
        if not 1 << 15 <= count <= self._most // 4:
            return torch.empty(shape)
        for block in self._free.copy():
            if block.memory.size == count:
                with suppress(ValueError):  # another thread was faster
                    self._free.remove(block)
                    break
        else:
            block = _Block(np.empty(count, np.float32))
        return torch.from_numpy(np.asarray(_Lease(block, self))).view(shape)

    def take_back(self, block: _Block) -> None:
        """Keep a block, and drop the oldest ones until all of them are within the bound."""
        self._free.append(block)
        while sum(one.memory.nbytes for one in self._free.copy()) > self._most:
            with suppress(IndexError):  # another thread was faster
                self._free.popleft()


class NativeModel(native.Held):
    """Eagle or Finch on a CPU: `(tokens, state) -> (logits, state)`, inference only.

    config       sizes; dove and heads of other sizes than 16, 32, 64 raise ValueError
    tensors      by their official names; `att.time_maa_w2` in five matrices, `att.time_maa_w2.w` .. `.g`
    fingerprint  of the weights before they were packed, so states can be told apart
    weights      the name of the format: "fp32", "bf16", "int8" or "int4"
    threads      of the native pool, 1 to 256, by default torch's number; may be changed; results do not depend on it
    skip_zeros   in decoding, read no weights of `ffn.value` for inputs that are zero; results do not depend on it

    A shallow copy shares the weights; there are no deep copies and no pickles. Raises ValueError for missing or
    misshapen tensors, and without the native library.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, PackedTensor],
        *,
        fingerprint: str = "",
        weights: str = "",
        threads: int | None = None,
        skip_zeros: bool = True,
    ) -> None:
        if config.generation == "dove":
            raise ValueError("the native model runs Eagle and Finch; load Dove with backend='torch'")
        self.config, self.fingerprint, self.weights = config, fingerprint, weights
        self.threads = min(torch.get_num_threads(), MOST_THREADS) if threads is None else threads
        self.isa, self._skip_zeros = native.isa(), skip_zeros
        self._time_state = [
            torch.from_numpy(np.array(tensor.data).reshape(config.n_head, config.head_size, config.head_size))
            for name, tensor in tensors.items()
            if name.endswith("att.time_state")
        ]
        self._memory = Recycled()
        self._tensors = dict(tensors)  # the library points into these
        self._handle = self._build()
        self._forward = native.function("roost_model_forward", _FORWARD)

    @property
    def threads(self) -> int:
        """Of the native pool. Raises ValueError when it is set to an impossible number."""
        return self._threads

    @threads.setter
    def threads(self, value: int) -> None:
        self._threads = whole("threads", value, 1, MOST_THREADS)

    def _build(self) -> native.Handle:
        c = self.config
        sizes = (c.generation == "finch", c.gate, c.n_layer, c.n_embd, c.dim_att, c.dim_ffn, c.vocab_size, c.head_size)
        numbers = (ctypes.c_long * 11)(*(int(n) for n in sizes), c.shift_rank, c.decay_rank, self._skip_zeros)
        new = native.function("roost_model_new", [ctypes.c_void_p, ctypes.c_float], ctypes.c_void_p)
        made = new(numbers, c.group_norm_eps)
        native.check(0 if made else -1)
        handle = native.Handle(made, "roost_model_free")
        put = native.function("roost_model_set", _SET)
        for name, tensor in self._tensors.items():
            layer, inner = -1, name
            if name.startswith("blocks.") and ".ln0." not in name:
                _, number, inner = name.split(".", 2)
                layer = int(number)
            if inner == "att.time_state":
                continue
            kind = KINDS.index(tensor.kind) if tensor.kind in KINDS else {"rows32": 0, "rows16": 2}.get(tensor.kind, -1)
            rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, 1)
            data = tensor.data
            native.check(put(handle, layer, inner.encode(), kind, rows, columns, data.ctypes.data, data.nbytes))
        native.check(native.function("roost_model_ready", [ctypes.c_void_p])(handle))
        return handle

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros, or the tuned `time_state` when the weights hold one."""
        state = State.zeros(self.config, batch, fingerprint=self.fingerprint)
        if not self._time_state:
            return state
        layers = [
            layer._replace(wkv=tuned.mT.expand_as(layer.wkv).clone())
            for tuned, layer in zip(self._time_state, state.layers, strict=True)
        ]
        return state._replace(layers=tuple(layers))

    def __call__(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        state: State | None = None,
        *,
        embeddings: Float[Tensor, "B T D"] | None = None,
        cu_seqlens: Int[Tensor, " offsets"] | Sequence[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Tensor, "B t V"], State]:
        """Read T tokens of B sequences, or with cu_seqlens n sequences of any lengths packed in one row: see `RWKV`.

        Returns fp32 logits and the state; no gradients. Raises ValueError as `RWKV` does.
        """
        given = check_input(tokens, embeddings, self.config, self.device)
        documents, lengths = check_sequences(given, cu_seqlens, last_only)
        if state is None:
            state = self.initial_state(len(lengths))
        check_state(state, len(lengths), self.config, self.fingerprint, self.dtype, self.device)

        given = _plain(given) if tokens is None else given.resolve_neg().to(torch.int32).contiguous()
        B, T = given.shape[:2]
        shape = (B, T) if not last_only else (B, 1) if documents is None else (1, len(lengths))
        logits = self._memory.empty(*shape, self.config.vocab_size)
        layers = self._run(given, tokens is not None, state, [0, *accumulate(lengths)], last_only, logits)
        tokens_read = tuple(n + length for n, length in zip(state.tokens, lengths, strict=True))
        return logits, State(layers, tokens_read, state.fingerprint or self.fingerprint)

    def _run(
        self, given: Tensor, are_ids: bool, state: State, offsets: list[int], last_only: bool, logits: Tensor
    ) -> tuple[LayerState, ...]:
        c, n = self.config, len(offsets) - 1
        sizes = ((n, c.n_embd), (n, c.n_head, c.head_size, c.head_size), (n, c.n_embd))
        after = [self._memory.empty(c.n_layer, *size) for size in sizes]  # one block per kind, a view per layer
        bases, steps = [block.data_ptr() for block in after], [4 * block[0].numel() for block in after]
        before = [[_plain(part) for part in layer] for layer in state.layers]
        pointers: list[int] = []
        for i, layer in enumerate(before):
            pointers += [part.data_ptr() for part in layer]
            pointers += [base + i * step for base, step in zip(bases, steps, strict=True)]
        data = given.data_ptr()
        native.check(
            self._forward(
                self._handle,
                n,
                (ctypes.c_long * len(offsets))(*offsets),
                data if are_ids else None,
                None if are_ids else data,
                (ctypes.c_void_p * len(pointers))(*pointers),
                last_only,
                logits.data_ptr(),
                self.threads,
            )
        )
        return tuple(map(LayerState, *(block.unbind() for block in after)))

    def bytes_per_token(self, zero_rate: float = 0.0) -> int:
        """Bytes of weights that writing one token reads: all but the embedding, less what zeros let it skip.

        Blocks of `ffn.value` (1, 2, 4 or 8 inputs by kind) are skipped when all their inputs are zero; this counts them
        as if zeros were independent, the least that is skipped in practice. All are read where
        no more than a third are empty.
        """
        total = sum(tensor.data.nbytes for name, tensor in self._tensors.items() if name != "emb.weight")
        inputs = {"f32": 1, "w16": 1, "bf16": 2, "i4": 8}
        skipped = 0.0
        if self._skip_zeros:
            for name, tensor in self._tensors.items():
                if name.endswith("ffn.value.weight"):
                    empty = zero_rate ** inputs.get(tensor.kind, 4)
                    skipped += empty * tensor.data.nbytes if 3 * empty > 1 else 0
        return round(total - skipped)

    def zero_rate(self) -> float:
        """The share of inputs of `ffn.value` that were exactly zero since the last call of this method (0 if none)."""
        zeros, inputs = ctypes.c_long(), ctypes.c_long()
        count = native.function("roost_model_zeros", [ctypes.c_void_p] * 3, None)
        count(self._handle, ctypes.byref(zeros), ctypes.byref(inputs))
        return zeros.value / inputs.value if inputs.value else 0.0


LanguageModel = RWKV | NativeModel
"""What generation, chat and evaluation run: one call, `(tokens, state) -> (logits, state)`."""

_SET = [
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_long,
]
_FORWARD = [
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
]


def product(
    kind: str, packed: NDArray[Any], outputs: int, inputs: int, x: Float[Tensor, "M K"], *, threads: int = 1
) -> Float[Tensor, "M N"]:
    """x (M, inputs) fp32 times one packed matrix, exactly as the model computes it: for tests and measurements.

    Raises ValueError for an x of another shape, dtype or device, and for a matrix of another size.
    """
    call = native.function("roost_product", _PRODUCT)
    choice("kind", kind, KINDS)
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype is not torch.float32 or x.device.type != "cpu":
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}; it must be (M, {inputs}) fp32 on the CPU")
    x, out = x.contiguous(), torch.empty(x.shape[0], outputs)
    packed = np.ascontiguousarray(packed)
    place = (packed.ctypes.data, packed.nbytes, outputs, inputs)
    native.check(call(KINDS.index(kind), *place, x.data_ptr(), x.shape[0], out.data_ptr(), threads))
    return out


_PRODUCT = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
]
