"""RowWatcher: any number of waiters, one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset.errors import WatcherClosedError
from pgtoolset.types import ColumnAttribute, Duration
from pgtoolset.values import RowChange
from pgtoolset.watch._hub import Hub
from pgtoolset.watch._subscriptions import Stream, Waiter
from pgtoolset.watch.streams import RowChanges
from pgtoolset.watch.targets import Target, check_seconds, parse_key, raw_key, resolve_target

__all__ = ["RowWatcher"]

M = TypeVar("M")


class RowWatcher:
    """Watches rows for any number of waiters over one connection of its own, which takes no place
    in the pool.

    At every interval one statement for each group of model and columns looks at all the rows that
    are waited for. A lost connection, or a server that restarts, is waited out: connect again with
    backoff, look again, go on.

    Args:
        engine: an `AsyncEngine` on asyncpg. The connection is made as the engine makes its own.
        interval: seconds between two looks.
        notify: also LISTEN, on the same connection, to the triggers of `row_change_trigger`, and
            look at once when they announce a change. A notification that never comes delays a
            change by one interval.

    Raises:
        TypeError, ValueError: an argument is not what it must be.

    Example:
        >>> async with RowWatcher(engine, interval=0.1) as watcher:
        ...     try:
        ...         change = await watcher.wait(Account, 1, columns=[Account.balance], timeout=0.2)
        ...     except WaitTimeoutError:
        ...         pass

    See https://www.postgresql.org/docs/current/sql-listen.html
    """

    def __init__(
        self, engine: AsyncEngine, *, interval: Duration = 0.5, notify: bool = False
    ) -> None:
        if not isinstance(engine, AsyncEngine):
            raise TypeError(f"engine must be an AsyncEngine, not {engine!r}")
        if engine.dialect.driver != "asyncpg":
            raise ValueError(
                f"a RowWatcher needs asyncpg; the driver of {engine!r} is {engine.dialect.driver}"
            )
        if not isinstance(notify, bool):
            raise TypeError(f"notify must be True or False, not {notify!r}")
        self._engine = engine
        self._interval = check_seconds("interval", interval)
        self._notify = notify
        self._hub: Hub | None = None

    async def __aenter__(self) -> Self:
        if self._hub is None:
            self._hub = Hub(self._engine, self._interval, self._notify)
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
        """Stop watching: whoever waits gets a `WatcherClosedError`. Closing twice is no error."""
        if self._hub is not None:
            await self._hub.close()

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[ColumnAttribute] | None = None,
        timeout: Duration | None = None,
    ) -> RowChange[M]:
        """The next change of a row: an update of what is watched, or its deletion.

        Subscribes, looks at the row, then waits, so no change after that look is missed. When the
        time is up it looks once more.

        Args:
            model: a mapped class.
            pk_value: the primary key: a scalar, or a tuple or mapping for a composite one.
            columns: attributes or names of mapped columns; `None` watches all of them.
            timeout: seconds; `None` waits for ever.

        Raises:
            RowNotFoundError: there is no such row at the first look.
            WaitTimeoutError: nothing has changed in time.
            WatchFailedError: the table cannot be read any more.
            WatcherClosedError: the watcher was closed, or never entered.
            TypeError, ValueError: an argument is not what it must be; before any SQL.
        """
        target, pk, key = self._parse(model, pk_value, columns)
        seconds = None if timeout is None else check_seconds("timeout", timeout, zero=True)
        hub = self._open_hub()
        waiter = Waiter(target, pk, key, seconds)
        hub.subscribe(waiter)
        alarm = None
        if seconds is not None:
            alarm = asyncio.get_running_loop().call_later(seconds, hub.expire, waiter)
        try:
            return await waiter.future
        finally:
            hub.unsubscribe(waiter)
            if alarm is not None:
                alarm.cancel()
            if waiter.future.done() and not waiter.future.cancelled():
                waiter.future.exception()  # looked at, where a cancellation came between

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[ColumnAttribute] | None = None
    ) -> RowChanges[M]:
        """Every change of a row from now on, insertions and deletions too, as an async iterator.

        Where the consumer is slower than the row, changes are merged: it gets the latest state, and
        nothing piles up. Watching begins with this call. `async with` waits for the first look, and
        gives what it found as `.current`.

        Args:
            model: a mapped class.
            pk_value: the primary key: a scalar, or a tuple or mapping for a composite one. The row
                may not exist yet.
            columns: attributes or names of mapped columns; `None` watches all of them.

        Raises:
            WatchFailedError: the table cannot be read any more; from the iterator.
            WatcherClosedError: the watcher was closed, or never entered.
            TypeError, ValueError: an argument is not what it must be; before any SQL.
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
        parts = parse_key(target, pk_value)
        return (
            target,
            parts[0] if len(parts) == 1 else parts,
            raw_key(target, parts, self._engine.dialect),
        )

    def _open_hub(self) -> Hub:
        if self._hub is None or not self._hub.is_open:
            raise WatcherClosedError(
                "The RowWatcher is not open: use it inside `async with RowWatcher(engine) as watcher`."
            )
        return self._hub
