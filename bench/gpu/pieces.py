"""The pieces of the GPU's benchmark, and the processes that measure them.

A piece is one line of a table: a network in a precision with a number of images, explained or as
PyTorch's floor, or the kernels alone. A part is a process that measures several pieces, and prints
each as a line of JSON as soon as it is known, so that little is lost where it is ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from bench import harness
from ccam_deploy.bundle.manifest import PrecisionName
from ccam_deploy.errors import CcamError, brief
from ccam_deploy.latency.limited_process import limited_process

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "resnet18": ("fp16", "tf32", "fp32"),
    "resnet101": ("fp16",),
    "vgg19": ("tf32", "fp32"),
}
"""What is measured of each network, the most interesting first."""

BATCHES = (1, 8, 32)
MASKS = 22
"""Masked images of one image where no explanation has counted them."""

SCORE_CAM: Mapping[str, tuple[str, ...]] = {"resnet18": ("fp32", "tf32")}
"""What Score-CAM is measured on."""

CHANNELS = 512
"""Channels of those networks' last layers: masked images of Score-CAM where nobody has counted."""

_EXPLAINED = {"floor": "explain", "score-floor": "score-cam"}
"""Whose masked images the passes of a floor are for."""

Figures = dict[str, Any]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        kind: "kernels", "explain" or "floor"; for Score-CAM "score-cam", "score-floor" or
            "torchcam", which is TorchCAM's.
        network: A name among PRECISIONS.
        batch: Images.
        precision: How the graphs run; the kernels between them know none.
        masks: Masked images in all, for a floor.
    """

    kind: str
    network: str
    batch: int
    precision: str = ""
    masks: int = 0

    @property
    def key(self) -> str:
        """The piece's name in the results."""
        words = (self.kind, self.network, self.precision, str(self.batch))
        return "/".join(word for word in words if word)

    def of_kind(self, kind: str) -> Piece:
        """The same network, precision and batch, measured otherwise."""
        return msgspec.structs.replace(self, kind=kind, masks=0)


def offered(network: str) -> list[str]:
    """List the precisions of a network that this version has."""
    known = get_args(PrecisionName)
    return [name for name in PRECISIONS[network] if name in known]


def score_pieces(kind: str, network: str) -> list[Piece]:
    """List the pieces of one of Score-CAM's kinds, of a single image."""
    return [
        Piece(kind=kind, network=network, batch=1, precision=name)
        for name in SCORE_CAM.get(network, ())
        if name in offered(network)
    ]


def pieces_of(kind: str, network: str) -> list[Piece]:
    """List the pieces of a kind, one precision after the other: each is loaded once."""
    names = [""] if kind == "kernels" else offered(network)
    return [
        Piece(kind=kind, network=network, batch=batch, precision=name)
        for name in names
        for batch in BATCHES
    ]


def with_masks(floor: Piece, measured: Mapping[str, Figures]) -> Piece:
    """Give a floor as many masked images as the explanation of the same images had."""
    explained = measured.get(floor.of_kind(_EXPLAINED[floor.kind]).key)
    unknown = CHANNELS if floor.kind == "score-floor" else MASKS * floor.batch
    return msgspec.structs.replace(floor, masks=explained["masks"] if explained else unknown)


@dataclass(frozen=True)
class Outcome:
    """What became of a piece: its figures, or the reason why there are none."""

    key: str
    figures: Figures | None = None
    reason: str = ""


def measure_pieces(pieces: Iterable[Piece], measure: Callable[[Piece], Figures]) -> None:
    """In a part's process: measure pieces one by one and print each, or why it failed.

    Args:
        pieces: What is measured, in this order.
        measure: Returns plain values for JSON.
    """
    for piece in pieces:
        try:
            line: dict[str, Any] = {"key": piece.key, "figures": measure(piece)}
        except (CcamError, RuntimeError, MemoryError) as error:  # PyTorch's errors are RuntimeError
            line = {"key": piece.key, "reason": brief(error)}
        print(json.dumps(line), flush=True)


def pieces_in(text: str) -> list[Piece]:
    """Read the argument with which run_part starts a process."""
    return msgspec.json.decode(text, type=list[Piece])


def run_part(
    command: Sequence[str],
    pieces: Sequence[Piece],
    limit: float,
    keep: Callable[[Outcome], None],
) -> None:
    """Run a part in a process of its own, and pass each piece on as soon as it is known.

    Args:
        command: The program; the pieces follow it as one argument.
        pieces: What it measures.
        limit: Seconds after which it is ended.
        keep: Called for each piece, also for those that were lost.
    """
    words = [*command, msgspec.json.encode(pieces).decode()]
    left = {piece.key for piece in pieces}
    with limited_process(words, limit, harness.ROOT) as limited:
        for line in limited.process.stdout or ():
            outcome = _outcome(line)
            if outcome and outcome.key in left:
                left.remove(outcome.key)
                keep(outcome)
    reason = limited.last_words or "its process ended without a word"
    if limited.expired:
        reason = f"not done within {limit:.0f} s"
    for piece in pieces:
        if piece.key in left:
            keep(Outcome(piece.key, reason=reason))


def part_command(module: str, *words: str) -> list[str]:
    """Make the command of a part that is a module of this package."""
    return [sys.executable, "-m", f"bench.gpu.{module}", *words]


def _outcome(line: str) -> Outcome | None:
    """Read a line of a part; None for what a library printed."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return Outcome(**values) if isinstance(values, dict) and "key" in values else None
