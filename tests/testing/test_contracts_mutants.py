"""The contract classes find a wrong implementation: each here breaks one promise, and its test
fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pgtoolset import LockTimeoutError, M2MChange, get_transaction
from pgtoolset.testing import MemoryAssociations, MemoryDatabase, MemoryLocks, MemoryWatcher
from pgtoolset.testing.contracts import (
    AbortedTransactionContract,
    AdvisoryLockerContract,
    AssociationWriterContract,
    ChangeWaiterContract,
    LockObserverContract,
    MemoryRows,
    RowLockerContract,
    SessionFactoryContract,
    TableLockerContract,
    TransactionalSessionContract,
    WatcherContract,
)
from pgtoolset.testing.doubles import MemorySession
from tests.support import Item
from tests.testing.linked import memory_linked
from tests.testing.mutants import failures
from tests.transactions.plain_session import PlainHarness, PlainManagedSession, PlainSession


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that hangs fails soon."""
    monkeypatch.setattr("pgtoolset.testing.contracts.harness.EVENT_TIMEOUT", 1.0)


# Sessions


class UndoesNothing(PlainSession):
    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class UndoesEverything(PlainSession):
    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        self._depth += 1
        try:
            yield
        except BaseException:
            self.numbers.clear()
            raise
        finally:
            self._depth -= 1


class StoresAtOnce(PlainSession):
    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        async with super().begin_nested():
            yield
        self.stored |= self.numbers


class SwallowsExceptions(PlainSession):
    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        with contextlib.suppress(Exception):
            async with super().begin_nested():
                yield


class NeverInOne(PlainSession):
    def in_transaction(self) -> bool:
        return False


@pytest.mark.parametrize(
    "mutant", [UndoesNothing, UndoesEverything, StoresAtOnce, SwallowsExceptions, NeverInOne]
)
async def test_sessions(mutant: type[PlainSession]) -> None:
    """A session that undoes too little or too much, stores too early, or hides its transaction."""
    assert await failures(TransactionalSessionContract, lambda: {"harness": PlainHarness(mutant)})


class CommitsAtTheEnd(PlainManagedSession):
    async def commit(self) -> None:
        self._depth = 0

    async def close(self) -> None:
        self.stored |= self.numbers


class StaysOpen(PlainManagedSession):
    async def rollback(self) -> None:
        self.numbers.clear()


class Shared(PlainManagedSession):
    all: Any = None

    def __new__(cls, stored: set[int]) -> Shared:
        known: Any = cls.all
        if known is None or known.stored is not stored:
            known = cls.all = super().__new__(cls)
        return known


@pytest.mark.parametrize("mutant", [CommitsAtTheEnd, StaysOpen, Shared])
async def test_factories(mutant: type[PlainSession]) -> None:
    """A commit that comes with the close, a rollback that leaves the transaction open, one session
    for all."""
    assert await failures(SessionFactoryContract, lambda: {"harness": PlainHarness(mutant)})


def on_doubles(locks: Any = None) -> dict[str, Any]:
    locks = locks or MemoryLocks()
    return {
        "harness": MemoryRows(MemoryDatabase(), Item, value="name"),
        "locks": locks,
        "observer": locks,
    }


def work_of(session: Any) -> Any:
    """The transaction of a `MemorySession`."""
    assert isinstance(session, MemorySession)
    return session._work


async def test_an_error_that_aborts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that goes on after an error, as other databases do."""

    def fail(self: Any, error: BaseException) -> None:
        raise error

    monkeypatch.setattr("pgtoolset.testing.doubles._work.Work.fail", fail)
    assert "test_nothing_works_in_an_aborted_transaction" in await failures(
        AbortedTransactionContract, on_doubles
    )


async def test_errors_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that stores its writes although an error has aborted its transaction."""
    original = MemorySession.commit

    async def commit(self: MemorySession) -> None:
        work_of(self)._error = None
        await original(self)

    monkeypatch.setattr(MemorySession, "commit", commit)
    failed = await failures(AbortedTransactionContract, on_doubles)
    assert {"test_a_swallowed_error_is_raised", "test_an_explicit_commit_is_honest"} <= failed


# Locks


