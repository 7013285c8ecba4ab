"""Compares a bundle with the network that it was exported from."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import ccam_deploy as ccam
from ccam_deploy.arrays import Floats
from tests.reference import features_and_gradients


def assert_agrees(explainer: ccam.Explainer, model: nn.Module, images: Floats) -> None:
    """The network itself, with hooks on the target layers that are modules."""
    modules = dict(model.named_modules())
    manifest = explainer.bundle.manifest
    names = [layer.name for layer in manifest.layers]
    hooked = [name for name in names if name.partition(":")[0] in modules]
    assert len(hooked) >= 3
    activations = explainer.networks.backbone(images)
    classes = activations.logits.argmax(1)
    one_hot = np.eye(manifest.classes, dtype=np.float32)[classes]
    gradients = explainer.networks.gradients(activations, one_hot)
    logits, features, expected = features_and_gradients(
        model, torch.from_numpy(images.copy()), hooked, classes.tolist()
    )
    np.testing.assert_allclose(activations.logits, logits, atol=2e-3 * float(logits.abs().max()))
    for index, name in enumerate(hooked):
        place = names.index(name)
        assert _relative(activations.features[place], features[index].numpy()) < 1e-2
        assert _relative(gradients[place], expected[index].numpy()) < 0.2


def _relative(actual: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
