"""A model for the server that waits as long as a request says, and servers that run it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np

from ccam_deploy.serve.run_files import SHARED_MEMORY
from ccam_deploy.serve.stubs import stubs_of
from tests.helpers import ROOT

MODEL = """
import time
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        seconds = triton.get_input_tensor_by_name(request, "SECONDS").as_numpy()
        if (seconds < 0).any():
            error = triton.TritonError("SECONDS is negative", triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(error=error)
        time.sleep(float(seconds.max()))
        return triton.InferenceResponse([triton.Tensor("DOUBLE", 2 * seconds)])
"""
CONFIG = """
name: "toy"
backend: "python"
max_batch_size: 4
input { name: "SECONDS" data_type: TYPE_FP32 dims: [1] }
output { name: "DOUBLE" data_type: TYPE_FP32 dims: [1] }
instance_group { kind: KIND_CPU count: 1 }
dynamic_batching { }
"""
_NAME = "ccam-deploy-triton-"
PATIENCE = 120.0
"""Seconds within which whatever a test waits for has happened, however busy the machine is."""


def write_toy(repository: Path, initialize: str = "pass") -> Path:
    """A repository with the model; `initialize` is the code that loads it."""
    (repository / "toy" / "1").mkdir(parents=True)
    (repository / "toy" / "config.pbtxt").write_text(CONFIG)
    model = MODEL.replace("{initialize}", initialize)
    (repository / "toy" / "1" / "model.py").write_text(model)
    return repository


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true, and return it."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen in {PATIENCE:.0f} s"
        time.sleep(0.02)
    return found


def left_behind() -> set[Path]:
    """Whatever servers that have ended left on the machine; not what belongs to one that runs."""
    found = {*SHARED_MEMORY.glob(f"{_NAME}*"), *Path(tempfile.gettempdir()).glob(f"{_NAME}*")}
    for lock in SHARED_MEMORY.glob(f"{_NAME}*.run"):
        with suppress(FileNotFoundError), lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                folder = Path(json.loads(file.read())["folder"])
                prefix = lock.name.removesuffix(".run")
                found = {path for path in found if not path.name.startswith(prefix)} - {folder}
    return found


@dataclass
class Running:
    """A `ccam-deploy triton serve` that is ready.

    Attributes:
        process: The command.
        http: Its address for HTTP.
        grpc: Its address for gRPC.
        said: The lines on its standard error.
    """

    process: subprocess.Popen[str]
    http: str
    grpc: str
    said: list[str] = field(default_factory=list)

    @property
    def server(self) -> int:
        """The process number of Triton's server."""
        return children(self.process.pid)["tritonserver"]

    @property
    def stub(self) -> int:
        """The process number of the model."""
        (number,) = stubs_of(self.server)
        return number

    def end(self) -> int:
        """Wait for the command's end, and return its exit code."""
        return self.process.wait(PATIENCE)


def children(process: int) -> dict[str, int]:
    """The children of a process, by the name of their program."""
    words = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {Path(f"/proc/{word}/comm").read_text().strip(): int(word) for word in words}


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[Running]:
    """Run the command on free ports while a block runs; it may end it by itself."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "ccam_deploy", "triton", "serve", str(repository), *ports]
    command += ["--check-seconds", "0.2", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        lines = process.stderr
        reader = Thread(
            target=lambda: said.extend(line.rstrip() for line in iter(lines.readline, ""))
        )
        reader.start()
        try:
            ready = process.stdout.readline()
            assert ready.startswith("ready: "), said
            http, grpc = (re.findall(rf"{kind}://[\w.:]+", ready)[0] for kind in ("http", "grpc"))
            yield Running(process, http, grpc, said)
        finally:
            process.terminate()
            process.wait(PATIENCE)
            reader.join(PATIENCE)


def _collect(lines: IO[str], said: list[str]) -> None:
    for line in lines:
        said.append(line.rstrip())


def ask(client: Any, module: Any, seconds: float) -> float:
    """Send the model a request with a client of tritonclient, and return the answer."""
    tensor = module.InferInput("SECONDS", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.array([[seconds]], np.float32))
    return float(client.infer("toy", [tensor]).as_numpy("DOUBLE")[0, 0])
