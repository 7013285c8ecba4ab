"""Models with other inputs than images, and with other outputs than a tensor of logits."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ccam_deploy as ccam
from ccam_deploy.errors import CcamError, OptionError, SourceError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.calling import logits_of
from ccam_deploy.export.constants import parse_constant
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from tests.command import failure, success
from tests.export.onnx_files import network, write_network
from tests.helpers import noise
from tests.networks import TinyNet, tiny
from tests.sweeps import by_pace

SIZE = (16, 24)


@dataclass
class Output:
    """As Hugging Face's models return it, but no dictionary."""

    loss: Tensor | None
    logits: Tensor
    hidden: Tensor


Named = namedtuple("Named", ["logits", "aux"])


class Returns(nn.Module):
    """Logits in something else, beside an auxiliary head and a feature map."""

    def __init__(self, wrap: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap
        net = tiny()
        self.conv1, self.relu1, self.conv2, self.relu2 = net.conv1, net.relu1, net.conv2, net.relu2
        self.head = net.head

    def forward(self, x: Tensor) -> Any:
        maps = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        logits = self.head(maps.mean((2, 3)))
        return self.wrap(logits, 2 * logits, maps)


plain = Returns(lambda z, aux, maps: z)
WRAPS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "dictionary": lambda z, aux, maps: {"aux": aux, "logits": z},
    "dictionary of one": lambda z, aux, maps: {"scores": z},
    "dataclass": lambda z, aux, maps: Output(None, z, maps),
    "named tuple": lambda z, aux, maps: Named(z, aux),
    "tuple": lambda z, aux, maps: (None, z, maps),
    "list of one": lambda z, aux, maps: [z],
    "sides of a pixel": lambda z, aux, maps: z[..., None, None],
    "dictionary of sides": lambda z, aux, maps: {"logits": z[..., None, None], "maps": maps},
}


