"""CAM, Grad-CAM, Grad-CAM++ and Layer-CAM against TorchCAM, Captum and their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor, nn
from torchcam import methods as torchcam

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.engines import Activations
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.export import export
from ccam_deploy.methods import (
    CAM,
    METHODS,
    Batch,
    GradCAM,
    GradCAMPlusPlus,
    LayerCAM,
    Method,
    Stopwatch,
)
from tests.helpers import noise
from tests.methods.peers import Case, assert_same, enlarged
from tests.networks import tiny
from tests.reference import features_and_gradients

ACTIVATION = ("cam", "grad-cam", "grad-cam++", "layer-cam")
EXACT = 1e-4
"""How far off maps may be where no ReLU stands between the logit and the layer."""


def size(case: Case) -> tuple[int, ...]:
    return case.images.shape[2:]


def test_grad_cam_is_torchcams(case: Case) -> None:
    (expected,) = case.torchcam(torchcam.GradCAM, case.layers[-1:])
    result = case.explain("grad-cam")
    assert_same(result.raw_saliency, enlarged(expected, size(case)), EXACT)


def test_grad_cam_with_its_signs_is_captums(case: Case) -> None:
    module = dict(case.model.named_modules())[case.layers[-1]]
    peer = LayerGradCam(case.model, module)
    maps = peer.attribute(torch.from_numpy(case.images.copy()), target=list(case.classes))
    result = case.explain(GradCAM(relu=False))
    assert result.raw_saliency.min() < 0
    assert_same(result.raw_saliency, enlarged(maps[:, 0], size(case)), EXACT)


def test_layer_cam_of_each_layer_is_torchcams(case: Case) -> None:
    for layer, expected in zip(
        case.layers, case.torchcam(torchcam.LayerCAM, case.layers), strict=True
    ):
        result = case.explain(LayerCAM(layers=(layer,)))
        assert_same(result.raw_saliency, enlarged(expected, size(case)))


@pytest.mark.parametrize("scaling", ["all", "shallow", "none"])
def test_layer_cam_of_all_layers(case: Case, scaling: Any) -> None:
    """With "all" it is TorchCAM's fusion, which lifts the deepest map too."""
    maps = [
        map_ / map_.amax((1, 2), True) for map_ in case.torchcam(torchcam.LayerCAM, case.layers)
    ]
    if scaling == "all":
        expected = np.asarray(torchcam.LayerCAM.fuse_cams(maps, size(case)))  # type: ignore[arg-type]
    else:
        lifted = [torch.tanh(2 * map_) for map_ in maps[:-1]] if scaling == "shallow" else maps[:-1]
        expected = np.maximum.reduce([enlarged(m, size(case)) for m in [*lifted, maps[-1]]])
    options = LayerCAM(layers=tuple(case.layers), scaling=scaling)
    result = case.explain(options)
    assert_same(result.raw_saliency, expected)
    assert result.raw_saliency.max() <= 1


def test_cam_is_torchcams(case: Case) -> None:
    head = [name for name, module in case.model.named_modules() if isinstance(module, nn.Linear)]
    (expected,) = case.torchcam(torchcam.CAM, case.layers[-1:], fc_layer=head[0])
    result = case.explain("cam")
    assert result.raw_saliency.min() < 0
    assert_same(result.raw_saliency, enlarged(expected, size(case)), EXACT)


