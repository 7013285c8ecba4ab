"""The model that explains: images and classes in, maps out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as triton

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import CcamError, OptionError, RequestError
from ccam_deploy.explainer import DEFAULT_BATCH, Explainer, load
from ccam_deploy.explanation import Explanation
from ccam_deploy.serve.models.metrics import Metrics
from ccam_deploy.serve.models.responses import input_array, parameters_of, refusal, response
from ccam_deploy.serve.outputs import outputs_of
from ccam_deploy.serve.repository import BUNDLE
from ccam_deploy.serve.requests import Request, Rules, answer_batch, parse_request
from ccam_deploy.serve.settings import ModelSettings
from ccam_deploy.targets import Target


class TritonPythonModel:
    """Explains the requests of a batch together; see Triton's Python backend for its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and warm it up; the model is ready when this returns.

        Args:
            args: As Triton gives them: the configuration, the folder, the instance's kind.
        """
        config = json.loads(args["model_config"])
        try:
            self._settings = ModelSettings.from_parameters(parameters_of(config))
            self._metrics = Metrics(args["model_name"], args["model_version"])
            self._explainer = _open(args, self._settings, config["max_batch_size"])
            self._methods = {name: self._settings.method(name) for name in self._usable()}
            manifest = self._explainer.bundle.manifest
            self._outputs = outputs_of(self._settings.weights_shape(manifest))
            self._rules = Rules(manifest.input, manifest.classes, tuple(self._methods))
            self._explainer.warm_up(
                max(config["max_batch_size"], 1), method=self._methods[self._settings.default]
            )
        except CcamError as error:
            raise triton.TritonModelException(str(error)) from error
        for note in self._explainer.notes:
            triton.Logger.log_warn(f"{args['model_name']}: {note}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of a batch.

        Args:
            requests: Triton's requests.

        Returns:
            A response for each, with tensors or with an error.
        """
        answers: list[Any] = [None] * len(requests)
        checked: dict[int, Request] = {}
        for index, request in enumerate(requests):
            try:
                checked[index] = self._parse(request)
            except Exception as error:
                answers[index] = refusal(error, self._metrics)
        wanted = [requests[index].requested_output_names() for index in checked]
        found = self._answer(list(checked.values()), wanted)
        for index, answer in zip(checked, found, strict=True):
            failed = isinstance(answer, Exception)
            answers[index] = refusal(answer, self._metrics) if failed else response(answer)
        return answers

    def finalize(self) -> None:
        """Close the engines."""
        self._explainer.close()

    def _usable(self) -> list[str]:
        """Names of the methods that the bundle can run, the default one first.

        Raises:
            OptionError: It cannot run one that the settings name.
            BackendError: A package that such a method needs is missing.
        """
        names = []
        for name in self._settings.names:
            try:
                self._explainer.require_method(self._settings.method(name))
                names.append(name)
            except CcamError as error:
                if name in self._settings.methods or name == self._settings.default:
                    raise
                triton.Logger.log_info(f"without method {name}: {error}")
        return names

    def _parse(self, request: Any) -> Request:
        images = input_array(request, "IMAGES")
        if images is None:
            raise RequestError("the request has no IMAGES", "shape")
        targets, methods = (input_array(request, name) for name in ("TARGETS", "METHOD"))
        return parse_request(images, targets, methods, self._rules)

    def _answer(
        self, requests: Sequence[Request], wanted: Sequence[Sequence[str]]
    ) -> Sequence[Any]:
        """The tensors of each request, or the error that it failed with."""
        if not requests:
            return []
        try:
            return answer_batch(requests, wanted, self._explain, self._outputs)
        except Exception as error:
            return [error] * len(requests)

    def _explain(self, images: Floats, targets: Sequence[Target], method: str) -> Explanation:
        explanation = self._explainer.explain(images, targets, method=self._methods[method])
        self._metrics.explained(explanation)
        return explanation


def _open(args: dict[str, str], settings: ModelSettings, max_batch: int) -> Explainer:
    """Open the bundle beside the model's file, on what its instance stands for.

    Raises:
        CcamError: It cannot be opened there.
    """
    folder = Path(args["model_repository"], args["model_version"], BUNDLE)
    on_gpu = args["model_instance_kind"] == "GPU"
    if on_gpu and args["model_instance_device_id"] != "0":
        raise OptionError(
            f"an instance is on GPU {args['model_instance_device_id']}; only the first that the "
            "server sees is used: start a server for each GPU, with CUDA_VISIBLE_DEVICES"
        )
    explainer = load(
        folder,
        backend="auto" if on_gpu else "onnxruntime-cpu",
        precision=settings.precision,
        batch_size=max(DEFAULT_BATCH, max_batch),
        threads=settings.threads,
        require_signature=settings.require_signature or None,
    )
    if settings.kind == "gpu" and explainer.networks.slots is None:
        notes = "; ".join(explainer.networks.notes)
        explainer.close()
        raise OptionError(f"no backend runs on a GPU here: {notes}")
    return explainer
