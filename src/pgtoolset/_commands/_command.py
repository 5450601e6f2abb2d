"""What every command shares: its shape, its error, and how it reaches the database that a URL
names."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset._arguments import url_of, with_asyncpg
from pgtoolset._postgres.sqlstates import driver_error


class CommandError(Exception):
    """The command could not do what it was asked for. The message is for whoever typed it."""


class Command(Protocol):
    """A module that is a command."""

    @property
    def HELP(self) -> str: ...

    @property
    def DESCRIPTION(self) -> str: ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Say what may be given."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do it, and return the exit code."""
        ...


def add_url(parser: argparse.ArgumentParser) -> None:
    """The argument `url`, which `DATABASE_URL` may stand in for."""
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        default=os.environ.get("DATABASE_URL"),
        help="the database, postgresql://user:password@host/name; by default the one in DATABASE_URL",
    )


def parse_url(url: str | None) -> URL:
    """The URL for SQLAlchemy with asyncpg, whatever driver it names."""
    if not url:
        raise CommandError("no URL was given, and DATABASE_URL is not set")
    try:
        return with_asyncpg(url_of("URL", url))
    except ValueError as error:
        raise CommandError(str(error)) from None


@asynccontextmanager
async def connected(url: URL) -> AsyncIterator[AsyncEngine]:
    """An engine that keeps no connection; what goes wrong with the database is told as a
    `CommandError`."""
    engine = create_async_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"server_settings": {"application_name": "pgtoolset"}},
    )
    try:
        yield engine
    except DBAPIError as error:
        raise CommandError(f"{url.render_as_string()}: {driver_error(error)}") from error
    except (OSError, TypeError, ImportError) as error:
        # The operating system's, asyncpg's for a parameter of the URL that it does not know, and no
        # asyncpg at all.
        raise CommandError(f"{url.render_as_string()}: {type(error).__name__}: {error}") from error
    finally:
        await engine.dispose()
