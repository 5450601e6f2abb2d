"""The command line, `pgtoolset`. Each command is a module of `pgtoolset._commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pgtoolset._commands import COMMANDS, CommandError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Args:
        arguments: of the command line, without the program; `None` for those of the process.

    Returns:
        0 after success, 1 after a failure, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="pgtoolset", description="Tools for PostgreSQL.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        exit_code: int = options.run(options)
    except CommandError as error:
        print(f"pgtoolset: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
