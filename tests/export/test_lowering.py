"""What attention, upsampling and indexing become: graphs in ONNX Runtime against autograd."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ccam_deploy.arrays import Floats
from ccam_deploy.export.graphs import convert_graphs
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from tests.export.test_gradients import Lambda, Wrapped
from tests.helpers import noise
from tests.reference import features_and_gradients
from tests.sweeps import nightly_but

SIZE = 8


class Tokens(nn.Module):
    """Attention over the pixels and a class token, whose output alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, SIZE * SIZE + 1, 8)),
        )
        self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind()
        x = x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return x[:, 0]


class ShiftedWindows(nn.Module):
    """Attention in four windows of a rolled map, with a table of relative positions and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(8, 24), nn.Parameter(torch.randn(49, 2))
        across = torch.arange(16) % 4 - torch.arange(16)[:, None] % 4
        down = torch.arange(16) // 4 - torch.arange(16)[:, None] // 4
        self.index: Tensor
        self.mask: Tensor
        self.register_buffer("index", (down + 3) * 7 + across + 3)
        self.register_buffer("mask", torch.where(torch.randn(4, 1, 16, 16) > 1, -100.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
        x = x.view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) + bias
        scores = scores.view(b, 4, 2, 16, 16) + self.mask
        x = (scores.view(-1, 2, 16, 16).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        x = x.view(b, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, (2, 2), (1, 2)).permute(0, 3, 1, 2)


class HeadsFirst(nn.Module):
    """Attention whose heads come before the batch, and whose scores need a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.flatten(2).reshape(x.shape[0], 2, 4, -1).transpose(0, 1)
        return ((q.transpose(-2, -1) @ q).softmax(-1) @ q.transpose(-2, -1)).transpose(0, 1)


class Masked(nn.Module):
    """Attention with a causal mask, then with one of numbers, then with one of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor
        self.seen: Tensor
        self.register_buffer("bias", torch.randn(64, 64))
        self.register_buffer("seen", torch.rand(64, 64) + torch.eye(64) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)[:, None]
        x = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = functional.scaled_dot_product_attention(x, x, x, self.bias, scale=0.5)
        return functional.scaled_dot_product_attention(x, x, x, self.seen)


class ChannelAttention(nn.Module):
    """Weights of channels from a 1-D convolution over them (Wang et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * weights.view(x.shape[0], -1, 1, 1)  # type: ignore[no-any-return]


def written_slices(x: Tensor) -> Tensor:
    y = x + 0
    y[:, :, 2:6] = x[:, :, :4].sigmoid()
    y[:, :, :, -1] = x[:, :, :, 0] * x[:, :, :, 1]
    return y


def upsampling(**options: object) -> nn.Module:
    return nn.Sequential(nn.Upsample(**options), nn.Sigmoid())  # type: ignore[arg-type]


BODIES: dict[str, nn.Module] = {
    "class-token": Tokens(),
    "shifted-windows": ShiftedWindows(),
    "heads-first": HeadsFirst(),
    "masked-attention": Masked(),
    "channel-attention": ChannelAttention(),
    "conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 4, 3, 2, 1, groups=2)),
    "conv1d-same": nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 4, 4, padding="same", dilation=2)),
    "nearest": upsampling(scale_factor=2),
    "nearest-uneven": upsampling(size=(11, 5)),
    "nearest-exact": upsampling(size=(11, 5), mode="nearest-exact"),
    "bilinear": upsampling(scale_factor=2, mode="bilinear"),
    "bilinear-corners": upsampling(size=(5, 13), mode="bilinear", align_corners=True),
    "bicubic": upsampling(scale_factor=1.5, mode="bicubic"),
    "antialiased": Lambda(
        lambda x: functional.interpolate(x, (3, 5), mode="bicubic", antialias=True)
    ),
    "linear": nn.Sequential(nn.Flatten(2), nn.Upsample(size=90, mode="linear"), nn.Sigmoid()),
    "conv3d-of-planes": Lambda(
        lambda x: functional.conv3d(
            x.view(-1, 2, 4, 8, 8), torch.ones(3, 2, 3, 1, 3) / 8, None, (2, 1, 1), (1, 0, 1)
        ).sigmoid()
    ),
    "reflected": nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 0)), nn.Sigmoid()),
    "replicated": nn.Sequential(nn.ReplicationPad2d((1, 2, 3, 0)), nn.Sigmoid()),
    "circular": nn.Sequential(nn.CircularPad2d((1, 2, 3, 0)), nn.Sigmoid()),
    "written-slices": Lambda(written_slices),
    "rms-norm": nn.Sequential(nn.Flatten(2), nn.RMSNorm(SIZE * SIZE)),
    "group-norm": nn.Sequential(nn.GroupNorm(2, 8), nn.Sigmoid()),
    "strided-slices": Lambda(lambda x: x[:, :, ::2, 1::3] * x[:, :, 1::2, :-1:3]),
    "strided-slice-past-the-end": Lambda(lambda x: x[:, 1::5, 2:7:4]),
    "roll": Lambda(lambda x: torch.roll(x, (3, -2), (2, 3)).sigmoid()),
    "windows": nn.Sequential(nn.Unfold(3, padding=1, stride=2), nn.Sigmoid()),
    "sums-of-windows": nn.Sequential(
        nn.Unfold(3, padding=1, stride=2), nn.Sigmoid(), nn.Fold((8, 8), 3, padding=1, stride=2)
    ),
    "sums-by-a-divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "largest-of-pairs": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d((8, 4))),
    "largest": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d((4, 1))),
    "largest-of-overlapping": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d((3, 2))),
    "halo": Lambda(lambda x: x.unfold(2, 4, 2).unfold(3, 4, 4).sigmoid()),
    "normalised": Lambda(lambda x: functional.normalize(x.flatten(2), dim=-1)),
}


