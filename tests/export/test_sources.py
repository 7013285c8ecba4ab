"""Model files: what is read gives the model's own logits, what is not is refused in one line."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import Model, build_model
from ccam_deploy.export.program import build_program, quiet, trace_model
from ccam_deploy.export.sources import load_model
from ccam_deploy.export.torchscript import ScriptedModel
from tests.helpers import ROOT
from tests.networks import make_tiny, tiny

TINY = "tests.networks:tiny"
SIZE = (3, 32, 48)
IMAGES = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files of every kind. Do not change them: copy them."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny()
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(model, folder / "pickled.pt")
    torch.export.save(trace_model(model, SIZE), folder / "program.pt2")
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit.save(jit.trace(model, torch.zeros(2, *SIZE)), folder / "traced.pt")
        jit.save(jit.script(ByImage()), folder / "scripted.pt")
    return folder


class ByImage(nn.Module):
    """Goes through the batch in a loop, which a trace would unroll."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for i in range(x.size(0)):
            rows.append(self.conv(x[i : i + 1]).mean((2, 3)))
        return torch.cat(rows)


def logits(model: Model) -> Tensor:
    """What the export would work on: the traced and decomposed graph."""
    exported = model if isinstance(model, torch.export.ExportedProgram) else None
    built = build_program(exported or trace_model(model, SIZE), fold=False)  # type: ignore[arg-type]
    with torch.no_grad():
        (value,) = built.graph(IMAGES)
    assert isinstance(value, Tensor)
    return value


def same_weights(one: Model, other: nn.Module) -> bool:
    mine, theirs = one.state_dict, other.state_dict()
    values = mine() if callable(mine) else mine
    return list(values) == list(theirs) and all(torch.equal(values[n], theirs[n]) for n in theirs)


