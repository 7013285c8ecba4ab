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

import pytest

pytest.importorskip("numba.cuda")

from numba import cuda, types

from ccam_deploy.kernels.cuda import (
    channels,
    combine,
    cut,
    gradients,
    grids,
    layer_maps,
    masks,
    places,
    rows,
    scores,
    statistics,
    sums,
    ward,
)
from ccam_deploy.kernels.cuda.launch import Threads
from ccam_deploy.kernels.cuda.signatures import signatures

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DAILY = (8, 9)
REGISTERS = 65536
SHARED = 48 * 1024

THREADS = {
    scores.cast: "combine",
    scores.gather: "combine",
    scores.output_gradient: "scores",
    scores.mask_scores: "scores",
    statistics.channel_statistics: "statistics",
    statistics.standardise: "search",
    ward.begin: "partition",
    ward.search: "search",
    ward.merge: "search",
    ward.relink: "search",
    cut.partition: "partition",
    sums.collection_sums: "sums",
    masks.index_masks: "combine",
    masks.count_values: "mask_parts",
    masks.write_masks: "mask_parts",
    combine.softmax_weights: "search",
    combine.weighted_sum: "combine",
    combine.find_extremes: "combine",
    combine.min_max: "combine",
    rows.row_scores: "scores",
    rows.keep_scores: "search",
    rows.advance: "scores",
    channels.channel_spread: "statistics",
    channels.render_channels: "masks",
    channels.channel_weights: "combine",
    places.isolate: "masks",
    gradients.gradient_weights: "statistics",
    layer_maps.weighted_channels: "sums",
    layer_maps.positive_gradients: "sums",
    layer_maps.lift: "scaling",
    layer_maps.enlarge: "combine",
    grids.render_grids: "masks",
    grids.clear: "combine",
    grids.accumulate: "combine",
    grids.mean: "combine",
}
"""Each kernel's row of Threads."""


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
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        pytest.param(types.float32, None, id="fp32"),
        pytest.param(types.float16, types.float32, id="fp16", marks=pytest.mark.nightly),
    ],
)
def test_kernels_compile_without_spills(
    capability: tuple[int, int], dtype: types.Float, others: types.Float | None, tmp_path: Path
) -> None:
    """Those of half precision that are not also of `others`."""
    assembler = shutil.which("ptxas")
    threads = asdict(Threads())
    done = set(signatures(others).items()) if others else set()
    for kernel, arguments in signatures(dtype).items():
        if (kernel, arguments) in done:
            continue
        signature, bounds = types.void(*arguments), kernel.targetoptions["launch_bounds"]
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=capability, launch_bounds=bounds)
        name = f"{kernel.py_func.__name__} {dtype}"
        assert ".entry" in ptx
        if assembler is None:
            continue
        used = assemble(assembler, ptx, capability, tmp_path / "kernel.ptx")
        print(f"{capability[0]}.{capability[1]} {name:28} {used}")
        assert used["spills"] == 0, name
        assert used["shared"] <= SHARED, name
        # Registers are handed out to warps in steps of 8 per thread.
        assert -(-used["registers"] // 8) * 8 * threads[THREADS[kernel]] <= REGISTERS, name


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
