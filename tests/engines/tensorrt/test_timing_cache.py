"""The timing cache. TensorRT-RTX has the functions, though there they measure nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ccam_deploy.engines.tensorrt import messages as tensorrt_messages
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.engines.tensorrt.timing_cache import TimingCache
from ccam_deploy.errors import BackendError, OutputError


class Timings:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class Config:
    """A builder's configuration that keeps one cache, as TensorRT's does."""

    def __init__(self, of_this_gpu: bool = True) -> None:
        self.of_this_gpu = of_this_gpu

    def create_timing_cache(self, content: bytes) -> Timings:
        return Timings(content)

    def set_timing_cache(self, timings: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timings = timings
        return self.of_this_gpu

    def get_timing_cache(self) -> Timings:
        return self.timings


def log() -> Any:
    return SimpleNamespace(last_warning="of before")


def test_builds_share_timings_and_leave_them_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "times.bin"
    first = TimingCache(file)
    for content in (b"+", b"++"):
        config = Config()
        first.attach(config, log())
        first.keep(config)
        assert file.read_bytes() == content
    config = Config()
    TimingCache(file).attach(config, log())
    assert config.timings.content == b"++"
    assert [path.name for path in tmp_path.iterdir()] == ["times.bin"]


def test_timings_of_another_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"times\.bin is no .* \(it is of another GPU\); name"):
        TimingCache(tmp_path / "times.bin").attach(Config(of_this_gpu=False), log())


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot read .*: Is a directory"):
        TimingCache(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    cache, config = TimingCache(tmp_path / "file" / "times.bin"), Config()
    cache.attach(config, log())
    with pytest.raises(OutputError, match="cannot write"):
        cache.keep(config)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_against_the_real_functions(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    file = tmp_path / "times.bin"
    messages = tensorrt_messages.logger(trt)
    config = trt.Builder(messages).create_builder_config()
    cache = TimingCache(file)
    cache.attach(config, messages)
    cache.keep(config)
    assert file.stat().st_size > 100
    file.write_bytes(b"no timings")
    with pytest.raises(BackendError, match=r"times\.bin is no timing cache .*; name another file"):
        TimingCache(file).attach(config, messages)
    assert file.read_bytes() == b"no timings"


def test_the_workstation_library_times_nothing() -> None:
    """It says so itself, of functions that it keeps for compatibility."""
    pytest.importorskip("tensorrt_rtx")
    library = load_library("tensorrt-rtx")
    assert not library.times_kernels
    config = library.module.Builder(
        tensorrt_messages.logger(library.module)
    ).create_builder_config()
    with pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
        config.set_timing_cache(config.create_timing_cache(b""), False)
