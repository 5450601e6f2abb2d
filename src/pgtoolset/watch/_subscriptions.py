"""Waiters and streams: what a watcher tells of a row, and how it ends."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from pgtoolset._arguments import shown
from pgtoolset._native import row_comparator
from pgtoolset.errors import RowNotFoundError, WaitTimeoutError
from pgtoolset.values import RowChange
from pgtoolset.watch._loading import detached
from pgtoolset.watch.conditions import differs, holds
from pgtoolset.watch.targets import Target

__all__ = ["Stream", "Subscription", "Values", "Waiter"]

M = TypeVar("M")
Values = Mapping[str, Any]


class Subscription(Generic[M]):
    """Receives the changes of one row.

    Attributes:
        key: the driver's value of the primary key. The group may exchange it for the spelling that
            the table has.
        joined: whether a tick that began after the subscription has given it its first row.
    """

    __slots__ = ("joined", "key", "pk", "target")

    def __init__(self, target: Target[M], pk: Any, key: Any) -> None:
        self.target: Target[M] = target
        self.pk: Any = pk
        self.key: Any = key
        self.joined: bool = False

    @property
    def abandoned(self) -> bool:
        """Whether nothing receives the changes any more."""
        return False

    def start(self, row: Callable[[], Values] | None) -> None:
        """Take the first row; `None` without a row. Its values are decoded on demand."""
        raise NotImplementedError

    def changed(self, before: Values | None, after: Values | None) -> None:
        """Take a change; `None` stands for no row."""
        raise NotImplementedError

    def fail(self, error: Callable[[], Exception]) -> None:
        """End with an error. It is made for each subscription, because raising it changes it."""
        raise NotImplementedError

    def expire(self) -> None:
        """End because the time is up, unless a change came in time."""

    def __str__(self) -> str:
        return f"{self.target} {shown(self.pk)}"


class Waiter(Subscription[M]):
    """Waits for one change.

    Args:
        target: the watched columns. With `until` these are all, because the predicate receives
            the whole row.
        pk: the primary key.
        key: the driver's value of it.
        timeout: seconds, for the message.
        columns: the columns that the change shows; `None` for those of the target.
        until: the caller's predicate; it decides alone whether a row ends the wait.
        baseline: the values that the caller has seen.
    """

    __slots__ = ("_baseline", "_columns", "_context", "_timeout", "_until", "future")

    def __init__(
        self,
        target: Target[M],
        pk: Any,
        key: Any,
        timeout: float | None,
        *,
        columns: Iterable[str] | None = None,
        until: Callable[[M], object] | None = None,
        baseline: Values | None = None,
    ) -> None:
        super().__init__(target, pk, key)
        self.future: asyncio.Future[RowChange[M]] = asyncio.get_running_loop().create_future()
        self._timeout = timeout
        self._columns = columns
        self._until = until
        self._baseline = baseline
        # The watcher's task calls the predicate, in the context of the caller.
        self._context = None if until is None else contextvars.copy_context()

    @property
    def abandoned(self) -> bool:
        return self.future.done()

    def start(self, row: Callable[[], Values] | None) -> None:
        if row is None:
            self._start_without_row()
        elif self._until is not None:
            values = row()
            self._finish_if_satisfied(values, values)
        elif self._baseline is not None:
            values = row()
            before = {**values, **self._baseline}
            if differs(before, values):
                self._finish(before, values)

    def changed(self, before: Values | None, after: Values | None) -> None:
        if self._until is None or after is None:
            self._finish(before, after)
        else:
            self._finish_if_satisfied(before, after)

    def fail(self, error: Callable[[], Exception]) -> None:
        if not self.future.done():
            self.future.set_exception(error())

    def expire(self, why: str = "") -> None:
        self.fail(lambda: WaitTimeoutError(f"{self} did not change within {self._timeout} s.{why}"))

    def _start_without_row(self) -> None:
        if self._baseline is not None:
            self._finish(self._baseline, None)  # deleted since the caller has seen it
        else:
            self.fail(lambda: RowNotFoundError(f"{self} does not exist."))

    def _finish_if_satisfied(self, before: Values | None, after: Values) -> None:
        if self.future.done():
            return
        assert self._context is not None
        try:
            satisfied = bool(self._context.run(self._call_predicate, after))
        except StopIteration as error:  # a future cannot raise it
            failure = RuntimeError("until raised StopIteration")
            failure.__cause__ = error
            self.future.set_exception(failure)
        except (Exception, asyncio.CancelledError) as error:
            # Of the caller's function: it concerns this waiter alone, and not the watcher's task.
            self.future.set_exception(error)
        else:
            if satisfied:
                self._finish(before, after)

    def _call_predicate(self, values: Values) -> object:
        assert self._until is not None
        return holds(self._until, detached(self.target, values))

    def _finish(self, before: Values | None, after: Values | None) -> None:
        if not self.future.done():
            self.future.set_result(
                RowChange(self.target.model, self.pk, self._shown(before), self._shown(after))
            )

    def _shown(self, values: Values | None) -> Values | None:
        if values is None or self._columns is None:
            return values
        return MappingProxyType({name: values[name] for name in self._columns if name in values})


class Stream(Subscription[M]):
    """Collects changes until they are asked for.

    However many there are, it keeps two states: the one that was handed out last, and the latest.
    """

    __slots__ = ("_changed", "_error", "dropped", "latest", "seen", "started")

    def __init__(self, target: Target[M], pk: Any, key: Any) -> None:
        super().__init__(target, pk, key)
        self.seen: Values | None = None
        self.latest: Values | None = None
        self.started: bool = False
        self.dropped: bool = False
        self._error: Callable[[], Exception] | None = None
        self._changed: list[asyncio.Future[None]] = []

    @property
    def abandoned(self) -> bool:
        return self.dropped

    def start(self, row: Callable[[], Values] | None) -> None:
        self.seen = self.latest = None if row is None else row()
        self.started = True
        self._wake()

    def changed(self, before: Values | None, after: Values | None) -> None:
        self.latest = after
        self._wake()

    def fail(self, error: Callable[[], Exception]) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def take(self) -> RowChange[M] | None:
        """Return the change since the last call; `None` without a change, or after its undoing."""
        before, after = self.seen, self.latest
        if before is after:
            return None
        self.seen = after
        if (
            before is not None
            and after is not None
            and row_comparator.same_value(dict(before), dict(after))
        ):
            return None
        return RowChange(self.target.model, self.pk, before, after)

    async def wait(self) -> None:
        """Wait for the next event; raise the error that ended the stream."""
        if self._error is not None:
            raise self._error()
        changed = asyncio.get_running_loop().create_future()
        self._changed.append(changed)
        try:
            await changed
        finally:
            if changed in self._changed:
                self._changed.remove(changed)
        if self._error is not None:
            raise self._error()

    def _wake(self) -> None:
        waiting, self._changed = self._changed, []
        for each in waiting:
            if not each.done():
                each.set_result(None)
