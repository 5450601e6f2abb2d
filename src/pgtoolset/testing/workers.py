"""One database for each worker of pytest-xdist: named, made, dropped, and swept after a kill."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hashlib import blake2b
from typing import Any

from sqlalchemy import URL, make_url

from pgtoolset._arguments import (
    LONGEST_NAME,
    DatabaseUrl,
    check_name,
    engine_url,
    shown,
    url_of,
)
from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.databases import (
    comment_of,
    comment_statement,
    comments,
    users_of,
)
from pgtoolset._postgres.renaming import (
    LOCK_TIMEOUT,
    end_sessions,
    holders_of,
    rename,
    rename_if_marked,
)
from pgtoolset._postgres.servers import maintenance_connection
from pgtoolset._postgres.sqlstates import (
    DUPLICATE_DATABASE,
    INVALID_CATALOG_NAME,
    LOCK_NOT_AVAILABLE,
    OBJECT_IN_USE,
    UNIQUE_VIOLATION,
    sqlstate_of,
)
from pgtoolset.databases import TRIES, create, drop
from pgtoolset.errors import DatabaseExistsError, DatabaseInUseError, DatabaseNotFoundError
from pgtoolset.testing._owners import Owner, draft_name, is_forgotten_draft, new_owner, owner_in
from pgtoolset.values import Blocker

__all__ = ["create_worker_database", "worker_database_url"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: Seconds for all that is done on the server before the block. Copying a large template takes most.
_MAKE_TIMEOUT = 300.0

#: Seconds for all that is done after the block.
_GIVE_BACK_TIMEOUT = 60.0

#: Seconds for one DROP DATABASE.
_DROP_TIMEOUT = 30.0

#: The tokens of the databases that blocks of this process use now.
_open: set[str] = set()


def worker_database_url(
    database_url: DatabaseUrl, default_test_db: str, *, prefix: str | None = None
) -> str:
    """Return the URL of this pytest-xdist worker's own database.

    The database is called `prefix_gw0`, or `gw0` without a prefix. Outside of a worker,
    `default_test_db` takes the place of the worker's name. A name that is too long for PostgreSQL
    is cut and contains a hash of the whole name, so two long names stay different.

    Args:
        database_url: a URL for SQLAlchemy or libpq. Everything in it but the database is kept.
        default_test_db: the name outside of a worker.
        prefix: a name that tells your project's databases from others on the server.

    Returns:
        A URL for `create_async_engine`, with the password. A URL without a driver gets asyncpg, or
        psycopg where that alone is installed.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> worker_url = worker_database_url(url, "test", prefix="shop")  # .../shop_gw0

    See https://pytest-xdist.readthedocs.io/en/stable/how-to.html#identifying-the-worker-process-during-a-test
    """
    parsed = engine_url(url_of("database_url", database_url))
    name = _worker_name(default_test_db, prefix)
    url = parsed.set(database=name).render_as_string(hide_password=False)
    if make_url(url).database != name:
        raise ValueError(
            f"prefix and default_test_db make the name {shown(name)}, which no URL can hold: "
            "give other ones"
        )
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
        raise TypeError(f"{what} must be a string, not {shown(part)}")
    if not part or "\0" in part:
        raise ValueError(
            f"{what} must be a string of one or more characters other than NUL, not {shown(part)}"
        )
    try:
        part.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be valid Unicode, not {shown(part)}") from None


@asynccontextmanager
async def create_worker_database(
    database_url: DatabaseUrl,
    default_test_db: str = "test_db",
    *,
    prefix: str | None = None,
    server_url: DatabaseUrl | None = None,
    template: str | None = None,
) -> AsyncIterator[str]:
    """Create this pytest-xdist worker's own database for the time of a block.

    The database is empty, or a copy of `template`. The end of the block drops it, after an error
    and with connections open too. A comment on the database says which process made it, so the next
    run on the same machine drops what a killed run left, under any name. A database of a living
    process, or one that this function has not made, is never touched. Nothing is waited for without
    limit: a lock of another session for 5 seconds, all of it for 5 minutes before the block and one
    after it.

    Args:
        database_url: a URL with all that a connection to the server needs; see
            `worker_database_url`.
        default_test_db: the name outside of a worker.
        prefix: the first part of the name. Two projects on one server, or two runs at a time, need
            different ones.
        server_url: another URL of the same server, of a role that may create databases;
            `database_url` by default.
        template: a database to copy; see `create_database`.

    Yields:
        The URL that `worker_database_url` returns, for `create_async_engine`.

    Raises:
        DatabaseExistsError: a database of that name exists, and this function has not made it or
            its run is alive.
        DatabaseInUseError: the template has sessions, or a database of that name from another
            machine has, or another session holds a lock for too long; the error names the sessions.
        DatabaseNotFoundError: the template does not exist.
        ValueError, TypeError: an argument is wrong; before any SQL.

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
    """Create the database under a draft's name, mark it, and rename it: it never lacks a mark."""
    made = False
    try:
        async with (
            _limited(f"create the database {name!r}", name, _MAKE_TIMEOUT),
            maintenance_connection(server, never=name, rather_not=template) as connection,
        ):
            await _sweep(connection, name)
            await _clear(connection, name)
            draft = draft_name(owner)
            await create(connection, server, draft, template, called=name)
            await uninterrupted(_publish(connection, draft, name, owner))
            made = True
    except BaseException:
        if made:
            await uninterrupted(_give_back(server, name, owner, quietly=True))
        raise


