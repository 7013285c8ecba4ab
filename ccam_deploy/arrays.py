"""The array types that signatures name; shapes stand in the docstrings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Classes = NDArray[np.int64]
"""Numbers of classes, or of images, as an index."""
