"""What a fuzzer does to a valid input, and what a reader may do with the result."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from ccam_deploy.errors import CcamError
from tests.fuzz.readers import Reader

_WORDS = (b"\0", b"\n", b"\xff" * 4, b"\0" * 8, b"-", b"9" * 20, b"\xed\xa0\x80", b"\x7f\xff")
_NEIGHBOUR = "neighbour"
PATIENT = settings(
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
"""The same changes in each run, none of them reduced, however long they take."""


def read_one(reader: Reader, content: bytes) -> CcamError | None:
    """Read bytes in a new folder, beside which nothing may appear.

    Returns:
        The refusal; None where the bytes were read.

    Raises:
        AssertionError: Something was written outside, or the refusal is not one line.
        Exception: Whatever the reader lets through, warnings included.
    """
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name)
        (outside / _NEIGHBOUR).write_bytes(b"same")
        folder = outside / "inside"
        folder.mkdir()
        refusal = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                reader.read(content, folder)
            except CcamError as error:
                refusal = error
        assert {path.name for path in outside.iterdir()} == {_NEIGHBOUR, "inside"}
        assert (outside / _NEIGHBOUR).read_bytes() == b"same"
    if refusal is not None:
        line = str(refusal)
        assert line
        assert "\n" not in line
        assert "Traceback" not in line
    return refusal


@st.composite
def changed(draw: st.DrawFn, reader: Reader) -> bytes:
    """A valid input of a reader after a few changes, or bytes of any kind."""
    content = draw(st.sampled_from(reader.seeds + reader.refused))
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    words: Sequence[bytes] = (*reader.words, *_WORDS)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        middle = draw(
            st.one_of(
                st.binary(max_size=end - start),
                st.sampled_from(words),
                st.just(content[start:end] * 2),
            )
        )
        content = content[:start] + middle + content[end:]
        if draw(st.integers(0, 9)) == 0:
            content = content[: draw(st.integers(0, len(content)))]
    return content
