"""The client: explanations from the real server are the explainer's own, however they travel."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.errors import BackendError, OptionError, ServerError
from ccam_deploy.image_files import load_image
from ccam_deploy.serve.client import Client
from ccam_deploy.serve.repository import Serving, write_repository
from ccam_deploy.serve.run_files import SHARED_MEMORY
from ccam_deploy.serve.server import Server, ServerOptions, serve
from ccam_deploy.serve.settings import ModelSettings
from tests.helpers import example_files, noise
from tests.serve.toy import left_behind

SIZE = (3, 32, 48)
"""What the small network takes."""
WAYS = [("http", "wire"), ("grpc", "wire"), ("http", "system"), ("grpc", "system")]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("client") / "repository"
    settings = ModelSettings(threads=1)
    write_repository(read_bundle(tiny_bundle), repository, Serving(max_batch=4), settings)
    with serve(repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as running:
        yield running
    assert not left_behind()


@pytest.fixture(scope="module")
def explainer(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle) as loaded:
        yield loaded


def address(server: Server, scheme: str) -> str:
    return f"http://{server.http}" if scheme == "http" else f"grpc://{server.grpc}"


def regions() -> list[Path]:
    return list(SHARED_MEMORY.glob("ccam-client-*"))


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "memory"), WAYS)
def test_answers_are_the_explainer_s(
    server: Server, explainer: ccam.Explainer, scheme: str, memory: Any
) -> None:
    """To the bit, for batches that grow and shrink."""
    with Client(address(server, scheme), memory=memory) as client:
        for rows in (2, 4, 1):
            images = noise(rows, *SIZE, seed=rows)
            targets = [3, -1, 0, 2][:rows]
            wanted = [ccam.Top() if target < 0 else target for target in targets]
            own = explainer.explain(images, wanted)
            answer = client.explain(images, targets, weights=True)
            np.testing.assert_array_equal(answer.saliency, own.saliency)
            np.testing.assert_array_equal(answer.classes, own.targets)
            assert answer.weights is not None
            assert answer.collections is not None
            for pair in range(rows):
                weights = [
                    answer.weights[pair, layer, :kept]
                    for layer, kept in enumerate(answer.collections[pair])
                ]
                np.testing.assert_array_equal(np.concatenate(weights), own.weights[pair])
            plain = client.explain(images, method="grad-cam")
            assert plain.weights is None
            own = explainer.explain(images, method="grad-cam")
            np.testing.assert_array_equal(plain.saliency, own.saliency)
        assert bool(regions()) is (memory == "system")
    assert not regions()


@pytest.mark.serve
@pytest.mark.slow
def test_no_request_of_a_single_client_is_held_up(server: Server) -> None:
    """With a queue policy, an idle server lets one in a few wait for half a second."""
    image = noise(1, *SIZE)
    seconds = []
    with Client(address(server, "http")) as client:
        client.explain(image)
        for _ in range(200):
            begun = time.perf_counter()
            client.explain(image)
            seconds.append(time.perf_counter() - begun)
    half, most = np.percentile(seconds, [50, 99])
    assert most <= max(3 * half, 0.25)


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_files(server: Server, explainer: ccam.Explainer, scheme: str) -> None:
    path = example_files()[0]
    with Client(address(server, scheme)) as client:
        best = client.explain_file(path)
        chosen = client.explain_file(path.read_bytes(), target="cat", method="grad-cam")
    own = explainer.explain(load_image(path))
    assert best.index == own.targets[0]
    assert best.label == explainer.bundle.manifest.label(best.index)
    assert best.score == pytest.approx(own.probability(0), abs=1e-6)
    with Image.open(io.BytesIO(best.overlay)) as overlay:
        assert overlay.format == "PNG"
        np.testing.assert_array_equal(np.asarray(overlay), np.asarray(own.overlay(0)))
    assert (chosen.index, chosen.label) == (2, "cat")


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_what_the_model_refuses(server: Server, scheme: str) -> None:
    with Client(address(server, scheme)) as client:
        with pytest.raises(OptionError, match="class 5 is out of range"):
            client.explain(noise(1, *SIZE), [5])
        with pytest.raises(OptionError, match="not one of the model's"):
            client.explain(noise(1, *SIZE), method="magic")
        with pytest.raises(OptionError):
            client.explain_file(b"no picture")
    with Client(address(server, scheme), model="other") as client, pytest.raises(ServerError):
        client.explain(noise(1, *SIZE))


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "grpc://127.0.0.1:9"])
def test_a_server_that_is_not_there(url: str) -> None:
    """Shared memory is given back where nobody takes it, too."""
    for memory in ("wire", "system"):
        client = Client(url, memory=memory)
        with client, pytest.raises(ServerError):
            client.explain(noise(1, *SIZE))
    assert not regions()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(OptionError, match="none of http://HOST:PORT and grpc://HOST:PORT"):
        Client(url)


def test_without_tritonclient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.http", None)
    with pytest.raises(BackendError, match=r"pip install 'ccam-deploy\[serve\]'"):
        Client("http://127.0.0.1:8000")


class FakeTriton:
    """What the client uses of tritonclient, with a GPU's memory that is a dictionary."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[str, np.ndarray[Any, Any]] = {}

    def modules(self) -> dict[str, Any]:
        sizes = {"FP32": np.float32, "INT32": np.int32}
        names = {np.dtype(kind).str: name for name, kind in sizes.items()}
        utils = SimpleNamespace(
            InferenceServerException=KeyError,
            np_to_triton_dtype=lambda dtype: names[np.dtype(dtype).str],
            triton_to_np_dtype=sizes.get,
        )
        cuda = SimpleNamespace(
            create_shared_memory_region=lambda name, size, device: name,
            get_raw_handle=lambda handle: f"raw {handle}".encode(),
            set_shared_memory_region=self.set_region,
            get_contents_as_numpy=lambda handle, dtype, shape: self.memory[handle].reshape(shape),
            destroy_shared_memory_region=lambda handle: self.calls.append(("destroy", handle)),
        )
        grpc = SimpleNamespace(
            InferenceServerClient=lambda place: self, InferInput=_FakeTensor,
            InferRequestedOutput=_FakeTensor,
        )  # fmt: skip
        return {
            "tritonclient.grpc": grpc,
            "tritonclient.utils": utils,
            "tritonclient.utils.cuda_shared_memory": cuda,
        }

    def set_region(self, handle: str, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.memory[handle] = arrays[0].copy()

    def register_cuda_shared_memory(self, *words: Any) -> None:
        self.calls.append(("register", *words))

    def unregister_cuda_shared_memory(self, name: str) -> None:
        self.calls.append(("unregister", name))

    def get_model_metadata(self, model: str, as_json: bool) -> dict[str, Any]:
        outputs = {"SALIENCY": ["-1", "2", "2"], "SCORES": ["-1", "3"], "CLASS": ["-1", "1"]}
        kinds = {"CLASS": "INT32"}
        return {
            "outputs": [
                {"name": name, "shape": shape, "datatype": kinds.get(name, "FP32")}
                for name, shape in outputs.items()
            ]
        }

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Any:
        (images,) = inputs
        rows = images.shape[0]
        values = {
            "SALIENCY": np.full((rows, 2, 2), self.memory[images.region].sum(), np.float32),
            "SCORES": np.zeros((rows, 3), np.float32),
            "CLASS": np.ones((rows, 1), np.int32),
        }
        for output in options["outputs"]:
            assert output.size == values[output.name].nbytes
            self.memory[output.region] = values[output.name]
        kinds = {"CLASS": "INT32"}
        return SimpleNamespace(
            as_numpy=lambda name: None,
            get_output=lambda name: SimpleNamespace(
                shape=values[name].shape, datatype=kinds.get(name, "FP32")
            ),
        )

    def close(self) -> None:
        self.calls.append(("close",))


class _FakeTensor:
    def __init__(self, name: str, shape: Any = (), kind: str = "") -> None:
        self.name = name
        self.shape = shape

    def set_shared_memory(self, region: str, size: int) -> None:
        self.region = region
        self.size = size


def test_a_region_that_the_server_refuses_is_registered_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTriton()
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    register = fake.register_cuda_shared_memory
    refusals = iter([True])

    def refuse(*words: Any) -> None:
        if next(refusals, False):
            raise OSError("the server is gone")
        register(*words)

    monkeypatch.setattr(fake, "register_cuda_shared_memory", refuse)
    images = np.ones((1, 1, 4, 4), np.float32)
    with Client("grpc://127.0.0.1:8001", memory="cuda") as client:
        with pytest.raises(ccam.ServerError):
            client.explain(images)
        assert client.explain(images).saliency.shape == (1, 2, 2)


def test_a_gpu_s_memory_is_registered_used_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented by NVIDIA: the handle's bytes, device 0; a region for each tensor."""
    fake = FakeTriton()
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    images = np.ones((2, 1, 4, 4), np.float32)
    with Client("grpc://127.0.0.1:8001", memory="cuda") as client:
        answer = client.explain(images)
        client.explain(images[:1])
    np.testing.assert_array_equal(answer.saliency, np.full((2, 2, 2), 32))
    np.testing.assert_array_equal(answer.classes, [1, 1])
    registered = {name: words for kind, name, *words in fake.calls[:4] if kind == "register"}
    assert {name.rpartition("-")[2]: words[2] for name, words in registered.items()} == {
        "IMAGES": 128,
        "SALIENCY": 32,
        "SCORES": 24,
        "CLASS": 8,
    }
    for name, (handle, device, _) in registered.items():
        assert (handle, device) == (f"raw {name}".encode(), 0)
    assert [call[0] for call in fake.calls[4:]] == ["unregister", "destroy"] * 4 + ["close"]
