"""What the benchmarks share: failures are shown, commands can be run again, files fit together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import (
    bench_export,
    bench_forwards,
    bench_kernels,
    bench_overhead,
    bench_quality,
    bench_table2,
    harness,
)
from ccam_deploy.cli.export import export

RESULTS = harness.ROOT / "bench" / "results"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_why_a_command_failed_is_shown() -> None:
    with pytest.raises(SystemExit) as caught:
        harness.run(python("import sys; print('lost'); sys.exit('no such layer')"))
    assert str(caught.value).startswith("no such layer\nfailed: ")


@pytest.mark.slow
def test_why_an_export_failed_is_shown(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        harness.export("nonet", tmp_path / "nonet")
    assert "nonet.toml cannot be read" in str(caught.value)
    assert str(caught.value).splitlines()[-1].startswith(f"failed: {sys.executable}")


def test_what_a_command_says_on_stderr_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    printed = harness.run(python("import sys; print('1'); print('a warning', file=sys.stderr)"))
    assert printed == "1\n"
    assert capsys.readouterr().err == "a warning\n"


def test_result_of_a_process_is_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench_echo.py").write_text(
        "import json, sys\nprint('a note')\nprint(json.dumps({'words': sys.argv[1:]}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = harness.measure_in_process("bench_echo", {"rounds": 3, "backend": None})
    assert result == {"words": ["--rounds", "3"]}


def test_command_line_can_be_run_by_a_shell() -> None:
    words = {"methods": "cam,rise", "seed": 0, "rise-masks": None, "output": Path("a folder/x")}
    assert harness.command_line("bench.bench_quality", words) == (
        "python -m bench.bench_quality --methods cam,rise --seed 0 --output 'a folder/x'"
    )


def test_plans_are_built_for_tensorrt_alone(tmp_path: Path) -> None:
    """Each command is one that `export` takes."""
    options = bench_table2.export_options("224", "fp16")
    for backend, tail in (
        ("tensorrt", ["--build", "--no-kernels", "--library", "tensorrt"]),
        ("tensorrt-rtx", ["--build", "--no-kernels", "--library", "tensorrt-rtx"]),
        ("auto", []),
        ("onnxruntime-cuda", []),
    ):
        folder = tmp_path / "x"
        words = harness.export_command("resnet18", folder, *options, backend=backend)
        parsed = export.make_context("export", words[4:]).params
        assert words[3] == "export"
        assert words[words.index(str(folder)) + 1 :] == tail
        assert (parsed["input_size"], parsed["precision"]) == ((224, 224), "fp16")
        assert parsed["build"] == bool(tail)
        assert parsed["recipe"].exists()


@pytest.mark.parametrize(
    ("bench", "name"),
    [
        (bench_overhead, "overhead-cpu"),
        (bench_export, "export-cpu"),
        (bench_forwards, "forwards-cpu"),
        (bench_table2, "table2-onnxruntime-cpu"),
        (bench_table2, "resnet18-methods/table2-onnxruntime-cpu"),
    ],
)
def test_committed_tables_are_of_the_committed_figures(bench: object, name: str) -> None:
    file = RESULTS / f"{name}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    markdown = getattr(bench, "markdown")  # noqa: B009
    assert markdown(result) == file.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("network", ["digits", "efficientnet_lite0"])
def test_committed_tables_of_quality_are_of_its_figures(network: str) -> None:
    file = RESULTS / f"quality-{network}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    text = file.with_suffix(".md").read_text(encoding="utf-8") + "\n"
    assert f"\n\n{bench_quality.times_table(result['ms'])}\n\n" in text
    assert f"\n\n{bench_quality.origins_table(result['origins'])}\n\n" in text
    assert f"Made by `{result['command']}`" in text


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("*.json")), ids=lambda file: file.stem)
def test_every_committed_result_says_how_it_was_made(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["command"].split()[0] in ("python", "ccam-deploy")
    assert file.relative_to(harness.ROOT).parts[:2] == ("bench", "results")
    assert "bench/results" in result["command"]
    assert {"python", "processor", "cores", "versions"} <= set(result["conditions"])


def test_files_are_json_and_markdown_of_one_name(tmp_path: Path) -> None:
    harness.write_results(tmp_path / "sub" / "x.json", {"a": 1}, "| a |\n")
    assert json.loads((tmp_path / "sub" / "x.json").read_text()) == {"a": 1}
    assert (tmp_path / "sub" / "x.md").read_text() == "| a |\n"


def test_kernels_name_their_gpu() -> None:
    card = {"name": "NVIDIA H100"}
    result = {"command": "python x", "conditions": {"gpu": card}, "results": {}}
    assert "\nNVIDIA H100, random data, float32, 224×224. Made by `python x`.\n" in (
        bench_kernels.markdown(result)
    )
