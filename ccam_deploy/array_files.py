"""Arrays in NumPy's files, which may come from anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccam_deploy.errors import OptionError

_ARCHIVE = b"PK"


def read_array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """Read the array of a .npy file, without unpickling anything.

    Args:
        path: The file.
        mmap_mode: "r" to read values when they are used; None to read all now.

    Returns:
        The array, of any shape and type.

    Raises:
        OptionError: The file cannot be read, or does not hold one array.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ARCHIVE)) == _ARCHIVE:  # which NumPy leaves open where it is damaged
                raise OptionError(f"{path} holds several arrays; it must hold one")
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OptionError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"{path} is not a .npy file that can be read: {reason}") from error
    except Exception as error:  # a damaged header or archive raises whatever its parser meets
        raise OptionError(
            f"{path} is not a .npy file that can be read; save the array with numpy.save"
        ) from error
    return array
