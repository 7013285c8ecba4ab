"""What bundles are compared with: hooks, autograd and Collection-CAM written plainly in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.helpers import ratio_by_definition


def features_and_gradients(
    model: nn.Module, images: Tensor, names: Sequence[str], classes: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, feature maps and gradients of the classes' logits, by hooks and autograd.

    A name ends in :N where a module's Nth call is meant, and not its last.
    """
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str, number: str) -> Any:
        calls = count(1)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if number in ("", str(next(calls))):
                kept[name] = output

        return hook

    handles = []
    for name in names:
        path, _, number = name.partition(":")
        handles.append(modules[path].register_forward_hook(keep(name, number)))
    try:
        logits = model(images.requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    chosen = logits[torch.arange(len(images)), torch.tensor(classes)].sum()
    features = [kept[name] for name in names]
    gradients = torch.autograd.grad(chosen, features)
    return logits.detach(), [value.detach() for value in features], list(gradients)


def input_gradient_by_hooks(
    model: nn.Module, images: Tensor, output_gradient: Tensor, guided: bool = False
) -> Tensor:
    """The images' gradient by autograd; guided as published, by a hook on every ReLU module.

    The model's ReLUs are changed: give a model of its own.
    """
    for module in model.modules():
        if guided and isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_full_backward_hook(_positive_part)
    inputs = images.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs), inputs, output_gradient)
    return gradient


def _positive_part(module: nn.Module, inward: Any, outward: Any) -> Any:
    return tuple(gradient.clamp(min=0) for gradient in inward)


def _fast_ward(psi: NDArray[np.float64], k_max: int) -> dict[int, NDArray[np.int64]]:
    """Labels for 2..k_max collections: bottom-up merging on a matrix of merging costs."""
    count = len(psi)
    sizes, centroids = np.ones(count), psi.copy()
    labels, alive = np.arange(count), np.ones(count, bool)
    found = {}
    for left in range(count, 1, -1):
        if left <= k_max:
            found[left] = labels.copy()
        gap = ((centroids[:, None] - centroids[None]) ** 2).sum(-1)
        cost = gap * sizes[:, None] * sizes[None] / (sizes[:, None] + sizes[None])
        cost[~alive] = np.inf
        cost[:, ~alive] = np.inf
        np.fill_diagonal(cost, np.inf)
        i, j = divmod(int(cost.argmin()), count)
        centroids[i] = (sizes[i] * centroids[i] + sizes[j] * centroids[j]) / (sizes[i] + sizes[j])
        sizes[i] += sizes[j]
        alive[j] = False
        labels[labels == j] = i
    return found


def collection_cam_in_pytorch(
    model: nn.Module,
    image: Tensor,
    target: int,
    names: Sequence[str],
    theta: float = 0.1,
    k_max: int = 10,
    probability: bool = False,
) -> tuple[Tensor, list[list[list[int]]]]:
    """The paper's Algorithm 1 with hooks and a masked forward each.

    Returns the map before it is scaled, [H, W], and each layer's partition.
    """
    size = image.shape[-2:]

    def score(logits: Tensor) -> Tensor:
        return (logits.softmax(1) if probability else logits)[:, target]

    modules = dict(model.named_modules())
    kept: dict[str, Tensor] = {}
    handles = [
        modules[name].register_forward_hook(
            lambda module, inputs, output, name=name: kept.__setitem__(name, output)
        )
        for name in names
    ]
    total = score(model(image[None].clone().requires_grad_())).sum()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(total, [kept[name] for name in names])
    masks, partitions = [], []
    for level, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        a, g = kept[name].detach()[0], gradient[0]
        psi = torch.stack(
            [a.mean((1, 2)), a.std((1, 2), False), g.mean((1, 2)), g.std((1, 2), False)], 1
        )
        points = psi.double().numpy()
        candidates = []
        for k, labels in sorted(_fast_ward(points, k_max).items()):
            partition = [np.flatnonzero(labels == v).tolist() for v in dict.fromkeys(labels)]
            candidates.append((ratio_by_definition(points, partition), -k, partition))
        partition = max(candidates)[2]
        partitions.append(partition)
        for members in partition:
            if level + 1 < len(names):
                kept_values = torch.where(g[members] > 0, a[members], torch.zeros(()))
                low = F.relu(kept_values.sum(0))
            else:
                low = F.relu((g[members].mean((1, 2), keepdim=True) * a[members]).sum(0))
            # In double precision, so that a plateau stays flat and the quantile can tell it.
            wide = F.interpolate(low[None, None].double(), size, mode="bilinear")[0, 0]
            masks.append(wide.float())
    normal = []
    for mask in masks:
        threshold = float(np.percentile(mask.numpy(), 100 * theta))
        mask = torch.where(mask > threshold, mask, torch.zeros(()))
        if mask.max() > mask.min():
            normal.append((mask - mask.min()) / (mask.max() - mask.min()))
    stacked = torch.stack(normal)
    with torch.no_grad():
        black = score(model(torch.zeros_like(image)[None]))
        alpha = (score(model(image * stacked[:, None])) - black).softmax(0)
        return F.relu((alpha[:, None, None] * stacked).sum(0)), partitions
