"""Networks that a factory makes, by its name: "module:factory(argument=value)"."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.extras import Extra, install
from ccam_deploy.termination import Terminated

_EXTRAS: dict[str, Extra] = {"torchvision": "zoo", "timm": "zoo"}
"""Packages of networks, and the extra that adds them."""

Model = nn.Module | ExportedProgram


def build_model(arch: str) -> nn.Module:
    """Make a network by calling its factory.

    Args:
        arch: "module:factory" or "module:factory(argument=value)" with literal values.

    Returns:
        The network, as the factory made it.

    Raises:
        SourceError: The factory cannot be imported or called, or gives something else.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)(\(.*\))?", arch.strip(), re.DOTALL)
    if not match:
        raise SourceError(
            f'arch "{arch}" is not module:factory, such as torchvision.models:resnet18'
        )
    module_name, factory_name, call = match.groups()
    arguments = _arguments(arch, call or "()")
    with current_folder_importable():
        factory: Any = import_module(module_name)
        for part in factory_name.split("."):
            if not hasattr(factory, part):
                raise SourceError(f'module "{module_name}" has no "{factory_name}"')
            factory = getattr(factory, part)
        try:
            model = factory(**arguments)
        except Terminated:
            raise
        except (Exception, SystemExit) as error:
            raise SourceError(f"{arch} cannot be built: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{arch} gives a value of type {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def _arguments(arch: str, call: str) -> dict[str, Any]:
    """Keyword arguments of literal values, from "(name=value, ...)"."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError("only name=value arguments are allowed")
        return {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise SourceError(f'the arguments in arch "{arch}" are not name=value literals') from error


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let the current folder's modules be imported, as `python -m` does."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def import_module(name: str) -> Any:
    """Import a module, also from the current folder, and torchvision beside a CPU-only torch.

    torchvision's wheel refuses to import where its compiled operators do not load; declaring the
    two that it looks for lets its models work.

    Args:
        name: The dotted name.

    Returns:
        The module.

    Raises:
        SourceError: It cannot be imported.
    """
    try:
        with current_folder_importable():
            return _import_module(name)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        message = f'module "{name}" cannot be imported: {brief(error)}'
        if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
            message += f"; {install(_EXTRAS[error.name])}"
        raise SourceError(message) from error


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for loaded in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[loaded]
    torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")
    return importlib.import_module(name)
