"""Methods with their options, as an evaluation compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccam_deploy.arrays import Floats
from ccam_deploy.bundle.folder import hash_file
from ccam_deploy.errors import BackendError, OptionError
from ccam_deploy.explainer import Explainer
from ccam_deploy.explanation import Explanation
from ccam_deploy.methods import METHODS, Method, make_method


@dataclass(frozen=True)
class Variant:
    """A method with its options.

    Attributes:
        name: The name that results have for it.
        method: The method, which holds its options.
    """

    name: str
    method: Method

    def explain(self, explainer: Explainer, images: Floats, targets: Sequence[int]) -> Explanation:
        """Explain preprocessed images [B, C, H, W], one class of each."""
        return explainer.explain(images, targets, method=self.method)

    def describe(self) -> dict[str, Any]:
        """Tell the method's name and all of its options, and what is in a file of them."""
        options = dataclasses.asdict(self.method)
        if options.get("file"):
            options["file_sha256"] = hash_file(Path(options["file"]))
        return {"method": self.method.name, "options": options}


def make_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Make methods with their default options.

    Args:
        names: Names of methods; one that is repeated counts once.

    Returns:
        The variants in the names' order.

    Raises:
        OptionError: A name is unknown, or there is none.
    """
    if not names:
        raise OptionError(f"there is no method to measure; there are {', '.join(METHODS)}")
    return tuple(Variant(name, make_method(name)) for name in dict.fromkeys(names))


def runnable(
    explainer: Explainer, variants: Sequence[Variant]
) -> tuple[list[Variant], dict[str, str]]:
    """Tell which variants can run on a bundle.

    Args:
        explainer: Of the bundle.
        variants: The variants in question.

    Returns:
        Those that can run, and for each of the others, by name, why it cannot.
    """
    able, reasons = [], {}
    for variant in variants:
        try:
            explainer.require_method(variant.method)
            able.append(variant)
        except (OptionError, BackendError) as error:
            reasons[variant.name] = str(error)
    return able, reasons


def require_runnable(explainer: Explainer, variants: Sequence[Variant]) -> None:
    """Raise OptionError with all variants that cannot run on a bundle, and what each needs."""
    _, reasons = runnable(explainer, variants)
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names_by_reason.setdefault(reason, []).append(name)
    if names_by_reason:
        lines = (f"{', '.join(names)} ({why})" for why, names in names_by_reason.items())
        raise OptionError(f"some methods cannot run here: {', '.join(lines)}")
