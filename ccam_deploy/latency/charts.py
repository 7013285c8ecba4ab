"""Charts of a latency measurement."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ccam_deploy.latency.report import BatchLatency
from ccam_deploy.plotting import DOTS_PER_INCH, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_latency(batches: Sequence[BatchLatency], title: str, plot_format: str) -> bytes:
    """Draw the distribution of latency and the stages of an explanation.

    Args:
        batches: The figures of each batch size.
        title: Written above both charts.
        plot_format: One of plotting.PLOT_FORMATS.

    Returns:
        The content of a file of that format.

    Raises:
        OptionError: Matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _distribution(left, batches)
    _stages(right, batches)
    content = io.BytesIO()
    figure.savefig(content, format=plot_format, dpi=DOTS_PER_INCH)
    return content.getvalue()


def _distribution(axes: Axes, batches: Sequence[BatchLatency]) -> None:
    """The share of calls that took no longer than a time, with median and p99 marked."""
    for figures in batches:
        values = np.sort(figures.samples_ms["latency"])
        shares = np.arange(1, len(values) + 1) / len(values)
        (line,) = axes.step(values, shares, where="post", label=_name(figures))
        marks = [figures.latency_ms.median, figures.latency_ms.p99]
        axes.plot(marks, [0.5, 0.99], "o", color=line.get_color())
    if len(batches) > 1:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("latency of a call, ms (dots: median, p99)")
    axes.set_ylabel("share of calls")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()


def _stages(axes: Axes, batches: Sequence[BatchLatency]) -> None:
    """The stages of each batch size stacked, per image, with the floor as a mark."""
    rows = np.arange(len(batches))
    ends = np.zeros(len(batches))
    for name in dict.fromkeys(stage for figures in batches for stage in figures.stages_ms):
        spent = np.array([figures.stages_ms.get(name, 0.0) / figures.batch for figures in batches])
        axes.barh(rows, spent, left=ends, height=0.6, label=name)
        ends += spent
    floors = [figures.floor_ms.median / figures.batch for figures in batches]
    axes.vlines(floors, rows - 0.4, rows + 0.4, colors="black", label="floor")
    axes.set_yticks(rows, [f"batch {figures.batch}" for figures in batches])
    axes.invert_yaxis()
    axes.set_xlabel("time of one image, ms")
    axes.legend(fontsize="small")


def _name(figures: BatchLatency) -> str:
    threads = f", {figures.concurrency} threads" if figures.concurrency > 1 else ""
    return f"batch {figures.batch}{threads}"
