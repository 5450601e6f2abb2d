"""The command line, `pgtoolset`. Each command is a module of `pgtoolset._commands`; this one only
chooses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pgtoolset._commands import COMMANDS, CommandError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name (`sys.argv` by default) and return the exit code.

    0 when it did what it was asked for, 1 when it could not, 2 when it was asked wrongly, 130 after
    Ctrl-C.
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
