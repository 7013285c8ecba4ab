"""Exported gradients against autograd: the trained example, and each operator by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.errors import LoweringError
from ccam_deploy.export import autodiff
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from tests.helpers import DIGITS_LAYERS, example_pictures
from tests.networks import digits_model
from tests.reference import features_and_gradients
from tests.sweeps import by_pace


def test_gradients_of_the_trained_example(digits: ccam.Explainer) -> None:
    """Relative error at most 1e-4 on every layer, for the best class and for another.

    One of the eight images may miss it: a network has a million ReLUs, and where the input of one
    is zero to the last bit, the engine and PyTorch may round it to different sides.
    """
    images, _ = digits.preprocess(example_pictures())
    activations = digits.networks.backbone(images)
    for shift in (0, 3):
        classes = (activations.logits.argmax(1) + shift) % 10
        one_hot = np.eye(10, dtype=np.float32)[classes]
        gradients = digits.networks.gradients(activations, one_hot)
        logits, features, expected = features_and_gradients(
            digits_model(), torch.from_numpy(images.copy()), DIGITS_LAYERS, classes.tolist()
        )
        np.testing.assert_allclose(activations.logits, logits.numpy(), atol=1e-4)
        for got, want in zip(activations.features, features, strict=True):
            assert max(relative_errors(got, want)) <= 1e-5
        worst = np.max(
            [relative_errors(*pair) for pair in zip(gradients, expected, strict=True)], axis=0
        )
        assert np.count_nonzero(worst > 1e-4) <= 1
        assert np.median(worst) <= 1e-6
        assert worst.max() <= 5e-2


@pytest.mark.slow
def test_gradient_graph_is_exact_in_double_precision() -> None:
    """Where rounding decides no ReLU, the graph and autograd agree on every image and layer."""
    model = digits_model()
    built = build_program(trace_model(model, (3, 96, 96)))
    found = find_layers(built)
    assert [layer.name for layer in found] == list(DIGITS_LAYERS)
    parts = autodiff.differentiate(built, found, torch.float64)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    classes = [0, 3, 7, 9]
    logits, features, expected = features_and_gradients(
        model.double(), images.clone(), DIGITS_LAYERS, classes
    )
    with torch.no_grad():
        outputs = parts.backbone(images)
        one_hot = nn.functional.one_hot(torch.tensor(classes), 10).double()
        gradients = parts.gradient(*outputs[5:], one_hot)
    torch.testing.assert_close(outputs[0], logits, rtol=1e-5, atol=1e-6)
    for got, want in zip((*outputs[1:5], *gradients), (*features, *expected), strict=True):
        assert float((got - want).norm() / want.norm()) <= 1e-6


def relative_errors(actual: np.ndarray, expected: Tensor) -> list[float]:
    """The largest difference in each image over the largest value."""
    return [
        float(np.abs(g - w).max() / np.abs(w).max())
        for g, w in zip(actual, expected.numpy(), strict=True)
    ]


class Wrapped(nn.Module):
    """A convolution to explain, the operator under test, and a head."""

    def __init__(self, body: nn.Module, size: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.body = body
        with torch.no_grad():
            width = body(self.stem(torch.zeros(2, 3, size, size))).flatten(1).shape[1]
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))  # type: ignore[no-any-return]


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(self.down(nn.functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return torch.mul(x, scale)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.one(x)], 1)
        return torch.cat([x, self.two(x).relu()], 1)


class LayerNormMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def quantised(x: Tensor) -> Tensor:
    """Few distinct values, so that pooling windows have ties."""
    return (x * 2).round() / 2 + 0 * x


BODIES: dict[str, nn.Module] = {
    "conv-stride-1": nn.Conv2d(8, 6, 3, 1, 1),
    "conv-valid": nn.Conv2d(8, 6, 3, 1, 0),
    "conv-wide-padding": nn.Conv2d(8, 6, 3, 1, 4),
    "conv-stride-2": nn.Conv2d(8, 6, 3, 2, 1),
    "conv-stride-2-odd-rest": nn.Conv2d(8, 6, 2, 3, 0),
    "conv-1x1-stride-2": nn.Conv2d(8, 6, 1, 2),
    "conv-dilated": nn.Conv2d(8, 6, 3, 1, 2, dilation=2),
    "conv-grouped": nn.Conv2d(8, 12, 3, 1, 1, groups=4),
    "conv-grouped-stride-2": nn.Conv2d(8, 12, 3, 2, 1, groups=4),
    "conv-depthwise": nn.Conv2d(8, 8, 5, 1, 2, groups=8),
    "conv-transposed": nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
    "max-pool": nn.MaxPool2d(2),
    "max-pool-overlapping": nn.MaxPool2d(3, 2, 1),
    "max-pool-ceil": nn.MaxPool2d(5, 5, ceil_mode=True),
    "max-pool-rest": nn.MaxPool2d(5),
    "max-pool-dilated": nn.MaxPool2d(2, 2, dilation=2),
    "max-pool-ties": nn.Sequential(Lambda(quantised), nn.MaxPool2d(3, 2, 1)),
    "avg-pool": nn.AvgPool2d(2),
    "avg-pool-padded": nn.AvgPool2d(3, 2, 1),
    "avg-pool-padded-excluded": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg-pool-ceil": nn.AvgPool2d(5, 5, ceil_mode=True),
    "adaptive-pool-1": nn.AdaptiveAvgPool2d(1),
    "adaptive-pool-same": nn.AdaptiveAvgPool2d(12),
    "adaptive-pool-uneven": nn.AdaptiveAvgPool2d((5, 7)),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky-relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(8),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU(approximate="tanh"),
    "hard-swish": nn.Hardswish(),
    "hard-sigmoid": nn.Hardsigmoid(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softmax": nn.Softmax(1),
    "batch-norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
    "conv-batch-norm": nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "layer-norm": LayerNormMlp(),
    "group-norm": nn.GroupNorm(2, 8),
    "squeeze-and-excitation": SqueezeExcite(),
    "concatenation": Dense(),
    "attention": Attention(),
    "slices": Lambda(lambda x: torch.cat([x[:, 2:5], x[:, 4:], x[:, :, -12:12][:, :1]], 1)),
    "full-slice": Lambda(lambda x: x.mean((2, 3))[:, :5]),
    "split": Lambda(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]),
    "select": Lambda(lambda x: x[:, 3] * x[:, 5]),
    "pixel-shuffle": nn.PixelShuffle(2),
    "padding": nn.ZeroPad2d((1, 2, 0, 3)),
    "mean-and-power": Lambda(lambda x: (x**2).mean((2, 3)).sqrt()),
}


QUICK = ("conv-grouped",)
NIGHTLY = (
    "conv-stride-1",
    "conv-valid",
    "conv-wide-padding",
    "conv-1x1-stride-2",
    "conv-grouped-stride-2",
    "max-pool-overlapping",
    "max-pool-ceil",
    "max-pool-rest",
    "avg-pool",
    "avg-pool-padded",
    "adaptive-pool-same",
    "relu6",
    "gelu-tanh",
    "group-norm",
    "attention",
)
"""Other options of operators that are there, and what test_lowering has too."""


@pytest.mark.parametrize("name", by_pace(QUICK, NIGHTLY, BODIES))
def test_gradient_graph_of_each_operator(name: str) -> None:
    torch.manual_seed(1)
    model = Wrapped(BODIES[name]).eval()
    for value in model.buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    built = build_program(trace_model(model, (3, 12, 12)))
    (layer,) = find_layers(built, ["stem"])
    parts = autodiff.differentiate(built, [layer])
    images = torch.randn(3, 3, 12, 12)
    classes = [0, 3, 1]
    logits, features, expected = features_and_gradients(model, images.clone(), ["stem"], classes)
    with torch.no_grad():
        outputs = parts.backbone(images)
        one_hot = nn.functional.one_hot(torch.tensor(classes), 4).float()
        (gradient,) = parts.gradient(*outputs[2:], one_hot)
    torch.testing.assert_close(outputs[0], logits)
    torch.testing.assert_close(outputs[1], features[0])
    torch.testing.assert_close(gradient, expected[0], rtol=1e-4, atol=1e-6)
    forbidden = ("scatter", "index_put", "max_unpool", "_backward", "with_indices")
    for graph in (parts.backbone, parts.gradient):
        targets = [str(node.target) for node in graph.graph.nodes]
        assert not [t for t in targets if any(word in t for word in forbidden)]


@pytest.mark.slow
def test_ties_give_the_gradient_to_the_first(tmp_path: Path) -> None:
    """As PyTorch does, row by row inside the window."""
    model = Wrapped(nn.MaxPool2d(2, 2)).eval()
    with torch.no_grad():
        model.stem.weight.zero_()
    built = build_program(trace_model(model, (3, 12, 12)))
    parts = autodiff.differentiate(built, find_layers(built, ["stem"]))
    outputs = parts.backbone(torch.zeros(2, 3, 12, 12))
    (gradient,) = parts.gradient(*outputs[2:], torch.ones(2, 4))
    assert (gradient[:, :, ::2, ::2] != 0).all()
    assert not gradient[:, :, 1::2].any()
    assert not gradient[:, :, :, 1::2].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            Lambda(lambda x: x.gather(3, x.argsort(3))),
            'layer "body": the gradient of gather cannot be expressed: it adds to scattered '
            "places, which engines reject",
        ),
        (
            Lambda(lambda x: nn.functional.conv3d(x[:, None], torch.ones(4, 1, 3, 3, 3))),
            'layer "body": the gradient of conv3d cannot be expressed: a 3-D convolution has none',
        ),
    ],
    ids=["gather", "conv3d"],
)
def test_what_has_no_gradient_graph_is_named(body: nn.Module, message: str) -> None:
    built = build_program(trace_model(Wrapped(body).eval(), (3, 12, 12)))
    with pytest.raises(LoweringError) as raised:
        autodiff.differentiate(built, find_layers(built, ["stem"]))
    assert str(raised.value) == message
