"""Looks at rows: each waiter's own statement, and one for many waiters who share a connection of
the pool.

What many share is an optimisation and decides nothing alone: who is not found by the shared
statement, or cannot share what it has found, looks again with its own.
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

from sqlalchemy import Connection, Engine, Select, select, tuple_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, lazyload, undefer
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn

from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.connections import has_one_backend, terminate
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.watch.targets import Target

__all__ = ["Look", "Patience", "Round", "is_lost", "look_over", "look_together"]

#: Seconds that a statement may take, after which its connection counts as lost; and connecting,
#: likewise.
PATIENCE = 10.0

#: What can be in two sessions at a time, because nobody can change it.
PLAIN = (NoneType, int, float, complex, str, bytes, Decimal, date, time, timedelta, UUID, Enum)


class Look:
    """Where a waiter looks: the row, and what its session is bound to.

    Attributes:
        at: when the statement was sent that found the last row, in the time of the event loop.
        is_private: its row is shown to a function of the caller's, and to nobody else.
    """

    def __init__(
        self,
        target: Target[Any],
        parts: tuple[Any, ...],
        session: Session,
        bind: Engine | Connection,
        *,
        private: bool,
    ) -> None:
        self.target = target
        self.parts = parts
        self.bind = bind
        self.is_private = private
        self.at = -math.inf
        # The spelling of the table once the row was found: keys of some types have several.
        self.identity = parts
        self._session = session

    @cached_property
    def statement(self) -> Select[Any]:
        keys = zip(self.target.keys, self.parts, strict=True)
        return _select(self.target).where(
            *(getattr(self.target.model, name) == part for name, part in keys)
        )

    @property
    def pool_timeout(self) -> float:
        """Seconds for which the pool has everybody wait."""
        pool = self.bind.pool if isinstance(self.bind, Engine) else None
        if not isinstance(pool, QueuePool):
            return 0.0
        seconds: float | None = pool.timeout()
        return math.inf if seconds is None else seconds

    def is_in_its_own_way(self) -> bool:
        """Whether the session holds a connection of the very pool that the look needs one of."""
        connections = connections_of(self._session.get_transaction())
        pool = getattr(self.bind, "pool", None)
        return any(connection.engine.pool is pool for connection in connections)

    def run(self, connection: Connection) -> Any:
        """The row as a detached instance, or `None`."""
        rows = _load(connection, self.statement)
        if not rows:
            return None
        (row,) = rows
        self.identity = _identity_of(row)
        return row


class Round(Protocol):
    """Waiters who look over one connection; told of what happens, in SQLAlchemy's greenlet."""

    def connected(self) -> Sequence[Look]:
        """There is a connection; gives those who look."""
        ...

    def asking(self, connection: Connection) -> None:
        """A statement is about to be sent."""
        ...

    def answered(self, look: Look, row: Any, error: Exception | None = None) -> None:
        """The row of one of them, or the error that is its own."""
        ...


def look_over(spot: Look, connection: Connection, asking: Callable[[Connection], None]) -> Any:
    """Look over a single connection, as part of the transaction that is open there, if any. Runs in
    the greenlet."""
    asking(connection)
    if connection.in_transaction():
        return spot.run(connection)
    with connection.begin():
        return spot.run(connection)


def look_together(bind: Engine, those: Round) -> None:
    """Look over a connection of the pool. Runs in the greenlet."""
    with bind.connect() as connection:
        # A snapshot of this moment, where it can be with neither BEGIN nor ROLLBACK on the wire.
        level: Any = "AUTOCOMMIT" if has_one_backend(connection) else "READ COMMITTED"
        connection = connection.execution_options(isolation_level=level)
        looks = those.connected()
        for look in _look_at_many(connection, looks, those) if len(looks) > 1 else looks:
            those.asking(connection)
            try:
                row = look.run(connection)
            except Exception as error:
                if is_lost(error):
                    raise
                those.answered(look, None, error)
            else:
                those.answered(look, row)


