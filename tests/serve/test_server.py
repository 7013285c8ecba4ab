"""What is settled before the server starts: its files, ports and models."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.serve.installation import find_installation
from ccam_deploy.serve.server import Server, ServerOptions, models_in, with_free_ports
from ccam_deploy.serve.stubs import alive, stubs_of
from tests.command import failure, success
from tests.keys import make_keys
from tests.serve.toy import write_toy

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the layout of the server's wheel, in the place of an installed one."""
    package = tmp_path / "pytriton"
    files = [
        "tritonserver/bin/tritonserver",
        "tritonserver/backends/python/libtriton_python.so",
        "tritonserver/backends/python/triton_python_backend_utils.py",
        f"tritonserver/python_backend_stubs/{VERSION}/triton_python_backend_stub",
        "tritonserver/python_backend_stubs/2.7/triton_python_backend_stub",
        "__init__.py",
    ]
    for name in files:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    return package / "tritonserver"


def test_the_stub_lies_beside_links_to_the_backend(wheel: Path, tmp_path: Path) -> None:
    backends = tmp_path / "backends"
    backends.mkdir()
    find_installation().fill_backends(backends)
    stub = backends / "python" / "triton_python_backend_stub"
    assert VERSION in stub.read_text()
    assert os.access(stub, os.X_OK)
    assert not stub.is_symlink()
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        assert (backends / "python" / name).resolve() == wheel / "backends" / "python" / name


def test_the_server_finds_this_python_and_its_library(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another libpython of the same version would lack this one's modules."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    environment = find_installation().environment()
    bundled, library, before = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert bundled == str(wheel.parents[1] / "nvidia_pytriton.libs")
    assert (Path(library) / f"libpython{VERSION}.so.1.0").is_file()
    assert before == "/before"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_what_is_missing_is_named(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel / "python_backend_stubs" / VERSION / "triton_python_backend_stub").unlink()
    with pytest.raises(BackendError, match=f"no models with Python {VERSION}; it does with 2.7"):
        find_installation()
    (wheel / "bin" / "tritonserver").unlink()
    with pytest.raises(BackendError, match=r"tritonserver is missing; pip install .*serve"):
        find_installation()


def test_a_python_without_its_shared_library(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"LIBDIR": "/nowhere", "MULTIARCH": "x86_64-linux-gnu"}
    monkeypatch.setattr(sysconfig, "get_config_var", places.get)
    with pytest.raises(BackendError, match=f"apt-get install libpython{VERSION}"):
        find_installation()


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'ccam-deploy\[serve\]'"):
        find_installation()


def test_free_ports_are_found_and_taken_ones_refused() -> None:
    options = with_free_ports(ServerOptions(http_port=0, grpc_port=0, metrics_port=0))
    ports = {options.http_port, options.grpc_port, options.metrics_port}
    assert len(ports) == 3
    assert 0 not in ports
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OptionError, match=f"cannot listen on port {port} of 127.0.0.1: .*--grpc-port"
        ):
            with_free_ports(ServerOptions(http_port=0, grpc_port=port, metrics_port=0))
    with pytest.raises(OptionError, match=r"cannot listen on port 0 of 127\.0\.\.1: .*label"):
        with_free_ports(ServerOptions(host="127.0..1", http_port=0))


def test_a_folder_without_models(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OptionError, match="holds no model for Triton; `ccam-deploy triton export"):
        models_in(tmp_path)
    (tmp_path / "model" / "config.pbtxt").touch()
    assert models_in(tmp_path) == ("model",)
    assert "holds no model for Triton" in failure("triton", "serve", tmp_path / "model")


def test_unsigned_and_changed_bundles_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """By the command, before the server starts, and by the model when it loads."""
    pytest.importorskip("model_signing")
    keys = make_keys(tmp_path, "release")
    repository, bundle = tmp_path / "repository", tmp_path / "tiny"
    shutil.copytree(tiny_bundle, bundle)
    required = ["--require-signature", keys.public]
    assert "is not signed" in failure("triton", "export", bundle, repository, *required)
    success("triton", "export", bundle, repository)
    served = ["triton", "serve", repository, *required]
    assert "is not signed" in failure(*served)
    success("sign", bundle, "--key", keys.private)
    success("triton", "export", bundle, repository, *required)
    config = (repository / "ccam" / "config.pbtxt").read_text()
    assert f'key: "require_signature" value {{ string_value: "{keys.public}" }}' in config
    server = Server(repository, ServerOptions(require_signature=keys.public), print)
    server.require_signatures()
    (repository / "ccam" / "1" / "bundle" / "weights.bin").write_bytes(b"")
    assert "was changed" in failure(*served)
    toy = write_toy(tmp_path / "toy")
    assert "holds no bundle" in failure("triton", "serve", toy, *required)


def test_processes_of_models_are_the_server_s_children(tmp_path: Path) -> None:
    """As /proc shows them; others of the server's processes, and dead ones, are none."""
    commands = {
        3: b"/x/triton_python_backend_stub\0/repo/ccam/1/model.py\0region\0",
        4: b"/x/triton_python_backend_stub\0/repo/ccam_image/2/model.py\0region\0",
        5: b"/bin/sh\0-c\0",
        6: b"",
    }
    for number, words in commands.items():
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes(words)
    for thread, children in {"2": "3 5 6 99 ", "9": "4 "}.items():
        (tmp_path / "2" / "task" / thread).mkdir(parents=True)
        (tmp_path / "2" / "task" / thread / "children").write_text(children)
    assert stubs_of(2, tmp_path) == {3: "ccam", 4: "ccam_image"}
    assert [alive(number, tmp_path) for number in (3, 6, 99)] == [True, False, False]


def test_a_process_that_has_ended_is_not_alive() -> None:
    """Before anyone has waited for it, too."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert alive(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not alive(process.pid)
