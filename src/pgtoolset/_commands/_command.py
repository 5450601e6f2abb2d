"""What every command shares: its shape, its errors, and the way from a URL to an engine."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol
from urllib.parse import unquote

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._arguments import connect_arguments, engine_url, seconds, url_of
from pgtoolset._commands._libpq import completed, environment_names_a_server
from pgtoolset._postgres.pooling import with_caches, without_caches
from pgtoolset._postgres.sqlstates import driver_error
from pgtoolset._postgres.urls import driver_named
from pgtoolset._text import one_line

__all__ = [
    "Command",
    "CommandError",
    "OutputError",
    "UsageError",
    "add_url",
    "connected",
    "described",
    "explained",
    "interval_of",
    "parse_url",
]

#: Where a command connects to, for the end of its help.
_CONNECTION = (
    "URL is the database: postgresql://user@host/name, with libpq's parameters, or a DSN such as "
    "'host=... dbname=...'. A command line can be read by other users of the machine, so keep the "
    "password out of it: set DATABASE_URL or PGPASSWORD, or use ~/.pgpass. Without a URL the "
    "command takes DATABASE_URL. Missing parts come from PGSERVICE and the service file, "
    "and from PGHOST, PGPORT, PGDATABASE, PGUSER and libpq's other variables."
)

#: The width of a help. Its examples are not broken.
_WIDTH = 79

#: Seconds to connect, where neither the URL nor PGCONNECT_TIMEOUT says it.
_CONNECT_TIMEOUT = 10


def explained(examples: Sequence[tuple[str, str]], *paragraphs: str) -> str:
    """Return the end of a command's help: examples, and where it connects to.

    Args:
        examples: what each is for, and the command.
        paragraphs: what else there is to know.
    """
    lines = ["examples:"]
    for purpose, command in examples:
        lines += [f"  # {purpose}", f"  {command}", ""]
    texts = [*paragraphs, _CONNECTION]
    return "\n".join([*lines, "\n\n".join(textwrap.fill(each, _WIDTH) for each in texts)])


class CommandError(Exception):
    """The command failed. The message is for the person at the terminal.

    Args:
        message: on one line.
        exit_code: 2 where the arguments are wrong or there is no connection, otherwise 1.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(one_line(message))
        self.exit_code = exit_code


class UsageError(CommandError):
    """The arguments are wrong, or the database cannot be reached."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 2)


class OutputError(CommandError):
    """The output cannot be written, and the database is not the reason."""


class Command(Protocol):
    """A module that is a command."""

    @property
    def HELP(self) -> str: ...

    @property
    def DESCRIPTION(self) -> str: ...

    @property
    def EXAMPLES(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Run the command, and return the exit code."""
        ...


def add_url(parser: argparse.ArgumentParser) -> None:
    """Declare the argument `url`, which may be missing."""
    parser.add_argument("url", metavar="URL", nargs="?", help="the database; see below")


def interval_of(option: str, least: float = 0.0) -> Callable[[str], float]:
    """Return a parser for the time that an option takes: seconds, or a string such as 500ms.

    Args:
        option: the option, for messages.
        least: the shortest time, in seconds.
    """

    def parse(argument: str) -> float:
        try:
            given: float | str = float(argument)
        except ValueError:
            given = argument
        try:
            result = seconds(option, given, zero=least > 0)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if result < least:
            raise argparse.ArgumentTypeError(f"{option} must be at least {least} seconds")
        return result

    return parse


def parse_url(url: str | None, *, keeps_driver: bool = False) -> URL:
    """Return the URL that is given, or DATABASE_URL, with what libpq's environment adds to it.

    Args:
        url: the argument of the command.
        keeps_driver: whether the driver that it names is used, and not the first one there is.
    """
    name, given = ("URL", url) if url else ("DATABASE_URL", os.environ.get("DATABASE_URL"))
    if not given and not environment_names_a_server():
        raise UsageError(
            "there is no URL: pass one, or set DATABASE_URL, PGSERVICE or PGHOST; see --help"
        )
    try:
        parsed = completed(url_of(name, given or "postgresql://", any_driver=True))
        # Once more, because the service and the variables have parameters, too.
        parsed = parsed if keeps_driver else parsed.set(drivername="postgresql")
        parsed = url_of("the service or a variable", parsed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not {"application_name", "fallback_application_name"} & set(parsed.query):
        parsed = parsed.update_query_dict({"application_name": "pgtoolset"})
    if not {"connect_timeout", "timeout"} & set(parsed.query):
        parsed = parsed.update_query_dict({"connect_timeout": str(_CONNECT_TIMEOUT)})
    return parsed


def described(url: URL) -> str:
    """Return a URL for messages: without its password and its query, which may hold one too."""
    where = {name: url.query[name] for name in ("host", "port") if name in url.query}
    plain = url.set(drivername="postgresql", password=None, query=where)
    return one_line(unquote(plain.render_as_string()))


@asynccontextmanager
async def connected(url: URL, *, caches: bool = False) -> AsyncIterator[AsyncEngine]:
    """Yield an engine that keeps no connection; its errors become a `UsageError`.

    Args:
        url: what `parse_url` returned.
        caches: whether its connections keep prepared statements, which fails behind most poolers.
            Without them each statement needs a transaction.
    """
    options = (with_caches if caches else without_caches)(driver_named(url))
    try:
        engine = create_async_engine(
            engine_url(url), poolclass=NullPool, connect_args=connect_arguments(url) | options
        )
    except ImportError:
        driver = driver_named(url)
        raise UsageError(f"the driver is not installed: pip install {driver}") from None
    try:
        yield engine
    except (CommandError, BrokenPipeError):
        raise
    except Exception as error:
        # Whatever it is: a person at a terminal cannot use a traceback. Wrong parameters of the URL
        # and refused connections are errors of the driver, of Python and of the operating system.
        raise _failure(url, error) from None
    finally:
        await engine.dispose()


def _failure(url: URL, error: Exception) -> UsageError:
    """Return the error for a database, without the secrets of the URL."""
    cause = driver_error(error)
    reason = str(cause)
    if isinstance(cause, TimeoutError):
        reason = "no answer in time"
    elif isinstance(cause, OSError | TypeError) or not reason:
        reason = f"{type(cause).__name__}: {reason}"
    for secret in sorted(_secrets(url), key=len, reverse=True):
        reason = reason.replace(secret, "***")
    return UsageError(f"{described(url)}: {reason}")


def _secrets(url: URL) -> set[str]:
    values = {str(url.password)} if url.password else set()
    values |= {os.environ[name] for name in ("PGPASSWORD",) if os.environ.get(name)}
    for name, value in url.query.items():
        if name in ("host", "port"):
            continue
        values.update([value] if isinstance(value, str) else value)
    # A short value, such as a number, may stand in a message by coincidence, and is no secret.
    return {value for value in values if len(value) > 3 or value == url.password}
