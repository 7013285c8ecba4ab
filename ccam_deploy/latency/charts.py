"""Charts of a latency measurement."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ccam_deploy.latency.report import LatencyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from ccam_deploy.plotting import DOTS_PER_INCH, require_matplotlib


def draw_latency(reports: Sequence[LatencyReport], title: str, kind: str) -> bytes:
    """The distribution of latency and the stages of an explanation, as a file's bytes.

    kind: one of FORMATS. Raises OptionError where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _distribution(left, reports)
    _stages(right, reports)
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=DOTS_PER_INCH)
    return content.getvalue()


def _distribution(axes: Axes, reports: Sequence[LatencyReport]) -> None:
    """The share of calls that took no longer than a time, with median and p99 marked."""
    for report in reports:
        values = np.sort(report.samples["latency"])
        shares = np.arange(1, len(values) + 1) / len(values)
        (line,) = axes.step(values, shares, where="post", label=_name(report))
        marks = [report.latency.median, report.latency.p99]
        axes.plot(marks, [0.5, 0.99], "o", color=line.get_color())
    if len(reports) > 1:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("latency of a call, ms (dots: median, p99)")
    axes.set_ylabel("share of calls")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()


def _stages(axes: Axes, reports: Sequence[LatencyReport]) -> None:
    """The stages of each batch size stacked, per image, with the floor as a mark."""
    rows = np.arange(len(reports))
    ends = np.zeros(len(reports))
    for name in dict.fromkeys(stage for report in reports for stage in report.stages):
        spent = np.array([report.stages.get(name, 0.0) / report.batch for report in reports])
        axes.barh(rows, spent, left=ends, height=0.6, label=name)
        ends += spent
    floors = [report.floor.median / report.batch for report in reports]
    axes.vlines(floors, rows - 0.4, rows + 0.4, colors="black", label="floor")
    axes.set_yticks(rows, [f"batch {report.batch}" for report in reports])
    axes.invert_yaxis()
    axes.set_xlabel("time of one image, ms")
    axes.legend(fontsize="small")


def _name(report: LatencyReport) -> str:
    threads = f", {report.concurrency} threads" if report.concurrency > 1 else ""
    return f"batch {report.batch}{threads}"
