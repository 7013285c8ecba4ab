"""Model files: exported programs, ONNX, weights for a named architecture, TorchScript, pickles."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.architecture import Model, build_model, current_folder_importable
from ccam_deploy.export.from_onnx.network import read_onnx
from ccam_deploy.export.program_file import SAFER_FORMATS, read_program
from ccam_deploy.export.torchscript import read_script
from ccam_deploy.files import is_utf8

_ONNX_START = b"\x08"
"""The tag of the version, which every library writes first."""
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


def load_model(
    path: Path,
    arch: str | None = None,
    allow_pickle: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> Model:
    """Load a model file.

    Args:
        path: An exported program (.pt2), an ONNX file, weights for `arch`, a TorchScript file, or,
            with `allow_pickle`, a pickled module.
        arch: "module:factory" or "module:factory(argument=value)", which makes the network.
        allow_pickle: Trust the file: reading a pickle runs whatever code it holds.
        warn: Called with a line right before code in the file runs.

    Returns:
        The network, or the exported program.

    Raises:
        SourceError: The file is missing, damaged, of an unknown type, or for another network.
    """
    if not is_utf8(path):
        raise SourceError(f"{path} cannot be read: its path is not UTF-8; rename it")
    file_type = model_file_type(path)
    if file_type == "program":
        return read_program(path, allow_pickle, warn)
    if file_type == "script":
        return read_script(path)
    if file_type == "onnx":
        return read_onnx(path)
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
    model = build_model(arch)
    _load_state(model, state, path, arch)
    return model


def model_file_type(path: Path) -> str:
    """Recognise the type of a model file by its content.

    Args:
        path: The file.

    Returns:
        "program", "script", "onnx" or "weights"; pickled modules count as weights.

    Raises:
        SourceError: The file is missing, empty, damaged, or none of them.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    if not path.is_file():
        raise SourceError(f"{path} is a folder; give a model file")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return _archive_type(path)
    if start[:1] == _ONNX_START or (path.suffix == ".onnx" and start[:1] != b"\x80"):
        return "onnx"
    if start[:1] != b"\x80":
        raise SourceError(f"{path} is neither a PyTorch file nor an ONNX file")
    return "weights"


def _archive_type(path: Path) -> str:
    """The type of a ZIP archive, by the names of its members."""
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


def _read_weights(path: Path, allow_pickle: bool, warn: Callable[[str], None]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise SourceError(
                f"{path} holds pickled Python objects, and reading them runs their code; "
                f"{SAFER_FORMATS}"
            ) from error
    except Exception as error:
        raise SourceError(f"{path} is not a readable PyTorch file: {brief(error)}") from error
    warn(f"reading {path} runs the code that it holds")
    try:
        with current_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise SourceError(f"{path} cannot be unpickled: {brief(error)}") from error


def _state_dict(content: object) -> dict[str, Tensor] | None:
    """The weights in a checkpoint, without the dictionaries and prefix that often wrap them."""
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
    expected = model.state_dict()
    # weights of PyTorch before 0.4.1 have no such counters, and load_state_dict makes them
    counted = [name for name in expected if name.rpartition(".")[2] != "num_batches_tracked"]
    missing = [name for name in counted if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [n for n in expected if n in state and expected[n].shape != state[n].shape]
    for names, fault in ((missing, "lacks"), (unknown, "has the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SourceError(f'{path} is not for {arch}: it {fault} "{names[0]}"{more}')
    if shapes:
        name = shapes[0]
        raise SourceError(
            f'{path} is not for {arch}: "{name}" is {list(state[name].shape)} in the file, '
            f"{list(expected[name].shape)} in the network"
        )
    model.load_state_dict(state)
