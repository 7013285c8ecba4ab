"""The result of an explanation: maps, the masks and weights behind them, pictures and files."""

from __future__ import annotations

from ccam_deploy.explanation.files import FORMATS, ExplanationWriter
from ccam_deploy.explanation.result import Explanation

__all__ = ["FORMATS", "Explanation", "ExplanationWriter"]
