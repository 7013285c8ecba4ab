"""Both models in the real server, asked by the real clients over HTTP and gRPC."""

from __future__ import annotations

import io
import json
import re
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.serve.repository import Serving, write_repository
from ccam_deploy.serve.server import Server, ServerOptions, serve
from ccam_deploy.serve.settings import ModelSettings
from tests.helpers import example_files, noise
from tests.serve.test_requests import bomb, file_of

pytestmark = [pytest.mark.serve, pytest.mark.slow]

METHOD = ccam.CollectionCAM(k_max=5)
SETTINGS = ModelSettings(
    ("collection-cam", "grad-cam", "layer-cam"), {"collection-cam": {"k_max": 5}}, threads=1
)
MAX_BATCH = 4
PROTOCOLS = ("http", "grpc")

Array = NDArray[Any]


class Caller:
    """A client of one protocol, as its library is used without this package's helper."""

    def __init__(self, server: Server, protocol: str) -> None:
        self.library = import_module(f"tritonclient.{protocol}")
        self.error = import_module("tritonclient.utils").InferenceServerException
        place = server.http if protocol == "http" else server.grpc
        self._client = self.library.InferenceServerClient(place)

    def ask(
        self,
        model: str = "ccam",
        wanted: Sequence[str] = ("SALIENCY", "SCORES", "CLASS"),
        parameters: dict[str, str] | None = None,
        classes: int = 0,
        **tensors: Array,
    ) -> dict[str, Array]:
        inputs = []
        for name, values in tensors.items():
            kind = import_module("tritonclient.utils").np_to_triton_dtype(values.dtype)
            inputs.append(self.library.InferInput(name, list(values.shape), kind))
            inputs[-1].set_data_from_numpy(values)
        outputs = [self.library.InferRequestedOutput(name, class_count=classes) for name in wanted]
        result = self._client.infer(model, inputs, outputs=outputs, parameters=parameters)
        return {name: result.as_numpy(name) for name in wanted}

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    serving = Serving(instances=2, max_batch=MAX_BATCH, queue_delay_us=20_000)
    write_repository(read_bundle(tiny_bundle), folder, serving, SETTINGS)
    options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, exit_timeout=10)
    with serve(folder, options, print) as running:
        yield running


@pytest.fixture(params=PROTOCOLS)
def caller(server: Server, request: pytest.FixtureRequest) -> Iterator[Caller]:
    caller = Caller(server, request.param)
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def explainer(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle, threads=1) as explainer:
        yield explainer


def inputs(count: int, seed: int = 0) -> Floats:
    return noise(count, 3, 32, 48, seed=seed)


def column(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, np.int32)[:, None]


def named(*names: str) -> Array:
    return np.array([[name.encode()] for name in names], np.object_)


def metrics(server: Server) -> dict[str, float]:
    """The value of each of the models' own metrics, by its name with its labels."""
    with urllib.request.urlopen(server.metrics) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("ccam_"))
    return {name: float(value) for name, value in pairs}


def test_answers_are_the_explainer_s_to_the_bit(caller: Caller, explainer: ccam.Explainer) -> None:
    images = inputs(3)
    found = caller.ask(
        wanted=("SALIENCY", "SCORES", "CLASS", "WEIGHTS", "COLLECTIONS"),
        IMAGES=images,
        TARGETS=column(2, -1, 4),
    )
    expected = explainer.explain(images, [2, ccam.Top(), 4], method=METHOD)
    assert found["SALIENCY"].dtype == np.float32
    assert (found["SALIENCY"] == expected.saliency).all()
    assert found["CLASS"][:, 0].tolist() == expected.targets.tolist()
    shares = np.exp(expected.logits.astype(float))
    shares /= shares.sum(axis=1, keepdims=True)
    assert found["SCORES"] == pytest.approx(shares, rel=1e-6)
    for pair in range(3):
        counts = found["COLLECTIONS"][pair]
        assert counts.tolist() == [layer.count[pair] for layer in expected.layers]
        rows = zip(found["WEIGHTS"][pair], counts, strict=True)
        weights = np.concatenate([row[:count] for row, count in rows])
        assert (weights == expected.weights[pair]).all()


