"""Watching rows in memory: each commit is looked at when it happens, so that no interval passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar, cast

from sqlalchemy.orm import Mapper

from pgtoolset._arguments import (
    check_columns,
    check_predicate,
    mapper_of,
    optional_seconds,
    seconds,
    shown,
)
from pgtoolset._native import row_comparator
from pgtoolset.errors import (
    RowDeletedError,
    RowNotFoundError,
    WaitTimeoutError,
    WatcherClosedError,
)
from pgtoolset.protocols import TransactionalSession
from pgtoolset.testing.doubles import _rows as rows
from pgtoolset.testing.doubles._refusals import no_database
from pgtoolset.testing.doubles._work import Place, Store, Work
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.session import work_of
from pgtoolset.values import RowChange

__all__ = ["MemoryChanges", "MemoryWatcher"]

M = TypeVar("M")
Values = Mapping[str, Any]


class MemoryWatcher:
    """`RowWatcher` and `wait_for_row_change` on a `MemoryDatabase`.

    It looks at each commit as it happens. Timeouts are measured by the database's clock. A row has
    the key and the values that were put; to watch a column that was not put is a `NoDatabaseError`.

    Args:
        database: whose rows are watched.

    Raises:
        TypeError: `database` is not a `MemoryDatabase`.

    Example:
        >>> database = MemoryDatabase()
        >>> async with MemoryWatcher(database) as watcher:
        ...     changes = watcher.changes(Account, 1)
        ...     database.put(Account, 1, {"balance": 100})
        ...     change = await anext(changes)
        >>> assert (change.kind, change.after) == ("insert", {"id": 1, "balance": 100})
    """

    def __init__(self, database: MemoryDatabase) -> None:
        if not isinstance(database, MemoryDatabase):
            raise TypeError(f"database must be a MemoryDatabase, not {shown(database)}")
        self._store: Store = database._store
        self._open: set[_Watched[Any]] = set()
        self._state = "new"

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise WatcherClosedError("a MemoryWatcher is entered once; make a new one")
        self._state = "open"
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End each waiter with a `WatcherClosedError`. A second call does nothing."""
        self._state = "closed"
        for watched in list(self._open):
            watched.close("the MemoryWatcher was closed while its waiter waited")

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        timeout: float | timedelta | str | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> RowChange[M]:
        """As `RowWatcher.wait`."""
        limit = optional_seconds("timeout", timeout, zero=True)
        check_predicate("until", until)
        watched = self._watch(model, pk_value, columns)
        try:
            before = await _until_changed(watched, limit, until, baseline)
            return RowChange(model, watched.pk, before, watched.latest)
        finally:
            self._drop(watched)

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> MemoryChanges[M]:
        """As `RowWatcher.changes`."""
        return MemoryChanges(self._watch(model, pk_value, columns), self._drop)

    async def wait_for_row_change(
        self,
        session: TransactionalSession,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        interval: float | timedelta | str = 0.5,
        timeout: float | timedelta | str | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> M:
        """As `pgtoolset.wait_for_row_change`; the watcher need not be open.

        In place of an instance it returns a read-only row.
        """
        work_of(session)
        seconds("interval", interval)
        limit = optional_seconds("timeout", timeout, zero=True)
        check_predicate("until", until)
        watched = _Watched(self._store, model, pk_value, columns)
        try:
            await _until_changed(watched, limit, until, baseline)
            if watched.latest is None:
                raise RowDeletedError(f"{watched} was deleted while its waiter waited")
            return cast("M", rows.find(watched.onlooker, model, watched.place))
        finally:
            watched.stop()

    def _watch(self, model: type[M], pk_value: Any, columns: Iterable[Any] | None) -> _Watched[M]:
        watched = _Watched(self._store, model, pk_value, columns)
        if self._state != "open":
            watched.stop()
            raise WatcherClosedError(
                "the MemoryWatcher is not open: use it inside `async with MemoryWatcher(database)`"
            )
        self._open.add(watched)
        return watched

    def _drop(self, watched: _Watched[Any]) -> None:
        watched.stop()
        self._open.discard(watched)


class _Watched(Generic[M]):
    """A row that is watched: its latest state, and a wake-up at each change of it."""

    def __init__(
        self, store: Store, model: type[M], pk_value: Any, columns: Iterable[Any] | None
    ) -> None:
        mapper: Mapper[M] = mapper_of(model)
        self._columns = check_columns(mapper, columns)
        self._is_partial = columns is not None
        self.model = model
        self.mapper = mapper
        self.store = store
        self.place: Place = rows.place_of(model, "pk_value", pk_value)
        key = self.place[1]
        self.pk: Any = key[0] if len(key) == 1 else key
        self.onlooker = Work(store, 0)  # it has changed nothing, so it sees what is committed
        self.latest: Values | None = self._look()
        self._error: Exception | None = None
        self._woken = asyncio.Event()
        store.listeners.append(self._check)

    def __str__(self) -> str:
        return f"{self.model.__name__} {shown(self.pk)}"

    def _look(self) -> Values | None:
        row = rows.find(self.onlooker, self.model, self.place)
        if row is None:
            return None
        values = rows.values_of(row)
        missing = [name for name in self._columns if name not in values]
        if missing and self._is_partial:
            raise no_database(f"{self} was put without a value of {missing[0]}")
        return MappingProxyType({name: values[name] for name in self._columns if name in values})

    def _check(self) -> None:
        try:
            latest = self._look()
        except Exception as error:  # raised where it is waited for, and not by the commit
            self._error = error
            self._woken.set()
            return
        if not is_same(self.latest, latest):
            self.latest = latest
            self._woken.set()

    def close(self, why: str) -> None:
        self.stop()
        self._error = WatcherClosedError(why)
        self._woken.set()

    def stop(self) -> None:
        if self._check in self.store.listeners:
            self.store.listeners.remove(self._check)

    def wake(self) -> None:
        self._woken.set()

    async def woken(self) -> None:
        """Wait for a change or a call of `wake`; raise the error that ended the watching."""
        if self._error is None:
            await self._woken.wait()
            self._woken.clear()
        if self._error is not None:
            raise self._error


def is_same(one: Values | None, other: Values | None) -> bool:
    """Whether two states of a row are the same."""
    if one is None or other is None:
        return one is other
    return row_comparator.same_value(dict(one), dict(other))


async def _until_changed(
    watched: _Watched[M],
    limit: float | None,
    until: Callable[[M], bool] | None,
    baseline: object,
) -> Values | None:
    """Wait until a row differs from its first state; return that state."""
    if watched.latest is None and baseline is None:
        raise RowNotFoundError(f"there is no {watched}")
    before = watched.latest if baseline is None else _seen(watched, baseline)
    deadline = None if limit is None else watched.store.clock.time() + limit
    timer = None if limit is None else watched.store.clock.call_later(limit, watched.wake)
    try:
        while True:
            if watched.latest is None or (until is None and not is_same(before, watched.latest)):
                return before
            if until is not None:
                row = rows.find(watched.onlooker, watched.model, watched.place)
                if until(cast("M", row)):
                    return before
            if deadline is not None and watched.store.clock.time() >= deadline:
                raise WaitTimeoutError(f"{watched} did not change within {limit:g} s")
            await watched.woken()
    finally:
        if timer is not None:
            timer.cancel()


def _seen(watched: _Watched[Any], baseline: object) -> Values:
    """The watched values that the caller has seen; the others are taken from the first look."""
    if isinstance(baseline, rows.MemoryRow):
        baseline = rows.values_of(baseline)
    if not isinstance(baseline, Mapping):
        if isinstance(baseline, watched.model):
            raise no_database(
                f"baseline is an instance of {watched.model.__name__}, of which a double does not "
                "know what was loaded; give a mapping or a row that a double returned"
            )
        raise TypeError(
            f"baseline must be a mapping or an instance of {watched.model.__name__}, "
            f"not {shown(baseline)}"
        )
    unknown = [str(name) for name in baseline if name not in watched.mapper.column_attrs]
    if unknown:
        raise ValueError(
            f"baseline: {watched.model.__name__} has no mapped column {', '.join(unknown)}"
        )
    latest = watched.latest or {}
    seen = {**latest, **{name: baseline[name] for name in latest if name in baseline}}
    if not set(baseline) & set(latest) and latest:
        raise ValueError("baseline has none of the watched columns")
    return MappingProxyType(seen)


class MemoryChanges(AsyncIterator[RowChange[M]], Generic[M]):
    """The changes of a row, as `RowChanges`: where the consumer is slow, they are merged."""

    def __init__(self, watched: _Watched[M], drop: Callable[[_Watched[M]], None]) -> None:
        self._watched = watched
        self._drop = drop
        self._is_closed = False
        self._seen: Values | None = watched.latest

    @property
    def current(self) -> Mapping[str, Any] | None:
        """The row as it was last handed out, or first found; `None` where there is no row."""
        return self._seen

    async def __anext__(self) -> RowChange[M]:
        while not self._is_closed:
            before, after = self._seen, self._watched.latest
            self._seen = after
            if not is_same(before, after):
                return RowChange(self._watched.model, self._watched.pk, before, after)
            await self._watched.woken()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop watching."""
        self._is_closed = True
        self._drop(self._watched)
        self._watched.wake()
