"""`ccam-deploy doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from ccam_deploy.cli.options import AsJson
from ccam_deploy.cli.parameters import with_options
from ccam_deploy.cli.printing import print_json
from ccam_deploy.text import one_line, text_table

if TYPE_CHECKING:
    from ccam_deploy.checks.doctor import Finding


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options of `doctor`."""

    as_json: AsJson = False


@click.command()
@with_options(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Show which backends work here, and how to fix the others.

    Runs a graph of one operator on each. The exit code is 1 where no backend works.
    """
    from ccam_deploy.checks.doctor import examine

    backends, parts = examine()
    if options.as_json:
        print_json(
            {
                "backends": [asdict(finding) for finding in backends],
                "parts": [asdict(finding) for finding in parts],
            }
        )
    else:
        _show("backend", backends)
        click.echo()
        _show("needed for a GPU", parts)
        _show_remedies([*backends, *parts])
    if not any(finding.works for finding in backends):
        sys.exit(1)


def _show(title: str, findings: Sequence[Finding]) -> None:
    """A line for each finding, the short cells first."""
    rows = [(title, "works", "details")]
    rows += [(each.name, "yes" if each.works else "no", each.detail) for each in findings]
    click.echo(text_table(rows))


def _show_remedies(findings: Sequence[Finding]) -> None:
    """Each remedy once, with everything that waits for it."""
    waiting: dict[str, list[str]] = {}
    for finding in findings:
        if finding.remedy:
            waiting.setdefault(finding.remedy, []).append(finding.name)
    if waiting:
        click.echo("\nto fix:")
    for remedy, names in waiting.items():
        click.echo(f"  {', '.join(names)}\n    {one_line(remedy)}")
