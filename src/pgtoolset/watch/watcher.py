"""`RowWatcher`: any number of waiters, one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._arguments import (
    SettingsSource,
    check_engine,
    check_flag,
    check_predicate,
    optional_seconds,
    parse_key,
    seconds,
)
from pgtoolset._deadlines import bounded
from pgtoolset.errors import UnsupportedDriverError, WaitTimeoutError, WatcherClosedError
from pgtoolset.types import ColumnAttribute, Duration, SettingsOrFunction
from pgtoolset.values import RowChange
from pgtoolset.watch._hub import Hub
from pgtoolset.watch._loading import seen_by
from pgtoolset.watch._subscriptions import Stream, Waiter
from pgtoolset.watch.streams import RowChanges
from pgtoolset.watch.targets import Target, raw_key, resolve_target

__all__ = ["RowWatcher"]

M = TypeVar("M")


class RowWatcher:
    """Watches rows for any number of waiters over one connection of its own, outside the pool.

    At every tick one statement for each model and set of columns polls all the rows that are
    watched. After a lost connection or a restart of the server it connects again, with growing
    pauses, and polls everything.

    Args:
        engine: an `AsyncEngine` on asyncpg. The watcher connects as the engine does.
        interval: the time between two ticks (seconds, a `timedelta` or a string such as "500ms").
        notify: whether to LISTEN on the same connection to the triggers of `row_change_trigger`,
            and to poll the announced rows at once. A notification that is lost delays a change by
            one interval.
        settings: settings of PostgreSQL that every statement of the watcher has, such as
            `{"role": "reader"}`, or a function without parameters that returns them; it is called
            at each connection, also after a lost one. `lock_timeout` stays the watcher's own.

    Raises:
        UnsupportedDriverError: the engine is not on asyncpg.
        TypeError, ValueError: an argument is wrong, or a setting has no valid name or value.

    Example:
        >>> async with RowWatcher(engine, interval=0.1) as watcher:
        ...     try:
        ...         change = await watcher.wait(Account, 1, columns=[Account.balance], timeout=0.2)
        ...     except WaitTimeoutError:
        ...         pass

    See https://www.postgresql.org/docs/current/sql-listen.html
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        interval: Duration = 0.5,
        notify: bool = False,
        settings: SettingsOrFunction | None = None,
    ) -> None:
        check_engine(engine)
        if engine.dialect.driver != "asyncpg":
            raise UnsupportedDriverError(
                f"engine must use asyncpg, which RowWatcher needs, not {engine.dialect.driver}: "
                "give it an engine of its own on postgresql+asyncpg, or use wait_for_row_change"
            )
        check_flag("notify", notify)
        self._engine = engine
        self._interval = seconds("interval", interval)
        self._notify = notify
        self._settings = SettingsSource(settings)
        self._hub: Hub | None = None

    async def __aenter__(self) -> Self:
        if self._hub is None:
            self._hub = Hub(self._engine, self._interval, self._notify, self._settings)
        await self._hub.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop watching. Each waiter gets a `WatcherClosedError`. Closing twice is not an error."""
        if self._hub is not None:
            await self._hub.close()

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[ColumnAttribute] | None = None,
        timeout: Duration | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> RowChange[M]:
        """Return the next change of a row: an update of the watched columns, or its deletion.

        Subscribes, polls the row, then waits, so it misses no change after that poll. A change
        between the call and the poll is missed, unless `baseline` says what the caller has seen:
        then none is missed since. At the deadline it polls once more.

        Args:
            model: a mapped class.
            pk_value: the primary key: a scalar, or a tuple or mapping for a composite one.
            columns: attributes or names of mapped columns; `None` watches all of them.
            timeout: the longest time to wait (seconds, a `timedelta` or a string such as "500ms");
                `None` sets no limit.
            until: a function of the row, a detached instance that it must not change. An update
                ends the wait only when it returns true, at once if it already does, whatever
                `columns` and `baseline` say. `.before` and `.after` are alike then.
            baseline: what the caller has seen, an instance of `model` or a mapping of attribute
                names to values. A change since then is returned at once, a deletion too.

        Returns:
            The change. A deletion ends every wait; its `.after` is `None`.

        Raises:
            RowNotFoundError: there is no such row at the first poll, and no `baseline`.
            WaitTimeoutError: the row did not change in time.
            DeadlineExceededError: the same, where a `deadline` is earlier than the timeout.
            WatchFailedError: the table cannot be read any more.
            WatcherClosedError: the watcher was closed, or never entered.
            TypeError, ValueError: an argument is wrong; before any SQL.
        """
        target, pk, key = self._parse(model, pk_value, columns)
        limit = optional_seconds("timeout", timeout, zero=True)
        check_predicate("until", until)
        seen = None if baseline is None else seen_by(target, baseline)
        hub = self._open_hub()
        limit, deadline = bounded(limit)
        if until is None:
            waiter = Waiter(target, pk, key, limit, baseline=seen)
        else:
            # The predicate receives the whole row, the change has the columns that were asked for.
            watched, shown = target.with_every_column(), target.columns
            waiter = Waiter(watched, pk, key, limit, columns=shown, until=until, baseline=seen)
        hub.subscribe(waiter)
        timer = None
        if limit is not None:
            timer = asyncio.get_running_loop().call_later(limit, hub.expire, waiter)
        try:
            return await waiter.future
        except WaitTimeoutError as error:
            if deadline is None:
                raise
            raise deadline.exceeded("wait", f"{waiter} did not change in time") from error
        finally:
            hub.unsubscribe(waiter)
            if timer is not None:
                timer.cancel()
            if waiter.future.done() and not waiter.future.cancelled():
                # Read even where a cancellation came first: asyncio logs an unread exception.
                waiter.future.exception()

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[ColumnAttribute] | None = None
    ) -> RowChanges[M]:
        """Return every change of a row from now on, insertions and deletions too, as an iterator.

        Where the consumer is slower than the row, changes are merged: it gets the latest state, and
        no queue grows. Watching begins with this call. `async with` waits for the first poll, whose
        row is `.current`.

        Args:
            model: a mapped class.
            pk_value: the primary key: a scalar, or a tuple or mapping for a composite one. The row
                may not exist yet.
            columns: attributes or names of mapped columns; `None` watches all of them.

        Raises:
            DeadlineExceededError: a `deadline` has ended the wait for a change; from the iterator.
            WatchFailedError: the table cannot be read any more; from the iterator.
            WatcherClosedError: the watcher was closed, or never entered.
            TypeError, ValueError: an argument is wrong; before any SQL.
        """
        target, pk, key = self._parse(model, pk_value, columns)
        hub = self._open_hub()
        stream = Stream(target, pk, key)
        hub.subscribe(stream)
        return RowChanges(stream, hub.unsubscribe, hub.drop)

    def _parse(
        self, model: type[M], pk_value: Any, columns: Iterable[Any] | None
    ) -> tuple[Target[M], Any, Any]:
        target = resolve_target(model, columns)
        key = parse_key("pk_value", target.mapper, pk_value)
        pk = key[0] if len(key) == 1 else key
        return target, pk, raw_key(target, key, self._engine.dialect)

    def _open_hub(self) -> Hub:
        if self._hub is None or not self._hub.is_open:
            raise WatcherClosedError(
                "The RowWatcher is not open: use it inside "
                "`async with RowWatcher(engine) as watcher`."
            )
        return self._hub
