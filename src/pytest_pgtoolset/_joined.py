"""Sessions joined to one connection, whose transaction is rolled back after the test.

https://docs.sqlalchemy.org/en/20/orm/session_transaction.html#joining-a-session-into-an-external-transaction-such-as-for-test-suites
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

from pgtoolset.errors import TransactionStateError
from pgtoolset.testing.joining import (
    begin,
    discard,
    execute,
    has_ended,
    is_lost,
    refuses,
    uses_connection,
)
from pytest_pgtoolset._loops import name_connection

#: Checks deferred constraints as a COMMIT would, and leaves them deferred. A second SET CONSTRAINTS
#: would also defer constraints that are INITIALLY IMMEDIATE, so a subtransaction is rolled back.
#: https://www.postgresql.org/docs/current/sql-set-constraints.html
_CHECK = """DO $$ BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    RAISE EXCEPTION SQLSTATE 'PGTS1';
EXCEPTION WHEN SQLSTATE 'PGTS1' THEN NULL;
END $$"""

#: The locks of the session are all that outlives a transaction that is rolled back.
_UNLOCK = "SELECT pg_catalog.pg_advisory_unlock_all()"

#: Seconds to wait for statements that a test has left running.
_SETTLE_TIMEOUT = 2.0

_KEY = "pgtoolset.testing.joined"


class JoinedSessions:
    """A factory of sessions on one connection, and the test's own session.

    Attributes:
        session_maker: the factory.
        session: a session of it.
    """

    def __init__(self, connection: AsyncConnection, options: Mapping[str, Any]) -> None:
        _listen()
        keywords = {**options, "join_transaction_mode": "create_savepoint"}
        keywords["info"] = {**options.get("info", {}), _KEY: True}
        self.session_maker: async_sessionmaker[Any] = async_sessionmaker(connection, **keywords)
        self.session = self.session_maker()


class Connections:
    """The connections that tests are joined to: one for each event loop, kept while the loop lives.

    A connection of asyncpg belongs to its event loop, and connecting is the larger part of what a
    test pays for its session.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._kept: dict[asyncio.AbstractEventLoop, AsyncConnection] = {}

    @asynccontextmanager
    async def sessions(
        self, options: Mapping[str, Any], passed: Callable[[], bool]
    ) -> AsyncIterator[JoinedSessions]:
        """Yield sessions in one transaction, which the end of the block rolls back.

        Args:
            options: arguments of the factory.
            passed: returns whether the test has passed; deferred constraints are checked then.
        """
        connection = await self._connection()
        joined = JoinedSessions(connection, options)
        is_sound = is_unlocked = False
        try:
            await begin(connection)
            yield joined
            if not await is_lost(connection):
                is_unlocked = await _unlock_when_idle(connection)
                is_sound = True
                await _check_open(connection)
                # A transaction that an error has aborted has nothing left to check.
                if is_unlocked and passed():
                    await connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
        finally:
            try:
                if is_sound:
                    await _roll_back(connection, is_unlocked)
            except BaseException:
                is_sound = False
                raise
            finally:
                if not is_sound:
                    await self._discard(connection)
            # Last, because closing it rolls back rows that the check needs.
            await joined.session.close()

    async def close(self) -> None:
        """Close the connection of the running loop, where it has one."""
        connection = self._kept.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.close()

    async def _connection(self) -> AsyncConnection:
        loop = asyncio.get_running_loop()
        connection = self._kept.get(loop)
        if connection is not None:
            # The loop did not run between two tests. If the server has hung up meanwhile, these
            # turns of the loop tell the driver.
            for _ in range(3):
                await asyncio.sleep(0)
            if await is_lost(connection):
                await self._discard(connection)
                connection = None
        if connection is None:
            connection = self._kept[loop] = await self._engine.connect()
            name_connection(connection, "pg_session and pg_session_maker")
        return connection

    async def _discard(self, connection: AsyncConnection) -> None:
        self._kept.pop(asyncio.get_running_loop(), None)
        await discard(connection)


_listening = False


def _listen() -> None:
    global _listening
    if not _listening:
        _listening = True
        event.listen(Session, "before_commit", _before_commit)


def _before_commit(session: Session) -> None:
    # The commit is a RELEASE SAVEPOINT, which does not check deferred constraints.
    if _KEY in session.info and not session.in_nested_transaction():
        session.flush()
        connection: Connection = session.connection()
        connection.exec_driver_sql(_CHECK)


async def _unlock_when_idle(connection: AsyncConnection) -> bool:
    """Wait until the connection is idle and release the advisory locks of the session.

    Returns:
        `False` where the transaction is aborted, so the locks are still held.
    """
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    while True:
        error = await _refusal_to_unlock(connection)
        if error is None:
            return True
        if refuses(error):
            return False
        if time.monotonic() > deadline:
            raise TransactionStateError(
                "a task that the test has started still uses the connection of its sessions: let "
                "the test wait for it, or mark the test with pytest.mark.pg_commit, which gives "
                "each session a connection of its own"
            ) from error
        await asyncio.sleep(0.01)


async def _refusal_to_unlock(connection: AsyncConnection) -> Exception | None:
    # asyncpg refuses while a statement runs; psycopg and SQLAlchemy would wait for its end.
    if await uses_connection(connection):
        return TransactionStateError("a statement runs")
    try:
        await execute(connection, _UNLOCK)
    except Exception as error:
        return error
    return None


async def _check_open(connection: AsyncConnection) -> None:
    if await has_ended(connection):
        raise TransactionStateError(
            "the test has ended the transaction that its sessions are joined to, by a COMMIT or "
            "ROLLBACK past the session, so its rows may be stored: mark it with "
            "pytest.mark.pg_commit"
        )


async def _roll_back(connection: AsyncConnection, is_unlocked: bool) -> None:
    transaction = connection.get_transaction()
    if transaction is not None:
        await transaction.rollback()
    if not is_unlocked:
        await connection.exec_driver_sql(_UNLOCK)
        await connection.rollback()
