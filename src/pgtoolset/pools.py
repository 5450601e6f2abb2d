"""Who holds the connections of an engine's pool, and transactions that are idle for too long.

https://docs.sqlalchemy.org/en/20/core/pooling.html
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine, Pool
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._arguments import check_pool, seconds
from pgtoolset._compatibility import unsupported
from pgtoolset._postgres.holders import Holders, holders_of
from pgtoolset._postgres.statements import note_begins
from pgtoolset.types import Duration
from pgtoolset.values import ConnectionHolder

__all__ = ["holders", "warn_of_idle_transactions"]


def holders(engine: AsyncEngine | Engine) -> list[ConnectionHolder]:
    """Return who holds the connections of an engine's pool now, the longest first.

    No I/O, so it can be asked at any time: by metrics, or by a debugger. A `PoolTimeoutError` has
    the same list.

    The library notes who takes a connection from its first use of the engine on. A connection that
    was taken before is not in the list; `engine.pool.checkedout()` counts it, too. After
    `engine.dispose()` the engine has a new pool; a connection that is still out belongs to the old
    one.

    Args:
        engine: the engine, or the `sync_engine` below it.

    Raises:
        TypeError: `engine` is something else.
        UnsupportedDriverError: its database or driver is not supported.
        UnsupportedVersionError: its pool lacks the methods of SQLAlchemy's pools.

    Example:
        >>> async def test_holders(engine):
        ...     async with engine.connect() as connection:
        ...         await connection.execute(text("SELECT 1"))
        ...         [holder] = holders(engine)
        ...         assert holder.statement == "SELECT 1"
        ...     assert holders(engine) == []

    See docs/connections.md.
    """
    return _holders_of(check_pool(engine)).list()


def warn_of_idle_transactions(engine: AsyncEngine | Engine, limit: Duration) -> Callable[[], None]:
    """Log a warning for each transaction that is idle for too long; return what stops that.

    Such a transaction holds a connection, its locks and the rows that VACUUM must keep, while its
    task waits for something else than the database. The logger is `pgtoolset`; each transaction is
    reported once, with its task, the line that took its connection, and its last statement. While a
    statement runs, a transaction is not idle. A call in place of an earlier one changes the limit.

    It costs a timer while connections are out, outlives `engine.dispose()`, and ends with the
    engine.

    Args:
        engine: the engine, or the `sync_engine` below it.
        limit: how long a transaction may be idle: seconds, a `timedelta` or a string such as
            `"500ms"`.

    Raises:
        TypeError, ValueError: an argument is something else.
        UnsupportedDriverError: the engine's database or driver is not supported.
        UnsupportedVersionError: its pool lacks the methods of SQLAlchemy's pools.

    Example:
        >>> async def lifespan(app):
        ...     stop = warn_of_idle_transactions(engine, "5s")
        ...     yield
        ...     stop()

    See docs/connections.md.
    """
    found, after = _holders_of(check_pool(engine)), seconds("limit", limit)
    note_begins(engine.dialect)
    return found.limit_idle(after)


def _holders_of(pool: Pool) -> Holders:
    found = holders_of(pool)
    if found is None:
        raise unsupported(
            "sqlalchemy",
            "Pool._do_get, _do_return_conn or _create_connection",
            "pgtoolset cannot note who takes a connection",
        )
    return found