def test_the_best_class_and_the_default_method_need_no_input(
    caller: Caller, explainer: ccam.Explainer
) -> None:
    images = inputs(1)
    found = caller.ask(IMAGES=images)
    expected = explainer.explain(images, method=METHOD)
    assert (found["SALIENCY"] == expected.saliency).all()


@pytest.mark.parametrize("method", ["grad-cam", "layer-cam"])
def test_other_methods(caller: Caller, explainer: ccam.Explainer, method: str) -> None:
    images = inputs(2)
    found = caller.ask(IMAGES=images, METHOD=named(method, method))
    assert (found["SALIENCY"] == explainer.explain(images, method=method).saliency).all()


def test_labels_stand_beside_scores(caller: Caller) -> None:
    """By the server's extension for classifiers, which reads the file of labels."""
    found = caller.ask(wanted=("SCORES",), classes=2, IMAGES=inputs(1))
    for word in found["SCORES"].ravel().tolist():
        _, index, label = word.decode().split(":")
        assert label == ("ant", "bee", "cat", "dog", "dog")[int(index)]


def test_the_bad_are_told_apart_from_the_good(server: Server, caller: Caller) -> None:
    """Each is refused as the caller's mistake, by a line that names nothing on the server."""
    good = inputs(1)
    bad: list[tuple[dict[str, Array], str]] = [
        ({"IMAGES": good * np.float32(np.nan)}, "IMAGES has NaN or infinite pixels"),
        ({"IMAGES": np.full_like(good, np.inf)}, "IMAGES has NaN or infinite pixels"),
        ({"IMAGES": good, "TARGETS": column(5)}, "class 5 is out of range"),
        ({"IMAGES": good, "TARGETS": column(-2)}, "class -2 is out of range"),
        ({"IMAGES": good, "METHOD": named("explode")}, 'method "explode" is not one'),
        ({"IMAGES": good[:, :, :8]}, "unexpected shape for input 'IMAGES'"),
        ({"IMAGES": good.astype(np.float64)}, "expects"),
        ({"IMAGES": inputs(MAX_BATCH + 1)}, "batch-size must be <= 4"),
        ({"TARGETS": column(1)}, "the request has no IMAGES"),
    ]
    before = metrics(server)
    for tensors, message in bad:
        with pytest.raises(caller.error, match=re.escape(message)) as caught:
            caller.ask("ccam", ("SALIENCY",), None, 0, **tensors)
        assert str(caught.value.status()) in ("400", "StatusCode.INVALID_ARGUMENT")
        assert "\n" not in caught.value.message()
        assert not re.search(r"/\w+/|\.py\b|Traceback", caught.value.message())
        assert caller.ask(IMAGES=good)["SALIENCY"].shape == (1, 32, 48)
    after = metrics(server)
    for reason, count in (("not-finite", 2), ("class", 2), ("method", 1)):
        name = f'ccam_refused_inputs_total{{model="ccam",reason="{reason}",version="1"}}'
        assert after[name] - before.get(name, 0) == count


def test_everyone_gets_the_own_answer(server: Server, explainer: ccam.Explainer) -> None:
    """A thousand requests of one to four images, from eight clients of both protocols at once.

    The server puts requests together as they come. Layer-CAM's maps are the same to the bit
    whatever an image is explained with; Collection-CAM's masks share their forwards, in whose last
    bits a map may differ.
    """
    images, clients, each = inputs(12, seed=1), 8, 125
    pairs = [list(range(5))] * len(images)
    tolerances = {"layer-cam": 0.0, "collection-cam": 1e-5}
    maps = {
        name: explainer.explain(images, pairs, method=method).saliency.reshape(-1, 5, 32, 48)
        for name, method in (("layer-cam", ccam.LayerCAM()), ("collection-cam", METHOD))
    }
    every = np.concatenate(list(maps.values())).reshape(-1, 32 * 48)
    apart = np.abs(every[:, None] - every[None]).max(axis=2) + np.eye(len(every))
    assert apart.min() > 0.01  # or another's answer could pass for the own

    def work(number: int) -> int:
        caller, source = Caller(server, PROTOCOLS[number % 2]), np.random.default_rng(number)
        right = 0
        for _ in range(each):
            rows = source.integers(0, len(images), source.integers(1, MAX_BATCH + 1))
            targets = source.integers(0, 5, len(rows))
            method = str(source.choice(list(tolerances), p=[0.8, 0.2]))
            found = caller.ask(
                wanted=("SALIENCY", "CLASS"),
                IMAGES=images[rows],
                TARGETS=column(*targets),
                METHOD=named(*[method] * len(rows)),
            )
            off = np.abs(found["SALIENCY"] - maps[method][rows, targets]).max()
            same = off <= tolerances[method]
            right += same and found["CLASS"][:, 0].tolist() == targets.tolist()
        caller.close()
        return right

    with ThreadPoolExecutor(clients) as pool:
        assert list(pool.map(work, range(clients))) == [each] * clients


