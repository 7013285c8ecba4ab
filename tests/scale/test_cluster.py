"""How a batch divides a machine or a cluster, and what becomes of Ray's errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ccam_deploy.errors import BackendError, CcamError, OptionError
from ccam_deploy.scale.cluster import (
    Layout,
    Resources,
    Wishes,
    divide,
    joined_cluster,
    plain_error,
)
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("wishes", "cores", "cpus", "layout"),
    [
        (Wishes(), 2, 3, Layout(2, 0, 1)),
        (Wishes(), 16, 20, Layout(16, 0, 1)),
        (Wishes(processes=4), 16, 20, Layout(4, 0, 4)),
        (Wishes(processes=3), 8, 8, Layout(3, 0, 2)),
        (Wishes(processes=4), 2, 5, Layout(4, 0, 1)),
        (Wishes(processes=2, threads=3), 2, 7, Layout(2, 0, 3)),
        (Wishes(num_gpus=0), 1, 2, Layout(1, 0, 1)),
        (Wishes(threads=8), 16, 20, Layout(2, 0, 8)),
        (Wishes(threads=8), 4, 9, Layout(1, 0, 8)),
    ],
)
def test_a_machine_without_gpus(wishes: Wishes, cores: int, cpus: int, layout: Layout) -> None:
    assert wishes.logical_cpus(cores) == cpus
    assert divide(Resources(cpus, 0), wishes, cores) == layout


@pytest.mark.parametrize(
    ("wishes", "layout"),
    [
        (Wishes(), Layout(4, 1, 0)),
        (Wishes(num_gpus=2), Layout(2, 1, 0)),
        (Wishes(num_gpus=0), Layout(16, 0, 1)),
        (Wishes(processes=2), Layout(2, 0, 8)),
    ],
)
def test_a_machine_with_gpus(wishes: Wishes, layout: Layout) -> None:
    assert divide(Resources(wishes.logical_cpus(16), 4), wishes, 16) == layout
    assert layout.cpus == (1 if layout.gpus else layout.threads)


def test_a_process_without_a_gpu_opens_none() -> None:
    """Ray hides no GPU from a process that asked for none."""
    alone, on_gpus = Layout(4, 0, 1), Layout(2, 1, 0)
    assert [alone.backend(name) for name in ("auto", "onnxruntime-cpu")] == ["onnxruntime-cpu"] * 2
    assert [on_gpus.backend(name) for name in ("auto", "tensorrt")] == ["auto", "tensorrt"]
    with pytest.raises(OptionError, match="--backend onnxruntime-cuda needs a GPU"):
        alone.backend("onnxruntime-cuda")


@pytest.mark.parametrize(
    ("resources", "wishes", "layout"),
    [
        (Resources(9, 0), Wishes(), Layout(8, 0, 1)),
        (Resources(9, 0), Wishes(threads=4), Layout(2, 0, 4)),
        (Resources(9, 0), Wishes(processes=2), Layout(2, 0, 1)),
        (Resources(9, 4), Wishes(), Layout(4, 1, 0)),
        (Resources(9, 4), Wishes(processes=2, threads=2), Layout(2, 0, 2)),
    ],
)
def test_a_cluster(resources: Resources, wishes: Wishes, layout: Layout) -> None:
    assert divide(resources, wishes) == layout


@pytest.mark.parametrize(
    ("resources", "wishes", "message"),
    [
        (Resources(1, 0), Wishes(), "has 1 CPUs; 1 processes, and .* need 2; lower --processes"),
        (Resources(2, 0), Wishes(processes=2), "has 2 CPUs; 2 processes, and .* need 3; lower"),
        (Resources(8, 1), Wishes(num_gpus=2), "--num-gpus is 2, but Ray finds 1 GPUs"),
        (Resources(8, 1), Wishes(num_gpus=1, processes=2), "--processes is for CPUs"),
    ],
)
def test_what_does_not_fit(resources: Resources, wishes: Wishes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        divide(resources, wishes)


def test_streams_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """Of what is written meanwhile, only lines on Python's own stderr are seen."""
    code = (
        "import os, sys\n"
        "from ccam_deploy.scale.cluster import quiet_streams\n"
        "with quiet_streams():\n"
        "    os.write(2, b'noise')\n"
        "    print('noise')\n"
        "    print('line', file=sys.stderr)\n"
        "os.write(2, b'after')\n"
        "print(' end', file=sys.stderr)\n"
        "print('result')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert capfd.readouterr() == ("result\n", "line\nafter end\n")


@pytest.mark.parametrize("address", ["somewhere", "host:", "host:x"])
def test_addresses(address: str) -> None:
    message = f"--address {address} is not HOST:PORT"
    with pytest.raises(OptionError, match=message), joined_cluster(address):
        pass


class RemoteError(OptionError):
    """As Ray raises them: of the cause's class, with a traceback for a text."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::Map()\n  File ...\n" + str(cause))
        self.cause = cause


def test_errors_of_other_processes() -> None:
    own = OptionError("theta is 2")
    assert plain_error(RemoteError(own)) is own
    assert plain_error(own) is own
    wrapped = RuntimeError("failed")
    wrapped.__cause__ = RemoteError(own)
    assert plain_error(wrapped) is own
    other = plain_error(RemoteError(MemoryError("no memory")))
    assert type(other) is BackendError
    assert str(other) == "Ray gave up: MemoryError: no memory"
    circle = RuntimeError("first line\nsecond")
    circle.__cause__ = circle
    assert str(plain_error(circle)) == "Ray gave up: RuntimeError: first line"
    assert isinstance(plain_error(circle), CcamError)
