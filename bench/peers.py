"""The same explanations by other libraries, and by PyTorch alone where none of them has a method.

Each is a call that explains one class of one image, and gives the map at the size of the image,
scaled to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.export.architecture import import_module
from ccam_deploy.kernels.cpu import min_max
from ccam_deploy.latency import plain_pytorch

PYTORCH = "PyTorch"
GRAD_CAM, TORCHCAM, CAPTUM = "pytorch-grad-cam", "TorchCAM", "Captum"
DISTRIBUTIONS = {GRAD_CAM: "grad-cam", TORCHCAM: "torchcam", CAPTUM: "captum"}
"""The package that each library is installed by."""

Call = Callable[[], Floats]


@dataclass(frozen=True)
class Task:
    """What is explained.

    Attributes:
        model: The network in PyTorch, in evaluation mode; see `addressable`.
        layer: The module whose output is the target layer.
        image: [C, H, W] float32, preprocessed.
        target: The class.
        batch: How many masked images go through the network at a time.
    """

    model: nn.Module
    layer: nn.Module
    image: Floats
    target: int
    batch: int

    @property
    def tensor(self) -> Tensor:
        """A fresh copy of the image, [1, C, H, W]."""
        return torch.from_numpy(self.image[None].copy())

    def enlarged(self, maps: Tensor) -> Floats:
        """Scale a map [1, h, w] to the image's size and to [0, 1]."""
        size = self.image.shape[1:]
        wide = F.interpolate(maps.detach()[None], size, mode="bilinear")[0]
        return scaled(wide.numpy())


class Numbered(nn.Module):
    """A module whose calls in a forward pass give their output through a module each.

    Args:
        module: What is called.
        calls: How often, in a forward pass.
    """

    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.module = module
        self.outputs = nn.ModuleList(nn.Identity() for _ in range(calls))
        self.done = 0

    def forward(self, values: Tensor) -> Tensor:
        """Call the module, and count the call."""
        output = self.outputs[self.done](self.module(values))
        self.done = (self.done + 1) % len(self.outputs)
        return output  # type: ignore[no-any-return]


def addressable(model: nn.Module, name: str, image: Floats) -> nn.Module:
    """Find the module whose output is a target layer, for libraries that hook modules.

    A module that is called several times is replaced in the model by one that gives each of its
    outputs through a module of its own; the last one is the target layer.

    Args:
        model: In evaluation mode; changed as said.
        name: A dotted name; what follows a colon is the number of the call, from 1.
        image: [C, H, W] float32, with which the calls are counted.

    Returns:
        The module to hook.
    """
    path, _, number = name.partition(":")
    module = model.get_submodule(path)
    seen: list[int] = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(torch.from_numpy(image[None].copy()))
    handle.remove()
    if len(seen) == 1:
        return module
    numbered = Numbered(module, len(seen))
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, numbered)
    return numbered.outputs[int(number or len(seen)) - 1]


def scaled(maps: Floats) -> Floats:
    """Scale a map [1, H, W] to [0, 1], as [H, W]."""
    whole: Floats = np.asarray(maps, np.float32)
    row: Floats = min_max(whole)[0]
    return row


def by_grad_cam(name: str, task: Task) -> Call:
    """Explain by a class of pytorch-grad-cam."""
    import_module("torchvision")  # which the library imports
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = getattr(pytorch_grad_cam, name)(model=task.model, target_layers=[task.layer])
    cam.batch_size = task.batch
    targets = [ClassifierOutputTarget(task.target)]
    return lambda: scaled(cam(input_tensor=task.tensor, targets=targets))


def by_torchcam(name: str, task: Task) -> Call:
    """Explain by a class of TorchCAM."""
    from torchcam import methods

    settings = {"batch_size": task.batch} if name == "ScoreCAM" else {}

    def explain() -> Floats:
        kind = getattr(methods, name)
        with kind(task.model, task.layer, input_shape=task.image.shape, **settings) as cam:
            scores = task.model(task.tensor.requires_grad_())
            (maps,) = cam(task.target, scores, normalized=False)
        return task.enlarged(maps)

    return explain


def by_captum(task: Task) -> Call:
    """Explain by Captum's Grad-CAM, the only method of these that it has."""
    from captum.attr import LayerGradCam

    peer = LayerGradCam(task.model, task.layer)

    def explain() -> Floats:
        maps = peer.attribute(task.tensor, target=task.target, relu_attributions=True)
        return task.enlarged(maps[0])

    return explain


def collection_cam(task: Task, layers: Sequence[str]) -> Call:
    """Explain by Collection-CAM in PyTorch alone, one forward for each mask."""
    peer = plain_pytorch.of_model(task.model, layers, task.image.shape)

    def explain() -> Floats:
        saliency, _ = peer.explain(torch.from_numpy(task.image.copy()), task.target)
        return scaled(saliency.numpy()[None])

    return explain


def rise(task: Task, masks: Floats, p: float) -> Call:
    """Explain by RISE in PyTorch alone, a batch of the same masks [N, H, W] at a time."""

    def explain() -> Floats:
        pixels, every = task.tensor, torch.from_numpy(masks)
        total = torch.zeros(masks.shape[1:], dtype=torch.float64)
        with torch.no_grad():
            for rows in row_chunks(len(masks), task.batch):
                part = every[rows]
                scores = task.model(pixels * part[:, None]).softmax(1)[:, task.target]
                total += (scores[:, None, None] * part).sum(0)
        return scaled((total / (len(masks) * p)).float().numpy()[None])

    return explain
