"""Model files: what is read gives the model's own logits, what is not is refused in one line."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccam_deploy.errors import SourceError
from ccam_deploy.export.architecture import Model
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.sources import load_model
from ccam_deploy.export.torchscript import ScriptedModel
from tests.export.model_files import SIZE, TINY, refusal, same_weights
from tests.networks import tiny

IMAGES = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))


def logits(model: Model) -> Tensor:
    """What the export would work on: the traced and decomposed graph."""
    exported = model if isinstance(model, torch.export.ExportedProgram) else None
    built = build_program(exported or trace_model(model, SIZE), fold=False)  # type: ignore[arg-type]
    with torch.no_grad():
        (value,) = built.graph(IMAGES)
    assert isinstance(value, Tensor)
    return value


@pytest.mark.slow
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
    model_files: Path, name: str, arch: str | None, allow_pickle: bool
) -> None:
    with torch.no_grad():
        expected = tiny()(IMAGES)
    model = load_model(model_files / name, arch, allow_pickle)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


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


def test_scripts_that_fix_the_batch_are_refused(model_files: Path) -> None:
    model = load_model(model_files / "scripted.pt")
    assert isinstance(model, ScriptedModel)
    torch.testing.assert_close(model(IMAGES).shape, torch.Size((3, 5)))
    assert refusal(lambda: trace_model(model, SIZE)) == (
        "torch.export cannot trace the model on images of 3x32x48: the TorchScript code fixes the "
        "batch, or cannot be traced; save the original model with "
        "torch.export.save(torch.export.export(model, ...)) and pass that .pt2 file"
    )


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
    assert refusal(lambda: load_model(path)) == f"{path} is neither a PyTorch file nor an ONNX file"
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
def test_truncated_and_flipped_archives(model_files: Path, tmp_path: Path, name: str) -> None:
    content = (model_files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) // 2])
    assert refusal(lambda: load_model(path, TINY)) == (
        f"{path} is truncated or damaged; copy or save it again"
    )
    with zipfile.ZipFile(model_files / name) as archive:
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
def test_any_flipped_byte_is_refused_or_harmless(model_files: Path, tmp_path: Path) -> None:
    """In the members of an archive: their padding and dates carry no check sum, all else does."""
    content = (model_files / "weights.pt").read_bytes()
    path, refused = tmp_path / "weights.pt", 0
    with zipfile.ZipFile(model_files / "weights.pt") as archive:
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


def test_weights_of_another_network(model_files: Path, tmp_path: Path) -> None:
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
