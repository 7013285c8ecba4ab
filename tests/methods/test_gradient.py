"""Methods on the image's gradient against Captum, their definitions and PyTorch's autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr as captum

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from ccam_deploy.errors import OptionError
from ccam_deploy.methods import (
    XRAI,
    GuidedBackprop,
    IntegratedGradients,
    SmoothGrad,
)
from ccam_deploy.methods.image_gradient import even_chunk, reduce_channels
from tests.helpers import example_pictures, noise
from tests.methods.peers import Case, assert_same
from tests.networks import digits_model, tiny
from tests.reference import input_gradient_by_hooks


@pytest.fixture
def digits_case(differentiable: ccam.Explainer) -> Case:
    images, _ = differentiable.preprocess(example_pictures())
    classes = differentiable.networks.backbone(images).logits.argmax(axis=1)
    return Case(differentiable, digits_model(), images, tuple(map(int, classes)))


def one_hot(classes: tuple[int, ...], count: int) -> torch.Tensor:
    return torch.eye(count)[list(classes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "method"),
    [
        ("midpoint", "riemann_middle"),
        ("trapezoid", "riemann_trapezoid"),
        ("gauss-legendre", "gausslegendre"),
    ],
)
def test_integrated_gradients_are_captums(case: Case, rule: Any, method: str) -> None:
    """At the same places; Captum returns every channel, with its sign."""
    options = IntegratedGradients(8, rule, channels="sum")
    got = case.explain(options).raw_saliency
    peer = captum.IntegratedGradients(case.model)
    expected = peer.attribute(
        torch.from_numpy(case.images), target=list(case.classes), n_steps=8, method=method
    )
    # Captum's steps of the trapezoid rule are 1 / n wide, and not 1 / (n - 1).
    scale = 8 / 7 if rule == "trapezoid" else 1
    assert_same(got, scale * expected.sum(1).detach().numpy())


def test_captums_own_settings(digits_case: Case) -> None:
    """Its default is Gauss-Legendre quadrature of 50 steps, from zeros."""
    case = replace(digits_case, images=digits_case.images[:2], classes=digits_case.classes[:2])
    options = IntegratedGradients(rule="gauss-legendre", channels="sum")
    got = case.explain(options).raw_saliency
    expected = captum.IntegratedGradients(case.model).attribute(
        torch.from_numpy(case.images), target=list(case.classes)
    )
    assert_same(got, expected.sum(1).detach().numpy())


@pytest.mark.slow
def test_guided_backprop_is_captums(case: Case) -> None:
    got = case.explain(GuidedBackprop("sum")).raw_saliency
    images = torch.from_numpy(case.images).requires_grad_()
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = captum.GuidedBackprop(case.model).attribute(images, target=list(case.classes))
    assert_same(got, expected.sum(1).detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq"])
def test_smoothgrad_is_captums(case: Case, nt_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise: Captum's own cannot be given, so it is put in the place of PyTorch's."""
    options = SmoothGrad(4, 0.1, 3, square=nt_type == "smoothgrad_sq", channels="sum")
    got = case.explain(options).raw_saliency
    shape = case.images.shape[1:]
    draws = [np.random.default_rng((3, n)).standard_normal(shape, np.float32) for n in range(4)]
    same = torch.from_numpy(np.stack(draws))
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: mean + deviation * same)
    peer = captum.NoiseTunnel(captum.Saliency(case.model))
    for one, image, target in zip(got, case.images, case.classes, strict=True):
        values = peer.attribute(
            torch.from_numpy(image[None].copy()),
            nt_type=nt_type,
            nt_samples=4,
            stdevs=0.1 * float(np.ptp(image)),
            target=target,
            abs=False,
        )
        assert_same(one[None], values.sum(1).detach().numpy())


