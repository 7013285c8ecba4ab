"""The numbers of rows that graphs are run with: few, so that an engine prepares each only once.

An engine plans its convolutions, and captures a CUDA graph, for each number of rows that it meets,
which takes far longer than the run. Batches are padded to the next of these sizes; the rows that
are added belong to nobody, and change nothing in the others.
"""

from __future__ import annotations

from bisect import bisect_left

_FINE, _MEDIUM, _COARSE = 4, 8, 16
_FINE_UNTIL = 32


def image_sizes(most: int) -> tuple[int, ...]:
    """Numbers of images: the powers of two below `most`, and `most`."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)


def mask_sizes(most: int, single: bool) -> tuple[int, ...]:
    """Numbers of masks that the classifier takes at a time.

    Args:
        most: The largest.
        single: Whether the masks are those of one image: then the steps are fine, because it has
            few. Several images have many, and only the last of their chunks is padded.

    Returns:
        The sizes, in ascending order.
    """
    if not single:
        return (*range(_COARSE, most, _COARSE), most)
    fine = range(_FINE, min(_FINE_UNTIL, most), _FINE)
    return (*fine, *range(_FINE_UNTIL, most, _MEDIUM), most)


def padded(rows: int, sizes: tuple[int, ...]) -> int:
    """The smallest size that is at least `rows`, which must not exceed the largest."""
    return sizes[bisect_left(sizes, rows)]
