"""The graph of winning probabilities against a walk through the modules, and by hand."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import UNSET
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ccam_deploy as ccam
from ccam_deploy.bundle.consistency import require_consistency
from ccam_deploy.bundle.folder import (
    MANIFEST,
    Bundle,
    read_bundle,
    write_manifest,
)
from ccam_deploy.bundle.manifest import GRAPHS, IMAGE_GRADIENTS
from ccam_deploy.engines import open_networks
from ccam_deploy.errors import IntegrityError, ManifestError, OptionError
from ccam_deploy.export import ExportSettings, excitation, export
from ccam_deploy.export.layers import find_layers
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.reference import TorchClassifier
from ccam_deploy.fidelity.comparison import relative_error
from ccam_deploy.fidelity.verification import verify_bundle
from tests.command import success
from tests.excitation import Concatenation, Mean, Sum, chain_of_digits, winning
from tests.helpers import DIGITS_LAYERS, example_pictures, noise
from tests.networks import digits_model, tiny
from tests.sweeps import nightly_but

Graph = torch.fx.GraphModule


def graph_of(model: nn.Module, size: int, names: list[str], double: bool = True) -> Graph:
    built = build_program(trace_model(model.eval(), (3, size, size)), keep=names)
    found = find_layers(built, names)
    assert excitation.why_not(built, found) == ""
    return excitation.excite(built, found, torch.float64 if double else torch.float32)


def conv(inner: int, outer: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, stride, 1)


def network() -> nn.Sequential:
    """Every kind of layer that has a rule; target layers are 1, 3, 5 and 7."""
    torch.manual_seed(0)
    residual = Sum(nn.Sequential(conv(8, 8, 2), nn.ReLU(), conv(8, 8)), nn.Conv2d(8, 8, 1, 2))
    inception = Concatenation(
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 6, 1, groups=2), nn.ReLU()),
    )
    return nn.Sequential(
        *(conv(3, 8), nn.ReLU()),
        *(residual, nn.ReLU()),
        *(nn.MaxPool2d(2), inception),
        *(nn.AvgPool2d(2), nn.Identity()),
        nn.Flatten(),
        *(nn.Linear(10 * 2 * 2, 12), nn.ReLU()),
        nn.Linear(12, 5),
    )


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(noise(4, 3, 16, 16)).double()


WINNERS = torch.from_numpy(np.random.default_rng(3).dirichlet(np.ones(5), 4))
NONE = torch.zeros(4, 5, dtype=torch.float64)
TARGETS = {"1": 2, "3": 4, "5": 6}
"""The target layers of `network`, and of which module each is the input."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    """That of `network`, in double precision."""
    return graph_of(network(), 16, list(TARGETS))


@pytest.mark.slow
@pytest.mark.parametrize("dual", [False, True])
def test_every_rule_against_the_walk(graph: Graph, images: Tensor, dual: bool) -> None:
    """In double precision, to 1e-6 of float32 weights; classes and duals may be mixed."""
    got = graph(images, NONE, WINNERS) if dual else graph(images, WINNERS, NONE)
    expected = winning(network().double(), images, WINNERS, dual)
    for maps, place in zip(got, TARGETS.values(), strict=True):
        assert maps.sum() > 1
        torch.testing.assert_close(maps, expected[place].sum(1), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_classes_and_duals_add_up(graph: Graph, images: Tensor) -> None:
    both = graph(images, WINNERS, -2 * WINNERS)
    parts = zip(graph(images, WINNERS, NONE), graph(images, NONE, WINNERS), strict=True)
    for maps, (one, other) in zip(both, parts, strict=True):
        torch.testing.assert_close(maps, one - 2 * other)


@pytest.mark.parametrize("name", DIGITS_LAYERS)
def test_the_trained_example(differentiable: ccam.Explainer, name: str) -> None:
    """On ONNX Runtime, to 1e-4 for each image; one may miss it, see test_gradients."""
    images, _ = differentiable.preprocess(example_pictures())
    classes = differentiable.networks.backbone(images).logits.argmax(axis=1)
    winners = np.eye(10, dtype=np.float32)[classes]
    place = DIGITS_LAYERS.index(name)
    for dual in (False, True):
        pair = (0 * winners, winners) if dual else (winners, 0 * winners)
        got = differentiable.networks.excitation(images, *pair)[place]
        chain = chain_of_digits(digits_model())
        walked = winning(chain, torch.from_numpy(images), torch.from_numpy(winners), dual)
        expected = walked[2 * place + 4].sum(1).detach().numpy()
        errors = [relative_error(*two) for two in zip(got, expected, strict=True)]
        assert got.dtype == np.float32
        assert np.count_nonzero(np.array(errors) > 1e-4) <= 1
        assert np.median(errors) <= 1e-5


class Weighing(nn.Module):
    """Three places, and weights of two classes for each that are given."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.shift = nn.Conv2d(3, 1, 1, bias=False)
        self.head = nn.Linear(3, 2)
        self.shift.weight.data = torch.tensor([[[[1.0]], [[0.0]], [[0.0]]]])
        self.head.weight.data = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shift(x).relu().flatten(1))  # type: ignore[no-any-return]


