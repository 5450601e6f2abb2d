"""Row locks, and who waits for whom."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from pgtoolset import LockTimeoutError, RowLockMode, get_transaction
from pgtoolset.protocols import LockObserver, RowLocker, TableLocker
from pgtoolset.testing.contracts.harness import RowsHarness, missing, opened, until
from pgtoolset.types import RowLockModeSpelling

__all__ = ["LockObserverContract", "RowLockerContract"]

#: PostgreSQL's table of conflicts, of modes from the strongest to the weakest.
#: https://www.postgresql.org/docs/current/explicit-locking.html#ROW-LOCK-COMPATIBILITY
CONFLICTS = ("XXXX", "XXX ", "XX  ", "X   ")


class RowLockerContract:
    """What `RowLocker` promises. Fixtures: `locks`, and `harness`, a `RowsHarness` with a
    `value`."""

    @pytest.fixture
    def locks(self) -> RowLocker:
        missing("locks", "the RowLocker")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing(
            "harness", "a RowsHarness, such as MappedRows(session_maker, Model, value='status')"
        )

    async def is_free(
        self,
        locks: RowLocker,
        harness: RowsHarness,
        number: int,
        mode: RowLockModeSpelling = "UPDATE",
    ) -> bool:
        async with opened(harness) as session:
            try:
                return bool(
                    await locks.lock_rows(session, harness.model, [number], mode=mode, nowait=True)
                )
            except LockTimeoutError:
                return False

    async def test_rows_in_key_order(self, locks: RowLocker, harness: RowsHarness) -> None:
        """Rows come in key order whatever the order of the keys, each once; missing rows are left
        out."""
        await harness.insert(1, 2, 3, 4)
        async with opened(harness) as session:
            rows = await locks.lock_rows(session, harness.model, [4, 1, 99, 3, 1])
            assert [getattr(row, harness.key) for row in rows] == [1, 3, 4]
            assert session.in_transaction()
            assert not await self.is_free(locks, harness, 3)
            assert await self.is_free(locks, harness, 2)
            assert list(await locks.lock_rows(session, harness.model, [])) == []
            await session.rollback()
            assert await self.is_free(locks, harness, 3)

    @pytest.mark.parametrize("held", RowLockMode, ids=lambda mode: mode.name)
    async def test_conflicts(
        self, locks: RowLocker, harness: RowsHarness, held: RowLockMode
    ) -> None:
        """A mode is compatible with exactly the modes that PostgreSQL's table allows."""
        await harness.insert(1)
        async with opened(harness) as session:
            await locks.lock_rows(session, harness.model, [1], mode=held)
            found = ""
            for wanted in RowLockMode:
                found += " " if await self.is_free(locks, harness, 1, wanted) else "X"
        assert found == CONFLICTS[list(RowLockMode).index(held)]

    async def test_values_as_locked(self, locks: RowLocker, harness: RowsHarness) -> None:
        """A waiter receives the rows with the values that the holder has committed."""
        await harness.insert(1)
        async with opened(harness) as holder, opened(harness) as session:
            assert await harness.seen(session) == {1}
            await session.commit()
            await locks.lock_rows(holder, harness.model, [1])
            await harness.change(holder, 1, harness.values[1])
            task = asyncio.create_task(locks.lock_rows(session, harness.model, [1]))
            await asyncio.sleep(0.1)
            assert not task.done()
            await holder.commit()
            [row] = await task
            assert getattr(row, harness.attribute) == harness.values[1]

    async def test_skip_locked(self, locks: RowLocker, harness: RowsHarness) -> None:
        """Rows that another session has locked are left out."""
        await harness.insert(1, 2, 3)
        async with opened(harness) as holder, opened(harness) as session:
            await locks.lock_rows(holder, harness.model, [2])
            rows = await locks.lock_rows(session, harness.model, [1, 2, 3], skip_locked=True)
            assert [getattr(row, harness.key) for row in rows] == [1, 3]

    @pytest.mark.parametrize("arguments", [{"nowait": True}, {"timeout": "50ms"}], ids=repr)
    async def test_timeout(
        self, locks: RowLocker, harness: RowsHarness, arguments: dict[str, Any]
    ) -> None:
        """A row that cannot be locked in time is an error; the transaction around the call goes on
        without new locks."""
        await harness.insert(1, 2)
        async with opened(harness) as holder, opened(harness) as session:
            await locks.lock_rows(holder, harness.model, [2])
            async with get_transaction(session):
                await harness.write(session, 3)
                with pytest.raises(LockTimeoutError) as caught:
                    await locks.lock_rows(session, harness.model, [1, 2], **arguments)
                assert await self.is_free(locks, harness, 1)
            assert [table.rpartition(".")[2] for table in caught.value.tables] == [
                harness.model.__table__.name
            ]
            assert (caught.value.mode, len(caught.value.blockers)) == ("UPDATE", 1)
            with pytest.raises(LockTimeoutError):
                await locks.lock_rows(session, harness.model, [2], **arguments)
            assert not session.in_transaction()
        assert await harness.stored() == {1, 2, 3}

    async def test_a_writer_waits(self, locks: RowLocker, harness: RowsHarness) -> None:
        """A session that changes a locked row waits, and then changes the row as its holder left
        it."""
        await harness.insert(1)
        async with opened(harness) as session:
            await locks.lock_rows(session, harness.model, [1])
            task = asyncio.create_task(harness.update(1, harness.values[2]))
            await asyncio.sleep(0.1)
            assert not task.done()
            await harness.change(session, 1, harness.values[1])
            await session.commit()
            await task
        assert await harness.value_of(1) == harness.values[2]

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"model": int}, TypeError),
            ({"pks": 1}, TypeError),
            ({"pks": "12"}, TypeError),
            ({"pks": [(1, 2)]}, ValueError),
            ({"pks": [None]}, ValueError),
            ({"mode": "EXCLUSIVE"}, ValueError),
            ({"skip_locked": 1}, TypeError),
            ({"skip_locked": True, "nowait": True}, ValueError),
            ({"timeout": 0}, ValueError),
        ],
    )
    async def test_bad_arguments(
        self,
        locks: RowLocker,
        harness: RowsHarness,
        arguments: dict[str, Any],
        error: type[Exception],
    ) -> None:
        """What cannot be meant is refused before there is a transaction."""
        given: dict[str, Any] = {"model": harness.model, "pks": [1], **arguments}
        async with opened(harness) as session:
            with pytest.raises(error):
                await locks.lock_rows(session, **given)
            assert not session.in_transaction()


