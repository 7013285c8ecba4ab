"""Networks that are named by the function that builds them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ccam_deploy.export.architecture import build_model
from ccam_deploy.export.sources import load_model
from ccam_deploy.termination import Terminated
from tests.export.model_files import refusal, same_weights
from tests.helpers import ROOT
from tests.networks import make_tiny


def test_arguments_of_the_architecture(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = make_tiny(7)
    torch.save(model.state_dict(), tmp_path / "seven.pt")
    loaded = load_model(tmp_path / "seven.pt", " tests.networks:make_tiny(classes=7) ")
    assert same_weights(loaded, model)
    plain = build_model("tests.networks:make_tiny()")
    assert plain.get_parameter("head.weight").shape == (5, 8)


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


def test_sigterm_while_a_network_is_built_is_not_the_factory_s_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from ccam_deploy.termination import Terminated\n"
    (tmp_path / "ended_in_a_call.py").write_text(f"{text}def net():\n    raise Terminated\n")
    (tmp_path / "ended_in_an_import.py").write_text(f"{text}raise Terminated\n")
    monkeypatch.chdir(tmp_path)
    for name in ("ended_in_a_call", "ended_in_an_import"):
        with pytest.raises(Terminated):
            build_model(f"{name}:net")


def test_the_extra_of_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert refusal(lambda: build_model("torchvision.models:resnet18")) == (
        "module \"torchvision.models\" cannot be imported: No module named 'torchvision'; "
        "pip install 'ccam-deploy[zoo]'"
    )


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
