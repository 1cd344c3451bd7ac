"""Fine-tuning with less than all of a model: LoRA, DoRA, PiSSA, a tuned initial state, or all but frozen parts.

    adapted = prepare_model(model, AdapterConfig(adapter="lora", rank=16))
    train(model, data, config, save_final=adapted.save_final)          model.save still writes the base
    adapted = apply(model, "run/adapter.safetensors");  adapted.merge()     model is now a plain RWKV

Owns: what requires a gradient, and that merge, unmerge and remove are exact: the base's weights are kept, never
computed back.
Refuses to know: the equations (lora.py, state_tuning.py), the loop, and bytes of files (adapter_file.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from roost.checkpoint import load
from roost.config import ModelConfig
from roost.models.parts import Matrix
from roost.models.rwkv import RWKV, fingerprint_of
from roost.training.adapter_config import EVERY_MATRIX, LOW_RANK, AdapterConfig
from roost.training.adapter_file import AdapterFile, read_adapter, write_adapter
from roost.training.lora import LowRank, check_rank, factor_shapes, fresh_factors
from roost.training.selection import freeze, select
from roost.training.state_tuning import SUFFIX, add_time_state, remove_time_state


@dataclass
class Adapted:
    """A model with an adapter in it, and the way back.

    model   the same object as before; only the adapter requires a gradient
    config  what was asked for
    base    the fingerprint of the model before
    layers  the low-rank modules by the name of the layer they stand for
    whole   official names of parameters that are trained whole
    """

    model: RWKV
    config: AdapterConfig
    base: str
    layers: dict[str, LowRank] = field(default_factory=dict[str, LowRank])
    whole: tuple[str, ...] = ()
    _before: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _unmerged: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._trained())

    def _trained(self) -> list[nn.Parameter]:
        factors = [p for layer in self.layers.values() for p in layer.parameters() if p is not layer.weight]
        return factors + [self.model.get_parameter(name) for name in self.whole]

    def tensors(self) -> dict[str, Tensor]:
        """The adapter: factors as `blocks.0.att.key.lora_A`, parameters trained whole by their official names."""
        low = {f"{name}.{key}": value for name, layer in self.layers.items() for key, value in layer.factors().items()}
        return {**low, **{name: self.model.get_parameter(name).detach() for name in self.whole}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapter alone, in one piece: `.safetensors`, or `.pth` (a state alone, as RWKV-LM writes it).

        Raises ValueError for another ending, and for full fine-tuning, whose result is the model.
        """
        if self.config.adapter == "full":
            raise ValueError("full fine-tuning has no adapter to write: save the model")
        write_adapter(path, AdapterFile(asdict(self.config), self.base, self.tensors()))

    def save_final(self, out: Path) -> Path:
        """Write what a run was for: out/adapter.safetensors, or for full fine-tuning out/final.safetensors."""
        if self.config.adapter == "full":
            self.model.save(out / "final.safetensors")
            return out / "final.safetensors"
        self.save(out / "adapter.safetensors")
        return out / "adapter.safetensors"

    def merge(self) -> RWKV:
        """Make the model a plain one with the same function, of which every parameter can be trained; `unmerge` undoes
        it. Merging twice changes nothing."""
        if self._unmerged is None:
            self._unmerged = self.model.fingerprint
            for name, layer in self.layers.items():
                _put(self.model, name, _linear(layer.merged()))
            self.model.requires_grad_(True)
            self.model.fingerprint = fingerprint_of(self.model.config, self.model.state_dict())
        return self.model

    def unmerge(self) -> None:
        """Put the adapter back in its place, over the base's own matrices; only it requires a gradient again."""
        if self._unmerged is None:
            return
        for name, layer in self.layers.items():
            _put(self.model, name, layer)
        self.model.requires_grad_(False)
        for parameter in self._trained():
            parameter.requires_grad_(True)
        self.model.fingerprint, self._unmerged = self._unmerged, None

    def remove(self) -> RWKV:
        """Take the adapter out: the base, bit for bit. The adapter must not be used afterwards.

        Raises ValueError after full fine-tuning, which keeps no copy of the base.
        """
        if self.config.adapter == "full":
            raise ValueError("full fine-tuning keeps no copy of the base: load it again")
        self.unmerge()
        for name, layer in self.layers.items():
            _put(self.model, name, _linear(layer.weight.detach()))
        for name, value in self._before.items():
            _set(self.model, name, value)
        if any(name not in self._before for name in self.whole):
            remove_time_state(self.model)
        self.model.requires_grad_(True)
        self.model.fingerprint = self.base
        return self.model


