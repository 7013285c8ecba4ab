"""TorchScript, traced and scripted, is exported for any batch and with its modules' names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ccam_deploy.export.architecture import import_module
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.sources import load_model
from tests.export.model_files import refusal

SIZE = (3, 16, 16)
IMAGES = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))
jit: Any = torch.jit


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inner, outer, 3, 2, 1), nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class Viewed(nn.Module):
    """Computes with sizes, as code before torch.flatten does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = Block(3, 8), Block(8, 8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        b, c, h, w = x.size()
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        x = x + functional.interpolate(x[:, :, ::2, ::2], size=(x.size(2), x.size(3)))
        return self.head(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Code that a trace would not keep: conditions, loops, a method and a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Block(3, 4), Block(4, 8)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Dropout())
        self.head = nn.Linear(32, 5)
        self.scales = [1.0, 0.5]

    def summed(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(len(self.scales)):
            total = total + x * self.scales[i]
        return total

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.size(1) != 3:
            raise ValueError("expected images")
        for stage in self.stages:
            x = stage(x)
        parts = [x]
        while len(parts) < 3:
            parts.append(self.summed(parts[-1]))
        x = self.pool(torch.stack(parts).sum(0))
        return self.head(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.conv(x).mean((2, 3))  # type: ignore[no-any-return]


def traced(model: nn.Module) -> Any:
    return jit.trace(model, torch.zeros(2, *SIZE))


def shufflenet() -> nn.Module:
    network: nn.Module = import_module("torchvision.models").shufflenet_v2_x0_5(num_classes=5)
    return network


def saved(model: nn.Module, compile_: Callable[[nn.Module], Any], folder: Path) -> nn.Module:
    """A model that went through a TorchScript file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        jit.save(compile_(model), folder / "model.pt")
    loaded = load_model(folder / "model.pt")
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "compile_", "layers"),
    [
        (Viewed, traced, ["stem", "body"]),
        (Viewed, jit.script, ["stem", "body"]),
        (Branches, jit.script, ["stages.0", "stages.1"]),
        pytest.param(shufflenet, traced, [], marks=pytest.mark.nightly),
        pytest.param(shufflenet, jit.script, [], marks=pytest.mark.nightly),
    ],
    ids=["traced", "scripted", "branches", "shufflenet-traced", "shufflenet-scripted"],
)
def test_scripts_take_any_batch(
    make: Callable[[], nn.Module],
    compile_: Callable[[nn.Module], Any],
    layers: list[str],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    script = saved(model, compile_, tmp_path)
    program = build_program(trace_model(script, SIZE))
    for images in (IMAGES[:1], IMAGES):
        with torch.no_grad():
            (logits,) = program.graph(images)
            torch.testing.assert_close(script(images), model(images))
            torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    if layers:
        assert [layer.name for layer in find_layers(program)] == layers


@pytest.mark.slow
def test_what_cannot_be_followed_is_named(tmp_path: Path) -> None:
    script = saved(Remembers().eval(), jit.script, tmp_path)
    assert refusal(lambda: trace_model(script, SIZE)) == (
        "the TorchScript code calls prim::SetAttr, which cannot be exported; save the original "
        "model with torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )
