"""Polls of `wait_for_row_change`: one query for the rows of one waiter or of many.

The statement takes the keys as arrays and returns each row with the position of the key that found
it. So PostgreSQL alone decides which key finds which row, however the table spells it. See
https://www.postgresql.org/docs/current/queries-table-expressions.html#QUERIES-TABLEFUNCTIONS
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property
from types import NoneType
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Connection, Engine, Select, column, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, lazyload, undefer
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import PrimaryKey
from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.arrays import element
from pgtoolset._postgres.catalog import unnested
from pgtoolset._postgres.connections import has_one_backend, terminate
from pgtoolset._postgres.rows import key_parameter
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset._text import safe
from pgtoolset.watch.targets import Target, exact_part

__all__ = ["Batch", "PollTimeout", "RowQuery", "is_lost", "poll_on_connection", "poll_on_pool"]

#: Seconds that connecting may take, and the answer to a statement. Then the connection counts as
#: lost.
STATEMENT_TIMEOUT = 10.0

#: Values that several sessions may share, because they cannot be changed in place.
IMMUTABLE_TYPES = (
    *(NoneType, int, float, complex, str, bytes),
    *(Decimal, date, time, timedelta, UUID, Enum),
)


class RowQuery:
    """What one waiter polls for: a row, and where its session's statements go.

    Attributes:
        sent_at: the time of the event loop at which the last statement for the row was sent.
        has_predicate: whether the caller's own function receives the row, which then must not be
            shared.
    """

    def __init__(
        self,
        target: Target[Any],
        key: PrimaryKey,
        session: Session,
        bind: Engine | Connection,
        *,
        has_predicate: bool,
    ) -> None:
        self.target = target
        columns = target.mapper.primary_key
        self.key = tuple(exact_part(c.type, part) for c, part in zip(columns, key, strict=True))
        self.bind = bind
        self.has_predicate = has_predicate
        self.sent_at = -math.inf
        self._session = session

    @cached_property
    def statement(self) -> Select[Any]:
        """The rows of any number of keys, each with the position of its key, from 1."""
        target = self.target
        keys: list[Any] = list(target.mapper.primary_key)
        names = _parameters(target)
        typed = list(zip(names, keys, strict=True))
        arrays = [key_parameter(name, each.type) for name, each in typed]
        outputs = [column(name, each.type) for name, each in typed]
        numbered = unnested(arrays).table_valued(*outputs, with_ordinality="position")
        wanted = numbered.render_derived(name="pgtoolset_wanted")
        matches = [
            getattr(target.model, attribute) == element(wanted.c[name], each)
            for attribute, (name, each) in zip(target.keys, typed, strict=True)
        ]
        loaded = [undefer(getattr(target.model, name)) for name in target.columns]
        rows: Any = select(target.model, wanted.c.position)
        statement: Select[Any] = rows.options(lazyload("*"), *loaded).where(*matches)
        return statement

    @property
    def pool_timeout(self) -> float:
        """Seconds after which the pool gives up a request for a connection."""
        pool = self.bind.pool if isinstance(self.bind, Engine) else None
        if not isinstance(pool, QueuePool):
            return 0.0
        seconds: float | None = pool.timeout()
        return math.inf if seconds is None else seconds

    def holds_pool_connection(self) -> bool:
        """Return whether the waiter's session holds a connection of the pool that it polls over."""
        transaction = self._session.get_transaction()
        pool = getattr(self.bind, "pool", None)
        return any(connection.engine.pool is pool for connection in connections_of(transaction))

    def run(self, connection: Connection) -> Any:
        """Return the row as a detached instance, or `None`."""
        return self.rows(connection, [self.key]).get(0)

    def rows(self, connection: Connection, keys: Sequence[PrimaryKey]) -> dict[int, Any]:
        """Return the rows of keys as detached instances, by the positions of the keys, from 0."""
        names = _parameters(self.target)
        arrays = {name: [key[n] for key in keys] for n, name in enumerate(names)}
        # This session only reads, and must not end a transaction that it has not begun:
        # "rollback_only" has its `close` leave the transaction alone.
        with Session(connection, join_transaction_mode="rollback_only", autoflush=False) as session:
            try:
                found: Any = session.execute(self.statement, arrays).all()
            except Exception as error:
                if not is_lost(error) and _is_closed(connection):
                    # asyncpg raises any error when it is terminated between two messages.
                    raise ConnectionError(safe(f"{type(error).__name__}: {error}")) from error
                raise
            session.expunge_all()
            return {position - 1: row for row, position in found}


def _parameters(target: Target[Any]) -> list[str]:
    return [f"key_{number}" for number in range(len(target.keys))]


