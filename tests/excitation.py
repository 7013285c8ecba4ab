"""Excitation backpropagation walked down a chain of modules by hand, without the package."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Sum(nn.Module):
    """The sum of two branches, as a residual block has it."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (branch(x) for branch in self.branches)
        return one + other  # type: ignore[no-any-return]


class Concatenation(Sum):
    """The channels of all branches."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Mean(nn.Module):
    """The mean over all places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def winning(
    chain: nn.Sequential, images: Tensor, winners: Tensor, dual: bool = False
) -> list[Tensor]:
    """The winning probability of every value of every module's input, from the first on.

    chain: modules, the last of which is the linear layer of the classes.
    dual: of classes that have the opposite weights there.
    """
    *modules, top = chain.children()
    if dual:
        top = copy.deepcopy(top)
        top.weight.data.neg_()  # type: ignore[operator]
    return _walk([*modules, top], images, winners)


def _walk(modules: Sequence[nn.Module], x: Tensor, probability: Tensor) -> list[Tensor]:
    inputs = [x]
    for module in modules[:-1]:
        inputs.append(module(inputs[-1]))
    found = [probability]
    for module, own in zip(reversed(modules), reversed(inputs), strict=True):
        found.insert(0, passed_down(module, own, found[0]))
    return found[:-1]


def passed_down(module: nn.Module, x: Tensor, probability: Tensor) -> Tensor:
    """What comes to a module's input of the probability at its output."""
    if isinstance(module, nn.Sequential):
        return _walk(list(module.children()), x, probability)[0]
    if isinstance(module, Concatenation):
        sizes = [branch(x).shape[1] for branch in module.branches]
        return _together(module, x, torch.split(probability, sizes, 1))
    if isinstance(module, Sum):
        positive = torch.stack([branch(x) for branch in module.branches]).clamp(min=0)
        return _together(module, x, _ratio(positive, positive.sum(0)) * probability)
    if isinstance(module, nn.Conv2d | nn.Linear | nn.AvgPool2d | Mean):
        twin, positive = copy.deepcopy(module), x.clamp(min=0)
        if isinstance(module, nn.Conv2d | nn.Linear):
            twin.weight.data.clamp_(min=0)  # type: ignore[operator]
            twin.bias = None
        each = _ratio(probability, twin(positive))
        shares: Tensor = torch.func.vjp(twin, positive)[1](each)[0]
        return positive * shares
    if isinstance(module, nn.ReLU):
        return probability * (x > 0)
    if isinstance(module, nn.BatchNorm2d):
        return probability
    moved: Tensor = torch.func.vjp(module, x)[1](probability)[0]
    return moved


def _together(module: Sum, x: Tensor, parts: Any) -> Tensor:
    shares = [
        passed_down(branch, x, part) for branch, part in zip(module.branches, parts, strict=True)
    ]
    return torch.stack(shares).sum(0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, torch.zeros_like(whole))


def chain_of_digits(model: Any) -> nn.Sequential:
    """The example classifier's modules in a chain, with its normalisations folded."""
    stem, norm, relu = model.stem
    blocks: Sequence[Any] = [model.layer1, model.layer2, model.layer3, model.layer4]
    parts: list[nn.Module] = [fuse_conv_bn_eval(stem, norm), relu]
    for block in blocks:
        body = nn.Sequential(
            fuse_conv_bn_eval(block.conv1, block.norm1),
            nn.ReLU(),
            fuse_conv_bn_eval(block.conv2, block.norm2),
        )
        parts += [Sum(body, fuse_conv_bn_eval(*block.shortcut)), nn.ReLU()]
    return nn.Sequential(*parts, Mean(), model.head)
