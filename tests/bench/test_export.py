"""The benchmark of exports: what it runs, and its table."""

from __future__ import annotations

from bench import bench_export as bench


def test_both_exports_run_in_turn_in_processes_of_their_own() -> None:
    commands: list[list[str]] = []
    result = bench.measure("resnet18", 2, commands.append)
    kinds = ["export" if "export" in command else "bare" for command in commands]
    assert kinds == ["export", "bare"] * 3, "one round of warm-up, two that count"
    assert "--random-weights" in commands[0]
    assert all(any("resnet18.toml" in word for word in command) for command in commands)
    assert len(result["export_ms"]) == len(result["bare_ms"])
    assert result["ratio"] > 0


def test_the_example_keeps_its_trained_weights() -> None:
    commands: list[list[str]] = []
    bench.measure("digits", 1, commands.append)
    assert not any("--random-weights" in command for command in commands)


def test_table_by_hand() -> None:
    figures = {"export_ms": {"median": 15250.0}, "bare_ms": {"median": 10000.0}, "ratio": 1.525}
    row = bench.table({"resnet18": figures}).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "resnet18",
        "15.2",
        "10.0",
        "1.52",
    ]