def refusal(action: Callable[[], object]) -> str:
    """The message of the SourceError that an action raises."""
    with pytest.raises(SourceError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "arch", "allow_pickle"),
    [
        ("program.pt2", None, False),
        ("weights.pt", TINY, False),
        ("weights.pt", TINY, True),
        ("old.pt", TINY, False),
        ("traced.pt", None, False),
        ("pickled.pt", None, True),
    ],
)
def test_logits_are_the_models(
    folder: Path, name: str, arch: str | None, allow_pickle: bool
) -> None:
    with torch.no_grad():
        expected = tiny()(IMAGES)
    model = load_model(folder / name, arch, allow_pickle)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_arguments_of_the_architecture(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = make_tiny(7)
    torch.save(model.state_dict(), tmp_path / "seven.pt")
    loaded = load_model(tmp_path / "seven.pt", " tests.networks:make_tiny(classes=7) ")
    assert same_weights(loaded, model)
    plain = build_model("tests.networks:make_tiny()")
    assert plain.get_parameter("head.weight").shape == (5, 8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["state_dict", "nested", "data-parallel", "both"],
)
def test_wrapped_checkpoints(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = tiny()
    with torch.no_grad():
        model.head.bias.add_(1)
    torch.save(wrap(model.state_dict()), tmp_path / "wrapped.pt")
    assert same_weights(load_model(tmp_path / "wrapped.pt", TINY), model)


def test_scripts_that_fix_the_batch_are_refused(folder: Path) -> None:
    model = load_model(folder / "scripted.pt")
    assert isinstance(model, ScriptedModel)
    torch.testing.assert_close(model(IMAGES).shape, torch.Size((3, 5)))
    assert refusal(lambda: trace_model(model, SIZE)) == (
        "torch.export cannot trace the model on images of 3x32x48: the TorchScript code fixes the "
        "batch, or cannot be traced; save the original model with "
        "torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_run_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    torch.save(Trap(tmp_path / "sprung"), path)
    for file in (path, folder / "pickled.pt"):
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


def crafted(folder: Path, path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Copy the program, one of its members changed."""
    with zipfile.ZipFile(folder / "program.pt2") as old, zipfile.ZipFile(path, "w") as new:
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
    folder: Path, tmp_path: Path, member: str, message: str
) -> None:
    path, mark = tmp_path / "program.pt2", tmp_path / "sprung"
    name, change = sprung(member, mark)
    crafted(folder, path, name, change)
    text = refusal(lambda: load_model(path))
    assert text.startswith(f"{path} can run code: ")
    assert f'{name}" {message}; save model.state_dict() or' in text
    assert text.endswith("or trust it with --allow-pickle")
    assert not mark.exists()


@pytest.mark.parametrize("member", ["sample inputs", "expr_str"])
def test_a_programs_code_runs_when_allowed(folder: Path, tmp_path: Path, member: str) -> None:
    """It shows that the trap works, and the warning comes before."""
    path, mark = tmp_path / "program.pt2", tmp_path / "sprung"
    crafted(folder, path, *sprung(member, mark))
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


def test_compiled_programs_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(folder / "program.pt2") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        new.writestr("program/data/aotinductor/model/model.so", b"")
    assert 'model.so" is compiled; ' in refusal(lambda: load_model(path))


@pytest.mark.parametrize("name", ["program.pt2", "weights.pt", "pickled.pt"])
def test_only_what_runs_code_is_warned_of(folder: Path, name: str) -> None:
    lines: list[str] = []
    load_model(folder / name, TINY, True, lines.append)
    pickled = [f"reading {folder / name} runs the code that it holds"]
    assert lines == (pickled if name == "pickled.pt" else [])


def test_sizes_are_formulas(tmp_path: Path) -> None:
    """Programs whose sizes are computed from a dynamic batch and image are read."""

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: x.shape[0] // 2, :, : x.shape[2] // 3].mean((2, 3))

    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(
        Halves(), (torch.zeros(4, 3, 33, 32),), dynamic_shapes=(dims,), strict=False
    )
    torch.export.save(program, tmp_path / "halves.pt2")
    with zipfile.ZipFile(tmp_path / "halves.pt2") as archive:
        text = archive.read("halves/models/model.json")
    assert b"FloorDiv" in text
    assert isinstance(load_model(tmp_path / "halves.pt2"), torch.export.ExportedProgram)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert refusal(lambda: load_model(path)) == f"{path} does not exist"
    assert refusal(lambda: load_model(tmp_path)) == f"{tmp_path} is a folder; give a model file"
    path.touch()
    assert refusal(lambda: load_model(path)) == f"{path} is empty"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(lambda: load_model(path)) == f"{path} is not a PyTorch file"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert refusal(lambda: load_model(path)) == (
        f"{path} is a ZIP archive, but not one that PyTorch wrote"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/archive_format", "pt2")
    assert refusal(lambda: load_model(path)).startswith(f"{path} cannot be read: ")
    path.write_bytes(pickle.dumps([1, 2], protocol=2)[:-3])
    assert str(path) in refusal(lambda: load_model(path))
    for content, kind in (([1, 2], "list"), ({0: torch.zeros(1)}, "dict"), ({}, "dict")):
        torch.save(content, path)
        assert refusal(lambda: load_model(path)) == (
            f"{path} holds a {kind}, neither weights nor a module; "
            "save model.state_dict() or an exported program"
        )


@pytest.mark.parametrize("name", ["weights.pt", "program.pt2", "traced.pt"])
def test_truncated_and_flipped_archives(folder: Path, tmp_path: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) // 2])
    assert refusal(lambda: load_model(path, TINY)) == (
        f"{path} is truncated or damaged; copy or save it again"
    )
    with zipfile.ZipFile(folder / name) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
        name_length = len(member.filename) + len(member.extra)
    changed = bytearray(content)
    changed[member.header_offset + 30 + name_length + member.compress_size] ^= 1
    path.write_bytes(changed)
    message = refusal(lambda: load_model(path, TINY))
    assert message.startswith(f"{path} is ")
    assert message.endswith("; copy or save it again")
    assert "damaged" in message


@pytest.mark.slow
def test_any_flipped_byte_is_refused_or_harmless(folder: Path, tmp_path: Path) -> None:
    """In the members of an archive: their padding and dates carry no check sum, all else does."""
    content = (folder / "weights.pt").read_bytes()
    path, refused = tmp_path / "weights.pt", 0
    with zipfile.ZipFile(folder / "weights.pt") as archive:
        end = archive.start_dir
    for offset in range(0, end, 13):
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        try:
            model = load_model(path, TINY)
        except SourceError:
            refused += 1
        else:
            assert same_weights(model, tiny())
    assert refused > end / 13 / 2


def test_weights_without_batch_counters(tmp_path: Path) -> None:
    """As PyTorch before 0.4.1 wrote them."""
    state = tiny().state_dict()
    kept = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    torch.save(kept, tmp_path / "old.pt")
    loaded = load_model(tmp_path / "old.pt", TINY)
    assert isinstance(loaded, nn.Module)
    assert all(torch.equal(loaded.state_dict()[name], kept[name]) for name in kept)


def test_weights_of_another_network(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    state = tiny().state_dict()
    prefix = f"{path} is not for {TINY}: "
    torch.save({n: v for n, v in state.items() if not n.startswith("head")}, path)
    assert refusal(lambda: load_model(path, TINY)) == f'{prefix}it lacks "head.weight" and 1 more'
    torch.save(state | {"extra": torch.zeros(1)}, path)
    assert refusal(lambda: load_model(path, TINY)) == f'{prefix}it has the unknown "extra"'
    torch.save(state | {"head.bias": torch.zeros(9)}, path)
    assert refusal(lambda: load_model(path, TINY)) == (
        f'{prefix}"head.bias" is [9] in the file, [5] in the network'
    )
    torch.save(state, path)
    assert refusal(lambda: load_model(path)) == (
        f"{path} holds weights alone; name their network with --arch module:factory"
    )


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("", 'arch "" is not module:factory, such as torchvision.models:resnet18'),
        ("tests.helpers", 'arch "tests.helpers" is not module:factory, such as'),
        ("tests.networks:tiny[0]", "is not module:factory, such as"),
        ("tests.networks:nothing", 'module "tests.networks" has no "nothing"'),
        ("tests.networks:tiny.a.b", 'module "tests.networks" has no "tiny.a.b"'),
        ("no.such:net", "module \"no.such\" cannot be imported: No module named 'no'"),
        ("..:net", 'module ".." cannot be imported: '),
        ("tests.helpers:ROOT", "tests.helpers:ROOT cannot be built: 'PosixPath' object is not"),
        ("tests.helpers:example_files", "example_files gives a value of type list, not a torch."),
        ("tests.networks:tiny(depth=3)", "cannot be built: tiny() got an unexpected keyword"),
        ("tests.networks:tiny(3)", "the arguments in arch"),
        ("tests.networks:tiny(channels=open('x'))", "are not name=value literals"),
        ("tests.networks:tiny(channels={[]: 1})", "are not name=value literals"),
        ("tests.networks:tiny(channels=)", "are not name=value literals"),
        ("tests.networks:tiny(channels=1)(channels=3)", "are not name=value literals"),
        ("tests.networks:tiny(channels=" + "(" * 500 + ")" * 501, "are not name=value literals"),
    ],
)
def test_bad_architectures(arch: str, message: str) -> None:
    assert message in refusal(lambda: build_model(arch))


def test_imports_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_of_today.py").write_text("from tests.networks import tiny as net\n")
    (tmp_path / "my_broken_net.py").write_text("raise ValueError('boom\\nmore')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(build_model("my_nets_of_today:net"), nn.Module)
    assert refusal(lambda: build_model("my_broken_net:net")) == (
        'module "my_broken_net" cannot be imported: boom'
    )
    assert sys.path == before


def test_factories_and_pickles_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a factory runs, and while a pickled module is read."""
    (tmp_path / "my_parts_of_today.py").write_text(
        "from torch import nn\nclass Part(nn.Linear):\n    pass\n"
    )
    (tmp_path / "my_late_net.py").write_text(
        "def net():\n    from my_parts_of_today import Part\n    return Part(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    model = build_model("my_late_net:net")
    torch.save(model, tmp_path / "pickled.pt")
    monkeypatch.delitem(sys.modules, "my_parts_of_today")
    loaded = load_model(tmp_path / "pickled.pt", None, True)
    assert type(loaded).__name__ == "Part"
    assert sys.path == before


@pytest.mark.slow
def test_torchvision_works_whatever_torch_it_was_built_for() -> None:
    """In a process of its own: one that has no torchvision yet."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    code = (
        "import torch; from ccam_deploy.export.architecture import build_model\n"
        "for name in ('resnet18(num_classes=4)', 'mobilenet_v3_small(num_classes=4)'):\n"
        "    model = build_model('torchvision.models:' + name).eval()\n"
        "    print(list(model(torch.zeros(2, 3, 64, 64)).shape))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("[2, 4]\n[2, 4]\n", 0), done.stderr
