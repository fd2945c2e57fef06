"""ReferenceSet: the labelled features a nearest-neighbor classifier decides by."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustknn import store
from robustknn.batching import batches, count
from robustknn.checks import as_tensor, check_choice, check_finite, check_inputs, check_labels, check_positive_int
from robustknn.errors import InputError, IntegrityError, NotReadyError, brief, unknown_name
from robustknn.features import FeatureExtractor, Tap
from robustknn.neighbors.exact import normalize_
from robustknn.payload import TopPayload, labels_of, likeliest, settings_of, softmax, tensors_of
from robustknn.progress import Progress, Silent
from robustknn.transforms.base import Transform, restored

KIND, SCHEMA = "references", 2
UNNAMED = "vectors"
"""The name of the layer of vectors that came without a model."""
Payload = Callable[[Tensor], Tensor | TopPayload]
Alter = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps inputs (B, …), their labels (B,) and places in the data (B,) to the inputs that become references."""
LABELS = ("data", "payload")


@dataclass
class _Layer:
    """One layer's vectors, as they are ("raw") or at unit length with the lengths kept beside them."""

    vectors: Tensor
    lengths: Tensor | None = None
    used: bool = False  # somebody relies on this storage in its present form: an index, or the caller it belongs to
    digest: str | None = None
    other: _Layer | None = None  # a copy in the other form, where both are needed

    def fingerprint(self) -> str:
        """A sha256 of the vectors as they came, whatever form they have now."""
        if self.digest is None:
            self.digest = store.fingerprint_tensors({"vectors": self.vectors})
        return self.digest


