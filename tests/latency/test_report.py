"""The result of `ccam-deploy bench` is one structure: its JSON file reads back as it."""

from __future__ import annotations

import json

import msgspec

from ccam_deploy.latency.report import LatencyReport
from ccam_deploy.latency.tables import report_text
from tests.helpers import ROOT

COMMITTED = ROOT / "bench" / "results" / "bench-resnet18-cpu.json"


class StrictReport(LatencyReport, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A report that has no other keys."""


def test_committed_result_has_the_form_of_the_report() -> None:
    """Key by key in the same order, and value by value."""
    content = COMMITTED.read_text(encoding="utf-8")
    report = msgspec.json.decode(content, type=StrictReport)
    again = json.dumps(msgspec.to_builtins(report), indent=2, ensure_ascii=False) + "\n"
    assert again == content


def test_text_shows_the_figures_rounded() -> None:
    content = json.loads(COMMITTED.read_text(encoding="utf-8"))
    figures, start = content["batches"][0], content["cold_start"][0]
    figures["latency_ms"] |= {"median": 313.42, "maximum": 333.51, "mean": 314.2, "minimum": 304.9}
    figures["latency_ms"] |= {"p90": 320.4, "p95": 321.3, "p99": 329.6, "calls": 48}
    figures |= {"explanations_per_second": 3.1894, "masked_forwards_per_second": 51.03}
    for name, median in {"from_images": 312.8, "from_array": 313.9, "floor": 295.7}.items():
        figures[f"{name}_ms"]["median"] = median
    figures |= {"overhead": 1.0597, "masks": [16], "host_share": 0.0018}
    content["batches"][1]["host_share"] = 0.0011
    start |= {"total_ms": 1029.6, "imports_ms": 257.9, "load_ms": 282.1, "first_ms": 366.8}
    start |= {"second_ms": 352.4, "peak_memory_mib": 427.2}
    report = msgspec.convert(content, LatencyReport)
    lines = [line.split("  ") for line in report_text(report).splitlines()]
    rows = [[cell.strip() for cell in line if cell] for line in lines]
    assert ["bundle", "resnet18, 224x224, random weights"] in rows
    assert ["collections", "layer1 9; layer2 3; layer3 2; layer4 2"] in rows
    latency = ["313", "334", "314", "320", "321", "330", "305", "48", "3.19", "51"]
    assert ["batch 1", "1", *latency] in rows
    assert ["batch 1", "313", "314", "296", "1.060", "16"] in rows
    assert ["host's share of a call", "0.2%", "0.1%"] in rows
    assert ["batch 1", "1030", "258", "282", "367", "352", "427"] in rows


def test_text_without_a_cold_start() -> None:
    report = msgspec.json.decode(COMMITTED.read_bytes(), type=LatencyReport)
    assert "cold start" not in report_text(msgspec.structs.replace(report, cold_start=[]))
