"""What all charts need: matplotlib, and a file's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    pass

PLOT_FORMATS = ("png", "svg", "pdf")
DOTS_PER_INCH = 144


def plot_format(path: Path) -> str:
    """The one of FORMATS that a file's name asks for. Raises OptionError for another name."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PLOT_FORMATS:
        known = ", ".join(f".{name}" for name in PLOT_FORMATS)
        raise OptionError(f"a plot is a {known} file; {path} is none of them")
    return kind


def require_matplotlib() -> None:
    """Raise OptionError where matplotlib, which draws the charts, is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"a plot needs matplotlib, which cannot be imported ({error}): "
            "pip install 'ccam-deploy[plot]'"
        ) from error
