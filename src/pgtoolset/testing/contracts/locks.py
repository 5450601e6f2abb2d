"""Table locks and advisory locks."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from pgtoolset import LockMode, LockTimeoutError, RowLockMode, get_transaction
from pgtoolset.protocols import AdvisoryLocker, TableLocker
from pgtoolset.testing.contracts.harness import RowsHarness, Undone, missing, opened
from pgtoolset.types import LockModeSpelling

__all__ = ["AdvisoryLockerContract", "TableLockerContract"]

#: PostgreSQL's table of conflicts, of modes from the weakest to the strongest.
#: https://www.postgresql.org/docs/current/explicit-locking.html#TABLE-LOCK-COMPATIBILITY
CONFLICTS = (
    "       X",
    "      XX",
    "    XXXX",
    "   XXXXX",
    "  XX XXX",
    "  XXXXXX",
    " XXXXXXX",
    "XXXXXXXX",
)


class TableLockerContract:
    """What `TableLocker` promises. Fixtures: `locks`, and `harness`, a `RowsHarness`."""

    @pytest.fixture
    def locks(self) -> TableLocker:
        missing("locks", "the TableLocker")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing("harness", "a RowsHarness, such as MappedRows(session_maker, Model)")

    async def is_free(
        self, locks: TableLocker, harness: RowsHarness, mode: LockModeSpelling = "ACCESS EXCLUSIVE"
    ) -> bool:
        """Whether another session could have the lock now."""
        async with opened(harness) as session:
            try:
                async with locks.lock_tables(session, [harness.model], mode=mode, nowait=True):
                    return True
            except LockTimeoutError:
                return False

    async def test_a_block_that_is_a_transaction(
        self, locks: TableLocker, harness: RowsHarness
    ) -> None:
        """The block yields the session in a transaction, which its end commits."""
        async with opened(harness) as session:
            async with locks.lock_tables(
                session=session, tables=[harness.model], mode="EXCLUSIVE"
            ) as same:
                assert same is session
                assert session.in_transaction()
                await harness.write(session, 1)
                assert not await self.is_free(locks, harness, "ROW EXCLUSIVE")
            assert not session.in_transaction()
            assert await self.is_free(locks, harness)
        assert await harness.stored() == {1}

    @pytest.mark.parametrize("held", LockMode, ids=lambda mode: mode.name)
    async def test_conflicts(
        self, locks: TableLocker, harness: RowsHarness, held: LockMode
    ) -> None:
        """A mode is compatible with exactly the modes that PostgreSQL's table allows."""
        found = ""
        async with (
            opened(harness) as session,
            locks.lock_tables(session, [harness.model], mode=held),
        ):
            for wanted in LockMode:
                found += " " if await self.is_free(locks, harness, wanted) else "X"
        assert found == CONFLICTS[list(LockMode).index(held)]

    async def test_own_locks_do_not_conflict(
        self, locks: TableLocker, harness: RowsHarness
    ) -> None:
        """A session is never in its own way."""
        async with (
            opened(harness) as session,
            locks.lock_tables(session, [harness.model], mode="ACCESS EXCLUSIVE"),
        ):
            for mode in LockMode:
                async with locks.lock_tables(session, [harness.model], mode=mode, nowait=True):
                    await harness.write(session, list(LockMode).index(mode))

    async def test_default_mode(self, locks: TableLocker, harness: RowsHarness) -> None:
        """Without a mode it is SHARE UPDATE EXCLUSIVE; a mode is a member, its value or its name,
        in any case."""
        mixed_case: Any = "Row_Exclusive"
        async with opened(harness) as session:
            async with locks.lock_tables(session, [harness.model]):
                assert await self.is_free(locks, harness, "ROW EXCLUSIVE")
                assert not await self.is_free(locks, harness, "SHARE UPDATE EXCLUSIVE")
            for mode in (LockMode.SHARE, "SHARE", "share"):
                async with locks.lock_tables(session, [harness.model], mode=mode):
                    assert await self.is_free(locks, harness, "row_share")
                    assert not await self.is_free(locks, harness, mixed_case)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"tables": []}, ValueError),
            ({"tables": ["item"]}, TypeError),
            ({"tables": [int]}, TypeError),
            ({"tables": None}, TypeError),
            ({"mode": "STRONG"}, ValueError),
            ({"mode": RowLockMode.SHARE}, TypeError),
            ({"mode": 3}, TypeError),
            ({"timeout": 0}, ValueError),
            ({"timeout": "5"}, ValueError),
            ({"timeout": float("nan")}, ValueError),
            ({"timeout": True}, TypeError),
            ({"timeout": timedelta(0)}, ValueError),
            ({"nowait": 1}, TypeError),
        ],
    )
    async def test_bad_arguments(
        self,
        locks: TableLocker,
        harness: RowsHarness,
        arguments: dict[str, Any],
        error: type[Exception],
    ) -> None:
        """What cannot be meant is refused by the call itself, before there is a transaction."""
        given: dict[str, Any] = {"tables": [harness.model], **arguments}
        async with opened(harness) as session:
            with pytest.raises(error):
                locks.lock_tables(session, **given)
            assert not session.in_transaction()

    @pytest.mark.parametrize(
        "arguments", [{"nowait": True}, {"timeout": "50ms"}, {"timeout": 0.05}], ids=repr
    )
    async def test_the_error_names_who_is_in_the_way(
        self, locks: TableLocker, harness: RowsHarness, arguments: dict[str, Any]
    ) -> None:
        """`LockTimeoutError` has the tables, the mode, the seconds and the blockers."""
        async with opened(harness) as holder, opened(harness) as session:
            async with locks.lock_tables(holder, [harness.model], mode="EXCLUSIVE"):
                with pytest.raises(TimeoutError) as caught:
                    async with locks.lock_tables(
                        session, [harness.model], mode="SHARE", **arguments
                    ):
                        raise AssertionError("the lock is not free")
                assert not session.in_transaction()
        error = caught.value
        assert isinstance(error, LockTimeoutError)
        assert [table.rpartition(".")[2].strip('"') for table in error.tables] == [
            harness.model.__table__.name
        ]
        assert (error.mode, error.timeout) == ("SHARE", 0 if "nowait" in arguments else 0.05)
        [blocker] = error.blockers
        assert blocker.state == "idle in transaction"
        assert isinstance(blocker.transaction_age, timedelta)
        assert str(blocker.pid) in str(error)

    async def test_usable_after_a_timeout(self, locks: TableLocker, harness: RowsHarness) -> None:
        """After a timeout in a nested block the transaction around it goes on, with all that it has
        done."""
        async with opened(harness) as holder, opened(harness) as session:
            async with locks.lock_tables(holder, [harness.model], mode="SHARE UPDATE EXCLUSIVE"):
                async with get_transaction(session):
                    await harness.write(session, 1)
                    ways: list[dict[str, Any]] = [{"nowait": True}, {"timeout": "20ms"}]
                    for arguments in ways:
                        with pytest.raises(LockTimeoutError):
                            async with locks.lock_tables(session, [harness.model], **arguments):
                                raise AssertionError("the lock is not free")
                    await harness.write(session, 2)
                assert await harness.stored() == {1, 2}

    async def test_a_nested_lock_outlives_its_block(
        self, locks: TableLocker, harness: RowsHarness
    ) -> None:
        """Taken in a nested block, a lock is held until the outermost transaction ends."""
        async with opened(harness) as session:
            async with get_transaction(session):
                async with get_transaction(session):
                    async with locks.lock_tables(session, [harness.model], mode="EXCLUSIVE"):
                        pass
                assert not await self.is_free(locks, harness, "EXCLUSIVE")
            assert await self.is_free(locks, harness)

    async def test_a_lock_goes_with_its_level(
        self, locks: TableLocker, harness: RowsHarness
    ) -> None:
        """A level that rolls back frees the locks that were taken in it, at any depth, and no
        other."""
        async with (
            opened(harness) as session,
            locks.lock_tables(session, [harness.model], mode="ROW SHARE"),
        ):
            with pytest.raises(Undone):
                async with get_transaction(session):
                    async with get_transaction(session):
                        async with locks.lock_tables(session, [harness.model], mode="EXCLUSIVE"):
                            pass
                    assert not await self.is_free(locks, harness, "ROW EXCLUSIVE")
                    raise Undone
            assert await self.is_free(locks, harness, "ROW EXCLUSIVE")
            assert not await self.is_free(locks, harness, "EXCLUSIVE")

    async def test_waiter_gets_the_lock(self, locks: TableLocker, harness: RowsHarness) -> None:
        """A waiter gets the lock when its holder commits, and then sees what the holder has
        written."""
        seen: list[Any] = []

        async def wait() -> None:
            async with opened(harness) as session:
                async with locks.lock_tables(
                    session, [harness.model], mode="EXCLUSIVE", timeout="10s"
                ):
                    seen.append(1 in await harness.seen(session))

        async with (
            opened(harness) as session,
            locks.lock_tables(session, [harness.model], mode="EXCLUSIVE"),
        ):
            task = asyncio.create_task(wait())
            await harness.write(session, 1)
            await asyncio.sleep(0.1)
            assert not seen
        await task
        assert seen == [True]

    async def test_writers_wait(self, locks: TableLocker, harness: RowsHarness) -> None:
        """A session that writes takes a lock of its own: against SHARE it waits, with ROW EXCLUSIVE
        it does not."""
        async with opened(harness) as session:
            async with locks.lock_tables(session, [harness.model], mode="ROW EXCLUSIVE"):
                await harness.insert(1)
            async with locks.lock_tables(session, [harness.model], mode="SHARE"):
                task = asyncio.create_task(harness.insert(2))
                await asyncio.sleep(0.1)
                assert not task.done()
            await task
        assert await harness.stored() == {1, 2}

    async def test_errors_of_the_block(self, locks: TableLocker, harness: RowsHarness) -> None:
        """An error of the block itself comes through as it is, a `LockTimeoutError` too."""
        error = LockTimeoutError("mine", tables=(), mode="SHARE", timeout=1)
        async with opened(harness) as session:
            with pytest.raises(LockTimeoutError) as caught:
                async with locks.lock_tables(session, [harness.model]):
                    raise error
        assert caught.value is error
        assert await self.is_free(locks, harness)


