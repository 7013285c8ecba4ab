"""The GPU's benchmark without a GPU: its time, what it leaves out and why, what it keeps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import bench_gpu as bench
from bench import bench_kernels, harness
from bench.gpu import tables
from bench.gpu.pieces import (
    BATCHES,
    CHANNELS,
    MASKS,
    PRECISIONS,
    Outcome,
    Piece,
    measure_pieces,
    offered,
    part_command,
    pieces_in,
    pieces_of,
    run_part,
    score_pieces,
    with_masks,
)
from ccam_deploy.errors import BackendError
from tests.clock import FakeClock

CARD = {"name": "NVIDIA H100", "driver": "580.95"}
CONDITIONS = {"gpu": CARD, "versions": {"torch": "2"}, "cores": 16, "python": "3.12"}
ONE = Piece(kind="explain", network="resnet18", batch=1, precision="fp16")
SCORE_KINDS = ("score-cam", "score-floor", "torchcam")
EIGHT = msgspec.structs.replace(ONE, batch=8)


def explained(median: float, masks: int) -> dict[str, Any]:
    timing = {"median": median, "maximum": 2 * median}
    return {
        "masks": masks,
        "ms": timing,
        "device_ms": median / 2,
        "host_ms": median / 2,
        "stages_ms": {"backbone": 0.25, "classifier": 0.5},
        "first_ms": 900.0,
        "warm_up_ms": 1234.5,
        "memory_mib": 700.0,
    }


def figures_of(piece: Piece) -> dict[str, Any]:
    if piece.kind == "kernels":
        timing = {"median": 0.1, "p90": 0.2}
        return {"masks": 16, "kernels_ms": {"sum": timing}}
    if piece.kind == "explain":
        return explained(3.0, 20 * piece.batch)
    if piece.kind == "score-cam":
        timing = {"median": 30.0, "maximum": 33.0}
        return {"masks": 510, "ms": timing, "forwards_ms": 27.0, "overhead": 1.111}
    if piece.kind == "torchcam":
        return {"torchcam_ms": 41.0}
    return {"masks": piece.masks, "graph_ms": 2.0, "one_by_one_ms": 60.0, "memory_mib": 500.0}


class FakeParts:
    """Runs parts on a clock: each piece takes some seconds, and what is late is lost."""

    def __init__(self, seconds: float) -> None:
        self.clock = FakeClock()
        self.seconds = seconds
        self.runs: list[tuple[list[Piece], float]] = []

    def __call__(
        self,
        command: Sequence[str],
        pieces: Sequence[Piece],
        limit: float,
        keep: Callable[[Outcome], None],
    ) -> None:
        self.runs.append((list(pieces), limit))
        end = self.clock.time + limit
        for place, piece in enumerate(pieces):
            if self.clock.time + self.seconds > end:
                self.clock.time = end
                for late in pieces[place:]:
                    keep(Outcome(late.key, reason=f"not done within {limit:.0f} s"))
                return
            self.clock.time += self.seconds
            keep(Outcome(piece.key, figures_of(piece)))


def results(file: Path | None = None, **figures: Any) -> bench.Results:
    return bench.Results("python -m bench.bench_gpu", CONDITIONS, file, figures)


def run_bench(
    folder: Path,
    seconds: float,
    limit: float = bench.LIMIT,
    found: bench.Results | None = None,
) -> tuple[bench.Results, FakeParts]:
    """Run everything on fake parts, with bundles that are there already."""
    parts = FakeParts(seconds)
    for network in PRECISIONS:
        (folder / network).mkdir(exist_ok=True)
        (folder / network / "manifest.json").touch()
    found = found or results()
    bench.Bench(found, "onnxruntime-cuda", limit, parts, parts.clock).measure(folder)
    return found, parts


def every_piece() -> list[Piece]:
    kinds = ("kernels", "explain", "floor")
    pieces = [piece for kind in kinds for name in PRECISIONS for piece in pieces_of(kind, name)]
    return pieces + [piece for kind in SCORE_KINDS for piece in score_pieces(kind, "resnet18")]


def test_pieces_have_names_of_their_own_and_precisions_that_there_are() -> None:
    keys = [piece.key for piece in every_piece()]
    assert len(set(keys)) == len(keys)
    assert {"kernels/vgg19/32", "explain/resnet101/fp16/8", "floor/resnet18/fp32/1"} <= set(keys)
    assert set(offered("vgg19")) - {"tf32"} == {"fp32"}
    precisions = [piece.precision for piece in pieces_of("explain", "resnet18")]
    assert precisions == [name for name in offered("resnet18") for _ in BATCHES]


def test_a_floor_has_the_masks_of_the_explanation() -> None:
    floor = EIGHT.of_kind("floor")
    assert with_masks(floor, {EIGHT.key: explained(3, 171)}).masks == 171
    assert with_masks(floor, {ONE.key: explained(3, 20)}).masks == 8 * MASKS
    (of_score_cam, *_) = score_pieces("score-floor", "resnet18")
    assert with_masks(of_score_cam, {ONE.key: explained(3, 20)}).masks == CHANNELS
    found = {"score-cam/resnet18/fp32/1": {"masks": 510}}
    assert with_masks(of_score_cam, found).masks == 510


def test_everything_is_measured(tmp_path: Path) -> None:
    """Kernels first, while networks are exported; floors after all explanations."""
    found, parts = run_bench(tmp_path, 0.5)
    assert set(found.figures) == {piece.key for piece in every_piece()}
    assert not found.left_out
    kinds = [(pieces[0].kind, pieces[0].network) for pieces, _ in parts.runs]
    pairs = [(kind, name) for kind in ("explain", "floor") for name in PRECISIONS]
    assert kinds == [("kernels", "resnet18"), *pairs]
    assert found.figures["floor/resnet101/fp16/32"]["masks"] == 20 * 32
    assert found.figures["score-floor/resnet18/fp32/1"]["masks"] == 510
    assert all(limit <= bench.PART_LIMITS[pieces[0].kind] for pieces, limit in parts.runs)


@pytest.mark.parametrize("limit", [4.0, 30.0, 100.0, 240.0])
def test_time_is_bounded_and_what_is_left_out_says_why(tmp_path: Path, limit: float) -> None:
    found, parts = run_bench(tmp_path, 20.0, limit)
    assert parts.clock.time - FakeClock().time <= limit
    assert set(found.figures) | set(found.left_out) == {piece.key for piece in every_piece()}
    assert not set(found.figures) & set(found.left_out)
    reasons = set(found.left_out.values())
    late = f"no time was left of {limit:g} s; give --resume"
    assert reasons <= {late, *(f"not done within {run[1]:.0f} s" for run in parts.runs)}
    assert late in reasons


@pytest.mark.slow
def test_a_second_run_goes_on(tmp_path: Path) -> None:
    """Every run gets a part of the way, and what it measured is not measured again."""
    file = tmp_path / "gpu.json"
    measured: list[str] = []
    for _ in range(12):
        known = bench.resumed(file, CONDITIONS)
        found, parts = run_bench(tmp_path, 12.0, 100.0, results(file, **known))
        asked = [piece.key for pieces, _ in parts.runs for piece in pieces]
        assert not set(asked) & set(known)
        measured += [key for key in found.figures if key not in known]
    assert sorted(measured) == sorted(piece.key for piece in every_piece())
    assert json.loads(file.read_text())["left_out"] == {}


def test_a_floor_with_other_masks_is_measured_again(tmp_path: Path) -> None:
    key = "floor/resnet18/fp16/{}"
    old = {"graph_ms": 99.0, "memory_mib": None}
    known = {key.format(1): {**old, "masks": 20}, key.format(8): {**old, "masks": 8 * MASKS}}
    found, _ = run_bench(tmp_path, 0.1, found=results(None, **known))
    assert found.figures[key.format(1)]["graph_ms"] == 99
    assert found.figures[key.format(8)] == {**figures_of(EIGHT.of_kind("floor")), "masks": 160}


def test_nothing_is_lost_by_an_interruption(tmp_path: Path) -> None:
    found = results(tmp_path / "gpu.json")
    found.keep(Outcome(ONE.key, explained(3, 20)))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["results"] == {ONE.key: explained(3, 20)}
    assert written["conditions"] == CONDITIONS
    found.keep(Outcome(EIGHT.key, reason="out of memory"))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["left_out"] == {EIGHT.key: "out of memory"}
    assert "- Left out: explain/resnet18/fp16/8: out of memory" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    "other",
    [{"gpu": {**CARD, "name": "L4"}}, {"gpu": {**CARD, "driver": "1"}}, {"versions": {}}],
)
def test_figures_of_another_card_are_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    results(tmp_path / "gpu.json").keep(Outcome(ONE.key, explained(3, 20)))
    assert bench.resumed(tmp_path / "none.json", CONDITIONS) == {}
    assert list(bench.resumed(tmp_path / "gpu.json", CONDITIONS)) == [ONE.key]
    with pytest.raises(SystemExit, match="another card, driver or with other versions; leave"):
        bench.resumed(tmp_path / "gpu.json", {**CONDITIONS, **other})


@pytest.mark.slow
def test_exports_that_fail_or_do_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their explanations are left out, the floors are not; a bundle that is there is taken."""
    codes = {
        "resnet18": "import sys; sys.exit('error: no such layer')",
        "vgg19": "import time; time.sleep(600)",
    }
    (tmp_path / "resnet101").mkdir()
    (tmp_path / "resnet101" / "manifest.json").touch()
    begun = time.perf_counter()
    monkeypatch.setattr(bench, "EXPORT_LIMIT", 1.0)
    monkeypatch.setattr(
        harness, "export_command", lambda name, *_, **__: [sys.executable, "-c", codes[name]]
    )
    parts = FakeParts(0.01)
    found = results()
    bench.Bench(found, "auto", 100.0, parts, parts.clock).measure(tmp_path)
    assert time.perf_counter() - begun < 300
    assert found.left_out["explain/resnet18/fp16/1"] == "its export failed: error: no such layer"
    assert found.left_out["explain/vgg19/fp32/8"] == "its export took over 1 s"
    assert {key.partition("/")[0] for key in found.left_out} == {"explain", "score-cam"}
    assert found.figures["score-floor/resnet18/fp32/1"]["masks"] == CHANNELS
    assert "explain/resnet101/fp16/1" in found.figures
    assert found.figures["floor/vgg19/fp32/8"]["masks"] == 8 * MASKS


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def outcomes(code: str, pieces: Sequence[Piece], limit: float) -> list[Outcome]:
    kept: list[Outcome] = []
    run_part(python(code), pieces, limit, kept.append)
    return kept


