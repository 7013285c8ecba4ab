"""`ccam-deploy info`: what a manifest says, and its precisions side by side."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from msgspec import UNSET

from ccam_deploy.bundle.folder import read_bundle, write_manifest
from ccam_deploy.bundle.manifest import GraphPrecision, Precision
from tests.command import success


def test_info(tiny_bundle: Path) -> None:
    text = success("info", tiny_bundle).stdout
    assert re.search(r"^input +3 channels, 32x48, cut from 37x55, bilinear$", text, re.M)
    assert re.search(r"^classes +5, named$", text, re.M)
    assert re.search(r"^relu2 +8 +8 +12$", text, re.M)
    manifest = json.loads(success("info", tiny_bundle, "--json").stdout)
    assert manifest == json.loads((tiny_bundle / "manifest.json").read_text())


def test_info_compares_the_precisions(tiny_bundle: Path, here: Path) -> None:
    """A column for each, with what the manifest records."""
    folder = shutil.copytree(tiny_bundle, here / "tiny")
    manifest = read_bundle(folder).manifest
    whole = manifest.precisions["fp32"]
    report = replace(
        whole.fidelity,
        logits=0.015,
        masked_logits=0.25,
        features=(0.001, 0.002),
        gradients=(0.3, 0.04),
        saliency_rank=0.98765,
        worst_saliency_rank=0.5,
        saliency_similarity=0.87654,
        saliency_overlap=0.7654,
        partitions=0.75,
        worst_gradients=(0.3, 0.45),
        worst_saliency_similarity=0.0,
        worst_saliency_overlap=0.25,
    )
    both: dict[GraphPrecision, Precision] = {
        "fp32": whole,
        "int8": replace(whole, fidelity=report),
    }
    write_manifest(folder, replace(manifest, precisions=both))
    lines = success("info", "tiny").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("against PyTorch"))
    assert lines[start].split() == ["against", "PyTorch", "in", "float32", "fp32", "int8"]
    *table, note = lines[start:]
    assert note == (
        "tf32, the fp32 graphs on a GPU, is measured there by "
        "ccam-deploy verify tiny --precision tf32"
    )
    last = {line[:29].strip(): line.split()[-1] for line in table}
    assert last == {
        "against PyTorch in float32": "int8",
        "logits, relative error": "1.5e-02",
        "masked logits": "2.5e-01",
        "features, worst layer": "2.0e-03",
        "gradients, worst layer": "3.0e-01",
        "and worst image": "4.5e-01",
        "equal partitions": "75.0%",
        "saliency, rank correlation": "0.9877",
        "of the worst image": "0.5000",
        "saliency, SSIM": "0.8765",
        "SSIM, worst image": "0.0000",
        "saliency, top 10 % in common": "76.5%",
        "in common, worst image": "25.0%",
        "images": "8",
    }
    older = replace(
        report,
        worst_gradients=UNSET,
        worst_saliency_similarity=UNSET,
        worst_saliency_overlap=UNSET,
    )
    both["fp32"] = replace(whole, fidelity=older)
    write_manifest(folder, replace(manifest, precisions=both))
    old = success("info", "tiny").stdout
    assert "of the worst image" in old
    assert "and worst image" not in old
    recorded = json.loads(success("info", folder, "--json").stdout)["precisions"]
    assert recorded["int8"]["fidelity"]["saliency_overlap"] == 0.7654