@asynccontextmanager
async def _limited(action: str, name: str, seconds: float) -> AsyncIterator[None]:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DatabaseInUseError(
            f"could not {action} within {seconds:g} s: another session may hold a lock on it or on "
            "its template (pg_locks shows which), or the server does not answer",
            database=name,
        ) from error


async def _publish(connection: Any, draft: str, name: str, owner: Owner) -> None:
    try:
        await connection.execute(comment_statement(draft, owner.mark()))
        for left in reversed(range(TRIES)):
            try:
                return await rename(connection, draft, name)
            except Exception as error:
                if sqlstate_of(error) == LOCK_NOT_AVAILABLE:
                    raise await _locked(connection, "rename", name) from error
                if sqlstate_of(error) not in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
                    raise
                # Another session has taken the name since it was free.
                await _clear(connection, name)
                if not left:
                    raise _not_ours(name) from error
    except BaseException:
        await drop(connection, draft, force=True, timeout=_DROP_TIMEOUT)
        raise


async def _clear(connection: Any, name: str) -> None:
    """Drop what a killed run left under this name; raise where the database is another's."""
    exists, comment = await comment_of(connection, name)
    if not exists:
        return
    owner = owner_in(comment)
    if owner is None:
        raise _not_ours(name)
    alive = await asyncio.to_thread(owner.is_alive)
    if alive and (owner.token in _open or owner.pid != os.getpid()):
        raise DatabaseExistsError(
            f"the database {name!r} belongs to a run that is alive (pid {owner.pid} on this "
            "machine): give this run another prefix, or wait until the other has ended"
        )
    sessions = await users_of(connection, name) if alive is None else []
    if sessions:
        raise DatabaseInUseError(
            f"the database {name!r} belongs to a run on another machine, or from before a restart "
            f"({shown(owner.machine)}, pid {owner.pid}), and has sessions: "
            f"{'; '.join(map(str, sessions))}; "
            "give this run another prefix, or drop the database yourself",
            database=name,
            sessions=sessions,
        )
    await _drop_marked(connection, name, comment)


def _not_ours(name: str) -> DatabaseExistsError:
    return DatabaseExistsError(
        f"the database {name!r} exists, and create_worker_database has not made it, so it is kept: "
        "give another prefix or default_test_db, or drop the database yourself"
    )


async def _sweep(connection: Any, keep: str) -> None:
    """Drop what killed runs left under other names; leave what cannot be dropped to the next."""
    for name, comment in await comments(connection):
        if name == keep or not await asyncio.to_thread(_is_abandoned, name, comment):
            continue
        try:
            await _drop_abandoned(connection, name, comment)
        except DatabaseNotFoundError:
            continue  # another worker was faster
        except Exception:
            if connection.is_closed():
                raise
            logger.warning(
                "the database %r of a killed run could not be dropped", name, exc_info=True
            )


