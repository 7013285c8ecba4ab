"""Feature maps behind tokens, windows and channels last: chosen, taken out, put back, explained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.errors import LayerError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.layers import TargetLayer, find_layers
from ccam_deploy.export.places import Arrangement, Axis, Part, map_arrangement
from ccam_deploy.export.program import build_program, trace_model
from tests.helpers import noise
from tests.sweeps import nightly_but
from tests.transformers import (
    ChannelsLast,
    InWindows,
    TinySwin,
    TinyViT,
    Unrolled,
    WindowBlock,
    seeded,
)

SIDE = 32
GRID = SIDE // 8
Transform = Callable[[Tensor], Tensor]


def layers_of(model: nn.Module, names: list[str] | None = None) -> tuple[TargetLayer, ...]:
    return find_layers(build_program(trace_model(model, (3, SIDE, SIDE))), names)


def chosen(model: nn.Module) -> list[str]:
    return [layer.name for layer in layers_of(model)]


def of_tokens(left_out: int) -> Transform:
    """The reshape_transform that users of pytorch-grad-cam write for a vision transformer."""

    def transform(value: Tensor) -> Tensor:
        tokens = value[:, left_out:, :]
        return tokens.reshape(len(value), GRID, GRID, value.size(2)).transpose(2, 3).transpose(1, 2)

    return transform


def of_channels_last(value: Tensor) -> Tensor:
    return value.movedim(-1, 1)


def of_windows(value: Tensor) -> Tensor:
    """Windows of 4×4 tokens, in rows, undone by loops."""
    count, windows, _, channels = value.shape
    side = int(windows**0.5)
    image = value.new_zeros(count, channels, 4 * side, 4 * side)
    for window in range(windows):
        for token in range(16):
            row, column = 4 * (window // side) + token // 4, 4 * (window % side) + token % 4
            image[:, :, row, column] = value[:, window, token]
    return image


def of_neighbours(value: Tensor) -> Tensor:
    """Tokens [B, 4, 16, C] with neighbours on an axis of their own, or [B, 16, C], by loops."""
    count, channels = value.shape[0], value.shape[-1]
    scale = 2 if value.dim() == 4 else 1
    image = value.new_zeros(count, channels, 4 * scale, 4 * scale)
    for row in range(4 * scale):
        for column in range(4 * scale):
            token = 4 * (row // scale) + column // scale
            place = (2 * (row % 2) + column % 2, token) if scale == 2 else (token,)
            image[:, :, row, column] = value[(slice(None), *place)]
    return image


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], Transform]] = {
    "class token": (
        lambda: seeded(TinyViT),
        ["blocks.0", "blocks.1"],
        of_tokens(1),
    ),
    "five blocks": (
        lambda: seeded(TinyViT, depth=5),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
        of_tokens(1),
    ),
    "registers": (
        lambda: seeded(TinyViT, registers=2),
        ["blocks.0", "blocks.1"],
        of_tokens(3),
    ),
    "mean": (
        lambda: seeded(TinyViT, pool="mean", depth=8),
        ["blocks.1", "blocks.3", "blocks.5", "blocks"],
        of_tokens(0),
    ),
    "mean of patches beside registers": (
        lambda: seeded(TinyViT, pool="mean", registers=2, depth=2),
        ["blocks.0", "blocks"],
        of_tokens(2),
    ),
    "mixer": (
        lambda: seeded(TinyViT, registers=2, patches=GRID**2),
        ["blocks.0", "blocks.1"],
        of_tokens(3),
    ),
    "shifted windows": (
        lambda: seeded(TinySwin),
        ["stage1", "stage2"],
        of_channels_last,
    ),
    "merged by a change of shape": (
        lambda: seeded(TinySwin, reshaped=True),
        ["stage1", "stage2"],
        of_channels_last,
    ),
    "linear patches": (
        lambda: seeded(TinyViT, linear=True),
        ["blocks.0", "blocks.1"],
        of_tokens(1),
    ),
    "largest of neighbours": (
        lambda: seeded(Unrolled),
        ["stage1", "stage2"],
        of_neighbours,
    ),
    "channels last": (
        lambda: seeded(ChannelsLast),
        ["block1", "block2"],
        of_channels_last,
    ),
    "tokens in windows": (
        lambda: seeded(InWindows),
        ["blocks.0", "blocks"],
        of_windows,
    ),
}


DAILY = ("class token", "channels last", "tokens in windows")
"""Networks of three arrangements: the others combine these, or export for longer."""
CHOSEN = (
    "five blocks",
    "registers",
    "shifted windows",
    "merged by a change of shape",
    "linear patches",
    "largest of neighbours",
)
"""More networks whose layers are found daily, without an export."""
EXPLAINED = ("class token", "shifted windows", "channels last", "mixer")


def by_hooks(
    model: nn.Module, images: Floats, names: list[str], classes: list[int], transform: Transform
) -> list[tuple[Floats, Floats]]:
    """Features and gradients of modules by hooks and autograd, as maps."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    logits = model(torch.from_numpy(images).requires_grad_())
    for handle in handles:
        handle.remove()
    score = logits[torch.arange(len(images)), classes].sum()
    gradients = torch.autograd.grad(score, [kept[name] for name in names])
    pairs = zip((kept[name] for name in names), gradients, strict=True)
    return [(transform(f).detach().numpy(), transform(g).numpy()) for f, g in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_but((*DAILY, *CHOSEN), NETWORKS))
