"""A client of the models that `ccam-deploy triton export` writes, by NVIDIA's tritonclient.

Example:
    from ccam_deploy.serve.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.explain(images)  # [N, C, H, W] float32
        answer.saliency  # [N, H, W] float32 in [0, 1]
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.arrays import Floats
from ccam_deploy.errors import BackendError, OptionError, ServerError, brief
from ccam_deploy.extras import install

Memory = Literal["wire", "system", "cuda"]
"""How images and maps travel: in requests, or in memory that client and server share."""

Array = NDArray[Any]
_ALWAYS = ("SALIENCY", "SCORES", "CLASS")
_ON_REQUEST = ("WEIGHTS", "COLLECTIONS")
_PICTURE = ("OVERLAY", "CLASS", "LABEL", "SCORE")


@dataclass(frozen=True)
class Answer:
    """The explanations of N images.

    Attributes:
        saliency: [N, H, W] float32, the maps.
        scores: [N, classes] float32, the probability of each class.
        classes: [N] int32, the class that was explained.
        weights: [N, layers, k_max] float32, the weight of each collection, 0 behind the last;
            None where they were not asked for.
        collections: [N, layers] int32, how many collections each layer has; None as above.
    """

    saliency: Floats
    scores: Floats
    classes: NDArray[np.int32]
    weights: Floats | None = None
    collections: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class PictureAnswer:
    """The explanation of an image file.

    Attributes:
        overlay: A PNG file: the picture with the map over it.
        index: The class that was explained, by its number.
        label: Its name.
        score: Its probability.
    """

    overlay: bytes
    index: int
    label: str
    score: float


class Client:
    """Explains with models on a server. For one thread at a time; close it when done.

    Args:
        url: The server's address, http://HOST:PORT or grpc://HOST:PORT.
        model: The name that the model was exported with.
        memory: How images and maps travel. "system" and "cuda" share memory with a server on the
            same machine, and save copying; "cuda" is a GPU's, and needs cuda-python.
        timeout: Seconds that an answer may take.

    Raises:
        OptionError: The URL has another scheme.
        BackendError: tritonclient, or what the memory needs, is missing.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        model: str = "ccam",
        memory: Memory = "wire",
        timeout: float = 300.0,
    ) -> None:
        scheme, _, place = url.rstrip("/").partition("://")
        if scheme not in ("http", "grpc") or not place:
            raise OptionError(f'"{url}" is none of http://HOST:PORT and grpc://HOST:PORT')
        self._triton = _import(f"tritonclient.{scheme}")
        self._errors = _import("tritonclient.utils").InferenceServerException
        self._over_grpc = scheme == "grpc"
        limits = {} if self._over_grpc else {"network_timeout": timeout}
        self._client = self._triton.InferenceServerClient(place, **limits)
        self._options = {"client_timeout": timeout} if self._over_grpc else {}
        self._model = model
        self._regions = None if memory == "wire" else _Regions(self._client, memory)
        self._sizes: dict[str, int] = {}

    def explain(
        self,
        images: Floats,
        targets: Sequence[int] | None = None,
        method: str | None = None,
        *,
        weights: bool = False,
    ) -> Answer:
        """Explain images.

        Args:
            images: [N, C, H, W] float32, preprocessed as the bundle's manifest says.
            targets: The class of each image, by its number; None, or -1, for the best.
            method: A method that the model was exported with; None for its default.
            weights: Whether to ask for the weights of collections too.

        Returns:
            The explanations.

        Raises:
            OptionError: The model refuses the request; the message says why.
            ServerError: The server cannot be reached, or failed.
        """
        inputs: dict[str, Array] = {"IMAGES": np.ascontiguousarray(images)}
        if targets is not None:
            inputs["TARGETS"] = np.array(targets, np.int32)[:, None]
        if method is not None:
            inputs["METHOD"] = np.full((len(images), 1), method.encode(), np.object_)
        names = _ALWAYS + (_ON_REQUEST if weights else ())
        found = self._infer(self._model, inputs, names)
        more = [found.get(name) for name in _ON_REQUEST]
        return Answer(found["SALIENCY"], found["SCORES"], found["CLASS"][:, 0], *more)

    def explain_file(
        self, image: Path | bytes, target: int | str | None = None, method: str | None = None
    ) -> PictureAnswer:
        """Explain a JPEG or PNG file with the model for image files.

        Args:
            image: The file, or its bytes.
            target: The class, by number or name; None for the best.
            method: As for `explain`.

        Returns:
            The picture with its map, and the class.

        Raises:
            OptionError: The model refuses the image or the class; the message says why.
            ServerError: The server cannot be reached, or failed.
        """
        content = image if isinstance(image, bytes) else image.read_bytes()
        given = {"class": target, "method": method}
        found = self._infer(
            f"{self._model}_image",
            {"IMAGE": np.array([[content]], np.object_)},
            _PICTURE,
            {name: str(value) for name, value in given.items() if value is not None},
        )
        first = {name: values[0, 0] for name, values in found.items()}
        return PictureAnswer(
            first["OVERLAY"], int(first["CLASS"]), first["LABEL"].decode(), float(first["SCORE"])
        )

    def close(self) -> None:
        """Give shared memory back, and end the connection."""
        if self._regions is not None:
            self._regions.close()
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _infer(
        self,
        model: str,
        inputs: dict[str, Array],
        outputs: Sequence[str],
        parameters: dict[str, str] | None = None,
    ) -> dict[str, Array]:
        try:
            given = [self._input(name, values) for name, values in inputs.items()]
            rows = len(next(iter(inputs.values())))
            wanted = [self._output(model, name, rows) for name in outputs]
            options = {**self._options, "parameters": parameters}
            result = self._client.infer(model, given, outputs=wanted, **options)
        except self._errors as error:
            message = brief(RuntimeError(error.message()))
            refused = str(error.status()).endswith(("400", "INVALID_ARGUMENT"))
            raise (OptionError if refused else ServerError)(message) from error
        except OSError as error:
            raise ServerError(f"the server cannot be reached: {brief(error)}") from error
        shared = self._shared_with(model)
        return {name: self._values(result, name, shared) for name in outputs}

    def _shared_with(self, model: str) -> _Regions | None:
        """The memory for a model's outputs; that for image files gives some of unknown size."""
        return self._regions if model == self._model else None

    def _input(self, name: str, values: Array) -> Any:
        kind = _import("tritonclient.utils").np_to_triton_dtype(values.dtype)
        tensor = self._triton.InferInput(name, list(values.shape), kind)
        if self._regions is not None and values.dtype != np.object_:
            region = self._regions.region(name, values.nbytes)
            self._regions.write(name, values)
            tensor.set_shared_memory(region, values.nbytes)
        else:
            tensor.set_data_from_numpy(values)
        return tensor

    def _output(self, model: str, name: str, rows: int) -> Any:
        tensor = self._triton.InferRequestedOutput(name)
        if (shared := self._shared_with(model)) is not None:
            size = rows * self._row_bytes(name)
            tensor.set_shared_memory(shared.region(name, size), size)
        return tensor

    def _row_bytes(self, name: str) -> int:
        """Bytes of an output for one image, as the model's metadata says."""
        if not self._sizes:
            as_json = {"as_json": True} if self._over_grpc else {}
            metadata = self._client.get_model_metadata(self._model, **as_json)
            for output in metadata["outputs"]:
                elements = np.prod([int(length) for length in output["shape"][1:]], dtype=int)
                self._sizes[output["name"]] = int(elements) * _dtype(output["datatype"]).itemsize
        return self._sizes[name]

    def _values(self, result: Any, name: str, shared: _Regions | None) -> Array:
        """An output of an answer, from the region that it was asked to be put into, or from it."""
        if shared is None:
            array: Array = result.as_numpy(name)
            return array
        output = result.get_output(name)
        if self._over_grpc:
            return shared.read(name, _dtype(output.datatype), list(output.shape))
        return shared.read(name, _dtype(output["datatype"]), output["shape"])