async def _drop_abandoned(connection: Any, name: str, comment: str | None) -> None:
    owner = owner_in(comment)
    if owner is None:
        # A draft, whose name no other process can make again.
        return await drop(connection, name, force=True, timeout=_DROP_TIMEOUT)
    is_certain = await asyncio.to_thread(owner.is_alive) is not None
    if is_certain or not await users_of(connection, name):
        await _drop_marked(connection, name, comment, force=is_certain)


def _is_abandoned(name: str, comment: str | None) -> bool:
    owner = owner_in(comment)
    if owner is not None:
        return owner.is_over(_open)
    return comment is None and is_forgotten_draft(name)


async def _give_back(server: URL, name: str, owner: Owner, *, quietly: bool = False) -> None:
    try:
        async with (
            _limited(f"drop the database {name!r}", name, _GIVE_BACK_TIMEOUT),
            maintenance_connection(server, never=name) as connection,
        ):
            _, comment = await comment_of(connection, name)
            if owner_in(comment) == owner:
                await _drop_marked(connection, name, comment)
    except Exception:
        if not quietly:
            raise
        # The caller sees the error of the block; the next run sweeps the database.
        logger.warning("the worker database %r could not be dropped", name, exc_info=True)


async def _drop_marked(
    connection: Any, name: str, comment: str | None, *, force: bool = True
) -> None:
    """Drop the database that has this name and this comment, if there still is one.

    It is dropped under a name that no other process can give to another database meanwhile, and
    that the next run sweeps.
    """
    doomed = draft_name(await asyncio.to_thread(new_owner))
    try:
        is_renamed = await _take_away(connection, name, doomed, comment, force=force)
    except asyncio.CancelledError:
        with suppress(Exception):  # the COMMIT of the rename may have been sent
            await drop(connection, doomed, force=True, timeout=_DROP_TIMEOUT)
        raise
    if is_renamed:
        await uninterrupted(_drop_doomed(connection, name, doomed))


async def _take_away(
    connection: Any, name: str, doomed: str, comment: str | None, *, force: bool
) -> bool:
    """Rename the database; end its sessions with `force`."""
    for left in reversed(range(TRIES if force else 1)):
        if force and comment is not None:
            await end_sessions(connection, name, comment)
        try:
            return await rename_if_marked(connection, name, doomed, comment)
        except Exception as error:
            state = sqlstate_of(error)
            if state == INVALID_CATALOG_NAME:
                return False
            if state == LOCK_NOT_AVAILABLE:
                raise await _locked(connection, "drop", name) from error
            if state != OBJECT_IN_USE:
                raise
            sessions = await users_of(connection, name)
            # A prepared transaction, which has no process id, stays until it is ended by hand.
            if not left or not all(each.pid for each in sessions):
                raise _in_use(name, sessions) from error
    raise AssertionError("the last attempt returns or raises")


async def _drop_doomed(connection: Any, name: str, doomed: str) -> None:
    try:
        await drop(connection, doomed, force=True, timeout=_DROP_TIMEOUT)
    except Exception as error:
        error.add_note(f"{doomed!r} is the database {name!r}, renamed for the attempt")
        with suppress(Exception):
            await rename(connection, doomed, name)
        raise


def _in_use(name: str, sessions: list[Blocker]) -> DatabaseInUseError:
    return DatabaseInUseError(
        f"could not drop the database {name!r}, because it is in use: "
        f"{'; '.join(map(str, sessions)) or 'its sessions have ended since'}; close these sessions",
        database=name,
        sessions=sessions,
    )


async def _locked(connection: Any, action: str, name: str) -> DatabaseInUseError:
    holders = await holders_of(connection, name)
    return DatabaseInUseError(
        f"could not {action} the database {name!r} within {LOCK_TIMEOUT:g} s, because another "
        f"session holds a lock on it: {'; '.join(map(str, holders)) or 'it has ended since'}; "
        "end that session's transaction",
        database=name,
        sessions=holders,
    )
