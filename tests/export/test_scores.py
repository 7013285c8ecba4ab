"""Which outputs are logits, what makes probabilities of them, and a single one's two classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit
from torch import Tensor

import ccam_deploy as ccam
from ccam_deploy.errors import OptionError
from ccam_deploy.export import ExportSettings, export
from ccam_deploy.export.program import build_program, trace_model
from ccam_deploy.export.scores import (
    describe_scores,
    final_activation,
    warn_of_probabilities,
    with_logits,
)
from tests.command import failure, success
from tests.helpers import noise
from tests.networks import Ended, tiny
from tests.sweeps import by_pace, nightly_but

SIZE = (16, 24)


def twice(values: Tensor) -> Tensor:
    """A sigmoid that something else reads as well."""
    gates = values.sigmoid()
    return gates * values.mean(1, keepdim=True) + gates


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "nothing": (lambda z: z, None),
    "softmax": (lambda z: z.softmax(1), "softmax"),
    "negative axis": (lambda z: z.softmax(-1), "softmax"),
    "temperature": (lambda z: (z / 2).softmax(1), "softmax"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "reshaped": (lambda z: z[..., None, None].softmax(1).flatten(1), "softmax"),
    "squeezed": (lambda z: z[..., None].sigmoid().squeeze(-1).clone(), "sigmoid"),
    "log-softmax": (lambda z: z.log_softmax(1), "log-softmax"),
    "log-softmax of a module": (torch.nn.LogSoftmax(-1), "log-softmax"),
    "log-softmax over the batch": (lambda z: z.log_softmax(0), None),
    "over the batch": (lambda z: z.softmax(0), None),
    "over another axis": (lambda z: z[:, None].softmax(1).flatten(1), None),
    "over groups": (lambda z: z.repeat(1, 2).view(-1, 5, 2).softmax(1).flatten(1), None),
    "read by others": (twice, None),
}

QUICK = ("softmax", "sigmoid", "over the batch")
NIGHTLY = (
    "negative axis",
    "temperature",
    "squeezed",
    "log-softmax",
    "log-softmax over the batch",
)
"""What another end stands for."""


@pytest.mark.slow
@pytest.mark.parametrize("name", by_pace(QUICK, NIGHTLY, ENDS))
def test_an_activation_at_the_end_is_cut_off(name: str) -> None:
    """And put back, it gives the model's outputs."""
    end, found = ENDS[name]
    model = Ended(end).eval()
    program = build_program(trace_model(model, (3, *SIZE)), fold=False)
    assert final_activation(program) == found
    scored = with_logits(program)
    activation = "sigmoid" if found == "sigmoid" else "softmax"
    assert (scored.activation, scored.single) == (activation, False)
    images = torch.from_numpy(noise(3, 3, *SIZE))
    with torch.no_grad():
        (logits,) = scored.graph(images)
        expected = model(images)
    if found:
        put_back = {"softmax": torch.softmax, "log-softmax": torch.log_softmax}
        logits = put_back[found](logits, 1) if found in put_back else logits.sigmoid()
    torch.testing.assert_close(logits, expected)
    assert describe_scores(scored, found) == (
        f"the model ends in a {found}, which is left out: its logits are explained; "
        "--activation none keeps the output as it is"
        if found
        else ""
    )


@pytest.mark.parametrize(
    "end", [pytest.param(lambda z: z, id="nothing", marks=pytest.mark.slow), torch.sigmoid]
)
def test_a_single_logit_has_two_classes(end: Callable[[Tensor], Tensor]) -> None:
    model = Ended(end, 1).eval()
    program = build_program(trace_model(model, (3, *SIZE)))
    found = final_activation(program)
    scored = with_logits(program)
    assert (scored.classes, scored.activation, scored.single) == (2, "sigmoid", True)
    images = torch.from_numpy(noise(3, 3, *SIZE))
    with torch.no_grad():
        (logits,) = scored.graph(images)
        z = model.net(images)
    torch.testing.assert_close(logits, torch.cat([-z, z], 1))
    assert "the model has one output: it scores class 1, its negative class 0; " in (
        describe_scores(scored, found)
    )


