"""`uninterrupted`: work that a cancellation cannot cut, and a cancellation that the work cannot
swallow."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from pgtoolset._cancellation import uninterrupted


class Work:
    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.finished = False

    async def run(self, result: object = "done") -> object:
        self.started.set()
        await self.release.wait()
        self.finished = True
        if isinstance(result, BaseException):
            raise result
        return result


async def test_gives_the_result() -> None:
    """Without a cancellation it is a plain call."""
    work = Work()
    work.release.set()
    assert await uninterrupted(work.run()) == "done"


async def test_gives_the_error() -> None:
    """An error of the work propagates as it is."""
    work = Work()
    work.release.set()
    error = KeyError("k")
    with pytest.raises(KeyError) as caught:
        await uninterrupted(work.run(error))
    assert caught.value is error


async def test_cancellation_waits_for_the_end() -> None:
    """The caller gets the result of the work, and the cancellation at its next suspension."""
    work = Work()
    log: list[object] = []

    async def caller() -> None:
        log.append(await uninterrupted(work.run()))
        log.append("after")
        await asyncio.sleep(60)
        log.append("not reached")

    task = asyncio.create_task(caller())
    await work.started.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.finished
    assert log == ["done", "after"]


async def test_cancellation_message_is_kept() -> None:
    """What `Task.cancel(msg)` says arrives: anyio knows its own cancellations by it."""
    work = Work()

    async def caller() -> None:
        await uninterrupted(work.run())
        await asyncio.sleep(60)

    task = asyncio.create_task(caller())
    await work.started.wait()
    task.cancel("because")
    await asyncio.sleep(0)
    work.release.set()
    with pytest.raises(asyncio.CancelledError, match="because"):
        await task


async def test_ends_with_the_result_when_nothing_is_awaited_afterwards() -> None:
    """A task that ends with the work has its result: there is no suspension left to cancel."""
    work = Work()
    task = asyncio.create_task(uninterrupted(work.run()))
    await work.started.wait()
    task.cancel()
    await asyncio.sleep(0)
    work.release.set()
    assert await task == "done"


async def test_timeout_that_expires_during_the_work() -> None:
    """`asyncio.timeout` around the work neither breaks nor leaves a stray cancellation behind."""
    work = Work()
    asyncio.get_running_loop().call_later(0.05, work.release.set)
    async with asyncio.timeout(0.01):
        result = await uninterrupted(work.run())
    assert result == "done"
    await asyncio.sleep(0.01)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_timeout_that_expires_during_the_work_and_more_follows() -> None:
    """The timeout strikes at the next suspension inside its block, as a TimeoutError."""
    work = Work()
    asyncio.get_running_loop().call_later(0.05, work.release.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            assert await uninterrupted(work.run()) == "done"
            await asyncio.sleep(60)
    await asyncio.sleep(0)


async def test_anyio_cancel_scope() -> None:
    """A cancelled scope of anyio ends after the work, and cancels nothing outside of it."""
    work = Work()
    asyncio.get_running_loop().call_later(0.05, work.release.set)
    log: list[object] = []
    with anyio.move_on_after(0.01) as scope:
        log.append(await uninterrupted(work.run()))
        await anyio.sleep(60)
        log.append("not reached")
    assert scope.cancelled_caught
    assert log == ["done"]
    await anyio.sleep(0.01)


async def test_task_group() -> None:
    """A task group whose other task fails waits for the work and reports that failure alone."""
    work = Work()
    asyncio.get_running_loop().call_later(0.05, work.release.set)

    async def fail() -> None:
        await work.started.wait()
        raise ValueError("other")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(uninterrupted(work.run()))
            group.create_task(fail())
    assert [type(error) for error in caught.value.exceptions] == [ValueError]
    assert task.result() == "done"


async def test_timeouts_inside_the_work() -> None:
    """A timeout that belongs to the work still works in it."""

    async def slow() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return "timed out"
        return "not reached"

    assert await uninterrupted(slow()) == "timed out"
