"""Variants of methods are sorted into those that a bundle can run and those that it cannot."""

from __future__ import annotations

from typing import Any, cast

import pytest

import ccam_deploy as ccam
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.methods import make_method
from ccam_deploy.quality.variants import make_variants, runnable


@pytest.mark.parametrize("error", [OptionError, BackendError])
def test_methods_that_a_bundle_cannot_run_are_left_out(error: type[Exception]) -> None:
    class Headless:
        def require_method(self, method: Any) -> None:
            if method == make_method("recipro-cam"):
                raise error("there is no head")

    explainer = cast(ccam.Explainer, Headless())
    able, reasons = runnable(explainer, make_variants(["recipro-cam", "grad-cam"]))
    assert [variant.name for variant in able] == ["grad-cam"]
    assert reasons == {"recipro-cam": "there is no head"}