def _look_at_many(connection: Connection, looks: Sequence[Look], those: Round) -> Sequence[Look]:
    """Look with one statement; gives those who have to look by themselves."""
    those.asking(connection)
    try:
        # As many parameters as a power of two, so that there are few statements to prepare.
        keys = list(dict.fromkeys(look.parts for look in looks))
        keys += keys[-1:] * (2 ** (len(keys) - 1).bit_length() - len(keys))
        rows = {
            _identity_of(row): row for row in _load(connection, _select_many(looks[0].target, keys))
        }
        sharing: dict[tuple[Any, ...], list[Look]] = {}
        for look in looks:
            sharing.setdefault(look.identity, []).append(look)
    except Exception as error:
        if is_lost(error):
            raise
        return looks  # a key or a row is wrong, and whose it is they find out
    alone: list[Look] = []
    for identity, sharers in sharing.items():
        row = rows.get(identity)
        served = 0 if row is None else 1
        if (
            row is not None
            and len(sharers) > 1
            and _is_plain(row)
            and not any(look.is_private for look in sharers)
        ):
            served = len(sharers)
        for look in sharers[:served]:
            those.answered(look, row)
        alone += sharers[served:]
    return alone


def is_lost(error: Exception) -> bool:
    """Whether a new connection may help: the old one is gone, the server is, or it does not
    answer."""
    if isinstance(error, DBAPIError):
        state = sqlstate_of(error) or ""
        return error.connection_invalidated or state.startswith(("08", "53", "57"))
    # What asyncpg raises while it connects is not wrapped: the operating system's errors and the
    # server's own.
    return isinstance(error, OSError) or (sqlstate_of(error) or "").startswith(("08", "53", "57"))


class Patience:
    """Ends looks that take too long: `TimeoutError` without a connection, a lost connection with
    one."""

    def __init__(self, over: float, pool_timeout: float) -> None:
        self.over = over
        self._loop = asyncio.get_running_loop()
        self._connecting = min(self._loop.time() + pool_timeout + PATIENCE, over)
        self._limit = asyncio.Timeout(None if math.isinf(self._connecting) else self._connecting)
        self._alarm: asyncio.TimerHandle | None = None

    async def spawn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function` in SQLAlchemy's greenlet. It says through `asking` when it sends a
        statement."""
        try:
            # For a place in the pool it waits as long as the pool has everybody wait.
            async with self._limit:
                return await greenlet_spawn(function, *arguments)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()

    def asking(self, connection: Connection) -> None:
        # A statement whose answer does not come is not cancelled: that would be asked of the same
        # silent server.
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(
            min(self._loop.time() + PATIENCE, self.over), terminate, connection
        )
        if not self._limit.expired():
            self._limit.reschedule(None)


def _select(target: Target[Any]) -> Select[Any]:
    wanted = [undefer(getattr(target.model, name)) for name in target.columns]
    return select(target.model).options(lazyload("*"), *wanted)


def _select_many(target: Target[Any], keys: Sequence[tuple[Any, ...]]) -> Select[Any]:
    columns = [getattr(target.model, name) for name in target.keys]
    if len(columns) == 1:
        return _select(target).where(columns[0].in_([part for (part,) in keys]))
    return _select(target).where(tuple_(*columns).in_(keys))


def _load(connection: Connection, statement: Select[Any]) -> Sequence[Any]:
    # This session only reads, and must end nothing that it has not begun: its `close` leaves the
    # transaction alone.
    with Session(connection, join_transaction_mode="rollback_only", autoflush=False) as session:
        rows = session.scalars(statement).all()
        session.expunge_all()
        return rows


def _identity_of(row: Any) -> tuple[Any, ...]:
    return tuple(instance_state(row).identity or ())


def _is_plain(row: Any) -> bool:
    state = instance_state(row)
    return all(
        isinstance(state.dict[name], PLAIN)
        for name in state.mapper.column_attrs.keys()
        if name in state.dict
    )
