"""Signatures of bundles: whose key a folder was signed with, and that it is what was signed."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from ccam_deploy.errors import BundleError, OptionError, SignatureError, brief
from ccam_deploy.extras import install
from ccam_deploy.files import replace_file

SIGNATURE = "model.sig"
"""The file of a bundle that holds its signature; the name is model-signing's own default."""
_MAX_BYTES = 2**24
_CURVES = "P-256, P-384 or P-521"
_MAKE_KEYS = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY"
_MAKE_PUBLIC = "openssl pkey -in KEY -pubout"
_DIFFERENCES = {
    r"Extra files found in model '.*?': (.*)": "it has files that were not signed: {}",
    r"Missing files in model '.*?': (.*)": "files are missing: {}",
    r"Hash mismatch for '(.*?)': Expected": "{} was changed",
}
"""What model-signing says of a folder that is not as it was signed, and what a user is told."""


def is_signed(folder: Path) -> bool:
    """Whether a bundle has a signature, be it valid or not."""
    return os.path.lexists(folder / SIGNATURE)


def remove_signature(folder: Path) -> None:
    """Remove a signature, which holds no longer once a bundle changes.

    Raises:
        OSError: The file cannot be removed.
    """
    (folder / SIGNATURE).unlink(missing_ok=True)


def is_encrypted(private_key: Path) -> bool:
    """Whether a private key is of use only with a password.

    Raises:
        OptionError: The file cannot be read.
    """
    return b"ENCRYPTED" in _read_key(private_key)


def sign_folder(folder: Path, private_key: Path, password: bytes | None = None) -> None:
    """Sign all files of a folder, and write the signature into it in place of an older one.

    Args:
        folder: The bundle's folder; that it is intact has been checked.
        private_key: A PEM file with the private key of an elliptic curve.
        password: What the key is encrypted with; None where it is not.

    Raises:
        OptionError: The key cannot be used, or model-signing is not installed.
        SignatureError: A file cannot be signed, such as a link.
        BundleError: The signature cannot be written.
    """
    _require_library()
    content = _read_key(private_key)
    from model_signing import signing

    config = signing.Config().set_hashing_config(_every_file())
    secret: Any = password  # declared as text, but cryptography takes bytes only
    try:
        config.use_elliptic_key_signer(private_key=private_key, password=secret)
    except Exception as error:  # whatever cryptography says of a damaged key
        raise _unusable(private_key, "private", content, error) from error
    with tempfile.TemporaryDirectory() as aside:
        draft = Path(aside) / SIGNATURE
        try:
            config.sign(folder.resolve(), draft)  # the folder itself may be a link
        except ValueError as error:
            raise SignatureError(f"{folder} cannot be signed: {brief(error)}") from error
        try:
            replace_file(folder / SIGNATURE, draft.read_bytes())
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"cannot write {folder / SIGNATURE}: {reason}") from error


def require_signed(folder: Path, public_key: Path) -> None:
    """Refuse a folder that is not exactly as somebody signed it who has the private key.

    Of the folder's files only the signature is parsed; the others are hashed.

    Args:
        folder: The bundle's folder.
        public_key: A PEM file with the public key of an elliptic curve.

    Raises:
        OptionError: The key cannot be used, or model-signing is not installed.
        SignatureError: There is no signature, another key made it, or a file was changed, added or
            removed since.
        BundleError: The folder cannot be read.
    """
    _require_library()
    content = _read_key(public_key)
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        raise SignatureError(
            f"{folder} is not signed: it has no {SIGNATURE}; its maker can add one with "
            f"ccam-deploy sign"
        )
    if signature.stat().st_size > _MAX_BYTES:
        raise SignatureError(f"{signature} is too large to be a signature; sign the bundle again")
    from model_signing import verifying

    config = verifying.Config().set_hashing_config(_every_file())
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # whatever cryptography says of a damaged key
        raise _unusable(public_key, "public", content, error) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the library prints warnings
            config.verify(folder.resolve(), signature)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever a forged signature makes the library stumble over
        raise SignatureError(_refusal(folder, public_key, error)) from error


def _every_file() -> Any:
    """How files are hashed: all of them but the signature, each whole, by SHA-256."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _require_library() -> None:
    try:
        import model_signing.signing
        import model_signing.verifying  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"signatures need model-signing, which cannot be imported ({brief(error)}): "
            f"{install('sign')}"
        ) from error


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"the key {path} cannot be read: {error.strerror}") from error


def _unusable(
    path: Path, wanted: Literal["private", "public"], content: bytes, error: Exception
) -> OptionError:
    """Why a key does not do, and how to get one that does."""
    if wanted == "public" and b"PRIVATE KEY" in content:
        return OptionError(
            f"{path} is a private key; a signature is verified with the public one: {_MAKE_PUBLIC}"
        )
    if wanted == "private" and b"PUBLIC KEY" in content:
        return OptionError(f"{path} is a public key; a bundle is signed with the private one")
    if b"ENCRYPTED" in content:
        return OptionError(f"{path} cannot be decrypted: {brief(error)}")
    remedy = _MAKE_KEYS if wanted == "private" else _MAKE_PUBLIC
    return OptionError(
        f"{path} is no {wanted} key of a curve that signs bundles ({_CURVES}) in a PEM file: "
        f"{remedy}"
    )


def _refusal(folder: Path, public_key: Path, error: Exception) -> str:
    """What is wrong with a signature, in a line."""
    message = str(error)
    if message.startswith("Cannot use "):
        return f"{folder} holds something other than plain files: {brief(error).split(' This ')[0]}"
    differs = "Signature mismatch: "
    if not message.startswith(differs):
        return (
            f"{folder / SIGNATURE} was not made with the key that belongs to {public_key}, or is "
            "damaged"
        )
    for difference in ast.literal_eval(message.removeprefix(differs)):
        for pattern, told in _DIFFERENCES.items():
            if found := re.match(pattern, difference):
                names = brief(ValueError(found[1]))
                return f"{folder} is not as it was signed: {told.format(names)}"
    return f"{folder} is not as it was signed: {brief(error)}"
