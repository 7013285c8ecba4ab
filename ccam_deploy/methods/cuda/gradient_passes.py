"""Gradients of the feature maps on a device, a row for each (image, class) pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ccam_deploy.arrays import Classes
from ccam_deploy.engines.cuda.device import DeviceTensor, Region
from ccam_deploy.engines.cuda.graph_replay import Part
from ccam_deploy.engines.cuda.slots import Slot
from ccam_deploy.kernels.cuda.buffers import Spec
from ccam_deploy.methods.collection_cam.sizes import image_sizes, padded
from ccam_deploy.methods.cuda.passes import Passes, Setup, spec_of


class GradientPasses(Passes):
    """Images, their activations, and the gradients of these, on one slot; see Passes.

    Attributes:
        gradients: The gradient graph's outputs [batch, C, h, w], from the shallowest layer on; the
            true gradients times the scale of the graph's input.
        kernels: Of kernels.cuda.gradient_launch.GradientKernels.
    """

    def __init__(self, slot: Slot, scale: float, setup: Setup) -> None:
        """Allocate memory, and prepare the kernels.

        Args:
            slot: The slot.
            scale: The factor of the gradient graph's input.
            setup: The sizes.

        Raises:
            BackendError: There is too little memory.
        """
        super().__init__(slot, ("gradient",), setup)
        self.sizes = image_sizes(self.batch)
        try:
            self._prepare_gradient(scale)
        except BaseException:
            self.close()
            raise

    def run_gradient(self, owner: Classes, targets: Classes, after: Callable[[], None]) -> None:
        """Put the gradients of the classes' logits by the feature maps on the stream.

        Args:
            owner: [P], the image of each pair; P at most `batch`.
            targets: [P], the class of each pair.
            after: Puts the work that reads the gradients on the stream; the same in every call.
        """
        pairs = len(owner)
        self._codes.host["codes"][:pairs] = targets
        self.begin(owner, targets)
        self._codes.upload()
        rows = padded(pairs, self.sizes)
        gathered = not np.array_equal(owner, np.arange(pairs))
        self.runner.put(
            ("explain", rows, gathered),
            "explain",
            lambda: [
                Part("gradient", partial(self._begin_gradient, rows, gathered)),
                Part("gradient", partial(self._launch_gradient, rows, gathered), is_engine=True),
                Part("combine", after),
            ],
        )

    def _prepare_gradient(self, scale: float) -> None:
        from ccam_deploy.kernels.cuda.gradient_launch import GradientKernels

        graph = self.graph("gradient")
        self._codes = self.region({"codes": Spec((self.batch,), np.int32)}, mirrored=True)
        self._codes.host["codes"][:] = 0  # for rows that no pair is in
        self._gradients = self.region({s.name: spec_of(s, self.batch) for s in graph.outputs})
        self.gradients = tuple(self._gradients.tensors.values())
        self._slopes = self.region({"slopes": Spec((self.batch,), np.float32)}).tensors
        given = {s.name: spec_of(s, self.batch) for s in graph.inputs}
        self._given = self.region({"output_gradient": given.pop("output_gradient")}).tensors
        self._residuals = {name: self._outputs[name] for name in given}
        self._gathered: Region | None = None
        logits = self._logits.tensors
        arrays = self._codes.tensors | logits | self._slopes | self._given
        views: dict[str, Any] = self.views(arrays)
        self.kernels = GradientKernels(
            self.kernels.run,
            views["codes"],
            views["logits"],
            views["slopes"],
            views["output_gradient"],
            scale,
        )

    def _begin_gradient(self, rows: int, gathered: bool) -> None:
        """Write what the gradient graph reads."""
        stream = self.device.kernel_stream
        self.kernels.begin(stream)
        if not gathered:
            return
        for name, target in self._copies().items():
            pair = self._residuals[name].words(), target.rows(rows).words()
            views = self.views(dict(zip(("images", "pairs"), pair, strict=True)))
            self.kernels.gather(views["images"], views["pairs"], stream)

    def _launch_gradient(self, rows: int, gathered: bool) -> None:
        def tensors() -> dict[str, DeviceTensor]:
            residuals = self._copies() if gathered else self._residuals
            return {**residuals, **self._given, **self._gradients.tensors}

        self.launch("gradient", rows, tensors, other=gathered)

    def _copies(self) -> dict[str, DeviceTensor]:
        """Room for what the gradient graph needs of the backbone, a row for each pair."""
        if self._gathered is None:
            shapes = {n: Spec(t.shape, t.dtype) for n, t in self._residuals.items()}
            self._gathered = self.region(shapes)
        return self._gathered.tensors
