"""The array types that signatures name; shapes stand in the docstrings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
"""Images, feature maps, gradients, logits and maps."""

Doubles = NDArray[np.float64]
"""Sums that must not lose digits."""

Classes = NDArray[np.int64]
"""Numbers of classes, or of images, as an index."""
