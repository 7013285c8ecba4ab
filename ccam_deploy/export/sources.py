"""Model files: exported programs, weights for a named architecture, TorchScript, pickles."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.program import quiet

Model = nn.Module | ExportedProgram

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


def load(path: Path, arch: str | None = None, allow_pickle: bool = False) -> Model:
    """Load a model file.

    path: an exported program (.pt2), weights for `arch`, a TorchScript file, or, with
        allow_pickle, a pickled module: reading that one runs whatever code it holds.
    arch: "module:factory" or "module:factory(argument=value)", which makes the network.
    Raises SourceError for a file that is missing, damaged, of another kind or another network's.
    """
    kind = _kind(path)
    if kind == "program":
        return _guarded(path, lambda: torch.export.load(path))
    if kind == "script":
        return _from_script(path)
    content = _read_weights(path, allow_pickle)
    if isinstance(content, nn.Module):
        return content
    state = _state_dict(content)
    if state is None:
        raise SourceError(
            f"{path} holds a {type(content).__name__}, neither weights nor a module; "
            "save model.state_dict() or an exported program"
        )
    if arch is None:
        raise SourceError(
            f"{path} holds weights alone; name their network with --arch module:factory"
        )
    model = build(arch)
    _load_state(model, state, path, arch)
    return model


def build(arch: str) -> nn.Module:
    """Make a network from "module:factory" or "module:factory(argument=value)".

    Raises SourceError where it cannot be imported or called.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)(\(.*\))?", arch.strip(), re.DOTALL)
    if not match:
        raise SourceError(
            f'arch "{arch}" is not module:factory, such as torchvision.models:resnet18'
        )
    module_name, factory_name, call = match.groups()
    arguments = _arguments(arch, call or "()")
    factory: Any = import_module(module_name)
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            raise SourceError(f'module "{module_name}" has no "{factory_name}"')
        factory = getattr(factory, part)
    try:
        model = factory(**arguments)
    except Exception as error:
        raise SourceError(f"{arch} cannot be built: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{arch} gives a {type(model).__name__}, not a torch.nn.Module")
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


def import_module(name: str) -> Any:
    """Import a module, the current folder included, and mend torchvision beside a CPU-only torch.

    torchvision's wheel refuses to import where its compiled operators do not load; declaring the
    two that it looks for lets its models work.
    """
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
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
    except Exception as error:
        raise SourceError(f'module "{name}" cannot be imported: {brief(error)}') from error
    finally:
        if added:
            sys.path.remove(folder)


def _kind(path: Path) -> str:
    """What a file is, by its content: "program", "script" or "weights"."""
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    if not path.is_file():
        raise SourceError(f"{path} is a folder; give a model file")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return _kind_of_archive(path)
    if start[:1] != b"\x80":
        raise SourceError(f"{path} is not a PyTorch file")
    return "weights"


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
            damaged = archive.testzip()
    except Exception as error:
        raise SourceError(f"{path} is truncated or damaged; copy or save it again") from error
    if damaged is not None:
        raise SourceError(f'{path} is damaged at "{damaged}"; copy or save it again')
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "program"
    if "serialized_exported_program.json" in names:
        return "program"
    if "constants.pkl" in names:
        return "script"
    if "data.pkl" not in names:
        raise SourceError(f"{path} is a ZIP archive, but not one that PyTorch wrote")
    return "weights"


def _guarded(path: Path, action: Callable[[], Model]) -> Model:
    try:
        return action()
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {brief(error)}") from error


def _read_weights(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise SourceError(
                f"{path} holds pickled Python objects, and reading them runs their code; save "
                "model.state_dict() or an exported program, or trust it with --allow-pickle"
            ) from error
    except Exception as error:
        raise SourceError(f"{path} is not a readable PyTorch file: {brief(error)}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise SourceError(f"{path} cannot be unpickled: {brief(error)}") from error


class ScriptedModel(nn.Module):
    """Hides a TorchScript module from torch.export, which then traces what it computes."""

    advice = (
        "the TorchScript code fixes the batch, or cannot be traced; save the original model with "
        "torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._script = (script,)

    def forward(self, images: Tensor) -> Any:
        """Run the script without the optimiser, which would hide operators from the trace."""
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return self._script[0](images)


def _from_script(path: Path) -> nn.Module:
    try:
        with quiet():
            script = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SourceError(f"{path} is not a readable TorchScript file: {brief(error)}") from error
    return ScriptedModel(script.float().eval())


def _state_dict(content: object) -> dict[str, Tensor] | None:
    """The weights in a checkpoint, taken out of common wrappings."""
    if not isinstance(content, Mapping):
        return None
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and inner:
            return _state_dict(inner)
    named = all(isinstance(n, str) and isinstance(v, Tensor) for n, v in content.items())
    if not content or not named:
        return None
    prefix = "module."
    wrapped = all(name.startswith(prefix) for name in content)
    return {name.removeprefix(prefix) if wrapped else name: v for name, v in content.items()}


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path, arch: str) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    for names, what in ((missing, "lacks"), (unknown, "has the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SourceError(f'{path} is not for {arch}: it {what} "{names[0]}"{more}')
    if shapes:
        name = shapes[0]
        raise SourceError(
            f'{path} is not for {arch}: "{name}" is {list(state[name].shape)} in the file, '
            f"{list(own[name].shape)} in the network"
        )
    model.load_state_dict(state)
