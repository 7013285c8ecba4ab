"""What the models count, for the server's page of Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as triton

from ccam_deploy.explanation import Explanation
from ccam_deploy.serve.outputs import masked_forwards

MASKS = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0)
"""Upper ends of the buckets of the number of masked forwards of an explanation."""

_COUNTERS = {
    "ccam_explanations_total": "Maps that were computed",
    "ccam_masked_forwards_total": "Masked images that the classifier ran on",
    "ccam_stage_seconds_total": "Seconds spent in each stage of explanations",
    "ccam_refused_inputs_total": "Requests that were refused, by the reason",
    "ccam_failures_total": "Requests that were in order and could not be answered",
}
_HISTOGRAMS = {"ccam_masks_per_explanation": "Masked forwards that an explanation took"}


class Metrics:
    """Counts what a model does. All instances of a model count to the same metrics.

    Args:
        model: The model's name.
        version: The model's version.
    """

    def __init__(self, model: str, version: str) -> None:
        self._labels = {"model": model, "version": version}
        family = triton.MetricFamily
        self._families = {
            name: family(name=name, description=text, kind=family.COUNTER)
            for name, text in _COUNTERS.items()
        } | {
            name: family(name=name, description=text, kind=family.HISTOGRAM)
            for name, text in _HISTOGRAMS.items()
        }
        self._metrics: dict[tuple[str, ...], Any] = {}

    def explained(self, explanation: Explanation) -> None:
        """Count an explanation, its masked forwards and the seconds of its stages.

        Args:
            explanation: Of one class for each image.
        """
        method = {"method": str(explanation.settings["method"])}
        forwards = masked_forwards(explanation)
        self._metric("ccam_explanations_total", method).increment(float(len(explanation)))
        self._metric("ccam_masked_forwards_total", method).increment(float(sum(forwards)))
        for stage, seconds in explanation.timings.items():
            self._metric("ccam_stage_seconds_total", {**method, "stage": stage}).increment(seconds)
        for count in filter(None, forwards):
            self._metric("ccam_masks_per_explanation", method, MASKS).observe(float(count))

    def refused(self, reason: str) -> None:
        """Count a request that was refused, for a reason of a word."""
        self._metric("ccam_refused_inputs_total", {"reason": reason}).increment(1.0)

    def failed(self) -> None:
        """Count a request that was in order and could not be answered."""
        self._metric("ccam_failures_total", {}).increment(1.0)

    def _metric(
        self, family: str, labels: Mapping[str, str], buckets: tuple[float, ...] = ()
    ) -> Any:
        key = family, *labels.values()
        if key not in self._metrics:
            more = {"buckets": list(buckets)} if buckets else {}
            everything = {**self._labels, **labels}
            self._metrics[key] = self._families[family].Metric(labels=everything, **more)
        return self._metrics[key]
