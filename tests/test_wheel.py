"""The wheel, installed where nothing but the run time is, explains a picture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, example_files

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


def start(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that has ended. It sees nothing of this environment's packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in words],
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def run(*words: object) -> str:
    """The output of a command that ends well."""
    done = start(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unreachable_index(log: str) -> str | None:
    """What pip's log says of the index that should have had a package, where it was out of reach.

    None where the index answered, even if it has no such package.
    """
    missing = re.search(r"requirement ([-\w.]+)\S* .*\(from versions: none\)", log)
    if missing is None:
        return None
    package = re.escape(missing[1].lower())
    fetch = rf"Could not fetch URL (\S+/{package}/): (connection error|timed out)"
    failure = re.search(fetch, log)
    return f"{failure[1]}: {failure[2]}" if failure else None


def pip(python: Path, log: Path, *words: object) -> None:
    """Run pip, which must end well; skip the test where it cannot reach an index."""
    quiet = ("--quiet", "--disable-pip-version-check")
    # The log has what --quiet leaves out, also of the process that installs a build's tools.
    done = start(python, "-m", "pip", *words, *quiet, PIP_LOG=str(log))
    if done.returncode:
        failure = unreachable_index(log.read_text(encoding="utf-8")) if log.exists() else None
        if failure:
            pytest.skip(f"pip cannot reach an index: {failure}")
        pytest.fail(done.stdout + done.stderr)


NO_ANSWER = "Could not fetch URL https://index.test/simple/numpy/: connection error: refused\n"
NOT_FOUND = "Could not find a version that satisfies the requirement numpy>=2.0 (from versions: {})"


@pytest.mark.parametrize(
    ("log", "failure"),
    [
        (
            NO_ANSWER + NOT_FOUND.format("none"),
            "https://index.test/simple/numpy/: connection error",
        ),
        (NOT_FOUND.format("none"), None),
        (NO_ANSWER + NOT_FOUND.format("1.0, 1.1"), None),
        (NO_ANSWER.replace("numpy", "scipy") + NOT_FOUND.format("none"), None),
        (NO_ANSWER + "ResolutionImpossible", None),
    ],
)
def test_only_an_index_out_of_reach_is_a_reason_to_skip(log: str, failure: str | None) -> None:
    assert unreachable_index(log) == failure


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the sources, for a build leaves files beside them."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ccam_deploy", source / "ccam_deploy", ignore=ignored)
    log = tmp_path_factory.mktemp("log") / "pip.log"
    pip(Path(sys.executable), log, "wheel", "--no-deps", "-w", built, source)
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
    constraints = ("--constraint", ROOT / "constraints.txt")
    pip(bare / "python", tmp_path / "pip.log", "install", *constraints, f"{wheel}[cpu]")
    probe = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('torch', 'onnx')])"
    assert run(bare / "python", "-c", probe) == "[False, False]\n"
    picture, output = example_files()[0], tmp_path / "explained"
    words = (bare / "ccam-deploy", "explain", digits_bundle, picture, "--output", output)
    assert picture.name in run(*words)
    assert [path.suffix for path in output.iterdir()] == [".png"]
