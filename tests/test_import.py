"""Importing the package is light, its names are the documented ones, imports go one way."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ccam_deploy as ccam
from ccam_deploy import inputs, targets
from tests.helpers import ROOT

PACKAGE = ROOT / "ccam_deploy"
HEAVY = ("torch", "onnx", "onnxruntime", "numba", "tensorrt", "numpy", "scipy", "PIL")
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"arrays", "errors", "extras", "prefetch", "row_threads", "termination", "text"}),
    frozenset({"array_files", "files", "image_files", "plotting", "render"}),
    frozenset({"bundle", "examples"}),
    frozenset({"engines", "kernels", "preprocess", "targets"}),
    frozenset({"mask_pictures", "methods"}),
    frozenset({"explanation", "inputs"}),
    frozenset({"explainer"}),
    frozenset({"fidelity"}),
    frozenset({"export"}),
    frozenset({"checks", "latency", "page", "quality", "scale", "serve"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""A part of the package imports only itself and parts of lower floors."""

HOMES = {
    "torch": {"examples", "export", "latency"},
    "torchvision": {"export"},
    "onnxscript": {"export"},
    "onnx_ir": {"export"},
    "onnxruntime": {"engines", "export"},
    "matplotlib": {"latency", "plotting", "quality"},
    "cv2": {"checks"},
    "skimage": {"fidelity", "methods"},
    "model_signing": {"bundle"},
    "pyarrow": {"scale"},
    "ray": {"scale"},
    "triton_python_backend_utils": {"serve"},
    "click": {"cli"},
    "gradio": {"page"},
    "signal": {"cli", "scale", "serve"},
    "tempfile": {"bundle", "export", "files", "latency", "page", "scale", "serve"},
    "uvicorn": {"page"},
}
"""The parts that may import a library."""

PROBE = PACKAGE / "cli" / "network.py"
"""Imports export's libraries inside a function, to say which one is missing."""


def floor(part: str) -> int:
    found = [level for level, parts in enumerate(FLOORS) if part in parts]
    assert found, f'"{part}" has no floor yet; add it to FLOORS'
    return found[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def names_in(path: Path) -> tuple[str, ...]:
    return tuple(imported(tree_of(path)))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a piece of code imports, from inside the package or outside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    """The parts of the package that a module imports, wherever in its code."""
    names = [name.split(".") for name in names_in(path)]
    parts = {name[1] for name in names if name[0] == "ccam_deploy" and len(name) > 1}
    return {part for part in parts if is_module(PACKAGE / part)}


def is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def in_fresh_process(code: str) -> set[str]:
    """Run some code in a new interpreter and return the modules it has loaded then."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy() -> None:
    loaded = in_fresh_process("import ccam_deploy\ndir(ccam_deploy)")
    assert "ccam_deploy" in loaded
    assert not loaded & set(HEAVY)


def test_explaining_needs_no_export_library() -> None:
    """Every public name can be used where only the run time is installed."""
    loaded = in_fresh_process("from ccam_deploy import *")
    assert "ccam_deploy.explainer" in loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "onnxscript", "tensorrt"}


ALIASES = {"Images": inputs.Images, "Target": targets.Target, "Targets": targets.Targets}
"""Types that have no name of their own."""


@pytest.mark.parametrize("name", ccam.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(ccam, name)
    assert value is ALIASES[name] if name in ALIASES else value.__name__ == name
    assert name in dir(ccam)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ccam_deploy' has no attribute 'explode'"):
        ccam.explode  # noqa: B018


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ccam.__version__)


def test_errors_import_nothing_of_the_package() -> None:
    assert not parts_imported(PACKAGE / "errors.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    above = {
        other for other in parts_imported(path) if other != part and floor(other) >= floor(part)
    }
    assert not above, f"{part} imports {above} of its own floor or a higher one"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_are_imported_in_their_homes(library: str) -> None:
    users = {
        path for path in MODULES if any(name.split(".")[0] == library for name in names_in(path))
    }
    strangers = {path for path in users if part_of(path) not in HOMES[library]}
    assert not strangers - {PROBE}


def test_no_module_imports_in_a_circle() -> None:
    """Imports at the top of a module, those for type checking left out, form no circle."""
    graph = {}
    for path in MODULES:
        body = [node for node in tree_of(path).body if not isinstance(node, ast.If)]
        names = imported(ast.Module(body, []))
        graph[dotted(path)] = {module_named(name) for name in names if name.startswith("ccam_")}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("ccam_deploy.errors") < order.index("ccam_deploy.explainer")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_named(name: str) -> str:
    """The module that an imported name is, or lies in."""
    return name if is_module(ROOT / name.replace(".", "/")) else name.rpartition(".")[0]