class Batch(Protocol):
    """Waiters that poll over one connection. The methods are called in SQLAlchemy's greenlet."""

    def connected(self) -> Sequence[RowQuery]:
        """Return the queries that are to be sent over the connection that is there now."""
        ...

    def sending(self, connection: Connection) -> None:
        """Note that a statement is about to be sent."""
        ...

    def answered(self, query: RowQuery, row: Any, error: Exception | None = None) -> None:
        """Take the row of one of the queries, or the error that concerns it alone."""
        ...


def poll_on_connection(
    query: RowQuery, connection: Connection, sending: Callable[[Connection], None]
) -> Any:
    """Return the row of a query, within the transaction that is open on the connection, if any."""
    sending(connection)
    if connection.in_transaction():
        return query.run(connection)
    with connection.begin():
        return query.run(connection)


def poll_on_pool(engine: Engine, batch: Batch) -> None:
    """Answer the queries of a batch over one connection of the engine's pool."""
    with engine.connect() as connection:
        # A snapshot of this moment, where possible with neither BEGIN nor ROLLBACK on the wire.
        level: Any = "AUTOCOMMIT" if has_one_backend(connection) else "READ COMMITTED"
        connection = connection.execution_options(isolation_level=level)
        queries = batch.connected()
        for query in _poll_together(connection, queries, batch) if len(queries) > 1 else queries:
            batch.sending(connection)
            try:
                row = query.run(connection)
            except Exception as error:
                if is_lost(error):
                    raise
                batch.answered(query, None, error)
            else:
                batch.answered(query, row)


def _poll_together(
    connection: Connection, queries: Sequence[RowQuery], batch: Batch
) -> list[RowQuery]:
    """Send one statement for all queries, and return the queries that need one of their own."""
    batch.sending(connection)
    try:
        rows = queries[0].rows(connection, [query.key for query in queries])
    except Exception as error:
        if is_lost(error):
            raise
        return list(queries)  # a key or a row is wrong; only its own query shall fail
    sharing: dict[int, tuple[Any, list[RowQuery]]] = {}
    for position, query in enumerate(queries):
        row = rows.get(position)
        if row is None:
            batch.answered(query, None)
        else:
            sharing.setdefault(id(row), (row, []))[1].append(query)
    alone: list[RowQuery] = []
    for row, sharers in sharing.values():
        served = len(sharers) if _may_share(row, sharers) else 1
        for query in sharers[:served]:
            batch.answered(query, row)
        alone += sharers[served:]
    return alone


def _may_share(row: Any, sharers: Sequence[RowQuery]) -> bool:
    return _is_immutable(row) and not any(query.has_predicate for query in sharers)


def _is_immutable(row: Any) -> bool:
    state = instance_state(row)
    loaded = [name for name in state.mapper.column_attrs.keys() if name in state.dict]
    return all(isinstance(state.dict[name], IMMUTABLE_TYPES) for name in loaded)


def is_lost(error: Exception) -> bool:
    """Return whether a new connection may help.

    It may where the connection or the server is gone, or the server does not answer.
    """
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    # SQLAlchemy does not wrap what asyncpg raises while it connects: errors of the operating system
    # and of the server.
    state = sqlstate_of(error) or ""
    return isinstance(error, OSError) or state.startswith(("08", "53", "57"))


def _is_closed(connection: Connection) -> bool:
    if connection.invalidated:
        return True
    driver: Any = connection.connection.driver_connection
    is_closed = getattr(driver, "is_closed", None)  # asyncpg's; psycopg has an attribute `closed`
    return bool(is_closed() if is_closed is not None else getattr(driver, "closed", False))


class PollTimeout:
    """Ends a poll that takes too long.

    Without a connection that is a `TimeoutError`; a connection is terminated, and so lost.

    Args:
        give_up_at: the time of the event loop at which the poll ends in any case.
        pool_timeout: seconds that the pool has callers wait.
    """

    def __init__(self, give_up_at: float, pool_timeout: float) -> None:
        self.give_up_at = give_up_at
        self._loop = asyncio.get_running_loop()
        connected_by = min(self._loop.time() + pool_timeout + STATEMENT_TIMEOUT, give_up_at)
        self._connecting = asyncio.Timeout(None if math.isinf(connected_by) else connected_by)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function` in SQLAlchemy's greenlet; it has to call `sending` at each statement."""
        try:
            async with self._connecting:
                return await greenlet_spawn(function, *arguments)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def sending(self, connection: Connection) -> None:
        """Begin to wait for the answer to a statement, and no longer for a connection."""
        if self._timer is not None:
            self._timer.cancel()
        # The connection is terminated, not the statement cancelled: the request to cancel it would
        # go to the same silent server.
        answered_by = min(self._loop.time() + STATEMENT_TIMEOUT, self.give_up_at)
        self._timer = self._loop.call_at(answered_by, terminate, connection)
        if not self._connecting.expired():
            self._connecting.reschedule(None)
