"""Prepares the next batch of images while the one before it is explained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepared_ahead(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Generator[Prepared, None, None]:
    """Prepare items in order in a thread of their own, one further than what is asked for.

    Args:
        prepare: Called for one item at a time. What it raises comes where its result would.
        items: What to prepare.

    Yields:
        The results. Where the caller stops early, at most one of them was prepared in vain.
    """
    with ThreadPoolExecutor(1, "ccam-deploy-images") as thread:
        following: Future[Prepared] | None = None
        for item in items:
            current, following = following, thread.submit(prepare, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