@pytest.mark.slow
def test_outputs_as_they_are() -> None:
    """With "none" neither the end nor a single output changes."""
    for classes in (1, 5):
        model = Ended(torch.sigmoid, classes).eval()
        scored = with_logits(build_program(trace_model(model, (3, *SIZE))), "none")
        assert (scored.classes, scored.activation, scored.single) == (classes, "none", False)
        images = torch.from_numpy(noise(3, 3, *SIZE))
        with torch.no_grad():
            torch.testing.assert_close(scored.graph(images)[0], model(images))
        assert describe_scores(scored, "sigmoid") == ""


@pytest.mark.parametrize(
    ("end", "classes", "wanted", "message"),
    [
        (torch.sigmoid, 5, "softmax", "the model ends in a sigmoid, which --activation softmax"),
        pytest.param(
            *(lambda z: z.softmax(1), 5, "sigmoid"),
            "ends in a softmax, which --activation sigmoid",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(lambda z: z.log_softmax(1), 5, "sigmoid"),
            "in a log-softmax, which --activation sigm",
            marks=pytest.mark.slow,
        ),
        (lambda z: z, 1, "softmax", "the softmax of one value is always 1; export with --activ"),
    ],
)
def test_activations_that_do_not_fit(end: Any, classes: int, wanted: Any, message: str) -> None:
    program = build_program(trace_model(Ended(end, classes).eval(), (3, *SIZE)))
    with pytest.raises(OptionError, match=message):
        with_logits(program, wanted)


def test_outputs_that_look_like_probabilities() -> None:
    shares = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    assert "outputs add up to 1 on the calibration images" in warn_of_probabilities(shares)
    assert "outputs lie between 0 and 1" in warn_of_probabilities(shares * 0.9)
    assert warn_of_probabilities(shares * 2) == ""
    assert warn_of_probabilities(shares - 0.5) == ""


def test_settings_name_a_known_activation() -> None:
    with pytest.raises(OptionError, match=r'^activation is "relu"; it must be one of softmax, sig'):
        ExportSettings(activation="relu")  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_end_that_no_graph_shows_is_told(tmp_path: Path) -> None:
    steps: list[str] = []
    model = Ended(lambda z: z.exp() / z.exp().sum(1, keepdim=True)).eval()
    settings = ExportSettings(progress=steps.append, tolerance={"fp32": {"saliency_rank": -1}})
    export(model, tmp_path / "bundle", SIZE, None, settings=settings)
    told = [line for line in steps if "outputs add up to 1" in line]
    assert len(told) == 1
    assert "export with --activation none" in told[0]


@pytest.mark.slow
def test_a_single_logit_is_explained_for_both_classes(bundles: Any) -> None:
    """By its negative for class 0, whose probability is the complement."""
    model = Ended(torch.sigmoid, 1).eval()
    images = noise(2, 3, *SIZE)
    with ccam.load(bundles.get("binary")) as explainer:
        result = explainer.explain(images, [[0, 1], [1, "negative"]], method=ccam.GradCAM())
        best = explainer.explain(images).targets
        manifest = explainer.bundle.manifest
    assert manifest.labels == ("negative", "positive")
    assert manifest.activation == "sigmoid"
    with torch.no_grad():
        z = model.net(torch.from_numpy(images))[:, 0].numpy()
    np.testing.assert_allclose(result.logits, np.stack([-z, z], 1), atol=1e-5)
    assert best.tolist() == (z > 0).astype(int).tolist()
    shown = [result.probability(pair) for pair in range(4)]
    np.testing.assert_allclose(shown, expit([-z[0], z[0], z[1], -z[1]]), atol=1e-5)
    assert shown[0] + shown[1] == pytest.approx(1)
    kept: list[Tensor] = []
    model.net.get_submodule("relu2").register_forward_hook(lambda m, i, o: kept.append(o))
    logit = model.net(torch.from_numpy(images[:1]).requires_grad_())
    (gradient,) = torch.autograd.grad(logit.sum(), kept)
    for pair, sign in ((0, -1), (1, 1)):
        weights = sign * gradient[0].mean((1, 2))
        low = (weights[:, None, None] * kept[0][0]).sum(0).relu()
        wide = torch.nn.functional.interpolate(low[None, None], SIZE, mode="bilinear")[0, 0]
        np.testing.assert_allclose(result.raw_saliency[pair], wide.detach(), atol=1e-5)