def test_grad_cam_plus_plus_is_torchcams_where_epsilon_outweighs_the_rest(case: Case) -> None:
    """TorchCAM 0.5 does not divide by alpha's denominator; a large epsilon makes that a scale."""
    (expected,) = case.torchcam(torchcam.GradCAMpp, case.layers[-1:])
    result = case.explain(GradCAMPlusPlus(epsilon=1e12))
    scaled = result.raw_saliency * np.float32(1e12)
    assert_same(scaled, enlarged(expected, size(case)), EXACT)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_grad_cam_plus_plus_follows_its_equations(case: Case, epsilon: float) -> None:
    """From autograd's features and gradients, channel by channel, in double precision."""
    images = torch.from_numpy(case.images.copy())
    _, features, gradients = features_and_gradients(
        case.model, images, case.layers[-1:], case.classes
    )
    result = case.explain(GradCAMPlusPlus(epsilon=epsilon))
    for pair, got in enumerate(result.raw_saliency):
        total = torch.zeros(features[0].shape[2:], dtype=torch.float64)
        for a, g in zip(features[0][pair].double(), gradients[0][pair].double(), strict=True):
            below = 2 * g**2 + a.sum() * g**3 + epsilon
            alpha = torch.where(below != 0, g**2 / below, 0)
            total += (alpha * g.relu()).sum() * a
        expected = enlarged(total.relu()[None], size(case))
        assert_same(got[None], expected, EXACT)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_alpha_follows_from_the_derivatives_of_the_exponential(
    tiny_bundle: Path, epsilon: float
) -> None:
    """Alpha (eq. 10) from second and third derivatives, place by place, in double precision."""
    model = tiny().double()
    images = noise(2, 3, 32, 48)
    with ccam.load(tiny_bundle) as explainer:
        options = GradCAMPlusPlus(epsilon=epsilon)
        result = explainer.explain(images, [1, 4], method=options)
    for image, target, got in zip(images, (1, 4), result.raw_saliency, strict=True):
        features = features_of(model, torch.from_numpy(image).double()[None])[0]

        def logit(values: Tensor, target: int = target) -> Tensor:
            scores: Tensor = model.head(values.mean((1, 2)))
            return scores[target]

        first, second, third = derivatives_at_each_place(logit, features)
        total = features.sum((1, 2), keepdim=True)
        # The exponential's own value cancels in alpha where epsilon is 0.
        alpha = second / (2 * second + total * third + epsilon * torch.exp(logit(features)))
        weights = (alpha * first.relu()).sum((1, 2))
        expected = torch.einsum("c,cij->ij", weights, features).relu().detach()
        assert expected.max() > 0
        np.testing.assert_allclose(
            got, enlarged(expected[None], (32, 48))[0], atol=1e-5 * float(expected.max())
        )


