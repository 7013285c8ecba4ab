"""What a process of a batch does with its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ccam_deploy.bundle.folder import read_manifest
from ccam_deploy.methods import GradCAM
from ccam_deploy.scale.inputs import Content, Input, Item
from ccam_deploy.scale.work import Engine, Job, PartExplainer, Prepared
from ccam_deploy.targets import Top
from tests.helpers import noise

pytestmark = pytest.mark.scale


@pytest.mark.parametrize("batch_size", [2, 16])
def test_an_image_without_a_map_has_its_error_and_others_their_maps(
    digits_bundle: Path, tmp_path: Path, batch_size: int
) -> None:
    """Half precision overflows on some images; the same command would end at it each time."""
    from pyarrow import parquet

    manifest = read_manifest(digits_bundle)
    names = ["a", "b", "c", "d"]
    contents = [Content(Item(name, name), name) for name in names]
    contents[3] = Content(Item("d", "d"), "d", problem="d is no image")
    inputs = noise(3, *manifest.input)
    inputs[1] = 3e38
    job = Job(
        bundle=digits_bundle,
        manifest=manifest,
        source=Input(tmp_path, "images"),
        method=GradCAM(),
        targets=(Top(2),),
        engine=Engine("onnxruntime-cpu", batch_size=batch_size),
        output=tmp_path,
        token="0123abcd",
    )
    done = PartExplainer(job).run(Prepared(tuple(contents), inputs))
    assert (done.images, done.rows, done.failed) == (4, 6, 2)
    table = parquet.read_table(tmp_path / done.draft)
    assert table["key"].to_pylist() == ["a", "a", "b", "c", "c", "d"]
    errors = table["error"].to_pylist()
    assert errors[:2] == errors[3:5] == [None, None]
    assert errors[2].startswith("the classifier gives NaN or infinite logits for these images")
    assert errors[5] == "d is no image"
    assert np.array_equal(
        table["saliency"].is_null().to_pylist(), [False, False, True, False, False, True]
    )
