"""Polls of `wait_for_row_change`: one query for the rows of one waiter or of many.

The statement takes the keys as arrays and returns each row with the position of the key that found
it. So PostgreSQL alone decides which key finds which row, however the table spells it. See
https://www.postgresql.org/docs/current/queries-table-expressions.html#QUERIES-TABLEFUNCTIONS
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property
from types import NoneType
from typing import Any, Protocol, cast
from uuid import UUID

from sqlalchemy import Connection, Engine, Select, Table, column, literal_column, select
from sqlalchemy.exc import (
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, lazyload, undefer
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import PrimaryKey, check_bind
from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.arrays import element
from pgtoolset._postgres.catalog import pg, unnested
from pgtoolset._postgres.connections import (
    has_one_backend,
    is_closed,
    raw_at,
    terminate,
)
from pgtoolset._postgres.rows import key_parameter
from pgtoolset._postgres.sqlstates import has_lost_connection, reported_by_server, sqlstate_of
from pgtoolset._postgres.tables import hiding, options_of, qualified_names
from pgtoolset._record import current_settings
from pgtoolset._text import safe
from pgtoolset.watch._settings import with_settings
from pgtoolset.watch.conditions import SAME, Condition
from pgtoolset.watch.targets import Target, exact_part

__all__ = [
    "Batch",
    "PollTimeout",
    "RowQuery",
    "is_lost",
    "is_outdated",
    "poll_on_connection",
    "poll_on_pool",
]

#: Seconds that connecting may take, and the answer to a statement. Then the connection counts as
#: lost.
STATEMENT_TIMEOUT = 10.0

#: Values that several sessions may share, because they cannot be changed in place.
IMMUTABLE_TYPES = (
    *(NoneType, int, float, complex, str, bytes),
    *(Decimal, date, time, timedelta, UUID, Enum),
)


#: The isolation level of the transaction.
_LEVEL: Any = pg.current_setting(literal_column("'transaction_isolation'"))


class KeyedSelects:
    """The statements for the rows of any number of keys. Queries of one queue share them.

    Each returns the position of the key, from 1, in its last column.
    """

    def __init__(self, target: Target[Any]) -> None:
        self._target = target

    @cached_property
    def rows(self) -> Select[Any]:
        """The rows as instances, with every watched column."""
        return self._select(self._target.model).options(*self._loading)

    @cached_property
    def rows_and_level(self) -> Select[Any]:
        """The same, each with the isolation level of the transaction."""
        return self._select(self._target.model, _LEVEL).options(*self._loading)

    @cached_property
    def values(self) -> Select[Any]:
        """The values of the watched columns alone: instances cost several times as much."""
        target = self._target
        selected = self._select(*(getattr(target.model, name) for name in target.columns))
        return selected.select_from(target.mapper)

    @cached_property
    def _wanted(self) -> TableValuedAlias:
        typed = self._typed
        arrays = [key_parameter(name, each.type) for name, each in typed]
        outputs = [column(name, each.type) for name, each in typed]
        numbered = unnested(arrays).table_valued(*outputs, with_ordinality="position")
        return cast("TableValuedAlias", numbered.render_derived(name="pgtoolset_wanted"))

    @property
    def _loading(self) -> list[Any]:
        target = self._target
        return [
            lazyload("*"),
            *(undefer(getattr(target.model, name)) for name in target.columns),
        ]

    @property
    def _typed(self) -> list[tuple[str, Any]]:
        keys: list[Any] = list(self._target.mapper.primary_key)
        return list(zip(_parameters(self._target), keys, strict=True))

    def _select(self, *entities: Any) -> Select[Any]:
        target = self._target
        matches = [
            getattr(target.model, attribute) == element(self._wanted.c[name], each)
            for attribute, (name, each) in zip(target.keys, self._typed, strict=True)
        ]
        selected: Any = select(*entities, self._wanted.c.position)
        return cast("Select[Any]", selected.where(*matches))


class RowQuery:
    """What one waiter polls for: a row, and where its session's statements go.

    Attributes:
        condition: what the waiter waits for.
        options: the execution options of the session's statements, schema translation included.
        settings: the settings of PostgreSQL that they have.
        selects: the statements.
        sent_at: the time of the event loop at which the last statement for the row was sent.
    """

    def __init__(
        self, target: Target[Any], key: PrimaryKey, session: Session, condition: Condition
    ) -> None:
        self.target = target
        columns = target.mapper.primary_key
        self.key = tuple(exact_part(c.type, part) for c, part in zip(columns, key, strict=True))
        # As the session itself chooses it for a SELECT.
        arguments: dict[str, Any] = {"mapper": target.mapper, "clause": select(target.model)}
        self.bind: Engine | Connection = session.get_bind(**arguments)
        check_bind(self.bind)
        self.condition = condition
        self.options = options_of(session, self.bind)
        self.settings = current_settings(session)
        self.selects = KeyedSelects(target)
        self.sent_at = -math.inf
        self._session = session

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

    def row(self, connection: Connection) -> Any:
        """Return the row as a detached instance, or `None`."""
        return self.rows(connection, [self]).get(0)

    def row_and_level(self, connection: Connection) -> tuple[Any, str]:
        """Return the row as a detached instance, or `None`, and the isolation level."""
        for row, level, _ in self._fetch(connection, self.selects.rows_and_level, [self]):
            return row, level
        self._note_missing(connection, {}, [self])
        return None, str(connection.scalar(select(_LEVEL)))

    def rows(self, connection: Connection, queries: Sequence[RowQuery]) -> dict[int, Any]:
        """Return the rows of queries as detached instances, by their positions, from 0."""
        with with_settings(connection, self.settings):
            found = self._fetch(connection, self.selects.rows, queries)
            rows = {position - 1: row for row, position in found}
            self._note_missing(connection, rows, queries)
        return rows

    def values(self, connection: Connection, queries: Sequence[RowQuery]) -> dict[int, Any]:
        """Return the watched values of queries, by their positions, from 0."""
        with with_settings(connection, self.settings):
            found = self._fetch(connection, self.selects.values, queries)
            rows = {row[-1] - 1: row[:-1] for row in found}
            self._note_missing(connection, rows, queries)
        return rows

    def _fetch(
        self, connection: Connection, statement: Select[Any], queries: Sequence[RowQuery]
    ) -> Sequence[Any]:
        names = _parameters(self.target)
        arrays = {name: [each.key[n] for each in queries] for n, name in enumerate(names)}
        # This session only reads, and must not end a transaction that it has not begun:
        # "rollback_only" has its `close` leave the transaction alone.
        with Session(connection, join_transaction_mode="rollback_only", autoflush=False) as session:
            try:
                found = session.execute(statement, arrays, execution_options=self.options).all()
            except Exception as error:
                if not is_lost(error) and _is_closed(connection):
                    # asyncpg raises any error when it is terminated between two messages.
                    raise ConnectionError(safe(f"{type(error).__name__}: {error}")) from error
                raise
            session.expunge_all()
            return found

    def _note_missing(
        self, connection: Connection, rows: dict[int, Any], queries: Sequence[RowQuery]
    ) -> None:
        """Tell the conditions of the queries without a row whether it may be hidden."""
        if len(rows) == len(queries):
            return
        tables = [each for each in self.target.mapper.tables if isinstance(each, Table)]
        translation = self.options.get("schema_translate_map") or {}
        names = qualified_names(tables, connection.dialect, translation)
        hidden_by = hiding(connection, names)
        for position, query in enumerate(queries):
            if position not in rows:
                query.condition.hidden_by = hidden_by


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
    if connection.in_transaction() or query.settings is not None:
        return query.row(connection)
    with connection.begin():
        return query.row(connection)


def poll_on_pool(engine: Engine, batch: Batch) -> None:
    """Answer the queries of a batch over one connection of the engine's pool."""
    with engine.connect() as connection:
        queries = batch.connected()
        # A snapshot of this moment, where possible with neither BEGIN nor ROLLBACK on the wire.
        has_settings = queries[0].settings is not None
        is_plain = has_one_backend(connection) and not has_settings
        level: Any = "AUTOCOMMIT" if is_plain else "READ COMMITTED"
        options = {**queries[0].options, "isolation_level": level}
        connection = connection.execution_options(**options)
        queries = _poll_values(connection, queries, batch)
        for query in _poll_together(connection, queries, batch) if len(queries) > 1 else queries:
            batch.sending(connection)
            try:
                row = query.row(connection)
            except Exception as error:
                if is_lost(error):
                    raise
                batch.answered(query, None, error)
            else:
                batch.answered(query, row)


