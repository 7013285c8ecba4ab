"""`ccam-deploy sign` and `verify --key`, and the commands that ask for a signature."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ccam_deploy.bundle.folder import read_bundle
from ccam_deploy.cli.main import main
from tests.command import failure, refusal, success
from tests.helpers import example_files
from tests.keys import KeyPair, make_keys, openssl

pytest.importorskip("model_signing")


@pytest.fixture
def bundle(tiny_bundle: Path, here: Path) -> Path:
    """A bundle that a test may change, in the working folder."""
    shutil.copytree(tiny_bundle, here / "tiny")
    return Path("tiny")


@pytest.fixture
def keys(here: Path) -> KeyPair:
    return make_keys(Path(), "release")


def test_sign_and_verify(bundle: Path, keys: KeyPair) -> None:
    line = success("sign", bundle, "--key", keys.private).stdout
    assert line == "tiny/model.sig: all files are signed with release.pem\n"
    last = success("verify", bundle, "--key", keys.public).stdout.splitlines()[-1]
    assert last == (
        "tiny: 5 files and all graphs are as exported, and signed with the key of release.pub.pem"
    )
    assert json.loads(success("verify", bundle, "--key", keys.public, "--json").stdout)["signed"]
    assert not json.loads(success("verify", bundle, "--json").stdout)["signed"]
    (bundle / "extra").touch()
    message = failure("verify", bundle, "--key", keys.public)
    assert message == "tiny is not as it was signed: it has files that were not signed: extra"


def test_only_what_verify_accepts_is_signed(bundle: Path, keys: KeyPair) -> None:
    (bundle / "extra").touch()
    message = failure("sign", bundle, "--key", keys.private)
    assert message == "tiny has files that its manifest does not list: extra"
    (bundle / "extra").unlink()
    (bundle / "weights.bin").write_bytes(b"")
    assert failure("sign", bundle, "--key", keys.private).startswith("tiny/weights.bin has 0 bytes")
    assert not (bundle / "model.sig").exists()


def test_a_password_is_asked_for(bundle: Path, keys: KeyPair) -> None:
    openssl("pkey", "-in", keys.private, "-aes256", "-passout", "pass:sesame", "-out", "locked.pem")
    words = ["sign", str(bundle), "--key", "locked.pem"]
    result = CliRunner().invoke(main, words, input="wrong\n")
    assert result.exit_code == 2
    assert "error: locked.pem cannot be decrypted: " in result.stderr
    message = refusal(CliRunner().invoke(main, words, input=""))
    assert message == "the key locked.pem has a password; sign at a terminal, or give it on stdin"
    result = CliRunner().invoke(main, words, input="sesame\n")
    assert result.stderr == ""
    assert result.stdout == "tiny/model.sig: all files are signed with locked.pem\n"
    assert "sesame" not in result.output
    read_bundle(bundle, keys.public)


@pytest.mark.parametrize("command", ["explain", "compare", "evaluate", "info"])
def test_commands_refuse_what_is_not_signed(
    bundle: Path, keys: KeyPair, command: str, here: Path
) -> None:
    image = example_files()[0]
    inputs = {"explain": [image], "compare": [image], "evaluate": [image.parent], "info": []}
    words = [command, bundle, *inputs[command], "--require-signature", keys.public]
    assert failure(*words).startswith("tiny is not signed: it has no model.sig")
    assert failure(*words[:-1], "nowhere") == "the key nowhere cannot be read: No such file or " + (
        "directory"
    )
    success("sign", bundle, "--key", keys.private)
    if command in ("explain", "info"):
        success(*words)


def test_a_missing_extra_is_named(
    bundle: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "OpenSSL", None)  # which model-signing does not ask for
    for words in (["sign", bundle, "--key", keys.private], ["verify", bundle, "--key", "k"]):
        message = failure(*words)
        assert message.startswith("signatures need model-signing, which cannot be imported (")
        assert message.endswith("): pip install 'ccam-deploy[sign]'")


@pytest.mark.slow
def test_an_export_in_its_place_takes_the_signature_away(
    bundle: Path, keys: KeyPair, models: Path
) -> None:
    success("sign", bundle, "--key", keys.private)
    done = success("export", models / "net.pt2", "--output", bundle)
    assert done.stderr.splitlines()[-1] == (
        "the bundle has changed, so its signature was removed; sign it again"
    )
    assert not (bundle / "model.sig").exists()