METHODS = {
    "collection-cam": (ccam.CollectionCAM(score="probability"), ccam.CollectionCAM()),
    "rise": (ccam.RISE(masks=40), ccam.RISE(masks=40, score="logit")),
    "recipro-cam": (ccam.ReciproCAM(), ccam.ReciproCAM(score="logit")),
    "score-cam": (ccam.ScoreCAM(weights="probability"),) * 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly_but(["rise", "score-cam"], METHODS))
def test_probabilities_are_the_outputs_of_the_network_with_its_end(bundles: Any, name: str) -> None:
    """One export cuts the sigmoid off and scores by it, the other explains its outputs."""
    images = noise(2, 3, *SIZE, seed=3)
    targets: Any = [[0, 3], 2]
    by_probability, by_output = METHODS[name]
    with ccam.load(bundles.get("sigmoid")) as explainer:
        got = explainer.explain(images, targets, method=by_probability)
    with ccam.load(bundles.get("outputs")) as explainer:
        expected = explainer.explain(images, targets, method=by_output)
    np.testing.assert_allclose(expit(got.logits), expected.logits, atol=1e-6)
    assert got.logits.min() < 0
    np.testing.assert_allclose(got.raw_saliency, expected.raw_saliency, atol=2e-5)
    for pair in range(3):
        assert got.probability(pair) == pytest.approx(expected.probability(pair), abs=1e-6)
        np.testing.assert_allclose(got.mic[pair], expected.mic[pair], atol=1e-5)


@pytest.mark.slow
def test_info_shows_the_activation(bundles: Any) -> None:
    for name, words in (
        ("sigmoid", "sigmoid of each logit"),
        ("outputs", "the outputs as they are"),
        ("tiny", "softmax of the logits"),
    ):
        lines = success("info", bundles.get(name)).stdout.splitlines()
        assert [line.split(None, 1)[1] for line in lines if line.startswith("scores")] == [words]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), [("outputs", "output"), ("sigmoid", "probability")])
def test_outputs_are_not_called_probabilities(
    name: str, word: str, bundles: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (24, 16), "white").save(tmp_path / "one.png")
    line = success("explain", bundles.get(name), tmp_path / "one.png", "--save", "none").stdout
    assert re.search(rf": class \w+, {word} \d\.\d{{3}}, ", line), line


@pytest.mark.slow
def test_the_command_and_a_recipe_take_it(tmp_path: Path) -> None:
    """One label names the class; a recipe's activation gives way to the option."""
    arch = "tests.networks:make_tiny(classes=1)"
    torch.save(Ended(torch.sigmoid, 1).net.state_dict(), tmp_path / "one.pt")
    (tmp_path / "names.txt").write_text("defect\n")
    (tmp_path / "one.toml").write_text(
        f'name = "one"\narch = "{arch}"\nweights = "one.pt"\nactivation = "none"\n'
        "[input]\nsize = [16, 24]\n[tolerance.fp32]\nsaliency_rank = 0\n"
    )
    recipe = ("export", "--recipe", tmp_path / "one.toml", "--output", tmp_path / "out")
    options = ("--activation", "sigmoid", "--labels", tmp_path / "names.txt")
    result = success(*recipe, *options, "--json")
    manifest = json.loads(result.stdout)["manifest"]
    assert (manifest["labels"], manifest["activation"]) == (["not defect", "defect"], "sigmoid")
    assert "the model has one output: it scores class 1" in result.stderr
    assert failure(*recipe, "--activation", "softmax") == (
        "the model has one output, and the softmax of one value is always 1; "
        "export with --activation sigmoid, or none for the output as it is"
    )


@pytest.mark.slow
def test_tiny_keeps_its_classes() -> None:
    program = build_program(trace_model(tiny(), (3, *SIZE)))
    assert with_logits(program) == program
