"""The share of a build that is done, from phases as TensorRT tells of them."""

from __future__ import annotations

import pytest

from ccam_deploy.engines.tensorrt.progress import Phases


def test_a_phase_inside_of_a_step_divides_it() -> None:
    phases = Phases()
    assert (phases.share, phases.name) == (0, "")
    phases.start("build", 2)
    phases.step("build", 0)
    assert (phases.share, phases.name) == (0.5, "build")
    phases.start("time", 5)
    assert (phases.share, phases.name) == (0.5, "time")
    phases.step("time", 1)
    assert phases.share == pytest.approx(0.5 + 0.5 * 2 / 5)
    phases.start("tensors", 4)
    phases.step("tensors", 1)
    assert phases.share == pytest.approx(0.5 + 0.5 * (2 / 5 + 1 / 5 * 2 / 4))
    phases.finish("tensors")
    phases.finish("time")
    assert phases.name == "build"
    phases.step("build", 1)
    assert phases.share == 1


def test_the_share_never_goes_back() -> None:
    phases = Phases()
    phases.start("build", 4)
    for name in ("one", "two"):
        phases.start(name, 2)
        phases.step(name, 0)
        assert phases.share == 0.125
        phases.finish(name)
        assert phases.share == 0.125


def test_phases_that_were_not_foreseen() -> None:
    phases = Phases()
    phases.finish("never started")
    phases.start("empty", 0)
    phases.step("empty", 7)
    assert phases.share == 1
    phases.step("unannounced", 0)
    assert phases.share == 1
