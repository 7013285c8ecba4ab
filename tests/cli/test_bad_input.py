"""One line for whatever a command cannot take, and nothing left behind."""

from __future__ import annotations

import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from ccam_deploy.bundle.folder import read_bundle, write_manifest
from tests.cli.files import picture, tree
from tests.command import failure
from tests.damage import flip
from tests.helpers import RECIPES

DIGITS = RECIPES / "digits.toml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "give a model file, or a --recipe that names its own network"),
        (["export", "none.pt"], "none.pt does not exist"),
        (["--nope"], "No such option '--nope'. See ccam-deploy --help"),
        (["export", "x" * 300], f"{'x' * 300}: File name too long"),
        (["explain", "x" * 300, "one.png"], "File name too long"),
        (["explain", "tiny", "x" * 300], f"{'x' * 300}: File name too long"),
        (["export", "--allow-pickle"], "--allow-pickle goes with a model file; there is none"),
        (["export", "--recipe", str(DIGITS), "--arch", "a:b"], "--arch goes with a model file"),
        (["export", "net.pt2", "--arch", "a:b"], "--arch goes with a file of weights; net.pt2 has"),
        (
            ["export", "net.pt2", "--resize", "stretch", "--cover", "40"],
            "--cover goes with --resize crop; stretch scales to the input's size",
        ),
        (["export", "text.pt"], "text.pt is neither a PyTorch file nor an ONNX file"),
        (["export", "short.pt"], "short.pt is truncated or damaged; copy or save it again"),
        (["export", "net.pt"], "net.pt holds weights alone; name their network with --arch"),
        (["export", "net.pt", "--random-weights"], "--random-weights goes with --recipe and"),
        (
            ["export", "net.pt", "--arch", "ccam_deploy.examples.digits:DigitsNet"],
            'net.pt is not for ccam_deploy.examples.digits:DigitsNet: it lacks "stem.0.weight" and',
        ),
        (
            ["export", "net.pt2", "--layers", "relu1,layer4"],
            'layer "layer4" is not in the model; it has norm1, relu1, conv2, relu2',
        ),
        (
            ["export", "aside.pt2", "--layers", "aside"],
            'the logits do not depend on layer "aside"',
        ),
        (["export", "net.pt2", "--output", "text.pt"], "text.pt exists and is not a bundle"),
        (
            ["export", "net.pt2", "--labels", "none"],
            "none cannot be read as labels: No such file or directory",
        ),
        (
            ["export", "net.pt2", "--labels", "one.png"],
            "one.png is not a text in UTF-8; save it as one",
        ),
        (["export", "net.pt2", "--recipe", "none"], "none cannot be read: No such file"),
        (["export", "net.pt2", "--calibration-images", "none"], "none does not exist"),
        (["export", "net.pt2", "--limit", "17"], "--limit is 17; an export takes at most 16"),
        (["export", "net.pt2", "--mean", "a,b"], '"a,b" is not a list of numbers such as'),
        (["export", "net.pt2", "--std", "1,nan,1"], "they must be finite"),
        (
            ["export", "net.pt2", "--input-size", "9x9x9"],
            '"9x9x9" is not a size such as 224x224. S',
        ),
        (["export", "net.pt2", "--input-size", "9" * 9], "is not a size such as 224x224"),
        (["explain", "none", "one.png"], "none is not a bundle: there is no such folder"),
        (["explain", "tiny", "one.png", "--target", "5"], "class 5 is out of range; the bundle"),
        (["explain", "tiny", "one.png", "--target", "-1"], "class -1 is out of range; the bund"),
        (["explain", "tiny", "one.png", "--target", "top9"], "top is 9; it must be 1 to 5"),
        (["explain", "tiny", "one.png", "--target", "top" + "9" * 5000], "is not in the bundle"),
        (
            ["explain", "tiny", "one.png", "--target", "cow"],
            'class "cow" is not in the bundle; it has ant, bee, cat, dog, dog',
        ),
        (["explain", "tiny", "one.png", "--target", "dog"], 'the name "dog" stands for 3 "dog", 4'),
        (["explain", "tiny", "none.png"], "none.png does not exist"),
        (["explain", "one.png", "tiny"], "tiny is a bundle; give the bundle first"),
        (["explain", "tiny", "one.png", "--opacity", "nan"], "nan is not a finite number"),
        (["explain", "tiny", "one.png", "--budget-ms", "inf"], "inf is not a finite number. See"),
        (["propose", "tiny", "one.png", "--peak-threshold", "nan"], "nan is not a finite number"),
        (["explain", "tiny", "empty"], "empty holds no images (.jpg, "),
        (["explain", "tiny", "short.png"], "short.png cannot be decoded: "),
        (
            ["explain", "tiny", "bomb.png"],
            "bomb.png has 3600000000 pixels, more than 100",
        ),
        (["explain", "tiny", "dot.png"], "dot.png is 1x1; both sides must be at least 8"),
        (["explain", "tiny", "text.pt"], "text.pt is not an image of a known format"),
        (
            ["explain", "tiny", "one.png", "--option", "depth=3"],
            'option "depth" is unknown; collection-cam has theta, k_min, k_max, score',
        ),
        (
            ["explain", "tiny", "one.png", "--method", "cam", "--option", "theta=0.3"],
            'option "theta" is unknown; cam has layer, relu',
        ),
        (["explain", "tiny", "one.png", "--method", "sam"], "'sam' is not one of 'collection-cam'"),
        (["explain", "tiny", "one.png", "--option", "theta"], 'option "theta" is not key=value'),
        (
            ["explain", "tiny", "one.png", "--option", "k_max=x"],
            'k_max is "x"; it must be a whole number',
        ),
        (
            ["explain", "tiny", "one.png", "--option", "score=x"],
            'score is "x"; it must be one of logit, probability',
        ),
        (
            ["explain", "tiny", "one.png", "--option", "standardise=x"],
            'standardise is "x"; it must be true or false',
        ),
        (["explain", "tiny", "one.png", "--option", "layers=x"], '"x"'),
        (
            ["explain", "tiny", "one.png", "--colormap", "rainbow"],
            'color map "rainbow" is unknown; there are jet, turbo',
        ),
        (
            ["explain", "tiny", "one.png", "--save", "overlay,gif"],
            '--save "gif" is unknown; there are overlay, heatmap, panel, masks, npz, json and none',
        ),
        (
            ["explain", "tiny", "one.png", "--save", "none,overlay"],
            "--save none writes no files, so it goes alone",
        ),
        (
            ["explain", "tiny", "one.png", "--save", ""],
            "Invalid value for '--save': \"\" names nothing. See ccam-deploy explain --help",
        ),
        (
            ["explain", "tiny", "one.png", "--option", "rise:masks=3"],
            'option "rise:masks" is for method "rise", which is not asked for here; '
            "asked for: collection-cam",
        ),
        (
            ["explain", "tiny", "one.png", "--debug"],
            "--debug goes before the command: ccam-deploy --debug explain ...",
        ),
        (["explain", "tiny", "one.png", "--colour-bar"], "'--colormap'?) See ccam-deploy ex"),
        (
            ["explain", "tiny", "one.png", "--output", "text.pt"],
            "cannot write to text.pt: it is a file, not a folder",
        ),
        (
            ["explain", "tiny", "one.png", "--output", "text.pt/sub"],
            "cannot write to text.pt/sub: Not a directory",
        ),
        (
            ["export", "net.pt2", "--output", "text.pt/sub"],
            "cannot write to text.pt: it is a file, not a folder",
        ),
        (
            ["explain", "tiny", "pictures", "--output", "pictures"],
            "--output pictures is the folder of the images too; give another one, or the next run",
        ),
        (["explain", "tiny", "one.png", "--precision", "fp16"], "the bundle has no fp16 graphs"),
        (
            ["explain", "tiny", "one.png", "--precision", "int8"],
            "the bundle has no int8 graphs, only fp32; export with --precision int8",
        ),
        (
            ["explain", "tiny", "one.png", "--precision", "int4"],
            "'fp32', 'tf32', 'fp16', 'int8', 'fp8'",
        ),
        (["explain", "tiny", "one.png", "--colour"], "See ccam-deploy explain --help"),
        (["explain", "tiny"], "Missing argument 'IMAGES...'. See ccam-deploy explain --help"),
        (["explane"], "No such command 'explane'"),
        (["verify", "tiny", "--backend", "tpu"], "'tpu' is not one of 'auto', 'tensorrt'"),
        (["verify", "none"], "none is not a bundle: there is no such folder"),
        (["info", "text.pt"], "text.pt is not a bundle: it is a file, not a folder"),
        (["explain", "changed", "one.png"], "changed/weights.bin was changed after the export"),
        (["verify", "changed"], "changed/weights.bin was changed after the export"),
        (["info", "changed"], "changed/weights.bin was changed after the export"),
        (["info", "outside"], 'the manifest of outside leads outside its folder: "../weights.bin"'),
    ],
)
def test_bad_input(
    models: Path, tiny_bundle: Path, here: Path, words: list[str], message: str
) -> None:
    (here / "empty").mkdir()
    (here / "pictures").mkdir()
    picture(here / "pictures" / "one.png")
    (here / "text.pt").write_text("not a model\n")
    for name in ("net.pt", "net.pt2", "aside.pt2"):
        shutil.copy(models / name, here)
    (here / "short.pt").write_bytes((models / "net.pt").read_bytes()[:3000])
    picture(here / "one.png")
    picture(here / "dot.png", (1, 1))
    (here / "short.png").write_bytes((here / "one.png").read_bytes()[:900])
    (here / "bomb.png").write_bytes(bomb())
    for name in ("tiny", "changed", "outside"):
        shutil.copytree(tiny_bundle, here / name)
    flip(here / "changed" / "weights.bin", 100)
    manifest = read_bundle(here / "outside").manifest
    files = manifest.files | {"../weights.bin": manifest.files["weights.bin"]}
    write_manifest(here / "outside", replace(manifest, files=files))
    before = tree(here)
    assert message in failure(*words)
    assert tree(here) == before


def bomb() -> bytes:
    """A PNG of 100 bytes that claims to have 60,000 x 60,000 pixels."""

    def chunk(chunk_type: bytes, content: bytes) -> bytes:
        check = zlib.crc32(chunk_type + content)
        return struct.pack(">I", len(content)) + chunk_type + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
