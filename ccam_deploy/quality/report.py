"""The result of an evaluation: estimates with intervals, as Markdown, JSON and HTML."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ccam_deploy.arrays import Doubles
from ccam_deploy.quality.metrics import METRICS, PROTOCOLS
from ccam_deploy.quality.results import CURVES, Row
from ccam_deploy.text import markdown_table, one_line

RESAMPLES = 2000
_BLOCK = 50
_MOST_NAMED = 5

_Rows = Mapping[str, Sequence[tuple[str, str, bool]]]
"""The cells of a table by method: mean, interval, and whether they are bold."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95 % bootstrap interval, in percent.

    Attributes:
        mean: The mean.
        low: The interval's lower end.
        high: Its upper end.
        images: How many images were measured.
    """

    mean: float
    low: float
    high: float
    images: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval, to two decimals as it is shown."""
        return not round(self.low, 2) <= 0 <= round(self.high, 2)


@dataclass(frozen=True)
class Grouping:
    """Which images are not independent: those of one group are resampled together.

    Attributes:
        name: What the groups are, in the plural.
        group_of: Tells an image's group by the image's name.
    """

    name: str
    group_of: Callable[[str], str]


EACH_IMAGE = Grouping("images", str)
"""Images that are independent."""


@dataclass(frozen=True)
class Summary:
    """The results of an evaluation.

    Attributes:
        settings: All that they depend on; see Evaluation.facts.
        estimates: By method and metric, without metrics that no image could be measured with.
        differences: By method and metric, how much more it has than the first method on the same
            images, in percentage points; empty for the first.
        curves: By method and name, the mean deletion and insertion curves [n] that were measured.
        unread: Names of the images that could not be read; no figure includes them.
        over: What the intervals' bootstrap resamples, in the plural.
    """

    settings: Mapping[str, Any]
    estimates: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    curves: dict[str, dict[str, Doubles]]
    unread: tuple[str, ...] = ()
    over: str = EACH_IMAGE.name