def features_of(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        inner = model.relu1(model.norm1(model.conv1(images)))
        features: Tensor = model.relu2(model.conv2(inner))
    return features


def derivatives_at_each_place(logit: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logit the first, of its exponential the second and third derivative by each value."""
    places = torch.eye(features.numel(), dtype=features.dtype).reshape(-1, *features.shape)
    zero = torch.zeros((), dtype=features.dtype)

    def along(place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def moved(step: Tensor) -> Tensor:
            value: Tensor = logit(features + step * place)
            return value

        def power(step: Tensor) -> Tensor:
            return torch.exp(moved(step))

        grad = torch.func.grad
        return grad(moved)(zero), grad(grad(power))(zero), grad(grad(grad(power)))(zero)

    found = torch.func.vmap(along)(places)
    one, two, three = (value.reshape(features.shape) for value in found)
    return one, two, three


@pytest.mark.parametrize("method", ACTIVATION)
def test_batches_and_several_classes(case: Case, method: str) -> None:
    """Pairs of one call equal each on its own, in the order asked for."""
    whole = case.explainer.explain(case.images[:2], [[1, 4], 2], method=method)
    assert whole.targets.tolist() == [1, 4, 2]
    for pair, (image, target) in enumerate([(0, 1), (0, 4), (1, 2)]):
        one = case.explainer.explain(case.images[image : image + 1], target, method=method)
        scale = float(np.abs(one.raw_saliency).max())
        np.testing.assert_allclose(whole.raw_saliency[pair], one.raw_saliency[0], atol=1e-4 * scale)


def test_layers_can_be_chosen(case: Case) -> None:
    layer = case.layers[1]
    (expected,) = case.torchcam(torchcam.GradCAM, [layer])
    result = case.explain(GradCAM(layer=layer))
    assert_same(result.raw_saliency, enlarged(expected, size(case)))


@pytest.mark.parametrize(
    "method",
    [
        CAM(layer="layer9"),
        GradCAM(layer="layer9"),
        GradCAMPlusPlus(layer="layer9"),
        LayerCAM(layers=("relu1", "layer9")),
    ],
)
def test_unknown_layer_is_named(tiny_bundle: Path, method: Method) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match='"layer9" is not in the bundle; it has relu1, relu2'),
    ):
        explainer.explain(noise(1, 3, 32, 48), method=method)


class Head(nn.Module):
    """Two layers after the pooling: the pooled feature maps enter the logits, but not linearly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.relu = nn.ReLU()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.relu(self.stem(x)).mean((2, 3))
        logits: Tensor = self.outer(torch.relu(self.inner(pooled)))
        return logits


@pytest.mark.slow
def test_cam_refuses_a_head_of_two_layers(tmp_path: Path) -> None:
    bundle = export(Head().eval(), tmp_path / "head", (16, 16))
    with ccam.load(bundle) as explainer:
        assert explainer.explain(noise(1, 3, 16, 16), 1, method="grad-cam").raw_saliency.max() > 0
        with pytest.raises(OptionError, match='cam needs logits that are linear in the mean of "r'):
            explainer.explain(noise(1, 3, 16, 16), 1, method="cam")


def test_cam_refuses_a_shallow_layer(tiny_bundle: Path) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match='linear in the mean of "relu1"'),
    ):
        explainer.explain(noise(1, 3, 32, 48), 1, method=CAM(layer="relu1"))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (GradCAMPlusPlus, {"epsilon": -1.0}, "epsilon is -1.0"),
        (GradCAMPlusPlus, {"epsilon": np.inf}, "epsilon is inf"),
        (LayerCAM, {"gamma": 0.0}, "gamma is 0.0"),
        (LayerCAM, {"scaling": "deep"}, 'scaling is "deep"; it must be shallow, all or'),
        (LayerCAM, {"layers": ("a", "b"), "relu": False}, "relu is false; the maps of"),
    ],
)
def test_options_out_of_range(method: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(**changes)


class Given:
    """A classifier of one layer whose features and gradients are given."""

    def __init__(self, features: Floats, gradients: Floats) -> None:
        self.features, self.slopes = features, gradients

    def backbone(self, images: Floats) -> Activations:
        rows = len(images)
        return Activations(np.zeros((rows, 3), np.float32), (self.features[:rows],), {})

    def gradients(self, activations: Activations, output_gradient: Floats) -> tuple[Floats, ...]:
        return (self.slopes[: len(output_gradient)],)

    def masked_logits(self, images: Floats, masks: Floats, owner: NDArray[np.int64]) -> Floats:
        raise AssertionError("these methods mask nothing")

    def head_logits(self, features: Floats, rest: Floats | None = None) -> Floats:
        raise AssertionError("these methods need no head")

    def input_gradient(
        self, images: Floats, output_gradient: Floats, guided: bool = False
    ) -> Floats:
        raise AssertionError("these methods need no gradient of the image")

    def excitation(self, images: Floats, winners: Floats, duals: Floats) -> tuple[Floats, ...]:
        raise AssertionError("these methods need no winning probabilities")

    def batch(self) -> Batch:
        pairs = len(self.features)
        images = np.zeros((pairs, 3, 8, 12), np.float32)
        owner, targets = np.arange(pairs), np.ones(pairs, np.int64)
        zeros = np.zeros(3, np.float32)
        return Batch(images, self.backbone(images), owner, targets, ("last",), zeros, 4)


values = st.sampled_from([0.0, 1.0, -1.0, 1e-30, -1e-30, 1e9, 2.5]) | st.floats(-1e6, 1e6, width=32)
maps = arrays(np.float32, (2, 3, 2, 3), elements=values)
VARIED: Mapping[str, tuple[Method, ...]] = {
    "grad-cam": (GradCAM(), GradCAM(relu=False)),
    "grad-cam++": (GradCAMPlusPlus(), GradCAMPlusPlus(epsilon=1e-6)),
    "layer-cam": (LayerCAM(), LayerCAM(relu=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
@settings(max_examples=60)
@given(features=maps, gradients=maps)
def test_any_features_and_gradients_give_finite_maps(
    name: str, features: Floats, gradients: Floats
) -> None:
    """Constant features, zero gradients, values that cancel: finite, in [0, 1], no warning."""
    classifier = Given(features, gradients)
    for method in VARIED[name]:
        result = method.explain(classifier, classifier.batch(), Stopwatch())
        assert result.raw_saliency.shape == result.saliency.shape == (2, 8, 12)
        assert np.isfinite(result.raw_saliency).all()
        assert ((result.saliency >= 0) & (result.saliency <= 1)).all()
        assert result.layers == ()
        assert [len(masks) for masks in result.masks] == [0, 0]
        assert [len(weights) for weights in result.weights + result.mic] == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ACTIVATION)
def test_zero_gradients_give_zeros(method: str) -> None:
    classifier = Given(np.ones((2, 3, 2, 3), np.float32), np.zeros((2, 3, 2, 3), np.float32))
    result = METHODS[method]().explain(classifier, classifier.batch(), Stopwatch())
    assert not result.raw_saliency.any()
    assert not result.saliency.any()


@pytest.mark.parametrize("method", ACTIVATION)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(method: str, value: float) -> None:
    features = np.ones((1, 3, 2, 3), np.float32)
    features[0, 1, 1, 1] = value
    classifier = Given(features, np.ones_like(features))
    with pytest.raises(BackendError, match='layer "last" has NaN or infinite features'):
        METHODS[method]().explain(classifier, classifier.batch(), Stopwatch())
