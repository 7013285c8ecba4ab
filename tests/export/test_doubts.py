"""Bundles that are right and worthless say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.export.doubts import (
    doubts_about_layers,
    doubts_about_rounding,
    doubts_about_values,
)
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.fidelity.observation import Observation
from tests.command import success
from tests.helpers import noise
from tests.networks import tiny

SOUND = Observation(
    images=noise(2, 3, 8, 8),
    targets=np.zeros(2, np.int64),
    logits=noise(2, 5),
    masked_logits=noise(8, 5),
    features=(noise(2, 4, 3, 3), noise(2, 6, 2, 2)),
    gradients=(noise(2, 4, 3, 3), noise(2, 6, 2, 2)),
    labels=(),
    saliency=noise(2, 8, 8),
)


class Shallow(nn.Module):
    """One convolution, and a head of linear layers; the last gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4, 1)
        last = nn.Linear(8, 5)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)], last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        return self.head(x.relu()[:, :, :8]).mean(1)  # type: ignore[no-any-return]


def test_sound_values_are_not_doubted() -> None:
    assert list(doubts_about_values(SOUND, ["one", "two"])) == []


def test_logits_that_rounding_changes_are_doubted() -> None:
    assert list(doubts_about_rounding(1e-5)) == []
    assert list(doubts_about_rounding(0.42)) == [
        "in PyTorch itself the logits change by 42.0% where pixels change in their last digit"
    ]


@pytest.mark.parametrize(
    ("logits", "line"),
    [
        (np.zeros((2, 5), np.float32), "every logit of the 2 calibration images is zero"),
        (np.ones((2, 1), np.float32) * noise(5), "the logits of the 2 calibration images are all"),
        (noise(2, 1).repeat(5, axis=1), "the classes' logits are all the same on the 2"),
    ],
)
def test_logits_that_say_nothing(logits: np.ndarray, line: str) -> None:
    (doubt,) = doubts_about_values(replace(SOUND, logits=logits), ["one", "two"])
    assert doubt.startswith(line)


def test_gradients_that_say_nothing() -> None:
    blank, even = np.zeros((2, 4, 3, 3), np.float32), np.ones((2, 6, 2, 2), np.float32)
    lines = list(doubts_about_values(replace(SOUND, gradients=(blank, even)), ["one", "two"]))
    assert lines == [
        'the gradients of layer "one" are zero on every calibration image',
        'the gradients of layer "two" are the same everywhere',
    ]


@pytest.mark.slow
def test_layers_are_doubted_where_one_is_all_and_shallow() -> None:
    program = build_program(trace_model(tiny(), (3, 32, 48)))
    first, last = find_layers(program)
    assert list(doubts_about_layers(program, [first, last])) == []
    assert list(doubts_about_layers(program, [last])) == []
    (doubt,) = doubts_about_layers(program, [first])
    assert doubt.startswith('the only target layer that was found, "relu1", is a shallow one: ')


@pytest.mark.slow
def test_the_export_warns_and_the_bundle_keeps_it(tmp_path: Path) -> None:
    torch.save(Shallow().state_dict(), tmp_path / "net.pt")
    words = ("--arch", "tests.export.test_doubts:Shallow", "--input-size", "16x16")
    result = success("export", tmp_path / "net.pt", *words, "--output", tmp_path / "bundle")
    lines = result.stderr.splitlines()
    doubts = read_bundle(tmp_path / "bundle").manifest.doubts
    images = int(doubts[0].split()[4])
    assert doubts[:2] == (
        f"every logit of the {images} calibration images is zero",
        'the gradients of layer "stem" are zero on every calibration image',
    )
    assert doubts[2].startswith('the only target layer that was found, "stem", is a shallow one')
    assert len(doubts) == 3
    assert [lines.count(f"warning: {doubt}") for doubt in doubts] == [1, 1, 1]
    assert f"warning: {doubts[0]}\n" in success("info", tmp_path / "bundle").stdout
