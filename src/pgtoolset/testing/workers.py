"""A database of its own for each pytest-xdist worker, and a session on tables of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any

from sqlalchemy import URL, make_url

from pgtoolset._arguments import LONGEST_NAME, DatabaseUrl, asyncpg_url, check_name, url_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.databases import (
    comment_of,
    comment_statement,
    comments,
    name_locked,
    rename_statement,
    users_of,
)
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset._postgres.sqlstates import DUPLICATE_DATABASE, UNIQUE_VIOLATION, sqlstate_of
from pgtoolset.databases import create, drop
from pgtoolset.errors import DatabaseExistsError, DatabaseInUseError, DatabaseNotFoundError
from pgtoolset.testing._owners import Owner, draft_name, is_forgotten_draft, new_owner, owner_in

__all__ = ["create_worker_database", "worker_database_url"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: The tokens of the databases that blocks of this process hold now.
_open: set[str] = set()


def worker_database_url(
    database_url: DatabaseUrl, default_test_db: str, *, prefix: str | None = None
) -> str:
    """The URL of this pytest-xdist worker's own database, on the server of another URL.

    The database is called `prefix_gw0`, or `gw0` without a prefix; where pytest-xdist does not run,
    `default_test_db` stands in for the worker. A name that PostgreSQL could not hold is cut, and a
    hash of the whole name is put into it, so that two long names do not become one.

    Args:
        database_url: a URL for SQLAlchemy or libpq. What is in it, besides the database, stays.
        default_test_db: the name outside of a worker.
        prefix: what sets your project's databases apart from those of others on the server.

    Returns:
        A URL for `create_async_engine`, with the password in it. One that names no driver gets
        asyncpg.

    Raises:
        ValueError, TypeError: an argument is not what it must be.

    Example:
        >>> worker_url = worker_database_url(url, "test", prefix="shop")  # .../shop_gw0

    See https://pytest-xdist.readthedocs.io/en/stable/how-to.html#identifying-the-worker-process-during-a-test
    """
    parsed = asyncpg_url(url_of("database_url", database_url))
    name = _worker_name(default_test_db, prefix)
    url = parsed.set(database=name).render_as_string(hide_password=False)
    if make_url(url).database != name:
        raise ValueError(f"{name!r} cannot stand in a URL; give another prefix or default_test_db")
    return url


def _worker_name(default_test_db: object, prefix: object) -> str:
    _check_part("default_test_db", default_test_db)
    worker = os.environ.get("PYTEST_XDIST_WORKER") or str(default_test_db)
    if prefix is not None and prefix != "":
        _check_part("prefix", prefix)
    name = f"{prefix}_{worker}" if prefix else worker
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = blake2b(name.encode(), digest_size=8).hexdigest()
    end = worker.encode()[:20].decode(errors="ignore")
    room = LONGEST_NAME - len(f"_{digest}_{end}".encode())
    return f"{name.encode()[:room].decode(errors='ignore')}_{digest}_{end}"


def _check_part(what: str, part: object) -> None:
    if not isinstance(part, str):
        raise TypeError(f"{what} must be a string, not {part!r}")
    if not part or "\0" in part:
        raise ValueError(f"{what} must be a name for a database, and {part!r} is none")
    try:
        part.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode: {part!r}") from None


@asynccontextmanager
async def create_worker_database(
    database_url: DatabaseUrl,
    default_test_db: str = "test_db",
    *,
    prefix: str | None = None,
    server_url: DatabaseUrl | None = None,
    template: str | None = None,
) -> AsyncIterator[str]:
    """A database of this pytest-xdist worker's own, for the time of a block.

    It is made empty, or as a copy of `template`, and dropped at the end of the block, whatever
    happened in it and whoever is still connected. A comment on it says which process made it. By
    that, what a killed run left behind is dropped by the next run on the same machine, whatever its
    name; what belongs to a process that is alive, or was not made here at all, is never touched.

    Args:
        database_url: a URL of the server, and all that a connection needs; see
            `worker_database_url`.
        default_test_db: the name where pytest-xdist does not run.
        prefix: stands before the name. Two projects on one server, or two runs at a time, need two.
        server_url: another URL of the same server, of a role that may create databases;
            `database_url` by default.
        template: a database to copy; see `create_database`.

    Yields:
        The URL that `worker_database_url` gives, ready for `create_async_engine`.

    Raises:
        DatabaseExistsError: there is a database of that name that was not made here, or whose run
            is alive.
        DatabaseInUseError: the template is in use, or a database of that name, made here on another
            machine.
        DatabaseNotFoundError: there is no such template.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> async with create_worker_database(url, prefix="shop") as worker_url:
        ...     engine = create_async_engine(worker_url)
    """
    url = worker_database_url(database_url, default_test_db, prefix=prefix)
    name = str(make_url(url).database)
    server = url_of("server_url", database_url if server_url is None else server_url)
    if template is not None:
        check_name("template", template)
    owner = await asyncio.to_thread(new_owner)
    _open.add(owner.token)
    try:
        await _make(server, name, template, owner)
        try:
            yield url
        except BaseException:
            await uninterrupted(_give_back(server, name, owner, quietly=True))
            raise
        await uninterrupted(_give_back(server, name, owner))
    finally:
        _open.discard(owner.token)


async def _make(server: URL, name: str, template: str | None, owner: Owner) -> None:
    """Create the database whole: under its name there is never one without a mark."""
    made = False
    try:
        async with maintenance_connection(server, never=name, rather_not=template) as connection:
            await _sweep(connection, name)
            async with name_locked(connection, name):
                await _clear(connection, name)
                draft = draft_name(owner)
                await create(connection, server, draft, template, called=name)
                await uninterrupted(_publish(connection, draft, name, owner))
                made = True
    except BaseException:
        if made:
            await uninterrupted(_give_back(server, name, owner, quietly=True))
        raise


async def _publish(connection: Any, draft: str, name: str, owner: Owner) -> None:
    try:
        await connection.execute(comment_statement(draft, owner.mark()))
        await connection.execute(rename_statement(draft, name))
    except BaseException as error:
        await drop(connection, draft, force=True)
        if sqlstate_of(error) in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
            raise _not_ours(name) from error
        raise


async def _clear(connection: Any, name: str) -> None:
    """Drop what a killed run left under this name; raise where it is none."""
    there, comment = await comment_of(connection, name)
    if not there:
        return
    owner = owner_in(comment)
    if owner is None:
        raise _not_ours(name)
    alive = await asyncio.to_thread(owner.is_alive)
    if alive and (owner.token in _open or owner.pid != os.getpid()):
        raise DatabaseExistsError(
            f"the database {name!r} belongs to a run that is alive (pid {owner.pid} on this machine): "
            "give this one another prefix, or wait for the other to end"
        )
    sessions = await users_of(connection, name) if alive is None else []
    if sessions:
        raise DatabaseInUseError(
            f"the database {name!r} belongs to a run on another machine, or from before a restart ({owner.machine}, "
            f"pid {owner.pid}), and is in use: {'; '.join(map(str, sessions))}. "
            "Give this run another prefix, or drop it yourself.",
            database=name,
            sessions=sessions,
        )
    await _drop_if_there(connection, name)


def _not_ours(name: str) -> DatabaseExistsError:
    return DatabaseExistsError(
        f"there is a database {name!r} that create_worker_database has not made, so it is left alone: "
        "give another prefix or default_test_db, or drop it yourself"
    )


async def _sweep(connection: Any, but: str) -> None:
    """Drop what killed runs left under other names. What cannot be dropped is left to the next
    sweep."""
    for name, comment in await comments(connection):
        if name == but or not await asyncio.to_thread(_is_abandoned, name, comment):
            continue
        try:
            async with name_locked(connection, name):
                # Whoever has the lock may have taken the name for a database of its own meanwhile.
                there, comment = await comment_of(connection, name)
                if there and await asyncio.to_thread(_is_abandoned, name, comment):
                    owner = owner_in(comment)
                    certain = owner is None or await asyncio.to_thread(owner.is_alive) is False
                    if certain or not await users_of(connection, name):
                        await _drop_if_there(connection, name, force=certain)
        except Exception:
            if connection.is_closed():
                raise
            logger.warning(
                "the database %r of a killed run could not be dropped", name, exc_info=True
            )


def _is_abandoned(name: str, comment: str | None) -> bool:
    owner = owner_in(comment)
    if owner is not None:
        return owner.is_alive() is False or owner.is_forgotten()
    return comment is None and is_forgotten_draft(name)


async def _give_back(server: URL, name: str, owner: Owner, *, quietly: bool = False) -> None:
    try:
        async with (
            maintenance_connection(server, never=name) as connection,
            name_locked(connection, name),
        ):
            _, comment = await comment_of(connection, name)
            if owner_in(comment) == owner:
                await _drop_if_there(connection, name)
    except Exception:
        if not quietly:
            raise
        # The error of the block is the one to be told; the next run sweeps.
        logger.warning("the worker database %r could not be dropped", name, exc_info=True)


async def _drop_if_there(connection: Any, name: str, *, force: bool = True) -> None:
    try:
        await drop(connection, name, force=force)
    except DatabaseNotFoundError:
        pass
