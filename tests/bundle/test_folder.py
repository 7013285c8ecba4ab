"""Bundles on disk: nothing that was changed is read, nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from ccam_deploy.bundle.folder import (
    _decode,
    _read_manifest,
    read_bundle,
    record_files,
    unlisted_files,
    write_manifest,
)
from ccam_deploy.bundle.manifest import FileRecord, Manifest
from ccam_deploy.errors import (
    BundleError,
    IntegrityError,
    ManifestError,
    OptionError,
    TargetError,
)
from tests.damage import contents, flip, full_disk


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change, alone in its folder."""
    return shutil.copytree(tiny_bundle, tmp_path / "place" / "tiny")


def reseal(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Change the manifest as somebody would who knows how its digest is made."""
    write_manifest(folder, change(read_bundle(folder).manifest))


def rename(old: str, new: str) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        records = {new if name == old else name: r for name, r in manifest.files.items()}
        precision = manifest.precisions["fp32"]
        graphs = {k: new if name == old else name for k, name in precision.graphs.items()}
        return replace(
            manifest, files=records, precisions={"fp32": replace(precision, graphs=graphs)}
        )

    return change


def test_round_trip(folder: Path) -> None:
    first = read_bundle(folder)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, first.manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert read_bundle(folder) == first
    assert first.manifest.files == record_files(folder)
    assert first.path("weights.bin") == folder / "weights.bin"
    assert first.precision("fp32") == first.manifest.precisions["fp32"]
    with pytest.raises(OptionError, match=r"has no fp16 graphs, only fp32; export with --prec"):
        first.precision("fp16")


def test_whole_numbers_read_back_as_floats(folder: Path) -> None:
    def whole(manifest: Manifest) -> Manifest:
        return replace(
            manifest, preprocessing=replace(manifest.preprocessing, mean=(0, 0, 0), std=(1, 1, 1))
        )

    reseal(folder, whole)
    assert read_bundle(folder).manifest.preprocessing.mean == (0.0, 0.0, 0.0)


def test_values_that_cannot_be_read_back_are_not_written(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ManifestError, match=r"not a valid manifest: Expected `float`, got `null`"):
        reseal(
            folder,
            lambda m: replace(m, preprocessing=replace(m.preprocessing, mean=(float("nan"),) * 3)),
        )
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["backbone.onnx", "weights.bin", "reference.npz"])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_changed_byte_is_refused(folder: Path, name: str, place: float) -> None:
    path = folder / name
    flip(path, int(place * (path.stat().st_size - 1)))
    with pytest.raises(IntegrityError) as raised:
        read_bundle(folder)
    assert str(raised.value) == f"{path} was changed after the export; export the bundle again"


def test_a_full_disk_leaves_the_old_manifest(folder: Path) -> None:
    before = contents(folder)
    manifest = read_bundle(folder).manifest
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_manifest(folder, replace(manifest, name="new"))
    assert contents(folder) == before
    write_manifest(folder, replace(manifest, name="new"))
    assert read_bundle(folder).manifest.name == "new"
    assert (folder / "manifest.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.nightly)])
def test_every_byte_of_the_manifest_matters(folder: Path, step: int) -> None:
    path = folder / "manifest.json"
    for offset in range(0, path.stat().st_size, step):
        flip(path, offset)
        with pytest.raises((ManifestError, IntegrityError)) as raised:
            read_bundle(folder)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        flip(path, offset)
    read_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../weights.bin", "/etc/hostname", "a\\b", "a//b", "./weights.bin", "a/../b", ""]
)
def test_a_path_outside_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / "weights.bin", folder.parent)
    reseal(folder, rename("weights.bin", name))
    with pytest.raises(ManifestError) as raised:
        read_bundle(folder)
    assert str(raised.value) == f'the manifest of {folder} leads outside its folder: "{name}"'


@pytest.mark.parametrize("name", ["weights.bin", "sub/weights.bin"])
def test_a_link_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "weights.bin").rename(outside / "weights.bin")
    link = folder / Path(name).parts[0]
    link.symlink_to(outside / "weights.bin" if link.name == name else outside)
    write_manifest(folder, rename("weights.bin", name)(_manifest(folder)))
    with pytest.raises(ManifestError) as raised:
        read_bundle(folder)
    assert str(raised.value) == f"{link} is a link; a bundle holds plain files only"


def _manifest(folder: Path) -> Manifest:
    return _read_manifest(folder)


def test_missing_and_resized_files(folder: Path) -> None:
    path = folder / "gradient.onnx"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        IntegrityError, match=f"has {size + 1} bytes, not {size}; export the bundle again"
    ):
        read_bundle(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"gradient\.onnx is missing; export the bundle"):
        read_bundle(folder)
    long_name = rename("gradient.onnx", "n" * 300)
    write_manifest(folder, long_name(_manifest(folder)))
    with pytest.raises(BundleError, match=r"tiny/n{300} cannot be read: File name too long"):
        read_bundle(folder)


def test_what_is_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere is not a bundle: there is no such folder"):
        read_bundle(folder / "nowhere")
    with pytest.raises(BundleError, match=r"weights.bin is not a bundle: it is a file"):
        read_bundle(folder / "weights.bin")
    (folder / "manifest.json").rename(folder / "other.json")
    with pytest.raises(BundleError, match=r"tiny is not a bundle: it has no manifest\.json"):
        read_bundle(folder)
    (folder / "manifest.json").symlink_to(folder / "other.json")
    with pytest.raises(BundleError, match=r"tiny is not a bundle: it has no manifest\.json"):
        read_bundle(folder)


def test_another_format_is_named_whatever_else_it_holds(folder: Path) -> None:
    for content in ({"format": 3}, {**_json(folder), "format": 3}, {"format": 0}):
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(
            ManifestError, match=r"has format \d, this version reads 1 to 2; export it again"
        ):
            read_bundle(folder)


def test_the_format_before_is_read_as_it_was_meant(folder: Path) -> None:
    """Its manifest has no activation, and its digest is still right."""
    assert _manifest(folder).activation == "softmax"
    write_manifest(folder, replace(_manifest(folder), format=1, activation=UNSET))
    assert "activation" not in _json(folder)
    manifest = read_bundle(folder).manifest
    assert (manifest.format, manifest.probabilities_by) == (1, "softmax")
    write_manifest(folder, replace(manifest, format=2))
    with pytest.raises(ManifestError, match=r"format 2 goes with activation UNSET"):
        read_bundle(folder)


def _json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "1", "Expected `int`, got `str` - at `$.format`"),
        ("classes", 0, "Expected `int` >= 1 - at `$.classes`"),
        ("input", [3, 32], "Expected `array` of length 3 - at `$.input`"),
        ("labels", "ant", "Expected `array`, got `str` - at `$.labels`"),
        ("files", {"x": {"bytes": 1, "sha256": "00"}}, "Expected `str` matching regex"),
        ("precisions", {"fp4": {}}, "Invalid enum value 'fp4'"),
        ("layers", [], "it lists no layers or no graphs"),
    ],
)
def test_wrong_types(folder: Path, field: str, value: Any, message: str) -> None:
    content = {**_json(folder), field: value}
    path = folder / "manifest.json"
    path.write_text(json.dumps(content))
    if field == "layers":
        write_manifest(folder, _decode(path, path.read_bytes()))
    with pytest.raises(ManifestError) as raised:
        read_bundle(folder)
    assert f"{path} is not a valid manifest: " in str(raised.value)
    assert message in str(raised.value)


def test_unknown_and_missing_fields(folder: Path) -> None:
    path = folder / "manifest.json"
    original = _json(folder)
    path.write_text(json.dumps({**original, "extra": 1}, indent=2))
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed after the export"):
        read_bundle(folder)
    del original["source"]
    path.write_text(json.dumps(original))
    with pytest.raises(ManifestError, match=r"missing required field `source`"):
        read_bundle(folder)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ManifestError, match=r"manifest\.json is not a valid manifest"):
        read_bundle(folder)


def without_a_layer(manifest: Manifest, quantity: str) -> Manifest:
    """Errors of all layers but the last."""
    entry = manifest.precisions["fp32"]
    short: dict[str, Any] = {quantity: getattr(entry.fidelity, quantity)[:-1]}
    entry = replace(entry, fidelity=replace(entry.fidelity, **short))
    return replace(manifest, precisions={"fp32": entry})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, labels=("a",)), "1 labels for 5 classes"),
        (
            lambda m: replace(m, preprocessing=replace(m.preprocessing, mean=(0.5,))),
            "mean and std must have 3 values",
        ),
        (
            lambda m: replace(m, files={k: v for k, v in m.files.items() if k != "reference.npz"}),
            'it uses "reference.npz", which is not among the files',
        ),
        (
            lambda m: replace(
                m,
                precisions={
                    "fp32": replace(m.precisions["fp32"], graphs={"backbone": "backbone.onnx"})
                },
            ),
            "fp32 must have the graphs backbone, gradient, classifier",
        ),
        (lambda m: without_a_layer(m, "gradients"), "the fidelity of fp32 must have 2 layers"),
        (
            lambda m: without_a_layer(m, "worst_gradients"),
            "the fidelity of fp32 must have 2 layers",
        ),
    ],
)
def test_contradictions(folder: Path, change: Callable[[Manifest], Manifest], message: str) -> None:
    reseal(folder, change)
    with pytest.raises(ManifestError) as raised:
        read_bundle(folder)
    assert str(raised.value).endswith(f"is not a valid manifest: {message}")


def test_unlisted_files(folder: Path) -> None:
    assert unlisted_files(read_bundle(folder)) == []
    (folder / "sub").mkdir()
    (folder / "sub" / "plan").touch()
    (folder / "a.txt").touch()
    assert unlisted_files(read_bundle(folder)) == ["a.txt", "sub/plan"]


def test_classes_by_number_and_name(folder: Path) -> None:
    manifest = read_bundle(folder).manifest
    assert [manifest.class_index(word) for word in (4, "4", "+1", "bee", 0)] == [4, 4, 1, 1, 0]
    assert manifest.label(2) == "cat"
    for word, message in (
        ("dog", 'the name "dog" stands for 3 "dog", 4 "dog"; give a number'),
        ("cow", 'class "cow" is not in the bundle; it has ant, bee, cat, dog, dog'),
        ("+-1", 'class "+-1" is not in the bundle; it has ant, bee, cat, dog, dog'),
        (5, "class 5 is out of range; the bundle has classes 0 to 4"),
        ("-1", "class -1 is out of range; the bundle has classes 0 to 4"),
    ):
        with pytest.raises(TargetError) as raised:
            manifest.class_index(word)
        assert str(raised.value) == message
    with pytest.raises(TargetError, match=r'class "9{40}…" is not in the bundle; it has 5000'):
        manifest.class_index("9" * 5000)
    nameless = replace(manifest, labels=())
    assert nameless.label(2) == "2"
    with pytest.raises(TargetError, match=r"which has no class names; give a number$"):
        nameless.class_index("ant")


def test_records_hold_sizes_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / "manifest.json").touch()
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record_files(tmp_path) == {"sub/a": FileRecord(3, sha)}
