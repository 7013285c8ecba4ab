"""`python -m ccam_deploy`: the `ccam-deploy` command."""

from ccam_deploy.cli.main import main

if __name__ == "__main__":
    main(prog_name="ccam-deploy")
