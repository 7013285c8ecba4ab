"""The `ccam-deploy` command, also as `python -m ccam_deploy`."""

import os
import sys


def main() -> None:
    """Run the command; a Ctrl-C while its modules are imported ends it in one line, too."""
    _open_closed_streams()
    try:
        from ccam_deploy.cli.main import main as command

        command(prog_name="ccam-deploy")
    except KeyboardInterrupt:
        print("\nerror: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(2)


def _open_closed_streams() -> None:
    """Let standard streams that are closed, as under some daemons, lead nowhere.

    The next files that are opened would take their numbers, and what libraries write to stderr.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


if __name__ == "__main__":
    main()
