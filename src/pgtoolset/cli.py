# PYTHON_ARGCOMPLETE_OK
"""The command line, `pgtoolset`. Each command is a module of `pgtoolset._commands`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import pgtoolset
from pgtoolset._commands import COMMANDS, CommandError, OutputError
from pgtoolset._text import may_hold_password, one_line

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors show no URL: argparse quotes the argument that it cannot place."""

    def error(self, message: str) -> NoReturn:
        for argument in _given:
            for part in (argument, argument.partition("=")[2]):
                if part and may_hold_password(part):
                    message = message.replace(part, "a URL").replace(repr(part), "a URL")
        super().error(one_line(message))


#: The arguments of this process, for messages.
_given: list[str] = []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Args:
        arguments: of the command line, without the program; `None` for those of the process.

    Returns:
        0 after success, 1 after a failure or where `doctor` has findings, 2 for wrong arguments or
        where the database cannot be reached, 130 after Ctrl-C.
    """
    _given[:] = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    _complete(parser)
    options, unknown = parser.parse_known_args(_given)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    _print_what_the_terminal_lacks_as_escapes()
    try:
        with _notes_on_standard_error():
            exit_code: int = options.run(options)
    except CommandError as error:
        print(f"pgtoolset: {error}", file=sys.stderr)
        if isinstance(error, OutputError):
            _discard_output()
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        _discard_output()
        return 0
    return exit_code


def _discard_output() -> None:
    """Let go of what is still to be written: Python tries once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pgtoolset",
        description="Looks at a PostgreSQL database: who waits for whom, how a row changes, and "
        "what needs care.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"pgtoolset {pgtoolset.__version__} ({pgtoolset.implementation})"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=textwrap.fill(command.DESCRIPTION, 79),
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, parser=subparser)
    return parser


_EPILOG = """\
examples:
  export DATABASE_URL=postgresql://app@db/shop
  pgtoolset doctor          # what needs care, and what to do about it
  pgtoolset locks --watch   # who waits for whom, again and again
  pgtoolset watch orders 17 # the changes of a row

pgtoolset COMMAND --help explains a command and shows more examples.
pip install 'pgtoolset[cli]' adds colours and completion, which a shell turns
on with: eval "$(register-python-argcomplete pgtoolset)"\
"""


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that completes a command line, and end the process then."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


@contextmanager
def _notes_on_standard_error() -> Iterator[None]:
    """Print each warning and each log record of the library as one line, without a traceback."""

    def note(text: str) -> None:
        print(f"pgtoolset: {one_line(text)}", file=sys.stderr, flush=True)

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        note(str(message))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    logger, handler = logging.getLogger("pgtoolset"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        logger.removeHandler(handler)


def _print_what_the_terminal_lacks_as_escapes() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
