"""Signed bundles: what was changed by anyone but the key's owner is refused before it is parsed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccam_deploy as ccam
from ccam_deploy.bundle import folder as bundle_folder
from ccam_deploy.bundle.folder import read_bundle, unlisted_files, write_manifest
from ccam_deploy.bundle.signature import is_encrypted, is_signed, require_signed, sign_folder
from ccam_deploy.errors import (
    BundleError,
    IntegrityError,
    ManifestError,
    OptionError,
    SignatureError,
)
from tests.damage import contents, flip
from tests.fuzz.changes import PATIENT, changed, read_one
from tests.fuzz.readers import signature_reader
from tests.keys import KeyPair, make_keys, openssl

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "release")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "others")


@pytest.fixture
def signed(tiny_bundle: Path, tmp_path: Path, keys: KeyPair) -> Path:
    """A signed bundle that a test may change."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    sign_folder(folder, keys.private)
    return folder


def model_signing(*words: object) -> subprocess.CompletedProcess[str]:
    """The library's own command."""
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_library_s_own_command_verifies_it(
    signed: Path, keys: KeyPair, others: KeyPair
) -> None:
    words = ["verify", "key", signed, "--signature", signed / "model.sig", "--public_key"]
    assert model_signing(*words, keys.public).returncode == 0
    assert model_signing(*words, others.public).returncode != 0
    flip(signed / "backbone.onnx", 200)
    assert model_signing(*words, keys.public).returncode != 0