def _poll_values(
    connection: Connection, queries: Sequence[RowQuery], batch: Batch
) -> list[RowQuery]:
    """Answer the queries with unchanged watched values; return the others, which need the row."""
    quiet = [query for query in queries if not query.condition.needs_row]
    if not quiet:
        return list(queries)
    batch.sending(connection)
    try:
        values = quiet[0].values(connection, quiet)
    except Exception as error:
        if is_lost(error):
            raise
        if not is_outdated(error):
            return list(queries)
        for query in queries:  # the same error would answer each of them
            batch.answered(query, None, copy.copy(error))
        return []
    answered: set[RowQuery] = set()
    for position, query in enumerate(quiet):
        found = values.get(position)
        if found is None or query.condition.is_same(found):
            batch.answered(query, None if found is None else SAME)
            answered.add(query)
    return [query for query in queries if query not in answered]


def _poll_together(
    connection: Connection, queries: Sequence[RowQuery], batch: Batch
) -> list[RowQuery]:
    """Send one statement for all queries, and return the queries that need one of their own."""
    batch.sending(connection)
    try:
        rows = queries[0].rows(connection, queries)
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
    return _is_immutable(row) and not any(query.condition.needs_row for query in sharers)


def _is_immutable(row: Any) -> bool:
    state = instance_state(row)
    loaded = [name for name in state.mapper.column_attrs.keys() if name in state.dict]
    return all(isinstance(state.dict[name], IMMUTABLE_TYPES) for name in loaded)


def is_lost(error: Exception) -> bool:
    """Return whether a new connection may help.

    It may where the connection or the server is gone, or the server does not answer.
    """
    if has_lost_connection(error):
        return True
    # SQLAlchemy does not wrap what asyncpg raises while it connects: errors of the operating system
    # and of the server. psycopg raises an OperationalError for both.
    state = sqlstate_of(error) or ""
    is_of_system = isinstance(error, OSError) and not isinstance(error, PoolTimeoutError)
    if is_of_system or state.startswith(("08", "53", "57")):
        return True
    return isinstance(error, OperationalError) and not reported_by_server(error)


def is_outdated(error: Exception) -> bool:
    """Return whether a statement did not fit the tables, or the caches about them."""
    about_schema = (ProgrammingError, NotSupportedError, InternalError)
    return isinstance(error, about_schema) and not error.connection_invalidated


def _is_closed(connection: Connection) -> bool:
    return connection.invalidated or is_closed(raw_at(connection.connection))


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