def bootstrap(values: Doubles, seed: int, groups: Sequence[str] | None = None) -> Estimate:
    """Estimate a mean, with the 2.5th and 97.5th percentile of 2,000 resamples' means.

    Args:
        values: [n] float64 in percent; NaN values are left out.
        seed: Of the resamples.
        groups: The group of each value; values of a group are drawn together. None where each is
            a group of its own.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: No value is left.
    """
    is_known = ~np.isnan(values)
    known = values[is_known]
    if not len(known):
        raise ValueError("there is nothing to estimate")
    sums: Doubles = known
    sizes: Doubles = np.ones(len(known))
    if groups is not None:
        _, place = np.unique(np.asarray(groups)[is_known], return_inverse=True)
        sums = np.bincount(place, known).astype(np.float64)
        sizes = np.bincount(place).astype(np.float64)
    stream = np.random.default_rng(seed)
    draws = (stream.integers(0, len(sums), (_BLOCK, len(sums))) for _ in range(RESAMPLES // _BLOCK))
    means = np.concatenate([sums[draw].sum(axis=1) / sizes[draw].sum(axis=1) for draw in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def summarise(
    settings: Mapping[str, Any], rows: Sequence[Row], grouping: Grouping = EACH_IMAGE
) -> Summary:
    """Summarise rows over images.

    Args:
        settings: See Evaluation.facts; has methods, metrics and seed.
        rows: The rows of all images and methods; those of other methods are ignored.
        grouping: Which images are not independent.

    Returns:
        Estimates, differences from the first method, and mean curves of each method.
    """
    measured = {
        method: [row for row in rows if row.method == method and row.was_read]
        for method in settings["methods"]
    }
    first = next(iter(measured), "")
    reference = {row.index: row.values for row in measured.get(first, ())}
    estimates: dict[str, dict[str, Estimate]] = {}
    differences: dict[str, dict[str, Estimate]] = {}
    curves: dict[str, dict[str, Doubles]] = {}
    for method, own in measured.items():
        groups = None
        if grouping is not EACH_IMAGE:
            groups = [grouping.group_of(row.name) for row in own]
        estimates[method], differences[method] = {}, {}
        for metric in settings["metrics"]:
            values = np.array([row.values[metric] for row in own])
            before = np.array([reference.get(row.index, {}).get(metric, np.nan) for row in own])
            if not np.isnan(values).all():
                estimates[method][metric] = bootstrap(values, settings["seed"], groups)
            if method != first and not np.isnan(values - before).all():
                differences[method][metric] = bootstrap(values - before, settings["seed"], groups)
        curves[method] = {
            curve: np.mean([row.curves[curve] for row in own], axis=0)
            for curve in CURVES
            if own and all(curve in row.curves for row in own)
        }
    unread = dict.fromkeys(row.name for row in rows if not row.was_read)
    return Summary(settings, estimates, differences, curves, tuple(unread), grouping.name)


def as_json(summary: Summary) -> dict[str, Any]:
    """Make plain values of a summary, with the definitions of its metrics and protocol."""
    settings = summary.settings
    return {
        "settings": dict(settings),
        "definitions": {name: METRICS[name].definition for name in settings["metrics"]},
        "protocol": PROTOCOLS[settings["protocol"]].definition,
        "unread": list(summary.unread),
        "unit": f"percent; mean, and 95 % interval of the mean by bootstrap over {summary.over}",
        "resamples": RESAMPLES,
        "results": _plain(summary.estimates),
        "differences": _plain(summary.differences),
        "curves": {
            method: {curve: points.tolist() for curve, points in curves.items()}
            for method, curves in summary.curves.items()
        },
    }


def _plain(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """Estimates by method and metric as plain values."""
    return {
        method: {metric: asdict(estimate) for metric, estimate in own.items()}
        for method, own in estimates.items()
    }


def table(summary: Summary) -> str:
    """Lay out estimates as a Markdown table, a row for each method; the best mean is bold."""
    return _as_markdown("method", summary, _estimate_rows(summary))


def differences_table(summary: Summary) -> str:
    """Lay out differences from the first method as Markdown; empty where it is the only one."""
    rows = _difference_rows(summary)
    return _as_markdown(f"minus {_first(summary)}", summary, rows) if rows else ""


def differences_caption(summary: Summary) -> str:
    """Say what differences_table shows."""
    return (
        f"By how much each exceeds {_first(summary)} on the same images, in "
        "percentage points, with the interval of that difference; bold where it leaves zero out."
    )


def markdown(summary: Summary) -> str:
    """Write the tables, and under them what the figures mean."""
    settings = summary.settings
    lines = [f"- {name}: {METRICS[name].definition}." for name in settings["metrics"]]
    parts = [table(summary), _caption(summary)]
    if differences := differences_table(summary):
        parts += [differences, differences_caption(summary)]
    return (
        "\n\n".join(parts)
        + "\n\n"
        + "\n".join(lines)
        + f"\n- protocol {settings['protocol']}: {PROTOCOLS[settings['protocol']].definition}.\n"
    )


def page(summary: Summary, pictures: Mapping[str, bytes]) -> str:
    """Write one HTML page that needs no other file.

    Args:
        summary: What the page shows.
        pictures: PNG files by caption.

    Returns:
        The page's text.
    """
    settings = summary.settings
    differences = ""
    if rows := _difference_rows(summary):
        differences = f"<p>{html.escape(differences_caption(summary))}</p>\n"
        differences += _as_html(f"minus {_first(summary)}", summary, rows)
    return _PAGE.format(
        title=html.escape(f"{settings['bundle']} on {settings['dataset']}"),
        caption=html.escape(_caption(summary)),
        estimates=_as_html("", summary, _estimate_rows(summary)),
        differences=differences,
        pictures="".join(_figure(caption, content) for caption, content in pictures.items()),
        definitions=_definitions(settings),
        settings=html.escape(json.dumps(settings, indent=2, ensure_ascii=False)),
    )


def _estimate_rows(summary: Summary) -> _Rows:
    """Means by method; the best one of each metric is bold."""
    best = {name: _best(summary, name) for name in summary.settings["metrics"]}
    return {
        method: [
            (*_words(e := own.get(name)), e is not None and e.mean == mean)
            for name, mean in best.items()
        ]
        for method, own in summary.estimates.items()
    }


def _difference_rows(summary: Summary) -> _Rows:
    """Differences by method, without the first; bold where the interval leaves zero out."""
    names = summary.settings["metrics"]
    _, *others = summary.differences.items()
    return {
        method: [
            (*_words(e := own.get(name), "+"), e is not None and e.excludes_zero) for name in names
        ]
        for method, own in others
    }


def _words(estimate: Estimate | None, sign: str = "") -> tuple[str, str]:
    """An estimate's mean and interval, with "+" as sign where a positive number shall have one."""
    if estimate is None:
        return "–", ""
    values = estimate.mean, estimate.low, estimate.high
    mean, *ends = (f"{round(value, 2) + 0.0:{sign}.2f}" for value in values)  # 0, and never -0
    return mean, f" [{', '.join(ends)}]"


def _as_markdown(corner: str, summary: Summary, rows: _Rows) -> str:
    lines = [
        (method, *(f"**{mean}**{rest}" if bold else mean + rest for mean, rest, bold in cells))
        for method, cells in rows.items()
    ]
    return markdown_table((corner, *map(_title, summary.settings["metrics"])), lines)


def _as_html(corner: str, summary: Summary, rows: _Rows) -> str:
    titles = (corner, *map(_title, summary.settings["metrics"]))
    body = ""
    for method, cells in rows.items():
        row = ""
        for mean, interval, is_bold in cells:
            mark = ' class="bold"' if is_bold else ""
            row += f"<td{mark}>{mean}{interval}</td>"
        body += f"<tr><th>{html.escape(method)}</th>{row}</tr>\n"
    return _TABLE.format(head="".join(f"<th>{html.escape(t)}</th>" for t in titles), body=body)


def _definitions(settings: Mapping[str, Any]) -> str:
    """The definitions of metrics and protocol, for the page."""
    protocol = settings["protocol"]
    pairs = [(name, METRICS[name].definition) for name in settings["metrics"]]
    pairs.append((f"protocol {protocol}", PROTOCOLS[protocol].definition))
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(definition)}</dd>\n"
        for name, definition in pairs
    )


def _figure(caption: str, content: bytes) -> str:
    """A picture with its caption, inside the page."""
    return (
        f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">\n'
    )


def _title(metric: str) -> str:
    """A metric's column title, with its unit and which way is better."""
    return f"{metric}, % {'↑' if METRICS[metric].high else '↓'}"


def _caption(summary: Summary) -> str:
    settings = summary.settings
    left = len(summary.unread)
    read = settings["images"] - left
    names = ", ".join(map(one_line, summary.unread[:_MOST_NAMED])) + ", …" * (left > _MOST_NAMED)
    without = f", without {left} more that could not be read ({names})" if left else ""
    explained = "the classifier's best class" if settings["target"] == "predicted" else "the label"
    resampled = "" if summary.over == EACH_IMAGE.name else f", resampled by {summary.over}"
    bundle = one_line(settings["bundle"])
    return (
        f"Mean and 95 % bootstrap interval over {read} images of "
        f"{one_line(settings['dataset'])}{without}{resampled}; bundle {bundle}, "
        f"{settings['precision']} on {settings['backend']}; protocol "
        f"{settings['protocol']}, seed {settings['seed']}; explained: {explained}. The best mean "
        "of each column is bold."
    )


def _first(summary: Summary) -> str:
    """The method that the others' differences are from."""
    return next(iter(summary.estimates))


def _best(summary: Summary, name: str) -> float:
    """The best mean of a metric; NaN where all are equal."""
    means = [by_metric[name].mean for by_metric in summary.estimates.values() if name in by_metric]
    if len(set(means)) < 2:
        return float("nan")
    return max(means) if METRICS[name].high else min(means)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; white-space: nowrap; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #ccc; text-align: right; }}
tbody th {{ text-align: left; }}
.bold {{ font-weight: bold; }}
img {{ max-width: 100%; }}
dt {{ font-weight: bold; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
{estimates}{differences}{pictures}<h2>Definitions</h2>
<dl>
{definitions}</dl>
<h2>Settings</h2>
<pre>{settings}</pre>
</body>
</html>
"""

_TABLE = """<div class="wide">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
"""