class LocksNothing(MemoryLocks):
    @asynccontextmanager
    async def _block(self, session: Any) -> AsyncIterator[Any]:
        async with get_transaction(session):
            yield session

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        super().lock_tables(session, tables, **options)
        return self._block(session)


class LocksAlone(MemoryLocks):
    """Its one mode is the strongest."""

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        super().lock_tables(session, tables, **options)
        return super().lock_tables(session, tables, **(options | {"mode": "ACCESS EXCLUSIVE"}))


class ChecksLate(MemoryLocks):
    @asynccontextmanager
    async def lock_tables(self, session: Any, tables: Any, **options: Any) -> AsyncIterator[Any]:
        async with super().lock_tables(session, tables, **options):
            yield session


class EndsWithTheBlock(MemoryLocks):
    """Releases a nested lock too early."""

    @asynccontextmanager
    async def _early(self, session: Any, block: Any) -> AsyncIterator[Any]:
        async with block as given:
            yield given
        work_of(session).store.locks.release_from(session.number, 0)

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._early(session, super().lock_tables(session, tables, **options))

    def advisory_lock(self, session: Any, key: Any, **options: Any) -> Any:
        return self._early(session, super().advisory_lock(session, key, **options))


class NamesNoBlocker(MemoryLocks):
    @asynccontextmanager
    async def _anonymous(self, session: Any, block: Any) -> AsyncIterator[Any]:
        try:
            async with block:
                yield session
        except LockTimeoutError as error:
            error.blockers = ()
            raise

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._anonymous(session, super().lock_tables(session, tables, **options))


class NeverEnds(MemoryLocks):
    """A lock that is taken in a savepoint outlives its rollback."""

    @asynccontextmanager
    async def _sticky(self, session: Any, block: Any) -> AsyncIterator[Any]:
        async with block as given:
            work = work_of(session)
            for _ in work.levels:
                work.store.locks.move_up(work.number, 1)
            yield given

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._sticky(session, super().lock_tables(session, tables, **options))

    def advisory_lock(self, session: Any, key: Any, **options: Any) -> Any:
        return self._sticky(session, super().advisory_lock(session, key, **options))


class TranslatesErrors(MemoryLocks):
    @asynccontextmanager
    async def _translated(self, session: Any, block: Any) -> AsyncIterator[Any]:
        try:
            async with block:
                yield session
        except LockTimeoutError as error:
            fields = {"tables": error.tables, "mode": error.mode, "timeout": error.timeout}
            raise LockTimeoutError(str(error), blockers=error.blockers, **fields) from error

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._translated(session, super().lock_tables(session, tables, **options))


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (LocksNothing, "test_conflicts"),
        (LocksAlone, "test_conflicts"),
        (ChecksLate, "test_bad_arguments"),
        (EndsWithTheBlock, "test_a_nested_lock_outlives_its_block"),
        (NamesNoBlocker, "test_the_error_names_who_is_in_the_way"),
        (NeverEnds, "test_a_lock_goes_with_its_level"),
        (TranslatesErrors, "test_errors_of_the_block"),
    ],
)
async def test_table_locks(mutant: type[MemoryLocks], broken: str) -> None:
    """Locks that do not lock, lock too much, too late, too long or too briefly, and errors that say
    too little."""
    assert broken in await failures(TableLockerContract, lambda: on_doubles(mutant()))


class NeverShared(MemoryLocks):
    def advisory_lock(self, session: Any, key: Any, **options: Any) -> Any:
        return super().advisory_lock(session, key, **(options | {"shared": False}))


class AlwaysTaken(MemoryLocks):
    @asynccontextmanager
    async def _taken(self, block: Any) -> AsyncIterator[bool]:
        async with block:
            yield True

    def advisory_lock(self, session: Any, key: Any, **options: Any) -> Any:
        return self._taken(super().advisory_lock(session, key, **options))


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (NeverShared, "test_shared"),
        (EndsWithTheBlock, "test_nested_it_outlives_its_block"),
        (NeverEnds, "test_it_ends_with_its_level"),
        (AlwaysTaken, "test_one_at_a_time"),
    ],
)
async def test_advisory_locks(mutant: type[MemoryLocks], broken: str) -> None:
    """Advisory locks that are never shared, end too early or too late, or are claimed and not
    held."""
    assert broken in await failures(AdvisoryLockerContract, lambda: on_doubles(mutant()))


