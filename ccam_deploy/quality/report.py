"""What an evaluation found: estimates with their intervals, as Markdown, JSON and HTML."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ccam_deploy.arrays import Doubles
from ccam_deploy.quality.metrics import METRICS, PROTOCOLS
from ccam_deploy.quality.results import CURVES, Row
from ccam_deploy.text import one_line

RESAMPLES = 2000
_BLOCK = 50


@dataclass(frozen=True)
class Estimate:
    """A mean in percent, its 95 % bootstrap interval, and how many images it is of."""

    mean: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Summary:
    """An evaluation's results. settings: all that they depend on, the protocol by name.

    estimates: by method and metric; a metric that no image could be measured with is left out.
    curves: the mean deletion and insertion curve [n] of each method, where they were measured.
    unread: names of the images that could not be read, and are in no number.
    """

    settings: Mapping[str, Any]
    estimates: dict[str, dict[str, Estimate]]
    curves: dict[str, dict[str, Doubles]]
    unread: tuple[str, ...] = ()


def bootstrap(values: Doubles, seed: int) -> Estimate:
    """The mean of some values [n], and the 2.5th and 97.5th percentile of 2,000 resamples' means.

    NaN values are left out. Raises ValueError where none is left.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        raise ValueError("there is nothing to estimate")
    stream = np.random.default_rng(seed)
    means = np.concatenate(
        [
            known[stream.integers(0, len(known), (_BLOCK, len(known)))].mean(axis=1)
            for _ in range(RESAMPLES // _BLOCK)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def summarise(settings: Mapping[str, Any], rows: Sequence[Row]) -> Summary:
    """Summarise rows. settings: see Evaluation.facts; has methods, metrics and seed."""
    estimates: dict[str, dict[str, Estimate]] = {}
    curves: dict[str, dict[str, Doubles]] = {}
    unread = dict.fromkeys(row.name for row in rows if not row.was_read)
    for method in settings["methods"]:
        own = [row for row in rows if row.method == method and row.was_read]
        estimates[method] = {}
        for metric in settings["metrics"]:
            values = np.array([row.values[metric] for row in own])
            if not np.isnan(values).all():
                estimates[method][metric] = bootstrap(values, settings["seed"])
        curves[method] = {
            kind: np.mean([row.curves[kind] for row in own], axis=0)
            for kind in CURVES
            if own and all(kind in row.curves for row in own)
        }
    return Summary(settings, estimates, curves, tuple(unread))


def as_json(summary: Summary) -> dict[str, Any]:
    """A summary as plain values, each metric and the protocol with its definition."""
    settings = summary.settings
    return {
        "settings": dict(settings),
        "definitions": {name: METRICS[name].definition for name in settings["metrics"]},
        "protocol": PROTOCOLS[settings["protocol"]].definition,
        "unread": list(summary.unread),
        "unit": "percent; mean, and 95 % interval of the mean by bootstrap over images",
        "resamples": RESAMPLES,
        "results": {
            method: {metric: asdict(estimate) for metric, estimate in found.items()}
            for method, found in summary.estimates.items()
        },
        "curves": {
            method: {kind: points.tolist() for kind, points in found.items()}
            for method, found in summary.curves.items()
        },
    }


def table(summary: Summary) -> str:
    """The estimates as a Markdown table, a row for each method; the best mean is bold."""
    names = summary.settings["metrics"]
    titles = [f"{name}, % {'↑' if METRICS[name].high else '↓'}" for name in names]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    best = {name: _best(summary, name) for name in names}
    for method, found in summary.estimates.items():
        cells = [_cell(found.get(name), best[name]) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(summary: Summary) -> str:
    """The table, and under it what the numbers are."""
    settings = summary.settings
    lines = [f"- {name}: {METRICS[name].definition}." for name in settings["metrics"]]
    return (
        f"{table(summary)}\n\n{_caption(summary)}\n\n"
        + "\n".join(lines)
        + f"\n- protocol {settings['protocol']}: {PROTOCOLS[settings['protocol']].definition}.\n"
    )


def page(summary: Summary, pictures: Mapping[str, bytes]) -> str:
    """One HTML page that needs no other file. pictures: PNG files by their caption."""
    settings = summary.settings
    names = settings["metrics"]
    head = "".join(
        f"<th>{html.escape(name)}, % {'↑' if METRICS[name].high else '↓'}</th>" for name in names
    )
    body = ""
    best = {name: _best(summary, name) for name in names}
    for method, found in summary.estimates.items():
        cells = ""
        for name in names:
            estimate = found.get(name)
            kind = ' class="best"' if estimate and estimate.mean == best[name] else ""
            cells += f"<td{kind}>{estimate or '–'}</td>"
        body += f"<tr><th>{html.escape(method)}</th>{cells}</tr>\n"
    definitions = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(METRICS[name].definition)}</dd>\n"
        for name in names
    )
    protocol = settings["protocol"]
    definitions += (
        f"<dt>protocol {html.escape(protocol)}</dt>"
        f"<dd>{html.escape(PROTOCOLS[protocol].definition)}</dd>\n"
    )
    shown = "".join(
        f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">\n'
        for caption, content in pictures.items()
    )
    return _PAGE.format(
        title=html.escape(f"{settings['bundle']} on {settings['dataset']}"),
        caption=html.escape(_caption(summary)),
        head=head,
        body=body,
        pictures=shown,
        definitions=definitions,
        settings=html.escape(json.dumps(settings, indent=2, ensure_ascii=False)),
    )


def _caption(summary: Summary) -> str:
    settings = summary.settings
    left = len(summary.unread)
    without = f" without {left} that could not be read" if left else ""
    explained = "the classifier's best class" if settings["target"] == "predicted" else "the label"
    return (
        f"Mean and 95 % bootstrap interval over {settings['images']} images of "
        f"{one_line(settings['dataset'])}{without}; bundle {one_line(settings['bundle'])}, "
        f"{settings['precision']} on {settings['backend']}; protocol "
        f"{settings['protocol']}, seed {settings['seed']}; explained: {explained}."
    )


def _best(summary: Summary, name: str) -> float:
    """The best mean of a metric; NaN where all are equal."""
    means = [found[name].mean for found in summary.estimates.values() if name in found]
    if len(set(means)) < 2:
        return float("nan")
    return max(means) if METRICS[name].high else min(means)


def _cell(estimate: Estimate | None, best: float) -> str:
    if estimate is None:
        return "–"
    words = str(estimate)
    mean, interval = words.split(" ", 1)
    return f"**{mean}** {interval}" if estimate.mean == best else words


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
.best {{ font-weight: bold; }}
img {{ max-width: 100%; }}
dt {{ font-weight: bold; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
<div class="wide">
<table>
<thead><tr><th></th>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
{pictures}<h2>Definitions</h2>
<dl>
{definitions}</dl>
<h2>Settings</h2>
<pre>{settings}</pre>
</body>
</html>
"""