@pytest.mark.slow
def test_what_the_library_s_own_command_signed_is_accepted(
    tiny_bundle: Path, tmp_path: Path, keys: KeyPair, others: KeyPair
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    words = ["sign", "key", folder, "--private_key", keys.private]
    done = model_signing(*words, "--signature", folder / "model.sig")
    assert done.returncode == 0, done.stderr
    require_signed(folder, keys.public)
    with pytest.raises(SignatureError, match="was not made with the key that belongs to"):
        require_signed(folder, others.public)


def test_openssl_agrees(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    """The signature is ECDSA over the DSSE envelope's content, as its specification lays it out."""
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    signature.write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    words = ["dgst", "-sha256", "-verify", keys.public, "-signature", signature, message]
    assert openssl(*words) == b"Verified OK\n"
    resources = json.loads(payload)["predicate"]["resources"]
    hashes = {entry["name"]: entry["digest"] for entry in resources}
    listed = read_bundle(signed).manifest.files
    assert set(hashes) == {"manifest.json", *listed}
    assert all(hashes[name] == record.sha256 for name, record in listed.items())


@pytest.mark.parametrize("curve", ["P-384", "P-521"])
def test_other_curves(tiny_bundle: Path, tmp_path: Path, curve: str) -> None:
    pair = make_keys(tmp_path, "large", curve)
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    sign_folder(folder, pair.private)
    require_signed(folder, pair.public)


def test_a_signed_bundle_is_read_with_and_without_the_key(signed: Path, keys: KeyPair) -> None:
    assert is_signed(signed)
    assert read_bundle(signed) == read_bundle(signed, keys.public)
    assert unlisted_files(read_bundle(signed)) == []
    with ccam.load(signed, require_signature=str(keys.public), backend="onnxruntime-cpu") as opened:
        assert opened.bundle.folder == signed


def test_a_copy_with_another_name_and_a_link_to_it(
    signed: Path, tmp_path: Path, keys: KeyPair
) -> None:
    copy = shutil.copytree(signed, tmp_path / "copy")
    read_bundle(copy, keys.public)
    (tmp_path / "current").symlink_to(copy)
    assert read_bundle(tmp_path / "current", keys.public).folder == tmp_path / "current"


def _resealed(folder: Path) -> None:
    """Somebody else's change, with hashes and digest made new."""
    signature = (folder / "model.sig").read_bytes()
    flip(folder / "weights.bin", 64)
    manifest = read_changed(folder)
    write_manifest(folder, manifest)
    (folder / "model.sig").write_bytes(signature)


def read_changed(folder: Path) -> Any:
    """The manifest of a folder with the present hashes of its files."""
    from dataclasses import replace

    manifest = bundle_folder._read_manifest(folder)
    records = bundle_folder.record_files(folder, manifest.files)
    return replace(manifest, files=records)


def _linked(folder: Path) -> None:
    target = folder.parent / "backbone.onnx"
    (folder / "backbone.onnx").rename(target)
    (folder / "backbone.onnx").symlink_to(target)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (lambda f: flip(f / "backbone.onnx", 200), "backbone.onnx was changed"),
    "resealed": (_resealed, "manifest.json was changed"),
    "broken": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json was changed"),
    "added": (lambda f: (f / "extra.plan").touch(), "it has files that were not signed: extra"),
    "hidden": (lambda f: (f / ".gitignore").touch(), "it has files that were not signed: .git"),
    "missing": (lambda f: (f / "reference.npz").unlink(), "files are missing: reference.npz"),
    "linked": (_linked, "holds something other than plain files: "),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "holds something other than plain files: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bundle_is_refused_unread(
    signed: Path, keys: KeyPair, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter, line = CHANGES[change]
    alter(signed)
    if change == "resealed":
        read_bundle(signed)  # intact, but for the signature
    monkeypatch.setattr(bundle_folder, "_read_manifest", lambda root: pytest.fail("was parsed"))
    with pytest.raises(SignatureError) as refusal:
        ccam.load(signed, require_signature=keys.public)
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_two_changes_are_one_line(signed: Path, keys: KeyPair) -> None:
    flip(signed / "backbone.onnx", 200)
    flip(signed / "classifier.onnx", 200)
    with pytest.raises(SignatureError) as refusal:
        read_bundle(signed, keys.public)
    assert str(refusal.value) == f"{signed} is not as it was signed: backbone.onnx was changed"


def test_a_bundle_that_was_read_is_verified_too(signed: Path, keys: KeyPair) -> None:
    before = read_bundle(signed)
    _resealed(signed)
    with pytest.raises(SignatureError, match=r"manifest\.json was changed"):
        ccam.load(before, require_signature=keys.public)


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def _forge(content: dict[str, Any]) -> None:
    envelope = content["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"]).replace(b"backbone", b"BACKBONE")
    envelope["payload"] = base64.b64encode(payload).decode()


FORGERIES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "deep": lambda path: path.write_text("[" * 100_000),
    "binary": lambda path: path.write_bytes(b"\xff" * 100),
    "object": lambda path: path.write_text("{}"),
    "payload": _edited(_forge),
    "unsigned": _edited(lambda content: content["dsseEnvelope"]["signatures"].clear()),
    "no hint": _edited(lambda content: content["verificationMaterial"]["publicKey"].clear()),
    "other kind": _edited(lambda content: content.update(mediaType="text/plain")),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_signature(
    signed: Path, others: KeyPair, forgery: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed on stdout, where a command may print JSON."""
    sign_folder(signed, others.private)
    FORGERIES[forgery](signed / "model.sig")
    key = others.public if forgery != "no hint" else make_keys(signed.parent, "third").public
    with pytest.raises(SignatureError) as refusal:
        require_signed(signed, key)
    assert "was not made with the key that belongs to" in str(refusal.value)
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@settings(PATIENT, max_examples=60)
@given(data=st.data())
def test_any_changed_signature(signed: Path, keys: KeyPair, data: st.DataObject) -> None:
    """It is refused in one line, or still says the same."""
    reader = signature_reader(signed, keys.public)
    assert read_one(reader, reader.seeds[0]) is None
    read_one(reader, data.draw(changed(reader)))


def test_no_signature(tiny_bundle: Path, tmp_path: Path, keys: KeyPair) -> None:
    line = "is not signed: it has no model.sig; its maker can add one with ccam-deploy sign$"
    with pytest.raises(SignatureError, match=line):
        ccam.load(tiny_bundle, require_signature=keys.public)
    folder = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    (tmp_path / "elsewhere").touch()
    (folder / "model.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match=line):
        read_bundle(folder, keys.public)
    (folder / "model.sig").unlink()
    (folder / "model.sig").touch()
    os.truncate(folder / "model.sig", 2**24 + 1)
    with pytest.raises(SignatureError, match="is too large to be a signature"):
        read_bundle(folder, keys.public)
    with pytest.raises(BundleError, match="there is no such folder"):
        read_bundle(tmp_path / "nowhere", keys.public)


def test_a_bundle_that_changes_loses_its_signature(signed: Path, keys: KeyPair) -> None:
    write_manifest(signed, read_bundle(signed, keys.public).manifest)
    assert not is_signed(signed)
    read_bundle(signed)


def test_a_signature_takes_the_place_of_another(
    signed: Path, keys: KeyPair, others: KeyPair
) -> None:
    names = set(contents(signed))
    sign_folder(signed, others.private)
    assert set(contents(signed)) == names
    read_bundle(signed, others.public)
    with pytest.raises(SignatureError, match=str(keys.public)):
        read_bundle(signed, keys.public)


@pytest.mark.slow
def test_keys_that_cannot_be_used(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    for use in (sign_folder, require_signed):
        with pytest.raises(OptionError, match=r"the key .*nowhere cannot be read: No such file"):
            use(signed, tmp_path / "nowhere")
        with pytest.raises(OptionError, match=r"the key .* cannot be read: Is a directory"):
            use(signed, tmp_path)
        (tmp_path / "text").write_text("hello")
        with pytest.raises(OptionError, match=r"text is no (private|public) key of a curve"):
            use(signed, tmp_path / "text")
    openssl("genpkey", "-algorithm", "RSA", "-out", tmp_path / "rsa")
    openssl("pkey", "-in", tmp_path / "rsa", "-pubout", "-out", tmp_path / "rsa.pub")
    with pytest.raises(OptionError, match="rsa is no private key of a curve that signs bundles"):
        sign_folder(signed, tmp_path / "rsa")
    with pytest.raises(OptionError, match=r"rsa\.pub is no public key of a curve"):
        require_signed(signed, tmp_path / "rsa.pub")
    strange = make_keys(tmp_path, "bitcoin", "secp256k1")
    with pytest.raises(OptionError, match=r"P-256, P-384 or P-521"):
        sign_folder(signed, strange.private)
    with pytest.raises(OptionError, match="is a private key; a signature is verified with"):
        require_signed(signed, keys.private)
    with pytest.raises(OptionError, match="is a public key; a bundle is signed with the private"):
        sign_folder(signed, keys.public)
    read_bundle(signed, keys.public)  # as before


def test_a_key_with_a_password(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", keys.private, "-aes256", "-passout", "pass:open sesame", "-out", locked)
    assert is_encrypted(locked)
    assert not is_encrypted(keys.private)
    sign_folder(signed, locked, b"open sesame")
    read_bundle(signed, keys.public)
    for password in (None, b"wrong"):
        with pytest.raises(OptionError, match=r"locked\.pem cannot be decrypted: "):
            sign_folder(signed, locked, password)


def test_without_a_key_a_bad_bundle_has_its_old_errors(signed: Path) -> None:
    flip(signed / "backbone.onnx", 200)
    with pytest.raises(IntegrityError):
        read_bundle(signed)
    (signed / "manifest.json").write_text("{")
    with pytest.raises(ManifestError):
        read_bundle(signed)


def test_what_cannot_be_signed(signed: Path, keys: KeyPair) -> None:
    _linked(signed)
    with pytest.raises(SignatureError, match=r"cannot be signed: Cannot use .* symlink"):
        sign_folder(signed, keys.private)
