"""The files in deploy/ say what is so: paths, commands, addresses and times fit together."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ccam_deploy.cli.triton_check import check
from tests.helpers import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = ("kubernetes.yaml", "kserve.yaml")
SERVER_OPTIONS = {
    "--model-repository",
    "--http-port",
    "--grpc-port",
    "--http-header-forward-pattern",
    "--exit-timeout-secs",
}
"""Options of Triton's server that are used; test_server_running starts it with them too."""


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def dockerfile() -> str:
    """The instructions, each on one line."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def pods() -> Iterator[tuple[str, dict[str, Any], int]]:
    """The containers of the manifests, and the seconds that Kubernetes gives them to end."""
    deployment = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    runtime, service = documents("kserve.yaml")
    predictor = service["spec"]["predictor"]
    yield "kubernetes.yaml", deployment, deployment["terminationGracePeriodSeconds"]
    yield "kserve.yaml", runtime["spec"], predictor["terminationGracePeriodSeconds"]


PODS = list(pods())


def server_options(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def require_check(words: list[str]) -> dict[str, Any]:
    """The values of the options of a command, which must be `ccam-deploy triton check`."""
    assert words[:3] == ["ccam-deploy", "triton", "check"]
    return check.make_context("check", words[3:]).params


@pytest.mark.parametrize(("name", "pod", "grace"), PODS, ids=KUBERNETES)
def test_probes_ask_the_server_that_the_container_runs(
    name: str, pod: dict[str, Any], grace: int
) -> None:
    (container,) = pod["containers"]
    options = server_options(container["args"])
    port = int(options.get("--http-port", 8000))
    assert port in [each["containerPort"] for each in container["ports"]]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]
        values = require_check(probe["exec"]["command"])
        assert values["url"] == f"http://127.0.0.1:{port}"
        # two models, and each may take its time
        assert probe["timeoutSeconds"] > 2 * values["timeout"]


@pytest.mark.parametrize(("name", "pod", "grace"), PODS, ids=KUBERNETES)
def test_requests_end_before_kubernetes_ends_the_server(
    name: str, pod: dict[str, Any], grace: int
) -> None:
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    timeout = int(server_options(container["args"])["--exit-timeout-secs"])
    assert int(command[1]) + timeout < grace


@pytest.mark.parametrize(("name", "pod", "grace"), PODS, ids=KUBERNETES)
def test_the_python_backend_has_shared_memory(name: str, pod: dict[str, Any], grace: int) -> None:
    """A container's own is 64 MB; the backend takes that for a few instances."""
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert set(mounts.values()) <= set(volumes)


@pytest.mark.parametrize(("name", "pod", "grace"), PODS, ids=KUBERNETES)
def test_the_server_has_the_options(name: str, pod: dict[str, Any], grace: int) -> None:
    (container,) = pod["containers"]
    assert set(server_options(container["args"])) <= SERVER_OPTIONS


def test_the_service_reaches_the_container() -> None:
    deployment, service = documents("kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    names = {port["name"]: port["containerPort"] for port in container["ports"]}
    for port in service["spec"]["ports"]:
        assert names[port["targetPort"]] == port["port"]


def test_the_service_under_kserve_uses_the_runtime() -> None:
    runtime, service = documents("kserve.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


def test_all_use_the_image_that_is_built() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    tags = re.findall(r"--tag (\S+)", text)
    images = {container["image"] for _, pod, _ in PODS for container in pod["containers"]}
    images.add(documents("compose.yaml")[0]["services"]["triton"]["image"])
    assert images == set(tags)


def test_the_image_is_made_of_files_that_there_are() -> None:
    instructions = dockerfile()
    assert re.findall(r"^COPY (.*)$", instructions, re.MULTILINE) == [". ."]
    for name in re.findall(r"--constraint (\S+)", instructions):
        kept = (ROOT / ".dockerignore").read_text().splitlines()
        assert (ROOT / name).is_file()
        assert f"!{name}" in kept
    extras = set(re.findall(r"EXTRAS=(\w+)", (DEPLOY / "Dockerfile").read_text()))
    project = (ROOT / "pyproject.toml").read_text()
    assert extras == {"gpu", "cpu"}
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_the_image_checks_itself_and_runs_the_server() -> None:
    instructions = dockerfile()
    health = re.search(r"^HEALTHCHECK (.*?) CMD (\[.*\])$", instructions, re.MULTILINE)
    command = re.search(r"^CMD (\[.*\])$", instructions, re.MULTILINE)
    assert health
    assert command
    values = require_check(json.loads(health[2]))
    assert values["url"] == "http://127.0.0.1:8000"
    limit = re.search(r"--timeout=(\d+)s", health[1])
    assert limit
    assert int(limit[1]) > 2 * values["timeout"]
    options = server_options(json.loads(command[1]))
    assert set(options) <= SERVER_OPTIONS
    run = re.search(r"docker run .*?--stop-timeout (\d+)", (DEPLOY / "Dockerfile").read_text())
    assert run
    assert int(run[1]) > int(options["--exit-timeout-secs"])
    (service,) = documents("compose.yaml")[0]["services"].values()
    assert int(service["stop_grace_period"].rstrip("s")) > int(options["--exit-timeout-secs"])
    assert service["volumes"] == [f"../repository:{options['--model-repository']}:ro"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_commands_in_comments_name_files_that_there_are(path: Path) -> None:
    for line in re.findall(r"^# +((?:docker|kubectl) .*)$", path.read_text(), re.MULTILINE):
        words = shlex.split(line.rstrip("\\"))
        for option, value in pairwise(words):
            if option in ("--file", "--filename"):
                assert (ROOT / value).is_file(), line


def test_shown_addresses_are_this_machine_s() -> None:
    """Nothing is offered to the network without a word about it."""
    for port in documents("compose.yaml")[0]["services"]["triton"]["ports"]:
        assert port.startswith("127.0.0.1:")
    assert isinstance(check, click.Command)
