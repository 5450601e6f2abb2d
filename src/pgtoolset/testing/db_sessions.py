"""A session on tables that exist for the time of a block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import CircularDependencyError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset._arguments import (
    DatabaseUrl,
    check_flag,
    connect_arguments,
    engine_url,
    metadata_of,
    shown,
    url_of,
    uses_asyncpg,
)
from pgtoolset._cancellation import uninterrupted
from pgtoolset._lifecycle import close
from pgtoolset._listeners import verify_commit_of
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.sqlstates import reported_by_server
from pgtoolset._postgres.tables import qualified_names
from pgtoolset.cleanup import HasMetadata, cleanup_tables
from pgtoolset.errors import CommitUnknownError, PgToolsetError
from pgtoolset.testing import _marks
from pgtoolset.testing._owners import Owner, new_owner

__all__ = ["create_db_session"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: Seconds to wait for a lock while the tables are created or dropped.
LOCK_TIMEOUT = 5

#: How often the tables are dropped, or emptied, where the connection is lost meanwhile.
TRIES = 4

#: Seconds before the second attempt.
_PAUSE = 0.1

#: The tokens of the blocks of this process that are not over.
_open: set[str] = set()


@asynccontextmanager
async def create_db_session(
    database_url: DatabaseUrl,
    base: HasMetadata | MetaData,
    *,
    echo: bool | Literal["debug"] = False,
    expire_on_commit: bool = False,
    drop_tables: bool = True,
    cleanup: bool = False,
    engine_kwargs: Mapping[str, Any] | None = None,
    session_kwargs: Mapping[str, Any] | None = None,
) -> AsyncIterator[AsyncSession]:
    """Create the tables of a metadata and yield a session, with its own engine.

    The end of the block, after an error too, closes the session, drops the tables and disposes of
    the engine. What the block has not committed is rolled back. Where a connection is lost, another
    one drops the tables. Tables that a killed run has made here are dropped first: a comment on the
    row type of each says which process made it. The comments of the tables are as in the metadata.

    Args:
        database_url: the database. A URL without a driver gets asyncpg, or psycopg where that
            alone is installed.
        base: a declarative base or a `MetaData`. Tables that exist are used as they are.
        echo: log the statements, and with `"debug"` the rows.
        expire_on_commit: expire the attributes of instances at a commit.
        drop_tables: drop the tables at the end; otherwise they stay for the next block.
        cleanup: empty tables that are not dropped at the end; see `cleanup_tables`.
        engine_kwargs: further arguments for `create_async_engine`.
        session_kwargs: further arguments for `async_sessionmaker`, such as `class_`.

    Yields:
        The session, which is in no transaction yet.

    Raises:
        LockTimeoutError: at the end, another transaction uses the tables; the error names it.
        OutsideReferenceError: with `cleanup`, rows of other tables reference rows of these.
        ValueError, TypeError: an argument is wrong; before any SQL.

    Example:
        >>> async with create_db_session(url, Base, drop_tables=False, cleanup=True) as session:
        ...     session.add(Account(id=2, balance=100))
        ...     await session.commit()
    """
    metadata = metadata_of(base)
    _check_keywords("engine_kwargs", engine_kwargs)
    _check_keywords("session_kwargs", session_kwargs)
    check_flag("expire_on_commit", expire_on_commit)
    check_flag("drop_tables", drop_tables)
    check_flag("cleanup", cleanup)
    if echo != "debug":
        check_flag("echo", echo)
    given = url_of("database_url", database_url)
    url = engine_url(given)
    keywords = dict(engine_kwargs or {})
    if uses_asyncpg(given):
        keywords["connect_args"] = connect_arguments(given) | keywords.get("connect_args", {})
    engine = create_async_engine(url, echo=echo, **keywords)
    maker = async_sessionmaker(engine, expire_on_commit=expire_on_commit, **(session_kwargs or {}))
    session = maker()
    owner = await asyncio.to_thread(new_owner)
    _open.add(owner.token)
    made = False
    try:
        # A cancelled COMMIT would leave tables, and in SQLAlchemy 2.0 a cancelled first connect a
        # connection.
        await uninterrupted(_create(engine, metadata, owner if drop_tables else None))
        made = True
        yield session
    except BaseException:
        if made:
            await uninterrupted(
                _finish(engine, session, metadata, drop_tables, cleanup, quietly=True)
            )
        raise
    else:
        await uninterrupted(_finish(engine, session, metadata, drop_tables, cleanup))
    finally:
        _open.discard(owner.token)
        await uninterrupted(engine.dispose())


def _check_keywords(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of keywords or None, not {shown(value)}")
    for key in value or ():
        if not isinstance(key, str) or not key.isidentifier():
            raise ValueError(f"{name} must have names of arguments as keys, not {shown(key)}")


async def _create(engine: AsyncEngine, metadata: MetaData, owner: Owner | None) -> None:
    try:
        async with engine.begin() as connection:
            await connection.run_sync(verify_commit_of)
            await _limit_locks(connection)
            await _marks.sweep(connection, lambda found: found.is_over(_open))
            before = await _marks.types(connection)
            await connection.run_sync(metadata.create_all)
            if owner is not None:
                await _marks.mark(connection, owner, before)
    except Exception as error:
        if owner is not None and not reported_by_server(error):
            await _undo(engine, owner)  # the answer of the COMMIT may have been lost
        raise


async def _limit_locks(connection: AsyncConnection) -> None:
    await connection.run_sync(send, f"SET LOCAL lock_timeout = {1000 * LOCK_TIMEOUT}")


async def _undo(engine: AsyncEngine, owner: Owner) -> None:
    async def drop() -> None:
        async with engine.begin() as connection:
            await _limit_locks(connection)
            await _marks.sweep(connection, lambda found: found == owner)

    try:
        await _on_a_fresh_connection(engine, drop)
    except Exception:
        logger.debug("whether tables were created is unknown; the next run looks", exc_info=True)


async def _on_a_fresh_connection(engine: AsyncEngine, work: Callable[[], Awaitable[None]]) -> None:
    """Do work that can be done again: another time where a connection is lost."""
    for attempt in range(TRIES):
        # What has cut one connection of a pool may have cut all of them.
        await engine.dispose()
        try:
            return await work()
        except Exception as error:
            is_lost = isinstance(error, CommitUnknownError) or not (
                isinstance(error, PgToolsetError) or reported_by_server(error)
            )
            if attempt == TRIES - 1 or not is_lost:
                raise
        await asyncio.sleep(_PAUSE * 2**attempt)


async def _finish(
    engine: AsyncEngine,
    session: AsyncSession,
    metadata: MetaData,
    drop_tables: bool,
    cleanup: bool,
    *,
    quietly: bool = False,
) -> None:
    try:
        await close(session)
        if drop_tables:
            await _on_a_fresh_connection(engine, lambda: _drop(engine, metadata))
        elif cleanup:
            await _on_a_fresh_connection(engine, lambda: _empty(engine, metadata))
    except Exception:
        if not quietly:
            raise
        # The caller sees the error of the block.
        logger.warning("the tables of a test could not be dropped or emptied", exc_info=True)


async def _empty(engine: AsyncEngine, metadata: MetaData) -> None:
    async with AsyncSession(engine) as session:
        await cleanup_tables(session, metadata)


async def _drop(engine: AsyncEngine, metadata: MetaData) -> None:
    names: list[str] = []

    def drop(connection: Connection) -> None:
        names[:] = qualified_names(metadata.tables.values(), connection.dialect, {})
        try:
            metadata.drop_all(connection)
        except CircularDependencyError:
            # Raised before any SQL, for a cycle of constraints without names, which one statement
            # can drop together.
            send(connection, f"DROP TABLE IF EXISTS {', '.join(names)}")
            metadata.drop_all(connection)

    wanted = Wanted("drop the tables", names, "ACCESS EXCLUSIVE")
    async with Lookout(LOCK_TIMEOUT) as lookout, engine.begin() as connection:
        await connection.run_sync(lookout.watch, wanted)
        await connection.run_sync(verify_commit_of)
        await _limit_locks(connection)
        await connection.run_sync(drop)
