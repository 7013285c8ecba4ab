"""The calls that methods make, and how a bundle's engines answer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.engines.base import OWNER, Array, Engine
from ccam_deploy.engines.cuda.slots import Slots
from ccam_deploy.errors import OptionError

_MOST_SHIFT = 100
"""Of two, so that a scaled gradient stays finite in float32."""

REST = "rest"
"""What the backbone gives, and the head takes, of the last layer beside its feature maps."""


@dataclass(frozen=True)
class Activations:
    """The outputs of the backbone for a batch of images.

    Attributes:
        logits: [B, classes] float32.
        features: [B, C, h, w] float32 of each target layer.
        residuals: Tensors [B, ...] that the gradient graph needs, by name, in the graph's types.
        rest: [B, ...] float32, what the last layer's tensor holds beside its feature map: a
            transformer's class and register tokens. None where that is nothing, or where there is
            no head that takes it.
    """

    logits: Floats
    features: tuple[Floats, ...]
    residuals: Mapping[str, Array]
    rest: Floats | None = None

    def take(self, rows: NDArray[np.intp]) -> Activations:
        """Select rows, in the order given; a row may come several times."""
        if np.array_equal(rows, np.arange(len(self.logits))):
            return self
        return Activations(
            self.logits[rows],
            tuple(feature[rows] for feature in self.features),
            {name: value[rows] for name, value in self.residuals.items()},
            None if self.rest is None else self.rest[rows],
        )


class Classifier(Protocol):
    """The calls that methods make. Images are preprocessed: [B, C, H, W] float32."""

    def backbone(self, images: Floats) -> Activations:
        """Run the backbone on images and keep what their explanation needs."""
        ...

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Pass a gradient of the logits back to the feature maps.

        Args:
            activations: Of B images.
            output_gradient: [B, classes] float32, the gradient of the logits.

        Returns:
            [B, C, h, w] float32 for each target layer.
        """
        ...

    def masked_logits(self, images: Floats, masks: Floats, owner: Classes) -> Floats:
        """Run images under masks.

        Args:
            images: [B, C, H, W] float32.
            masks: [N, H, W] float32 in [0, 1].
            owner: [N] int64, the image of each mask.

        Returns:
            Logits [N, classes] float32 of the images times the masks.
        """
        ...

    def head_logits(self, features: Floats, rest: Floats | None = None) -> Floats:
        """Run the network's head on feature maps of the last target layer.

        Args:
            features: [N, C, h, w] float32.
            rest: [N, ...] float32, `rest` of the activations; None where they have none.

        Returns:
            Logits [N, classes] float32.

        Raises:
            OptionError: The bundle has no graph for it.
        """
        ...

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """Pass a gradient of the logits back to the images.

        Args:
            images: [B, C, H, W] float32.
            output_gradient: [B, classes] float32, the gradient of the logits.
            guided: Let ReLUs pass back positive gradients only.

        Returns:
            [B, C, H, W] float32.

        Raises:
            OptionError: The bundle has no graph for it.
        """
        ...

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Pass winning probabilities down from the classes (Zhang et al. 2018).

        Args:
            images: [B, C, H, W] float32.
            winners: [B, classes] float32, the probability that each class is the winner.
            duals: [B, classes] float32, the same for classes whose weights in the last layer have
                the opposite sign.

        Returns:
            [B, h, w] float32 for each target layer, summed over channels.

        Raises:
            OptionError: The bundle has no graph for it.
        """
        ...


class Networks:
    """The engines of one precision; see Classifier.

    Args:
        engines: The engines, by their graphs' names.
        gradient_scale: The factor by which gradients are scaled in the graphs; see Precision.
        backend: The backend's name.
        slots: Where a whole explanation can run on a GPU; None on a CPU.

    Attributes:
        notes: Why better backends were skipped, a line each.
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

    @property
    def head_takes_rest(self) -> bool:
        """Whether the head needs more of the last layer than its feature maps; see Activations."""
        return ("head", REST) in self._types

    def backbone(self, images: Floats) -> Activations:
        """Run the backbone on images; see Classifier."""
        values = self.engines["backbone"].run({"images": self._cast("backbone", "images", images)})
        logits = values.pop("logits").astype(np.float32, copy=False)
        names = [name for name in values if name.startswith("feature_")]
        features = tuple(values[name].astype(np.float32, copy=False) for name in names)
        needed = {name: values[name] for name in self._gradient_names if name in values}
        rest = values[REST].astype(np.float32, copy=False) if REST in values else None
        return Activations(logits, features, needed, rest)

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        """Pass a gradient of the logits back to the feature maps; see Classifier."""
        feeds = dict(activations.residuals)
        feeds["output_gradient"], scales = self._scaled("gradient", output_gradient)
        values = self.engines["gradient"].run(feeds)
        return tuple(_unscaled(value, scales) for value in values.values())

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        """Pass a gradient of the logits back to the images; see Classifier."""
        graph = "guided_gradient" if guided else "input_gradient"
        if "input_gradient" not in self.engines:
            raise OptionError(f"the bundle has no {graph} graph; export it with --gradients")
        if graph not in self.engines:
            raise OptionError(f"the bundle has no {graph} graph, for its network has no ReLU")
        given, scales = self._scaled(graph, output_gradient)
        feeds = {"images": self._cast(graph, "images", images), "output_gradient": given}
        return _unscaled(self.engines[graph].run(feeds)["input_gradient"], scales)

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        """Pass winning probabilities down to each layer; see Classifier."""
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

    def masked_logits(self, images: Floats, masks: Floats, owner: Classes) -> Floats:
        """Run images under masks; see Classifier."""
        feeds = {
            "images": self._cast("classifier", "images", images),
            "masks": self._cast("classifier", "masks", masks[:, None]),
            OWNER: owner,
        }
        logits = self.engines["classifier"].run(feeds)["logits"]
        return logits.astype(np.float32, copy=False)

    def head_logits(self, features: Floats, rest: Floats | None = None) -> Floats:
        """Run the head on the last layer's feature maps; see Classifier."""
        if "head" not in self.engines:
            raise no_head()
        feeds = {"features": self._cast("head", "features", features)}
        if rest is not None:
            feeds[REST] = self._cast("head", REST, rest)
        return self.engines["head"].run(feeds)["logits"].astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines.values():
            engine.close()
        if self.slots is not None:
            self.slots.close()

    def _cast(self, graph: str, tensor: str, values: Floats) -> Array:
        return values.astype(self._types[graph, tensor], copy=False)

    def _scaled(self, graph: str, output_gradient: Floats) -> tuple[Array, Floats]:
        """A gradient of the logits as a graph takes it, and the scale of each row, a power of two.

        In half precision rows are brought to a largest element above 0.5 and up to 1, for which
        the graph's scale was chosen.
        """
        scales = np.full(len(output_gradient), self._scale)
        if self._types[graph, "output_gradient"] == np.float16:
            largest = np.abs(output_gradient).max(axis=1)
            _, exponents = np.frexp(np.where(largest > 0, largest, 1) * np.float32(1 - 2**-24))
            scales = np.ldexp(scales, np.minimum(-exponents, _MOST_SHIFT))
        scaled = output_gradient * scales[:, None]
        return self._cast(graph, "output_gradient", scaled), scales


def _unscaled(values: Array, scales: Floats) -> Floats:
    wide: Floats = values.astype(np.float32, copy=False)
    if (scales == 1).all():
        return wide
    return wide / scales.reshape(-1, *[1] * (wide.ndim - 1))


def no_head() -> OptionError:
    """Make the error for a bundle without the graph of the network's head."""
    return OptionError("the bundle has no head graph; export it with --head")
