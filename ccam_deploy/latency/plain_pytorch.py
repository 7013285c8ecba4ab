"""Collection-CAM as the paper describes it: PyTorch, and one forward for each mask.

What a careful user would write without this package, with SciPy for the clustering; benchmarks
compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor, nn

from ccam_deploy.arrays import Floats
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.autodiff import Recorder
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model

Record = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""images -> logits, and the layers' feature maps, under autograd."""


class PlainCollectionCAM:
    """Explains one image at a time.

    classify: images [B, C, H, W] -> logits.   record: see Record; the shallowest layer first.
    device: PyTorch's name of where both run.
    """

    def __init__(
        self,
        classify: nn.Module,
        record: Record,
        device: str = "cpu",
        theta: float = 0.1,
        k_max: int = 10,
    ) -> None:
        self.classify = classify
        self.record = record
        self.device = device
        self.theta = theta
        self.k_max = k_max

    def explain(self, image: Tensor, target: int | None = None) -> tuple[Tensor, int]:
        """image: [C, H, W], preprocessed. Returns the map [H, W] and the number of masks."""
        logits, features = self.record(image[None].requires_grad_())
        chosen = int(logits[0].argmax()) if target is None else target
        gradients = torch.autograd.grad(logits[0, chosen], features)
        masks = []
        for index, (a, g) in enumerate(zip(features, gradients, strict=True)):
            final = index + 1 == len(features)
            masks += self._layer_masks(a.detach()[0], g[0], final, image.shape[1:])
        weights = []
        with torch.no_grad():
            base = self.classify(torch.zeros_like(image)[None])[0, chosen]
            for mask in masks:
                weights.append(self.classify((image * mask)[None])[0, chosen] - base)
            alpha = torch.stack(weights).softmax(0)
            combined = F.relu((alpha[:, None, None] * torch.stack(masks)).sum(0))
        return combined, len(masks)

    def explain_each(self, images: Floats, targets: NDArray[np.int64]) -> list[Floats]:
        """Explain images [B, C, H, W], one after the other; returns their maps [H, W]."""
        return [
            self.explain(torch.from_numpy(image).to(self.device), int(target))[0].cpu().numpy()
            for image, target in zip(images.copy(), targets, strict=True)
        ]

    def logits(self, images: Floats) -> Floats:
        """The classifier's logits [B, classes] of images [B, C, H, W]."""
        with torch.no_grad():
            found = self.classify(torch.from_numpy(images.copy()).to(self.device))
        return found.cpu().numpy()  # type: ignore[no-any-return]

    def _layer_masks(
        self, a: Tensor, g: Tensor, final: bool, size: tuple[int, ...] | torch.Size
    ) -> list[Tensor]:
        psi = torch.stack(
            [a.mean((1, 2)), a.std((1, 2), False), g.mean((1, 2)), g.std((1, 2), False)], 1
        )
        labels = self._partition(psi.double().cpu()).to(a.device)
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


def of_model(
    model: Model, layers: Sequence[str], input_shape: tuple[int, int, int], device: str = "cpu"
) -> PlainCollectionCAM:
    """Plain Collection-CAM of a model: with hooks where it has the layers as modules.

    Programs, scripts, and models with layers that are no modules are run from their trace,
    operator by operator.
    layers: names, the shallowest first.   input_shape: channels, height, width.
    device: PyTorch's name of where to run.
    Raises SourceError or LayerError for another model than these layers are of.
    """
    if isinstance(model, nn.Module):
        known = dict(model.named_modules())
        if all(name in known for name in layers):
            model.eval().to(device)
            return PlainCollectionCAM(model, hooks(model, layers), device)
        model = trace_model(model, input_shape)
    program = build_program(model, keep=layers, fold=False)
    nodes = [layer.node for layer in find_layers(program, layers)]
    program.graph.to(device)

    def record(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        recorder = Recorder(program.graph, nodes)
        (logits,) = recorder.run(images)
        return logits, [recorder.kept[node] for node in nodes]

    return PlainCollectionCAM(_FirstOutput(program.graph), record, device)


def best_device() -> str:
    """PyTorch's name of the GPU where it can use one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Let PyTorch use so many threads in an operator, in the whole process; 0 changes nothing."""
    if count:
        torch.set_num_threads(count)


def hooks(model: nn.Module, layers: Sequence[str]) -> Record:
    """Record the outputs of a model's modules, by name."""
    modules = dict(model.named_modules())

    def record(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                kept[name] = output

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
        try:
            logits = model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, [kept[name] for name in layers]

    return record


class _FirstOutput(nn.Module):
    """The one tensor in the tuple that a traced graph gives."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.graph(images)
        return logits  # type: ignore[no-any-return]


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