class AsNamed(MemoryLocks):
    async def lock_rows(self, session: Any, model: Any, pks: Any, **options: Any) -> Any:
        rows = {row.id: row for row in await super().lock_rows(session, model, pks, **options)}
        return [rows[pk] for pk in pks if pk in rows]


class WaitsAnyway(MemoryLocks):
    async def lock_rows(self, session: Any, model: Any, pks: Any, **options: Any) -> Any:
        if options.pop("skip_locked", False) is True and not options.get("nowait"):
            options["nowait"] = True
        return await super().lock_rows(session, model, pks, **options)


class LocksOneMode(MemoryLocks):
    async def lock_rows(self, session: Any, model: Any, pks: Any, **options: Any) -> Any:
        return await super().lock_rows(session, model, pks, **(options | {"mode": "UPDATE"}))


class Stale(MemoryLocks):
    """Returns what the session saw before it waited."""

    async def lock_rows(self, session: Any, model: Any, pks: Any, **options: Any) -> Any:
        before = {row["id"]: SimpleNamespace(**row) for row in session.rows(model)}
        rows = await super().lock_rows(session, model, pks, **options)
        return [before.get(row.id, row) for row in rows]


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (AsNamed, "test_rows_in_key_order"),
        (WaitsAnyway, "test_skip_locked"),
        (LocksOneMode, "test_conflicts"),
        (Stale, "test_values_as_locked"),
    ],
)
async def test_row_locks(mutant: type[MemoryLocks], broken: str) -> None:
    """Rows out of order, locked ones that are not skipped, one mode for all, and old values."""
    assert broken in await failures(RowLockerContract, lambda: on_doubles(mutant()))


class SeesNothing(MemoryLocks):
    async def list_lock_waits(self, connection_or_session: Any) -> Any:
        await super().list_lock_waits(connection_or_session)
        return []


async def test_observers() -> None:
    """An observer that does not see who waits."""
    assert "test_who_waits_for_whom" in await failures(
        LockObserverContract, lambda: on_doubles(SeesNothing())
    )


# Many-to-Many


class CountsWhatIsAsked(MemoryAssociations):
    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, pks: Any = (), **o: Any
    ) -> int:
        await super().m2m_add(session, instance, rel_attr, *related, pks=pks, **o)
        return len(related) + len(pks)


