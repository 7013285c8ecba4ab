"""Collection-CAM as the paper describes it: PyTorch, hooks, one forward for each mask.

What a careful user would write without this package, with SciPy for the clustering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor, nn


class PlainCollectionCAM:
    """Explains one image at a time. layers: module names, the shallowest first."""

    def __init__(
        self, model: nn.Module, layers: Sequence[str], theta: float = 0.1, k_max: int = 10
    ) -> None:
        self.model = model.eval()
        self.layers = tuple(layers)
        self.theta = theta
        self.k_max = k_max

    def explain(self, image: Tensor, target: int | None = None) -> tuple[Tensor, int]:
        """image: [C, H, W], preprocessed. Returns the map [H, W] and the number of masks."""
        features, gradients, target = self._features(image, target)
        masks = []
        for name in self.layers:
            final = name == self.layers[-1]
            masks += self._layer_masks(features[name], gradients[name], final, image.shape[1:])
        weights = []
        with torch.no_grad():
            base = self.model(torch.zeros_like(image)[None])[0, target]
            for mask in masks:
                weights.append(self.model((image * mask)[None])[0, target] - base)
            alpha = torch.stack(weights).softmax(0)
            combined = F.relu((alpha[:, None, None] * torch.stack(masks)).sum(0))
        return combined, len(masks)

    def _features(
        self, image: Tensor, target: int | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                kept[name] = output

            return hook

        modules = dict(self.model.named_modules())
        handles = [modules[name].register_forward_hook(keep(name)) for name in self.layers]
        try:
            logits = self.model(image[None].requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        chosen = int(logits[0].argmax()) if target is None else target
        found = torch.autograd.grad(logits[0, chosen], [kept[name] for name in self.layers])
        features = {name: value.detach()[0] for name, value in kept.items()}
        return features, {n: g[0] for n, g in zip(self.layers, found, strict=True)}, chosen

    def _layer_masks(
        self, a: Tensor, g: Tensor, final: bool, size: tuple[int, ...] | torch.Size
    ) -> list[Tensor]:
        psi = torch.stack(
            [a.mean((1, 2)), a.std((1, 2), False), g.mean((1, 2)), g.std((1, 2), False)], 1
        ).double()
        labels = self._partition(psi)
        masks = []
        for value in range(int(labels.max()) + 1):
            members = labels == value
            if final:
                low = F.relu((g[members].mean((1, 2), keepdim=True) * a[members]).sum(0))
            else:
                low = F.relu((a[members] * (g[members] > 0)).sum(0))
            mask = F.interpolate(low[None, None], tuple(size), mode="bilinear")[0, 0]
            mask = torch.where(mask > torch.quantile(mask, self.theta), mask, 0.0)
            if mask.max() > 0:
                masks.append(mask / mask.max())
        return masks

    def _partition(self, psi: Tensor) -> Tensor:
        tree = linkage(pdist(psi.numpy()), "ward")
        best, chosen = -np.inf, torch.zeros(len(psi), dtype=torch.int64)
        for count in range(2, self.k_max + 1):
            labels = torch.from_numpy(fcluster(tree, count, "maxclust").astype(np.int64)) - 1
            ratio = _ratio(psi, labels)
            if ratio > best:
                best, chosen = ratio, labels
        return chosen


def _ratio(psi: Tensor, labels: Tensor) -> float:
    count = int(labels.max()) + 1
    members = F.one_hot(labels, count).double()
    sizes = members.sum(0)
    centroids = members.t() @ psi / sizes[:, None]
    dispersion = members.t() @ (psi - centroids[labels]).square().sum(1) / sizes
    distance = torch.cdist(centroids, centroids).square().fill_diagonal_(torch.inf)
    separation = distance.min(1).values
    ratio = ((separation - dispersion) / (separation + dispersion)).nan_to_num()
    return float(ratio.mean())
