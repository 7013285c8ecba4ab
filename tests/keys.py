"""Keys that openssl makes, as the documentation says."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KeyPair:
    """The files of a private key and its public key."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str, curve: str = "P-256") -> KeyPair:
    """Make a pair of keys of an elliptic curve."""
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    group = f"ec_paramgen_curve:{curve}"
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", group, "-out", pair.private)
    openssl("pkey", "-in", pair.private, "-pubout", "-out", pair.public)
    return pair


def openssl(*words: object) -> bytes:
    command = ["openssl", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=True).stdout
