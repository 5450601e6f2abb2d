"""The connection of the driver below the sessions of a test, for the pytest plugin."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.connections import begun_transaction
from pgtoolset._postgres.discards import discard as discard_now
from pgtoolset._postgres.discards import is_running
from pgtoolset._postgres.drivers import driver_of
from pgtoolset._postgres.engines import see
from pgtoolset._postgres.sqlstates import reported_by_server

__all__ = ["begin", "discard", "execute", "has_ended", "is_lost", "refuses", "uses_connection"]

#: A setting that ends with the transaction. psycopg begins another one after a COMMIT of the test,
#: and its state is the same then.
_MARK = "SELECT pg_catalog.set_config('pgtoolset.joined', 'on', true)"
_ASK = "SELECT pg_catalog.current_setting('pgtoolset.joined', true)"


async def begin(connection: AsyncConnection) -> None:
    """Begin the transaction that the sessions of a test are joined to."""
    await connection.begin()
    if driver_of((await _raw(connection)).driver_connection).begins_by_itself:
        await connection.exec_driver_sql(_MARK)


async def has_ended(connection: AsyncConnection) -> bool:
    """Whether that transaction was ended past SQLAlchemy, by a COMMIT or ROLLBACK of the test.

    Call it while no statement runs, and before an error has aborted the transaction or after that.
    """
    raw = await _raw(connection)
    driver = driver_of(raw.driver_connection)
    if not driver.begins_by_itself:
        # SQLAlchemy's adapter begins the transaction with the first statement.
        has_begun = begun_transaction(raw) is not None
        return has_begun and not driver.is_in_transaction(raw.driver_connection)
    try:
        cursor = await raw.driver_connection.execute(_ASK)
    except Exception as error:
        if reported_by_server(error):
            return False  # aborted, so it is open
        raise
    (value,) = await cursor.fetchone()
    return bool(value != "on")


async def execute(connection: AsyncConnection, statement: str) -> None:
    """Execute a statement past SQLAlchemy."""
    await (await _raw(connection)).driver_connection.execute(statement)


async def uses_connection(connection: AsyncConnection) -> bool:
    """Whether a task executes a statement on the connection now."""
    return is_running(await _raw(connection))


def refuses(error: Exception) -> bool:
    """Whether PostgreSQL has refused a statement, as opposed to the driver."""
    return reported_by_server(error)


async def is_lost(connection: AsyncConnection) -> bool:
    """Whether the connection is closed, or the server has left it."""
    if connection.closed or connection.invalidated:
        return True
    raw = (await _raw(connection)).driver_connection
    return driver_of(raw).is_closed(raw)


async def discard(connection: AsyncConnection) -> None:
    """Close the connection. PostgreSQL cancels a statement that a task runs on it."""
    see(connection)  # SQLAlchemy closes it as the driver can bear it then
    if not (connection.closed or connection.invalidated):
        await connection.run_sync(lambda sync: discard_now(sync.connection))
    await connection.invalidate()
    await connection.close()


async def _raw(connection: AsyncConnection) -> Any:
    return await connection.get_raw_connection()
