"""The models that run inside of Triton, on real engines, with Triton's side played by the tests."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.parts import ImageParts
from ccam_deploy.serve.models.device_memory import DeviceMemory
from ccam_deploy.serve.repository import Serving, write_repository
from ccam_deploy.serve.settings import ModelSettings
from tests.engines.cuda.host_device import HostDevice
from tests.helpers import PHOTOGRAPHS, noise
from tests.serve import fake_triton as triton  # before the models, which import its name

EXPLAINED = ("SALIENCY", "SCORES", "CLASS", "WEIGHTS", "COLLECTIONS")
DRAWN = ("OVERLAY", "CLASS", "LABEL", "SCORE")
METHODS = ("collection-cam", "grad-cam", "layer-cam", "rise")
SETTINGS = ModelSettings(METHODS, {"collection-cam": {"k_max": 7}, "rise": {"masks": 30}})
COLLECTIONS = ccam.CollectionCAM(k_max=7)

Array = NDArray[Any]
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_repository(read_bundle(tiny_bundle), folder, Serving(max_batch=4), SETTINGS)
    return folder


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    triton.reset()
    yield
    triton.reset()


def parameters_of(folder: Path) -> dict[str, str]:
    pattern = r'key: "(\w+)" value { string_value: ("(?:[^"\\]|\\.)*") }'
    pairs = re.findall(pattern, (folder / "config.pbtxt").read_text())
    return {key: json.loads(value) for key, value in pairs}


@pytest.fixture
def opened(repository: Path) -> Iterator[Opened]:
    """Loads a model as Triton does, with changed arguments or parameters, until the test ends."""
    models: list[Any] = []

    def load(name: str = "ccam", kind: str = "CPU", device: str = "0", **changed: str) -> Any:
        folder = repository / name
        parameters = {**parameters_of(folder), **changed}
        config = {
            "max_batch_size": 4,
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }
        args = {
            "model_config": json.dumps(config),
            "model_instance_kind": kind,
            "model_instance_device_id": device,
            "model_name": name,
            "model_repository": str(folder),
            "model_version": "1",
        }
        names: dict[str, Any] = {}
        exec((folder / "1" / "model.py").read_text(), names)
        model = names["TritonPythonModel"]()
        model.initialize(args)
        triton.loaded[name] = model.execute
        if name == "ccam":
            models.append(model)
        return model

    yield load
    for model in models:
        model.finalize()


@pytest.fixture
def explainer(tiny_bundle: Path) -> Iterator[ccam.Explainer]:
    with ccam.load(tiny_bundle) as explainer:
        yield explainer


def asked(
    images: Array, targets: list[int] | None = None, methods: list[bytes] | None = None, **more: Any
) -> triton.InferenceRequest:
    tensors: dict[str, Array] = {"IMAGES": images}
    if targets is not None:
        tensors["TARGETS"] = np.array(targets, np.int32)[:, None]
    if methods is not None:
        tensors["METHOD"] = np.array([[name] for name in methods], np.object_)
    return triton.request(tensors, more.get("wanted", EXPLAINED))


def tensor(response: triton.InferenceResponse, name: str) -> Array:
    assert not response.has_error(), response.error().message()
    return response.tensors[name].as_numpy()


def error(response: triton.InferenceResponse) -> tuple[str, int]:
    assert response.has_error()
    return response.error().message(), response.error().code()


def test_requests_of_a_batch_are_explained_together(
    opened: Opened, explainer: ccam.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different classes in one pass of the backbone and one set of masked forwards, to the bit."""
    model = opened()
    images = noise(4, 3, 32, 48)
    ran: list[tuple[str, int]] = []
    networks = model._explainer.networks
    for name in ("backbone", "masked_logits"):
        whole = getattr(networks, name)

        def counted(*args: Any, name: str = name, whole: Any = whole) -> Any:
            ran.append((name, len(args[-1])))
            return whole(*args)

        monkeypatch.setattr(networks, name, counted)
    answers = model.execute(
        [asked(images[:1], [2]), asked(images[1:3], [-1, 0]), asked(images[3:], [4])]
    )
    expected = explainer.explain(images, [2, ccam.Top(), 0, 4], method=COLLECTIONS)
    assert ran[0] == ("backbone", 4)
    masks = [count for name, count in ran[1:] if name == "masked_logits"]
    forwards = sum(int(np.count_nonzero(weights)) for weights in expected.weights)
    assert sum(masks) == forwards
    assert len(masks) == -(-forwards // 16)
    rows = [slice(0, 1), slice(1, 3), slice(3, 4)]
    for answer, own in zip(answers, rows, strict=True):
        assert (tensor(answer, "SALIENCY") == expected.saliency[own]).all()
        assert tensor(answer, "CLASS")[:, 0].tolist() == expected.targets[own].tolist()
        for scores, logits in zip(tensor(answer, "SCORES"), expected.logits[own], strict=True):
            shares = np.exp(logits.astype(float) - logits.max())
            assert scores == pytest.approx(shares / shares.sum(), rel=1e-6)


def test_weights_stand_layer_by_layer(opened: Opened, explainer: ccam.Explainer) -> None:
    images = noise(2, 3, 32, 48)
    (answer,) = opened().execute([asked(images)])
    expected = explainer.explain(images, method=COLLECTIONS)
    weights, counts = tensor(answer, "WEIGHTS"), tensor(answer, "COLLECTIONS")
    assert weights.shape == (2, 2, 7)
    for pair in range(2):
        assert counts[pair].tolist() == [layer.count[pair] for layer in expected.layers]
        rows = [row[:count] for row, count in zip(weights[pair], counts[pair], strict=True)]
        assert (np.concatenate(rows) == expected.weights[pair]).all()
        assert all(
            (row[count:] == 0).all() for row, count in zip(weights[pair], counts[pair], strict=True)
        )


def test_methods_of_one_request_may_differ(opened: Opened, explainer: ccam.Explainer) -> None:
    images = noise(3, 3, 32, 48)
    (answer,) = opened().execute([asked(images, [1, 1, 1], [b"grad-cam", b"", b"grad-cam"])])
    expected = explainer.explain(images[::2], 1, method="grad-cam")
    assert (tensor(answer, "SALIENCY")[::2] == expected.saliency).all()
    alone = explainer.explain(images[1:2], 1, method=COLLECTIONS)
    assert (tensor(answer, "SALIENCY")[1] == alone.saliency[0]).all()
    assert not tensor(answer, "COLLECTIONS")[::2].any()
    assert tensor(answer, "COLLECTIONS")[1].all()


def test_only_what_is_asked_for_is_answered(opened: Opened) -> None:
    (answer,) = opened().execute([asked(noise(1, 3, 32, 48), wanted=["CLASS"])])
    assert set(answer.tensors) == {"CLASS"}


def test_what_is_counted(opened: Opened, explainer: ccam.Explainer) -> None:
    model = opened()
    images = noise(2, 3, 32, 48)
    model.execute([asked(images), asked(images[:1], [1], [b"rise"])])
    weights = explainer.explain(images, method=COLLECTIONS).weights
    forwards = [int(np.count_nonzero(row)) for row in weights]
    assert triton.counts["ccam_explanations_total", "ccam", "collection-cam"] == 2
    assert triton.counts["ccam_explanations_total", "ccam", "rise"] == 1
    assert triton.counts["ccam_masked_forwards_total", "ccam", "collection-cam"] == sum(forwards)
    assert triton.counts["ccam_masked_forwards_total", "ccam", "rise"] == 30
    assert triton.observed["ccam_masks_per_explanation", "ccam", "collection-cam"] == forwards
    for stage in ("backbone", "gradient", "partition", "classifier"):
        assert triton.counts["ccam_stage_seconds_total", "ccam", "collection-cam", stage] > 0


def test_refusals_are_clean_and_counted(opened: Opened) -> None:
    model = opened()
    images = noise(1, 3, 32, 48)
    answers = model.execute(
        [
            asked(images * np.nan),
            asked(images, [5]),
            asked(images, None, [b"nope"]),
            asked(images, [1]),
            triton.request({"TARGETS": np.zeros((1, 1), np.int32)}, EXPLAINED),
        ]
    )
    refusal = "IMAGES has NaN or infinite pixels", triton.TritonError.INVALID_ARG
    assert error(answers[0]) == refusal
    assert error(answers[1])[0].startswith("class 5 is out of range; the model has classes 0 to 4")
    assert error(answers[2])[0] == f'method "nope" is not one of the model\'s: {", ".join(METHODS)}'
    assert not answers[3].has_error()
    assert error(answers[4]) == ("the request has no IMAGES", triton.TritonError.INVALID_ARG)
    for reason in ("not-finite", "class", "method", "shape"):
        assert triton.counts["ccam_refused_inputs_total", "ccam", reason] == 1


def test_an_engine_s_failure_names_nothing_on_the_server(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fails no request that is fine: large pixels overflow in the network of one alone."""
    model = opened()
    huge = np.full((1, 3, 32, 48), 3e38, np.float32)
    good = noise(1, 3, 32, 48)
    first, second = model.execute([asked(huge), asked(good)])
    message, code = error(first)
    assert code == triton.TritonError.INTERNAL
    assert message == "the classifier gives NaN or infinite logits for these images"
    assert not second.has_error()
    assert triton.counts["ccam_failures_total", "ccam"] == 1

    def broken(*_: object) -> None:
        raise RuntimeError("cannot read /srv/models/ccam/1/bundle/weights.bin\nat line 3")

    monkeypatch.setattr(model._explainer, "explain", lambda *_, **__: broken())
    answers = model.execute([asked(good), asked(good)])
    for answer in answers:
        assert error(answer)[0] == "the explanation failed; the server's log says why"
    assert "/srv/models/ccam/1/bundle/weights.bin" in triton.log[-1]
    assert "\n" not in triton.log[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "GPU", "device": "1"}, "an instance is on GPU 1; only the first that the server"),
        ({"precision": "fp16"}, "the bundle has no fp16 graphs, only fp32"),
        ({"methods": "integrated-gradients"}, "the bundle has no input_gradient graph"),
        ({"threads": "-"}, "a parameter in config.pbtxt is unusable"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(
    opened: Opened, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(triton.TritonModelException, match=re.escape(message)):
        opened(**changes)


def test_methods_that_the_bundle_cannot_run_are_left_out(opened: Opened) -> None:
    model = opened(methods="", options="{}")
    assert "collection-cam" in model._rules.methods
    assert "recipro-cam" not in model._rules.methods
    assert "without method recipro-cam: the bundle has no head graph" in "\n".join(triton.log)


def on_device(device: HostDevice, values: Array) -> DeviceTensor:
    tensor = DeviceTensor(device.allocate(values.nbytes), values.shape, values.dtype)
    device.upload(tensor.address, values)
    return tensor


def test_tensors_in_a_gpu_s_memory_stay_there(
    opened: Opened, explainer: ccam.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests that are explained beside others whose images are on the host."""
    model, device = opened(), HostDevice()
    model._memory = DeviceMemory(device)
    images = noise(4, 3, 32, 48)

    def explain_parts(parts: ImageParts, targets: Any, method: Any) -> ccam.Explanation:
        found: ccam.Explanation = model._explainer.explain(
            parts.fetch(device), targets, method=method
        )
        parts.give(device, found.saliency)
        return found

    monkeypatch.setattr(model._explainer, "explain_parts", explain_parts)
    lent = []
    for _ in range(3):
        shared = {
            "IMAGES": on_device(device, images[1:3]),
            "TARGETS": on_device(device, np.array([[0], [-1]], np.int32)),
        }
        requests = [asked(images[:1]), triton.request(shared, EXPLAINED), asked(images[3:], [4])]
        host, there, last = model.execute(requests)
        best = ccam.Top()
        expected = explainer.explain(images, [best, 0, best, 4], method=COLLECTIONS)
        maps = there.tensors["SALIENCY"]
        assert not maps.is_cpu()
        assert (maps.content() == expected.saliency[1:3]).all()
        assert tensor(there, "CLASS")[:, 0].tolist() == expected.targets[1:3].tolist()
        assert (tensor(host, "SALIENCY") == expected.saliency[:1]).all()
        assert (tensor(last, "SALIENCY") == expected.saliency[3:]).all()
        lent.append(maps.tensor.address)
    assert lent[0] == lent[2]  # the first was given back when its response was gone


def test_maps_that_nobody_gets_are_given_back(opened: Opened) -> None:
    """Where the explanation fails: there are no slots here."""
    model, device = opened(), HostDevice()
    model._memory = DeviceMemory(device)
    images = on_device(device, noise(1, 3, 32, 48))
    for _ in range(3):
        (answer,) = model.execute([triton.request({"IMAGES": images}, EXPLAINED)])
        assert "images are in a GPU's memory" in error(answer)[0]
    assert device.allocations == 2


def test_a_model_on_the_cpu_refuses_a_gpu_s_memory(opened: Opened) -> None:
    images = on_device(HostDevice(), noise(1, 3, 32, 48))
    (answer,) = opened().execute([triton.request({"IMAGES": images}, EXPLAINED)])
    line = "IMAGES is in a GPU's memory, and the model runs on the CPU"
    assert error(answer) == (line, triton.TritonError.INVALID_ARG)
    assert triton.counts["ccam_refused_inputs_total", "ccam", "memory"] == 1


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    with Image.open(PHOTOGRAPHS / "cat.jpg") as photograph:
        return photograph.convert("RGB").resize(size)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def sent(*contents: object, **parameters: object) -> triton.InferenceRequest:
    array = np.empty((len(contents), 1), np.object_)
    array[:, 0] = contents
    return triton.request({"IMAGE": array}, DRAWN, parameters)


def test_pictures_are_answered_with_pictures(opened: Opened, explainer: ccam.Explainer) -> None:
    """Those that the explainer draws, for two requests with different classes and sizes."""
    opened("ccam")
    model = opened("ccam_image")
    large, small = picture((1300, 900)), picture((60, 90))
    answers = model.execute(
        [sent(file_of(large), file_of(small), **{"class": "cat"}), sent(file_of(small))]
    )
    expected = explainer.explain([large, small, small], [2, 2, ccam.Top()], method=COLLECTIONS)
    for answer, pairs in zip(answers, ([0, 1], [2]), strict=True):
        for row, pair in enumerate(pairs):
            content = tensor(answer, "OVERLAY")[row, 0]
            assert content.startswith(b"\x89PNG")
            drawn, wanted = Image.open(io.BytesIO(content)), expected.overlay(pair)
            assert drawn.size == wanted.size
            assert (np.asarray(drawn) == np.asarray(wanted)).all()
            assert tensor(answer, "CLASS")[row, 0] == expected.targets[pair]
            assert tensor(answer, "LABEL")[row, 0].decode() == expected.labels[pair]
            score = expected.probability(pair)
            assert tensor(answer, "SCORE")[row, 0] == pytest.approx(score, rel=1e-6)
    assert triton.counts["ccam_explanations_total", "ccam", "collection-cam"] == 3


def test_a_header_names_class_and_method(opened: Opened) -> None:
    opened("ccam")
    headers = {"X-Ccam-Class": "1", "x-ccam-method": "grad-cam"}
    (answer,) = opened("ccam_image").execute([sent(file_of(picture()), **headers)])
    assert tensor(answer, "CLASS").tolist() == [[1]]
    assert triton.counts["ccam_explanations_total", "ccam", "grad-cam"] == 1


def test_pictures_that_cannot_be_used(opened: Opened) -> None:
    opened("ccam")
    model = opened("ccam_image", max_image_bytes="50000")
    good = file_of(picture())
    answers = model.execute(
        [
            sent(b"hello"),
            sent(good, **{"class": "wolf\n" * 100}),
            sent(good),
            sent(file_of(picture(), "JPEG")[:-300]),
            sent(good, method="nope"),
            sent(b"x" * 50_001),
        ]
    )
    lines = [error(answer)[0] for answer in answers if answer.has_error()]
    assert not answers[2].has_error()
    assert lines[0].startswith("the image is not an image of a known format (JPEG, PNG)")
    assert lines[1].startswith('class "wolf\\nwolf\\n')
    assert lines[2].startswith("the image cannot be decoded")
    assert lines[3].startswith('method "nope" is not one of')
    assert lines[4] == "the image has 50001 bytes, more than 50000"
    assert all(
        error(answer)[1] == triton.TritonError.INVALID_ARG
        for answer in answers
        if answer.has_error()
    )
    for reason in ("format", "class", "undecodable", "method", "bytes"):
        assert triton.counts["ccam_refused_inputs_total", "ccam_image", reason] == 1
    assert triton.counts["ccam_refused_inputs_total", "ccam", "method"] == 1
    assert triton.counts["ccam_explanations_total", "ccam", "collection-cam"] == 1


def test_without_the_model_that_explains(opened: Opened) -> None:
    (answer,) = opened("ccam_image").execute([sent(file_of(picture()))])
    assert error(answer) == ('model "ccam" does not answer', triton.TritonError.UNAVAILABLE)
    assert triton.counts["ccam_failures_total", "ccam_image"] == 1
