"""Whatever bytes come from outside: they are read, or refused in one line; nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.changes import PATIENT, changed, read_one
from tests.fuzz.readers import READERS, manifest_reader

_PATIENT = settings(PATIENT, max_examples=60)


@pytest.mark.parametrize("name", READERS)
def test_seeds_are_read(name: str) -> None:
    """So that what the fuzzer changes reaches behind the first check."""
    reader = READERS[name]
    assert [read_one(reader, seed) for seed in reader.seeds] == [None] * len(reader.seeds)
    assert None not in [read_one(reader, content) for content in reader.refused]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@_PATIENT
@given(data=st.data())
def test_changed_bytes(name: str, data: st.DataObject) -> None:
    read_one(READERS[name], data.draw(changed(READERS[name])))


@pytest.mark.slow
@_PATIENT
@given(data=st.data())
def test_a_changed_manifest(tiny_bundle: Path, data: st.DataObject) -> None:
    reader = manifest_reader(tiny_bundle)
    read_one(reader, data.draw(changed(reader)))
