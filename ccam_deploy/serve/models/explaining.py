"""The model that explains: images and classes in, maps out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as triton

from ccam_deploy.bundle.manifest import RANDOM_WEIGHTS
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.dlpack import capsule_of, tensor_of
from ccam_deploy.engines.cuda.parts import ImageParts
from ccam_deploy.errors import CcamError, OptionError, RequestError
from ccam_deploy.explainer import DEFAULT_BATCH, Explainer, load
from ccam_deploy.explanation import Explanation
from ccam_deploy.serve.models.device_memory import DeviceMemory
from ccam_deploy.serve.models.metrics import Metrics
from ccam_deploy.serve.models.responses import (
    input_array,
    parameters_of,
    parse_each,
    refusal,
    response,
)
from ccam_deploy.serve.outputs import outputs_of
from ccam_deploy.serve.repository import BUNDLE
from ccam_deploy.serve.requests import Array, Request, Rules, answer_batch, parse_request
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
            self._memory = _memory_of(self._explainer)
            self._methods = {name: self._settings.method(name) for name in self._usable()}
            manifest = self._explainer.bundle.manifest
            self._outputs = outputs_of(self._settings.weights_shape(manifest))
            self._rules = Rules(manifest.input, manifest.classes, tuple(self._methods))
            self._explainer.warm_up(
                max(config["max_batch_size"], 1), method=self._methods[self._settings.default]
            )
        except CcamError as error:
            raise triton.TritonModelException(str(error)) from error
        notes = [*self._explainer.notes, *manifest.doubts]
        if manifest.random_weights:
            notes.append(RANDOM_WEIGHTS)
        for note in notes:
            triton.Logger.log_warn(f"{args['model_name']}: {note}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of a batch.

        Args:
            requests: Triton's requests.

        Returns:
            A response for each, with tensors or with an error.
        """
        answers, checked = parse_each(requests, self._parse, self._metrics)
        wanted = [requests[index].requested_output_names() for index in checked]
        found = self._answer(list(checked.values()), wanted)
        for (index, request), answer in zip(checked.items(), found, strict=True):
            answers[index] = self._respond(request, answer)
        return answers

    def finalize(self) -> None:
        """Close the engines."""
        self._explainer.close()
        if self._memory is not None:
            self._memory.close()

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
        images = self._input(request, "IMAGES")
        if images is None:
            raise RequestError("the request has no IMAGES", "shape")
        targets = self._input(request, "TARGETS")
        if isinstance(targets, DeviceTensor):
            targets = self._read(targets)
        methods = input_array(request, "METHOD")
        checked = parse_request(images, targets, methods, self._rules)
        stays = isinstance(images, DeviceTensor) and "SALIENCY" in request.requested_output_names()
        if self._memory is None or not stays:
            return checked
        shape = len(checked.methods), *self._rules.input[1:]
        return replace(checked, maps=self._memory.take(shape))

    def _input(self, request: Any, name: str) -> Array | DeviceTensor | None:
        """A tensor of numbers of a request, where it lies; None where the request has none.

        Raises:
            RequestError: It is in a GPU's memory, and the model runs on the CPU.
        """
        tensor = triton.get_input_tensor_by_name(request, name)
        if tensor is None or tensor.is_cpu():
            return input_array(request, name)
        if self._memory is None:
            raise RequestError(
                f"{name} is in a GPU's memory, and the model runs on the CPU", "memory"
            )
        return tensor_of(tensor.to_dlpack())

    def _read(self, tensor: DeviceTensor) -> Array:
        assert self._memory is not None  # or _input would have refused it
        return self._memory.read(tensor)

    def _respond(self, request: Request, answer: dict[str, Array] | Exception) -> Any:
        maps, memory = request.maps, self._memory
        if isinstance(answer, Exception):
            if maps is not None and memory is not None:
                memory.give_back(maps)
            return refusal(answer, self._metrics)
        if maps is None or memory is None:
            return response(answer)
        release = partial(memory.give_back, maps)
        shared = triton.Tensor.from_dlpack("SALIENCY", capsule_of(maps, release))
        return response({**answer, "SALIENCY": shared})

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

    def _explain(self, images: ImageParts, targets: Sequence[Target], method: str) -> Explanation:
        pixels, options = images.on_host(), self._methods[method]
        if pixels is not None:
            explanation = self._explainer.explain(pixels, targets, method=options)
        else:
            explanation = self._explainer.explain_parts(images, targets, method=options)
        self._metrics.explained(explanation)
        return explanation


def _memory_of(explainer: Explainer) -> DeviceMemory | None:
    """Memory of the GPU that an explainer runs on; None on a CPU."""
    if explainer.networks.slots is None:
        return None
    from ccam_deploy.engines.cuda.pycuda import CudaDevice

    return DeviceMemory(CudaDevice())


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
            "server sees is used: export with --kind gpu, which says so, or start a server for "
            "each GPU, with CUDA_VISIBLE_DEVICES"
        )
    explainer = load(
        folder,
        backend="auto" if on_gpu else "onnxruntime-cpu",
        precision=settings.precision,
        # On a GPU, buffers and passes have the size of the batch, and Triton sends no larger one.
        batch_size=max(1, max_batch) if on_gpu else max(DEFAULT_BATCH, max_batch),
        threads=settings.threads,
        require_signature=settings.require_signature or None,
    )
    if settings.kind == "gpu" and explainer.networks.slots is None:
        notes = "; ".join(explainer.networks.notes)
        explainer.close()
        raise OptionError(f"no backend runs on a GPU here: {notes}")
    return explainer
