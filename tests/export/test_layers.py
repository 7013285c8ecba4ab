"""Which feature maps are explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.errors import LayerError
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from tests.networks import tiny


def names_of(model: nn.Module, *, size: int = 32, named: list[str] | None = None) -> list[str]:
    built = build_program(trace_model(model, (3, size, size)))
    return [layer.name for layer in find_layers(built, named)]


class Bottleneck(nn.Module):
    """A residual stage that starts with a wide tensor at the old resolution."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(inner, 4 * outer, 1)
        self.reduce = nn.Conv2d(4 * outer, outer, 3, 2, 1)
        self.shortcut = nn.Conv2d(inner, outer, 1, 2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.reduce(self.relu(self.widen(x))) + self.shortcut(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.stage1, self.stage2 = Bottleneck(4, 6), Bottleneck(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


def test_last_tensor_of_each_resolution() -> None:
    assert names_of(tiny()) == ["relu1", "relu2"]


def test_inside_of_a_residual_stage_is_not_chosen() -> None:
    """The wide tensor comes later than the stem's output, but the shortcut goes around it."""
    assert names_of(Residual().eval()) == ["stem", "stage1", "stage2"]


def test_maps_of_one_pixel_are_left_out() -> None:
    """A squeeze convolves at 1×1, which explains nothing."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten()
    )
    assert names_of(model.eval()) == ["0"]


def test_what_only_the_rewritten_graph_has_is_no_layer() -> None:
    """Windows become a convolution that copies, which PyTorch's own graph does not have."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 4, 1), nn.Unfold(4, stride=4), nn.Flatten(), nn.Linear(256, 3)
    ).eval()
    rewritten = build_program(trace_model(model, (3, 32, 32))).graph.graph.nodes
    assert "convolution_default" in [node.name for node in rewritten]
    assert names_of(model) == ["0"]
    with pytest.raises(LayerError, match='"convolution_default" is not in the model; it has 0'):
        names_of(model, named=["convolution_default"])


def test_at_most_four_are_chosen() -> None:
    stages = [nn.Conv2d(3, 3, 3, 2, 1) for _ in range(6)]
    model = nn.Sequential(*stages, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 128, 128))
    assert names_of(model.eval(), size=128) == ["2", "3", "4", "5"]


@pytest.mark.slow
def test_other_memory_layouts_are_not_feature_maps() -> None:
    """The last tensor of the resolution is [B, H, W, C]; the one before it is chosen."""

    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(self.conv(x).permute(0, 2, 3, 1)).relu()
            return y.mean((1, 2))  # type: ignore[no-any-return]

    assert names_of(ChannelsLast().eval()) == ["conv"]


class Shared(nn.Module):
    """One activation for all convolutions, the last of which shrinks its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.widen, self.shrink = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, 2, 1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.widen(self.stem(x)))
        return self.head(self.relu(self.shrink(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_module_called_twice_names_each_of_its_outputs() -> None:
    model = Shared().eval()
    assert names_of(model) == ["relu:1", "relu"]
    assert names_of(model, named=["relu", "relu:1", "stem"]) == ["stem", "relu:1", "relu"]
    built = build_program(trace_model(model, (3, 32, 32)))
    assert [layer.shape for layer in find_layers(built)] == [(8, 16, 16), (4, 8, 8)]
    with pytest.raises(LayerError, match=r"it has stem, widen, relu, shrink$"):
        names_of(model, named=["relu:2"])


@pytest.mark.slow
def test_named_layers_come_in_the_order_of_the_network() -> None:
    assert names_of(tiny(), named=["relu2", "conv2", "relu1"]) == ["relu1", "conv2", "relu2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["layer5"], 'layer "layer5" is not in the model; it has '),
        (["relu1", "relu1"], "do not name different feature maps"),
        (["head"], 'layer "head" gives no feature map'),
    ],
)
def test_unusable_names(named: list[str], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        names_of(tiny(), named=named)


def test_a_model_without_convolution() -> None:
    with pytest.raises(LayerError, match="no feature map was found"):
        names_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)))


class Attentive(nn.Module):
    """Patches under PyTorch's own attention, which puts the batch third of four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head((tokens + mixed).mean(1))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_to_look_for_layers_does_not_fix_the_batch() -> None:
    built = build_program(trace_model(Attentive(), (3, 16, 16)))
    assert [layer.shape for layer in find_layers(built)] == [(8, 4, 4)]
    assert built.image.meta["val"].shape[0].node.maybe_as_int() is None
