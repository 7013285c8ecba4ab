"""`ccam-deploy triton`."""

from __future__ import annotations

import click

from ccam_deploy.cli.triton_export import export


@click.group()
def triton() -> None:
    """Serve explanations with NVIDIA's Triton Inference Server."""


triton.add_command(export)
