"""Every name of TensorRT that the builder's code uses exists in the installed library.

The names are read off the source, so that none can be forgotten.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from ccam_deploy.engines.tensorrt import library, messages, plans, progress, timing_cache

trt = pytest.importorskip("tensorrt_rtx")

KINDS: dict[str, Any] = {
    "trt": trt,
    "builder": trt.Builder,
    "network": trt.INetworkDefinition,
    "parser": trt.OnnxParser,
    "problem": trt.ParserError,
    "config": trt.IBuilderConfig,
    "added": trt.IOptimizationProfile,
    "tensor": trt.ITensor,
    "measured": trt.ITimingCache,
}
"""What the variables of these names hold, wherever they occur in the code."""


def names_used(tree: ast.AST) -> set[str]:
    """Dotted names that start at one of those variables, and the methods of TensorRT's classes
    that classes of ours override, as "trt.ILogger.log"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [dotted(base) for base in node.bases]
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            public = [name for name in methods if not name.startswith("_")]
            found |= {f"{base}.{name}" for base in bases for name in public}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
        elif isinstance(node, ast.Call) and dotted(node.func) == "getattr":
            value, name, *_ = node.args
            assert isinstance(name, ast.Constant) and isinstance(name.value, str)
            found.add(f"{dotted(value)}.{name.value}")
    return {name for name in found if is_known(name)}


def dotted(node: ast.AST) -> str:
    """A name with its attributes; nothing for what is not a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def is_known(name: str) -> bool:
    return name.partition(".")[0] in KINDS and "." in name


def exists(name: str) -> bool:
    root, *attributes = name.split(".")
    value = KINDS[root]
    for attribute in attributes:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


def source(*modules: Any) -> ast.Module:
    return ast.parse("\n".join(Path(module.__file__).read_text() for module in modules))


USED = sorted(names_used(source(library, messages, plans, progress, timing_cache)))


def test_the_names_are_found() -> None:
    """A few of each kind, so that none of the cases below is empty by mistake."""
    assert {
        "trt.Builder",
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "trt.ILogger.Severity.ERROR",
        "trt.IProgressMonitor.step_complete",
        "builder.build_serialized_network",
        "config.num_compute_capabilities",
        "config.set_timing_cache",
        "network.get_input",
        "parser.parse_from_file",
        "problem.desc",
        "added.set_shape",
        "tensor.shape",
        "measured.serialize",
    } <= set(USED)
    wrong = ast.parse("class Log(trt.ILogger):\n def lug(self): trt.Bilder(); config.a.b()")
    assert names_used(wrong) == {"trt.ILogger", "trt.ILogger.lug", "trt.Bilder", "config.a.b"} | {
        "config.a"
    }
    assert not any(exists(name) for name in names_used(wrong) - {"trt.ILogger"})


@pytest.mark.parametrize("name", USED)
def test_the_library_has_it(name: str) -> None:
    assert exists(name)


def test_compute_capabilities_are_named_as_the_code_expects() -> None:
    assert {"SM80", "SM86", "SM89", "SM120"} <= set(trt.ComputeCapability.__members__)
    assert library.load_library("tensorrt-rtx").capabilities["12.0"] is trt.ComputeCapability.SM120
