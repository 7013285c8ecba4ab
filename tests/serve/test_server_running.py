"""The real server: it answers, survives the death of a model, drains, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ccam_deploy.errors import ServerError
from ccam_deploy.serve.endpoint import HttpEndpoint
from ccam_deploy.serve.probe import check
from ccam_deploy.serve.stubs import alive
from tests.command import run
from tests.serve.toy import Running, ask, left_behind, serving, until, write_toy

pytestmark = [pytest.mark.serve, pytest.mark.slow]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("triton") / "repository")


@pytest.fixture(scope="module")
def shared(repository: Path) -> Iterator[Running]:
    """A server for tests that leave it as it was."""
    with serving(repository) as running:
        yield running


def client_of(url: str) -> tuple[Any, Any]:
    """A client of a server, and the module of tritonclient that it comes from."""
    scheme, place = url.split("://")
    module = import_module(f"tritonclient.{scheme}")
    return module.InferenceServerClient(place), module


def test_clients_get_answers_over_both_protocols(shared: Running) -> None:
    for url in (shared.http, shared.grpc):
        client, module = client_of(url)
        assert ask(client, module, 0.125) == 0.25
        assert check(url).alive
        client.close()


def test_a_refused_request_is_no_sign_of_death(shared: Running) -> None:
    client, module = client_of(shared.grpc)
    for _ in range(5):
        with pytest.raises(module.InferenceServerException, match="SECONDS is negative"):
            ask(client, module, -1)
    before = shared.stub
    time.sleep(1)  # several looks
    assert shared.stub == before
    assert shared.said == []


def test_clients_cannot_load_models(shared: Running) -> None:
    """A model that is loaded can bring code with it."""
    endpoint = HttpEndpoint(shared.http)
    for change in (lambda: endpoint.load("toy", 10), lambda: endpoint.unload("toy", 10)):
        with pytest.raises(ServerError, match="restricted"):
            change()
    client, module = client_of(shared.grpc)
    with pytest.raises(module.InferenceServerException):
        client.unload_model("toy")
    assert check(shared.http).alive


def test_a_model_that_is_killed_recovers(repository: Path) -> None:
    """The server goes on to say that it is ready, and fails each request; the watch mends that."""
    with serving(repository, "--check-seconds", "1.5") as running:
        client, module = client_of(running.grpc)
        endpoint = HttpEndpoint(running.http)
        os.kill(running.stub, signal.SIGKILL)
        begun = time.monotonic()
        assert endpoint.ready()
        assert not check(running.http).alive

        def answered() -> bool:
            try:
                return ask(client, module, 0.5) == 1
            except module.InferenceServerException:
                return False

        until(answered, "the model's recovery")
        assert time.monotonic() - begun < 60
        until(lambda: len(running.said) == 2, "its report")
        assert re.fullmatch('model "toy" is dead: .*; loading it again', running.said[0])
        assert running.said[1].startswith('model "toy" answers again, after ')
        begun = time.monotonic()
        running.process.terminate()
        assert running.end() == 143
        assert time.monotonic() - begun < 30  # a model that was not quite unloaded takes longer
    assert not left_behind()


_ON_ITS_WAY_S = 0.1
"""How long a request may take to the server, on a busy machine."""


def test_sigterm_under_load_loses_no_request(repository: Path) -> None:
    """What was sent before the signal is answered; clients that keep their connections open and go
    on to ask do not hold the end up."""
    with serving(repository) as running:
        answers: list[tuple[float, float]] = []
        failures: list[tuple[float, Exception]] = []

        def load(seconds: float) -> None:
            client, module = client_of(running.grpc if seconds > 0.5 else running.http)
            try:
                while True:
                    sent = time.monotonic()
                    answers.append((ask(client, module, seconds), seconds))
            except Exception as error:
                failures.append((sent, error))
            finally:
                client.close()

        threads = [threading.Thread(target=load, args=(0.25 * n,)) for n in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) >= 8, "some answers")
        signalled = time.monotonic()
        running.process.terminate()
        for thread in threads:
            thread.join(60)
        assert running.end() == 143
        # What was sent in the last moment may have come after the signal.
        assert [error for sent, error in failures if sent < signalled - _ON_ITS_WAY_S] == []
        assert all(answer == 2 * seconds for answer, seconds in answers)
        until(lambda: running.said, "the last line")
        assert running.said[0].startswith("stopped after ")
        assert running.said[0].endswith(", all requests answered")
        assert len(running.said) == 1
    assert not left_behind()


def test_ctrl_c_ends_it_too(repository: Path) -> None:
    with serving(repository) as running:
        stub = running.stub
        os.kill(running.process.pid, signal.SIGINT)
        assert running.end() == 130
        assert not alive(stub)
    assert not left_behind()


def test_the_server_s_own_death_ends_the_command(repository: Path) -> None:
    with serving(repository) as running:
        os.kill(running.server, signal.SIGKILL)
        assert running.end() == 1
        until(lambda: running.said, "the reason")
        assert running.said == ["error: the server has ended: signal 9 ended it"]
    assert not left_behind()


def test_the_command_s_own_death_ends_the_server(repository: Path) -> None:
    """The kernel tells the server; the next run removes what this one left."""
    with serving(repository) as running:
        server = running.server
        running.process.kill()
        until(lambda: not alive(server), "the server's end")
    until(left_behind, "the end of its processes")
    with serving(repository):
        assert not left_behind()
    assert not left_behind()


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_toy(tmp_path, "raise ValueError('there is no bundle')")
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    result = run("triton", "serve", tmp_path, *ports)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        'error: the server did not start: model "toy" cannot be loaded: there is no bundle\n'
    )
    assert not left_behind()
