"""The run time: explains images with a bundle's engines, without PyTorch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import Bundle, read_bundle
from ccam_deploy.engines import Networks, open_networks
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.engines.cuda.graph_replay import CudaGraphs
from ccam_deploy.engines.cuda.parts import ImageParts
from ccam_deploy.errors import OptionError
from ccam_deploy.explanation import Explanation
from ccam_deploy.inputs import Images, Input, Inputs, require_fitting_parts, sequence_of
from ccam_deploy.kernels.cuda.bundled import offer_kernels
from ccam_deploy.methods import (
    DEFAULT_METHOD,
    BatchResult,
    CollectionCAM,
    Method,
    MethodResult,
    Stopwatch,
    make_method,
)
from ccam_deploy.methods.collection_cam.cost import Budget, Costs, Run, budgeted, validate_budget
from ccam_deploy.methods.collection_cam.cuda import CudaCollectionCAM, DeviceCollectionCAM
from ccam_deploy.methods.cuda.device_method import DeviceMethod
from ccam_deploy.methods.factory import MethodFactory
from ccam_deploy.preprocess import Geometry, Source, UnkeptSource
from ccam_deploy.targets import Targets, target_codes

DEFAULT_BATCH = 16


class Explainer:
    """Explains images with one bundle. Safe to call from several threads; close it when done.

    Args:
        bundle: The bundle.
        networks: Its engines.
        precision: The engines' precision.
        batch_size: The most images, and the most masked images, that run at a time.
        cuda_graphs: Capture a GPU's work, and replay it for calls of the same sizes; or what
            engines capture by themselves alone.
        now: Seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        bundle: Bundle,
        networks: Networks,
        precision: str,
        batch_size: int = DEFAULT_BATCH,
        cuda_graphs: CudaGraphs = True,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        _validate_batch_size(batch_size)
        self.bundle = bundle
        self.networks = networks
        self.precision = precision
        self.batch_size = batch_size
        self._now = now
        # A CPU's engines use all cores already.
        self._inputs = Inputs(bundle.manifest, batch_size, ahead=networks.slots is not None)
        graphs = bundle.precision(precision)
        self._methods = MethodFactory(
            bundle.manifest,
            networks,
            np.array(graphs.baseline_logits, np.float32),
            graphs.gradient_scale,
            batch_size,
            cuda_graphs,
        )
        channels = {layer.name: layer.channels for layer in bundle.manifest.layers}
        self._costs = Costs(channels, self._rehearse, now)

    @property
    def on_device(self) -> DeviceCollectionCAM | None:
        """Collection-CAM on a GPU, or None where it runs on the CPU."""
        return self._methods.on_device

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from the request or could be faster, a line each."""
        return self.networks.notes + self._methods.notes

    def explain(
        self,
        images: Images,
        targets: Targets = None,
        *,
        method: str | Method = DEFAULT_METHOD,
        budget_ms: float | None = None,
    ) -> Explanation:
        """Explain the classifier's decisions on some images.

        Args:
            images: [B, C, H, W] float32, preprocessed as the manifest says, or PIL images of any
                size and mode.
            targets: None for each image's best class; for all images, a class by number or name,
                or `Top(n)` for the n best; or for each image one of these or a list of them. All
                classes of an image share its backbone pass, and each is explained once.
            method: A method with its options, such as `GradCAM(layer="layer3")`, or a method's
                name for its defaults.
            budget_ms: Milliseconds that this call may take, from images to result; None for no
                limit. Collection-CAM's k_max is lowered to the largest that is expected to fit
                nine times out of ten, even with the most masks, by the measured cost of such
                calls; see `calibrate`. Concurrent calls are not accounted for. All images are
                prepared first.

        Returns:
            The maps of all (image, class) pairs, image by image.

        Raises:
            ImageError: An image cannot be used.
            TargetError: A target is not one of the classifier's classes.
            OptionError: The method or its options do not suit the bundle, or not even k_min fits
                the budget.
            BackendError: The engine fails, or gives values that are not finite.
        """
        clock = Stopwatch(self._now)
        requested = make_method(method)
        validate_budget(budget_ms, requested)
        pictures = sequence_of(images)
        plan = self._inputs.plan(target_codes(targets, len(pictures), self.bundle.manifest))
        inputs = self._inputs.batches(pictures, plan, clock)
        budget = None
        if budget_ms is not None:
            inputs = list(inputs)
            sizes = [(len(batch[0]), len(b.owner)) for batch, b in zip(inputs, plan, strict=True)]
            spent = clock.seconds["preprocess"]
            requested, budget = self._costs.within(budget_ms, spent, sizes, budgeted(requested))
        runner = self._methods.implement(requested)
        geometries: list[Geometry] = []
        results = []
        for batch, (prepared, places) in zip(plan, inputs, strict=True):
            geometries += places
            results.append(
                runner.run(prepared, batch.owner, batch.codes, self._methods.context, clock)
            )
        settings = self._settings(requested, budget)
        source = Source(self.bundle.manifest, pictures, tuple(geometries))
        return self._assemble(results, source, settings, dict(clock.seconds))

    def explain_parts(
        self, images: ImageParts, targets: Targets = None, *, method: str | Method = DEFAULT_METHOD
    ) -> Explanation:
        """Explain images of which some lie in the GPU's memory, where their maps are put too.

        Nothing is copied to the host but the results. Methods that do not run on the GPU as a
        whole, such as CAM and those of pixels, bring the images to the host and the maps back. NaN
        or infinite pixels in the GPU's memory are found by the logits that they give.

        Args:
            images: The images, and where their maps go.
            targets: As for `explain`, but one class for each image.
            method: As for `explain`.

        Returns:
            The maps, which are on the host as well. They cannot be drawn over the images.

        Raises:
            ImageError: The images have another size.
            OptionError: There is no GPU, or the method does not suit the bundle.
            TargetError: A target is not one of the classifier's classes, or there are several.
            BackendError: The engine fails, or gives values that are not finite.
        """
        slots, manifest = self.networks.slots, self.bundle.manifest
        if slots is None:
            raise OptionError(f"images are in a GPU's memory, and {self.networks.backend} is not")
        requested = make_method(method)
        codes = target_codes(targets, len(images), manifest)
        require_fitting_parts(images, codes, manifest)
        source = UnkeptSource(manifest, (), ())
        runner = self._methods.implement(requested)
        if not isinstance(runner, CudaCollectionCAM | DeviceMethod):
            with slots.take() as slot:
                fetched = slot.run(partial(images.fetch, slot.device))
            found = self.explain(fetched, targets, method=requested)
            with slots.take() as slot:
                slot.run(partial(images.give, slot.device, found.saliency))
                slot.device.wait()
            return dataclasses.replace(found, source=source)
        clock = Stopwatch(self._now)
        results = [
            runner.run(images[batch.rows], batch.owner, batch.codes, self._methods.context, clock)
            for batch in self._inputs.plan(codes)
        ]
        return self._assemble(results, source, self._settings(requested, None), clock.seconds)

    def require_method(self, method: str | Method) -> None:
        """Make sure that a method can run on this bundle, in a pass or two of its graphs.

        Args:
            method: As for `explain`.

        Raises:
            OptionError: The bundle lacks what the method needs; the message says how to get it.
            BackendError: A package that the method needs is missing.
        """
        image = self._methods.context.noise(1)
        first = np.zeros(1, np.int64)
        batch = self._methods.context.batch(image, self.networks.backbone(image), first, first)
        make_method(method).require_support(self.networks, batch)

    def warm_up(
        self,
        batch: int = 1,
        *,
        method: str | Method = DEFAULT_METHOD,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare for calls of 1 to `batch` images, so that none of them takes longer than others.

        On a GPU, engines plan and compile for each number of rows when they first meet it, which
        takes many times longer than an explanation. This runs every number that the method needs,
        on every slot; it waits for callers that hold one. For CAM and methods on pixels, and on a
        CPU, it makes two calls on noise.

        Args:
            batch: The most images of a call; at least 2 where several classes of an image are
                explained, for these go through the engines as several images do.
            method: A method with its options, or its name for its defaults.
            progress: Called with a line for each step.

        Raises:
            OptionError: `batch` is out of range, or the method does not suit the bundle.
            BackendError: The engine fails, or there is too little memory.
        """
        if batch < 1:
            raise OptionError(f"batch is {batch}; it must be at least 1")
        runner = self._methods.implement(make_method(method))
        runner.warm_up(min(batch, self.batch_size), self._methods.context, progress)
        if self.networks.slots is not None:
            self.networks.slots.keep_compiled()

    def calibrate(
        self, images: int = 1, classes: int = 1, method: str | Method = DEFAULT_METHOD
    ) -> None:
        """Measure how long a call with this many images and classes takes on this machine.

        The first call with `budget_ms` for new numbers, or with other layers, k_min or k_max,
        measures them itself. That takes about as long as thirty explanations, which the budget
        does not include; calibrate beforehand, so that no call has to wait for it. Calibrate under
        the load that calls will meet, and again when the load of the machine changes.

        Args:
            images: How many images a call has, at least 1.
            classes: How many classes each image has.
            method: Collection-CAM with its options, or its name for its defaults.

        Raises:
            OptionError: The numbers are out of range, or the method cannot keep a budget.
        """
        if images < 1:
            raise OptionError(f"images is {images}; it must be at least 1")
        if not 1 <= classes <= self.bundle.manifest.classes:
            known = self.bundle.manifest.classes
            raise OptionError(f"classes is {classes}; it must be 1 to {known}")
        options = budgeted(make_method(method))
        for count in {rows.stop - rows.start for rows in row_chunks(images, self.batch_size)}:
            self._costs.of(count, count * classes, options, anew=True)

    def preprocess(self, images: Floats | Sequence[Image.Image]) -> Input:
        """Turn PIL images into the network's input, or validate an array that is such an input.

        Args:
            images: PIL images, or [B, C, H, W] float32.

        Returns:
            [B, C, H, W] float32, and the place of each input in its picture; no places for an
            array.

        Raises:
            ImageError: An image cannot be used.
        """
        return self._inputs.preprocess(images)

    def close(self) -> None:
        """Close the engines."""
        self._inputs.close()
        self.networks.close()

    def __enter__(self) -> Explainer:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rehearse(self, images: int, pairs: int) -> Run:
        """Make a call on noise with some numbers of images and (image, class) pairs."""
        noise, classes = self._methods.context.noise(images), self.bundle.manifest.classes
        counts = np.bincount(np.arange(pairs) % images)
        targets = [[n % classes for n in range(count)] for count in counts]

        def run(method: CollectionCAM) -> int:
            result = self.explain(noise, targets, method=method)
            return sum(int(np.count_nonzero(weights)) for weights in result.weights)

        return run

    def _settings(self, method: Method, budget: Budget | None) -> dict[str, Any]:
        return {
            "method": method.name,
            "options": {
                field.name: getattr(method, field.name) for field in dataclasses.fields(method)
            },
            "bundle": self.bundle.manifest.name,
            "backend": self.networks.backend,
            "precision": self.precision,
            "batch_size": self.batch_size,
            **({"budget": dataclasses.asdict(budget)} if budget else {}),
        }

    def _assemble(
        self,
        batches: Sequence[BatchResult],
        source: Source,
        settings: dict[str, Any],
        timings: dict[str, float],
    ) -> Explanation:
        joined = MethodResult.joined([batch.result for batch in batches])
        return Explanation(
            saliency=joined.saliency,
            raw_saliency=joined.raw_saliency,
            targets=np.concatenate([batch.targets for batch in batches]),
            image_index=np.concatenate(
                [batch.owner + index * self.batch_size for index, batch in enumerate(batches)]
            ),
            logits=np.concatenate([batch.logits for batch in batches]),
            layers=joined.layers,
            masks=joined.masks,
            weights=joined.weights,
            mic=joined.mic,
            timings=timings,
            settings=settings,
            source=source,
        )


