"""The real command and a real browser: a picture goes in, and the explainer's map comes out."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from PIL import Image

import ccam_deploy as ccam
from ccam_deploy.image_files import load_image
from ccam_deploy.page.server import MOST_BYTES
from tests.helpers import ROOT, SCENES

if TYPE_CHECKING:
    from tests.page.browser import Browser

pytestmark = pytest.mark.page

SCENE = SCENES / "scene-7-digits-8-5.png"
OTHER = SCENES / "scene-8-digits-6-2.png"
UPLOADS = "ccam-deploy-page-*"
FIRST, SECOND = "#result-1 img.ccam-overlay", "#result-2 img.ccam-overlay"


@dataclass(frozen=True)
class Served:
    """A page that is served.

    Attributes:
        url: Its address, which ends in a slash.
        process: The command.
    """

    url: str
    process: subprocess.Popen[str]

    def ask(self, method: str, path: str, **more: Any) -> tuple[int, bytes]:
        """Send a request without a browser; the status and the body."""
        place = re.sub(r"^http://|/$", "", self.url)
        connection = http.client.HTTPConnection(place, timeout=60)
        try:
            connection.request(method, path, **more)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextmanager
def served(bundle: Path, *words: str, temporary: Path | None = None) -> Iterator[Served]:
    environment = {**os.environ, **({"TMPDIR": str(temporary)} if temporary else {})}
    command = [sys.executable, "-m", "ccam_deploy", "demo", str(bundle), "--port", "0", *words]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.fullmatch(r"the page is at (http://\S+/)\n", line)
            assert address, (line, process.communicate()[1])
            yield Served(address[1], process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(digits_bundle: Path) -> Iterator[Served]:
    with served(digits_bundle, "--backend", "onnxruntime-cpu") as running:
        yield running


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    from tests.page.browser import chromium, missing

    if missing():
        pytest.skip(missing())
    with chromium() as opened:
        yield opened


@pytest.fixture
def browser(window: Browser, page: Served) -> Browser:
    """The page, newly opened."""
    window.requests()
    window.open(page.url)
    return window


def pixels(browser: Browser, selector: str) -> Any:
    picture = browser.picture(selector)
    return None if picture is None else np.asarray(picture.convert("RGB"))


def expected(
    bundle: Path, file: Path, target: int, method: ccam.Method, look: ccam.Look | None = None
) -> Any:
    with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
        explanation = explainer.explain([load_image(file)], [[target]], method=method)
        return np.asarray(explanation.overlay(0, look))


def wait_for(browser: Browser, selector: str, picture: Any) -> None:
    """Wait until the page shows a picture, to the pixel."""

    def reached() -> bool:
        found = pixels(browser, selector)
        return found is not None and np.array_equal(found, picture)

    browser.wait(reached)


def test_a_picture_is_explained_by_two_methods(browser: Browser, digits_bundle: Path) -> None:
    """The best class at once; then another class, by other methods, with an option changed."""
    browser.upload(SCENE)
    wait_for(browser, FIRST, expected(digits_bundle, SCENE, 8, ccam.CollectionCAM()))
    wait_for(browser, SECOND, expected(digits_bundle, SCENE, 8, ccam.GradCAM()))
    labels = [label.text for label in browser.find("#classes label")]
    assert [re.sub(r" · .*", "", label) for label in labels][:2] == ["8", "5"]
    assert len(labels) == 5
    browser.find("#classes label")[1].click()
    browser.choose("#method-2", "layer-cam")
    browser.one("#options-1 button").click()
    field = browser.one("#collection-cam-k_max-1 input")
    browser.driver.execute_script("arguments[0].value = ''", field)
    field.send_keys("4")
    browser.one("#explain").click()
    wait_for(browser, FIRST, expected(digits_bundle, SCENE, 5, ccam.CollectionCAM(k_max=4)))
    wait_for(browser, SECOND, expected(digits_bundle, SCENE, 5, ccam.LayerCAM()))
    assert "k_max 4" in browser.text("#result-1 figcaption")
    assert len(browser.find("#result-1 h4")) == 4
    assert not browser.find("#result-2 h4")
    assert len(browser.find("#result-1 .ccam-tiles img")) > 8


def test_any_class_by_its_name(browser: Browser, digits_bundle: Path) -> None:
    browser.upload(OTHER)
    browser.wait(lambda: browser.find(SECOND))
    browser.one("#other input, #other textarea").send_keys("3")
    browser.one("#explain").click()
    wait_for(browser, FIRST, expected(digits_bundle, OTHER, 3, ccam.CollectionCAM()))
    entry = browser.one("#other input, #other textarea")
    entry.clear()
    entry.send_keys("eleven")
    browser.one("#explain").click()
    browser.wait(lambda: "eleven" in browser.text("#message"))
    assert browser.text("#message").startswith('class "eleven" is not in the bundle')
    assert "\n" not in browser.text("#message")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"no picture at all", "the picture is not an image of a known format"),
        (SCENE.read_bytes()[:2000], "the picture cannot be decoded"),
    ],
)
def test_what_is_no_picture_is_one_line(
    browser: Browser, tmp_path: Path, content: bytes, line: str
) -> None:
    file = tmp_path / "upload.png"
    file.write_bytes(content)
    browser.upload(file)
    browser.wait(lambda: browser.text("#message").startswith(line))
    time.sleep(1)  # what comes next must not hide it
    assert browser.text("#message").startswith(line)
    assert "\n" not in browser.text("#message")
    assert str(tmp_path) not in browser.driver.page_source
    assert not browser.find(FIRST)


def test_nothing_comes_from_elsewhere(browser: Browser, page: Served) -> None:
    """No font, script or picture, and no connection of the server to another machine."""
    browser.upload(SCENE)
    browser.wait(lambda: browser.find(SECOND))
    asked = browser.requests()
    assert page.url in asked
    assert all(address.startswith((page.url, "data:", "blob:")) for address in asked)
    process = psutil.Process(page.process.pid)
    remote = {entry.raddr.ip for entry in process.net_connections("inet") if entry.raddr}
    assert remote <= {"127.0.0.1"}
    listening = {
        entry.laddr.ip for entry in process.net_connections("inet") if entry.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "manifest.json", "../../etc/passwd", str(ROOT / "pyproject.toml"), "."],
)
def test_no_file_of_the_server_is_served(page: Served, digits_bundle: Path, path: str) -> None:
    for form in (path, quote(path, safe=""), str(digits_bundle / "manifest.json")):
        for place in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/assets/", "/static/"):
            status, body = page.ask("GET", f"{place}{form}")
            assert status in (403, 404)
            assert b"root:" not in body
            assert b"digest" not in body


def test_large_uploads_are_refused(page: Served) -> None:
    length = str(MOST_BYTES + 2**21)
    status, body = page.ask("POST", "/gradio_api/upload", headers={"Content-Length": length})
    assert status == 413
    assert body.count(b"\n") == 1


def test_an_upload_cannot_name_a_file_of_the_server(page: Served) -> None:
    """The handler of an upload takes a path from the browser."""
    secret = ROOT / "export" / "scenes" / "scene-1-digit-9.png"
    events = json.loads(page.ask("GET", "/config")[1])["dependencies"]
    (upload,) = [one["id"] for one in events if one["targets"][0][1] == "upload"]
    for path in (str(secret), "/etc/passwd", "a\0b", "", None):
        answer = event(page, upload, [{"path": path, "url": None}])
        assert "the picture did not arrive" in answer, path


def event(page: Served, number: int, data: list[Any]) -> str:
    """Start an event as the page would; what the server answers."""
    session = "0123456789a"
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session})
    headers = {"Content-Type": "application/json"}
    status, answer = page.ask("POST", "/gradio_api/queue/join", body=body, headers=headers)
    assert status == 200, answer
    status, answer = page.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
    assert status == 200
    return answer.decode()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "error: terminated; nothing was left half-written"),
        (signal.SIGINT, 0, "stopped"),
    ],
)
def test_a_signal_ends_it(
    digits_bundle: Path, tmp_path: Path, number: int, code: int, line: str
) -> None:
    """Also with a browser's connection open; what visitors sent is removed."""
    with served(digits_bundle, temporary=tmp_path) as running:
        assert list(tmp_path.glob(UPLOADS))
        assert running.ask("GET", "/")[0] == 200
        place = re.sub(r"^http://|/$", "", running.url)
        open_connection = http.client.HTTPConnection(place, timeout=60)
        open_connection.request("GET", "/gradio_api/heartbeat/abc")
        running.process.send_signal(number)
        _, errors = running.process.communicate(timeout=60)
        open_connection.close()
    assert (running.process.returncode, errors.splitlines()[-1]) == (code, line)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob(UPLOADS))


