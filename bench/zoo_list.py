"""Chooses the networks of bench_zoo: the smallest of each family of timm and of torchvision.

    python -m bench.zoo_list > bench/zoo_models.txt

A family is what timm lists under one module, or torchvision.models has, with the same name up to
its size. Networks are built and run without memory, on the meta device, which tells their
parameters, the smallest input that they take, and their kind:

- transformer or hybrid: a run multiplies two tensors that both depend on the image, as attention
  does, or convolves nothing but patches or the image's first pixels, as token mixers do
- convolutional: any other
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import build_model, import_module
from ccam_deploy.export.graph_editing import aten

CLASSES = 10
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 512)
MOST_PARAMETERS = 130e6
ATTENTION, CONVOLUTION = "transformer or hybrid", "convolutional"

_PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default)
_LARGE = re.compile(r"(giant|gigantic|huge|enormous|large|_so\d+m)(?!_0)")
"""Variants that are never the smallest of a family whose smallest could be measured."""
_SIZE_WORDS = ("img_size", "image_size")


@dataclass(frozen=True)
class ZooModel:
    """One network, a line of the list.

    Attributes:
        name: "timm/resnet18" or "torchvision/resnet18".
        kind: ATTENTION or CONVOLUTION.
        size: Height and width of its input.
        parameters: In millions.
        operators: How many a run of it takes, which an export's time goes with.
        arch: "module:factory(argument=value)", which makes it.
    """

    name: str
    kind: str
    size: int
    parameters: float
    operators: int
    arch: str

    @classmethod
    def from_line(cls, line: str) -> ZooModel:
        """Read a line of the list."""
        name, kind, size, parameters, operators, arch = map(str.strip, line.split("|"))
        return cls(name, kind, int(size), float(parameters), int(operators), arch)

    def line(self) -> str:
        """Write the line of the list."""
        return (
            f"{self.name:44} | {self.kind:21} | {self.size:3} | {self.parameters:6.2f} | "
            f"{self.operators:4} | {self.arch}"
        )


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what depends on the image, and counts what marks a kind."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.convolutions = self.operators = 0
        self._depending: dict[int, Tensor] = {id(image): image}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        depending = [isinstance(v, Tensor) and id(v) in self._depending for v in flat]
        if any(depending):
            self.operators += 1
            if func in _PRODUCTS or "scaled_dot_product" in str(func):
                self.products += sum(depending) > 1
            if func is aten.convolution.default:
                kernel, stride = args[1].shape[2:], args[3]
                self.convolutions += any(k > s for k, s in zip(kernel, stride, strict=True))
            outputs = torch.utils._pytree.tree_leaves(result)
            self._depending.update({id(v): v for v in outputs if isinstance(v, Tensor)})
        return result

    @property
    def kind(self) -> str:
        """What the run marks the network as."""
        return ATTENTION if self.products or self.convolutions < 2 else CONVOLUTION


def _family(name: str) -> str:
    words = name.split("_")
    count = 2 if words[0] in ("tf", "legacy") else 1
    return re.sub(r"(?<!v)\d+.*$", "", "_".join(words[:count]))


def _timm() -> Iterator[tuple[str, str, str]]:
    """Each model's family, its name, and its arch with a place for {more} arguments."""
    timm = import_module("timm")
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            call = f"timm:create_model(model_name='{name}', num_classes={CLASSES}{{more}})"
            yield f"timm/{module}/{_family(name)}", f"timm/{name}", call


def _torchvision() -> Iterator[tuple[str, str, str]]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models):
        call = f"torchvision.models:{name}(num_classes={CLASSES}{{more}})"
        yield f"torchvision/{_family(name)}", f"torchvision/{name}", call


def _smallest() -> dict[str, tuple[int, str, str]]:
    """The model of each family with the fewest parameters: (parameters, name, its arch)."""
    smallest: dict[str, tuple[int, str, str]] = {}
    seen = set()
    for source in (_timm, _torchvision):
        for family, name, arch in source():
            stem = family + re.sub(r"_\d{3}$", "", name)
            if stem in seen or _LARGE.search(name):
                continue
            seen.add(stem)
            try:
                network = _on_meta(arch.format(more=""))
            except Exception as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            parameters = sum(value.numel() for value in network.parameters())
            if family not in smallest or parameters < smallest[family][0]:
                smallest[family] = (parameters, name, arch)
    return smallest


def _on_meta(arch: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_model(arch).eval()
    except SourceError as error:
        if "meta tensor" not in str(error):
            raise
        # It computes with its parameters while it is built.
        return build_model(arch).to("meta").eval()


def _fitting(name: str, parameters: int, arch: str) -> ZooModel | None:
    """The network at the smallest size that it runs at, if there is one."""
    for size in SIZES:
        for more in (*(f", {word}={size}" for word in _SIZE_WORDS), ""):
            call = arch.format(more=more)
            if run := _run(call, size):
                return ZooModel(name, run.kind, size, parameters / 1e6, run.operators, call)
    return None


def kind_of(network: nn.Module, image: Tensor) -> str:
    """The kind of a network, by a run of it on images [B, C, H, W]."""
    run = _Run(image)
    with torch.no_grad(), run:
        network(image)
    return run.kind


def _run(arch: str, size: int) -> _Run | None:
    """A run of a network; None where it does not run at the size."""
    try:
        network = _on_meta(arch)
        image = torch.zeros(2, 3, size, size, device="meta")
        run = _Run(image)
        with torch.no_grad(), torch.device("meta"):
            network.train()(image)  # as bench_zoo does for the statistics of normalisation
            network.eval()
            with run:
                logits = network(image)
    except Exception:
        return None
    return run if isinstance(logits, Tensor) and logits.shape == (2, CLASSES) else None


def main() -> None:
    for parameters, name, arch in sorted(_smallest().values(), key=lambda found: found[:2]):
        if parameters > MOST_PARAMETERS:
            print(f"{name}: {parameters / 1e6:.0f} M parameters", file=sys.stderr)
        elif model := _fitting(name, parameters, arch):
            print(model.line(), flush=True)
        else:
            print(f"{name}: runs at none of the sizes", file=sys.stderr)


if __name__ == "__main__":
    main()