class AdvisoryLockerContract:
    """What `AdvisoryLocker` promises. Fixtures: `locks`, and `harness`, a `RowsHarness`."""

    @pytest.fixture
    def locks(self) -> AdvisoryLocker:
        missing("locks", "the AdvisoryLocker")

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing("harness", "a RowsHarness, such as MappedRows(session_maker, Model)")

    async def is_free(
        self, locks: AdvisoryLocker, harness: RowsHarness, key: Any, *, shared: bool = False
    ) -> bool:
        async with (
            opened(harness) as session,
            locks.advisory_lock(session, key, nowait=True, shared=shared) as taken,
        ):
            return taken

    @pytest.mark.parametrize("key", [7, -(2**63), (1, 2), "nightly report"], ids=repr)
    async def test_one_at_a_time(
        self, locks: AdvisoryLocker, harness: RowsHarness, key: Any
    ) -> None:
        """One session at a time holds the lock of a key, until its block ends; other keys are
        other locks."""
        async with opened(harness) as session:
            async with locks.advisory_lock(session, key) as taken:
                assert taken is True
                assert session.in_transaction()
                assert not await self.is_free(locks, harness, key)
                assert await self.is_free(locks, harness, "another")
            assert not session.in_transaction()
            assert await self.is_free(locks, harness, key)

    async def test_shared(self, locks: AdvisoryLocker, harness: RowsHarness) -> None:
        """Shared locks of a key go together, and conflict with an exclusive one."""
        async with opened(harness) as session, locks.advisory_lock(session, 1, shared=True):
            assert await self.is_free(locks, harness, 1, shared=True)
            assert not await self.is_free(locks, harness, 1)
        async with opened(harness) as session, locks.advisory_lock(session, 1):
            assert not await self.is_free(locks, harness, 1, shared=True)

    @pytest.mark.parametrize("key", [1.5, True, (1,), (1, 2, 3), None, b"x"], ids=repr)
    async def test_bad_keys(self, locks: AdvisoryLocker, harness: RowsHarness, key: Any) -> None:
        """A wrong key is refused by the call itself."""
        async with opened(harness) as session:
            with pytest.raises(TypeError):
                locks.advisory_lock(session, key)
            with pytest.raises(ValueError, match="bits"):
                locks.advisory_lock(session, 2**63)
            assert not session.in_transaction()

    async def test_timeout(self, locks: AdvisoryLocker, harness: RowsHarness) -> None:
        """A lock that cannot be acquired in time is an error that names the holder; the transaction
        around the block goes on."""
        async with (
            opened(harness) as holder,
            opened(harness) as session,
            locks.advisory_lock(holder, "k"),
        ):
            async with get_transaction(session):
                await harness.write(session, 1)
                with pytest.raises(LockTimeoutError) as caught:
                    async with locks.advisory_lock(session, "k", timeout="200ms"):
                        raise AssertionError("the lock is not free")
            assert (caught.value.tables, caught.value.mode, caught.value.timeout) == (
                (),
                "EXCLUSIVE",
                0.2,
            )
            assert len(caught.value.blockers) == 1
        assert await harness.stored() == {1}

    async def test_nested_it_outlives_its_block(
        self, locks: AdvisoryLocker, harness: RowsHarness
    ) -> None:
        """Taken in a nested block, the lock is held until the outermost transaction ends."""
        async with opened(harness) as session:
            async with get_transaction(session):
                async with locks.advisory_lock(session, 5):
                    async with locks.advisory_lock(session, 5):
                        assert not await self.is_free(locks, harness, 5)
                assert not await self.is_free(locks, harness, 5)
            assert await self.is_free(locks, harness, 5)

    async def test_it_ends_with_its_level(
        self, locks: AdvisoryLocker, harness: RowsHarness
    ) -> None:
        """A level that rolls back frees the lock that was taken in it."""
        async with opened(harness) as session, get_transaction(session):
            with pytest.raises(Undone):
                async with get_transaction(session):
                    async with locks.advisory_lock(session, 5):
                        pass
                    assert not await self.is_free(locks, harness, 5)
                    raise Undone
            assert await self.is_free(locks, harness, 5)

    async def test_a_commit_ends_it(self, locks: AdvisoryLocker, harness: RowsHarness) -> None:
        """A commit or rollback inside the block gives the lock back."""
        for how in ("commit", "rollback"):
            async with opened(harness) as session, locks.advisory_lock(session, 5):
                assert not await self.is_free(locks, harness, 5)
                await getattr(session, how)()
                assert await self.is_free(locks, harness, 5)

    async def test_released_whatever_happens(
        self, locks: AdvisoryLocker, harness: RowsHarness
    ) -> None:
        """An exception in the block releases the lock too."""
        async with opened(harness) as session:
            with pytest.raises(Undone):
                async with locks.advisory_lock(session, 5):
                    raise Undone
            assert await self.is_free(locks, harness, 5)
