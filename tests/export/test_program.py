"""The classifier's graph takes what the classifier takes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.export.program import build_program, quiet, trace_model


class Viewed(nn.Module):
    """A view of a feature map as a row, which values with channels last do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().view(-1, 4 * 6 * 6))  # type: ignore[no-any-return]


def test_notes_of_the_converter_reach_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """What it folds, for one, which users have no use for."""
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    with quiet():
        folding.warning("skipping")
        folding.error("failed")
    folding.warning("afterwards")
    assert [record.message for record in caplog.records] == ["failed", "afterwards"]


class Written(nn.Module):
    """A part of a map is written over with another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x + 0
        y[:, :, 1:3] = x[:, :, :2].sigmoid()
        return self.linear(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
def test_what_is_written_over_a_map_has_a_gradient(fold: bool) -> None:
    """Also in the program as it was traced, which the graphs are compared with."""
    torch.manual_seed(0)
    model = Written().eval()
    images = torch.randn(3, 3, 8, 8)
    program = build_program(trace_model(model, (3, 8, 8)), fold=fold)
    gradients = []
    for network in (program.graph, model):
        given = images.clone().requires_grad_()
        found = network(given)
        logits = found[0] if isinstance(found, tuple) else found
        logits[:, 2].sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_views_are_of_values_in_any_layout() -> None:
    """Some operators lay values out by the size of the batch, which a trace does not see."""
    model = Viewed().eval()
    images = torch.randn(3, 3, 8, 8)
    turned = images.contiguous(memory_format=torch.channels_last)
    program = build_program(trace_model(model, (3, 8, 8)))
    (logits,) = program.graph(turned)
    torch.testing.assert_close(logits, model(images))
