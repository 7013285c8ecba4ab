"""A manifest that somebody changed who knows how it is sealed: refused in one line, or it runs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import (
    MANIFEST,
    _decode,
    read_bundle,
    record_files,
    write_manifest,
)
from ccam_deploy.errors import BundleError, CcamError
from ccam_deploy.fidelity.verification import verify_bundle
from tests.fuzz.changes import PATIENT
from tests.helpers import example_pictures

HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 100_000, 2**31, 2**63, 10**30),
    *(0.0, -0.5, 1e-300, 1e300),
    *("", "../weights.bin", "/etc/passwd", "weights.bin", "a\0b", "x" * 300, "\n", "0" * 64),
    *(None, True, [], {}, [1], [[]], ["x"] * 5),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside another."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def use(content: bytes, bundle: Path) -> None:
    """Seal a manifest, load the bundle, and explain and verify with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        shutil.copytree(bundle, folder, copy_function=link)
        (folder / MANIFEST).unlink()
        write_manifest(folder, _decode(folder / MANIFEST, content))
        with ccam.load(folder, backend="onnxruntime-cpu") as explainer:
            explanation = explainer.explain(example_pictures()[0], ccam.Top(2))
            assert np.isfinite(explanation.saliency).all()
            explanation.panel()
            explanation.masks_panel()


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


@pytest.mark.slow
@settings(PATIENT, max_examples=100)
@given(data=st.data())
def test_a_sealed_manifest(tiny_bundle: Path, data: st.DataObject) -> None:
    value = json.loads((tiny_bundle / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(value))))
        value = put(value, place, data.draw(st.sampled_from(HOSTILE)))
    try:
        use(json.dumps(value).encode(), tiny_bundle)
    except CcamError as refusal:
        assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("place", "new", "line"),
    [
        (("classes",), 6, "5 labels for 6 classes|6 baseline logits"),
        (("layers", 0, "channels"), 2**40, r"feature_0 of 1099511627776x\d+x\d+, its graph 6x"),
        (("input",), [3, 10**6, 10**6], "images of 3x1000000x1000000, its graph 3x32x48"),
    ],
)
def test_sizes_that_are_not_the_graph_s(
    tiny_bundle: Path, place: tuple[Any, ...], new: Any, line: str
) -> None:
    """Nothing is allocated for them."""
    value = json.loads((tiny_bundle / MANIFEST).read_bytes())
    value["preprocessing"]["resize"] = "stretch"
    with pytest.raises(BundleError, match=line):
        use(json.dumps(put(value, place, new)).encode(), tiny_bundle)


ARRAYS = (
    np.zeros(0, np.float32),
    np.zeros((1, 3, 32, 48), np.float32),
    np.full((8, 5), np.nan, np.float32),
    np.full((8,), 99, np.int64),
    np.zeros((8, 3, 32, 48), np.float64),
    np.zeros((2, 2), np.complex128),
    np.array(["x"]),
    np.array(1.5),
)


@pytest.mark.slow
@settings(PATIENT, max_examples=40)
@given(data=st.data())
def test_a_sealed_record_of_other_arrays(tiny_bundle: Path, data: st.DataObject) -> None:
    """As `verify` reads it."""
    with np.load(tiny_bundle / "reference.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = data.draw(st.sampled_from(sorted(arrays)))
    new = data.draw(st.sampled_from((*ARRAYS, arrays["logits"], arrays["images"], None)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tiny"
        shutil.copytree(tiny_bundle, folder, copy_function=link)
        (folder / "reference.npz").unlink()
        changed = {key: new if key == name else value for key, value in arrays.items()}
        kept = {key: value for key, value in changed.items() if value is not None}
        np.savez(folder / "reference.npz", **kept)
        manifest = _decode(folder / MANIFEST, (folder / MANIFEST).read_bytes())
        (folder / MANIFEST).unlink()
        write_manifest(folder, replace(manifest, files=record_files(folder)))
        bundle = read_bundle(folder)
        with ccam.load(bundle, backend="onnxruntime-cpu") as explainer:
            try:
                verify_bundle(bundle, explainer.networks, "fp32")
            except CcamError as refusal:
                assert "\n" not in str(refusal)