def test_by_hand() -> None:
    """Places of 2, 1 and 0, and one below zero: shares are weight times value, of the positive."""
    model = Weighing([[1.0, -3.0, 5.0], [1.0, 2.0, 7.0]])
    built = build_program(trace_model(model, (3, 1, 3)))
    graph = excitation.excite(built, find_layers(built, ["relu"]))
    image = torch.tensor([[[2.0, 1.0, -4.0]]]).repeat(1, 3, 1, 1)
    images, both = image.repeat(2, 1, 1, 1), torch.eye(2)
    (got,) = graph(images, both, torch.zeros(2, 2))
    assert got.tolist() == [[[1, 0, 0]], [[0.5, 0.5, 0]]]
    (got,) = graph(images, both, -both)
    assert got.tolist() == [[[1, -1, 0]], [[0.5, 0.5, 0]]]
    (got,) = graph(-images.abs(), both, torch.zeros(2, 2))
    assert not got.any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", nightly_but([0], range(4)))
def test_probability_is_kept(seed: int) -> None:
    """Where weights and values are positive, every layer has what the classes were given."""
    torch.manual_seed(seed)
    model = network()
    for name, value in model.named_parameters():
        value.data = torch.zeros_like(value) if name.endswith("bias") else torch.rand(value.shape)
    graph = graph_of(model, 16, list(TARGETS), double=False)
    winners = torch.rand(3, 5)
    for maps in graph(torch.rand(3, 3, 16, 16) + 0.1, winners, torch.zeros(3, 5)):
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum((1, 2)), winners.sum(1))


def normalised(turned: bool) -> nn.Sequential:
    """Normalisation after a convolution, and one that stays a scale, both with signs turned."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    for norm in (first, second):
        norm.running_mean = torch.randn(8)
        norm.running_var = torch.rand(8) + 0.5
        norm.weight.data.uniform_(0.5, 1.5)
        norm.weight.data[::2] *= -1 if turned else 1
    return nn.Sequential(
        *(conv(3, 8), nn.ReLU()),
        *(conv(8, 8), first, nn.ReLU()),
        *(second, nn.ReLU()),
        *(Mean(), nn.Linear(8, 5)),
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("turned", nightly_but([True], [False, True]))
@pytest.mark.parametrize("names", [["1"], ["1", "2"]], ids=["folded", "kept"])
def test_normalisation_turns_the_weights_before_it(turned: bool, names: list[str]) -> None:
    """Folded or not, in the graph and in PyTorch; alone, it passes everything."""
    model = normalised(turned)
    images = noise(3, 3, 12, 12)
    winners, none = np.eye(5, dtype=np.float32)[:3], np.zeros((3, 5), np.float32)
    given = [torch.from_numpy(one) for one in (images, winners, none)]
    got = graph_of(model, 12, names, double=False)(*given)[0]
    plain = build_program(trace_model(model, (3, 12, 12)), fold=False)
    peer = TorchClassifier(plain, find_layers(plain, names))
    np.testing.assert_allclose(got, peer.excitation(images, winners, none)[0], atol=1e-6)
    folded = fuse_conv_bn_eval(model[2], model[3])  # type: ignore[type-var, arg-type]
    modules = list(model.children())
    chain = nn.Sequential(*modules[:2], folded, *modules[4:])
    expected = winning(chain, given[0], given[1])[2].sum(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


class Gated(nn.Module):
    """A convolution whose channels are weighed by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = conv(3, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x * self.gate(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(conv(3, 8), nn.SiLU(), Mean(), nn.Linear(8, 5)),
            r'silu in layer "1" has no rule for winning probabilities',
        ),
        (Gated(), r"mul in the model itself has no rule"),
        (
            nn.Sequential(conv(3, 5), nn.ReLU(), Mean()),
            r'the logits come from mean in layer "2", not from a linear layer',
        ),
    ],
    ids=["silu", "gate", "no-linear-layer"],
)
def test_what_has_no_rule_is_named(model: nn.Module, reason: str) -> None:
    built = build_program(trace_model(model.eval(), (3, 12, 12)))
    first = find_layers(built, ["0" if isinstance(model, nn.Sequential) else "stem"])
    assert re.match(reason, excitation.why_not(built, first))
    with pytest.raises(OptionError, match=f"the network has no excitation: {reason}"):
        TorchClassifier(built, first).excitation(
            noise(1, 3, 12, 12), np.ones((1, 5), np.float32), np.ones((1, 5), np.float32)
        )


@pytest.mark.slow
def test_what_lies_before_the_layers_does_not_matter() -> None:
    model = nn.Sequential(conv(3, 8), nn.SiLU(), conv(8, 8), nn.ReLU(), Mean(), nn.Linear(8, 5))
    built = build_program(trace_model(model.eval(), (3, 12, 12)))
    assert excitation.why_not(built, find_layers(built, ["3"])) == ""
    assert "silu" in excitation.why_not(built, find_layers(built, ["0"]))