DAILY = (
    "class-token",
    "heads-first",
    "channel-attention",
    "conv1d",
    "nearest",
    "bilinear",
    "antialiased",
    "conv3d-of-planes",
    "reflected",
    "written-slices",
    "group-norm",
    "strided-slices",
    "roll",
    "sums-of-windows",
    "largest-of-pairs",
)
"""The cheapest network of each cause. The others differ from one here in an option or a size."""


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(DAILY, BODIES))
def test_graphs_agree_with_autograd(name: str) -> None:
    """In batches of one image and of three, without operators that engines run on the CPU."""
    torch.manual_seed(0)
    model = Wrapped(BODIES[name], SIZE).eval()
    program = build_program(trace_model(model, (3, SIZE, SIZE)))
    graphs = convert_graphs(program, find_layers(program, ["stem"]), with_gradients=True)
    assert graphs.input_gradient is not None
    for graph in (graphs.backbone, graphs.gradient, graphs.classifier, graphs.input_gradient):
        assert {node.op_type for node in graph.graph}.isdisjoint(ON_CPU)
    for batch in (1, 3):
        images, classes = noise(batch, 3, SIZE, SIZE), list(range(batch))
        logits, (features,), (gradients,) = features_and_gradients(
            model, torch.from_numpy(images.copy()), ["stem"], classes
        )
        one_hot = np.eye(4, dtype=np.float32)[classes]
        forward = run(graphs.backbone, images=images)
        residuals = {key: value for key, value in forward.items() if key.startswith("residual")}
        backward = run(graphs.gradient, **residuals, output_gradient=one_hot)
        ones, owner = np.ones((batch, 1, SIZE, SIZE), np.float32), np.arange(batch)
        masked = run(graphs.classifier, images=images, masks=ones, owner=owner)
        for actual, expected in (
            (forward["logits"], logits),
            (forward["feature_0"], features),
            (backward["gradient_0"], gradients),
            (masked["logits"], logits),
        ):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", nightly_but(["bilinear"], ["class-token", "shifted-windows", "bilinear"])
)
def test_graphs_in_half_precision(name: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(BODIES[name], SIZE).eval()
    program = build_program(trace_model(model, (3, SIZE, SIZE)))
    graphs = convert_graphs(program, find_layers(program, ["stem"]), torch.float16)
    images = noise(2, 3, SIZE, SIZE)
    logits, _, (gradients,) = features_and_gradients(
        model, torch.from_numpy(images.copy()), ["stem"], [0, 1]
    )
    forward = run(graphs.backbone, images=images.astype(np.float16))
    assert forward["logits"].dtype == np.float16
    residuals = {key: value for key, value in forward.items() if key.startswith("residual")}
    backward = run(graphs.gradient, **residuals, output_gradient=np.eye(2, 4, dtype=np.float16))
    np.testing.assert_allclose(forward["logits"], logits, rtol=1e-2, atol=1e-2)
    worst = np.abs(backward["gradient_0"] - gradients.numpy()).max()
    assert worst <= 2e-2 * float(gradients.abs().max())


ON_CPU = {"Shape", "Size", "NonZero", "Range", "ConstantOfShape", "Loop", "If", "Scan"}


def run(model: ir.Model, **inputs: object) -> dict[str, Floats]:
    """What a graph computes, by the names of its outputs."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
