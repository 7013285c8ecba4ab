"""`ccam-deploy verify`: a bundle as exported, and one that was changed."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ccam_deploy.bundle.folder import read_bundle, write_manifest
from tests.command import failure, success


def test_verify(tiny_bundle: Path, here: Path) -> None:
    *_, note, last = success("verify", tiny_bundle).stdout.splitlines()
    command = shlex.join(["ccam-deploy", "verify", str(tiny_bundle), "--precision", "tf32"])
    assert note == f"tf32, the fp32 graphs on a GPU, is measured there by {command}"
    assert last == f"{tiny_bundle}: 5 files and all graphs are as exported"
    report = json.loads(success("verify", tiny_bundle, "--json").stdout)
    assert report["files"] == 5
    assert report["graphs"]["fp32"]["backend"].startswith("onnxruntime-")
    assert report["graphs"]["fp32"]["logits"] < 1e-4
    shutil.copytree(tiny_bundle, here / "tiny")
    (here / "tiny" / "extra").touch()
    assert failure("verify", "tiny") == "tiny has files that its manifest does not list: extra"
    (here / "tiny" / "extra").unlink()
    strict = read_bundle(here / "tiny").manifest
    precision = replace(strict.precisions["fp32"], tolerance={"saliency_rank": 1.5})
    write_manifest(here / "tiny", replace(strict, precisions={"fp32": precision}))
    message = "the graphs do not give what was recorded: fp32: saliency_rank 1 is below 1.5"
    assert failure("verify", "tiny") == message


@pytest.mark.slow
def test_one_precision(digits_bundle: Path) -> None:
    line, verdict = success("verify", digits_bundle, "--precision", "fp16").stdout.splitlines()
    assert line.startswith("fp16 on onnxruntime-")
    assert verdict.endswith(" files and the fp16 graphs are as exported")
    message = failure("verify", digits_bundle, "--precision", "int8")
    assert message.startswith("the bundle has no int8 graphs, only fp32, fp16; export with")