def test_a_signal_ends_it_while_an_explanation_runs(window: Browser, digits_bundle: Path) -> None:
    with served(digits_bundle) as running:
        window.open(running.url)
        window.upload(SCENE)
        window.wait(lambda: window.find(SECOND))
        window.choose("#method-1", "rise")
        window.one("#options-1 button").click()
        field = window.one("#rise-masks-1 input")
        window.driver.execute_script("arguments[0].value = ''", field)
        field.send_keys("10000")
        window.one("#explain").click()
        window.wait(lambda: busy(running.process.pid))
        running.process.send_signal(signal.SIGTERM)
        _, errors = running.process.communicate(timeout=45)
    assert running.process.returncode == 143
    assert errors.splitlines()[-1] == "error: terminated; nothing was left half-written"
    assert "Traceback" not in errors


def busy(pid: int) -> bool:
    """Whether a process computes."""
    return bool(psutil.Process(pid).cpu_percent(1.0) > 20)


def test_a_port_that_is_taken_is_one_line(page: Served, digits_bundle: Path) -> None:
    port = page.url.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "ccam_deploy", "demo", str(digits_bundle), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot listen at 127.0.0.1, port {port}: Address already in use; "
        "give another --host or --port\n"
    )


def test_a_wide_picture_shows_what_the_network_did_not_see(
    browser: Browser, digits_bundle: Path, tmp_path: Path
) -> None:
    """On the original picture, larger than the network's input."""
    wide = Image.open(SCENE).convert("RGB").resize((640, 320))
    file = tmp_path / "wide.png"
    wide.save(file)
    browser.upload(file)
    picture = browser.wait(lambda: browser.picture(FIRST))
    assert picture.size == (640, 320)
    shown = np.asarray(picture.convert("RGB"))
    assert np.array_equal(shown[:, :150], np.asarray(wide)[:, :150])
    assert not np.array_equal(shown[:, 160:480], np.asarray(wide)[:, 160:480])
