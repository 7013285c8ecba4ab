"""The probe: what it asks, and what it makes of the answers."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccam_deploy.errors import OptionError
from ccam_deploy.serve.probe import check, request_for
from tests.command import run
from tests.serve.fake_server import CONFIG, FakeTriton, fake_triton


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with fake_triton() as server:
        yield server


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_request_is_binary_and_asks_for_the_smallest_output(triton: FakeTriton) -> None:
    assert check(triton.url).alive
    ((method, _, headers, body),) = [ask for ask in triton.asked if ask[1].endswith("/infer")]
    length = int(headers["Inference-Header-Content-Length"])
    assert method == "POST"
    assert json.loads(body[:length]) == {
        "inputs": [
            {
                "name": "IMAGES",
                "shape": [1, 3, 4, 4],
                "datatype": "FP32",
                "parameters": {"binary_data_size": 192},
            }
        ],
        "outputs": [{"name": "CLASS"}],
    }
    np.testing.assert_array_equal(np.frombuffer(body[length:], np.float32), np.zeros(48))


def test_an_input_of_bytes_gets_a_picture() -> None:
    config = {
        "input": [{"name": "IMAGE", "data_type": "TYPE_STRING", "dims": [2]}],
        "output": [{"name": "OVERLAY", "data_type": "TYPE_STRING", "dims": [-1]}],
    }
    (tensor,), output = request_for(config)
    assert (tensor.shape, tensor.datatype, output) == ((2,), "BYTES", "OVERLAY")
    (length,) = struct.unpack_from("<I", tensor.content)
    assert len(tensor.content) == 2 * (4 + length)
    with Image.open(io.BytesIO(tensor.content[4 : 4 + length])) as picture:
        assert picture.format == "PNG"
        picture.load()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("uint8", "UINT8"),
        ("float16", "FP16"),
        ("int64", "INT64"),
        ("float64", "FP64"),
        ("?", "BOOL"),
    ],
)
def test_sizes_are_numpy_s(dtype: str, name: str) -> None:
    entry = {"name": "X", "data_type": f"TYPE_{name}", "dims": [-1, 5]}
    (tensor,), _ = request_for({"input": [entry], "output": [entry]})
    assert (tensor.shape, tensor.datatype) == ((1, 5), name)
    assert tensor.content == np.zeros((1, 5), dtype).tobytes()


@pytest.mark.parametrize(
    ("answer", "alive", "detail"),
    [
        ((200, ""), True, ""),
        ((400, "IMAGES is too dark"), True, "IMAGES is too dark"),
        ((400, "Request for unknown model: 'ccam' has no available versions"), False, None),
        ((500, "Stub process 'ccam_0_0' is not healthy."), False, None),
        ((503, ""), False, "the server answers with status 503"),
    ],
)
def test_a_model_lives_where_it_answers(
    triton: FakeTriton, answer: tuple[int, str], alive: bool, detail: str | None
) -> None:
    """Whatever its health endpoint says: to refuse is to live, to fail is not."""
    triton.answers["ccam"] = answer
    health = check(triton.url)
    assert health.alive is alive
    assert health.models[0].detail == (answer[1] if detail is None else detail)


def test_one_dead_model_of_two(triton: FakeTriton) -> None:
    triton.configs["other"] = CONFIG
    triton.answers["other"] = (500, "broken")
    assert str(check(triton.url)) == f"{triton.url} is not well: other: broken"
    assert check(triton.url, ["ccam"]).alive
    triton.answers.clear()
    triton.ready = False
    assert str(check(triton.url)) == f"{triton.url} is not well: it says that it is not ready"


def test_without_models(triton: FakeTriton) -> None:
    triton.configs.clear()
    assert check(triton.url).detail == "no model is loaded"
    assert check(triton.url, ["ccam"]).models[0].detail.startswith("Request for unknown model")


def test_a_model_that_does_not_answer(triton: FakeTriton) -> None:
    triton.release.clear()
    health = check(triton.url, timeout=0.2)
    assert not health.alive
    assert health.models[0].detail == "no answer in 0.2 s"


def test_a_busy_model_is_alive(triton: FakeTriton) -> None:
    """A probe that killed it would add to its trouble."""
    triton.release.clear()
    triton.pace = 3
    health = check(triton.url, timeout=0.2)
    assert health.alive
    assert health.models[0].detail == "busy, it answered 3 other requests"
    assert "busy, it answered 3 other requests" in str(health)


def test_a_model_that_waits_for_a_busy_one_is_alive(triton: FakeTriton) -> None:
    """As the model of images does in the queue of the one that explains arrays."""
    triton.configs["ccam_image"] = triton.configs["ccam"]
    triton.release.clear()
    triton.pace, triton.busy = 3, "ccam"
    health = check(triton.url, ["ccam_image"], timeout=0.2)
    assert health.alive
    triton.pace = 0
    assert not check(triton.url, ["ccam_image"], timeout=0.2).alive


def test_a_server_that_is_not_there() -> None:
    url = free_address()
    assert str(check(url)) == f"{url} is not well: {url} cannot be reached: Connection refused"
    assert "http://a..b:80 cannot be reached: " in str(check("http://a..b:80"))


def test_something_else_than_triton(triton: FakeTriton) -> None:
    assert not check(f"{triton.url}/elsewhere").alive


@pytest.mark.parametrize("url", ["ftp://localhost", "http://", "http://localhost:port"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(OptionError, match="is no address of a server"):
        check(url)


def outcome(*words: Any) -> tuple[int, str, str]:
    result = run("triton", "check", *words)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_s_exit_code_and_line(triton: FakeTriton) -> None:
    code, told, complaint = outcome(triton.url.removeprefix("http://"))
    assert (code, complaint) == (0, "")
    assert told.startswith(f"{triton.url.removeprefix('http://')} is alive: ccam in ")
    triton.answers["ccam"] = (500, "broken")
    assert outcome(triton.url) == (1, "", f"{triton.url} is not well: ccam: broken\n")
    code, told, _ = outcome(triton.url, "--json")
    assert (code, json.loads(told)["alive"]) == (1, False)
    assert json.loads(told)["models"][0]["detail"] == "broken"
    assert outcome("ftp://x")[0] == 2
