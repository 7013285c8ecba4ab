"""The wheel, installed where nothing but the run time is, explains a picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, example_files

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


def run(*words: object) -> str:
    """A command's output. It sees nothing of this environment's packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the sources, for a build leaves files beside them."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ccam_deploy", source / "ccam_deploy", ignore=ignored)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", built, source)
    (path,) = built.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_has_what_belongs_to_the_package(wheel: Path) -> None:
    package = ROOT / "ccam_deploy"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.suffix != ".pyc" and path.is_file()
    }
    assert {"ccam_deploy/py.typed", "ccam_deploy/__init__.py"} < expected
    assert any(name.startswith("ccam_deploy/examples/photographs/") for name in expected)
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    licences = {name.split("/")[-1] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_it_explains_where_only_the_run_time_is_installed(
    wheel: Path, digits_bundle: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "bare")
    bare = tmp_path / "bare" / "bin"
    pip = (bare / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]")
    probe = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('torch', 'onnx')])"
    assert run(bare / "python", "-c", probe) == "[False, False]\n"
    picture, output = example_files()[0], tmp_path / "explained"
    words = (bare / "ccam-deploy", "explain", digits_bundle, picture, "--output", output)
    assert picture.name in run(*words)
    assert [path.suffix for path in output.iterdir()] == [".png"]