@pytest.mark.parametrize("name", by_pace(["tuple"], [], WRAPS))
def test_logits_are_found_in_what_a_model_returns(name: str) -> None:
    """Without a change to the model, or to the names of its layers."""
    model = Returns(WRAPS[name]).eval()
    program = build_program(trace_model(model, (3, *SIZE)))
    assert [layer.name for layer in find_layers(program)] == ["relu1", "relu2"]
    images = torch.from_numpy(noise(3, 3, *SIZE))
    with torch.no_grad():
        (got,) = program.graph(images)
        torch.testing.assert_close(got, plain(images))
    assert program.classes == 5
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda z, aux, maps: (z, aux),
            "the model returns tuple of 0 [1, 5], 1 [1, 5], several of which may be logits",
        ),
        (
            lambda z, aux, maps: {"out": maps, "aux": maps},
            "the model returns dict of out [1, 8, 4, 6], aux [1, 8, 4, 6], none of which may be",
        ),
        (lambda z, aux, maps: {"loss": None}, "the model returns dict of no tensors, none of"),
        (lambda z, aux, maps: "text", "the model returns str of no tensors, none of which may be"),
        (lambda z, aux, maps: maps, "the model's output is [s"),
    ],
)
def test_other_outputs_are_refused(wrap: Any, message: str) -> None:
    with pytest.raises(SourceError) as raised:
        build_program(trace_model(Returns(wrap), (3, *SIZE)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_logits_go_before_other_tensors_of_their_shape() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert logits_of({"aux": other, "logits": one}) is one
    assert logits_of(Named(one, other)) is one


class Conditioned(TinyNet):
    """Takes more than images, and they are not the first."""

    def forward(  # type: ignore[override]
        self, gain: Tensor | float, images: Tensor, flip: bool, mask: Tensor | None = None
    ) -> Any:
        images = images.flip(3) if flip else images
        images = images if mask is None else images * mask
        return {"logits": super().forward(images) * gain}


def conditioned() -> Conditioned:
    model = Conditioned()
    model.load_state_dict(tiny().state_dict())
    return model.eval()


def conditioned_factory() -> nn.Module:
    """A factory for `--arch`."""
    return Conditioned()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", [None, np.linspace(0, 1, 24, dtype=np.float32), np.linspace(1, 0, 24)]
)
def test_constants_are_bound_to_other_inputs(mask: Any) -> None:
    """In float32 as the model is, though NumPy makes float64 of most."""
    bound = {"gain": 0.5, "flip": True, "mask": mask}
    program = build_program(trace_model(conditioned(), (3, *SIZE), bound))
    assert [layer.name for layer in find_layers(program)] == ["relu1", "relu2"]
    images = noise(3, 3, *SIZE)
    shown = images[..., ::-1] * (1 if mask is None else mask)
    with torch.no_grad():
        expected = tiny()(torch.from_numpy(shown.astype(np.float32))) * 0.5
        torch.testing.assert_close(program.graph(torch.from_numpy(images))[0], expected)


@pytest.mark.parametrize(
    ("bound", "error", "message"),
    [
        ({}, SourceError, "the model takes gain, images, flip; bind all but the images, each by"),
        (
            {"gain": 1},
            SourceError,
            "the model takes images, flip; bind all but the images, each by "
            "--constant NAME=VALUE (a number, true, false, none or a .npy file)",
        ),
        (
            {"gian": 1},
            OptionError,
            'the model has no input "gian"; it has gain, images, flip, mask',
        ),
        (
            {"gain": np.array("high"), "flip": True},
            OptionError,
            'constant "gain" holds <U4; it must hold numbers',
        ),
    ],
)
def test_inputs_that_are_not_bound(
    bound: dict[str, Any], error: type[CcamError], message: str
) -> None:
    with pytest.raises(error) as raised:
        trace_model(conditioned(), (3, *SIZE), bound)
    assert message in str(raised.value)


def test_a_program_has_no_inputs_to_bind(tmp_path: Path) -> None:
    program = trace_model(tiny(), (3, *SIZE))
    with pytest.raises(OptionError, match="constants bind inputs of a PyTorch module; export this"):
        export(program, tmp_path / "bundle", settings=ExportSettings(constants={"flip": True}))


@pytest.mark.slow
def test_a_file_of_logits_with_sides(tmp_path: Path) -> None:
    """An ONNX file as of SqueezeNet."""
    model = Returns(WRAPS["sides of a pixel"]).eval()
    path = write_network(tmp_path / "model.onnx", model, SIZE, False, 1)
    program = build_program(network(path).trace(SIZE))
    images = torch.from_numpy(noise(2, 3, *SIZE))
    with torch.no_grad():
        torch.testing.assert_close(program.graph(images)[0], plain(images))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip=true", ("flip", True)),
        ("flip = False", ("flip", False)),
        ("mask=None", ("mask", None)),
        ("gain=-3", ("gain", -3)),
        ("gain=1e-3", ("gain", 1e-3)),
    ],
)
def test_constants_are_written_as_people_do(text: str, expected: tuple[str, Any]) -> None:
    assert parse_constant(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gain", 'constant "gain" is not name=value'),
        ("=3", 'constant "=3" is not name=value'),
        ("gain=", 'constant "gain=" is not name=value'),
        (
            "gain=high",
            'constant "gain" is "high"; it must be a number, true, false, none or a .npy',
        ),
        ("gain=none.npy", "none.npy is not a .npy file that can be read"),
    ],
)
def test_constants_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_constant(text)
    assert message in str(raised.value)


@pytest.mark.slow
def test_the_command_binds_constants(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "net.pt")
    np.save(tmp_path / "mask.npy", np.linspace(0, 1, 48, dtype=np.float32))
    command: tuple[object, ...] = ("export", tmp_path / "net.pt", "--input-size", "32x48")
    command += ("--arch", "tests.export.test_calling:conditioned_factory")
    command += ("--output", tmp_path / "out")
    assert "the model takes gain, images, flip; bind all but the images" in failure(*command)
    mask = f"mask={tmp_path / 'mask.npy'}"
    twice = ("--constant", "gain=0.5", "--constant", "gain=1", "--constant", "flip=true")
    assert failure(*command, *twice) == "--constant binds an input twice; give each once"
    bound = ("--constant", "gain=0.5", "--constant", "flip=true", "--constant", mask)
    success(*command, *bound)
    images = noise(2, 3, 32, 48)
    with ccam.load(tmp_path / "out") as explainer:
        got = explainer.explain(images).logits
    with torch.no_grad():
        shown = images[..., ::-1] * np.load(tmp_path / "mask.npy")
        expected = tiny()(torch.from_numpy(shown.astype(np.float32))) * 0.5
    np.testing.assert_allclose(got, expected, atol=1e-5)
