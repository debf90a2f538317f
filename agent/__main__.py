"""The `pitr` command, also as `python -m agent`."""

import sys


def main() -> None:
    """Run the command; a Ctrl-C while it is still being loaded is told without a traceback, too."""
    try:
        from agent.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
