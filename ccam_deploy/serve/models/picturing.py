"""The model for pictures: an image file in, the picture with its map over it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from PIL import Image

from ccam_deploy import render
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import read_manifest
from ccam_deploy.errors import BackendError, CcamError, RequestError
from ccam_deploy.preprocess import Geometry, prepare_images, to_grey_or_rgb
from ccam_deploy.render import Look
from ccam_deploy.serve.models.metrics import Metrics
from ccam_deploy.serve.models.responses import (
    input_array,
    parameters_of,
    parse_each,
    refusal,
    request_parameters,
    response,
    unavailable,
)
from ccam_deploy.serve.requests import (
    MAX_IMAGE_BYTES,
    Array,
    decode_image,
    refuses_method,
    target_named,
)

_ASKED = ("SALIENCY", "SCORES", "CLASS")


class _UnavailableError(Exception):
    """The model that explains does not answer."""


@dataclass(frozen=True)
class _Pictures:
    """The N images of a request, decoded.

    Attributes:
        pictures: As they are shown, at most 1,024 pixels along a side.
        inputs: [N, C, H, W] float32, as the network takes them.
        places: Where each input lies in its picture.
        target: The class to explain, or -1 for each image's best.
        method: The method's name; empty for the default one.
    """

    pictures: tuple[Image.Image, ...]
    inputs: Floats
    places: tuple[Geometry, ...]
    target: int
    method: str


class TritonPythonModel:
    """Decodes images, has another model explain them, and draws; see Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the network takes, and draw once, so that no request waits for imports.

        Args:
            args: As Triton gives them: the configuration, the folder, the model's name.
        """
        parameters = parameters_of(json.loads(args["model_config"]))
        self._explainer = parameters["explainer"]
        self._max_bytes = int(parameters.get("max_image_bytes", MAX_IMAGE_BYTES))
        self._metrics = Metrics(args["model_name"], args["model_version"])
        try:
            self._manifest = read_manifest(Path(args["model_repository"], args["model_version"]))
        except CcamError as error:
            raise triton.TritonModelException(str(error)) from error
        height, width = size = self._manifest.input[1:]
        whole = Geometry(size, size, (0, 0), size)
        _overlay(Image.new("RGB", (width, height)), whole, np.zeros(size, np.float32))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of a batch, whose images are explained together.

        Args:
            requests: Triton's requests.

        Returns:
            A response for each, with tensors or with an error.
        """
        answers, decoded = parse_each(requests, self._decode, self._metrics)
        explained = self._explain(list(decoded.values()))
        for (index, pictures), found in zip(decoded.items(), explained, strict=True):
            answers[index] = self._respond(requests[index], pictures, found)
        return answers

    def _decode(self, request: Any) -> _Pictures:
        """Read a request's images and what it asks of them.

        Raises:
            RequestError: They cannot be used.
        """
        content = input_array(request, "IMAGE")
        if content is None or not content.size:
            raise RequestError("the request has no IMAGE", "shape")
        words = request_parameters(request)
        target = target_named(_parameter(words, "class"), self._manifest)
        inputs, places, shown = zip(*map(self._prepare, content.ravel()), strict=True)
        method = _parameter(words, "method")
        return _Pictures(shown, np.concatenate(inputs), places, target, method)

    def _prepare(self, content: object) -> tuple[Floats, Geometry, Image.Image]:
        """The input, its place in the picture, and the picture as it is shown.

        A file of some kilobytes may hold hundreds of megabytes: only one is open at a time.
        """
        picture = decode_image(content, self._max_bytes)
        size, how = self._manifest.input[1:], self._manifest.preprocessing
        try:
            inputs, (place,) = prepare_images([picture], size, how)
            return inputs, place, render.thumbnail(to_grey_or_rgb(picture, 3))
        except CcamError as error:
            raise RequestError(str(error), "size") from error

    def _explain(self, asked: Sequence[_Pictures]) -> list[dict[str, Array] | Exception]:
        """Have the images explained, those of all requests for a method together.

        A method that does not exist is nothing to the requests for others.
        """
        found: dict[int, dict[str, Array] | Exception] = {}
        for method in dict.fromkeys(one.method for one in asked):
            places = [place for place, one in enumerate(asked) if one.method == method]
            results = self._explain_together([asked[place] for place in places])
            found |= zip(places, results, strict=True)
        return [found[place] for place in range(len(asked))]

    def _explain_together(self, asked: Sequence[_Pictures]) -> list[dict[str, Array] | Exception]:
        """Have requests for one method explained together, or one by one where that fails."""
        try:
            tensors = self._call(asked)
        except Exception as error:
            if len(asked) == 1 or isinstance(error, _UnavailableError):
                return [error] * len(asked)
            return [result for one in asked for result in self._explain_together([one])]
        ends = np.cumsum([len(one.pictures) for one in asked])[:-1]
        parts = {name: np.split(values, ends) for name, values in tensors.items()}
        return [{name: parts[name][index] for name in parts} for index in range(len(asked))]

    def _call(self, asked: Sequence[_Pictures]) -> dict[str, Array]:
        """Call the model that explains, for requests for one method.

        Raises:
            RequestError: It refuses the request.
            BackendError: It fails.
            _UnavailableError: It is not loaded, or its process died.
        """
        rows = [len(one.pictures) for one in asked]
        targets = np.repeat(np.array([one.target for one in asked], np.int32), rows)
        inputs = [
            triton.Tensor("IMAGES", np.concatenate([one.inputs for one in asked])),
            triton.Tensor("TARGETS", targets[:, None]),
        ]
        if method := asked[0].method:
            methods = np.full((sum(rows), 1), method.encode(), np.object_)
            inputs.append(triton.Tensor("METHOD", methods))
        request = triton.InferenceRequest(
            model_name=self._explainer,
            requested_output_names=list(_ASKED),
            inputs=inputs,
            preferred_memory=triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            result = request.exec()
        except triton.TritonModelException as error:
            raise _UnavailableError(f'model "{self._explainer}" does not answer') from error
        if result.has_error():
            message = result.error().message()
            if refuses_method(message):
                raise RequestError(message, "method")
            triton.Logger.log_error(f'model "{self._explainer}" failed: {message}')
            raise BackendError(f'model "{self._explainer}" failed')
        return {name: triton.get_output_tensor_by_name(result, name).as_numpy() for name in _ASKED}

    def _respond(
        self, request: Any, asked: _Pictures, found: Mapping[str, Array] | Exception
    ) -> Any:
        if isinstance(found, _UnavailableError):
            return unavailable(str(found), self._metrics)
        if isinstance(found, Exception):
            return refusal(found, self._metrics)
        try:
            return response(self._tensors(request.requested_output_names(), asked, found))
        except Exception as error:
            return refusal(error, self._metrics)

    def _tensors(
        self, names: Sequence[str], asked: _Pictures, found: Mapping[str, Array]
    ) -> dict[str, Array]:
        classes: Array = found["CLASS"]
        tensors: dict[str, Array] = {}
        if "OVERLAY" in names:
            drawn = map(_overlay, asked.pictures, asked.places, found["SALIENCY"])
            tensors["OVERLAY"] = np.array([[content] for content in drawn], np.object_)
        if "CLASS" in names:
            tensors["CLASS"] = classes
        if "LABEL" in names:
            labels = [[self._manifest.label(int(index)).encode()] for index in classes[:, 0]]
            tensors["LABEL"] = np.array(labels, np.object_)
        if "SCORE" in names:
            tensors["SCORE"] = np.take_along_axis(found["SCORES"], classes.astype(np.int64), axis=1)
        return tensors


def _parameter(words: Mapping[str, str], name: str) -> str:
    """A parameter of a request, or the HTTP header that stands for it; empty if there is none."""
    return words.get(name, words.get(f"x-ccam-{name}", ""))


def _overlay(shown: Image.Image, place: Geometry, saliency: Floats) -> bytes:
    """Draw a map over its picture, as Explanation.overlay does; a PNG."""
    look = Look()
    values = render.fitted(place.to_original(saliency), shown)
    seen = place.seen_in(shown.size)
    drawn = render.overlay(shown, values, look.colormap, look.opacity, look.bar, seen)
    return render.png(drawn)