def load(
    bundle: str | Path | Bundle,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    batch_size: int = DEFAULT_BATCH,
    threads: int = 0,
    slots: int = 1,
    cuda_graphs: bool = True,
    require_signature: str | Path | None = None,
) -> Explainer:
    """Open a bundle and its engines.

    Args:
        bundle: The bundle's folder, or a bundle that was read.
        backend: "auto" for the best that works here, or a backend by name.
        precision: "fp32"; "tf32", its graphs with factors of 10 bits on a GPU; or "fp16", "int8"
            or "fp8" where the bundle has it.
        batch_size: The most images, and the most masked images, that go through an engine at a
            time; it bounds memory.
        threads: Threads inside an operator on a CPU; 0 lets the engine choose.
        slots: How many calls run on a GPU at a time, each on its stream with its buffers; further
            calls wait. On a CPU all calls share the engines.
        cuda_graphs: Capture a GPU's work, and replay it for calls of the same sizes. Without it,
            the same calls give the same bits, and the stages of `timings` are finer.
        require_signature: A public key in a PEM file. Before anything of the bundle is parsed, all
            of its folder must be as it was signed with that key; a bundle that was read is read
            again then.

    Raises:
        SignatureError: The bundle is not signed as required, or was changed since.
        BundleError: The bundle is damaged or not one.
        BackendError: The backend does not work here.
        OptionError: An option is out of range, the bundle does not have the precision, or the key
            cannot be used.
    """
    if require_signature is not None:
        place = bundle.folder if isinstance(bundle, Bundle) else bundle
        opened = read_bundle(place, require_signature)
    else:
        opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    _validate_batch_size(batch_size)
    networks = open_networks(opened, backend, precision, threads, slots)
    if networks.slots is not None:
        offer_kernels(opened)
    return Explainer(opened, networks, precision, batch_size, cuda_graphs)


def _validate_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")
