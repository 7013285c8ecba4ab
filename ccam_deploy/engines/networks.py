"""A bundle's graphs behind the calls that methods make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.base import OWNER, Array, Engine
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.errors import OptionError


@dataclass(frozen=True)
class Activations:
    """What the backbone gives for a batch of images.

    logits: [B, classes] float32.   features: [B, C, h, w] float32 per layer.
    residuals: tensors [B, ...] that the gradient graph needs, by name, in the graph's own type.
    """

    logits: Floats
    features: tuple[Floats, ...]
    residuals: Mapping[str, Array]

    def take(self, rows: NDArray[np.intp]) -> Activations:
        """The activations of some rows, in that order; a row may come several times."""
        if np.array_equal(rows, np.arange(len(self.logits))):
            return self
        return Activations(
            self.logits[rows],
            tuple(feature[rows] for feature in self.features),
            {name: value[rows] for name, value in self.residuals.items()},
        )


class Classifier(Protocol):
    """The calls that methods make. Images are preprocessed: [B, C, H, W] float32."""

    def backbone(self, images: Floats) -> Activations:
        """Run a batch of images and keep what their explanation needs."""
        ...

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Gradients [B, C, h, w] of each layer's maps for a gradient [B, classes] of the logits."""
        ...

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        """Logits [N, classes] of images times masks [N, H, W]; owner [N] names each one's image."""
        ...

    def head_logits(self, features: Floats) -> Floats:
        """Logits [N, classes] of feature maps [N, C, h, w] put in the place of the last layer's.

        Raises OptionError where the bundle has no graph for it.
        """
        ...

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """The images' gradient [B, C, H, W] for a gradient [B, classes] of the logits.

        guided: ReLUs pass back positive gradients only.
        Raises OptionError where there is no graph for it.
        """
        ...

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Each layer's winning probabilities [B, h, w], summed over channels.

        winners: [B, classes], the probability that each class is the winner.
        duals: [B, classes], the same for classes with the other sign in the last layer's weights.
        Raises OptionError where there is no graph for it.
        """
        ...


class Networks:
    """The engines of one precision.

    backend: the engine's name.   slots: where all of an explanation can run on a GPU.
    notes: why better backends were passed over, one line each.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        gradient_scale: float,
        backend: str,
        slots: Slots | None = None,
    ) -> None:
        self.backend = backend
        self.slots = slots
        self.notes: tuple[str, ...] = ()
        self.engines = dict(engines)
        self._scale = np.float32(gradient_scale)
        self._types = {
            (name, spec.name): spec.dtype
            for name, engine in engines.items()
            for spec in engine.inputs
        }
        self._gradient_names = [spec.name for spec in engines["gradient"].inputs]

    def backbone(self, images: Floats) -> Activations:
        """Run a batch of images [B, C, H, W]; see Classifier."""
        values = self.engines["backbone"].run({"images": self._cast("backbone", "images", images)})
        logits = values.pop("logits").astype(np.float32, copy=False)
        names = [name for name in values if name.startswith("feature_")]
        features = tuple(values[name].astype(np.float32, copy=False) for name in names)
        needed = {name: values[name] for name in self._gradient_names if name in values}
        return Activations(logits, features, needed)

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Gradients [B, C, h, w] of the feature maps, one per layer; see Classifier."""
        feeds = dict(activations.residuals)
        feeds["output_gradient"] = self._cast(
            "gradient", "output_gradient", output_gradient * self._scale
        )
        values = self.engines["gradient"].run(feeds)
        return tuple(self._unscale(value) for value in values.values())

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """The images' gradient [B, C, H, W]; see Classifier."""
        graph = "guided_gradient" if guided else "input_gradient"
        if "input_gradient" not in self.engines:
            raise OptionError(f"the bundle has no {graph} graph; export it with --gradients")
        if graph not in self.engines:
            raise OptionError(f"the bundle has no {graph} graph, for its network has no ReLU")
        feeds = {
            "images": self._cast(graph, "images", images),
            "output_gradient": self._cast(graph, "output_gradient", output_gradient * self._scale),
        }
        return self._unscale(self.engines[graph].run(feeds)["input_gradient"])

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Each layer's winning probabilities [B, h, w]; see Classifier."""
        if "input_gradient" not in self.engines:
            raise OptionError("the bundle has no excitation graph; export it with --gradients")
        if "excitation" not in self.engines:
            raise OptionError(
                "the bundle has no excitation graph; export it again with --gradients, which tells "
                "why where the network cannot have one"
            )
        feeds = {"images": images, "winners": winners, "duals": duals}
        cast = {name: self._cast("excitation", name, values) for name, values in feeds.items()}
        return tuple(self.engines["excitation"].run(cast).values())

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        """Logits [N, classes] of masked images; see Classifier."""
        feeds = {
            "images": self._cast("classifier", "images", images),
            "masks": self._cast("classifier", "masks", masks[:, None]),
            OWNER: owner,
        }
        logits = self.engines["classifier"].run(feeds)["logits"]
        return logits.astype(np.float32, copy=False)

    def head_logits(self, features: Floats) -> Floats:
        """Logits [N, classes] of the last layer's feature maps; see Classifier."""
        if "head" not in self.engines:
            raise OptionError("the bundle has no head graph; export it with --head")
        feeds = {"features": self._cast("head", "features", features)}
        return self.engines["head"].run(feeds)["logits"].astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines.values():
            engine.close()
        if self.slots is not None:
            self.slots.close()

    def _cast(self, graph: str, tensor: str, values: Floats) -> Array:
        return values.astype(self._types[graph, tensor], copy=False)

    def _unscale(self, values: Array) -> Floats:
        wide = values.astype(np.float32, copy=False)
        return wide if self._scale == 1 else wide / self._scale
