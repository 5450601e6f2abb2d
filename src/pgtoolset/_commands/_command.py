"""What every command shares: its shape, its errors, and the way from a URL to an engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._arguments import seconds, url_of, with_asyncpg
from pgtoolset._postgres.sqlstates import driver_error

__all__ = [
    "Command",
    "CommandError",
    "add_url",
    "connected",
    "interval_of",
    "parse_url",
    "printable",
    "without_secrets",
]


class CommandError(Exception):
    """The command failed. The message is for the person at the terminal."""


class Command(Protocol):
    """A module that is a command."""

    @property
    def HELP(self) -> str: ...

    @property
    def DESCRIPTION(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Run the command, and return the exit code."""
        ...


def add_url(parser: argparse.ArgumentParser) -> None:
    """Declare the argument `url`, with `DATABASE_URL` as its default."""
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        default=os.environ.get("DATABASE_URL"),
        help="the database, postgresql://user:password@host/name; by default DATABASE_URL",
    )


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
            raise argparse.ArgumentTypeError(str(error)) from error
        if result < least:
            raise argparse.ArgumentTypeError(f"{option} must be at least {least} seconds")
        return result

    return parse


def parse_url(url: str | None) -> URL:
    """Return the URL for SQLAlchemy with asyncpg, whatever driver it names."""
    if not url:
        raise CommandError("there is no URL: pass one, or set DATABASE_URL")
    try:
        return with_asyncpg(url_of("URL", url))
    except ValueError as error:
        raise CommandError(str(error)) from None


def without_secrets(url: URL) -> str:
    """Return a URL for messages: without its password and its query, which may hold one too."""
    return url.set(password=None, query={}).render_as_string()


def printable(text: str) -> str:
    """Return a text as one line without control characters, which a terminal would obey."""
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line)


@asynccontextmanager
async def connected(url: URL) -> AsyncIterator[AsyncEngine]:
    """Yield an engine that keeps no connection; its errors become a `CommandError`."""
    try:
        engine = create_async_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"server_settings": {"application_name": "pgtoolset"}},
        )
    except ImportError as error:
        raise CommandError("asyncpg is not installed: pip install asyncpg") from error
    try:
        yield engine
    except DBAPIError as error:
        raise _failure(url, str(driver_error(error))) from error
    except (OSError, TypeError) as error:
        # A TypeError is asyncpg's for a parameter of the URL that it does not know.
        raise _failure(url, f"{type(error).__name__}: {error}") from error
    finally:
        await engine.dispose()


def _failure(url: URL, reason: str) -> CommandError:
    """Return the error for a database, without the secrets of the URL."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        reason = reason.replace(secret, "***")
    return CommandError(printable(f"{without_secrets(url)}: {reason}"))


def _secrets(url: URL) -> set[str]:
    values = {str(url.password)} if url.password else set()
    for value in url.query.values():
        values.update([value] if isinstance(value, str) else value)
    # A short value, such as a number, may stand in a message by coincidence, and is no secret.
    return {value for value in values if len(value) > 3 or value == url.password}
