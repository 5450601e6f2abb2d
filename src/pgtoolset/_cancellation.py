"""Work that a cancellation must not cut in half."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class _Uncancellable(asyncio.Future[None]):
    """A future on which a cancelled task keeps waiting; the task hears of the cancellation when the
    wait is over."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end and give its result, or its error, whatever cancels the caller
    meanwhile.

    The caller learns what really happened. A cancellation that arrived during the work is not lost:
    it is delivered at the caller's next suspension, unless whoever asked for it (a timeout, a task
    group) has withdrawn it by then.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    done = _Uncancellable(loop=loop)
    task.add_done_callback(lambda _: done.set_result(None))
    try:
        await done
    except asyncio.CancelledError as request:
        _deliver_later(request)
    return task.result()


async def uninterrupted_here(work: Coroutine[Any, Any, T]) -> T:
    """`uninterrupted` in the caller's own task: a third of the price, for work that never cancels
    its own task.

    `asyncio.timeout` does that, so `work` must not use it.
    """
    inline = _Inline(work)
    try:
        return await inline
    finally:
        if inline.request is not None:
            _deliver_later(inline.request)


class _Inline(Awaitable[T]):
    """Drives `work`, and gives the task that awaits it each future that `work` waits for in a
    cloak."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self.request: asyncio.CancelledError | None = None

    def __await__(self) -> Generator[Any, None, T]:
        try:
            while True:
                waited = self._work.send(None)
                try:
                    yield None if waited is None else _Cloaked(waited)
                except asyncio.CancelledError as request:
                    self.request = request
                except Exception:
                    pass  # the future's own, which `work` is about to find there
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            self._work.close()


class _Cloaked:
    """A future for the eyes of a task: wakes it as the real one does, and refuses to be cancelled.

    A task takes whatever has `_asyncio_future_blocking` for a future. One that is set by a callback
    of the real one would wake the task an iteration of the event loop later.
    """

    __slots__ = ("_asyncio_future_blocking", "_future")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        future._asyncio_future_blocking = False
        self._asyncio_future_blocking = True
        self._future = future

    def add_done_callback(self, callback: Any, *, context: Any = None) -> None:
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any | None = None) -> bool:
        return False

    def done(self) -> bool:
        return self._future.done()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()


def _deliver_later(request: asyncio.CancelledError) -> None:
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    requests = task.cancelling()

    def deliver() -> None:
        # Runs once the task has suspended or ended. The count falls when the requester takes its
        # request back, as `asyncio.timeout` does on leaving its block; it stays the same over the
        # two calls below.
        if not task.done() and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*request.args)

    asyncio.get_running_loop().call_soon(deliver)
