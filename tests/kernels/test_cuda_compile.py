"""Every CUDA kernel compiles for every supported GPU, without spilling registers.

No GPU is needed: Numba compiles to PTX; where `ptxas` is on the PATH, that assembles it and tells
what the kernel takes of a multiprocessor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba.cuda")

from numba import cuda, types

from ccam_deploy.kernels.cuda import (
    channels,
    combine,
    cut,
    grids,
    masks,
    rows,
    scores,
    statistics,
    sums,
    ward,
)
from ccam_deploy.kernels.cuda.launch import Threads

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DAILY = (8, 9)
REGISTERS = 65536
SHARED = 48 * 1024

f4, f8, i4, i8 = types.float32, types.float64, types.int32, types.int64
TABLE, OWNER, STARTS = i8[:, ::1], i4[::1], i4[::1]
HIERARCHY = f8[:, ::1], f4[:, ::1], i4[:, ::1]
PSI, LABELS, COUNTS = f4[:, :, ::1], i4[:, ::1], i4[:, ::1]
MAPS, RANKS = (i4[:, ::1], f4[:, ::1], f4[:, ::1]), types.Tuple((i8, i8, f4))
PROGRESS, ROW_OWNER, ITEM = i4[::1], i8[::1], i4[::1]
LINES = i4[::1], f4[::1]
FLAGS, MERGES = types.uint8[::1], i4[:, :, ::1]


def signatures(dtype: Any) -> dict[Any, tuple[tuple[Any, ...], str]]:
    """Each kernel's argument types, for features and masks of a type, and its row of Threads."""
    inputs = TABLE, dtype[::1], dtype[::1], OWNER
    return {
        scores.cast: ((f4[::1], dtype[::1]), "combine"),
        scores.gather: ((types.uint64[:, ::1], OWNER, types.uint64[:, ::1]), "combine"),
        scores.output_gradient: (
            (dtype[:, ::1], OWNER, OWNER, f4, i8, i8[::1], dtype[:, ::1]),
            "scores",
        ),
        scores.mask_scores: (
            (dtype[:, ::1], STARTS, i8[::1], i8, i8, i8, f4[::1]),
            "scores",
        ),
        statistics.channel_statistics: ((*inputs, f8, PSI), "statistics"),
        statistics.standardise: ((TABLE, PSI, PSI), "search"),
        ward.begin: ((TABLE, PSI, *HIERARCHY, f8[:, ::1], COUNTS, MERGES), "search"),
        ward.search: ((TABLE, *HIERARCHY, COUNTS), "search"),
        ward.merge: ((TABLE, *HIERARCHY, f8[:, ::1], COUNTS, MERGES, i8, i8), "search"),
        ward.relink: ((TABLE, *HIERARCHY, COUNTS, MERGES, i8, i8), "search"),
        cut.partition: (
            (
                TABLE,
                *HIERARCHY,
                f8[:, ::1],
                MERGES,
                i8,
                i4[::1],
                LABELS,
                COUNTS,
                f4[:, :, ::1],
                i4[:, ::1],
            ),
            "partition",
        ),
        sums.collection_sums: (
            (*inputs, PSI, LABELS, COUNTS, f8[:, ::1], i4[:, :, ::1], f4[:, ::1]),
            "sums",
        ),
        masks.index_masks: ((COUNTS, i8, STARTS, FLAGS, i8[::1]), "combine"),
        masks.render_masks: (
            (TABLE, *MAPS, STARTS, OWNER, i8, i8, i8, RANKS, dtype[:, ::1], FLAGS, i8[::1]),
            "masks",
        ),
        combine.softmax_weights: (
            (STARTS, f4[::1], FLAGS, i8, f4[::1]),
            "search",
        ),
        combine.weighted_sum: ((STARTS, f4[::1], dtype[:, ::1], i8, f4[:, ::1]), "combine"),
        combine.min_max: ((f4[:, ::1], f4[:, ::1]), "scaling"),
        **row_signatures(dtype),
    }


