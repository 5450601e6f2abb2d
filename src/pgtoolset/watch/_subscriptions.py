"""Who waits for a row: a waiter for one change, a stream for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pgtoolset._native import row_comparator
from pgtoolset.errors import RowNotFoundError, WaitTimeoutError
from pgtoolset.values import RowChange
from pgtoolset.watch.targets import Target

__all__ = ["Stream", "Subscription", "Values", "Waiter"]

M = TypeVar("M")
Values = Mapping[str, Any]


class Subscription(Generic[M]):
    """What a group knows of somebody who waits for one of its rows.

    Attributes:
        key: the driver's value of the primary key; the group may exchange it for the spelling that
            the table has.
        joined: whether a look that began after the subscription has given it the row that it starts
            from.
    """

    __slots__ = ("joined", "key", "pk", "target")

    def __init__(self, target: Target[M], pk: Any, key: Any) -> None:
        self.target: Target[M] = target
        self.pk: Any = pk
        self.key: Any = key
        self.joined: bool = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody is left who could be told."""
        return False

    @property
    def expiring(self) -> bool:
        """Whether its time was up when the look began."""
        return False

    def start(self, row: Callable[[], Values] | None) -> None:
        """Begin with this row, or with none. The values are made only for who asks."""
        raise NotImplementedError

    def changed(self, before: Values | None, after: Values | None) -> None:
        raise NotImplementedError

    def fail(self, error: Callable[[], Exception]) -> None:
        """End with an error, made anew for each, because raising one writes into it."""
        raise NotImplementedError

    def expire(self) -> None:
        """The last look is over."""

    def __str__(self) -> str:
        return f"{self.target} {self.pk!r}"


class Waiter(Subscription[M]):
    """Waits for one change."""

    __slots__ = ("_last_look", "_timeout", "future")

    def __init__(self, target: Target[M], pk: Any, key: Any, timeout: float | None) -> None:
        super().__init__(target, pk, key)
        self.future: asyncio.Future[RowChange[M]] = asyncio.get_running_loop().create_future()
        self._timeout = timeout
        self._last_look = False

    @property
    def abandoned(self) -> bool:
        return self.future.done()

    @property
    def expiring(self) -> bool:
        return self._last_look

    def start(self, row: Callable[[], Values] | None) -> None:
        if row is None:
            self.fail(
                lambda: RowNotFoundError(
                    f"There is no {self.target} with the primary key {self.pk!r}."
                )
            )

    def changed(self, before: Values | None, after: Values | None) -> None:
        if not self.future.done():
            self.future.set_result(RowChange(self.target.model, self.pk, before, after))

    def fail(self, error: Callable[[], Exception]) -> None:
        if not self.future.done():
            self.future.set_exception(error())

    def ask_for_last_look(self) -> None:
        self._last_look = True

    def expire(self, why: str = "") -> None:
        self.fail(lambda: WaitTimeoutError(f"{self} did not change within {self._timeout} s.{why}"))


class Stream(Subscription[M]):
    """Collects changes until they are asked for. However many there are, it keeps two states: seen,
    and latest."""

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
        """What has changed since it was last asked; `None` where nothing has, or what has was
        undone."""
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
        """Until there is something new; raises the error that ended the stream."""
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
