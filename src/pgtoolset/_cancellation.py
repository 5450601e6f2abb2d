"""Work that a cancellation must not cut in half."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Uncancellable(asyncio.Future[None]):
    """A future on which a cancelled task keeps waiting; the task hears of the cancellation when the wait is over."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end and give its result, or its error, whatever cancels the caller meanwhile.

    The caller learns what really happened. A cancellation that arrived during the work is not lost: it is delivered
    at the caller's next suspension, unless whoever asked for it (a timeout, a task group) has withdrawn it by then.
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


def _deliver_later(request: asyncio.CancelledError) -> None:
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    requests = task.cancelling()

    def deliver() -> None:
        # Runs once the task has suspended or ended. The count falls when the requester takes its request back,
        # as `asyncio.timeout` does on leaving its block; it stays the same over the two calls below.
        if not task.done() and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*request.args)

    asyncio.get_running_loop().call_soon(deliver)
