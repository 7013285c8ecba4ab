"""The options that several commands have: one meaning, one type and one help text for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from ccam_deploy.cli.parameters import Argument, Number, Numbers, Option, Size, Words, unset
from ccam_deploy.errors import OptionError

if TYPE_CHECKING:
    from ccam_deploy.render import Look

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
PRECISIONS = ("fp32", "tf32", "fp16", "int8", "fp8")
BATCH_SIZE = 16
COLORMAP = "jet"
OPACITY = 0.5
MAX_SEED = 2**32 - 1

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


def output_to(place: str) -> Option:
    """Make the option --output of a command that writes its results to some kind of place."""
    return Option("--output", f"Where to write the results: {place}.", PATH)


BundleFolder = Annotated[Path, Argument(PATH)]
ImageFiles = Annotated[
    tuple[Path, ...], Argument(click.Path(path_type=Path, readable=False), many=True)
]
ModelFile = Annotated[Path | None, Argument(PATH)]

LOOPBACK = "127.0.0.1"
Host = Annotated[str, Option("--host", "Address to listen at; the default is this machine alone.")]
OutputFolder = Annotated[Path, output_to("a folder")]
AsJson = Annotated[bool, Option("--json", "Print the results as JSON.")]
_LIMIT = Option("--limit", "Use at most this many images.", COUNT)
Limit = Annotated[int, _LIMIT]
LimitOrNone = Annotated[int | None, _LIMIT]
Seed = Annotated[
    int, Option("--seed", "Seed of the random numbers.", click.IntRange(0, MAX_SEED), metavar="N")
]
TargetClasses = Annotated[
    tuple[str, ...],
    Option(
        "--target",
        "Class to explain: its number or name, or topN for the N best. Can be repeated.",
        multiple=True,
        metavar="CLASS",
    ),
]
LayerNames = Annotated[
    tuple[str, ...] | None, Option("--layers", "Names of the target layers.", Words())
]
MethodName = Annotated[str, Option("--method", "Explanation method.", click.Choice(METHODS))]
_METHODS = Option("--methods", f"Explanation methods: {', '.join(METHODS)}.", Words())
MethodNames = Annotated[tuple[str, ...], _METHODS]
MethodNamesOrNone = Annotated[tuple[str, ...] | None, _METHODS]
MethodPairs = Annotated[
    tuple[str, ...],
    Option(
        "--option",
        "Option of a method, such as theta=0.2 or rise:masks=1000. Can be repeated.",
        multiple=True,
        metavar="[METHOD:]KEY=VALUE",
    ),
]
BackendName = Annotated[
    str,
    Option(
        "--backend",
        "Engine to run the graphs with; auto takes the best that works here.",
        click.Choice(BACKENDS),
    ),
]
_PRECISION = Option(
    "--precision",
    "Numeric precision of the graphs; tf32 runs those of fp32 faster on a GPU, not exactly.",
    click.Choice(PRECISIONS),
)
Precision = Annotated[str, _PRECISION]
PrecisionOrNone = Annotated[str | None, _PRECISION]
Threads = Annotated[
    int,
    Option("--threads", "CPU threads; 0 lets the engine choose.", click.IntRange(min=0)),
]
BatchSize = Annotated[
    int,
    Option(
        "--batch-size",
        "Images, masked ones included, that an engine takes at a time.",
        click.IntRange(min=1),
    ),
]
RequireSignature = Annotated[
    Path | None,
    Option(
        "--require-signature",
        "Public key in a PEM file; a bundle that was not signed with it is refused unread.",
        PATH,
        metavar="KEY",
    ),
]
_KEY = Option(
    "--key", "Key in a PEM file: the private one to sign, the public one to verify.", PATH
)
KeyFile = Annotated[Path, _KEY]
KeyFileOrNone = Annotated[Path | None, _KEY]
ColorMap = Annotated[str, Option("--colormap", "Color map of saliency maps.")]
Opacity = Annotated[
    float,
    Option(
        "--opacity",
        "Opacity of a map over its image; 0 shows the image alone.",
        Number(0, 1),
    ),
]
ColorBar = Annotated[bool, Option("--color-bar", "Draw a color bar beside the maps.")]
Architecture = Annotated[
    str | None,
    Option(
        "--arch",
        "Network of a weights file, such as torchvision.models:resnet18(num_classes=21).",
        metavar="MODULE:FACTORY",
    ),
]
RecipeFile = Annotated[
    Path | None, Option("--recipe", "TOML file that describes the network; see export/.", PATH)
]
RandomWeights = Annotated[
    bool, Option("--random-weights", "Give the recipe's network random weights.")
]
AllowPickle = Annotated[
    bool,
    Option("--allow-pickle", "Load pickled objects, which can run any code that they contain."),
]
InputSize = Annotated[
    tuple[int, int] | None, Option("--input-size", "Height and width of the input.", Size())
]
Mean = Annotated[
    tuple[float, ...] | None,
    Option("--mean", "Mean of each channel, for pixel values from 0 to 1.", Numbers()),
]
Std = Annotated[
    tuple[float, ...] | None,
    Option("--std", "Standard deviation of each channel.", Numbers()),
]
Resize = Annotated[
    str | None,
    Option(
        "--resize",
        "How images get the input's size: cut out the middle, or stretch.",
        click.Choice(["crop", "stretch"]),
    ),
]
Cover = Annotated[
    tuple[int, int] | None,
    Option("--cover", "Size that an image is scaled to cover before it is cropped.", Size()),
]
Library = Annotated[
    str,
    Option(
        "--library",
        "TensorRT library to build with; tensorrt-rtx needs no GPU.",
        click.Choice(TENSORRT),
    ),
]
MaxBatch = Annotated[
    int,
    Option("--max-batch", "Most images that a plan, or a model on a server, takes.", COUNT),
]
Devices = Annotated[
    tuple[str, ...],
    Option(
        "--device",
        "Compute capability to build for, such as 8.9. Can be repeated; without it, tensorrt "
        "builds for the GPU in this machine, tensorrt-rtx for all from 8.0 on.",
        multiple=True,
        metavar="X.Y",
    ),
]
TimingCacheFile = Annotated[
    Path | None,
    Option(
        "--timing-cache",
        "File that keeps kernel timings, to speed up later builds; tensorrt only.",
        click.Path(path_type=Path, dir_okay=False),
    ),
]
Kernels = Annotated[
    bool,
    Option(
        "--kernels/--no-kernels",
        "Also compile the kernels between the graphs, for machines that cannot keep them.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a bundle's graphs are run."""

    backend: BackendName = "auto"
    precision: Precision = "fp32"
    threads: Threads = 0
    batch_size: BatchSize = BATCH_SIZE
    require_signature: RequireSignature = unset("none is needed")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """An explanation method and its options; see cli.choices for what they become."""

    method: MethodName = METHODS[0]
    pairs: MethodPairs = ()


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """How maps are drawn."""

    colormap: ColorMap = COLORMAP
    opacity: Opacity = OPACITY

    def look(self, color_bar: bool = False) -> Look:
        """Return them as the renderer takes them.

        Raises:
            OptionError: There is no such color map.
        """
        from ccam_deploy import render

        render.require_colormap(self.colormap)
        return render.Look(self.colormap, self.opacity, color_bar)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a PyTorch network is loaded from, beside a model file."""

    arch: Architecture = None
    recipe: RecipeFile = None
    random_weights: RandomWeights = False
    allow_pickle: AllowPickle = False


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """What a network takes as its input, and how images become that."""

    input_size: InputSize = unset("the recipe's, the program's, else 224x224")
    mean: Mean = unset("the recipe's, else ImageNet's")
    std: Std = unset("the recipe's, else ImageNet's")
    resize: Resize = unset("the recipe's, else crop")
    cover: Cover = unset("the recipe's, else the input's size / 0.875")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What TensorRT plans are built with and for."""

    library: Library = TENSORRT[0]
    max_batch: MaxBatch = MAX_BATCH
    devices: Devices = ()
    timing_cache: TimingCacheFile = None
    kernels: Kernels = True


def parse_assignments(pairs: Sequence[str]) -> dict[str, str]:
    """Split words of the form KEY=VALUE.

    Raises:
        OptionError: A word has another form.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f'option "{pair}" is not key=value')
        values[key.strip()] = value.strip()
    return values