def test_block_outputs_are_chosen(kind: str) -> None:
    make, names, _ = NETWORKS[kind]
    layers = layers_of(make())
    assert [layer.name for layer in layers] == names
    assert all(min(layer.shape[1:]) > 1 for layer in layers)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tokens")

    def get(kind: str) -> Path:
        path = folder / kind.replace(" ", "_")
        if not path.exists():
            model = NETWORKS[kind][0]()
            export(model, path, (SIDE, SIDE), settings=ExportSettings(head=True))
        return path

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_but(DAILY, NETWORKS))
def test_maps_and_gradients_are_those_of_hooks(kind: str, exported: Callable[[str], Path]) -> None:
    make, names, transform = NETWORKS[kind]
    images = noise(3, 3, SIDE, SIDE)
    with ccam.load(exported(kind)) as explainer:
        activations = explainer.networks.backbone(images)
        classes = activations.logits.argmax(1)
        one_hot = np.eye(5, dtype=np.float32)[classes]
        gradients = explainer.networks.gradients(activations, one_hot)
    expected = by_hooks(make(), images, names, classes.tolist(), transform)
    for index, (features, gradient) in enumerate(expected):
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(activations.features[index], features, atol=2e-5)
        np.testing.assert_allclose(gradients[index], gradient, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_but(DAILY, EXPLAINED))
def test_every_method_that_explains_by_maps(kind: str, exported: Callable[[str], Path]) -> None:
    images = noise(2, 3, SIDE, SIDE)
    methods: tuple[str | ccam.Method, ...] = (
        "collection-cam",
        ccam.GradCAM(relu=False),  # sums of features of both signs may be negative everywhere
        ccam.GradCAMPlusPlus(relu=False),
        ccam.LayerCAM(relu=False),
        "score-cam",
        ccam.RISE(masks=64),
        "recipro-cam",
    )
    with ccam.load(exported(kind)) as explainer:
        for method in methods:
            saliency = explainer.explain(images, method=method).saliency
            assert np.isfinite(saliency).all(), method
            assert saliency.max() == 1, method


