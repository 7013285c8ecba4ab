"""Options and helpers that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ccam_deploy.errors import OptionError
from ccam_deploy.text import one_line

Command = TypeVar("Command", bound=Callable[..., Any])

# Repeated from modules whose imports would slow --help down; a test holds them equal.
BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu")
TENSORRT = ("tensorrt", "tensorrt-rtx")
MAX_BATCH = 8
METHODS = (
    "collection-cam",
    "grad-cam",
    "grad-cam++",
    "layer-cam",
    "cam",
    "score-cam",
    "rise",
    "recipro-cam",
    "integrated-gradients",
    "smoothgrad",
    "guided-backprop",
    "excitation-backprop",
    "xrai",
)
PRECISIONS = ("fp32", "fp16", "int8", "fp8")
BATCH_SIZE = 16
COLORMAP = "jet"
OPACITY = 0.5


def bundle_argument(command: Command) -> Command:
    """BUNDLE, the folder of a bundle."""
    return click.argument("bundle", type=click.Path(path_type=Path))(command)


def json_option(command: Command) -> Command:
    """--json, for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for a program.")(
        command
    )


def precision_option(command: Command) -> Command:
    """--precision, for what runs one of a bundle's precisions."""
    return click.option(
        "--precision",
        default="fp32",
        show_default=True,
        type=click.Choice(PRECISIONS),
        help="The graphs to run.",
    )(command)


def engine_options(command: Command) -> Command:
    """--backend, --threads: how a bundle is run."""
    for option in (
        click.option(
            "--threads",
            default=0,
            show_default=True,
            type=click.IntRange(min=0),
            help="Threads inside an operator on a CPU; 0 lets the engine choose.",
        ),
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            type=click.Choice(BACKENDS),
            help="The engine; auto takes the best that works here.",
        ),
    ):
        command = option(command)
    return command


def method_choice(command: Command) -> Command:
    """--method, --option: how maps are made; see cli.choices for what they become."""
    for option in (
        click.option(
            "--option",
            "pairs",
            multiple=True,
            metavar="KEY=VALUE",
            help="An option of the method, such as theta=0.2 or k_max=6; may be repeated.",
        ),
        click.option(
            "--method",
            default=METHODS[0],
            show_default=True,
            type=click.Choice(METHODS),
            help="How maps are made.",
        ),
    ):
        command = option(command)
    return command


def pairs_option(command: Command) -> Command:
    """--option of several methods; see cli.choices for what they become."""
    return click.option(
        "--option",
        "pairs",
        multiple=True,
        metavar="[METHOD:]KEY=VALUE",
        help="An option of one method, or of each that has it; may be repeated.",
    )(command)


def look_options(command: Command) -> Command:
    """--colormap, --opacity: how maps are drawn."""
    for option in (
        click.option(
            "--opacity",
            default=OPACITY,
            show_default=True,
            type=click.FloatRange(0, 1),
            help="How much of the image an overlay hides.",
        ),
        click.option(
            "--colormap", default=COLORMAP, show_default=True, help="The colours of maps."
        ),
    ):
        command = option(command)
    return command


def plan_options(command: Command) -> Command:
    """--backend, --max-batch, --device, --timing-cache: what TensorRT plans are built for."""
    for option in (
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, dir_okay=False),
            help="A file where tensorrt keeps how fast kernels were, to build faster next time; "
            "tensorrt-rtx has none.",
        ),
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="X.Y",
            help="A compute capability to build for, such as 8.9; may be repeated.  [default: all "
            "from 8.0 on that tensorrt-rtx supports; for tensorrt the GPU that is here]",
        ),
        click.option(
            "--max-batch",
            type=click.IntRange(min=1),
            default=MAX_BATCH,
            show_default=True,
            help="The most images that a plan takes at a time.",
        ),
        click.option(
            "--backend",
            type=click.Choice(TENSORRT),
            default="tensorrt",
            show_default=True,
            help="The TensorRT to build with; tensorrt-rtx needs no GPU for it.",
        ),
    ):
        command = option(command)
    return command


PLAN_OPTIONS = {
    "backend": "--backend",
    "max_batch": "--max-batch",
    "devices": "--device",
    "timing_cache": "--timing-cache",
}


def parse_assignments(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words as a dictionary. Raises OptionError for words of another form."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f'option "{pair}" is not key=value')
        found[key.strip()] = value.strip()
    return found


def say(text: str, err: bool = False) -> None:
    """Print one line, whatever the names in it hold."""
    click.echo(one_line(text), err=err)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
