"""Why an installed library cannot be imported, and what to do first."""

from __future__ import annotations

import re
from importlib import metadata

import numpy as np

from ccam_deploy.errors import brief

_OWNERS = {
    "curand": "libcurand.so",
    "cublas": "libcublas.so",
    "cudnn": "libcudnn.so",
    "cuda": "libcudart.so",
    "cu": "libcuda.so.1",
}
"""The libraries whose functions have these prefixes; the first that fits counts."""


def import_trouble(error: Exception, package: str) -> tuple[str, str]:
    """Describe what kept a package from being imported.

    Args:
        error: What the import raised.
        package: The distribution.

    Returns:
        What is wrong, and what to do first.
    """
    text = str(error)
    if symbol := re.search(r"undefined symbol: (\w+)", text):
        return _missing_symbol(symbol[1], package)
    if "numpy" in text.lower() and package == "numba-cuda":
        return _other_numpy(error)
    detail = f"it cannot be imported: {brief(error)}"
    file = re.search(r"[\w.+-]+\.so[.\d]*|[\w.+-]+\.dll", text)
    if file and "cannot open shared object" in text:
        return detail, f"install {file[0]}, or add its folder to LD_LIBRARY_PATH"
    return detail, f"reinstall it: pip install --force-reinstall {package}"


def _missing_symbol(symbol: str, package: str) -> tuple[str, str]:
    """A package was compiled with another version of a library than the one that is found."""
    owner = next((owner for prefix, owner in _OWNERS.items() if symbol.startswith(prefix)), "")
    if not owner:
        detail = f"it cannot be imported: no library has {symbol}"
        again = f"pip install --force-reinstall --no-cache-dir {package}"
        return detail, f"compile it for the libraries that are here: {again}"
    detail = f"it cannot be imported: {owner} has no {symbol}"
    if owner == "libcuda.so.1":
        return detail, f"update the NVIDIA driver: {package} was compiled for a newer {owner}"
    return detail, f"install the {owner} of the CUDA that {package} was compiled with"


def _other_numpy(error: Exception) -> tuple[str, str]:
    """Numba takes a range of NumPy's versions, and says one end of it."""
    numba = f"numba {metadata.version('numba')}"
    bound = re.search(r"needs NumPy ([\d.]*\d) or (less|greater)", str(error))
    if bound is None:
        detail = f"{numba} does not work with numpy {np.__version__}: {brief(error)}"
        return detail, "pip install --upgrade numba"
    detail = f"{numba} needs numpy {bound[1]} or {bound[2]}, {np.__version__} is installed"
    if bound[2] == "greater":
        return detail, "pip install --upgrade numpy"
    return detail, f"pip install --upgrade numba, or where that is not enough 'numpy=={bound[1]}.*'"