class ReferenceSet:
    """Features per layer, labels, and what is kept beside them: payload, images, the model's fingerprint.

    A reference's id is its place, 0..n − 1, in the order in which the data was read.

    Build it from data with `ReferenceSet.build`, from vectors you have with `from_vectors`, or `load` it.

    Attributes:
        labels: (n,) int64, classes 0..n_classes − 1.
        n_classes: the number of classes, each with at least one reference (but see `labelled`).
        labelled: whether the labels came with the data. Of unlabelled references they are the classes of the largest
            payload, and there are as many classes as the payload has columns, some maybe without a reference.
        stored_payload: (n, M) or None: e.g. the softmax vector of every reference, whole or its largest numbers.
        images: (n, …) or None: the inputs, kept for galleries and for attacks that start from them.
        features: the extractor that made the features, or None when only vectors are known.
        made_by: what the inputs were made by, as JSON, where they are not the data themselves (an attack); or None.
    """

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        labels: Any,
        *,
        n_classes: int | None = None,
        payload: Tensor | TopPayload | None = None,
        images: Tensor | None = None,
        features: FeatureExtractor | None = None,
        model_fingerprint: str | None = None,
        preprocessing: dict[str, Any] | None = None,
        made_by: dict[str, Any] | None = None,
        labelled: bool = True,
    ) -> None:
        if not vectors:
            raise InputError("a reference set needs the vectors of at least one layer.")
        self._layers = {name: _Layer(v.detach()) for name, v in vectors.items()}
        n = {len(v) for v in vectors.values()}
        if len(n) != 1:
            raise InputError(f"the layers hold different numbers of references: {sorted(n)}; pass one row each.")
        if n == {0}:
            raise InputError("there is no reference; pass at least one.")
        count = n.pop()
        for what, value in (("payload rows", payload), ("images", images)):
            if value is not None and len(value) != count:
                raise InputError(f"there are {len(value)} {what} for {count} references; pass one each.")
        self.labelled = labelled and labels is not None
        if labels is None:
            self.labels, self.n_classes = labels_of(payload, n_classes)
        else:
            self.labels = check_labels(labels, count, n_classes, "reference labels")
            self.n_classes = n_classes if n_classes and not labelled else check_classes(self.labels, n_classes)
        self.stored_payload = payload
        self.images = images
        self.features = features
        self.model_fingerprint = model_fingerprint
        self.preprocessing = preprocessing
        self.made_by = made_by
        self._content: str | None = None  # stands for vectors, labels and payload where another keeps hashes of them

    # ------------------------------------------------------------------------------------- building

    @classmethod
    @torch.inference_mode(False)  # vectors made in that mode could neither be normalised in place nor attacked
    @torch.no_grad()
    def build(
        cls,
        features: FeatureExtractor,
        data: Any,
        *,
        n_classes: int | None = None,
        payload: str | Payload | None = None,
        labels: str = "data",
        keep_images: bool = False,
        alter: Alter | None = None,
        made_by: dict[str, Any] | None = None,
        batch_size: int = 256,
        progress: Progress | None = None,
    ) -> ReferenceSet:
        """Run the network once over the data and keep each layer's features.

        Every layer's storage is allocated once and written in place, so that the peak memory is the
        references plus one batch.

        Args:
            features: the extractor; its layers are the set's layers.
            data: (x, y), a split, a torch Dataset or a DataLoader; x in the model's input range.
            n_classes: the number of classes; by default the largest label plus one.
            payload: "softmax" keeps the model's softmax vector of every reference; a callable maps the
                model's output (B, …) to what is kept (B, M), such as `TopSoftmax(20)`; None keeps nothing.
            labels: "data" takes the labels that come with the data; "payload" takes the class of the largest payload,
                for data without labels (`x` alone, or whatever labels are there are not looked at), and as many
                classes as the payload has columns: not every one needs a reference then.
            keep_images: keep the inputs too (as 8 bits where that loses nothing).
            alter: maps each batch (x, y, places in the data) to the inputs that become references, such as an attack;
                labels stay. `made_by` says what it does, as JSON, and is kept with the set.
            batch_size: samples a forward pass.
            progress: where to report.

        Raises:
            InputError: bad data (see the message), a class without reference, features that are not finite or
                not of one length.
        """
        check_extractor(features)
        own = check_choice(labels, LABELS, "labels") == "data"
        n = count(data)
        if not n:
            raise InputError("there is no reference in the data; pass at least one sample.")
        keep = _Keeper(n, features, payload, keep_images)
        progress = progress or Silent()
        progress.start("reading references" if alter is None else "making references", n)
        try:
            for given, y in batches(data, check_positive_int(batch_size, "batch_size"), labelled=own):
                x = check_inputs(given, what=keep.here())
                keep.take(x if alter is None else alter(x, y, keep.next_places(len(x))), y)
                progress.advance(len(x))
        finally:
            progress.stop()
        keep.finish()
        return cls(
            keep.vectors,
            keep.labels if own else None,
            n_classes=n_classes,
            payload=keep.payload,
            images=_compact(keep.images),
            features=features,
            model_fingerprint=features.fingerprint(),
            preprocessing=features.preprocessing(),
            made_by=made_by,
        )

    @classmethod
    def from_vectors(
        cls,
        vectors: Any,
        labels: Any = None,
        *,
        features: FeatureExtractor | None = None,
        n_classes: int | None = None,
        payload: Tensor | TopPayload | None = None,
        images: Tensor | None = None,
    ) -> ReferenceSet:
        """References from embeddings that exist already.

        Args:
            vectors: tensor or array (n, D) of the extractor's single layer, or these by layer. They are used as
                they are, neither copied nor changed (searching by cosine needs a copy, unless they have unit
                length and the metric is "ip"); check that `features` gives the same vectors for the same inputs.
            labels: (n,) integers; None takes the class of the largest payload.
            features: the extractor that maps an input to such vectors; without it the set can be searched but
                no input can be classified or attacked.
        """
        if features is not None:
            check_extractor(features)
        if not isinstance(vectors, Mapping):
            if features is not None and len(features.layers) > 1:
                raise InputError(f"the extractor reads {len(features.layers)} layers; pass the vectors by layer.")
            vectors = {UNNAMED if features is None else features.layers[0]: vectors}
        vectors = {layer: as_tensor(value, f"the vectors of {layer!r}") for layer, value in vectors.items()}
        for layer, value in vectors.items():
            if value.ndim != 2 or not value.is_floating_point():
                raise InputError(f"the vectors of {layer!r} must be floating point (n, D), not {tuple(value.shape)}.")
            check_finite(value, f"the vectors of {layer!r}")
            if features is not None and layer not in features.layers:
                raise unknown_name("layer of the vectors:", layer, features.layers)
        made = cls(
            vectors,
            labels,
            n_classes=n_classes,
            payload=payload,
            images=images,
            features=features,
            model_fingerprint=None if features is None else features.fingerprint(),
            preprocessing=None if features is None else features.preprocessing(),
        )
        for held in made._layers.values():
            held.used = True
        return made

    @classmethod
    def over(
        cls,
        vectors: Mapping[str, Tensor],
        labels: Tensor,
        *,
        lengths: Mapping[str, Tensor],
        content: str,
        **further: Any,
    ) -> ReferenceSet:
        """References in storage that another keeps and nobody may change, such as arrays mapped from files.

        Args:
            vectors: (n, D) by layer, at unit length for the layers of `lengths`; neither copied nor read through.
            labels: (n,) int64.
            lengths: (n,) by layer: those that the vectors had.
            content: a hash of vectors, labels and payload, which stands for them in the fingerprint.
            further: what the constructor takes; `labelled=False` says that the labels are the payload's classes.
        """
        made = cls(vectors, labels, **further)
        made._content = content
        for layer, held in made._layers.items():
            held.used, held.lengths = True, lengths.get(layer)
        return made

    # -------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in order."""
        return tuple(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        return next(iter(self._layers.values())).vectors.device

    def layer(self, name: str) -> str:
        """The canonical name of a layer of this set; InputError names close matches."""
        name = str(Tap.parse(name)) if name not in self._layers else name
        if name not in self._layers:
            raise unknown_name("reference layer", name, self._layers)
        return name

    def dim(self, layer: str) -> int:
        """The length of a layer's vectors."""
        return self._layers[self.layer(layer)].vectors.shape[1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def vectors(self, layer: str, unit: bool = False) -> tuple[Tensor, Tensor | None]:
        """A layer's storage to search in, (n, D), and for `unit` the lengths (n,) the vectors had.

        Vectors mapped from a disk are given as they came, without lengths: to change them would pull them into memory.
        Unit length is made in place, once, when nobody relies on the raw vectors; when somebody does, the
        other form is a copy, which doubles the layer's memory (a warning says so). Raw vectors are made of
        those at unit length again up to rounding.
        """
        held = self._layers[self.layer(layer)]
        if held.other is not None and unit == (held.other.lengths is not None):
            held = held.other
        if unit == (held.lengths is not None):
            held.used = True
            return held.vectors, held.lengths
        if unit and store.is_mapped(held.vectors):
            held.used = True
            return held.vectors, None
        if held.used:
            size = held.vectors.numel() * held.vectors.element_size() / 2**30
            if size > 0.25:
                warnings.warn(
                    f"layer {layer!r} is needed both with its raw and its unit-length vectors: a copy of "
                    f"{size:.1f} GiB is made; use one metric to avoid it.",
                    stacklevel=4,
                )
            held.other = _Layer(held.vectors.clone(), None if held.lengths is None else held.lengths.clone())
            held = held.other
        else:
            held.fingerprint()  # while the vectors are as they came
        if unit:
            held.lengths = normalize_(held.vectors)
        else:
            held.vectors *= held.lengths[:, None]  # type: ignore[index]
            held.lengths = None
        held.used = True
        return held.vectors, held.lengths

    def labelled_by_payload(self) -> ReferenceSet:
        """The same references (their storage shared) under the class of their largest payload."""
        if self.stored_payload is None:
            raise NotReadyError("this reference set keeps no payload; build it with payload='softmax'.")
        labels = likeliest(self.stored_payload).to(self.labels.device)
        if torch.equal(labels, self.labels):
            return self
        made = copy.copy(self)
        made.labels, made.labelled = labels, False
        if self._content is not None:
            made._content = store.fingerprint_config({"content": self._content, "labels": "payload"})
        return made

    def rows(self, layer: str, ids: Tensor) -> Tensor:
        """The raw vectors of references, for ids of any shape: (*ids.shape, D)."""
        held = self._layers[self.layer(layer)]
        flat = ids.reshape(-1).to(held.vectors.device)
        rows = held.vectors.index_select(0, flat)
        if held.lengths is not None:
            rows = rows * held.lengths.index_select(0, flat)[:, None]
        return rows.view(*ids.shape, rows.shape[1])

    def image(self, ids: Tensor) -> Tensor:
        """The kept inputs of references, as floating point; NotReadyError when none were kept."""
        if self.images is None:
            raise NotReadyError("this reference set keeps no images; build it with keep_images=True.")
        return as_float_images(self.images[ids.to(self.images.device)])

    def extractor(self) -> FeatureExtractor:
        """The extractor; NotReadyError when the set was made from vectors alone."""
        if self.features is None:
            raise NotReadyError(
                "this reference set knows no model; pass features=FeatureExtractor(model, layers) when loading "
                "or making it."
            )
        return self.features

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceSet:
        """References are shared, never copied behind the user's back (scikit-learn's clone deep-copies)."""
        return self

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}: {v.vectors.shape[1]}" for k, v in self._layers.items())
        return f"ReferenceSet({len(self)} references, {self.n_classes} classes, {{{shapes}}})"

    # ------------------------------------------------------------------------------------ transport

    def fingerprint(self) -> str:
        """A sha256 of what decides: vectors as they came, labels, payload, model and preprocessing."""
        if self._content is not None:
            made_with = {"model": self.model_fingerprint, "preprocessing": self.preprocessing}
            return store.fingerprint_config({"content": self._content, **made_with})
        tensors = {"labels": self.labels, **tensors_of(self.stored_payload)}
        said = {
            "vectors": [held.fingerprint() for held in self._layers.values()],
            "model": self.model_fingerprint,
            "preprocessing": self.preprocessing,
            **settings_of(self.stored_payload),
        }
        return store.fingerprint_tensors(tensors, store.fingerprint_config(said))

    def to(self, device: torch.device | str) -> ReferenceSet:
        """Move vectors, labels, payload and images (in place); the extractor's model moves too."""
        for held in self._layers.values():
            held.vectors = held.vectors.to(device)
            held.lengths = None if held.lengths is None else held.lengths.to(device)
            held.other = None
        self.labels = self.labels.to(device)
        for name in ("stored_payload", "images"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        if self.features is not None:
            self.features.to(device)
        return self

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the set as an artifact directory (`.npy` files and a sealed manifest, no pickle)."""
        meta = {
            "layers": list(self._layers),
            "shapes": {name: list(held.vectors.shape) for name, held in self._layers.items()},
            "dtype": {name: str(held.vectors.dtype) for name, held in self._layers.items()},
            "vectors": [held.fingerprint() for held in self._layers.values()],
            "n_classes": self.n_classes,
            "model_fingerprint": self.model_fingerprint,
            "preprocessing": self.preprocessing,
            "made_by": self.made_by,
            **settings_of(self.stored_payload),
            **({} if self.labelled else {"labelled": False}),
        }
        with store.artifact(Path(path), KIND, SCHEMA, meta, overwrite) as folder:
            for place, held in enumerate(self._layers.values()):
                store.save_array(folder / f"layer-{place}.npy", held.vectors)
                if held.lengths is not None:
                    store.save_array(folder / f"layer-{place}-lengths.npy", held.lengths)
            if self.features is not None:
                save_preprocessing(folder, self._layers, self.features)
            kept = {"labels": self.labels, **tensors_of(self.stored_payload)}
            if self.images is not None:
                kept["images"] = self.images
            for name, value in kept.items():
                store.save_array(folder / f"{name}.npy", value)

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls,
        path: str | Path,
        features: FeatureExtractor | nn.Module | None = None,
        mapped: bool = False,
    ) -> ReferenceSet:
        """Read a saved set.

        Args:
            path: what `save` wrote.
            features: the extractor that will map inputs to features, or the model alone (the extractor is
                then made as it was). It must have the model and the preprocessing that the set was made with
                (the fingerprints are compared), and may read fewer layers.
            mapped: leave vectors and images on the disk and read them as they are needed.

        Raises:
            IntegrityError: a file is missing, truncated or altered, or the set was made with another model
                or another preprocessing.
        """
        manifest = store.read_manifest(Path(path), KIND, SCHEMA)
        meta = manifest.meta

        def array(name: str, mapped: bool = False) -> Tensor | None:
            return store.load_array(manifest.file(name), mapped) if name in manifest.files else None

        names = list(meta["layers"])
        if features is not None:
            features = restored_extractor(Path(path), meta, features)
            names = list(features.layers) if names == [UNNAMED] else names
        layers = {name: array(f"layer-{place}.npy", mapped) for place, name in enumerate(names)}
        labels = array("labels.npy")
        if labels is None or any(v is None for v in layers.values()):
            raise IntegrityError(f"{str(path)!r} lacks labels or vectors; make the reference set again.")
        payload: Tensor | TopPayload | None = array("payload.npy")
        if "payload" in meta:
            values, classes = (store.load_array(manifest.file(f"payload-{part}.npy")) for part in ("values", "classes"))
            payload = TopPayload(values, classes, **meta["payload"])
        made = cls(
            {name: v for name, v in layers.items() if v is not None},
            labels if meta.get("labelled", True) else None,
            n_classes=meta["n_classes"],
            payload=payload,
            images=array("images.npy", mapped),
            features=features,
            model_fingerprint=meta["model_fingerprint"],
            preprocessing=meta["preprocessing"],
            made_by=meta.get("made_by"),
        )
        for place, held in enumerate(made._layers.values()):
            held.lengths = array(f"layer-{place}-lengths.npy")
            held.digest = meta["vectors"][place]
        return made


# ------------------------------------------------------------------------------------------- helpers


class _Keeper:
    """Storage for n references, allocated when the first batch shows the shapes."""

    def __init__(self, n: int, features: FeatureExtractor, payload: str | Payload | None, images: bool) -> None:
        if payload is not None and payload != "softmax" and not callable(payload):
            raise InputError(f"payload must be 'softmax', a callable or None, not {brief(payload)}.")
        self._n, self._features, self._done = n, features, 0
        self._make: Payload | None = softmax if isinstance(payload, str) else payload
        self._images = images
        self.vectors: dict[str, Tensor] = {}
        self.labels = torch.empty(n, dtype=torch.int64)
        self.payload: Tensor | TopPayload | None = None
        self.images: Tensor | None = None

    def finish(self) -> None:
        if self._done != self._n:
            raise InputError(f"the data gave {self._done} samples where it announced {self._n}.")

    def here(self) -> str:
        """How to speak of the next batch."""
        return f"the batch that starts at sample {self._done}"

    def next_places(self, count: int) -> Tensor:
        """The places in the data of the next samples, (count,)."""
        return torch.arange(self._done, self._done + count)

    def take(self, x: Tensor, y: Tensor) -> None:
        rows = slice(self._done, self._done + len(x))
        if rows.stop > self._n:
            raise InputError(f"the data gave more than the {self._n} samples it announced.")
        found, output = self._features.with_output(self._features.place(x))
        for layer, value in found.items():
            check_finite(value, f"layer {layer!r} of {self.here()}")
            self.vectors[layer] = self._put(rows, value, self.vectors.get(layer), f"features of layer {layer!r}")
        self.labels[rows] = y.cpu()
        if self._make is not None:
            self._put_payload(rows, self._make(output), len(x))
        if self._images:
            self.images = self._put(rows, x, self.images, "images")
        self._done = rows.stop

    def _put_payload(self, rows: slice, value: Any, n: int) -> None:
        if isinstance(value, TopPayload) and len(value) == n:
            held = self.payload.tensors() if isinstance(self.payload, TopPayload) else {}
            parts = [self._put(rows, t, held.get(name), "payload") for name, t in value.tensors().items()]
            self.payload = TopPayload(parts[0], parts[1], **value.settings())
            return
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != n:
            raise InputError(f"the payload must be a tensor ({n}, M) for {n} samples; see payload=.")
        room = self.payload if isinstance(self.payload, Tensor) else None
        self.payload = self._put(rows, value, room, "payload")

    def _put(self, rows: slice, value: Tensor, room: Tensor | None, what: str) -> Tensor:
        """Write one batch into storage for all, made by the first batch."""
        if room is None:
            room = torch.empty(self._n, *value.shape[1:], dtype=value.dtype, device=value.device)
        if value.shape[1:] != room.shape[1:]:
            raise InputError(
                f"the {what} have shape {tuple(value.shape[1:])} in one batch and {tuple(room.shape[1:])} in another; "
                "give all samples one size."
            )
        room[rows] = value
        return room


def _compact(images: Tensor | None) -> Tensor | None:
    """Images as 8 bits when that gives every value back to the bit, else as they are."""
    if images is None or images.dtype != torch.float32:
        return images
    for part in images.split(1024):
        if not torch.equal((part * 255).round().clamp(0, 255).to(torch.uint8).to(part.dtype) / 255, part):
            return images
    return torch.cat([(part * 255).round().to(torch.uint8) for part in images.split(1024)])


def as_float_images(images: Tensor) -> Tensor:
    """Pixels in [0, 1]: 8-bit images are divided by 255, others are as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def check_classes(labels: Tensor, n_classes: int | None) -> int:
    """The number of classes of labels (n,); InputError when one has no reference."""
    counts = torch.bincount(labels, minlength=n_classes or 0)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        shown = ", ".join(map(str, empty[:5])) + (" …" if len(empty) > 5 else "")
        raise InputError(
            f"class {shown} of {len(counts)} has no reference and could never be predicted; add references or "
            "number the classes 0..C-1 without gaps."
        )
    return len(counts)


def save_preprocessing(folder: Path, layers: Iterable[str], features: FeatureExtractor) -> None:
    """Write what an extractor learned of these layers, beside what its `preprocessing` says of them."""
    for place, layer in enumerate(layers):
        if layer in features.center:
            store.save_array(folder / f"center-{place}.npy", features.center[layer])
        if layer in features.transform:
            store.save_tensors(folder / f"transform-{place}.safetensors", features.transform[layer].tensors())


def learned(path: Path, meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Transform]]:
    """What `save_preprocessing` wrote, centers and transforms by layer; IntegrityError for what is not what it was."""
    made, places = meta["preprocessing"], {layer: place for place, layer in enumerate(meta["layers"])}
    center = {layer: store.load_array(path / f"center-{places[layer]}.npy") for layer in made["center"]}
    for layer, vector in center.items():
        if store.fingerprint_tensors({layer: vector}) != made["center"][layer]:
            raise IntegrityError(f"the center of {layer!r} in {str(path)!r} is altered; restore it or make it again.")
    transform = {
        layer: restored(said, store.load_tensors(path / f"transform-{places[layer]}.safetensors"))
        for layer, said in made.get("transform", {}).items()
    }
    return center, transform


def restored_extractor(path: Path, meta: dict[str, Any], features: FeatureExtractor | nn.Module) -> FeatureExtractor:
    """The extractor that what is kept in a folder was made with.

    Args:
        path: a folder in which `save_preprocessing` wrote.
        meta: layers, model_fingerprint and preprocessing.
        features: the model alone, or an extractor that is to be the one, or to read fewer layers.

    Raises:
        IntegrityError: another model, or other features of the layers that it reads; a file is missing or altered.
    """
    if not isinstance(features, nn.Module):
        _check_made_with(path, meta, features)
        return features
    made = meta["preprocessing"]
    if made is None:
        extractor = FeatureExtractor(features, None if meta["layers"] == [UNNAMED] else meta["layers"])
    else:
        center, transform = learned(path, meta)
        extractor = FeatureExtractor(
            features, made["layers"], pool=made["pool"], transform=transform, normalize=made["normalize"], center=center
        )
    _check_made_with(path, meta, extractor)
    return extractor


def check_extractor(features: Any) -> None:
    """InputError for what is no extractor, such as the model alone."""
    if not isinstance(features, FeatureExtractor):
        hint = "; wrap the model: FeatureExtractor(model)" if isinstance(features, nn.Module) else ""
        raise InputError(f"features must be a FeatureExtractor, not {type(features).__name__}{hint}.")


def _check_made_with(path: Path, meta: dict[str, Any], features: FeatureExtractor) -> None:
    """Refuse an extractor of another model, or one that makes other features of the layers it reads."""
    if meta["model_fingerprint"] is not None and meta["model_fingerprint"] != features.fingerprint():
        raise IntegrityError(
            f"the references in {str(path)!r} were made with another model (its weights or structure differ); "
            "build them again with this model, or load the model they were made with."
        )
    made, now = meta["preprocessing"], features.preprocessing()
    held = meta["layers"] if made is None else made["layers"]
    if held == [UNNAMED] and len(features.layers) == 1:
        return
    unknown = [layer for layer in features.layers if layer not in held]
    if unknown:
        raise IntegrityError(
            f"the references in {str(path)!r} hold the layers {', '.join(held)}, not {', '.join(unknown)}; read only "
            "layers they hold, or build them again."
        )
    differing = [] if made is None else list(_differences(made, now))
    if differing:
        raise IntegrityError(
            f"the references in {str(path)!r} were made with other {', '.join(differing)}; use the same, or build "
            "them again."
        )


def _differences(made: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between two preprocessings of the layers of the second."""
    if made["normalize"] != now["normalize"]:
        yield f"normalisation (normalize={made['normalize']}, the extractor has {now['normalize']})"
    for layer, pool in now["pool"].items():
        if made["pool"][layer] != pool:
            yield f"pooling of {layer!r} ({made['pool'][layer]!r}, the extractor has {pool!r})"
        if made.get("transform", {}).get(layer) != now.get("transform", {}).get(layer):
            yield f"transform of {layer!r}"
        if made["center"].get(layer) != now["center"].get(layer):
            yield f"centering of {layer!r}"
