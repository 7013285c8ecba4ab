"""The model repository: what is in it, how it is replaced, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ccam_deploy.bundle.folder import read_bundle, read_manifest
from ccam_deploy.errors import OptionError, OutputError
from ccam_deploy.serve import repository as module
from ccam_deploy.serve.repository import Serving, explaining_config, write_repository
from ccam_deploy.serve.settings import ModelSettings
from tests.command import failure, success


def fields(config: str, name: str) -> list[str]:
    """The values of a field of a configuration, as they are written."""
    return re.findall(rf"^{name}:? ?(.*)$", config, re.MULTILINE)


def parameters(config: str) -> dict[str, str]:
    pairs = re.findall(
        r'^parameters { key: "(\w+)" value { string_value: ("(?:[^"\\]|\\.)*") } }$', config, re.M
    )
    return {key: json.loads(value) for key, value in pairs}


def test_models_hold_all_that_they_need(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["--max-batch", 4, "--instances", 2, "--queue-delay-us", 50, "--kind", "cpu"]
    shown = success("triton", "export", tiny_bundle, tmp_path / "models", *words)
    explaining, picturing = (tmp_path / "models" / name for name in ("ccam", "ccam_image"))
    assert shown.stdout.split() == [str(explaining), str(picturing)]
    copied = read_bundle(explaining / "1" / "bundle")
    assert copied.manifest == read_bundle(tiny_bundle).manifest == read_manifest(picturing / "1")
    assert (explaining / "labels.txt").read_text().split() == ["ant", "bee", "cat", "dog", "dog"]
    config = (explaining / "config.pbtxt").read_text()
    assert fields(config, "max_batch_size") == ["4"]
    assert fields(config, "instance_group") == ["{ count: 2 kind: KIND_CPU }"]
    assert fields(config, "dynamic_batching") == ["{ max_queue_delay_microseconds: 50 }"]
    assert fields(config, "version_policy") == ["{ latest { num_versions: 1 } }"]
    assert fields(config, "model_warmup")
    image = (picturing / "config.pbtxt").read_text()
    assert len(fields(image, "input")) == 1  # or Triton takes no raw body
    assert parameters(image)["explainer"] == "ccam"
    for folder in (explaining, picturing):
        compile((folder / "1" / "model.py").read_text(), "model.py", "exec")


def test_no_queue_policy(tiny_bundle: Path) -> None:
    """It would let idle requests wait for half a second."""
    config = explaining_config(read_bundle(tiny_bundle).manifest, Serving(), ModelSettings())
    assert "policy" not in config.replace("version_policy", "")


def test_settings_come_back_from_the_configuration(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["--methods", "grad-cam,collection-cam", "--option", "k_max=7", "--threads", 3]
    success("triton", "export", tiny_bundle, tmp_path, "--name", "eyes", *words)
    config = (tmp_path / "eyes" / "config.pbtxt").read_text()
    settings = ModelSettings.from_parameters(parameters(config))
    assert settings == ModelSettings(
        ("grad-cam", "collection-cam"), {"collection-cam": {"k_max": 7}}, "fp32", "auto", 3
    )
    assert settings.default == "grad-cam"
    assert 'name: "WEIGHTS" data_type: TYPE_FP32 dims: [2, 7]' in config
    assert 'name: "IMAGES" data_type: TYPE_FP32 dims: [3, 32, 48]' in config


def test_weights_are_outputs_of_collection_cam_alone(tiny_bundle: Path) -> None:
    settings = ModelSettings(methods=("grad-cam",))
    config = explaining_config(read_bundle(tiny_bundle).manifest, Serving(), settings)
    assert "WEIGHTS" not in config
    assert "SALIENCY" in config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": "explode"}, 'method "explode" is unknown'),
        ({"options": "["}, "a parameter in config.pbtxt is unusable"),
        ({"options": '{"grad-cam": {"k": 1}}'}, 'grad-cam has no option "k"; it has layer'),
        ({"options": '{"collection-cam": {"k_max": "x"}}'}, "an option of collection-cam is"),
        ({"options": '{"collection-cam": {"k_max": 0}}'}, "an option of collection-cam is"),
        ({"precision": "fp99"}, "a parameter in config.pbtxt is unusable"),
        ({"threads": "many"}, "a parameter in config.pbtxt is unusable"),
    ],
)
def test_changed_parameters_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        ModelSettings.from_parameters(values)


def test_other_models_stay_and_older_ones_are_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "1").mkdir(parents=True)
    success("triton", "export", tiny_bundle, tmp_path)
    (tmp_path / "ccam" / "left.txt").touch()
    success("triton", "export", tiny_bundle, tmp_path, "--max-batch", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ccam", "ccam_image", "other"]
    assert not (tmp_path / "ccam" / "left.txt").exists()
    assert "max_batch_size: 2" in (tmp_path / "ccam" / "config.pbtxt").read_text()


def test_what_is_in_the_way_is_left(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("ccam", "ccam_image"):
        folder = tmp_path / name / name
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text('name: "mine"\n')
        line = failure("triton", "export", tiny_bundle, folder.parent, "--name", "ccam")
        assert line == f"{folder} exists and is no model of ccam-deploy's; choose another --name"
        assert [path.name for path in folder.iterdir()] == ["config.pbtxt"]
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    line = failure("triton", "export", tiny_bundle, copy)
    assert line == f"{copy} is a bundle; a model repository is a folder of its own"


def test_an_option_that_names_a_file_of_this_machine_is_refused(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    words = ["--methods", "rise", "--option", "rise:file=masks.npy"]
    line = failure("triton", "export", tiny_bundle, tmp_path / "models", *words)
    assert "--option rise:file names a file of this machine" in line
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", 'a"b', "x" * 101])
def test_unusable_names(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    line = failure("triton", "export", tiny_bundle, tmp_path / "models", "--name", name)
    assert line.startswith(f'name "{name}" is unusable')
    assert not (tmp_path / "models").exists()


def test_a_precision_that_the_bundle_lacks(tiny_bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    line = failure("triton", "export", tiny_bundle, place, "--precision", "fp16")
    assert line.startswith("the bundle has no fp16 graphs, only fp32")
    assert not place.exists()


def test_a_broken_off_export_leaves_the_older_models(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model fails when the first is ready to take its place."""
    bundle = read_bundle(tiny_bundle)
    write_repository(bundle, tmp_path, Serving(max_batch=2), ModelSettings())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_picturing", full)
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
        write_repository(bundle, tmp_path, Serving(max_batch=3), ModelSettings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ccam", "ccam_image"]
    assert "max_batch_size: 2" in (tmp_path / "ccam" / "config.pbtxt").read_text()


def test_json_names_the_models(tiny_bundle: Path, tmp_path: Path) -> None:
    result = success("triton", "export", tiny_bundle, tmp_path, "--json")
    assert json.loads(result.stdout) == {
        "models": [str(tmp_path / "ccam"), str(tmp_path / "ccam_image")]
    }
