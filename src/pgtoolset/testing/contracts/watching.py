"""Waiting for rows to change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgtoolset import (
    RowDeletedError,
    RowNotFoundError,
    WaitTimeoutError,
    WatcherClosedError,
    get_transaction,
)
from pgtoolset.protocols import ChangeWaiter
from pgtoolset.testing.contracts import harness as limits
from pgtoolset.testing.contracts.harness import MappedRows, missing, opened

__all__ = ["ChangeWaiterContract", "WatcherContract"]


async def during(wait: Awaitable[Any], change: Callable[[], Awaitable[Any]]) -> Any:
    """What a wait gives, while which something is changed."""
    task = asyncio.ensure_future(wait)
    await asyncio.sleep(0.1)
    assert not task.done()
    await change()
    return await asyncio.wait_for(task, limits.PATIENCE)


class ChangeWaiterContract:
    """What `ChangeWaiter` promises. Fixtures: `waiter`, and `harness`, a `MappedRows` with a
    `value`."""

    @pytest.fixture
    def waiter(self) -> ChangeWaiter:
        missing("waiter", "the ChangeWaiter")

    @pytest.fixture
    def harness(self) -> MappedRows:
        missing("harness", "MappedRows(session_maker, Model, value='status')")

    async def test_a_change(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """The row comes back as the session's own instance, with what was committed meanwhile."""
        await harness.insert(1)
        async with opened(harness) as session:
            row = await session.get(harness.model, 1)
            await session.commit()
            wait = waiter.wait_for_row_change(session, harness.model, 1, interval=0.02, timeout=5)
            same = await during(wait, lambda: harness.update(1, harness.values[1]))
            assert same is row
            assert getattr(row, harness.attribute) == harness.values[1]

    async def test_what_is_not_committed(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """What another session has written and not committed is no change, and neither is what it
        rolled back."""
        await harness.insert(1)
        async with opened(harness) as session, opened(harness) as other:

            async def write() -> None:
                row = await other.get(harness.model, 1)
                setattr(row, harness.attribute, harness.values[1])
                await other.flush()

            for change in (write, other.rollback):
                with pytest.raises(WaitTimeoutError):
                    wait = waiter.wait_for_row_change(
                        session, harness.model, 1, interval=0.02, timeout=0.3
                    )
                    await during(wait, change)

    async def test_baseline(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """A change since what the caller has seen is returned at once."""
        await harness.insert(1)
        async with opened(harness) as session:
            row = await session.get(harness.model, 1)
            await session.commit()
            await harness.update(1, harness.values[1])
            wait = waiter.wait_for_row_change
            same = await wait(
                session, harness.model, 1, columns=[harness.attribute], baseline=row, timeout=0
            )
            assert getattr(same, harness.attribute) == harness.values[1]
            with pytest.raises(WaitTimeoutError):
                await wait(
                    session,
                    harness.model,
                    1,
                    baseline={harness.attribute: harness.values[1]},
                    timeout=0,
                )

    async def test_until(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """With a predicate it waits until that holds, whatever else changes; where it does already,
        not at all."""
        await harness.insert(1)
        async with opened(harness) as session:

            def done(row: Any) -> bool:
                return bool(getattr(row, harness.attribute) == harness.values[2])

            async def change() -> None:
                await harness.update(1, harness.values[1])
                await asyncio.sleep(0.1)
                await harness.update(1, harness.values[2])

            wait = waiter.wait_for_row_change
            await during(
                wait(session, harness.model, 1, interval=0.02, timeout=5, until=done), change
            )
            row = await wait(session, harness.model, 1, timeout=0, until=done)
            assert getattr(row, harness.attribute) == harness.values[2]

    async def test_no_row(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """Where there is no row it says so; where it vanishes too."""
        await harness.insert(1)
        async with opened(harness) as session:
            with pytest.raises(RowNotFoundError):
                await waiter.wait_for_row_change(session, harness.model, 2, timeout=1)
            with pytest.raises(RowDeletedError):
                wait = waiter.wait_for_row_change(
                    session, harness.model, 1, interval=0.02, timeout=5
                )
                await during(wait, lambda: harness.delete(1))

    async def test_the_callers_work_is_left_alone(
        self, waiter: ChangeWaiter, harness: MappedRows
    ) -> None:
        """The caller's transaction stays open, and an attribute with pending changes keeps them."""
        await harness.insert(1)
        async with opened(harness) as session:
            async with get_transaction(session):
                await harness.write(session, 2)
                row = await session.get(harness.model, 1)
                setattr(row, harness.attribute, harness.values[2])
                wait = waiter.wait_for_row_change(
                    session, harness.model, 1, interval=0.02, timeout=5
                )
                assert await during(wait, lambda: harness.update(1, harness.values[1])) is row
                assert getattr(row, harness.attribute) == harness.values[2]
                assert await harness.stored() == {1}
        assert await harness.value_of(1) == harness.values[2]

    async def test_bad_arguments(self, waiter: ChangeWaiter, harness: MappedRows) -> None:
        """What cannot be meant is refused before there is a transaction."""
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (TypeError, {"model": int}),
            (ValueError, {"pk_value": (1, 2)}),
            (ValueError, {"pk_value": None}),
            (TypeError, {"pk_value": "one"}),
            (ValueError, {"columns": []}),
            (ValueError, {"columns": ["no such"]}),
            (ValueError, {"interval": 0}),
            (TypeError, {"timeout": "1s"}),
            (TypeError, {"until": 1}),
            (TypeError, {"baseline": 1}),
        ]
        async with opened(harness) as session:
            for error, arguments in wrong:
                given: dict[str, Any] = {"model": harness.model, "pk_value": 1, **arguments}
                with pytest.raises(error):
                    await waiter.wait_for_row_change(session, **given)
                assert not session.in_transaction()


class WatcherContract:
    """What `Watcher` promises. Fixtures: `watcher`, one that is not open yet, and `harness`, with a
    `value`."""

    @pytest.fixture
    def watcher(self) -> Any:
        missing("watcher", "the Watcher, not entered")

    @pytest.fixture
    def harness(self) -> MappedRows:
        missing("harness", "MappedRows(session_maker, Model, value='status')")

    async def test_wait(self, watcher: Any, harness: MappedRows) -> None:
        """A waiter gets the change with the values before and after; a deletion is one too."""
        await harness.insert(1)
        async with watcher:
            wait = watcher.wait(harness.model, 1, columns=[harness.attribute], timeout=5)
            change = await during(wait, lambda: harness.update(1, harness.values[1]))
            assert (change.model, change.pk, change.kind) == (harness.model, 1, "update")
            assert dict(change.before) == {harness.attribute: harness.values[0]}
            assert dict(change.after) == {harness.attribute: harness.values[1]}
            change = await during(
                watcher.wait(harness.model, 1, timeout=5), lambda: harness.delete(1)
            )
            assert (change.kind, change.after) == ("delete", None)

    async def test_no_change(self, watcher: Any, harness: MappedRows) -> None:
        """What is not watched and what is not there: a timeout, and an error at once."""
        await harness.insert(1)
        async with watcher:
            with pytest.raises(WaitTimeoutError):
                wait = watcher.wait(harness.model, 1, columns=[harness.key], timeout=0.3)
                await during(wait, lambda: harness.update(1, harness.values[1]))
            with pytest.raises(RowNotFoundError):
                await watcher.wait(harness.model, 2, timeout=5)

    async def test_many_waiters(self, watcher: Any, harness: MappedRows) -> None:
        """Everybody who waits for a row is told, and nobody else."""
        await harness.insert(1, 2)
        async with watcher:
            tasks = [
                asyncio.create_task(watcher.wait(harness.model, 1, timeout=5)) for _ in range(20)
            ]
            bystander = asyncio.create_task(watcher.wait(harness.model, 2, timeout=5))
            await during(
                watcher.wait(harness.model, 1), lambda: harness.update(1, harness.values[1])
            )
            gathered = asyncio.gather(*tasks)
            assert {
                change.kind for change in await asyncio.wait_for(gathered, limits.PATIENCE)
            } == {"update"}
            assert not bystander.done()
            bystander.cancel()

    async def test_changes(self, watcher: Any, harness: MappedRows) -> None:
        """Insertions, updates and deletions come in their order; what a slow consumer missed is
        merged."""
        async with watcher:
            async with watcher.changes(harness.model, 1, columns=[harness.attribute]) as changes:
                assert changes.current is None
                inserted = await during(anext(changes), lambda: harness.insert(1))
                assert (inserted.kind, dict(inserted.after)) == (
                    "insert",
                    {harness.attribute: harness.values[0]},
                )
                await harness.update(1, harness.values[1])
                await harness.update(1, harness.values[2])
                await asyncio.sleep(0.2)
                updated = await asyncio.wait_for(anext(changes), 5)
                assert dict(updated.before) == {harness.attribute: harness.values[0]}
                assert dict(updated.after) == {harness.attribute: harness.values[2]}
                deleted = await during(anext(changes), lambda: harness.delete(1))
                assert (deleted.kind, deleted.after) == ("delete", None)

    async def test_closing(self, watcher: Any, harness: MappedRows) -> None:
        """Whoever waits when the watcher is closed is told, and so is whoever comes before or
        after."""
        await harness.insert(1)
        with pytest.raises(WatcherClosedError):
            await watcher.wait(harness.model, 1)
        async with watcher:
            task = asyncio.create_task(watcher.wait(harness.model, 1))
            await asyncio.sleep(0.1)
        with pytest.raises(WatcherClosedError):
            await asyncio.wait_for(task, limits.PATIENCE)
        with pytest.raises(WatcherClosedError):
            await watcher.wait(harness.model, 1)

    async def test_bad_arguments(self, watcher: Any, harness: MappedRows) -> None:
        """What cannot be meant is refused."""
        async with watcher:
            for error, arguments in (
                (TypeError, {"model": int}),
                (ValueError, {"pk_value": (1, 2)}),
                (TypeError, {"pk_value": "one"}),
                (ValueError, {"columns": ["no such"]}),
            ):
                given: dict[str, Any] = {"model": harness.model, "pk_value": 1, **arguments}
                with pytest.raises(error):
                    await watcher.wait(**given)
                with pytest.raises(error):
                    watcher.changes(**given)
            with pytest.raises(ValueError, match="timeout"):
                await watcher.wait(harness.model, 1, timeout=-1)
