"""Requirements of all charts: matplotlib, and a file format that it writes."""

from __future__ import annotations

from pathlib import Path

from ccam_deploy.errors import OptionError
from ccam_deploy.extras import install

PLOT_FORMATS = ("png", "svg", "pdf")
DOTS_PER_INCH = 144


def plot_format(path: Path) -> str:
    """Choose a plot's format by the file's suffix.

    Args:
        path: Where the plot goes.

    Returns:
        A name among PLOT_FORMATS.

    Raises:
        OptionError: The suffix is none of them.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in PLOT_FORMATS:
        *others, last = (f".{name}" for name in PLOT_FORMATS)
        raise OptionError(f"the plot {path} must end in {', '.join(others)} or {last}")
    return suffix


def require_matplotlib() -> None:
    """Raise OptionError where matplotlib, which draws the charts, is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"a plot needs matplotlib, which cannot be imported ({error}): {install('plot')}"
        ) from error
