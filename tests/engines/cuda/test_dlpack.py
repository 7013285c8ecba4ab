"""DLPack capsules, against NumPy's."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccam_deploy.engines.cuda.device import DeviceTensor
from ccam_deploy.engines.cuda.dlpack import CUDA, HOST, capsule_of, tensor_of
from ccam_deploy.errors import ImageError


class Shown:
    """What numpy.from_dlpack takes a capsule from."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return HOST, 0


def described(values: NDArray[Any]) -> DeviceTensor:
    return DeviceTensor(values.ctypes.data, values.shape, values.dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_tensor_is_read_where_it_lies(dtype: type[np.generic]) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for part in (values, values[1:], values[:1, :1]):
        assert tensor_of(part.__dlpack__(), HOST) == described(part)


def test_the_memory_stays_the_capsule_s() -> None:
    values = np.ones(5, np.float32)
    capsule = values.__dlpack__()
    for _ in range(2):  # it is not used up
        assert tensor_of(capsule, HOST).shape == (5,)
    assert (np.from_dlpack(Shown(capsule)) == 1).all()


def test_tensors_that_cannot_be_read() -> None:
    values = np.zeros((4, 6), np.float32)
    with pytest.raises(ImageError, match="has gaps; make it contiguous"):
        tensor_of(values[:, ::2].__dlpack__(), HOST)
    with pytest.raises(ImageError, match="another type than float32 and int32"):
        tensor_of(values.astype(np.float64).__dlpack__(), HOST)
    with pytest.raises(ImageError, match="on device 0 of DLPack's kind 1; it must be on the first"):
        tensor_of(values.__dlpack__(), CUDA)


def test_a_tensor_is_given_to_numpy_and_let_go_once() -> None:
    values, released = np.arange(12, dtype=np.float32).reshape(3, 4), list[int]()
    capsule = capsule_of(described(values), lambda: released.append(1), HOST)
    taken = np.from_dlpack(Shown(capsule))
    assert np.shares_memory(taken, values)
    assert (taken == values).all()
    del capsule
    gc.collect()
    assert not released
    del taken
    gc.collect()
    assert released == [1]


def test_a_tensor_that_nobody_takes_is_let_go() -> None:
    values, released = np.zeros(3, np.float32), list[int]()
    capsule = capsule_of(described(values), lambda: released.append(1), HOST)
    assert tensor_of(capsule, HOST) == described(values)
    del capsule
    gc.collect()
    assert released == [1]