def test_requests_for_different_classes_run_as_one(server: Server) -> None:
    """The server's own count of runs and of images: fewer runs than requests."""

    def counts() -> tuple[int, int]:
        with urllib.request.urlopen(f"http://{server.http}/v2/models/ccam/stats") as page:
            (model,) = json.load(page)["model_stats"]
        return int(model["execution_count"]), int(model["inference_count"])

    def settled() -> tuple[int, int]:
        """The server counts a moment after it has answered."""
        known = counts()
        for _ in range(30):
            time.sleep(0.5)
            if known == (known := counts()):
                break
        return known

    images = inputs(8)
    runs, before = settled()

    def one(index: int) -> None:
        own = Caller(server, "grpc")
        own.ask(IMAGES=images[index : index + 1], TARGETS=column(index % 5))
        own.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    more, after = settled()
    assert after - before == 8
    assert more - runs < 8


def test_what_is_counted(server: Server, explainer: ccam.Explainer) -> None:
    caller, images = Caller(server, "http"), inputs(2, seed=5)
    before = metrics(server)
    caller.ask(IMAGES=images)
    after = metrics(server)
    caller.close()

    def grown(name: str, **labels: str) -> float:
        words = {"method": "collection-cam", "model": "ccam", "version": "1", **labels}
        inside = ",".join(f'{label}="{word}"' for label, word in sorted(words.items()))
        key = f"{name}{{{inside}}}"
        return after[key] - before.get(key, 0)

    masks = [np.count_nonzero(w) for w in explainer.explain(images, method=METHOD).weights]
    assert grown("ccam_explanations_total") == 2
    assert grown("ccam_masked_forwards_total") == sum(masks)
    assert grown("ccam_masks_per_explanation_sum") == sum(masks)
    assert grown("ccam_masks_per_explanation_count") == 2
    for stage in ("backbone", "gradient", "statistics", "partition", "masks", "classifier"):
        assert 0 < grown("ccam_stage_seconds_total", stage=stage) < 60


def scene() -> Image.Image:
    with Image.open(example_files()[0]) as picture:
        return picture.convert("RGB")


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_files_are_answered_with_overlays(
    caller: Caller, explainer: ccam.Explainer, kind: str
) -> None:
    content = encoded(scene(), kind)
    found = caller.ask(
        "ccam_image",
        ("OVERLAY", "CLASS", "LABEL", "SCORE"),
        {"class": "bee"},
        IMAGE=np.array([[content]], np.object_),
    )
    expected = explainer.explain(Image.open(io.BytesIO(content)), "bee", method=METHOD)
    drawn = Image.open(io.BytesIO(found["OVERLAY"][0, 0]))
    assert (np.asarray(drawn) == np.asarray(expected.overlay())).all()
    assert found["CLASS"].tolist() == [[1]]
    assert found["LABEL"].tolist() == [[b"bee"]]
    assert found["SCORE"][0, 0] == pytest.approx(expected.probability(), rel=1e-6)