def row_signatures(dtype: Any) -> dict[Any, tuple[tuple[Any, ...], str]]:
    """The same of the kernels of masked forwards."""
    maps, doubles, bytes_ = f4[:, ::1], f8[:, ::1], types.uint8[:, ::1]
    chunk, features = (dtype[:, ::1], ROW_OWNER, ITEM), dtype[:, :, ::1]
    pair, triple = types.UniTuple(i8, 2), types.UniTuple(i8, 3)
    return {
        rows.row_scores: (
            (PROGRESS, dtype[:, ::1], ROW_OWNER, ITEM, OWNER, i8[::1], i8, maps),
            "scores",
        ),
        rows.advance: ((PROGRESS, i8), "scores"),
        channels.channel_spread: ((features, bytes_, doubles), "statistics"),
        channels.render_channels: (
            (PROGRESS, i4[:, ::1], features, *LINES, pair, *chunk),
            "masks",
        ),
        channels.keep_scores: ((PROGRESS, ROW_OWNER, ITEM, OWNER, maps, maps), "search"),
        channels.channel_weights: (
            (PROGRESS, OWNER, bytes_, f4[::1], maps, i8, maps, maps),
            "combine",
        ),
        channels.weighted_channels: ((PROGRESS, OWNER, features, maps, maps), "sums"),
        channels.enlarge: ((PROGRESS, maps, *LINES, pair, maps), "combine"),
        grids.render_grids: (
            (PROGRESS, OWNER, bytes_, i4[:, ::1], *LINES, triple, *chunk),
            "masks",
        ),
        grids.clear: ((doubles,), "combine"),
        grids.accumulate: (
            (PROGRESS, maps, dtype[:, ::1], ROW_OWNER, ITEM, OWNER, doubles),
            "combine",
        ),
        grids.mean: ((PROGRESS, doubles, f8, maps), "combine"),
    }


@pytest.fixture(
    params=[
        pytest.param(cc, id=f"{cc[0]}.{cc[1]}", marks=[] if cc == DAILY else pytest.mark.nightly)
        for cc in CAPABILITIES
    ]
)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A compute capability; Numba asks a device for it before it compiles device functions."""
    cc: tuple[int, int] = request.param
    device = SimpleNamespace(compute_capability=cc)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    return cc


@pytest.mark.slow
def test_kernels_compile_without_spills(capability: tuple[int, int], tmp_path: Path) -> None:
    assembler = shutil.which("ptxas")
    threads = asdict(Threads())
    done = set()
    for dtype in (types.float32, types.float16):
        for kernel, (arguments, row) in signatures(dtype).items():
            if (kernel, arguments) in done:
                continue
            done.add((kernel, arguments))
            ptx, _ = cuda.compile_ptx(kernel.py_func, types.void(*arguments), cc=capability)
            name = f"{kernel.py_func.__name__} {dtype}"
            assert ".entry" in ptx
            if assembler is None:
                continue
            used = assemble(assembler, ptx, capability, tmp_path / "kernel.ptx")
            print(f"{capability[0]}.{capability[1]} {name:28} {used}")
            assert used["spills"] == 0, name
            assert used["shared"] <= SHARED, name
            # Registers are handed out to warps in steps of 8 per thread.
            assert -(-used["registers"] // 8) * 8 * threads[row] <= REGISTERS, name


def assemble(assembler: str, ptx: str, capability: tuple[int, int], path: Path) -> dict[str, int]:
    """Registers per thread, and bytes of shared memory and of spills, as `ptxas -v` tells them.

    Numba's compiler may be newer than the assembler, and name a version of PTX that it does not
    know though the kernel uses nothing of it; so the version is lowered.
    """
    version = re.search(r"release (\d+)\.(\d+)", _run(assembler, "--version"))
    assert version is not None
    known = f".version {int(version[1]) - 4}.{version[2]}"
    path.write_text(re.sub(r"^\.version .*", known, ptx, count=1, flags=re.MULTILINE))
    target = f"-arch=sm_{capability[0]}{capability[1]}"
    told = _run(assembler, "-v", target, str(path), "-o", str(path.with_suffix(".cubin")))
    patterns = {
        "registers": r"Used (\d+) registers",
        "shared": r"(\d+) bytes smem",
        "spills": r"(\d+) bytes spill stores",
    }
    found = {key: re.findall(pattern, told) for key, pattern in patterns.items()}
    return {key: max(map(int, values), default=0) for key, values in found.items()}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
