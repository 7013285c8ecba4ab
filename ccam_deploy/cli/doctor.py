"""`ccam-deploy doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from ccam_deploy.cli.options import json_option, print_json
from ccam_deploy.text import text_table


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say which backends work here, and what to do first about the others.

    Each is tried on a graph of one operator. Ends with exit code 1 where none works.
    """
    from ccam_deploy.checks.doctor import examine

    backends, parts = examine()
    if as_json:
        found = {"backends": backends, "parts": parts}
        print_json({name: [asdict(one) for one in findings] for name, findings in found.items()})
    else:
        for title, findings in (("backend", backends), ("what GPU backends need", parts)):
            rows: list[tuple[str, ...]] = [(title, "works", "found")]
            for one in findings:
                rows.append((one.name, "yes" if one.works else "no", one.detail))
                if one.remedy:
                    rows.append(("", "", f"do first: {one.remedy}"))
            click.echo(text_table(rows) + ("\n" if title == "backend" else ""))
    if not any(one.works for one in backends):
        sys.exit(1)