def post(server: Server, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, Any]:
    """Send a file as it is, as curl does."""
    place = f"http://{server.http}/v2/models/ccam_image/infer"
    words = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}
    asked = urllib.request.Request(place, body, {**words, **headers})
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_a_raw_file_by_post(server: Server, explainer: ccam.Explainer) -> None:
    content = encoded(scene(), "JPEG")
    status, body, headers = post(server, content, {"X-Ccam-Class": "2"})
    assert status == 200
    end = int(headers["Inference-Header-Content-Length"])
    described = {output["name"]: output for output in json.loads(body[:end])["outputs"]}
    sizes = [output["parameters"]["binary_data_size"] for output in described.values()]
    starts = dict(zip(described, np.cumsum([end, *sizes])[:-1].tolist(), strict=True))
    assert struct.unpack_from("<i", body, starts["CLASS"]) == (2,)
    (length,) = struct.unpack_from("<I", body, starts["OVERLAY"])
    png = body[starts["OVERLAY"] + 4 :][:length]
    expected = explainer.explain(Image.open(io.BytesIO(content)), 2, method=METHOD)
    assert (np.asarray(Image.open(io.BytesIO(png))) == np.asarray(expected.overlay())).all()


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"hello", {}, "the image is not an image of a known format (JPEG, PNG)"),
        (file_of("GIF"), {}, "the image is not an image of a known format"),
        (file_of("JPEG")[:-200], {}, "the image cannot be decoded"),
        (bomb(), {}, "the image has 10000000000 pixels, more than"),
        (b"\xff" * (33 * 2**20), {}, f"the image has {33 * 2**20} bytes, more than {2**25}"),
        (file_of("PNG"), {"X-Ccam-Class": "wolf"}, 'class "wolf" is not in the bundle'),
        (file_of("PNG"), {"X-Ccam-Class": "dog"}, 'the name "dog" stands for 3 "dog", 4 "dog"'),
        (file_of("PNG"), {"X-Ccam-Method": "rise"}, 'method "rise" is not one of'),
    ],
)
def test_files_that_cannot_be_used(
    server: Server, body: bytes, headers: dict[str, str], message: str
) -> None:
    status, answer, _ = post(server, body, headers)
    assert status == 400
    line = json.loads(answer)["error"]
    assert line.startswith(message)
    assert "\n" not in line
    assert not re.search(r"/\w+/|\.py\b|Traceback", line)


def test_a_file_that_is_cut_anywhere_is_refused(server: Server) -> None:
    content = encoded(scene(), "PNG")
    for cut in np.linspace(1, len(content) - 100, 12, dtype=int).tolist():
        status, answer, _ = post(server, content[:cut], {})
        assert status == 400, answer


def raw(server: Server, model: str, body: bytes, header: str) -> int:
    place = f"http://{server.http}/v2/models/{model}/infer"
    words = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": header}
    try:
        with urllib.request.urlopen(urllib.request.Request(place, body, words)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_damaged_requests_break_nothing(server: Server, explainer: ccam.Explainer) -> None:
    """A valid request with bytes changed, cut off or announced wrongly, many times over.

    Triton refuses most itself, some of them with status 500. What gets through to a model is
    explained or refused, and the next request is answered as ever.
    """
    library = import_module("tritonclient.http")
    tensors = [library.InferInput("IMAGES", [1, 3, 32, 48], "FP32")]
    tensors[0].set_data_from_numpy(inputs(1))
    tensors.append(library.InferInput("TARGETS", [1, 1], "INT32"))
    tensors[1].set_data_from_numpy(column(3))
    body, length = library.InferenceServerClient.generate_request_body(tensors)
    assert raw(server, "ccam", body, str(length)) == 200
    source, statuses = np.random.default_rng(0), []
    for _ in range(100):
        damaged = bytearray(body)
        start, end = (0, length) if source.random() < 0.5 else (length, len(body))
        for place in source.integers(start, end, source.integers(1, 4)):
            damaged[place] = source.integers(256)
        cut = len(body) if source.random() < 0.7 else source.integers(length, len(body))
        announced = length if source.random() < 0.7 else source.integers(0, 2 * length)
        statuses.append(raw(server, "ccam", bytes(damaged[:cut]), str(announced)))
        assert raw(server, "ccam_image", bytes(damaged[:cut]), "0") == 400
    assert {200, 400} <= set(statuses) <= {200, 400, 500}
    assert not any(value for name, value in metrics(server).items() if "failures" in name)
    caller = Caller(server, "http")
    expected = explainer.explain(inputs(1), method=METHOD)
    assert (caller.ask(IMAGES=inputs(1))["SALIENCY"] == expected.saliency).all()
    caller.close()
