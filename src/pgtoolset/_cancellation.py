"""Work that a cancellation must not interrupt, and cancellations that did not arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end in a task of its own; return its result or raise its error.

    A cancellation of the caller that arrives during the work is not lost: the caller gets it at its
    next suspension, unless the requester (a timeout, a task group) has withdrawn it by then.
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


class Requests:
    """Notices a cancellation of the current task that has not arrived.

    A driver may raise an error of its own in place of it, where the network ends at the same
    moment. A loop that goes on after such an error has to ask. It asks after a suspension, at which
    a cancellation that is only late arrives.

    Not for a loop that runs code of the caller: before Python 3.13 a `TaskGroup` whose child fails
    at its end leaves its request in the task.
    """

    __slots__ = ("_before", "_task")

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        # A task that cleans up after a cancellation still has it.
        self._before = self._count()

    def raise_swallowed(self) -> None:
        """Raise `CancelledError` where the task was cancelled since this object was made."""
        if self._count() > self._before:
            raise asyncio.CancelledError

    def _count(self) -> int:
        return 0 if self._task is None else self._task.cancelling()


class _Uncancellable(asyncio.Future[None]):
    """A future for which a cancelled task keeps waiting; the task is cancelled afterwards."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


class UninterruptedHere(Awaitable[T]):
    """Runs `work` as `uninterrupted` does, but in the caller's task, for a third of the price.

    It hands each future that `work` awaits to the task inside an `_Adapter`. `work` must not cancel
    its own task, as `asyncio.timeout` does.

    Attributes:
        has_suspended: whether `work` has waited for something yet.
    """

    __slots__ = ("_work", "has_suspended")

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self.has_suspended = False

    def __await__(self) -> Generator[Any, None, T]:
        request: asyncio.CancelledError | None = None
        try:
            while True:
                awaited = self._work.send(None)
                self.has_suspended = True
                try:
                    yield None if awaited is None else _Adapter(awaited)
                except asyncio.CancelledError as cancelled:
                    request = cancelled
                except Exception:
                    pass  # the error of the future, which `work` finds there at the next send
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            self._work.close()
            if request is not None:
                _deliver_later(request)


class _Adapter:
    """A future as a task uses it, which wakes the task like the real one and refuses to be
    cancelled.

    asyncio takes every object with `_asyncio_future_blocking` for a future. A second future, set by
    a callback of the real one, would wake the task one iteration of the event loop later.
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
    """Cancel the current task again once it has suspended, unless the request is withdrawn."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    requests = task.cancelling()

    def deliver() -> None:
        # A requester that withdraws, as `asyncio.timeout` does at the end of its block, lowers the
        # count of requests. The two calls below leave it as it is.
        if not task.done() and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*request.args)

    asyncio.get_running_loop().call_soon(deliver)
