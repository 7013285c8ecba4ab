"""What the page's buttons do: pictures read, classes ranked, explanations made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ccam_deploy.errors import BackendError, OptionError, TargetError
from ccam_deploy.explainer import Explainer
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import METHODS
from ccam_deploy.methods.scores import probabilities
from ccam_deploy.page.fields import Field, fields_of, method_of
from ccam_deploy.preprocess import read_picture

_RANKED = 5


@dataclass(frozen=True)
class RankedClass:
    """A class of a picture.

    Attributes:
        number: Of the class.
        label: Its name, or its number where the bundle has no names.
        score: Its probability; the output itself where the bundle has no activation.
    """

    number: int
    label: str
    score: float


@dataclass(frozen=True)
class View:
    """An explanation as the page shows it.

    Attributes:
        explanation: Of one picture and one class.
        seconds: How long it took, from picture to maps.
    """

    explanation: Explanation
    seconds: float


class Viewer:
    """Explains the pictures of a page's visitors. Safe to call from several threads.

    Args:
        explainer: Explains; whoever opened it closes it.
        now: Seconds on a clock that only goes forward.

    Attributes:
        methods: The names of the methods that can run on the bundle here.
        missing: For each other method, by name, why it cannot.
    """

    def __init__(self, explainer: Explainer, now: Callable[[], float] = time.perf_counter) -> None:
        self.explainer = explainer
        self._now = now
        self._manifest = explainer.bundle.manifest
        self.missing: dict[str, str] = {}
        for name in METHODS:
            try:
                explainer.require_method(name)
            except (OptionError, BackendError) as error:
                self.missing[name] = str(error)
        self.methods = tuple(name for name in METHODS if name not in self.missing)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the bundle's target layers."""
        return tuple(layer.name for layer in self._manifest.layers)

    @property
    def has_probabilities(self) -> bool:
        """Whether the scores of classes are probabilities."""
        return self._manifest.has_probabilities

    def fields(self, method: str) -> tuple[Field, ...]:
        """List the fields of a method's options; raise OptionError for an unknown method."""
        return fields_of(method, self.layers)

    def picture(self, content: bytes) -> Image.Image:
        """Read the bytes of an image file as an RGB picture.

        Raises:
            ImageError: It is no picture that the network can take.
        """
        return read_picture(content, self._manifest, "the picture")

    def ranking(self, picture: Image.Image) -> list[RankedClass]:
        """List the best classes of a picture, five at most, the best one first.

        Raises:
            ImageError: The picture cannot be used.
            BackendError: The engine fails.
        """
        images, _ = self.explainer.preprocess([picture])
        logits = self.explainer.networks.backbone(images).logits
        scores = probabilities(logits.astype(float), self._manifest.probabilities_by)[0]
        best = (-scores).argsort(kind="stable")[:_RANKED].tolist()
        return [RankedClass(n, self._manifest.label(n), float(scores[n])) for n in best]

    def class_number(self, chosen: str, typed: str) -> int:
        """Find the class to explain.

        Args:
            chosen: The number of a class of the ranking; empty for none.
            typed: What stands for another class, by name or number; it goes first unless empty.

        Raises:
            TargetError: There is no such class, or nothing was chosen or typed.
        """
        word = typed.strip() or chosen
        if not word:
            raise TargetError("no class is chosen; choose one, or type its name or number")
        return self._manifest.class_index(word)

    def explain(
        self, picture: Image.Image, target: int, method: str, values: Mapping[str, Any]
    ) -> View:
        """Explain a class of a picture.

        Args:
            picture: The picture.
            target: The class.
            method: The method's name.
            values: The values of its fields.

        Raises:
            CcamError: The method, a value or the picture cannot be used, or the engine fails.
        """
        if method in self.missing:
            raise OptionError(f"{method} cannot run here: {self.missing[method]}")
        chosen = method_of(method, values, self.layers)
        started = self._now()
        explanation = self.explainer.explain([picture], [[target]], method=chosen)
        return View(explanation, self._now() - started)


def options_told(view: View, fields: Sequence[Field]) -> list[str]:
    """Tell the options of an explanation that are not at their defaults, such as "theta 0.2"."""
    options = view.explanation.settings["options"]
    told = []
    for field in fields:
        value = options[field.name]
        if value != (tuple(field.default) if field.kind == "several" else field.default):
            shown = ", ".join(value) if field.kind == "several" else str(value)
            told.append(f"{field.name} {shown}")
    return told
