"""`ccam-deploy triton export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from ccam_deploy.cli.options import (
    COUNT,
    MAX_BATCH,
    PATH,
    AsJson,
    BundleFolder,
    MaxBatch,
    MethodNamesOrNone,
    MethodPairs,
    Precision,
    RequireSignature,
    Threads,
)
from ccam_deploy.cli.parameters import Argument, Option, unset, with_options
from ccam_deploy.cli.printing import print_json, say

Repository = Annotated[Path, Argument(PATH)]
ModelName = Annotated[
    str,
    Option("--name", "Name of the model; the one for image files has _image behind it."),
]
Instances = Annotated[
    int,
    Option("--instances", "Copies of the model that run at a time, each in its process.", COUNT),
]
Kind = Annotated[
    str,
    Option(
        "--kind",
        "Where the model runs; auto takes a GPU where the server has one.",
        click.Choice(["auto", "cpu", "gpu"]),
    ),
]
QueueDelay = Annotated[
    int,
    Option(
        "--queue-delay-us",
        "Microseconds that a request may wait for others to be explained with it.",
        click.IntRange(min=0),
    ),
]


@dataclass(frozen=True, kw_only=True)
class TritonExportOptions:
    """The options of `triton export`."""

    bundle: BundleFolder
    repository: Repository
    name: ModelName = "ccam"
    instances: Instances = 1
    kind: Kind = "auto"
    max_batch: MaxBatch = MAX_BATCH
    queue_delay_us: QueueDelay = 0
    precision: Precision = "fp32"
    methods: MethodNamesOrNone = unset("all that the bundle can run, collection-cam first")
    pairs: MethodPairs = ()
    threads: Threads = 0
    require_signature: RequireSignature = unset("none is needed")
    as_json: AsJson = False


@click.command()
@with_options(TritonExportOptions)
def export(options: TritonExportOptions) -> None:
    """Write BUNDLE into REPOSITORY as models for Triton.

    The model --name explains arrays, the one with _image behind the name JPEG and PNG files. Both
    hold all that they need, and older ones of these names are replaced; other models in the
    repository stay. The server's Python needs ccam-deploy and a backend.

    Requests may ask for each of --methods; the first is the default. With --require-signature, the
    server checks the bundle again whenever it loads the model, with the key at the same place.
    """
    import dataclasses

    import msgspec

    from ccam_deploy.bundle.folder import read_bundle
    from ccam_deploy.cli.choices import make_methods
    from ccam_deploy.errors import OptionError
    from ccam_deploy.methods import METHODS
    from ccam_deploy.serve.repository import Serving, require_repository, write_repository
    from ccam_deploy.serve.settings import ModelSettings

    serving = Serving(options.name, options.instances, options.max_batch, options.queue_delay_us)
    require_repository(options.repository, serving)
    methods = make_methods(options.methods or tuple(METHODS), options.pairs)
    changed = {
        name: {
            key: value
            for key, value in dataclasses.asdict(method).items()
            if value != getattr(type(method)(), key)
        }
        for name, method in methods.items()
    }
    for name, differing in changed.items():
        if "file" in differing:
            raise OptionError(
                f"--option {name}:file names a file of this machine, which a model would not find "
                "on its server; leave it out"
            )
    values = {
        "methods": options.methods or (),
        "options": {name: values for name, values in changed.items() if values},
        "precision": options.precision,
        "kind": options.kind,
        "threads": options.threads,
        "require_signature": str(options.require_signature.absolute())
        if options.require_signature
        else "",
    }
    settings = msgspec.convert(values, ModelSettings)
    bundle = read_bundle(options.bundle, options.require_signature)
    folders = write_repository(bundle, options.repository, serving, settings)
    if options.as_json:
        print_json({"models": [str(folder) for folder in folders]})
        return
    for folder in folders:
        say(str(folder))
