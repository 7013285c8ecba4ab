"""A Ray cluster: one that is there, or this machine as one; quiet, and with errors of one line."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccam_deploy.errors import BackendError, CcamError, OptionError, brief
from ccam_deploy.extras import install
from ccam_deploy.scale import reaper

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a warning of a change that concerns nobody here
}
_LOOPBACK_ONLY = {
    # Elsewhere than on Linux this is the default: Ray's servers listen at 127.0.0.1, and not at
    # every address. It has to be there when Ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
CPU = "onnxruntime-cpu"
_DEEPEST = 20
_ANSWER_S = 10.0
"""How long a cluster's head may take to accept a connection."""


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all.

    Attributes:
        cpus: Logical CPUs.
        gpus: GPUs.
    """

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Wishes:
    """How a user wants the work to be divided.

    Attributes:
        num_gpus: GPUs to use, each by one process; None for all, 0 for none.
        processes: Processes that explain on CPUs; None for as many as fit.
        threads: CPU threads of each; 0 for an even share.
    """

    num_gpus: int | None = None
    processes: int | None = None
    threads: int = 0

    def on_cores(self, cores: int) -> tuple[int, int]:
        """How many processes share a machine's cores, and the threads of each."""
        count = self.processes or max(1, cores // max(1, self.threads))
        return count, self.threads or max(1, cores // count)

    def logical_cpus(self, cores: int) -> int:
        """How many CPUs a machine has for Ray: those of the processes, and some to decode images.

        Processes that had them all would wait for images for ever.
        """
        count, threads = self.on_cores(cores)
        return count * threads + max(1, cores // 4)


@dataclass(frozen=True)
class Layout:
    """The processes of a batch, and what each of them gets.

    Attributes:
        processes: How many explain.
        gpus: How many GPUs each of them has, 0 or 1.
        threads: CPU threads of each; 0 lets the engine choose.
    """

    processes: int
    gpus: int
    threads: int

    @property
    def cpus(self) -> int:
        """Logical CPUs that each process takes of the cluster."""
        return 1 if self.gpus else max(self.threads, 1)

    def backend(self, wished: str) -> str:
        """Tell what each process runs graphs with: one that has no GPU must not open any.

        Args:
            wished: The user's choice.

        Raises:
            OptionError: That needs a GPU, and the processes have none.
        """
        if self.gpus or wished == CPU:
            return wished
        if wished != "auto":
            raise OptionError(f"--backend {wished} needs a GPU, and the processes get none")
        return CPU


def divide(resources: Resources, wishes: Wishes, cores: int | None = None) -> Layout:
    """Divide a cluster, of which at least one logical CPU is left for reading and decoding.

    Args:
        resources: What it has.
        wishes: How the user wants it.
        cores: Of the machine that is the cluster; None for one of several machines.

    Raises:
        OptionError: The cluster is too small, or GPUs and CPU processes are asked for together.
    """
    gpus = _gpus_to_use(resources.gpus, wishes)
    if gpus:
        layout = Layout(gpus, 1, wishes.threads)
    elif cores:
        count, threads = wishes.on_cores(cores)
        layout = Layout(count, 0, threads)
    else:
        threads = wishes.threads or 1
        fit = max(1, (resources.cpus - 1) // threads)
        layout = Layout(wishes.processes or fit, 0, threads)
    needed = layout.processes * layout.cpus + 1
    if needed > resources.cpus:
        raise OptionError(
            f"the cluster has {resources.cpus} CPUs; {layout.processes} processes, and a CPU that "
            f"decodes images, need {needed}; lower --processes, --num-gpus or --threads"
        )
    return layout


def _gpus_to_use(there: int, wishes: Wishes) -> int:
    if wishes.num_gpus and wishes.processes:
        raise OptionError("--processes is for CPUs, and each GPU has one process; give one of both")
    if wishes.num_gpus and wishes.num_gpus > there:
        raise OptionError(f"--num-gpus is {wishes.num_gpus}, but Ray finds {there} GPUs")
    if wishes.processes:
        return 0
    return there if wishes.num_gpus is None else wishes.num_gpus


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require_ray(address: str | None) -> None:
    """Raise OptionError where Ray, which runs batches, is missing.

    Args:
        address: The cluster to join; None to make this machine one.
    """
    os.environ.update(_QUIET if address else _QUIET | _LOOPBACK_ONLY)
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"batch needs Ray, which cannot be imported ({brief(error)}): {install('scale')}"
        ) from error


@contextmanager
def quiet_streams() -> Iterator[None]:
    """Keep what Ray writes past its settings out of this process's output.

    Its threads print lines about lost tasks to `sys.stdout`, which is silent until the block ends;
    its C++ part writes to stderr, where only what Python's own `sys.stderr` gets goes on.
    """
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), _only_python_s_stderr():
        yield


@contextmanager
def _only_python_s_stderr() -> Iterator[None]:
    stream = sys.stderr
    try:
        terminal = stream.fileno() == 2
    except (OSError, ValueError, AttributeError):  # replaced, as by a test
        terminal = False
    if not terminal:
        yield
        return
    stream.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with os.fdopen(
            os.dup(kept), "w", 1, encoding=stream.encoding, errors=stream.errors
        ) as sys.stderr:
            yield
    finally:
        sys.stderr = stream
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def local_cluster(wishes: Wishes, cores: int) -> Iterator[Resources]:
    """Make this machine a cluster, on the loopback interface only, until the block ends.

    Args:
        wishes: How the work is to be divided.
        cores: The machine's CPU cores.

    Yields:
        What Ray found.

    Raises:
        BackendError: Ray cannot start.
    """
    no_gpu = wishes.num_gpus == 0 or wishes.processes is not None
    with _cluster_folder() as folder:
        try:
            _init(
                address="local",
                num_cpus=wishes.logical_cpus(cores),
                num_gpus=0 if no_gpu else None,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
            yield _resources()
        finally:
            _shutdown()


@contextmanager
def _cluster_folder() -> Iterator[Path]:
    """Make a folder for a cluster, which goes with all processes that use it.

    Another process sees to that, so that it happens even if this one is killed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ccam-ray-")).resolve()  # short: sockets lie in it
    command = [sys.executable, "-I", "-S", reaper.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield folder


@contextmanager
def joined_cluster(address: str) -> Iterator[Resources]:
    """Join a cluster until the block ends.

    Args:
        address: HOST:PORT of its head, or "auto" for the one that runs on this machine.

    Yields:
        What it has in all.

    Raises:
        OptionError: The address is none.
        BackendError: There is no such cluster, or it has another version of Ray or Python.
    """
    if "://" in address:
        raise OptionError(
            f"--address {address} is not HOST:PORT; to use a cluster from outside of it, submit "
            "the command there: ray job submit -- ccam-deploy batch ... --address auto"
        )
    _require_listener(address)
    try:
        _init(address=address)
        yield _resources()
    finally:
        _shutdown()


def _require_listener(address: str) -> None:
    """Raise BackendError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdecimal():
        raise OptionError(f"--address {address} is not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise BackendError(f"there is no Ray cluster at {address}: {brief(error)}") from error


def _resources() -> Resources:
    import ray

    found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 0)), int(found.get("GPU", 0)))


def _init(**options: Any) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    try:
        ray.init(log_to_driver=False, logging_level=logging.CRITICAL + 1, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, AssertionError) as error:
        what = options["address"]
        where = "on this machine" if what == "local" else f"at {what}"
        raise BackendError(f"there is no Ray cluster {where}: {brief(error)}") from error
    _quiet_data()


def _quiet_data() -> None:
    """Leave no progress bars and log lines of Ray Data on the terminal."""
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.raise_original_map_exception = True


def _shutdown() -> None:
    import ray

    ray.shutdown()


def plain_error(error: BaseException) -> CcamError:
    """Make an error of a remote process one of this package's.

    Args:
        error: What Ray raised.

    Returns:
        The error of this package that it stands for, or a BackendError with its first line.
    """
    found = error
    for _ in range(_DEEPEST):
        inner = getattr(found, "cause", None)  # Ray's own errors are of the cause's class, too
        if isinstance(found, CcamError) and inner is None:
            if found.args:  # to a line of ours, Ray adds lines of its own
                found.args = (str(found.args[0]).partition("\n")[0], *found.args[1:])
            return found
        found = inner or found.__cause__ or found
    return BackendError(f"Ray gave up: {type(found).__name__}: {brief(found)}")