def test_a_part_gives_its_pieces_one_by_one() -> None:
    """What libraries print between, and pieces that nobody asked for, are passed over."""
    code = (
        "import json, sys\n"
        "one, eight = json.loads(sys.argv[1])\n"
        "assert (one['kind'], one['network'], one['batch']) == ('explain', 'resnet18', 1)\n"
        "print('a note'); print(3); print('{}')\n"
        "print(json.dumps({'key': 'explain/resnet18/fp16/1', 'figures': {'a': 1}}))\n"
        "print(json.dumps({'key': 'explain/resnet18/fp16/9', 'figures': {'a': 2}}))\n"
        "print(json.dumps({'key': 'explain/resnet18/fp16/8', 'reason': 'out of memory'}))\n"
    )
    assert outcomes(code, [ONE, EIGHT], 60) == [
        Outcome(ONE.key, {"a": 1}),
        Outcome(EIGHT.key, reason="out of memory"),
    ]


@pytest.mark.slow
def test_a_part_that_dies_or_takes_too_long_loses_only_the_rest() -> None:
    line = json.dumps({"key": ONE.key, "figures": {"a": 1}})
    first = f"import sys, time\nprint({line!r}, flush=True)\n"
    dead = outcomes(f"{first}sys.exit('Segmentation fault')", [ONE, EIGHT], 60)
    assert dead == [Outcome(ONE.key, {"a": 1}), Outcome(EIGHT.key, reason="Segmentation fault")]
    begun = time.perf_counter()
    late = outcomes(f"{first}time.sleep(600)", [ONE, EIGHT], 2)
    assert late == [Outcome(ONE.key, {"a": 1}), Outcome(EIGHT.key, reason="not done within 2 s")]
    assert time.perf_counter() - begun < 60


