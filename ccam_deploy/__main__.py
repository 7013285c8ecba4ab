"""The `ccam-deploy` command, also as `python -m ccam_deploy`."""

import sys


def main() -> None:
    """Run the command; a Ctrl-C while its modules are imported ends it in one line, too."""
    try:
        from ccam_deploy.cli.main import main as command

        command(prog_name="ccam-deploy")
    except KeyboardInterrupt:
        print("\nerror: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
