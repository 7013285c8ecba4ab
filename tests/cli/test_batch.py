"""`ccam-deploy batch` before Ray starts: what its help repeats, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ccam_deploy.cli import batch
from ccam_deploy.scale import inputs, run
from ccam_deploy.scale.cluster import require_ray
from tests.command import failure, success
from tests.helpers import SCENES


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts as installed."""
    monkeypatch.setattr("ccam_deploy.scale.cluster.require_ray", lambda address: None)


def test_the_help_says_what_is_so() -> None:
    assert batch.FORMATS == inputs.FORMATS
    assert f"{run.PART_SIZE}; fewer where inputs are large" in " ".join(
        success("batch", "--help").stdout.split()
    )


def test_a_missing_extra_is_named(
    tiny_bundle: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    message = failure("batch", tiny_bundle, SCENES, "out")
    assert message.startswith("batch needs Ray, which cannot be imported (")
    assert message.endswith("): pip install 'ccam-deploy[scale]'")
    with pytest.raises(Exception, match="batch needs Ray"):
        require_ray(None)
    assert not (here / "out").exists()


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_read_or_written(tiny_bundle: Path, here: Path) -> None:
    assert failure("batch", tiny_bundle, "nowhere", "out") == "nowhere does not exist"
    (here / "in").mkdir()
    assert failure("batch", tiny_bundle, "in", "out").startswith("in holds no images (")
    (here / "in" / "a.png").touch()
    (here / "in" / "a.tar").touch()
    assert "several formats, images, webdataset; choose one" in failure(
        "batch", tiny_bundle, "in", "out"
    )
    words = ["batch", tiny_bundle, "in"]
    for output in ("in", "in/out"):
        message = failure(*words, output, "--format", "images")
        assert message.startswith(f"OUTPUT {output} lies in INPUT in, and the next run would read")
    message = failure(*words, "out", "--format", "images", "--target", "9")
    assert message == "class 9 is out of range; the bundle has classes 0 to 4"
    message = failure(*words, "out", "--format", "images", "--precision", "int8")
    assert message.startswith("the bundle has no int8 graphs")
    assert "theta" in failure(*words, "out", "--format", "images", "--option", "thete=1")
    message = failure("batch", here, "in", "out", "--format", "images")
    assert message == f"{here} is not a bundle: it has no manifest.json"
    assert not (here / "out").exists()