class LockObserverContract:
    """What `LockObserver` promises. Fixtures: `observer`, `locks` (a `TableLocker`), and `harness`,
    a `RowsHarness`."""

    @pytest.fixture
    def observer(self) -> LockObserver:
        missing("observer", "the LockObserver")

    @pytest.fixture
    def locks(self) -> TableLocker:
        missing("locks", "a TableLocker, to give the observer something to see")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing("harness", "a RowsHarness, such as MappedRows(session_maker, Model)")

    async def test_who_waits_for_whom(
        self, observer: LockObserver, locks: TableLocker, harness: RowsHarness
    ) -> None:
        """Each waiting session is listed, with its blockers, the mode that it asks for and how long
        it has waited."""
        async with opened(harness) as holder, opened(harness) as onlooker:

            async def look() -> Any:
                waits = await observer.list_lock_waits(onlooker)
                await onlooker.rollback()
                return waits

            async def wait() -> None:
                async with opened(harness) as session:
                    async with locks.lock_tables(
                        session, [harness.model], mode="SHARE", timeout="10s"
                    ):
                        pass

            assert list(await look()) == []
            async with locks.lock_tables(holder, [harness.model], mode="EXCLUSIVE"):
                task = asyncio.create_task(wait())
                await until(look)
                [found] = await look()
                assert found.mode == "SHARE"
                assert found.relation.rpartition(".")[2].strip('"') == harness.model.__table__.name
                assert len(found.blocked_by) == 1 and found.pid not in found.blocked_by
                assert found.waiting_for is None or found.waiting_for >= timedelta(0)
            await task
            assert list(await look()) == []

    async def test_bad_argument(self, observer: LockObserver) -> None:
        """An object that is not a session is refused."""
        not_a_session: Any = object()
        with pytest.raises(TypeError):
            await observer.list_lock_waits(not_a_session)