class _Regions:
    """Memory that a client and its server share, a region for each tensor.

    Args:
        client: The client, of tritonclient.
        kind: Whose memory it is.
    """

    def __init__(self, client: Any, kind: Literal["system", "cuda"]) -> None:
        self._client = client
        self._kind = kind
        name = "shared_memory" if kind == "system" else "cuda_shared_memory"
        self._module = _import(f"tritonclient.utils.{name}")
        self._prefix = f"ccam-client-{os.getpid()}-{secrets.token_hex(4)}-"
        self._handles: dict[str, tuple[Any, int]] = {}

    def region(self, tensor: str, size: int) -> str:
        """Return the name of a tensor's region, which has at least so many bytes."""
        name = f"{self._prefix}{tensor}"
        if tensor not in self._handles or self._handles[tensor][1] < size:
            self._release(tensor)
            if self._kind == "system":
                handle = self._module.create_shared_memory_region(name, f"/{name}", size)
            else:
                handle = self._module.create_shared_memory_region(name, size, 0)
            self._handles[tensor] = handle, size
            try:
                self._register(name, handle, size)
            except BaseException:
                self._release(tensor)
                raise
        return name

    def _register(self, name: str, handle: Any, size: int) -> None:
        if self._kind == "system":
            self._client.register_system_shared_memory(name, f"/{name}", size)
        else:
            shared = self._module.get_raw_handle(handle)
            self._client.register_cuda_shared_memory(name, shared, 0, size)

    def write(self, tensor: str, values: Array) -> None:
        self._module.set_shared_memory_region(self._handles[tensor][0], [values])

    def read(self, tensor: str, dtype: np.dtype[Any], shape: list[int]) -> Array:
        """Copy a tensor out of its region, which the next answer overwrites."""
        handle = self._handles[tensor][0]
        values = self._module.get_contents_as_numpy(handle, dtype.type, shape)
        return np.array(values)

    def close(self) -> None:
        for tensor in list(self._handles):
            self._release(tensor)

    def _release(self, tensor: str) -> None:
        """Free a region, even where the server is gone and cannot be told."""
        if tensor not in self._handles:
            return
        handle, _ = self._handles.pop(tensor)
        try:
            tell = getattr(self._client, f"unregister_{self._kind}_shared_memory")
            tell(f"{self._prefix}{tensor}")
        except (OSError, _import("tritonclient.utils").InferenceServerException):
            pass  # it forgets the region when it ends
        finally:
            self._module.destroy_shared_memory_region(handle)


def _dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of one of Triton's."""
    kind: type[np.generic] = _import("tritonclient.utils").triton_to_np_dtype(name)
    return np.dtype(kind)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        missing = str(error.name or name).partition(".")[0]
        remedy = "pip install cuda-python" if missing == "cuda" else install("serve")
        raise BackendError(f"{name} needs {missing}; {remedy}") from error
