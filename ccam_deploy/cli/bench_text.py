"""A measurement of latency as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccam_deploy.cli.options import table

_COLUMNS = {
    "mean": "mean",
    "median": "median",
    "p90": "p90",
    "p95": "p95",
    "p99": "p99",
    "min": "minimum",
    "max": "maximum",
}
Rows = list[tuple[str, ...]]


def text(result: Mapping[str, Any]) -> str:
    """The result that `bench` writes as JSON, in tables."""
    batches = result["batches"]
    parts = [_facts(result), _latency(batches), _cost(batches), _stages(batches)]
    if batches[0]["device_ms"] is not None:
        parts.append(_device(batches))
    if result["settings"]["compare"]:
        parts.append(_comparisons(batches))
    parts.append(_cold_starts(result["cold_start"]))
    return "\n\n".join(table(rows) for rows in parts)


def _facts(result: Mapping[str, Any]) -> Rows:
    bundle, settings, conditions = result["bundle"], result["settings"], result["conditions"]
    size = "x".join(map(str, bundle["input"][1:]))
    weights = ", random weights" if bundle["random_weights"] else ""
    card = result["batches"][0]["gpu"]
    counts = result["batches"][0]["collections"]
    masks = "; ".join(f"{name} {_range(values)}" for name, values in counts.items())
    rows: Rows = [
        ("bundle", f"{bundle['name']}, {size}{weights}"),
        ("engine", f"{settings['backend']}, {settings['precision']}"),
        ("processor", f"{conditions['processor']}, {conditions['cores']} cores"),
        ("collections", masks),
    ]
    if card:
        rows.append(("GPU", f"{card['name']}, driver {card['driver']}"))
        clocks = [found["gpu_clock_mhz"] for found in result["batches"] if found["gpu_clock_mhz"]]
        ends = [clock[end] for clock in clocks for end in ("minimum", "maximum")]
        if ends:
            rows.append(("GPU's clock, MHz", f"{min(ends):.0f} to {max(ends):.0f} under load"))
    return rows


def _latency(batches: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [
        ("latency, ms", "threads", *_COLUMNS, "calls", "explanations/s", "masked forwards/s")
    ]
    for found in batches:
        spent = found["latency_ms"]
        rows.append(
            (
                f"batch {found['batch']}",
                str(found["concurrency"]),
                *(_number(spent[key]) for key in _COLUMNS.values()),
                str(spent["calls"]),
                _number(found["explanations_per_second"]),
                _number(found["masked_forwards_per_second"]),
            )
        )
    return rows


def _cost(batches: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [
        ("in turn, median ms", "from images", "from array", "floor", "overhead", "masked forwards")
    ]
    for found in batches:
        rows.append(
            (
                f"batch {found['batch']}",
                *(
                    _number(found[f"{key}_ms"]["median"])
                    for key in ("from_images", "from_array", "floor")
                ),
                f"{found['overhead']:.3f}",
                _range(found["masks"]),
            )
        )
    return rows


def _stages(batches: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [("stage, median ms", *(f"batch {found['batch']}" for found in batches))]
    for name in dict.fromkeys(stage for found in batches for stage in found["stages_ms"]):
        rows.append((name, *(_number(found["stages_ms"].get(name, 0.0)) for found in batches)))
    return rows


def _device(batches: Sequence[Mapping[str, Any]]) -> Rows:
    columns = ("device_ms", "without_transfers_ms", "host_ms")
    rows: Rows = [("on the GPU, median ms", "in all", "without transfers", "host beside it")]
    for found in batches:
        rows.append((f"batch {found['batch']}", *(_number(found[key]) for key in columns)))
    return rows


def _comparisons(batches: Sequence[Mapping[str, Any]]) -> Rows:
    rows: Rows = [("compared, in turn", "other", "median ms", "times as long")]
    for found in batches:
        for name, peer in found["compare"].items():
            spent = _number(peer["ms"]["median"])
            rows.append((f"batch {found['batch']}", name, spent, f"{peer['ratio']:.2f}"))
    return rows


def _cold_starts(starts: Sequence[Mapping[str, Any]]) -> Rows:
    columns = ("total", "imports", "load", "first", "second")
    memory = {"peak_memory_mib": "peak MiB", "device_memory_mib": "GPU MiB"}
    shown = {key: title for key, title in memory.items() if starts[0][key] is not None}
    rows: Rows = [("cold start, ms", *columns, *shown.values())]
    for start in starts:
        figures = [start[f"{name}_ms"] for name in columns] + [start[key] for key in shown]
        rows.append((f"batch {start['batch']}", *map(_number, figures)))
    return rows


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    """Three or more digits, as many as say something."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
