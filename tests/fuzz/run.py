"""Fuzz a reader of bytes from outside, guided by coverage: `python -m tests.fuzz.run READER`.

Needs atheris (`pip install atheris`). Stops at the first input that ends in anything but a result
or a refusal in one line, and leaves it in a file. What follows the reader's name goes to libFuzzer,
such as `-max_total_time=300`; inputs that were found to reach new code are kept in a folder beside
the seeds, which may be given, too.

    python -m tests.fuzz.run image -max_total_time=300
    python -m tests.fuzz.run manifest:engines/digits -max_total_time=300
    python -m tests.fuzz.run signature:engines/digits:key.pub.pem -max_total_time=300
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

_GUIDING = ["ccam_deploy"]
"""The packages whose branches guide the fuzzer."""
_SECONDS = 20

with atheris.instrument_imports(include=_GUIDING):
    from tests.fuzz.changes import read_one
    from tests.fuzz.readers import READERS, Reader, manifest_reader, signature_reader


def main(words: list[str]) -> None:
    """Fuzz the reader that the first word names."""
    known = ", ".join([*READERS, "manifest:BUNDLE", "signature:BUNDLE:PUBLIC_KEY"])
    if not words:
        sys.exit(f"usage: python -m tests.fuzz.run READER [libFuzzer's options]; readers: {known}")
    name, *options = words
    reader = _reader(name)
    if reader is None:
        sys.exit(f'reader "{name}" is unknown; there are {known}')
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(reader.seeds + reader.refused):
            (Path(folder) / str(number)).write_bytes(seed)
        words_file = Path(folder).with_suffix(".dict")
        words_file.write_text("".join(f'"{_escaped(word)}"\n' for word in reader.words))
        dictionary = [f"-dict={words_file}"] if reader.words else []
        arguments = [sys.argv[0], *dictionary, f"-timeout={_SECONDS}", *options, folder]
        atheris.Setup(arguments, lambda content: read_one(reader, content))
        atheris.Fuzz()


def _reader(name: str) -> Reader | None:
    match name.split(":"):
        case "manifest", bundle:
            return manifest_reader(Path(bundle))
        case "signature", bundle, key:
            return signature_reader(Path(bundle), Path(key))
    return READERS.get(name)


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main(sys.argv[1:])