@pytest.mark.parametrize("square", [False, True])
def test_smoothgrad_by_its_definition(headed_bundle: Path, square: bool) -> None:
    images = noise(2, 3, 32, 48)
    options = SmoothGrad(5, 0.2, 7, square)
    with ccam.load(headed_bundle) as explainer:
        got = explainer.explain(images, [1, 3], method=options).raw_saliency
    total = torch.zeros(2, 3, 32, 48)
    spread = 0.2 * (images.max(axis=(1, 2, 3)) - images.min(axis=(1, 2, 3)))[:, None, None, None]
    for sample in range(5):
        random = np.random.default_rng((7, sample)).standard_normal((3, 32, 48), np.float32)
        copies = torch.from_numpy((images + spread * random).astype(np.float32))
        gradient = input_gradient_by_hooks(tiny(), copies, one_hot((1, 3), 5))
        total += (gradient**2 if square else gradient) / 5
    np.testing.assert_allclose(got, total.abs().sum(1).numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid", "gauss-legendre"])
@pytest.mark.parametrize("baseline", ["zero", "black", "white"])
def test_completeness(headed_bundle: Path, rule: Any, baseline: Any) -> None:
    """The values add up to the logit's increase, to 1 % of it at 300 steps."""
    images = noise(2, 3, 32, 48)
    options = IntegratedGradients(300, rule, baseline, "sum")
    with ccam.load(headed_bundle) as explainer:
        got = explainer.explain(images, [1, 3], method=options)
        how = explainer.bundle.manifest.preprocessing
    level = {"black": 0.0, "white": 1.0}.get(baseline)
    start = np.zeros(3) if level is None else (level - np.array(how.mean)) / np.array(how.std)
    origin = np.broadcast_to(start.astype(np.float32)[:, None, None], (1, 3, 32, 48)).copy()
    with torch.no_grad():
        logits = tiny()(torch.from_numpy(np.concatenate([origin, images])))
    increase = (logits[1:] - logits[0])[[0, 1], [1, 3]].numpy()
    sums = got.raw_saliency.sum(axis=(1, 2))
    np.testing.assert_allclose(sums, increase, atol=0.01 * np.abs(increase).max())


@pytest.mark.slow
def test_chunks_and_classes_do_not_matter(headed_bundle: Path) -> None:
    """A batch of one at a time, or several classes of an image, give the same maps."""
    images = noise(2, 3, 32, 48)
    for method in ("integrated-gradients", "smoothgrad", "guided-backprop", "xrai"):
        with ccam.load(headed_bundle, batch_size=1) as explainer:
            alone = explainer.explain(images, [[1, 2], 3], method=method).raw_saliency
        with ccam.load(headed_bundle, batch_size=7) as explainer:
            together = explainer.explain(images, [[1, 2], 3], method=method).raw_saliency
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-6)
        assert not np.allclose(alone[0], alone[1])


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (50, 16, 10),
        (100, 16, 10),
        (150, 16, 15),
        (48, 16, 16),
        (51, 16, 16),
        (5, 16, 16),
        (7, 1, 1),
    ],
)
def test_chunks_are_even_where_half_of_the_most_will_do(
    count: int, most: int, expected: int
) -> None:
    assert even_chunk(count, most) == expected


@pytest.mark.parametrize("method", ["integrated-gradients", "smoothgrad"])
def test_an_image_is_differentiated_in_chunks_of_one_size(
    headed_bundle: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ccam.load(headed_bundle) as explainer:
        rows: list[int] = []
        gradient = explainer.networks.input_gradient

        def counted(images: Floats, output_gradient: Floats) -> Floats:
            rows.append(len(images))
            return gradient(images, output_gradient)

        monkeypatch.setattr(explainer.networks, "input_gradient", counted)
        explainer.explain(noise(1, 3, 32, 48), method=method)
    assert sum(rows) == 50
    assert len(set(rows)) == 1


def test_channels() -> None:
    values = np.array([[[[1.0]], [[-3.0]], [[1.0]]]], np.float32)
    found = [
        float(reduce_channels(values, how)[0, 0, 0])
        for how in ("absolute", "maximum", "positive", "sum")
    ]
    assert found == [5, 3, 2, -1]


def test_an_image_that_is_its_baseline(headed_bundle: Path) -> None:
    """Nothing to explain: the map is zero, and the other methods go on."""
    images = np.zeros((1, 3, 32, 48), np.float32)
    with ccam.load(headed_bundle) as explainer:
        result = explainer.explain(images, 1, method="integrated-gradients")
        assert not result.raw_saliency.any()
        assert not result.saliency.any()
        for method in ("smoothgrad", "guided-backprop", "xrai"):
            assert np.isfinite(explainer.explain(images, 1, method=method).saliency).all()


@pytest.mark.parametrize(
    "method", ["integrated-gradients", "smoothgrad", "guided-backprop", "xrai"]
)
def test_a_bundle_without_gradients(tiny_bundle: Path, method: str) -> None:
    with (
        ccam.load(tiny_bundle) as explainer,
        pytest.raises(OptionError, match="export it with --gradients"),
    ):
        explainer.explain(noise(1, 3, 32, 48), 1, method=method)


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        (IntegratedGradients, "steps", 0, "steps is 0; with rule midpoint it must be 1 to"),
        (IntegratedGradients, "rule", "simpson", 'rule is "simpson"; it must be midpoint'),
        (IntegratedGradients, "baseline", "red", 'baseline is "red"; it must be zero'),
        (IntegratedGradients, "channels", "mean", 'channels is "mean"; it must be abs'),
        (SmoothGrad, "samples", 0, "samples is 0"),
        (SmoothGrad, "noise", float("nan"), "noise is nan"),
        (SmoothGrad, "seed", -1, "seed is -1"),
        (GuidedBackprop, "channels", "", 'channels is ""'),
        (XRAI, "dilation", -1, "dilation is -1"),
        (XRAI, "least", 0, "least is 0"),
    ],
)
def test_unusable_options(method: type, option: str, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(**{option: value})


@pytest.mark.parametrize(
    ("steps", "rule", "message"),
    [
        (1, "trapezoid", "steps is 1; with rule trapezoid it must be 2 to 100000"),
        (1001, "gauss-legendre", "steps is 1001; with rule gauss-legendre it must be 1 to 1000"),
    ],
)
def test_steps_that_a_rule_does_not_have(steps: int, rule: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        IntegratedGradients(steps, rule)
