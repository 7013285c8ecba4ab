"""`ccam-deploy sign`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from ccam_deploy.cli.options import BundleFolder, KeyFile
from ccam_deploy.cli.parameters import with_options
from ccam_deploy.cli.printing import say
from ccam_deploy.errors import IntegrityError, OptionError


@dataclass(frozen=True, kw_only=True)
class SignOptions:
    """The options of `sign`."""

    bundle: BundleFolder
    key: KeyFile


@click.command()
@with_options(SignOptions)
def sign(options: SignOptions) -> None:
    """Sign all files of BUNDLE with a private key, after a check that they are intact.

    Writes model.sig into the bundle, in place of an older one. Whatever changes the bundle later,
    such as build, removes the signature. Where the key has a password, it is asked for at a
    terminal, or else read from stdin's first line. Needs the extra "sign".
    """
    from ccam_deploy.bundle.folder import read_bundle, unlisted_files
    from ccam_deploy.bundle.signature import SIGNATURE, is_encrypted, sign_folder

    unlisted = unlisted_files(read_bundle(options.bundle))
    if unlisted:
        raise IntegrityError(
            f"{options.bundle} has files that its manifest does not list: {unlisted[0]}"
        )
    password = _ask_password(options.key) if is_encrypted(options.key) else None
    sign_folder(options.bundle, options.key, password)
    say(f"{options.bundle / SIGNATURE}: all files are signed with {options.key}")


def _ask_password(key: Path) -> bytes:
    if sys.stdin.isatty():
        asked = str(click.prompt(f"Password of {key}", hide_input=True, err=True))
    else:
        asked = sys.stdin.readline().rstrip("\n")
    if not asked:
        raise OptionError(f"the key {key} has a password; sign at a terminal, or give it on stdin")
    return asked.encode()