def prepare_model(model: RWKV, config: AdapterConfig, *, seed: int = 0) -> Adapted:
    """Put a fresh adapter into `model`, in place, and let only it require a gradient; no logit changes by a bit.

    The matrices may be bf16; factors and a tuned state are fp32. `seed` decides the factors. Raises ValueError for
    patterns that match nothing, a rank above a matrix, a model that already has an adapter, parts to train that are
    stored in 16 bits, and a tuned state for Dove. The model is then as it was.
    """
    _check(model)
    base = fingerprint_of(model.config, model.state_dict())
    if config.adapter == "full":
        frozen = select(_names(model), config.freeze, "freeze")
        _check_precise(model, [name for name in _names(model) if name not in frozen])
        adapted = Adapted(model, config, base, whole=tuple(freeze(model, config.freeze)))
        model.fingerprint = ""
        return adapted
    also = select(_names(model), config.train_also, "train_also") if config.train_also else []
    factors = _fresh(model, config, also, seed) if config.adapter in LOW_RANK else {}
    _check_precise(model, also)
    already = set(_names(model))
    if config.adapter == "state":
        _check_precise(model, [name for name in already if name.endswith(SUFFIX)])
        add_time_state(model)
        also = [name for name in _names(model) if name in also or name.endswith(SUFFIX)]
    before = {name: model.get_parameter(name).detach().clone() for name in also if name in already}
    adapted = Adapted(model, config, base, whole=tuple(also), _before=before)
    return _install(adapted, factors)


def count_parameters(sizes: ModelConfig, config: AdapterConfig | None) -> tuple[int, int]:
    """(all numbers, those of them that are trained) of a model with this adapter; None: all are. Makes no weights.

    Raises ValueError as `prepare_model`, but for what the weights themselves decide.
    """
    model = RWKV(sizes, device="meta")
    if config is not None and config.adapter == "state":
        add_time_state(model)
    numbers = {name: value.numel() for name, value in model.named_parameters()}
    total = sum(numbers.values())
    if config is None or config.adapter == "full":
        return total, sum(numbers[name] for name in freeze(model, config.freeze if config else ()))
    also = select(numbers, config.train_also, "train_also") if config.train_also else []
    trained = sum(n for name, n in numbers.items() if name in also or (config.adapter == "state" and SUFFIX in name))
    if config.adapter in LOW_RANK:
        for name, weight in _targets(model, config, also).items():
            check_rank(weight, config.form, name)
            for factor, shape in factor_shapes(weight, config.form).items():
                total += prod(shape)
                trained += 0 if factor.endswith("0") else prod(shape)  # PiSSA's first factors stay
    return total, trained