@pytest.mark.slow
def test_grad_cam_of_tokens(exported: Callable[[str], Path]) -> None:
    """Against its equation, on features of both signs."""
    make, names, transform = NETWORKS["class token"]
    images = noise(2, 3, SIDE, SIDE)
    with ccam.load(exported("class token")) as explainer:
        explanation = explainer.explain(images, method="grad-cam")
    classes = explanation.targets.tolist()
    features, gradient = map(
        torch.from_numpy, by_hooks(make(), images, names[-1:], classes, transform)[0]
    )
    assert (features < 0).any()
    coarse = torch.einsum("bc,bcij->bij", gradient.mean((2, 3)), features).relu()
    expected = nn.functional.interpolate(coarse[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    assert expected.max() > 0
    np.testing.assert_allclose(explanation.raw_saliency, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly_but(DAILY, EXPLAINED))
def test_head_takes_the_map_and_the_images_own_tokens(
    kind: str, exported: Callable[[str], Path]
) -> None:
    """Against the model with a hook that keeps one place of the block's output alone."""
    make, names, _ = NETWORKS[kind]
    images = noise(1, 3, SIDE, SIDE)
    model = make()
    block = dict(model.named_modules())[names[-1]]
    with ccam.load(exported(kind)) as explainer:
        activations = explainer.networks.backbone(images)
        features, rest = activations.features[-1], activations.rest
        assert (rest is None) == (kind in ("shifted windows", "channels last"))
        alone = np.zeros_like(features)
        alone[:, :, 1, 2] = features[:, :, 1, 2]
        got = explainer.networks.head_logits(alone, rest)

    def keep_one(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept = torch.zeros_like(output)
        if rest is None:
            kept[:, 1, 2] = output[:, 1, 2]
            return kept
        place = rest.shape[1] + features.shape[-1] + 2
        kept[:, : rest.shape[1]] = output[:, : rest.shape[1]]
        kept[:, place] = output[:, place]
        return kept

    with torch.no_grad():
        whole = model(torch.from_numpy(images))
        handle = block.register_forward_hook(keep_one)
        expected = model(torch.from_numpy(images))
        handle.remove()
    assert (whole - expected).abs().max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
def test_any_block_can_be_named() -> None:
    layers = layers_of(seeded(TinyViT), ["blocks.1", "blocks.0"])
    assert [layer.name for layer in layers] == ["blocks.0", "blocks.1"]
    assert [layer.shape for layer in layers] == [(12, GRID, GRID)] * 2
    assert layers[0].rest_shape == (1, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.2", "has no influence on the logits, which read other tokens of it; name a layer"),
        ("head", 'layer "head" gives no feature map [batch, channels, height, width], nor tokens'),
        ("blocks.9", 'layer "blocks.9" is not in the model; it has '),
    ],
)
def test_names_that_give_no_map(name: str, message: str) -> None:
    with pytest.raises(LayerError, match=re.escape(message)):
        layers_of(seeded(TinyViT), [name])


@pytest.mark.slow
def test_an_error_says_which_modules_give_maps() -> None:
    with pytest.raises(LayerError, match=r"these do: patches, .*blocks\.0, blocks\.1"):
        layers_of(seeded(TinyViT), ["head"])


@pytest.mark.slow
def test_attention_inside_of_a_map_changes_no_choice() -> None:
    """Convolutions around attention give maps [B, C, h, w]; those are chosen as ever."""

    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2)
            self.mix = WindowBlock(8, 4, 0)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.head(self.down(x).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    layers = layers_of(Hybrid().eval())
    assert [layer.shape for layer in layers] == [(8, 8, 8), (8, 4, 4)]
    assert all(layer.arrangement is None for layer in layers)


@pytest.mark.slow
def test_branches_that_are_stacked_keep_a_free_batch() -> None:
    """A shape [2, B, ..] beside one of [B, B, ..] does not make the batch 2."""

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, padding=2)
            self.narrow, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            both = torch.stack([self.wide(x).relu(), self.narrow(x).relu()], 0)
            shares = both.mean((3, 4), keepdim=True).softmax(0)
            return self.head((both * shares).sum(0).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    program = build_program(trace_model(Selective().eval(), (3, 16, 16)))
    layers = find_layers(program)
    assert [layer.shape for layer in layers] == [(8, 8, 8)]
    size = program.image.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    assert not size.node.expr.is_Integer


def window_axes() -> Arrangement:
    """[B·windows, tokens, C] of windows of 2×3 in a map of 4×6."""
    batch = (Part("batch", 1), Part("row", 2, 2), Part("column", 2, 3))
    return Arrangement(
        (Axis(batch), Axis((Part("row", 2), Part("column", 3))), Axis((Part("channel", 5),)))
    )


@pytest.mark.parametrize(
    "arrangement",
    [
        window_axes(),
        Arrangement(
            (
                Axis((Part("batch", 1),)),
                Axis((Part("row", 4), Part("column", 6)), before=2, after=1),
                Axis((Part("channel", 5),)),
            )
        ),
        Arrangement(tuple(map_arrangement(5, 4, 6).axes[n] for n in (0, 3, 1, 2))),
        map_arrangement(5, 4, 6),
    ],
    ids=["windows", "tokens", "columns first", "plain"],
)
def test_maps_go_out_and_back(arrangement: Arrangement) -> None:
    """Of numbered values: the map holds each at its row, column and channel, and goes back."""
    features = torch.arange(2 * 5 * 4 * 6).view(2, 5, 4, 6)
    rest = None
    if arrangement.left_out:
        rest = -torch.arange(2 * 3 * 5).view(2, 3, 5)
    value = arrangement.from_map(features, rest)
    assert value.shape[0] == (2 if len(arrangement.axes[0].parts) == 1 else 8)
    torch.testing.assert_close(arrangement.to_map(value), features)
    if rest is not None:
        torch.testing.assert_close(arrangement.rest(value), rest)
        assert value[1, 2 + 6 * 3 + 5, 4] == features[1, 4, 3, 5]


def test_neighbours_on_a_mixed_axis_become_one_place() -> None:
    """Patches of 2×3 in a map of 4×6, behind one another on the last axis with their channels."""
    channels, batch = Axis((Part("channel", 7),)), Axis((Part("batch", 1),))
    inner = (Part("row", 2), Part("column", 3), Part("channel", 5))
    rows, columns = Axis((Part("row", 2, 2),)), Axis((Part("column", 2, 3),))
    merged = Arrangement((batch, rows, columns, Axis(inner))).mixed(-1, channels)
    assert merged is not None
    assert merged.is_map
    assert (merged.channels, *merged.grid) == (7, 2, 2)
    assert window_axes().mixed(1, channels) is not None
    assert window_axes().mixed(0, channels) is None, "windows are no neighbours"
    assert map_arrangement(5, 4, 6).mixed(2, channels) is not None, "columns have places yet"
    tokens = Arrangement((batch, Axis((Part("channel", 5),)), Axis((Part("row", 4),))))
    assert tokens.mixed(-1, channels) is None, "no place is left"


def test_windows_are_laid_out_in_rows() -> None:
    features = torch.arange(2 * 5 * 4 * 6).view(2, 5, 4, 6)
    value = window_axes().from_map(features)
    assert value.shape == (8, 6, 5)
    assert value[4 + 2, 3 + 1, 2] == features[1, 2, 2 + 1, 0 + 1]


def test_a_map_that_is_not_whole_is_none() -> None:
    half = Axis((Part("row", 2, 2),))
    axes = map_arrangement(5, 4, 6).axes
    assert not Arrangement((*axes[:2], half, axes[3])).is_map
    assert not Arrangement((*axes[:2], axes[2], axes[2])).is_map
    assert map_arrangement(5, 4, 6).is_map
    assert not map_arrangement(5, 1, 1).is_map
