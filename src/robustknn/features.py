"""Features of any layers of any network, by hooks that live for one forward pass.

This is the one place where features are pooled, transformed, flattened, normalised and centred.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from robustknn import store
from robustknn.batching import MIN_ROWS
from robustknn.checks import check_choice
from robustknn.errors import InputError, RobustKNNError, brief, reason, unknown_name
from robustknn.transforms.base import Transform, check_transform

POOLS = ("flatten", "avg", "max", "tokens", "first")
OUTPUT = "(output)"
"""The name of the tap on what the model itself returns."""

_ROW_MULTIPLE = 4
"""CPU batches are padded to a multiple of this besides: the last one to three rows of a matrix product go through
other kernels (measured in float64, and in float32 for a single output unit). After a linear layer whose width is no
multiple of 4, MKL's last bit still depends on a row's place modulo 4, unless MKL_CBWR=AUTO,STRICT is set."""

_TAP = re.compile(r"^(?P<module>[^:@\[]*?)(?P<input>:input)?(@(?P<call>\d+))?(\[(?P<item>\d+)\])?$")


@dataclass(frozen=True)
class Tap:
    """Where a feature is read.

    Written `module`, with any of: `:input` (what goes into the module, e.g. the pre-ReLU activations of a
    ReLU), `@n` (the n-th call, from 0, of a module the network uses several times), `[i]` (the i-th item,
    from 0, of a module that returns a tuple). `(output)` is the model's own output.
    """

    module: str
    at_input: bool = False
    call: int = 0
    item: int | None = None

    @property
    def is_output(self) -> bool:
        """Whether this is (an item of) what the model itself returns, for which no hook is needed."""
        return not (self.module or self.at_input or self.call)

    @classmethod
    def parse(cls, text: str) -> Tap:
        """The tap written as `text`; InputError when it cannot be read."""
        if not isinstance(text, str):
            raise InputError(f"a layer is named by text, as in model.named_modules(), not by {brief(text)}.")
        match = _TAP.match(text.replace(OUTPUT, "", 1) if text.startswith(OUTPUT) else text)
        if match is None:
            raise InputError(f"layer {text!r} cannot be read; write module, module:input, module@1 or module[0].")
        item = match["item"]
        return cls(match["module"], bool(match["input"]), int(match["call"] or 0), int(item) if item else None)

    def __str__(self) -> str:
        call = f"@{self.call}" if self.call else ""
        item = "" if self.item is None else f"[{self.item}]"
        return f"{self.module or OUTPUT}{':input' if self.at_input else ''}{call}{item}"


class FeatureExtractor:
    """Features of chosen layers: inputs (N, …) → {layer: (N, D)}.

    Args:
        model: any module. It is neither changed nor wrapped; hooks exist only during a call. Each call runs
            it in eval mode and gives every submodule its own mode back. Input normalisation belongs inside it.
            Of what `torch.compile` returned, the module inside is run; of a scripted model only the output
            can be read.
        layers: names from `model.named_modules()` in the grammar of `Tap`; None takes the model's output
            (an encoder that returns embeddings).
        pool: how what a layer gives becomes a vector (of float32, from half precision), for all layers or by
            layer: "flatten"; "avg" or "max" over all dimensions after (N, C); "tokens" (mean over dimension 1 of
            (N, T, D)); "first" (the first token).
        transform: what is done then, e.g. a `Projection`, for all layers or by layer; see `robustknn.fitting`.
        normalize: scale each vector to unit length.
        center: vectors to subtract (after normalising, as in DkNN's reference code), by layer.

    Raises:
        InputError: a layer does not exist (close matches are named), the model is no module, or it normalises
            by the statistics of each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] | None = None,
        *,
        pool: str | Mapping[str, str] = "flatten",
        transform: Transform | Mapping[str, Transform] | None = None,
        normalize: bool = False,
        center: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be a torch.nn.Module, not {type(model).__name__}.")
        if not isinstance(layers, (str, Iterable)) and layers is not None:
            raise InputError(f"layers must be a layer's name or a list of names, not {brief(layers)}.")
        names = [layers] if isinstance(layers, str) else list(layers if layers is not None else [OUTPUT])
        if not names:
            raise InputError("no layer was chosen; name at least one, or pass layers=None for the model's output.")
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile ignores hooks
        self.taps = tuple(Tap.parse(name) for name in names)
        self.layers = tuple(str(tap) for tap in self.taps)
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {list(self.layers)} name the same tap twice.")
        _check_taps(self.model, self.taps)
        _check_statistics(self.model)
        self.pool = self._by_layer(pool)
        self.transform = self._transforms(transform)
        self.normalize = bool(normalize)
        self.center = self._check_center(center or {})
        self._copied: set[Tap] = set()

    def _by_layer(self, pool: str | Mapping[str, str]) -> dict[str, str]:
        chosen = dict.fromkeys(self.layers, pool) if isinstance(pool, str) else dict(pool)
        for layer in chosen:
            if layer not in self.layers:
                raise unknown_name("layer in pool:", layer, self.layers)
        return {layer: check_choice(chosen.get(layer, "flatten"), POOLS, "pool") for layer in self.layers}

    def _transforms(self, transform: Transform | Mapping[str, Transform] | None) -> dict[str, Transform]:
        if transform is None:
            return {}
        chosen = dict(transform) if isinstance(transform, Mapping) else dict.fromkeys(self.layers, transform)
        for layer in chosen:
            if layer not in self.layers:
                raise unknown_name("layer in transform:", layer, self.layers)
        return {layer: check_transform(chosen[layer]) for layer in self.layers if layer in chosen}

    def _check_center(self, center: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for layer, vector in center.items():
            if layer not in self.layers:
                raise unknown_name("layer in center:", layer, self.layers)
            if vector.ndim != 1:
                raise InputError(f"the center of {layer!r} has shape {tuple(vector.shape)}; pass a vector (D,).")
        return dict(center)

    # ------------------------------------------------------------------------------------- calling

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Features of a batch, differentiable when gradients are on."""
        return self.with_output(x)[0]

    def with_output(self, x: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Features and what the model returned, from one forward pass."""
        found, output = self._forward(x)
        vectors = {name: self._vector(name, found[tap], _padded(x))[: len(x)] for name, tap in self._named()}
        return vectors, _drop_padding(output, x)

    def live(self, x: Tensor) -> tuple[dict[str, Tensor], Any]:
        """As `with_output`, in the mode that the model is in and without padding: for training."""
        self._copied |= set(self.taps)  # before a later layer overwrites one in place; a second pass would cost more
        found, _, output = self._hooked(x, padded=False)
        return {name: self._vector(name, found[tap], len(x)) for name, tap in self._named()}, output

    def _named(self) -> Iterable[tuple[str, Tap]]:
        return zip(self.layers, self.taps, strict=True)

    def _forward(self, x: Tensor) -> tuple[dict[Tap, Tensor], Any]:
        with evaluating(self.model):
            found, versions, output = self._hooked(x)
            # A later layer that works in place has overwritten what was read: copy it there, from now on.
            overwritten = {tap for tap, version in versions.items() if found[tap]._version != version}
            if overwritten:
                self._copied |= overwritten
                found, _, output = self._hooked(x)
        return found, output

    def _hooked(self, x: Tensor, padded: bool = True) -> tuple[dict[Tap, Tensor], dict[Tap, int], Any]:
        found: dict[Tap, Tensor] = {}
        versions: dict[Tap, int] = {}
        handles = []
        modules = dict(self.model.named_modules())

        def keep(tap: Tap, value: Any) -> None:
            tensor = _tensor_of(value, tap)
            if tap in self._copied or tensor.is_inference():
                found[tap] = tensor.clone()
            else:
                found[tap], versions[tap] = tensor, tensor._version

        try:
            for name in {tap.module for tap in self.taps}:
                taps = [tap for tap in self.taps if tap.module == name and not tap.is_output]
                handles += list(_attach(modules[name], taps, keep))
            output = _run(self.model, x, padded)
        finally:
            for handle in handles:
                handle.remove()
        for tap in self.taps:
            if tap.is_output:
                keep(tap, output)
            if tap not in found:
                where = f"call {tap.call} of {tap.module!r} " if tap.call else f"{str(tap)!r} "
                raise InputError(f"{where}was not reached in the forward pass; choose a layer that the model runs.")
        return found, versions, output

    def _vector(self, layer: str, value: Tensor, rows: int) -> Tensor:
        """(N, …) → (N, D): pooled, transformed, flattened, normalised, centred."""
        if value.ndim < 2 or len(value) != rows:
            raise InputError(
                f"layer {layer!r} gives shape {tuple(value.shape)} for {rows} samples; a feature needs (N, …) with "
                "samples first."
            )
        if not value.is_floating_point():
            raise InputError(f"layer {layer!r} gives {value.dtype}; a feature needs floating point numbers.")
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        pool = self.pool[layer]
        if pool in ("avg", "max") and value.ndim > 2:
            flat = value.flatten(2)
            value = flat.mean(2) if pool == "avg" else flat.amax(2)
        elif pool in ("tokens", "first"):
            if value.ndim != 3:
                raise InputError(f"pool {pool!r} needs (N, T, D); layer {layer!r} gives {tuple(value.shape)}.")
            value = value.mean(1) if pool == "tokens" else value[:, 0]
        if layer in self.transform:
            value = self.transform[layer](value)
        value = value.flatten(1)
        if self.normalize:
            value = nn.functional.normalize(value, dim=1)
        if layer in self.center:
            center = self.center[layer].to(value)
            if len(center) != value.shape[1]:
                raise InputError(f"the center of {layer!r} has {len(center)} numbers for {value.shape[1]}; match them.")
            value = value - center
        return value

    def logits(self, x: Tensor) -> Tensor:
        """The model's own output (N, C), in eval mode, without reading features.

        Raises:
            InputError: the model does not return a (N, C) tensor (an encoder has no class scores).
        """
        with evaluating(self.model):
            output = _drop_padding(_run(self.model, x), x)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise InputError("the model returns no class scores (N, C); choose an objective on features instead.")
        return output

    # ------------------------------------------------------------------------------------ settings

    def select(self, layers: Sequence[str]) -> FeatureExtractor:
        """The same extractor reading only some of its layers, or others of the same model."""
        names = [str(Tap.parse(layer)) for layer in layers]
        return FeatureExtractor(
            self.model,
            names,
            pool={layer: self.pool[layer] for layer in names if layer in self.pool},
            transform={layer: self.transform[layer] for layer in names if layer in self.transform},
            normalize=self.normalize,
            center={layer: self.center[layer] for layer in names if layer in self.center},
        )

    def centered(self, means: Mapping[str, Tensor]) -> FeatureExtractor:
        """The same extractor with other centers."""
        return self._with(self.transform, means)

    def transformed(self, transform: Transform | Mapping[str, Transform]) -> FeatureExtractor:
        """The same extractor with other transforms."""
        return self._with(transform, self.center)

    def _with(self, transform: Transform | Mapping[str, Transform], center: Mapping[str, Tensor]) -> FeatureExtractor:
        return FeatureExtractor(
            self.model, self.layers, pool=self.pool, transform=transform, normalize=self.normalize, center=center
        )

    def preprocessing(self) -> dict[str, Any]:
        """How features are made from what layers give, as JSON: layers, pooling, transforms, normalising, centers."""
        transforms = {layer: transform.describe() for layer, transform in self.transform.items()}
        return {
            **({"transform": transforms} if transforms else {}),
            "layers": list(self.layers),
            "pool": {layer: self.pool[layer] for layer in self.layers},
            "normalize": self.normalize,
            "center": {k: store.fingerprint_tensors({k: v}) for k, v in sorted(self.center.items())},
        }

    def fingerprint(self) -> str:
        """A sha256 of the model: its weights and buffers, and the structure it prints."""
        return model_fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter or buffer lives (the CPU when it has none)."""
        tensor = _first_tensor(self.model)
        return torch.device("cpu") if tensor is None else tensor.device

    def place(self, x: Tensor) -> Tensor:
        """x on the model's device in the model's floating point type (as it is for a model without weights)."""
        tensor = _first_tensor(self.model)
        return x if tensor is None else x.to(tensor)

    def to(self, device: torch.device | str) -> FeatureExtractor:
        """Move the model, the centers and the transforms (in place); returns itself."""
        self.model.to(device)
        self.center = {layer: vector.to(device) for layer, vector in self.center.items()}
        self.transform = {layer: transform.to(device) for layer, transform in self.transform.items()}
        return self

    def __repr__(self) -> str:
        return f"FeatureExtractor({type(self.model).__name__}, layers={list(self.layers)})"


# ------------------------------------------------------------------------------------------- helpers


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def model_fingerprint(model: nn.Module) -> str:
    """A sha256 of a model's parameters and buffers (by name, dtype, shape, bytes) and of its printed structure."""
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return store.fingerprint_tensors(tensors, structure)


def _attach(module: nn.Module, taps: list[Tap], keep: Any) -> Iterator[Any]:
    """Hooks for the taps of one module; each counts the calls of its own."""
    calls = {"in": 0, "out": 0}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tap in taps:
            if tap.at_input and tap.call == calls["in"]:
                keep(tap, args + tuple(kwargs.values()))
        calls["in"] += 1

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        for tap in taps:
            if not tap.at_input and tap.call == calls["out"]:
                keep(tap, output)
        calls["out"] += 1

    if any(tap.at_input for tap in taps):
        yield module.register_forward_pre_hook(before, with_kwargs=True)
    if not all(tap.at_input for tap in taps):
        yield module.register_forward_hook(after)


def _check_taps(model: nn.Module, taps: Iterable[Tap]) -> None:
    """InputError for a tap on a module that does not exist, has another name, or allows no hook."""
    known = dict(model.named_modules())
    aliases = dict(model.named_modules(remove_duplicate=False))
    for tap in taps:
        if tap.module not in aliases:
            raise unknown_name("layer", tap.module, (name for name in known if name))
        if tap.module not in known:
            first = next(name for name, module in known.items() if module is aliases[tap.module])
            raise InputError(f"layer {tap.module!r} is {first!r} under another name; its second call is '{first}@1'.")
        if isinstance(known[tap.module], torch.jit.ScriptModule) and not tap.is_output:
            raise InputError(f"layer {str(tap)!r} is scripted and cannot be read; pass the model it was made from.")


def _check_statistics(model: nn.Module) -> None:
    """InputError for batch normalisation by the batch itself: a sample's features would depend on the others."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"module {name!r} normalises by the statistics of each batch, also in eval mode, so that a decision "
                "would depend on the other inputs; use track_running_stats=True."
            )


def _tensor_of(value: Any, tap: Tap) -> Tensor:
    if tap.at_input:
        tensors = [v for v in value if isinstance(v, Tensor)]
        place = tap.item or 0
        if place < len(tensors):
            return tensors[place]
        raise InputError(f"layer {str(tap)!r} receives {len(tensors)} tensors; choose one of these, from [0].")
    if tap.item is not None:
        items = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(items, (tuple, list)) or tap.item >= len(items):
            held = f"with {len(items)} items" if isinstance(items, (tuple, list)) else "without items"
            raise InputError(f"layer {str(tap)!r}: the module gives a {type(value).__name__} {held}; choose another.")
        value = items[tap.item]
    if not isinstance(value, Tensor):
        raise InputError(
            f"layer {str(tap)!r} gives a {type(value).__name__}, not a tensor; choose one of its items, e.g. "
            f"'{tap.module or OUTPUT}[0]', or a layer inside it."
        )
    return value


def _padded(x: Tensor) -> int:
    """How many rows the model sees for a batch."""
    if x.device.type != "cpu" or not len(x):
        return len(x)
    return max(MIN_ROWS, -(-len(x) // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def _run(model: nn.Module, x: Tensor, padded: bool = True) -> Any:
    try:
        if not padded:
            return model(x)
        # A copy, because a model may work in place on what it is given.
        filling = x[:1].expand(_padded(x) - len(x), *x.shape[1:])
        return model(torch.cat([x, filling]).contiguous() if x.device.type == "cpu" else x.clone())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if isinstance(error, RobustKNNError):
            raise
        raise InputError(
            f"the model cannot run on inputs of shape {tuple(x.shape)}, dtype {x.dtype}: {reason(error)}."
        ) from error


def _drop_padding(output: Any, x: Tensor) -> Any:
    """What the model returned for the rows of x alone: tensors, also inside tuples, lists and tables."""
    rows = _padded(x)
    return pytree.tree_map_only(Tensor, lambda t: t[: len(x)] if t.ndim and len(t) == rows else t, output)


def _first_tensor(model: nn.Module) -> Tensor | None:
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor
    return None
