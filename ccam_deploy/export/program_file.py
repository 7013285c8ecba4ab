"""Exported programs (.pt2): look for code in the file before reading it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccam_deploy.errors import SourceError, brief
from ccam_deploy.export.architecture import Model, current_folder_importable
from ccam_deploy.export.program import quiet

SAFER_FORMATS = "save model.state_dict() or an exported program, or trust it with --allow-pickle"
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


def read_program(path: Path, allow_pickle: bool, warn: Callable[[str], None]) -> Model:
    """Read an exported program that holds no code or is trusted.

    Args:
        path: The .pt2 file.
        allow_pickle: Trust the file: reading it may run the code that it holds.
        warn: Called with a line right before code in the file runs.

    Returns:
        The exported program.

    Raises:
        SourceError: The file is damaged, or can run code and is not trusted.
    """
    try:
        _refuse_code(path)
    except _CodeError as error:
        if not allow_pickle:
            raise SourceError(f"{path} can run code: {error}; {SAFER_FORMATS}") from error
        warn(f"reading {path} runs the code that it holds")
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {brief(error)}") from error
    try:
        with current_folder_importable(), quiet():
            return torch.export.load(path)
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {brief(error)}") from error


class _CodeError(Exception):
    """Reading a program would run code that it holds."""


def _refuse_code(path: Path) -> None:
    """Refuse a program with code in its members: torch.export.load unpickles, and evaluates sizes.

    Raises _CodeError that names the member.
    """
    for name, content in _members(path):
        lower_name = name.lower()
        if "aotinductor/" in lower_name:
            raise _CodeError(f'"{name}" is compiled')
        if _TENSORS.fullmatch(lower_name):
            _refuse_pickled_tensors(name, content())
        elif _DESCRIPTIONS.fullmatch(lower_name):
            json.loads(content(), object_hook=partial(_refuse_code_in_entry, name))


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


def _refuse_pickled_tensors(name: str, content: bytes) -> None:
    try:
        if content:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _CodeError(f'"{name}" holds pickled Python objects') from error


def _refuse_code_in_entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    pickled = str(entry.get("path_name", "")).startswith(("custom_obj_", "opaque_obj_"))
    if entry.get("use_pickle") or pickled:
        raise _CodeError(f'"{name}" asks for pickled Python objects')
    if _FORMULA.sub("", str(entry.get("expr_str", ""))):  # SymPy evaluates it as Python
        raise _CodeError(f'"{name}" has a size that is no formula')
    return entry
