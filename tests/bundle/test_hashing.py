"""A bundle's files are hashed a few at a time, and each of them once."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy.bundle import folder as bundle_folder
from ccam_deploy.bundle.folder import hash_file, hash_files


def test_hashes_come_in_the_files_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_folder, "_WORTH_THREADS", 0)
    paths = [tmp_path / f"{index}" for index in range(20)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes(7919 * index % 13))
    assert len({hash_file(path) for path in paths}) > 10
    assert hash_files(paths) == [hash_file(path) for path in paths]
    assert hash_files([]) == []


def test_large_files_are_hashed_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two waits until the other has begun."""
    both = threading.Barrier(2, timeout=10)

    def hash_file(path: Path) -> str:
        both.wait()
        return path.name

    monkeypatch.setattr(bundle_folder, "hash_file", hash_file)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(bundle_folder._WORTH_THREADS)
    assert hash_files(paths) == ["a", "b"]


def test_an_unreadable_file_ends_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_folder, "_WORTH_THREADS", 0)
    paths = [tmp_path / f"{index}" for index in range(9)]
    for path in paths:
        path.touch()

    def hash_file(path: Path) -> str:
        raise PermissionError(path.name)

    monkeypatch.setattr(bundle_folder, "hash_file", hash_file)
    with pytest.raises(PermissionError):
        hash_files(paths)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_loading_hashes_every_file_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: Counter[str] = Counter()

    def counting(path: Path) -> str:
        hashed[path.name] += 1
        return hash_file(path)

    monkeypatch.setattr(bundle_folder, "hash_file", counting)
    with ccam.load(tiny_bundle, backend="onnxruntime-cpu") as explainer:
        files = explainer.bundle.manifest.files
    assert hashed == Counter(list(files))