class SetsByAdding(MemoryAssociations):
    async def m2m_set(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> M2MChange:
        options.pop("keep_existing", None)
        added = await self.m2m_add(
            session, instance, rel_attr, *related, ignore_conflicts=True, **options
        )
        return M2MChange(added, 0)


class SkipsConflicts(MemoryAssociations):
    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> int:
        options["ignore_conflicts"] = True
        return await super().m2m_add(session, instance, rel_attr, *related, **options)


class ChecksInSession(MemoryAssociations):
    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> int:
        if not session.in_transaction():
            await session.begin()
        return await super().m2m_add(session, instance, rel_attr, *related, **options)


class OutlivesRollbacks(MemoryAssociations):
    """Commits each of its calls by itself."""

    async def m2m_set(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> M2MChange:
        change = await super().m2m_set(session, instance, rel_attr, *related, **options)
        work = work_of(session)
        work.store.apply(dict(work._changes))
        return change


class WaitsForNoOther(MemoryAssociations):
    """Two sets of one owner do not know of each other."""

    async def m2m_set(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> M2MChange:
        change = await super().m2m_set(session, instance, rel_attr, *related, **options)
        work_of(session).store.locks.release_from(session.number, 0)
        return change


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (CountsWhatIsAsked, "test_add"),
        (SetsByAdding, "test_set"),
        (SkipsConflicts, "test_an_association_that_exists"),
        (ChecksInSession, "test_bad_arguments"),
        (OutlivesRollbacks, "test_a_level_that_rolls_back"),
        (WaitsForNoOther, "test_sets_of_one_owner_wait"),
    ],
)
async def test_associations(mutant: type[MemoryAssociations], broken: str) -> None:
    """Counts, sets, conflicts, checks, rollbacks and concurrent sets that are wrong."""

    def fixtures() -> dict[str, Any]:
        return {"associations": mutant(), "links": memory_linked(MemoryDatabase(), "plain")}

    assert broken in await failures(AssociationWriterContract, fixtures)


# Watching


class SeesTheUncommitted(MemoryWatcher):
    """Looks with the eyes of a session that is in the middle of a transaction."""

    async def wait_for_row_change(self, session: Any, *arguments: Any, **options: Any) -> Any:
        for work in list(self._store.open.values()):
            self._store.apply(dict(work._changes))
        return await super().wait_for_row_change(session, *arguments, **options)


class IgnoresBaseline(MemoryWatcher):
    async def wait_for_row_change(self, *arguments: Any, **options: Any) -> Any:
        options.pop("baseline", None)
        return await super().wait_for_row_change(*arguments, **options)


class AnyChange(MemoryWatcher):
    """Ends with the first change, whatever the predicate says."""

    async def wait_for_row_change(self, *arguments: Any, **options: Any) -> Any:
        until = options.pop("until", None)
        if callable(until):
            options["until"] = lambda row: until(row) or row.name != "one"
        return await super().wait_for_row_change(*arguments, **options)


class EndsTheTransaction(MemoryWatcher):
    async def wait_for_row_change(self, session: Any, *arguments: Any, **options: Any) -> Any:
        row = await super().wait_for_row_change(session, *arguments, **options)
        await session.commit()
        return row


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (SeesTheUncommitted, "test_what_is_not_committed"),
        (IgnoresBaseline, "test_baseline"),
        (AnyChange, "test_until"),
        (EndsTheTransaction, "test_the_transaction_is_left_alone"),
    ],
)
async def test_change_waiters(mutant: type[MemoryWatcher], broken: str) -> None:
    """A waiter that sees too much, ignores baseline or predicate, or ends the caller's
    transaction."""

    def fixtures() -> dict[str, Any]:
        database = MemoryDatabase()
        return {"waiter": mutant(database), "harness": MemoryRows(database, Item, value="name")}

    assert broken in await failures(ChangeWaiterContract, fixtures)


class WatchesEverything(MemoryWatcher):
    def changes(self, model: Any, pk_value: Any, *, columns: Any = None) -> Any:
        super().changes(model, pk_value, columns=columns).end()
        return super().changes(model, pk_value)


class ClosesQuietly(MemoryWatcher):
    async def close(self) -> None:
        self._open.clear()
        await super().close()


class WakesOne(MemoryWatcher):
    """Gives a change to the first waiter alone."""

    def changes(self, model: Any, pk_value: Any, *, columns: Any = None) -> Any:
        is_first = not self._open
        changes = super().changes(model, pk_value, columns=columns)
        if not is_first:
            self._store.listeners.remove(changes._check)
        return changes


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (WatchesEverything, "test_wait"),
        (ClosesQuietly, "test_closing"),
        (WakesOne, "test_many_waiters"),
    ],
)
async def test_watchers(mutant: type[MemoryWatcher], broken: str) -> None:
    """A watcher that watches too much, leaves its waiters waiting, or wakes one of them only."""

    def fixtures() -> dict[str, Any]:
        database = MemoryDatabase()
        return {"watcher": mutant(database), "harness": MemoryRows(database, Item, value="name")}

    assert broken in await failures(WatcherContract, fixtures)


async def test_the_doubles_themselves() -> None:
    """Run in the same way, the doubles fail nothing: the failures above have the broken promise for
    their cause."""
    for contract in (
        AbortedTransactionContract,
        AdvisoryLockerContract,
        LockObserverContract,
        RowLockerContract,
        SessionFactoryContract,
        TableLockerContract,
        TransactionalSessionContract,
    ):
        assert await failures(contract, on_doubles) == set()

    def associations() -> dict[str, Any]:
        links = memory_linked(MemoryDatabase(), "plain")
        return {"associations": MemoryAssociations(), "links": links}

    assert await failures(AssociationWriterContract, associations) == set()

    def watching() -> dict[str, Any]:
        database = MemoryDatabase()
        watcher = MemoryWatcher(database)
        harness = MemoryRows(database, Item, value="name")
        return {"waiter": watcher, "watcher": watcher, "harness": harness}

    assert await failures(ChangeWaiterContract, watching) == set()
    assert await failures(WatcherContract, watching) == set()
