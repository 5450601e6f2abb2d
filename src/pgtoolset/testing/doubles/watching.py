"""Watching rows without a database: commits wake those who wait, so nothing is polled and nobody
sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    check_predicate,
    optional_seconds,
    parse_key,
    seconds,
    shown,
    sync_session,
)
from pgtoolset._native import row_comparator
from pgtoolset.errors import WaitTimeoutError, WatcherClosedError
from pgtoolset.testing.doubles._loading import values_at
from pgtoolset.testing.doubles._store import Row, Work
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.locks import sync_of
from pgtoolset.values import RowChange
from pgtoolset.watch._loading import place, seen_by
from pgtoolset.watch._subscriptions import Stream, Subscription, Waiter
from pgtoolset.watch.conditions import Condition
from pgtoolset.watch.streams import RowChanges
from pgtoolset.watch.targets import Target, raw_key, resolve_target

__all__ = ["MemoryWatcher"]

M = TypeVar("M")

#: Of asyncpg, which it does not import.
_dialect = make_url("postgresql+asyncpg://").get_dialect()()


class MemoryWatcher:
    """`RowWatcher` and `wait_for_row_change` for a `MemoryDatabase`.

    Each commit is looked at as it happens, so a wait ends with the commit that it waits for, and no
    interval is waited out. Timeouts are measured by the database's clock. What is refused, returned
    and raised is as with the real ones.

    Args:
        database: whose rows are watched.

    Raises:
        TypeError: `database` is no `MemoryDatabase`.

    Example:
        >>> database = MemoryDatabase()
        >>> async with MemoryWatcher(database) as watcher:
        ...     changes = watcher.changes(Account, 1)
        ...     async with create_db_context(database.session)() as memory:
        ...         memory.add(Account(id=1, balance=100))
        ...     change = await anext(changes)
        >>> assert (change.kind, change.after) == ("insert", {"id": 1, "balance": 100})
    """

    def __init__(self, database: MemoryDatabase) -> None:
        if not isinstance(database, MemoryDatabase):
            raise TypeError(f"database must be a MemoryDatabase, not {database!r}")
        self._store = database.store
        self._known: dict[Subscription[Any], Row | None] = {}
        self._state = "new"

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise WatcherClosedError("A MemoryWatcher is entered once; make a new one.")
        self._state = "open"
        self._store.listeners.append(self._look)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop watching: whoever waits gets a `WatcherClosedError`. Closing twice is no error."""
        if self._state == "open":
            self._store.listeners.remove(self._look)
        self._state = "closed"
        for subscription in list(self._known):
            subscription.fail(
                lambda: WatcherClosedError("The watcher was closed while somebody waited on it.")
            )
        self._known.clear()

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        timeout: float | timedelta | None = None,
    ) -> RowChange[M]:
        """As `RowWatcher.wait`."""
        target, pk, key = self._parse(model, pk_value, columns)
        limit = optional_seconds("timeout", timeout, zero=True)
        waiter = Waiter(target, pk, key, limit)
        self._subscribe(waiter)
        alarm = None if limit is None else self._store.clock.call_later(limit, waiter.expire)
        try:
            return await waiter.future
        finally:
            self._unsubscribe(waiter)
            if alarm is not None:
                alarm.cancel()
            if waiter.future.done() and not waiter.future.cancelled():
                waiter.future.exception()  # looked at, where a cancellation came between

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> RowChanges[M]:
        """As `RowWatcher.changes`."""
        target, pk, key = self._parse(model, pk_value, columns)
        stream = Stream(target, pk, key)
        self._subscribe(stream)
        return RowChanges(stream, self._unsubscribe, self._unsubscribe)

    async def wait_for_row_change(
        self,
        session: AsyncSession,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        interval: float | timedelta = 0.5,
        timeout: float | timedelta | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> M:
        """As `pgtoolset.wait_for_row_change`, of a session of the same database; the watcher need
        not be open."""
        sync_session(session)
        target = resolve_target(model, columns)
        parts = parse_key("pk_value", target.mapper, pk_value)
        seconds("interval", interval)
        limit = optional_seconds("timeout", timeout, zero=True)
        check_predicate("until", until)
        sync = sync_of(session)
        raw_key(target, parts, _dialect)
        seen = None if baseline is None else seen_by(target, baseline)
        row = f"{target} {shown(parts[0] if len(parts) == 1 else parts)}"
        condition = Condition(target, row, until, seen)
        found = await self._found(condition, target, parts, limit)
        placed: M = await greenlet_spawn(place, sync, target, found)
        return placed

    async def _found(
        self, wait: Condition, target: Target[Any], parts: tuple[Any, ...], seconds: float | None
    ) -> Any:
        """The row as a detached instance, once it is what is waited for."""
        woken = asyncio.Event()
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            woken.set()

        alarm = None if seconds is None else self._store.clock.call_later(seconds, expire)
        self._store.listeners.append(woken.set)
        try:
            while True:
                woken.clear()
                last = expired or seconds == 0
                row = self._detached(target, parts)
                if wait.is_met(row):
                    return row
                if last:
                    raise WaitTimeoutError(f"{target} {parts!r} did not change within {seconds} s.")
                await woken.wait()
        finally:
            self._store.listeners.remove(woken.set)
            if alarm is not None:
                alarm.cancel()

    def _detached(self, target: Target[Any], parts: tuple[Any, ...]) -> Any:
        found = values_at(self._onlooker, target.mapper, parts)
        if found is None:
            return None
        mapper: Mapper[Any] = found[0]
        instance = mapper.class_manager.new_instance()
        for name, value in found[1].items():
            set_committed_value(instance, name, value)
        make_transient_to_detached(instance)
        return instance

    @property
    def _onlooker(self) -> Work:
        """A session that has changed nothing, so that it sees what is committed."""
        return Work(self._store, 0)

    def _parse(
        self, model: type[M], pk_value: Any, columns: Iterable[Any] | None
    ) -> tuple[Target[M], Any, Any]:
        target = resolve_target(model, columns)
        parts = parse_key("pk_value", target.mapper, pk_value)
        raw_key(target, parts, _dialect)
        return target, parts[0] if len(parts) == 1 else parts, parts

    def _subscribe(self, subscription: Subscription[Any]) -> None:
        if self._state != "open":
            raise WatcherClosedError(
                "The watcher is not open: use it inside `async with MemoryWatcher(database)`."
            )
        row = self._row(subscription)
        self._known[subscription] = row
        subscription.joined = True
        subscription.start(None if row is None else lambda: MappingProxyType(row))

    def _unsubscribe(self, subscription: Subscription[Any]) -> None:
        self._known.pop(subscription, None)

    def _look(self) -> None:
        """Something has been committed: tell those whose row it has changed."""
        for subscription, before in list(self._known.items()):
            if subscription.abandoned:
                self._unsubscribe(subscription)
                continue
            after = self._row(subscription)
            if before is after or (before and after and row_comparator.same_value(before, after)):
                continue
            self._known[subscription] = after
            subscription.changed(_read_only(before), _read_only(after))

    def _row(self, subscription: Subscription[Any]) -> Row | None:
        found = values_at(self._onlooker, subscription.target.mapper, subscription.key)
        return (
            None
            if found is None
            else {name: found[1][name] for name in subscription.target.columns}
        )


def _read_only(row: Row | None) -> Mapping[str, Any] | None:
    return None if row is None else MappingProxyType(row)
