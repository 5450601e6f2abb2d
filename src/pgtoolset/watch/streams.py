"""The changes of a row as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pgtoolset._deadlines import current
from pgtoolset.values import RowChange
from pgtoolset.watch._subscriptions import Stream

__all__ = ["RowChanges"]

M = TypeVar("M")


class RowChanges(AsyncIterator[RowChange[M]], Generic[M]):
    """Every change of a row since the watcher's first poll of it, right after `changes()`.

    As a block it waits for that poll, so it misses no change after it was entered:

        async with watcher.changes(Order, order_id) as changes:
            send(changes.current)
            async for change in changes:
                send(change.after)

    It keeps two states, however many changes happen before the next is asked for: the one that was
    handed out last, and the latest. A change that was undone in between is left out. A cancelled
    `async for` loses nothing, and can be resumed.
    """

    def __init__(
        self,
        stream: Stream[M],
        unsubscribe: Callable[[Stream[M]], None],
        drop: Callable[[Stream[M]], None],
    ) -> None:
        self._stream = stream
        self._unsubscribe = unsubscribe
        self._drop = drop

    @property
    def current(self) -> Mapping[str, Any] | None:
        """The row as it was handed out last, or found first; `None` without a row or a poll."""
        return self._stream.seen

    async def __anext__(self) -> RowChange[M]:
        while True:
            if self._stream.dropped:
                raise StopAsyncIteration
            change = self._stream.take()
            if change is not None:
                return change
            await self._wait()

    async def _wait(self) -> None:
        """Wait for the next event, until a deadline."""
        deadline = current()
        if deadline is None:
            await self._stream.wait()
            return
        timeout = asyncio.timeout(max(0.0, deadline.left()))
        try:
            async with timeout:
                await self._stream.wait()
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise deadline.exceeded("wait", f"{self._stream} did not change in time") from error

    async def __aenter__(self) -> Self:
        try:
            while not self._stream.started:
                await self._wait()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop watching. Without this call watching ends when Python collects the iterator."""
        self._stream.dropped = True
        self._unsubscribe(self._stream)

    def __del__(self) -> None:
        # May run in any thread, where nothing can be unsubscribed.
        if not self._stream.dropped:
            self._stream.dropped = True
            self._drop(self._stream)
