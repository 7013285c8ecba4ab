"""Pinned host memory that users hold without a copy, and that comes back by itself."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.engines.cuda.device import Device


class _Loan:
    """The base of all arrays that show a lent buffer.

    Views of an array refer to what owns its memory and not to the array, so the array itself cannot
    tell when the last of them is gone.
    """

    def __init__(self, buffer: NDArray[Any]) -> None:
        self.__array_interface__ = buffer.__array_interface__


class PinnedLoans:
    """Pinned buffers of one size, each lent until no array shows its memory any more.

    There are no more of them than at the beginning, because memory that is pinned is taken from
    all processes: users who keep what they get are given copies.
    """

    def __init__(self, device: Device, size: int, count: int) -> None:
        """Allocate the buffers.

        Args:
            device: Whose copies go there.
            size: Bytes of each.
            count: How many.

        Raises:
            BackendError: There is too little memory.
        """
        self._spare = [device.pinned((size,), np.uint8) for _ in range(count)]

    def take(self) -> NDArray[np.uint8] | None:
        """Lend a buffer, which any thread may drop.

        Returns:
            [size], with what its last user left in it; None where all are lent.
        """
        try:
            buffer = self._spare.pop()
        except IndexError:
            return None
        loan = _Loan(buffer)
        weakref.finalize(loan, self._spare.append, buffer).atexit = False
        return np.asarray(loan)
