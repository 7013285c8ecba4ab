"""The run time: a bundle's engines and a method give explanations, without PyTorch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.engines import Activations, Networks, open_networks
from ccam_deploy.errors import BackendError, ImageError, OptionError, TargetError
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import (
    DEFAULT_METHOD,
    Batch,
    CollectionCAM,
    LayerPartition,
    Method,
    MethodResult,
    Stopwatch,
    make_method,
)
from ccam_deploy.methods.collection_cam.cost import Budget, Costs, Run, budgeted, validate_budget
from ccam_deploy.methods.collection_cam.cuda import DeviceCollectionCAM
from ccam_deploy.preprocess import Geometry, prepare_images
from ccam_deploy.targets import Targets, classes_of, pairs_of, per_image

Images = Floats | Sequence[Image.Image] | Image.Image
"""PIL images, one or several, or preprocessed input: [B, channels, H, W] float32."""
_Input = tuple[Floats, tuple[Geometry, ...]]

DEFAULT_BATCH = 16


class Explainer:
    """Explains images with one bundle. Safe to call from several threads; close it when done.

    now: seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        bundle: Bundle,
        networks: Networks,
        precision: str,
        batch_size: int = DEFAULT_BATCH,
        cuda_graphs: bool = True,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check_batch_size(batch_size)
        self.bundle = bundle
        self.networks = networks
        self.precision = precision
        self.batch_size = batch_size
        graphs = bundle.precision(precision)
        self._baseline = np.array(graphs.baseline_logits, np.float32)
        self._now = now
        channels = {layer.name: layer.channels for layer in bundle.manifest.layers}
        self._costs = Costs(channels, self._rehearse, now)
        self.on_device: DeviceCollectionCAM | None = None
        if networks.slots is not None:
            self.on_device = DeviceCollectionCAM(
                networks.slots,
                bundle.manifest,
                graphs.gradient_scale,
                self._baseline,
                batch_size,
                cuda_graphs,
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as asked or as fast as it could be, a line each."""
        return self.networks.notes + (self.on_device.notes if self.on_device else ())

    def explain(
        self,
        images: Images,
        targets: Targets = None,
        *,
        method: str | Method = DEFAULT_METHOD,
        top: int = 1,
        budget_ms: float | None = None,
    ) -> Explanation:
        """Explain the classifier's decisions on some images.

        images: [B, C, H, W] float32, preprocessed as the manifest says, or PIL images of any size
            and mode.
        targets: None for each image's best classes; a class for all images; or for each image a
            class or several, as numbers or names. Several classes share the image's backbone pass.
        method: a method with its options, such as GradCAM(layer="layer3"), or a name among
            ccam_deploy.methods.METHODS for its defaults.
        top: how many of the best classes to explain where targets is None.
        budget_ms: milliseconds that this call may take, PIL images to result; None for no bound.
            Collection-CAM's k_max is lowered, never raised, to the largest with which as many masks
            as there can be fit nine times out of ten, by what such calls cost; see `calibrate`.
            Other calls at the same time are not foreseen. All images are prepared first.
        Raises ImageError, TargetError or OptionError for what cannot be used, and OptionError for a
        budget in which not even k_min fits, before an engine runs.
        """
        clock = Stopwatch(self._now)
        chosen = make_method(method)
        validate_budget(budget_ms, chosen)
        if isinstance(images, np.ndarray) and images.ndim == 0:
            raise ImageError("a single number is no image")
        pictures = images if isinstance(images, np.ndarray | Sequence) else [images]
        wanted = per_image(targets, len(pictures), self.bundle.manifest)
        if not 1 <= top <= self.bundle.manifest.classes:
            raise TargetError(f"top is {top}; it must be 1 to {self.bundle.manifest.classes}")
        starts = range(0, len(pictures), self.batch_size)
        chunks = [slice(start, start + self.batch_size) for start in starts]
        pairs = [pairs_of(wanted[chunk], top) for chunk in chunks]
        inputs: Iterable[_Input] = (self._prepare(pictures[chunk], clock) for chunk in chunks)
        budget = None
        if budget_ms is not None:
            inputs = list(inputs)
            sizes = [(len(one[0]), len(own[0])) for one, own in zip(inputs, pairs, strict=True)]
            spent = clock.seconds["preprocess"]
            chosen, budget = self._costs.within(budget_ms, spent, sizes, budgeted(chosen))
        parts = [
            self._explain_batch(chosen, one, own, clock)
            for one, own in zip(inputs, pairs, strict=True)
        ]
        return self._assemble(chosen, parts, clock, budget)

    def require_method(self, method: str | Method) -> None:
        """Make sure that a method can run on this bundle, in a pass or two of its graphs.

        Args:
            method: As for `explain`.

        Raises:
            OptionError: The bundle lacks what the method needs; the message says how to get it.
            BackendError: A package that the method needs is missing.

        """
        chosen = make_method(method)
        image = self._noise(1)
        first = np.zeros(1, np.int64)
        batch = self._batch(image, self.networks.backbone(image), first, first)
        chosen.require_support(self.networks, batch)

    def calibrate(
        self, images: int = 1, classes: int = 1, method: str | Method | None = None
    ) -> None:
        """Measure what calls on so many images, with so many classes each, cost here.

        A call with `budget_ms` does so where it was not done before, for its own numbers and its
        method's layers, k_min and k_max. It takes as long as about twenty explanations, outside of
        the budget; where it is done ahead, no call waits for it. Later calls are taken to cost the
        same: where a machine has become busier, or less, calibrate again, with the load on it that
        calls will meet.
        Raises OptionError for numbers that no call can have.
        """
        if images < 1:
            raise OptionError(f"images is {images}; it must be at least 1")
        if not 1 <= classes <= self.bundle.manifest.classes:
            known = self.bundle.manifest.classes
            raise OptionError(f"classes is {classes}; it must be 1 to {known}")
        chosen = budgeted(make_method(method))
        starts = range(0, images, self.batch_size)
        for count in {min(self.batch_size, images - start) for start in starts}:
            self._costs.of(count, count * classes, chosen, anew=True)

    def preprocess(self, images: Floats | Sequence[Image.Image]) -> _Input:
        """Make the network's input [B, C, H, W] of PIL images; check an array that is one."""
        size = self.bundle.manifest.input
        if not isinstance(images, np.ndarray):
            for picture in images:
                if not isinstance(picture, Image.Image):
                    raise ImageError(
                        f"an image is a {type(picture).__name__}; "
                        "give PIL images or one float32 array"
                    )
            return prepare_images(images, size[1:], self.bundle.manifest.preprocessing)
        if images.dtype != np.float32 or images.shape[1:] != size:
            raise ImageError(
                f"images are {images.dtype}{list(images.shape)}; "
                f"the bundle takes float32[B, {', '.join(map(str, size))}]"
            )
        if not np.isfinite(images).all():
            raise ImageError("the images have NaN or infinite pixels")
        return images, ()

    def close(self) -> None:
        """Close the engines."""
        self.networks.close()

    def __enter__(self) -> Explainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prepare(self, pictures: Floats | Sequence[Image.Image], clock: Stopwatch) -> _Input:
        with clock.stage("preprocess"):
            return self.preprocess(pictures)

    def _noise(self, images: int) -> Floats:
        shape = images, *self.bundle.manifest.input
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def _rehearse(self, images: int, pairs: int) -> Run:
        """Calls on noise, with as many images and (image, class) pairs."""
        noise, classes = self._noise(images), self.bundle.manifest.classes
        owned = np.bincount(np.arange(pairs) % images)
        targets = [[n % classes for n in range(count)] for count in owned]

        def run(method: CollectionCAM) -> int:
            result = self.explain(noise, targets, method=method)
            return sum(int(np.count_nonzero(weights)) for weights in result.weights)

        return run

    def _explain_batch(
        self,
        method: Method,
        inputs: _Input,
        pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
        clock: Stopwatch,
    ) -> _Part:
        (images, geometries), (owner, codes) = inputs, pairs
        if self.on_device is not None and isinstance(method, CollectionCAM):
            logits, classes, results = self.on_device.explain(images, owner, codes, method, clock)
            _check_logits(logits)
            return _Part(logits, geometries, owner, classes, results)
        with clock.stage("backbone"):
            activations = self.networks.backbone(images)
        _check_logits(activations.logits)
        classes = classes_of(codes, owner, activations.logits)
        results = []
        for start in range(0, len(owner), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self._batch(images, activations, owner[part], classes[part])
            results.append(method.explain(self.networks, batch, clock))
        return _Part(activations.logits, geometries, owner, classes, results)

    def _batch(
        self,
        images: Floats,
        activations: Activations,
        owner: NDArray[np.int64],
        targets: NDArray[np.int64],
    ) -> Batch:
        manifest = self.bundle.manifest
        return Batch(
            images,
            activations,
            owner,
            targets,
            tuple(layer.name for layer in manifest.layers),
            self._baseline,
            self.batch_size,
            manifest.preprocessing.mean,
            manifest.preprocessing.std,
        )

    def _assemble(
        self,
        method: Method,
        parts: Sequence[_Part],
        clock: Stopwatch,
        budget: Budget | None,
    ) -> Explanation:
        results = [result for part in parts for result in part.results]
        masks = results[0].masks
        for result in results[1:]:
            masks = masks + result.masks
        return Explanation(
            saliency=np.concatenate([result.saliency for result in results]),
            raw_saliency=np.concatenate([result.raw_saliency for result in results]),
            targets=np.concatenate([part.targets for part in parts]),
            image_index=np.concatenate(
                [part.owner + index * self.batch_size for index, part in enumerate(parts)]
            ),
            logits=np.concatenate([part.logits for part in parts]),
            layers=tuple(map(_join_layers, zip(*(r.layers for r in results), strict=True))),
            masks=masks,
            weights=tuple(weights for result in results for weights in result.weights),
            mic=tuple(mic for result in results for mic in result.mic),
            timings=dict(clock.seconds),
            settings={
                "method": method.name,
                "options": dataclasses.asdict(method),
                "bundle": self.bundle.manifest.name,
                "backend": self.networks.backend,
                "precision": self.precision,
                "batch_size": self.batch_size,
                **({"budget": dataclasses.asdict(budget)} if budget else {}),
            },
            geometries=tuple(geometry for part in parts for geometry in part.geometries),
        )


@dataclass(frozen=True)
class _Part:
    """One batch's results; owner counts from the batch's first image."""

    logits: Floats
    geometries: tuple[Geometry, ...]
    owner: NDArray[np.int64]
    targets: NDArray[np.int64]
    results: list[MethodResult]


def _join_layers(parts: tuple[LayerPartition, ...]) -> LayerPartition:
    return LayerPartition(
        parts[0].name,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.quality for part in parts]),
    )


def _check_logits(logits: Floats) -> None:
    if not np.isfinite(logits).all():
        raise BackendError("the classifier gives NaN or infinite logits for these images")


def load(
    bundle: str | Path | Bundle,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    batch_size: int = DEFAULT_BATCH,
    threads: int = 0,
    slots: int = 1,
    cuda_graphs: bool = True,
) -> Explainer:
    """Open a bundle and its engines.

    backend: "auto" for the best that works here, or a backend by name.
    precision: "fp32", or "fp16", "int8" or "fp8" where the bundle has it.
    batch_size: how many images, and how many masked images, go through an engine at a time; it
        bounds memory.
    threads: threads inside an operator on a CPU; 0 lets the engine choose.
    slots: how many calls run on a GPU at a time, each on a stream with buffers of its own; more
        wait. A CPU's engines are shared by all.
    cuda_graphs: replay on a GPU what comes again at the same sizes; without, results are the same
        to the bit, and the stages of `timings` are finer.
    Raises BundleError, BackendError or OptionError.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    _check_batch_size(batch_size)
    networks = open_networks(opened, backend, precision, threads, slots)
    return Explainer(opened, networks, precision, batch_size, cuda_graphs)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")
