"""The changes of a row as an async iterator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pgtoolset.values import RowChange
from pgtoolset.watch._subscriptions import Stream

__all__ = ["RowChanges"]

M = TypeVar("M")


class RowChanges(AsyncIterator[RowChange[M]], Generic[M]):
    """Every change of a row since the watcher's first look at it, which follows the call of
    `changes()` at once.

    As a block it begins with that look, so that what happens after the block was entered is not
    missed:

        async with watcher.changes(Order, order_id) as changes:
            send(changes.current)
            async for change in changes:
                send(change.after)

    Two states are kept, whatever happens while nobody asks: the one that was seen last and the
    latest. A change that was undone in between is none. A cancelled `async for` loses nothing, and
    can be taken up again.
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
        """The row as it was last handed out, or first found; `None` where there is none, or no look
        was had yet."""
        return self._stream.seen

    async def __anext__(self) -> RowChange[M]:
        while True:
            if self._stream.dropped:
                raise StopAsyncIteration
            change = self._stream.take()
            if change is not None:
                return change
            await self._stream.wait()

    async def __aenter__(self) -> Self:
        try:
            while not self._stream.started:
                await self._stream.wait()
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
        """Stop watching. A loop that is left without it does so when Python throws the iterator
        away."""
        self._stream.dropped = True
        self._unsubscribe(self._stream)

    def __del__(self) -> None:
        # May run in any thread, in which nothing can be unsubscribed.
        if not self._stream.dropped:
            self._stream.dropped = True
            self._drop(self._stream)
