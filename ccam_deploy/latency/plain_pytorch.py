"""Collection-CAM as the paper describes it: PyTorch, and one forward for each mask.

A careful user without this package would write it so, with SciPy for the clustering. Benchmarks
and `ccam-deploy bench --compare torch` compare with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor, nn

from ccam_deploy.arrays import Classes, Floats
from ccam_deploy.bundle.manifest import Activation
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.autodiff import Recorder
from ccam_deploy.export.from_onnx.network import OnnxNetwork
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.scores import with_logits

Record = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""Maps images [B, C, H, W] to logits and the layers' feature maps, under autograd."""


class PlainCollectionCAM:
    """Explains one image at a time.

    Attributes:
        classify: Maps images [B, C, H, W] to logits [B, classes].
        record: See Record; gives the shallowest layer first.
        device: PyTorch's name of where both run.
        theta: The quantile below which a mask is set to 0, in [0, 1).
        k_max: The most collections of a layer.
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
        """Explain a class of an image.

        Args:
            image: [C, H, W] float32, preprocessed.
            target: The class; None for the one with the highest logit.

        Returns:
            The map [H, W], not scaled, and the number of masks.
        """
        logits, features = self.record(image[None].requires_grad_())
        label = int(logits[0].argmax()) if target is None else target
        gradients = torch.autograd.grad(logits[0, label], features)
        masks = []
        for index, (a, g) in enumerate(zip(features, gradients, strict=True)):
            final = index + 1 == len(features)
            masks += self._layer_masks(a.detach()[0], g[0], final, image.shape[1:])
        weights = []
        with torch.no_grad():
            base = self.classify(torch.zeros_like(image)[None])[0, label]
            for mask in masks:
                weights.append(self.classify((image * mask)[None])[0, label] - base)
            alpha = torch.stack(weights).softmax(0)
            combined = F.relu((alpha[:, None, None] * torch.stack(masks)).sum(0))
        return combined, len(masks)

    def explain_each(self, images: Floats, targets: Classes) -> list[Floats]:
        """Explain a class of each image [B, C, H, W], one after the other: B maps [H, W]."""
        return [
            self.explain(torch.from_numpy(image).to(self.device), int(target))[0].cpu().numpy()
            for image, target in zip(images.copy(), targets, strict=True)
        ]

    def logits(self, images: Floats) -> Floats:
        """Classify images [B, C, H, W]: logits [B, classes]."""
        with torch.no_grad():
            logits = self.classify(torch.from_numpy(images.copy()).to(self.device))
        return logits.cpu().numpy()  # type: ignore[no-any-return]

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
        best_ratio, best = -np.inf, torch.zeros(len(psi), dtype=torch.int64)
        for count in range(2, self.k_max + 1):
            labels = torch.from_numpy(fcluster(tree, count, "maxclust").astype(np.int64)) - 1
            ratio = _ratio(psi, labels)
            if ratio > best_ratio:
                best_ratio, best = ratio, labels
        return best


def of_model(
    model: Model,
    layers: Sequence[str],
    input_shape: tuple[int, int, int],
    device: str = "cpu",
    activation: Activation | None = None,
) -> PlainCollectionCAM:
    """Make plain Collection-CAM of a model, with hooks where the layers are modules.

    Programs, scripts, and models whose layers are not modules that give maps [B, C, h, w] run from
    their trace, operator by operator.

    Args:
        model: What `ccam-deploy export` takes.
        layers: Names of the target layers, the shallowest first.
        input_shape: Channels, height and width.
        device: PyTorch's name of where to run.
        activation: Run from the trace, whose logits are those of an export with this activation;
            None takes the model's outputs as logits.

    Returns:
        The explainer.

    Raises:
        SourceError: The model cannot be traced.
        LayerError: The model lacks a layer.
    """
    if isinstance(model, OnnxNetwork):
        model = model.trace(input_shape[1:])
    if isinstance(model, nn.Module):
        known = dict(model.named_modules())
        if activation is None and all(name in known for name in layers):
            record = hooks(model.eval().to(device), layers)
            with torch.no_grad():
                _, maps = record(torch.zeros(1, *input_shape, device=device))
            if all(features.dim() == 4 for features in maps):
                return PlainCollectionCAM(model, record, device)
        model = trace_model(model, input_shape)
    program = build_program(model, keep=layers, fold=False)
    if activation is not None:
        program = with_logits(program, activation)
    targets = find_layers(program, layers)
    program.graph.to(device)

    def traced(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        recorder = Recorder(program.graph, targets)
        (logits,) = recorder.run(images)
        return logits, recorder.features()

    return PlainCollectionCAM(_FirstOutput(program.graph), traced, device)


def best_device() -> str:
    """Return PyTorch's name of the GPU where it can use one, else of the CPU."""
    with warnings.catch_warnings():  # of a driver that it cannot use
        warnings.simplefilter("ignore")
        return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Set how many threads PyTorch uses in an operator, process-wide; 0 changes nothing."""
    if count:
        torch.set_num_threads(count)


def use_tf32(allowed: bool) -> None:
    """Say whether PyTorch may run products of float32 in TF32 on a GPU, process-wide."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def hooks(model: nn.Module, layers: Sequence[str]) -> Record:
    """Make a Record of a model's modules.

    Args:
        model: In evaluation mode.
        layers: Names of modules.

    Returns:
        A function that gives the logits and the modules' outputs in the order of `layers`.
    """
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
    """Unpacks the single tensor that a traced graph returns in a tuple."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.graph(images)
        return logits  # type: ignore[no-any-return]


def _ratio(psi: Tensor, labels: Tensor) -> float:
    """The mean dispersion-separation ratio (Ha & Youn 2022, eq. 12-15)."""
    count = int(labels.max()) + 1
    members = F.one_hot(labels, count).double()
    sizes = members.sum(0)
    centroids = members.t() @ psi / sizes[:, None]
    dispersion = members.t() @ (psi - centroids[labels]).square().sum(1) / sizes
    distance = torch.cdist(centroids, centroids).square().fill_diagonal_(torch.inf)
    separation = distance.min(1).values
    ratio = ((separation - dispersion) / (separation + dispersion)).nan_to_num()
    return float(ratio.mean())