def apply(model: RWKV, path: str | os.PathLike[str]) -> Adapted:
    """Put a trained adapter from a file into the model it was trained on, in place.

    Its matrices may be in another dtype. Raises ValueError when the file is none or damaged, belongs to another model,
    or the model already has an adapter. A `.pth` with only `time_state` does not say where it belongs: sizes decide.
    """
    _check(model)
    file = read_adapter(path)
    base = fingerprint_of(model.config, model.state_dict())
    if file.base and file.base != base:
        raise ValueError(
            f"{path} was trained on another model (fingerprint {file.base[:12]}, this one is {base[:12]}): load the"
            " model it was trained on"
        )
    try:
        config = AdapterConfig(**file.config)
    except TypeError as error:
        raise ValueError(f"{path} was written by another version of roost: {error}") from error
    factors: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        layer, _, key = name.rpartition(".")
        if key.startswith("lora_"):
            factors.setdefault(layer, {})[key] = value
        else:
            parts[name] = value
    _check_shapes(model, config, factors, parts, path)
    already = set(_names(model))
    if config.adapter == "state":
        add_time_state(model)
    before = {name: model.get_parameter(name).detach().clone() for name in parts if name in already}
    for name, value in parts.items():
        _set(model, name, value)
    adapted = _install(Adapted(model, config, base, whole=tuple(parts), _before=before), factors)
    model.fingerprint = sha256(f"{base} {file.checksum()}".encode()).hexdigest()
    return adapted


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model that `base` with `adapter` computes: `.pth` or `.safetensors`, official names; returns `out`.

    dtype None keeps the base's (fp16 becomes fp32); small changes of bf16 weights are lost in its rounding, so fp32 is
    there for exactness. Raises ValueError as `load`, `apply` and `RWKV.save`.
    """
    path = Path(out)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"cannot save to {path}: the name must end in .pth or .safetensors")
    model, _ = load(base, dtype=dtype)
    apply(model, adapter).merge().save(path)
    return path


def _check(model: RWKV) -> None:
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("the model already has an adapter: merge or remove it first")


def _names(model: RWKV) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _check_precise(model: RWKV, names: Iterable[str]) -> None:
    for name in names:
        dtype = model.get_parameter(name).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {dtype}: to train it, load the model in fp32 (dtype=torch.float32)")


def _fresh(model: RWKV, config: AdapterConfig, also: list[str], seed: int) -> dict[str, dict[str, Tensor]]:
    """Fresh factors of every target, by the name of its layer."""
    generator = torch.Generator().manual_seed(seed)
    targets = _targets(model, config, also)
    return {name: fresh_factors(weight, config.form, generator, name) for name, weight in targets.items()}


def _targets(model: RWKV, config: AdapterConfig, also: list[str]) -> dict[str, Tensor]:
    """The matrices that get factors, by the names of their layers."""
    matrices = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    patterns = tuple(pattern.removesuffix(".weight") for pattern in config.targets) or EVERY_MATRIX
    targets = select(matrices, patterns, "targets")
    both = [name for name in targets if f"{name}.weight" in also]
    if both:
        raise ValueError(f"train_also names {both[0]}, which the adapter targets: name it in one of the two")
    return {name: matrices[name] for name in targets}


def _install(adapted: Adapted, factors: Mapping[str, dict[str, Tensor]]) -> Adapted:
    """Put the factors into the model, and let only what is trained require a gradient."""
    model = adapted.model
    model.requires_grad_(False)
    for name, values in factors.items():
        weight = model.get_parameter(f"{name}.weight")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        values = {key: value.to(weight.device, dtype, copy=True) for key, value in values.items()}
        adapted.layers[name] = LowRank(weight, adapted.config.form, values).train(model.training)
        _put(model, name, adapted.layers[name])
    for name in adapted.whole:
        model.get_parameter(name).requires_grad_(True)
    model.fingerprint = ""
    return adapted


def _check_shapes(
    model: RWKV,
    config: AdapterConfig,
    factors: Mapping[str, Mapping[str, Tensor]],
    parts: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Raise ValueError unless every tensor of a file has its place in the model."""
    c = model.config
    wanted: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if config.adapter == "state" and c.generation != "dove":
        state = (c.n_head, c.head_size, c.head_size)
        wanted |= {f"blocks.{layer}.{SUFFIX}": state for layer in range(c.n_layer)}
        missing = [name for name in wanted if name.endswith(SUFFIX) and name not in parts]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}, which this model needs")
    given = dict(parts)
    for layer, values in factors.items():
        if config.adapter in LOW_RANK and f"{layer}.weight" in wanted:
            shapes = factor_shapes(model.get_parameter(f"{layer}.weight"), config.form)
            wanted |= {f"{layer}.{key}": shape for key, shape in shapes.items()}
            absent = shapes.keys() - values.keys()
            if absent:
                raise ValueError(f"{path} has no {layer}.{min(absent)}: the file is incomplete")
        given |= {f"{layer}.{key}": value for key, value in values.items()}
    for name, value in given.items():
        if wanted.get(name) != tuple(value.shape):
            place = f"needs {list(wanted[name])}" if name in wanted else "has no such place"
            raise ValueError(f"{path} does not fit this model: {name} is {list(value.shape)}, the model {place}")


def _linear(weight: Tensor) -> Matrix:
    outputs, inputs = weight.shape
    layer = Matrix(inputs, outputs, bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def _put(model: RWKV, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _set(model: RWKV, name: str, value: Tensor) -> None:
    """Replace a parameter, in the dtype and on the device it has."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value.to(old.device, old.dtype, copy=True)))
