"""Lent memory comes back when nothing shows it any more, in whatever way it was looked at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ccam_deploy.arrays import Floats
from ccam_deploy.engines.cuda.loans import PinnedLoans
from tests.engines.cuda.host_device import HostDevice


def taken(loans: PinnedLoans) -> Floats:
    memory = loans.take()
    assert memory is not None
    return memory.view(np.float32)


def test_no_more_are_lent_than_there_are() -> None:
    loans = PinnedLoans(HostDevice(), 16, 2)
    held = [taken(loans), taken(loans)]
    assert not np.shares_memory(held[0], held[1])
    assert loans.take() is None
    address = held.pop(0).ctypes.data
    assert taken(loans).ctypes.data == address
    assert held[0].size == 4


def test_a_view_of_a_view_keeps_what_it_shows() -> None:
    """As reshaped, transposed and split."""
    loans = PinnedLoans(HostDevice(), 48, 1)
    whole = taken(loans)
    whole[:] = np.arange(12)
    kept: list[Floats] = [np.split(whole.reshape(4, 3).T[1:], 2)[1]]
    del whole
    assert loans.take() is None
    assert kept.pop().tolist() == [[2, 5, 8, 11]]
    assert loans.take() is not None


def test_it_may_be_dropped_by_any_thread_and_after_the_lender() -> None:
    loans = PinnedLoans(HostDevice(), 8, 1)
    held = [taken(loans)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.clear).result()
    last = taken(loans)
    last[:] = 1, 2
    del loans
    assert last.tolist() == [1, 2]
