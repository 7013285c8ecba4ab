"""Half-precision graphs in another form give the same values."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.export.graph_editing import aten
from ccam_deploy.export.graphs import masked_classifier
from ccam_deploy.export.program import Program, build_program, trace_model
from ccam_deploy.export.tensor_cores import (
    ALIGNMENT,
    add_biases_apart,
    cut_into_blocks,
    pool_before_bias,
    read_blocks,
)

SHAPE = 3, 24, 32


class Stem(nn.Module):
    """A convolution, a normalisation, a ReLU and a pooling, read by what is made of them."""

    def __init__(self, channels: int = 3, **convolution: Any) -> None:
        super().__init__()
        sizes = {"kernel_size": 3, "stride": 2, "padding": 1} | convolution
        self.conv, self.norm = nn.Conv2d(channels, 6, **sizes), nn.BatchNorm2d(6)
        self.pool, self.body = nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
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


class Twice(Stem):
    """Two convolutions read the images."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(x).mean((2, 3))  # type: ignore[no-any-return]


def program_of(make: type[Stem] = Stem, channels: int = 3, **options: Any) -> Program:
    torch.manual_seed(0)
    model = make(channels, **options) if options or channels != 3 else make()
    return build_program(trace_model(model.eval(), (channels, *SHAPE[1:])))


def images_of(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


def calls(graph: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def assert_same_logits(changed: fx.GraphModule, plain: fx.GraphModule, channels: int = 3) -> None:
    images = images_of(channels)
    torch.testing.assert_close(changed(images)[0], plain(images)[0], rtol=1e-5, atol=1e-6)


def code(graph: fx.GraphModule) -> str:
    return str(graph.graph.python_code("self").src)


STEMS = [
    {"kernel_size": 7, "stride": 2, "padding": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (5, 3), "stride": 2, "padding": (2, 1)},
    {"kernel_size": 2, "stride": 2, "padding": 0},
    {"kernel_size": 4, "stride": 4, "padding": 0},
    {"kernel_size": 7, "stride": 4, "padding": 3},
    {"kernel_size": 1, "stride": 2, "padding": 0},
]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: "-".join(map(str, stem.values())))
def test_blocks_give_the_same_logits(stem: dict[str, Any], channels: int) -> None:
    program = program_of(channels=channels, **stem)
    plain, cut = program.graph, copy.deepcopy(program.graph)
    shape = channels, *SHAPE[1:]
    read_blocks(cut, shape)
    assert_same_logits(cut, plain, channels)
    first = next(node for node in cut.graph.nodes if node.target is aten.conv2d.default)
    weight = getattr(cut, str(first.args[1].target))
    assert weight.shape[1] % ALIGNMENT == 0
    assert first.args[3] == [1, 1]
    assert [2 * pad + 1 for pad in first.args[4]] == list(weight.shape[2:])
    assert weight.count_nonzero() == plain.get_buffer(conv_weight(plain)).count_nonzero()


def conv_weight(graph: fx.GraphModule) -> str:
    first = next(node for node in graph.graph.nodes if node.target is aten.conv2d.default)
    return str(first.args[1].target)


@pytest.mark.parametrize(
    "stem",
    [
        {"stride": 1},
        {"padding": 0},
        {"stride": (2, 1)},
        {"groups": 3},
        {"dilation": 2, "padding": 2},
        {"stride": 5, "padding": 0},
        {"padding": 2},
    ],
    ids=str,
)
def test_other_convolutions_are_left_as_they_are(stem: dict[str, Any]) -> None:
    program = program_of(**stem)
    before = code(program.graph)
    assert cut_into_blocks(program.graph, SHAPE) is None
    read_blocks(program.graph, SHAPE)
    assert code(program.graph) == before


@pytest.mark.parametrize("make", [Whitened, Twice])
def test_images_that_others_read_are_not_cut(make: type[Stem]) -> None:
    program = program_of(make)
    before = code(program.graph)
    assert cut_into_blocks(program.graph, SHAPE) is None
    assert code(program.graph) == before


def test_pooling_comes_before_bias_and_relu() -> None:
    program = program_of()
    plain, moved = program.graph, copy.deepcopy(program.graph)
    pool_before_bias(moved)
    assert_same_logits(moved, plain)
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
    program = program_of(TwoReaders)
    before = code(program.graph)
    pool_before_bias(program.graph)
    assert code(program.graph) == before


def test_biases_are_added_apart() -> None:
    program = program_of()
    plain, apart = program.graph, copy.deepcopy(program.graph)
    add_biases_apart(apart)
    assert_same_logits(apart, plain)
    convolutions = [node for node in apart.graph.nodes if node.target is aten.conv2d.default]
    assert [node.args[2] for node in convolutions] == [None, None]
    assert calls(apart) - calls(plain) == {"aten.add.Tensor": 2}


@pytest.mark.parametrize("stem", [STEMS[0], STEMS[4], {"stride": 1}], ids=str)
def test_masked_images_in_half_precision_give_what_others_give(stem: dict[str, Any]) -> None:
    program = program_of(**stem)
    half, whole = (masked_classifier(program, dtype) for dtype in (torch.float16, torch.float32))
    images, owner = images_of(), torch.tensor([1, 0, 1])
    masks = torch.rand(3, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    (expected,) = whole(images, masks, owner)
    (found,) = half(images.half(), masks.half(), owner)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    assert {value.dtype for value in half.buffers()} == {torch.float16}


def test_images_are_not_turned_round_for_each_mask() -> None:
    """What has a row for each mask is permuted once, in front of the convolution."""
    graph = masked_classifier(program_of(), torch.float16)
    product = next(node for node in graph.graph.nodes if node.target is aten.mul.Tensor)
    assert product.args[0].target is aten.index_select.default
    (flat,) = product.users
    (turned,) = flat.users
    (convolution,) = turned.users
    assert turned.args[1] == [0, 3, 1, 2]
    assert convolution.target is aten.conv2d.default


def test_bundles_take_the_same_inputs_as_before(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    shapes, biases = {}, {}
    for precision in ("fp32", "fp16"):
        graph = ir.load(bundle.path(bundle.precision(precision).graphs["classifier"])).graph
        shapes[precision] = [str(value.shape) for value in graph.inputs]
        biases[precision] = {len(node.inputs) for node in graph if node.op_type == "Conv"}
    assert shapes["fp16"] == shapes["fp32"]
    assert biases == {"fp32": {3}, "fp16": {2}}
