"""Waiting for rows to change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
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
from pgtoolset.testing.contracts import harness as harnesses
from pgtoolset.testing.contracts.harness import RowsHarness, missing, opened

__all__ = ["ChangeWaiterContract", "WatcherContract"]


async def finished(task: Awaitable[Any]) -> Any:
    """Return what a wait gives; a wait that hangs is an error in time."""
    return await asyncio.wait_for(task, harnesses.EVENT_TIMEOUT)


def returns_awaitable(row: Any) -> Any:
    """A predicate that looks like a plain function."""

    async def is_done() -> bool:
        return False

    return is_done()


class ChangeWaiterContract:
    """What `ChangeWaiter` promises. Fixtures: `waiter`, and `harness`, a `RowsHarness` with a
    value."""

    @pytest.fixture
    def waiter(self) -> ChangeWaiter:
        missing("waiter", "the ChangeWaiter")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing(
            "harness", "a RowsHarness, such as MappedRows(session_maker, Model, value='status')"
        )

    async def waits(
        self,
        waiter: ChangeWaiter,
        harness: RowsHarness,
        session: Any,
        change: Callable[[], Awaitable[Any]],
    ) -> Any:
        """Return what a wait gives that begins before the change."""
        looked = asyncio.Event()
        first: list[Any] = []

        def is_changed(row: Any) -> bool:
            first.append(getattr(row, harness.attribute))
            looked.set()
            return bool(first[-1] != first[0])

        wait = waiter.wait_for_row_change(
            session, harness.model, 1, interval=0.02, timeout=10, until=is_changed
        )
        task = asyncio.ensure_future(wait)
        await finished(looked.wait())
        await change()
        return await finished(task)

    async def test_a_change(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """The row is returned with the values that were committed meanwhile."""
        await harness.insert(1)
        async with opened(harness) as session:
            row = await self.waits(
                waiter, harness, session, lambda: harness.update(1, harness.values[1])
            )
            assert getattr(row, harness.key) == 1
            assert getattr(row, harness.attribute) == harness.values[1]

    async def test_what_is_not_committed(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """A write of another session that is not committed, or was rolled back, is not a change."""
        await harness.insert(1)
        seen = {harness.attribute: harness.values[0]}
        wait = waiter.wait_for_row_change
        async with opened(harness) as session, opened(harness) as other:
            await harness.change(other, 1, harness.values[1])
            for _ in ("not committed", "rolled back"):
                with pytest.raises(WaitTimeoutError):
                    await wait(session, harness.model, 1, interval=0.02, timeout=0.1, baseline=seen)
                await other.rollback()

    async def test_baseline(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """A change since the values that the caller has seen is returned at once."""
        await harness.insert(1)
        await harness.update(1, harness.values[1])
        wait = waiter.wait_for_row_change
        async with opened(harness) as session:
            row = await wait(
                session,
                harness.model,
                1,
                columns=[harness.attribute],
                baseline={harness.attribute: harness.values[0]},
                timeout=0,
            )
            assert getattr(row, harness.attribute) == harness.values[1]
            seen = {harness.attribute: harness.values[1]}
            with pytest.raises(WaitTimeoutError):
                await wait(session, harness.model, 1, baseline=seen, timeout=0)

    async def test_until(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """With a predicate the wait ends when it holds, whatever else changes, or at once."""
        await harness.insert(1)
        looks: list[Any] = []
        changed = asyncio.Event()

        def is_done(row: Any) -> bool:
            looks.append(getattr(row, harness.attribute))
            if looks[-1] == harness.values[1]:
                changed.set()
            return bool(looks[-1] == harness.values[2])

        wait = waiter.wait_for_row_change
        async with opened(harness) as session:
            task = asyncio.ensure_future(
                wait(session, harness.model, 1, interval=0.02, timeout=10, until=is_done)
            )
            await harness.update(1, harness.values[1])
            await finished(changed.wait())
            assert not task.done()
            await harness.update(1, harness.values[2])
            row = await finished(task)
            assert getattr(row, harness.attribute) == harness.values[2]
            row = await wait(session, harness.model, 1, timeout=0, until=is_done)
            assert getattr(row, harness.attribute) == harness.values[2]

    async def test_until_is_no_coroutine(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """A predicate that returns an awaitable, which is always true, is refused."""
        await harness.insert(1)
        async with opened(harness) as session:
            with pytest.raises(TypeError):
                await finished(
                    waiter.wait_for_row_change(
                        session, harness.model, 1, timeout=10, until=returns_awaitable
                    )
                )

    async def test_no_row(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """A row that does not exist is an error at once; so is one that is deleted meanwhile."""
        await harness.insert(1)
        async with opened(harness) as session:
            with pytest.raises(RowNotFoundError):
                await waiter.wait_for_row_change(session, harness.model, 2, timeout=1)
            with pytest.raises(RowDeletedError):
                await self.waits(waiter, harness, session, lambda: harness.delete(1))

    async def test_the_transaction_is_left_alone(
        self, waiter: ChangeWaiter, harness: RowsHarness
    ) -> None:
        """The caller's transaction stays open, with its writes, and can be rolled back."""
        await harness.insert(1)
        async with opened(harness) as session:
            async with get_transaction(session):
                await harness.write(session, 2)
                await self.waits(
                    waiter, harness, session, lambda: harness.update(1, harness.values[1])
                )
                assert session.in_transaction()
                assert await harness.stored() == {1}
            assert await harness.stored() == {1, 2}

    async def test_bad_arguments(self, waiter: ChangeWaiter, harness: RowsHarness) -> None:
        """A wrong argument is refused before a transaction begins."""
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (TypeError, {"model": int}),
            (ValueError, {"pk_value": (1, 2)}),
            (ValueError, {"pk_value": None}),
            (TypeError, {"pk_value": "one"}),
            (ValueError, {"columns": []}),
            (ValueError, {"columns": ["no such"]}),
            (ValueError, {"interval": 0}),
            (TypeError, {"timeout": [1]}),
            (TypeError, {"until": 1}),
            (TypeError, {"baseline": 1}),
        ]
        await harness.insert(1)
        async with opened(harness) as session:
            for error, arguments in wrong:
                given: dict[str, Any] = {"model": harness.model, "pk_value": 1, **arguments}
                with pytest.raises(error):
                    await waiter.wait_for_row_change(session, **given)
                assert not session.in_transaction()


