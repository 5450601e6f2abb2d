"""Sessions that are all joined to one connection, whose transaction is rolled back after the test.

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

from pgtoolset._postgres.sqlstates import reported_by_server
from pgtoolset.errors import TransactionStateError

#: Checks what is deferred as a COMMIT would, and leaves it deferred. SET CONSTRAINTS cannot be
#: taken back by another one, which would defer constraints that are INITIALLY IMMEDIATE too;
#: rolling back a subtransaction takes it back.
#: https://www.postgresql.org/docs/current/sql-set-constraints.html
_CHECK = """DO $$ BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    RAISE EXCEPTION SQLSTATE 'PGTS1';
EXCEPTION WHEN SQLSTATE 'PGTS1' THEN NULL;
END $$"""

#: Nothing else that a session can leave behind outlives a transaction that is rolled back.
_UNLOCK = "SELECT pg_advisory_unlock_all()"

#: Seconds that what a test leaves running may go on.
PATIENCE = 2.0

_KEY = "pgtoolset.testing.joined"


class JoinedSessions:
    """A factory of sessions on one connection, and the session of it that is the test's own."""

    def __init__(self, connection: AsyncConnection, options: Mapping[str, Any]) -> None:
        _listen()
        keywords = {**options, "join_transaction_mode": "create_savepoint"}
        keywords["info"] = {**options.get("info", {}), _KEY: True}
        self.session_maker: async_sessionmaker[Any] = async_sessionmaker(connection, **keywords)
        self.session = self.session_maker()


class Connections:
    """The connections that tests are joined to: one for each running loop, kept from test to test
    of that loop.

    A connection of asyncpg belongs to the loop that it was made in, and making one takes longer
    than all the rest.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._kept: dict[asyncio.AbstractEventLoop, AsyncConnection] = {}

    @asynccontextmanager
    async def sessions(
        self, options: Mapping[str, Any], passed: Callable[[], bool]
    ) -> AsyncIterator[JoinedSessions]:
        """Sessions that are all in one transaction, which is rolled back at the end of the block.

        Where `passed()` holds then, what is deferred is checked before.
        """
        connection = await self._connection()
        joined = JoinedSessions(connection, options)
        sound = unlocked = False
        try:
            await connection.begin()
            yield joined
            if not await _is_lost(connection):
                unlocked = await _unlock_when_idle(connection)
                sound = True
                await _check_open(connection)
                # What an error has aborted, on purpose where the test has passed, has nothing left
                # to check.
                if unlocked and passed():
                    await connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
        finally:
            try:
                if sound:
                    await _roll_back(connection, unlocked)
            except BaseException:
                sound = False
                raise
            finally:
                if not sound:
                    await self._discard(connection)
            # Not before: closing it would undo what is to be checked.
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
            # No time has passed for this loop since the last test. If the server has hung up, it
            # hears of it now.
            for _ in range(3):
                await asyncio.sleep(0)
            if await _is_lost(connection):
                await self._discard(connection)
                connection = None
        if connection is None:
            connection = self._kept[loop] = await self._engine.connect()
        return connection

    async def _discard(self, connection: AsyncConnection) -> None:
        self._kept.pop(asyncio.get_running_loop(), None)
        await connection.invalidate()
        await connection.close()


_listening = False


def _listen() -> None:
    global _listening
    if not _listening:
        _listening = True
        event.listen(Session, "before_commit", _before_commit)


def _before_commit(session: Session) -> None:
    # RELEASE SAVEPOINT takes the place of the COMMIT, and does not check what a COMMIT does.
    if _KEY in session.info and not session.in_nested_transaction():
        session.flush()
        connection: Connection = session.connection()
        connection.exec_driver_sql(_CHECK)


async def _unlock_when_idle(connection: AsyncConnection) -> bool:
    """Wait until nothing runs, and let go of the session's advisory locks. False where the
    transaction is aborted."""
    raw: Any = await connection.get_raw_connection()
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # SQLAlchemy would wait for its turn for ever, and the driver does not wait.
            await raw.driver_connection.execute(_UNLOCK)
            return True
        except Exception as error:
            if reported_by_server(error):
                return False
            if time.monotonic() > deadline:
                raise TransactionStateError(
                    "something that the test has started still uses the connection of its sessions; let the test wait "
                    "for it, or give it a connection of its own by pytest.mark.pg_commit"
                ) from error
        await asyncio.sleep(0.01)


async def _check_open(connection: AsyncConnection) -> None:
    raw: Any = await connection.get_raw_connection()
    # SQLAlchemy's adapter begins a transaction with the first statement.
    begun = raw.dbapi_connection._transaction is not None
    if begun and not raw.driver_connection.is_in_transaction():
        raise TransactionStateError(
            "the test has ended the transaction that its sessions are joined to, by a COMMIT or ROLLBACK of its own "
            "past the session, so what it wrote may be stored; mark it with pytest.mark.pg_commit"
        )


async def _roll_back(connection: AsyncConnection, unlocked: bool) -> None:
    transaction = connection.get_transaction()
    if transaction is not None:
        await transaction.rollback()
    if not unlocked:
        raw: Any = await connection.get_raw_connection()
        await raw.driver_connection.execute(_UNLOCK)


async def _is_lost(connection: AsyncConnection) -> bool:
    if connection.closed or connection.invalidated:
        return True
    raw: Any = await connection.get_raw_connection()
    return bool(raw.driver_connection.is_closed())
