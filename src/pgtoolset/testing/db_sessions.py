"""A session on tables that are made for it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import CircularDependencyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset._arguments import DatabaseUrl, asyncpg_url, metadata_of, url_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._lifecycle import close
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.tables import qualified_names
from pgtoolset.cleanup import HasMetadata, cleanup_tables

__all__ = ["create_db_session"]

logger: logging.Logger = logging.getLogger("pgtoolset")

#: Seconds that a lock may be waited for while the tables are made or dropped.
PATIENCE = 5


@asynccontextmanager
async def create_db_session(
    database_url: DatabaseUrl,
    base: HasMetadata | MetaData,
    *,
    echo: bool = False,
    expire_on_commit: bool = False,
    drop_tables: bool = True,
    cleanup: bool = False,
    engine_kwargs: Mapping[str, Any] | None = None,
    session_kwargs: Mapping[str, Any] | None = None,
) -> AsyncIterator[AsyncSession]:
    """A session on tables that are made for the time of a block, with an engine of its own.

    At the end, whatever happened in the block, the session is closed, the tables are dropped and
    the engine is disposed. What the block has not committed is rolled back.

    Args:
        database_url: the database; one that names no driver gets asyncpg.
        base: a declarative base, or a `MetaData`. Tables that exist are used as they are.
        echo: log the statements.
        expire_on_commit: have the attributes of objects expire at a commit.
        drop_tables: drop them at the end; otherwise they stay, for the next block.
        cleanup: empty them at the end, see `cleanup_tables`: for tables that are not dropped.
        engine_kwargs: further arguments for `create_async_engine`.
        session_kwargs: further arguments for `async_sessionmaker`, such as `class_`.

    Yields:
        The session, which is in no transaction yet.

    Raises:
        LockTimeoutError: at the end, somebody else's transaction uses the tables; it names them.
        OutsideReferenceError: with `cleanup`, rows of other tables reference rows of these.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> async with create_db_session(url, Base, drop_tables=False, cleanup=True) as session:
        ...     session.add(Account(id=2, balance=100))
        ...     await session.commit()
    """
    metadata = metadata_of(base)
    url = asyncpg_url(url_of("database_url", database_url))
    engine = create_async_engine(url, echo=echo, **(engine_kwargs or {}))
    maker = async_sessionmaker(engine, expire_on_commit=expire_on_commit, **(session_kwargs or {}))
    session = maker()
    made = False
    try:
        # A cancelled COMMIT would leave tables; a cancelled first connect leaves a connection, in
        # SQLAlchemy 2.0.
        await uninterrupted(_create(engine, metadata))
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
        await uninterrupted(engine.dispose())


async def _create(engine: AsyncEngine, metadata: MetaData) -> None:
    async with engine.begin() as connection:
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {1000 * PATIENCE}")
        await connection.run_sync(metadata.create_all)


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
            await _drop(engine, metadata)
        elif cleanup:
            async with AsyncSession(engine) as own:
                await cleanup_tables(own, metadata)
    except Exception:
        if not quietly:
            raise
        # The error of the block is the one to be told.
        logger.warning("the tables of a test could not be dropped or emptied", exc_info=True)


async def _drop(engine: AsyncEngine, metadata: MetaData) -> None:
    names: list[str] = []

    def drop(connection: Connection) -> None:
        names[:] = qualified_names(metadata.tables.values(), connection.dialect, {})
        try:
            metadata.drop_all(connection)
        except CircularDependencyError:
            # Raised before any SQL, for constraints without a name. One statement drops tables in a
            # cycle.
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join(names)}")
            metadata.drop_all(connection)

    wanted = Wanted("drop the tables", names, "ACCESS EXCLUSIVE")
    async with Lookout(PATIENCE) as lookout, engine.begin() as connection:
        assert connection.sync_connection is not None
        lookout.watch(connection.sync_connection, wanted)
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {1000 * PATIENCE}")
        await connection.run_sync(drop)
