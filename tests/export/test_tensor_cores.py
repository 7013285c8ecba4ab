"""Half-precision graphs in another form give the same values."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.export.graph_editing import aten
from ccam_deploy.export.graphs import masked_classifier
from ccam_deploy.export.program import Program, build_program, trace_model
from ccam_deploy.export.tensor_cores import ALIGNMENT, pad_images, pool_before_bias, widen_images

SHAPE = 3, 12, 16


class Stem(nn.Module):
    """A convolution, a normalisation, a ReLU and a pooling, read by what is made of them."""

    def __init__(self, body: nn.Module | None = None, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.pool, self.body = nn.MaxPool2d(3, 2, 1), body or nn.Conv2d(6, 6, 3, 1, 1)
        self.head = nn.Linear(6, 5)
        nn.init.uniform_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv(x)).relu())
        return self.head((x + self.body(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


class TwoReaders(Stem):
    """What goes into the pooling is read beside it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.pool(x).mean((2, 3)) + x.mean((2, 3))
        return self.head(x)  # type: ignore[no-any-return]


class Whitened(Stem):
    """The images are read by something else than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25)


class Grouped(Stem):
    """The images' channels are convolved apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1, groups=3)


class Twice(Stem):
    """Two convolutions read the images."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x).mean((2, 3))  # type: ignore[no-any-return]


def program_of(model: nn.Module, channels: int = 3) -> Program:
    return build_program(trace_model(model.eval(), (channels, *SHAPE[1:])))


def seeded(make: type[Stem], channels: int = 3) -> Stem:
    torch.manual_seed(0)
    return make() if channels == 3 else Stem(channels=channels)


def images_of(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


def calls(graph: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(("make", "channels"), [(Stem, 3), (Twice, 3), (Stem, 1)])
def test_padded_images_give_the_same_logits(make: type[Stem], channels: int) -> None:
    program = program_of(seeded(make, channels), channels)
    plain, padded = program.graph, copy.deepcopy(program.graph)
    pad_images(padded)
    images = images_of(channels)
    torch.testing.assert_close(padded(images)[0], plain(images)[0], rtol=1e-5, atol=1e-6)
    assert calls(padded) - calls(plain) == {"aten.constant_pad_nd.default": 1}
    widths = {
        getattr(padded, str(node.args[1].target)).shape[1]
        for node in padded.graph.nodes
        if node.target is aten.conv2d.default and "constant_pad" in node.args[0].name
    }
    assert widths == {ALIGNMENT}


@pytest.mark.parametrize("make", [Whitened, Grouped])
def test_other_graphs_are_left_as_they_are(make: type[Stem]) -> None:
    program = program_of(seeded(make))
    before = program.graph.graph.python_code("self").src
    assert widen_images(program.graph) == 0
    pad_images(program.graph)
    assert program.graph.graph.python_code("self").src == before


def test_pooling_comes_before_bias_and_relu() -> None:
    """With a bias that a rounding changes, and all values below 0 in some places."""
    program = program_of(seeded(Stem))
    plain, moved = program.graph, copy.deepcopy(program.graph)
    pool_before_bias(moved)
    images = images_of()
    torch.testing.assert_close(moved(images)[0], plain(images)[0], rtol=1e-5, atol=1e-6)
    (pool,) = (node for node in moved.graph.nodes if node.target is aten.max_pool2d.default)
    convolution = pool.args[0]
    assert convolution.target is aten.conv2d.default
    assert convolution.args[2] is None
    (shifted,) = pool.users
    assert shifted.target is aten.add.Tensor
    (relu,) = shifted.users
    assert relu.target is aten.relu.default
    assert len(relu.users) == 2
    assert calls(moved) - calls(plain) == {"aten.add.Tensor": 1}


def test_the_order_does_not_matter_to_the_last_bit_in_half_precision() -> None:
    """A largest value stays the largest when it is shifted and rounded."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 6, 24, 32, generator=generator).half()
    bias = torch.randn(1, 6, 1, 1, generator=generator).half()
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal((pool(values) + bias).relu(), pool((values + bias).relu()))


def test_what_others_read_is_not_moved() -> None:
    program = program_of(seeded(TwoReaders))
    before = program.graph.graph.python_code("self").src
    pool_before_bias(program.graph)
    assert program.graph.graph.python_code("self").src == before


def test_a_masked_classifier_in_half_precision_gives_what_the_other_gives() -> None:
    program = program_of(seeded(Stem))
    half, whole = (masked_classifier(program, dtype) for dtype in (torch.float16, torch.float32))
    images, owner = images_of(), torch.tensor([1, 0, 1])
    masks = torch.rand(3, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    (expected,) = whole(images, masks, owner)
    (found,) = half(images.half(), masks.half(), owner)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    assert calls(half)["aten.permute.default"] == 2
    assert not calls(whole)["aten.permute.default"]


def test_bundles_take_the_same_inputs_as_before(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    shapes, first = {}, {}
    for precision in ("fp32", "fp16"):
        graph = ir.load(bundle.path(bundle.precision(precision).graphs["classifier"])).graph
        shapes[precision] = [str(value.shape) for value in graph.inputs]
        weights = next(node for node in graph if node.op_type == "Conv").inputs[1]
        assert weights is not None and weights.shape is not None
        first[precision] = weights.shape[1]
    assert shapes["fp16"] == shapes["fp32"]
    assert first == {"fp32": bundle.manifest.input[0], "fp16": ALIGNMENT}
