"""A small network of a block of each recipe's family exports, is right, and TensorRT builds it.

By default it has RegNet's block and EfficientNet's, between stem and head; each night, all.
ConvNeXt's layer normalisation and GELU, DenseNet's concatenation, EfficientNet's SiLU and depthwise
convolution, MobileNet's hard swish and hard sigmoid, RegNet's groups and squeeze-and-excitation,
ResNet's overlapping pooling, VGG's linear layers. The recipes themselves, many times larger, are in
test_recipes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.bundle.folder import Bundle
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.engines.tensorrt import plans
from ccam_deploy.engines.tensorrt.library import load_library
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.architecture import import_module
from tests.export.agreement import assert_agrees
from tests.helpers import noise
from tests.sweeps import nightly_but

SIZE = (64, 64)
CLASSES = 5
DEVICE = "8.9"


class Medley(nn.Module):
    """images [B, 3, 64, 64] -> logits [B, 5]; three or four resolutions, from 32×32.

    models: torchvision.models.   few: whether only two of the blocks are there.
    """

    def __init__(self, models: Any, few: bool) -> None:
        super().__init__()
        norm, width = nn.BatchNorm2d, 16
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU(True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.regnet = models.regnet.ResBottleneckBlock(8, width, 1, norm, nn.ReLU, 4, 1.0, 0.25)
        self.densenet = models.densenet._DenseBlock(1, width, 2, 4, 0.0)
        self.transition = models.densenet._Transition(width + 4, width)
        self.convnext = models.convnext.CNBlock(width, 0.5, 0.0)
        row = models.efficientnet.MBConvConfig(4, 5, 2, width, 24, 1)
        self.efficientnet = models.efficientnet.MBConv(row, 0.0, norm)
        line = models.mobilenetv3.InvertedResidualConfig(24, 3, 32, 24, True, "HS", 1, 1, 1.0)
        self.mobilenet = models.mobilenetv3.InvertedResidual(line, norm)
        if few:
            self.densenet = self.transition = self.convnext = self.mobilenet = nn.Identity()
        self.vgg = nn.Sequential(
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24 * 2 * 2, 16),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.densenet(self.regnet(self.pool(self.stem(x))))
        x = self.convnext(self.transition(x))
        return self.vgg(self.mobilenet(self.efficientnet(x)))  # type: ignore[no-any-return]


def medley(few: bool) -> Medley:
    """Seeded weights, and normalisation with the statistics of some images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Medley(import_module("torchvision.models"), few)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.from_numpy(noise(16, 3, *SIZE)))
    return model.eval()


@pytest.fixture(scope="module", params=nightly_but(["few"], ["few", "all"]))
def few(request: pytest.FixtureRequest) -> bool:
    return request.param == "few"  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, few: bool) -> Bundle:
    folder = tmp_path_factory.mktemp("families") / "medley"
    return export(medley(few), folder, SIZE, None, "fp16", ExportSettings(random_weights=True))


@pytest.mark.slow
def test_a_block_of_each_family_exports_and_explains(exported: Bundle, few: bool) -> None:
    heights = [layer.height for layer in exported.manifest.layers]
    assert heights == ([32, 16, 8] if few else [32, 16, 8, 4])
    images = noise(2, 3, *SIZE, seed=1)
    with ccam.load(exported, backend="onnxruntime-cpu") as explainer:
        result = explainer.explain(images)
        assert np.isfinite(result.saliency).all()
        assert result.saliency.max() == 1
        assert_agrees(explainer, medley(few), images)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_every_graph(exported: Bundle, precision: PrecisionName) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = load_library("tensorrt-rtx")
    graphs = exported.precision(precision).graphs
    assert set(graphs) == {"backbone", "gradient", "classifier"}
    for file in graphs.values():
        plan = plans.build_plan(library, exported.path(file), plans.profiles(4)[1:], [DEVICE])
        assert len(plan) > 10_000