def test_pieces_that_fail_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(piece: Piece) -> dict[str, Any]:
        if piece.batch == 1:
            raise BackendError("the GPU failed: out of memory")
        return {"masks": piece.masks}

    pieces = [ONE, with_masks(EIGHT.of_kind("floor"), {})]
    assert pieces_in(msgspec.json.encode(pieces).decode()) == pieces
    measure_pieces(pieces, measure)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"key": ONE.key, "reason": "the GPU failed: out of memory"},
        {"key": "floor/resnet18/fp16/8", "figures": {"masks": 176}},
    ]


def test_table_of_explanations() -> None:
    """A ratio stands only beside a floor with as many masks."""
    found = {
        "explain/resnet18/fp16/1": explained(3.0, 20),
        "floor/resnet18/fp16/1": {**figures_of(with_masks(ONE.of_kind("floor"), {})), "masks": 20},
        "explain/resnet18/fp16/8": explained(24.0, 171),
        "floor/resnet18/fp16/8": {"masks": 176, "graph_ms": 6.0, "memory_mib": None},
        "floor/vgg19/fp32/1": {"masks": 22, "graph_ms": 8.9, "memory_mib": 900.0},
    }
    rows = tables.explanations(found).splitlines()[2:]
    assert rows == [
        "| resnet18 | fp16 | 1 | 20 | 3 | 6 | 1.5 | 1.5 | 2 | 1.50 | 60 | 700 | 500 |",
        "| resnet18 | fp16 | 8 | 171 | 24 | 48 | 12 | 12 | 6 | – | – | 700 | – |",
        "| vgg19 | fp32 | 1 | 22 | – | – | – | – | 8.9 | – | – | – | 900 |",
    ]
    assert tables.stages(found).splitlines() == [
        "| stage of one image, ms | resnet18, fp16 |",
        "|---|---|",
        "| backbone | 0.25 |",
        "| classifier | 0.5 |",
        "| warm-up | 1234 |",
        "| first call after it | 900 |",
    ]


def test_table_of_score_cam() -> None:
    """What is not known, such as TorchCAM where it is not installed, is a dash."""
    whole = {f"{kind}/resnet18/fp32/1": figures_of(score_piece(kind)) for kind in SCORE_KINDS}
    part = {"score-floor/resnet18/tf32/1": figures_of(score_piece("score-floor"))}
    assert tables.score_cams(whole | part).splitlines()[2:] == [
        "| resnet18 | fp32 | 510 | 30 | 33 | 27 | 1.11 | 2 | 41 | 60 |",
        "| resnet18 | tf32 | 512 | – | – | – | – | 2 | – | 60 |",
    ]
    assert tables.score_cams({}) == ""


def score_piece(kind: str) -> Piece:
    piece = score_pieces(kind, "resnet18")[0]
    return with_masks(piece, {}) if kind == "score-floor" else piece


def test_markdown_names_card_versions_and_command() -> None:
    found = results(None, **{"kernels/resnet18/1": figures_of(pieces_of("kernels", "resnet18")[0])})
    text = tables.markdown(found.as_values())
    assert "| sum | 100 / 200 |" in text
    assert text.endswith(
        "NVIDIA H100, driver 580.95, 16 cores, Python 3.12, torch 2.\n"
        "Made by `python -m bench.bench_gpu`.\n"
    )
    unknown = tables.markdown({**results().as_values(), "conditions": {**CONDITIONS, "gpu": None}})
    assert "unknown GPU" in unknown


def test_without_a_gpu_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def open_device() -> None:
        raise BackendError("no NVIDIA GPU can be used: no device")

    monkeypatch.setattr(bench_kernels, "open_device", open_device)
    with pytest.raises(SystemExit) as caught:
        bench.main(["--output", str(tmp_path / "new")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "this is measured on a GPU alone: no NVIDIA GPU can be used: no device\n"
    )
    assert not list(tmp_path.iterdir())


def test_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = FakeParts(0.0)
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench.Bench, "run", staticmethod(parts))
    monkeypatch.setattr(bench.Bench.__init__, "__defaults__", (parts, parts.clock))
    monkeypatch.setattr(harness, "export_command", lambda *_, **__: python(""))
    bench.main(["--output", str(tmp_path / "new"), "--backend", "onnxruntime-cuda"])
    result = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert list(result["results"])[:2] == ["kernels/resnet18/1", "kernels/resnet101/1"]
    assert len(result["results"]) == len(every_piece())
    limit = f"{bench.LIMIT:g}"
    command = f"python -m bench.bench_gpu --limit {limit} --backend onnxruntime-cuda --output "
    assert result["command"].startswith(command)
    text = (tmp_path / "new" / "gpu.md").read_text()
    printed = capsys.readouterr()
    assert printed.out.strip() == text.strip()
    assert "explain/vgg19/fp32/32: 3 ms, slowest 6 ms" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("module", ["kernels", "floor", "explain"])
def test_every_part_says_why_it_cannot_run_here(module: str, tiny_bundle: Path) -> None:
    """In its own process, on a machine without a GPU."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = (str(tiny_bundle), "onnxruntime-cpu") if module == "explain" else ()
    pieces = pieces_of(module, "resnet18")[-2:]
    kept: list[Outcome] = []
    run_part(part_command(module, *words), pieces, 300, kept.append)
    reasons = {
        "kernels": "PyCUDA cannot be loaded",
        "floor": "PyTorch cannot use a GPU here",
        "explain": "no backend for a GPU is installed",
    }
    assert [outcome.key for outcome in kept] == [piece.key for piece in pieces]
    assert all(reasons[module] in outcome.reason for outcome in kept)
