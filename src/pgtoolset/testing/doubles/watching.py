"""Watching rows in memory: each commit is looked at when it happens, so that no interval passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar, cast

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
    NoDatabaseError,
    RowDeletedError,
    RowNotFoundError,
    WaitTimeoutError,
    WatcherClosedError,
)
from pgtoolset.protocols import TransactionalSession
from pgtoolset.testing.doubles import _rows as rows
from pgtoolset.testing.doubles._refusals import no_database
from pgtoolset.testing.doubles._work import Store, Work
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.session import work_of
from pgtoolset.values import RowChange
from pgtoolset.watch.conditions import holds

__all__ = ["MemoryChanges", "MemoryWatcher"]

M = TypeVar("M")
Values = Mapping[str, Any]


class MemoryWatcher:
    """`RowWatcher` and `wait_for_row_change` on a `MemoryDatabase`.

    It looks at each commit when it happens. Timeouts are measured by the database's clock. A row
    has the key and the values that were put; to watch another column is a `NoDatabaseError`.

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
        self._open: set[MemoryChanges[Any]] = set()
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
        for changes in list(self._open):
            changes.end(WatcherClosedError("the MemoryWatcher was closed during the wait"))

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
        async with self.changes(model, pk_value, columns=columns) as changes:
            return await changes.next_change(limit, until, baseline)

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> MemoryChanges[M]:
        """As `RowWatcher.changes`."""
        changes = MemoryChanges(self._store, model, pk_value, columns, self._open)
        if self._state != "open":
            changes.end()
            raise WatcherClosedError(
                "the MemoryWatcher is not open: use it inside `async with MemoryWatcher(database)`"
            )
        return changes

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
        async with MemoryChanges(self._store, model, pk_value, columns, set()) as changes:
            await changes.next_change(limit, until, baseline)
            row = changes.row()
            if row is None:
                raise RowDeletedError(f"{changes} was deleted during the wait")
            return cast("M", row)


class MemoryChanges(AsyncIterator[RowChange[M]], Generic[M]):
    """The changes of a row, as `RowChanges`: changes that a slow consumer missed are merged."""

    def __init__(
        self,
        store: Store,
        model: type[M],
        pk_value: Any,
        columns: Iterable[Any] | None,
        registry: set[MemoryChanges[Any]],
    ) -> None:
        self._columns = check_columns(mapper_of(model), columns)
        self._is_partial = columns is not None
        self._model = model
        self._place = rows.place_of(model, "pk_value", pk_value)
        self._onlooker = Work(store, 0)  # without changes of its own, it sees the committed row
        self._woken = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False
        self._seen = self._latest = self._look()
        self._registry = registry
        registry.add(self)
        store.listeners.append(self._check)

    def __str__(self) -> str:
        return f"{shown(self._model)} {shown(self._pk)}"

    @property
    def _pk(self) -> Any:
        key = self._place[1]
        return key[0] if len(key) == 1 else key

    @property
    def current(self) -> Values | None:
        """The row as it was last handed out, or first found; `None` where there is no row."""
        return self._seen

    def row(self) -> rows.MemoryRow | None:
        """The committed row."""
        return rows.find(self._onlooker, self._model, self._place)

    def _look(self) -> Values | None:
        row = self.row()
        if row is None:
            return None
        values = rows.values_of(row)
        missing = [name for name in self._columns if name not in values]
        if missing and self._is_partial:
            raise no_database(f"{self} was put without a value of {missing[0]}")
        return MappingProxyType({name: values[name] for name in self._columns if name in values})

    def _check(self) -> None:
        try:
            self._latest = self._look()
        except NoDatabaseError as error:  # for the waiter, and not for the session that committed
            self._error = error
        self._woken.set()

    async def __anext__(self) -> RowChange[M]:
        while not self._is_closed:
            before, after = self._seen, self._latest
            self._seen = after
            if not _is_same(before, after):
                return RowChange(self._model, self._pk, before, after)
            await self._wait()
        raise StopAsyncIteration

    async def _wait(self) -> None:
        if self._error is None:
            await self._woken.wait()
            self._woken.clear()
        if self._error is not None:
            raise self._error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop watching."""
        self._is_closed = True
        self.end()

    def end(self, error: Exception | None = None) -> None:
        """Stop watching; raise the error in the task that waits."""
        self._error = self._error or error
        self._registry.discard(self)
        if self._check in self._onlooker.store.listeners:
            self._onlooker.store.listeners.remove(self._check)
        self._woken.set()

    async def next_change(
        self, limit: float | None, until: Callable[[M], bool] | None, baseline: object
    ) -> RowChange[M]:
        """Wait until the row differs from its first state or from `baseline`, or `until` holds."""
        if self._latest is None and baseline is None:
            raise RowNotFoundError(f"there is no {self}")
        before = self._latest if baseline is None else self._seen_by_caller(baseline)
        clock = self._onlooker.store.clock
        deadline = None if limit is None else clock.time() + limit
        timer = None if limit is None else clock.call_later(limit, self._woken.set)
        try:
            while not self._is_over(before, until):
                if deadline is not None and clock.time() >= deadline:
                    raise WaitTimeoutError(f"{self} did not change within {limit:g} s")
                await self._wait()
        finally:
            if timer is not None:
                timer.cancel()
        return RowChange(self._model, self._pk, before, self._latest)

    def _is_over(self, before: Values | None, until: Callable[[M], bool] | None) -> bool:
        if until is None or self._latest is None:
            return not _is_same(before, self._latest) or self._latest is None
        return holds(until, self.row())

    def _seen_by_caller(self, baseline: object) -> Values:
        """The watched values that the caller has seen; the others are those of the first look."""
        if isinstance(baseline, rows.MemoryRow):
            baseline = rows.values_of(baseline)
        elif isinstance(baseline, self._model):
            raise no_database(
                f"baseline is an instance of {shown(self._model)}, and a double cannot know "
                "which of its values were loaded; give a mapping or a row that a double returned"
            )
        if not isinstance(baseline, Mapping):
            raise TypeError(f"baseline must be a mapping or a row, not {shown(baseline)}")
        known = mapper_of(self._model).column_attrs
        for name in baseline:
            if name not in known:
                raise ValueError(
                    f"baseline: {shown(self._model)} has no mapped column {shown(name)}"
                )
        seen = {name: baseline[name] for name in self._columns if name in baseline}
        if not seen:
            raise ValueError("baseline has no value of a watched column")
        return MappingProxyType({**(self._latest or {}), **seen})


def _is_same(one: Values | None, other: Values | None) -> bool:
    """Whether two states of a row are the same."""
    if one is None or other is None:
        return one is other
    return row_comparator.same_value(dict(one), dict(other))
