"""Model files that could run code are refused, unless they are trusted."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ccam_deploy.errors import SourceError
from ccam_deploy.export.program import quiet
from ccam_deploy.export.sources import load_model
from tests.export.model_files import TINY, refusal


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_run_only_when_allowed(model_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    torch.save(Trap(tmp_path / "sprung"), path)
    for file in (path, model_files / "pickled.pt"):
        assert refusal(lambda file=file: load_model(file)) == (  # type: ignore[misc]
            f"{file} holds pickled Python objects, and reading them runs their code; save "
            "model.state_dict() or an exported program, or trust it with --allow-pickle"
        )
    assert not (tmp_path / "sprung").exists()
    assert "holds a NoneType, neither weights nor a module" in refusal(
        lambda: load_model(path, None, True)
    )
    assert (tmp_path / "sprung").exists()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def sprung(member: str, path: Path) -> tuple[str, Callable[[bytes], bytes]]:
    """A member of a program, and how it changes to run code, which makes a file."""
    if member == "opaque object":
        entry = {"path_name": "opaque_obj_0", "use_pickle": False, "is_param": False}
        content = json.dumps({"config": {"object": entry}}).encode()
        return "data/constants/model_constants_config.json", lambda old: content
    if member == "use_pickle":
        name = "data/weights/model_weights_config.json"
        return name, lambda old: old.replace(b'"use_pickle": false', b'"use_pickle": true')
    if member == "expr_str":
        code = f"open({str(path)!r}, chr(119)).close()"
        return "models/model.json", lambda old: old.replace(
            b'"expr_str": "S', b'"expr_str": ' + json.dumps(code).encode() + b', "x": "S', 1
        )
    return "data/sample_inputs/model.pt", lambda old: saved(Trap(path))


def crafted(model_files: Path, path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Copy the program, one of its members changed."""
    with zipfile.ZipFile(model_files / "program.pt2") as old, zipfile.ZipFile(path, "w") as new:
        changed = 0
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(f"/{name}"):
                changed += change(content) != content
                content = change(content)
            new.writestr(info.filename, content)
    assert changed == 1


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("sample inputs", "holds pickled Python objects"),
        ("opaque object", "asks for pickled Python objects"),
        ("use_pickle", "asks for pickled Python objects"),
        ("expr_str", "has a size that is no formula"),
    ],
)
def test_programs_that_hold_code_are_refused(
    model_files: Path, tmp_path: Path, member: str, message: str
) -> None:
    path, mark = tmp_path / "program.pt2", tmp_path / "sprung"
    name, change = sprung(member, mark)
    crafted(model_files, path, name, change)
    text = refusal(lambda: load_model(path))
    assert text.startswith(f"{path} can run code: ")
    assert f'{name}" {message}; save model.state_dict() or' in text
    assert text.endswith("or trust it with --allow-pickle")
    assert not mark.exists()


@pytest.mark.parametrize("member", ["sample inputs", "expr_str"])
def test_a_programs_code_runs_when_allowed(model_files: Path, tmp_path: Path, member: str) -> None:
    """It shows that the trap works, and the warning comes before."""
    path, mark = tmp_path / "program.pt2", tmp_path / "sprung"
    crafted(model_files, path, *sprung(member, mark))
    lines: list[tuple[str, bool]] = []
    with pytest.raises(SourceError, match="cannot be read"), quiet():
        load_model(path, None, True, lambda line: lines.append((line, mark.exists())))
    assert lines == [(f"reading {path} runs the code that it holds", False)]
    assert mark.exists()


@pytest.mark.parametrize("name", ["state_dict", "constants", "example_inputs"])
def test_old_programs_that_hold_code_are_refused(tmp_path: Path, name: str) -> None:
    """The format of PyTorch 2.7 and before."""
    path, mark = tmp_path / "old.pt2", tmp_path / "sprung"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr(f"serialized_{name}.pt", saved(Trap(mark)))
    assert "--allow-pickle" in refusal(lambda: load_model(path))
    assert not mark.exists()


def test_compiled_programs_are_refused(model_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(model_files / "program.pt2") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("program/data/aotinductor/model/model.so", b"")
    assert 'model.so" is compiled; ' in refusal(lambda: load_model(path))


@pytest.mark.parametrize("name", ["program.pt2", "weights.pt", "pickled.pt"])
def test_only_what_runs_code_is_warned_of(model_files: Path, name: str) -> None:
    lines: list[str] = []
    load_model(model_files / name, TINY, True, lines.append)
    pickled = [f"reading {model_files / name} runs the code that it holds"]
    assert lines == (pickled if name == "pickled.pt" else [])