class WatcherContract:
    """What `Watcher` promises. Fixtures: `watcher`, not entered yet, and `harness`, a
    `RowsHarness` with a value."""

    @pytest.fixture
    def watcher(self) -> Any:
        missing("watcher", "the Watcher, not entered")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing(
            "harness", "a RowsHarness, such as MappedRows(session_maker, Model, value='status')"
        )

    async def started(
        self,
        watcher: Any,
        harness: RowsHarness,
        number: int,
        columns: Sequence[str] | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        """Return a wait that has looked at its row once."""
        task = asyncio.create_task(watcher.wait(harness.model, number, columns=columns, **options))
        await asyncio.sleep(0)
        # A later subscription to the same columns has its first look together with it.
        async with watcher.changes(harness.model, number, columns=columns):
            pass
        return task

    async def test_wait(self, watcher: Any, harness: RowsHarness) -> None:
        """A waiter receives the change with the values before and after; so it is for a
        deletion."""
        await harness.insert(1)
        async with watcher:
            task = await self.started(watcher, harness, 1, [harness.attribute], timeout=10)
            await harness.update(1, harness.values[1])
            change = await finished(task)
            assert (change.model, change.pk, change.kind) == (harness.model, 1, "update")
            assert dict(change.before) == {harness.attribute: harness.values[0]}
            assert dict(change.after) == {harness.attribute: harness.values[1]}
            task = await self.started(watcher, harness, 1, timeout=10)
            await harness.delete(1)
            change = await finished(task)
            assert (change.kind, change.after) == ("delete", None)

    async def test_no_change(self, watcher: Any, harness: RowsHarness) -> None:
        """A change of an unwatched column is ignored; a row that does not exist is an error at
        once."""
        await harness.insert(1)
        async with watcher:
            task = await self.started(watcher, harness, 1, [harness.key], timeout=0.3)
            await harness.update(1, harness.values[1])
            with pytest.raises(WaitTimeoutError):
                await finished(task)
            with pytest.raises(RowNotFoundError):
                await watcher.wait(harness.model, 2, timeout=10)

    async def test_baseline(self, watcher: Any, harness: RowsHarness) -> None:
        """With a baseline no change is missed since the caller has read the row, a deletion
        included; without a change the wait goes on."""
        attribute, values = harness.attribute, harness.values
        seen = {attribute: values[0]}
        await harness.insert(1)
        async with watcher:
            with pytest.raises(WaitTimeoutError):
                await watcher.wait(harness.model, 1, baseline=seen, timeout=0)
            changes: list[Callable[[], Awaitable[Any]]] = [
                lambda: harness.update(1, values[1]),
                lambda: harness.delete(1),
            ]
            for number, change in enumerate(changes):
                seen = {attribute: values[number]}
                # Between the call and the first look, and before the call.
                wait = asyncio.ensure_future(
                    watcher.wait(harness.model, 1, columns=[attribute], baseline=seen, timeout=10)
                )
                await change()
                told = await finished(wait)
                again = await finished(watcher.wait(harness.model, 1, baseline=seen, timeout=10))
                for each in (told, again):
                    assert each.before[attribute] == values[number]
                    assert (each.after is None) == (each.kind == "delete") == (number == 1)

    async def test_until(self, watcher: Any, harness: RowsHarness) -> None:
        """With a predicate the wait ends when it holds, at once if it already does; an awaitable,
        which is always true, is refused."""
        attribute, values = harness.attribute, harness.values
        await harness.insert(1)

        def is_done(row: Any) -> bool:
            return bool(getattr(row, attribute) == values[2])

        async with watcher:
            wait = asyncio.ensure_future(watcher.wait(harness.model, 1, until=is_done, timeout=10))
            await harness.update(1, values[1])
            await harness.update(1, values[2])
            assert (await finished(wait)).after[attribute] == values[2]
            change = await finished(watcher.wait(harness.model, 1, until=is_done, timeout=0))
            assert change.after[attribute] == values[2]
            with pytest.raises(TypeError):
                await finished(watcher.wait(harness.model, 1, until=returns_awaitable, timeout=10))

    async def test_many_waiters(self, watcher: Any, harness: RowsHarness) -> None:
        """Each waiter of a row receives its change, and no other waiter does."""
        await harness.insert(1, 2)
        async with watcher:
            tasks = [
                asyncio.create_task(watcher.wait(harness.model, 1, timeout=10)) for _ in range(20)
            ]
            bystander = asyncio.create_task(watcher.wait(harness.model, 2, timeout=10))
            tasks.append(await self.started(watcher, harness, 1, timeout=10))
            await harness.update(1, harness.values[1])
            assert {change.kind for change in await finished(asyncio.gather(*tasks))} == {"update"}
            assert not bystander.done()
            bystander.cancel()

    async def test_changes(self, watcher: Any, harness: RowsHarness) -> None:
        """Insertions, updates and deletions come in order; a slow consumer gets them merged."""
        attribute, values = harness.attribute, harness.values
        async with watcher:
            async with watcher.changes(harness.model, 1, columns=[attribute]) as changes:
                assert changes.current is None
                await harness.insert(1)
                inserted = await finished(anext(changes))
                assert (inserted.kind, dict(inserted.after)) == ("insert", {attribute: values[0]})
                current: Any = changes.current  # a checker remembers the None above
                assert dict(current) == {attribute: values[0]}
                task = await self.started(watcher, harness, 1, [attribute])
                await harness.update(1, values[1])
                assert dict((await finished(task)).after) == {attribute: values[1]}
                task = await self.started(watcher, harness, 1, [attribute])
                await harness.update(1, values[2])
                await finished(task)
                updated = await finished(anext(changes))
                assert dict(updated.before) == {attribute: values[0]}
                assert dict(updated.after) == {attribute: values[2]}
                await harness.delete(1)
                deleted = await finished(anext(changes))
                assert (deleted.kind, deleted.after) == ("delete", None)
                await changes.aclose()
                with pytest.raises(StopAsyncIteration):
                    await anext(changes)

    async def test_closing(self, watcher: Any, harness: RowsHarness) -> None:
        """The close of the watcher ends each waiter with an error; so does a wait before or
        after."""
        await harness.insert(1)
        with pytest.raises(WatcherClosedError):
            await watcher.wait(harness.model, 1)
        async with watcher:
            task = await self.started(watcher, harness, 1)
        with pytest.raises(WatcherClosedError):
            await finished(task)
        with pytest.raises(WatcherClosedError):
            await watcher.wait(harness.model, 1)

    async def test_bad_arguments(self, watcher: Any, harness: RowsHarness) -> None:
        """A wrong argument is refused."""
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