@pytest.mark.slow
def test_a_network_that_cannot_have_it(tmp_path: Path) -> None:
    """The export says why, the bundle has the other graphs, and the method says what to do."""
    model = tiny()
    lines: list[str] = []
    model.relu2 = nn.SiLU()  # type: ignore[assignment]
    settings = ExportSettings(gradients=True, progress=lines.append)
    bundle = export(model, tmp_path / "smooth", (32, 48), ["relu1", "conv2"], "fp32", settings)
    why = 'silu in layer "relu2" has no rule for winning probabilities'
    assert f"leaving the excitation graph out: {why}" in lines
    assert set(bundle.precision("fp32").graphs) == {*GRAPHS, *IMAGE_GRADIENTS}
    with (
        ccam.load(bundle) as explainer,
        pytest.raises(OptionError, match="no excitation graph; export it again with --gradients"),
    ):
        explainer.explain(noise(1, 3, 32, 48), 1, method="excitation-backprop")


def test_the_manifest_says_what_is_there(gradients_bundle: Path, digits_bundle: Path) -> None:
    """In half precision too the graph is that of float32."""
    chosen = read_bundle(gradients_bundle).manifest.precisions
    for precision in chosen.values():
        assert precision.graphs["excitation"] == "excitation.onnx"
        report = precision.fidelity.excitation
        assert isinstance(report, tuple)
        assert max(report) <= precision.tolerance["excitation"] == 1e-2
        assert len(report) == 4
    assert chosen["fp16"].graphs["backbone"] != chosen["fp32"].graphs["backbone"]
    without = read_bundle(digits_bundle).precision("fp32")
    assert "excitation" not in {*without.graphs, *without.tolerance}
    assert without.fidelity.excitation is UNSET
    assert "\nexcitation, worst layer  " in success("info", gradients_bundle).stdout
    assert "excitation" not in success("info", digits_bundle).stdout
    assert ", excitation " in success("verify", gradients_bundle).stdout
    assert "excitation" not in success("verify", digits_bundle).stdout


def altered(folder: Path, copy: Path) -> Bundle:
    """A copy of a bundle as it was before there was such a graph."""
    shutil.copytree(folder, copy)
    manifest = read_bundle(copy).manifest
    whole = manifest.precisions["fp32"]
    older = dataclasses.replace(
        whole,
        graphs={k: v for k, v in whole.graphs.items() if k != "excitation"},
        fidelity=dataclasses.replace(whole.fidelity, excitation=UNSET),
        tolerance={k: v for k, v in whole.tolerance.items() if k != "excitation"},
    )
    files = {k: v for k, v in manifest.files.items() if k != "excitation.onnx"}
    changed = dataclasses.replace(manifest, precisions={"fp32": older}, files=files)
    write_manifest(copy, changed)
    assert "excitation" not in (copy / MANIFEST).read_text()
    return read_bundle(copy)


def test_a_bundle_from_before(gradients_bundle: Path, tmp_path: Path) -> None:
    images, one_hot = noise(1, 3, 96, 96), np.eye(10, dtype=np.float32)[:1]
    with ccam.load(altered(gradients_bundle, tmp_path / "older")) as explainer:
        assert explainer.networks.input_gradient(images, one_hot, guided=True).any()
        with pytest.raises(OptionError, match="no excitation graph; export it again with --grad"):
            explainer.networks.excitation(images, one_hot, one_hot)


def test_contradictions(gradients_bundle: Path) -> None:
    manifest = read_bundle(gradients_bundle).manifest
    whole = manifest.precisions["fp32"]
    for value, message in ((UNSET, "differ in excitation"), ((0.0,), "must have 4 layers")):
        report = dataclasses.replace(whole.fidelity, excitation=value)
        changed = dataclasses.replace(whole, fidelity=report)
        with pytest.raises(ManifestError, match=message):
            require_consistency(
                Path("manifest.json"), dataclasses.replace(manifest, precisions={"fp32": changed})
            )


def test_verify_finds_other_probabilities(gradients_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(shutil.copytree(gradients_bundle, tmp_path / "copy"))
    path = bundle.path(bundle.precision("fp32").reference)
    with np.load(path) as values:
        recorded = dict(values)
    networks = open_networks(bundle, "onnxruntime-cpu", "fp32")
    try:
        changed = {**recorded, "excitation_2": recorded["excitation_2"][:, ::-1]}
        np.savez_compressed(path, **changed)
        _, broken = verify_bundle(bundle, networks, "fp32")
        assert [line.split(" is ")[0][:20] for line in broken] == ["excitation of layer3"]
        lost = {name: one for name, one in recorded.items() if not name.startswith("excitation")}
        np.savez_compressed(path, **lost)
        with pytest.raises(IntegrityError, match="holds no excitation; export the bundle again"):
            verify_bundle(bundle, networks, "fp32")
    finally:
        networks.close()
