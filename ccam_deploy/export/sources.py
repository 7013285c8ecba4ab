"""Model files: exported programs, weights for a named architecture, TorchScript, pickles."""

from __future__ import annotations

import ast
import importlib
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.program import quiet

Model = nn.Module | ExportedProgram

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_SAFER = "save model.state_dict() or an exported program, or trust it with --allow-pickle"
_TENSORS = re.compile(r".*\.pt|(.*/)?serialized_(state_dict|constants)\.json")
_DESCRIPTIONS = re.compile(
    r"(.*/)?models/.*|.*_config\.json|(.*/)?serialized_exported_program\.json"
)
_NUMBER, _SYMBOL = r"\d+(\.\d+)?(e[-+]?\d+)?", r"[a-z]{1,3}\d+"
_FORMULA = re.compile(
    rf"'({_NUMBER}|{_SYMBOL})'|{_NUMBER}|{_SYMBOL}|\b(true|false|int_oo|oo)\b|[A-Z]\w*"
    r"|[a-z_]+=(True|False|\d+)|[-+*/%(),<>=!&|~ ]",
    re.ASCII,
)


def load(
    path: Path,
    arch: str | None = None,
    allow_pickle: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> Model:
    """Load a model file.

    path: an exported program (.pt2), weights for `arch`, a TorchScript file, or, with
        allow_pickle, a pickled module: reading that one runs whatever code it holds.
    arch: "module:factory" or "module:factory(argument=value)", which makes the network.
    warn: gets a line right before code of the file is run.
    Raises SourceError for a file that is missing, damaged, of another kind or another network's.
    """
    found = kind(path)
    if found == "program":
        return _read_program(path, allow_pickle, warn)
    if found == "script":
        return _from_script(path)
    content = _read_weights(path, allow_pickle, warn)
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
    with _current_folder():
        factory: Any = import_module(module_name)
        for part in factory_name.split("."):
            if not hasattr(factory, part):
                raise SourceError(f'module "{module_name}" has no "{factory_name}"')
            factory = getattr(factory, part)
        try:
            model = factory(**arguments)
        except (Exception, SystemExit) as error:
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


@contextmanager
def _current_folder() -> Iterator[None]:
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
    """Import a module, the current folder included, and mend torchvision beside a CPU-only torch.

    torchvision's wheel refuses to import where its compiled operators do not load; declaring the
    two that it looks for lets its models work.
    """
    try:
        with _current_folder():
            return _import_module(name)
    except (Exception, SystemExit) as error:
        raise SourceError(f'module "{name}" cannot be imported: {brief(error)}') from error


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


def kind(path: Path) -> str:
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


def _read_program(path: Path, allow_pickle: bool, warn: Callable[[str], None]) -> Model:
    try:
        _check_program(path)
    except _CodeError as error:
        if not allow_pickle:
            raise SourceError(f"{path} can run code: {error}; {_SAFER}") from error
        warn(f"reading {path} runs the code that it holds")
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {brief(error)}") from error
    try:
        with _current_folder():
            return torch.export.load(path)
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {brief(error)}") from error


class _CodeError(Exception):
    """Reading a program would run code that it holds."""


def _check_program(path: Path) -> None:
    """Look for code in a program's members: torch.export.load unpickles, and evaluates sizes.

    Raises _CodeError that names the member.
    """
    for name, content in _members(path):
        plain = name.lower()
        if "aotinductor/" in plain:
            raise _CodeError(f'"{name}" is compiled')
        if _TENSORS.fullmatch(plain):
            _check_tensors(name, content())
        elif _DESCRIPTIONS.fullmatch(plain):
            json.loads(content(), object_hook=partial(_check_entry, name))


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and readers of an archive's members, as both parsers that PyTorch uses see them."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            yield info.filename, partial(archive.read, info)
    reader: Any = torch._C.PyTorchFileReader
    try:
        opened = reader(str(path))
    except RuntimeError:  # torch.export.load reads such a file, of an older format, with zipfile
        return
    for name in opened.get_all_records():
        yield name, partial(opened.get_record, name)


def _check_tensors(name: str, content: bytes) -> None:
    try:
        if content:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _CodeError(f'"{name}" holds pickled Python objects') from error


def _check_entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    pickled = str(entry.get("path_name", "")).startswith(("custom_obj_", "opaque_obj_"))
    if entry.get("use_pickle") or pickled:
        raise _CodeError(f'"{name}" asks for pickled Python objects')
    if _FORMULA.sub("", str(entry.get("expr_str", ""))):  # SymPy evaluates it as Python
        raise _CodeError(f'"{name}" has a size that is no formula')
    return entry


def _read_weights(path: Path, allow_pickle: bool, warn: Callable[[str], None]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise SourceError(
                f"{path} holds pickled Python objects, and reading them runs their code; {_SAFER}"
            ) from error
    except Exception as error:
        raise SourceError(f"{path} is not a readable PyTorch file: {brief(error)}") from error
    warn(f"reading {path} runs the code that it holds")
    try:
        with _current_folder():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise SourceError(f"{path} cannot be unpickled: {brief(error)}") from error


class ScriptedModel(nn.Module):
    """Hides a TorchScript module from torch.export, which then traces what it computes."""

    tracing_advice = (
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
    # weights of PyTorch before 0.4.1 have no such counters, and load_state_dict makes them
    counted = [name for name in own if name.rpartition(".")[2] != "num_batches_tracked"]
    missing = [name for name in counted if name not in state]
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
