"""Part of bench_gpu: what PyTorch takes for the passes of an explanation on the same GPU.

The floor is one forward, the gradient of the feature maps and a forward of the masked images,
captured as one CUDA graph: no host between, no clustering, no masks made. Beside it stands the way
of the paper (Ha & Youn 2022), eager and with one forward for each mask. For Score-CAM there are the
masked forwards alone, in both ways, and all of TorchCAM's Score-CAM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.explain import BATCH_SIZE, memory_since, used_memory
from bench.gpu.pieces import Figures, Piece, measure_pieces, pieces_in
from ccam_deploy.engines.base import row_chunks
from ccam_deploy.export.architecture import import_module
from ccam_deploy.latency.plain_pytorch import use_tf32

LAYERS = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "resnet101": ("layer1", "layer2", "layer3", "layer4"),
    "vgg19": ("features.8", "features.17", "features.26", "features.35"),
}
"""The target layers of bench_kernels.SHAPES."""

_ROUNDS = 30
_EAGER_ROUNDS = 5
_WARM_ROUNDS = 3
_SIZE, _TARGET = 224, 7


class Passes:
    """The passes of a network that an explanation needs, on PyTorch's default stream.

    Args:
        model: In evaluation mode; its modules must not work in place.
        layers: Names of the target layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._maps: list[Tensor] = []
        for name in layers:
            model.get_submodule(name).register_forward_hook(self._keep)

    def gradients(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify images [B, 3, H, W] and differentiate one class by each layer's features."""
        self._maps.clear()
        logits = self._model(images.detach().requires_grad_())
        return torch.autograd.grad(logits[:, _TARGET].sum(), list(self._maps))

    def classify(self, images: Tensor) -> Tensor:
        """Classify images without a gradient: logits [B, classes]."""
        with torch.no_grad():
            self._maps.clear()
            logits: Tensor = self._model(images)
        return logits

    def at_once(self, images: Tensor, masked: Tensor) -> None:
        """Make the passes, BATCH_SIZE masked images at a time."""
        if len(images):
            self.gradients(images)
        for chunk in row_chunks(len(masked), BATCH_SIZE):
            self.classify(masked[chunk])

    def one_by_one(self, images: Tensor, masked: Tensor) -> None:
        """Make the passes for each image by itself, and for each masked image."""
        for row in range(len(images)):
            self.gradients(images[row : row + 1])
        for row in range(len(masked)):
            self.classify(masked[row : row + 1])

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._maps.append(output)


def random_network(name: str) -> nn.Module:
    """Make a network of torchvision with random weights whose modules do not work in place."""
    torch.manual_seed(0)
    model: nn.Module = getattr(import_module("torchvision.models"), name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _on_gpu(network: str, precision: str) -> Passes:
    """A network's passes in a precision; the one before is freed."""
    half = precision == "fp16"
    torch.backends.cudnn.benchmark = True
    use_tf32(precision == "tf32")
    model = random_network(network).cuda()
    if half:
        model = model.half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Passes(model, LAYERS[network])


def _images(count: int, half: bool) -> Tensor:
    images = torch.randn(count, 3, _SIZE, _SIZE, device="cuda")
    return images.half().contiguous(memory_format=torch.channels_last) if half else images


def median_ms(call: Callable[[], object], rounds: int) -> float:
    """Time calls on the GPU between two events, after a warm-up: the median in milliseconds."""
    for _ in range(_WARM_ROUNDS):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(rounds):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(median(times), 4)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Capture a call as a CUDA graph, after it has run on another stream; returns its replay."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_ROUNDS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(piece: Piece, before: float | None) -> Figures:
    """Time a floor, and for a single image the paper's way.

    Args:
        piece: What is measured.
        before: MiB in use on the GPU at the start of the process; None where unknown.

    Returns:
        Milliseconds, and the memory that the process has taken.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch cannot use a GPU here")
    if piece.kind == "torchcam":
        use_tf32(piece.precision == "tf32")
        model = random_network(piece.network).cuda()
        call = torchcam_score_cam(model, LAYERS[piece.network][-1], _images(1, False))
        return {"torchcam_ms": median_ms(call, _EAGER_ROUNDS)}
    half = piece.precision == "fp16"
    passes = _on_gpu(piece.network, piece.precision)
    torch.cuda.empty_cache()
    images, masked = _images(piece.batch, half), _images(piece.masks, half)
    if piece.kind == "score-floor":
        images = images[:0]  # its one backbone pass is left out
    graph = captured(lambda: passes.at_once(images, masked))
    figures: Figures = {"masks": piece.masks, "graph_ms": median_ms(graph, _ROUNDS)}
    if piece.batch == 1:
        plain = median_ms(lambda: passes.one_by_one(images, masked), _EAGER_ROUNDS)
        figures["one_by_one_ms"] = plain
    figures["memory_mib"] = memory_since(before)
    return figures


def torchcam_score_cam(model: nn.Module, layer: str, images: Tensor) -> Callable[[], Tensor]:
    """Prepare TorchCAM's Score-CAM of one image.

    Args:
        model: In evaluation mode.
        layer: The target layer's name.
        images: [1, 3, H, W].

    Returns:
        A function that explains, with a map [h, w].

    Raises:
        RuntimeError: TorchCAM is not installed.
    """
    try:
        from torchcam.methods import ScoreCAM
    except ImportError as error:
        raise RuntimeError("torchcam is not installed") from error
    extractor = ScoreCAM(model, layer, BATCH_SIZE, tuple(images.shape[1:]))

    def explain() -> Tensor:
        with torch.no_grad():
            model(images)
        (found,) = extractor(_TARGET)
        return found[0]

    return explain


def main() -> None:
    """Measure the pieces that are the process's argument."""
    before = used_memory()
    measure_pieces(pieces_in(sys.argv[1]), lambda piece: measure(piece, before))


if __name__ == "__main__":
    main()
