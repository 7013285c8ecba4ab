"""`ccam-deploy triton`."""

from __future__ import annotations

import click

from ccam_deploy.cli.triton_check import check
from ccam_deploy.cli.triton_export import export
from ccam_deploy.cli.triton_serve import serve


@click.group()
def triton() -> None:
    """Serve explanations with NVIDIA's Triton Inference Server."""


for command in (export, serve, check):
    triton.add_command(command)
