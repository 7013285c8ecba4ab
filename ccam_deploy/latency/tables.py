"""A latency report as tables for a person."""

from __future__ import annotations

from collections.abc import Sequence

from ccam_deploy.latency.cold_start import ColdStart
from ccam_deploy.latency.report import BatchLatency, LatencyReport
from ccam_deploy.text import text_table

Rows = list[tuple[str, ...]]


def report_text(report: LatencyReport) -> str:
    """Lay out a report as tables with aligned columns, separated by empty lines."""
    batches = report.batches
    parts = [_facts(report), _latency(batches), _cost(batches), _stages(batches)]
    if batches[0].device_ms is not None:
        parts.append(_device(batches))
    if report.settings.compare:
        parts.append(_comparisons(batches))
    if report.cold_start:
        parts.append(_cold_starts(report.cold_start))
    return "\n\n".join(text_table(rows) for rows in parts)


def _facts(report: LatencyReport) -> Rows:
    bundle, settings, conditions = report.bundle, report.settings, report.conditions
    size = "x".join(map(str, bundle.input[1:]))
    weights = ", random weights" if bundle.random_weights else ""
    first = report.batches[0]
    counts = "; ".join(f"{name} {_range(values)}" for name, values in first.collections.items())
    rows: Rows = [
        ("bundle", f"{bundle.name}, {size}{weights}"),
        ("engine", f"{settings.backend}, {settings.precision}"),
        ("processor", f"{conditions.processor}, {conditions.cores} cores"),
        ("collections", counts),
    ]
    if first.gpu:
        rows.append(("GPU", f"{first.gpu.name}, driver {first.gpu.driver}"))
        clocks = [clock for figures in report.batches if (clock := figures.gpu_clock_mhz)]
        if clocks:
            low, high = min(c.minimum for c in clocks), max(c.maximum for c in clocks)
            rows.append(("GPU's clock, MHz", f"{low:.0f} to {high:.0f} under load"))
    return rows


def _latency(batches: Sequence[BatchLatency]) -> Rows:
    statistics = ("median", "slowest", "mean", "p90", "p95", "p99", "fastest")
    rates = ("explanations/s", "masked forwards/s")
    rows: Rows = [("latency, ms", "threads", *statistics, "calls", *rates)]
    for figures in batches:
        timing = figures.latency_ms
        values = (timing.median, timing.maximum, timing.mean, timing.p90, timing.p95, timing.p99)
        rows.append(
            (
                f"batch {figures.batch}",
                str(figures.concurrency),
                *map(digits, (*values, timing.minimum)),
                str(timing.calls),
                digits(figures.explanations_per_second),
                digits(figures.masked_forwards_per_second),
            )
        )
    return rows


def _cost(batches: Sequence[BatchLatency]) -> Rows:
    rows: Rows = [
        ("in turn, median ms", "from images", "from array", "floor", "overhead", "masked forwards")
    ]
    for figures in batches:
        timings = (figures.from_images_ms, figures.from_array_ms, figures.floor_ms)
        rows.append(
            (
                f"batch {figures.batch}",
                *(digits(timing.median) for timing in timings),
                f"{figures.overhead:.3f}",
                _range(figures.masks),
            )
        )
    return rows


def _stages(batches: Sequence[BatchLatency]) -> Rows:
    rows: Rows = [("stage, median ms", *(f"batch {figures.batch}" for figures in batches))]
    for name in dict.fromkeys(stage for figures in batches for stage in figures.stages_ms):
        rows.append((name, *(digits(figures.stages_ms.get(name, 0.0)) for figures in batches)))
    shares = (f"{figures.host_share:.1%}" for figures in batches)
    return [*rows, ("host's share of a call", *shares)]


def _device(batches: Sequence[BatchLatency]) -> Rows:
    rows: Rows = [("on the GPU, median ms", "in all", "without transfers", "host beside it")]
    for figures in batches:
        values = (figures.device_ms, figures.without_transfers_ms, figures.host_ms)
        rows.append((f"batch {figures.batch}", *(digits(value) for value in values)))
    return rows


def _comparisons(batches: Sequence[BatchLatency]) -> Rows:
    rows: Rows = [("compared, in turn", "other", "median ms", "times as long")]
    for figures in batches:
        for name, peer in figures.compare.items():
            median = digits(peer.ms.median)
            rows.append((f"batch {figures.batch}", name, median, f"{peer.ratio:.2f}"))
    return rows


def _cold_starts(starts: Sequence[ColdStart]) -> Rows:
    header = ["cold start, ms", "total", "imports", "load", "first", "second"]
    memory = starts[0].peak_memory_mib is not None
    device_memory = starts[0].device_memory_mib is not None
    header += ["peak MiB"] * memory + ["GPU MiB"] * device_memory
    kernels = starts[0].kernels is not None
    rows: Rows = [(*header, *["kernels"] * kernels)]
    for start in starts:
        values = [start.total_ms, start.imports_ms, start.load_ms, start.first_ms, start.second_ms]
        figures = [*values, *[start.peak_memory_mib] * memory]
        figures += [start.device_memory_mib] * device_memory
        cache = [start.kernels or ""] * kernels
        rows.append((f"batch {start.batch}", *map(digits, figures), *cache))
    return rows


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def digits(value: float | None) -> str:
    """Three significant digits, or all digits of a larger whole number; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
