"""The contract classes find what is wrong: each implementation here breaks one promise, and a test
of it fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.orm.attributes import set_committed_value

from pgtoolset import LockTimeoutError, M2MChange, get_transaction
from pgtoolset.testing import MemoryAssociations, MemoryDatabase, MemoryLocks, MemoryWatcher
from pgtoolset.testing.contracts import (
    AbortedTransactionContract,
    AdvisoryLockerContract,
    AssociationWriterContract,
    ChangeWaiterContract,
    LockObserverContract,
    MappedRows,
    RowLockerContract,
    SessionFactoryContract,
    TableLockerContract,
    TransactionalSessionContract,
    WatcherContract,
)
from pgtoolset.testing.doubles._store import Work
from pgtoolset.testing.doubles.locks import sync_of
from tests.support import Item
from tests.testing.linked import linked
from tests.testing.mutants import failures
from tests.transactions.plain_session import PlainHarness, PlainManagedSession, PlainSession


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that waits for ever is found out soon."""
    monkeypatch.setattr("pgtoolset.testing.contracts.harness.PATIENCE", 1.0)


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
    """A session that undoes too little or too much, stores too early, or says what is not so."""
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
        "harness": MappedRows(MemoryDatabase().session, Item, value="name"),
        "locks": locks,
        "observer": locks,
    }


async def test_an_error_that_aborts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session on which one can go on after an error, as one can on other databases."""
    original = Work.statement

    def statement(self: Work, what: str, *, writes: bool = False) -> None:
        self.aborted = False
        original(self, what, writes=writes)

    monkeypatch.setattr(Work, "statement", statement)
    assert "test_nothing_works_in_an_aborted_transaction" in await failures(
        AbortedTransactionContract, on_doubles
    )


async def test_errors_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that stores what was written although an error has aborted its transaction."""
    original = Work.abort

    def abort(self: Work, error: Any) -> Any:
        with contextlib.suppress(type(error)):
            original(self, error)
        self.aborted = False
        raise error

    monkeypatch.setattr(Work, "abort", abort)
    assert "test_a_swallowed_error_is_told" in await failures(
        AbortedTransactionContract, on_doubles
    )


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
    async def lock_tables(self, session: Any, tables: Any, **options: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        async with super().lock_tables(session, tables, **options):
            yield session


class EndsWithTheBlock(MemoryLocks):
    """Gives nested locks back too early."""

    @asynccontextmanager
    async def _early(self, session: Any, block: Any) -> AsyncIterator[Any]:
        async with block:
            yield session
        sync_of(session).work.store.locks.release_from(sync_of(session).work.number, 0)

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._early(session, super().lock_tables(session, tables, **options))


class NamesNobody(MemoryLocks):
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
        async with block:
            work = sync_of(session).work
            for hold in work.store.locks.of(work.number):
                hold.depth = 0
            yield session

    def lock_tables(self, session: Any, tables: Any, **options: Any) -> Any:
        return self._sticky(session, super().lock_tables(session, tables, **options))


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
        (NamesNobody, "test_the_error_names_who_is_in_the_way"),
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


class UntilTheCommit(MemoryLocks):
    """As `pg_advisory_xact_lock`: a nested block does not give it back."""

    @asynccontextmanager
    async def _longer(self, session: Any, key: Any, block: Any) -> AsyncIterator[bool]:
        async with block as taken:
            yield taken
        work = sync_of(session).work
        if session.in_transaction() and taken:
            work.store.locks.take(work.number, ("advisory", (key,)), "EXCLUSIVE", 0)

    def advisory_lock(self, session: Any, key: Any, **options: Any) -> Any:
        return self._longer(session, key, super().advisory_lock(session, key, **options))


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
        (UntilTheCommit, "test_nested_it_ends_with_its_block"),
        (AlwaysTaken, "test_one_at_a_time"),
    ],
)
async def test_advisory_locks(mutant: type[MemoryLocks], broken: str) -> None:
    """Advisory locks that are never shared, end with the transaction, or are said to be had when
    they are not."""
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


class Overwrites(MemoryLocks):
    async def lock_rows(self, session: Any, model: Any, pks: Any, **options: Any) -> Any:
        session.expire_all()
        return await super().lock_rows(session, model, pks, **options)


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (AsNamed, "test_rows_in_key_order"),
        (WaitsAnyway, "test_skip_locked"),
        (LocksOneMode, "test_conflicts"),
        (Overwrites, "test_pending_changes_are_kept"),
    ],
)
async def test_row_locks(mutant: type[MemoryLocks], broken: str) -> None:
    """Rows out of order, locked ones that are not skipped, one mode for all, and pending changes
    that are lost."""
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
        options["ignore_conflicts"] = bool(options.get("ignore_conflicts", True)) or True
        return await super().m2m_add(session, instance, rel_attr, *related, **options)


class ChecksInSession(MemoryAssociations):
    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> int:
        if not session.in_transaction():
            await session.begin()
        return await super().m2m_add(session, instance, rel_attr, *related, **options)


class RemembersNothing(MemoryAssociations):
    """Leaves loaded collections as they are."""

    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> int:
        loaded = vars(instance).get(rel_attr.key)
        added = await super().m2m_add(session, instance, rel_attr, *related, **options)
        if loaded is not None:
            set_committed_value(instance, rel_attr.key, loaded)
        return added


class ForgetsPending(MemoryAssociations):
    async def m2m_add(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> int:
        if session.dirty:
            session.expire_all()
        return await super().m2m_add(session, instance, rel_attr, *related, **options)


class WaitsForNobody(MemoryAssociations):
    """Two sets of one owner do not know of each other."""

    async def m2m_set(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, **options: Any
    ) -> M2MChange:
        change = await super().m2m_set(session, instance, rel_attr, *related, **options)
        sync = session.sync_session
        sync.work.store.locks.release_from(sync.work.number, 0)
        return change


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (CountsWhatIsAsked, "test_add"),
        (SetsByAdding, "test_set"),
        (SkipsConflicts, "test_an_association_that_exists"),
        (ChecksInSession, "test_bad_arguments"),
        (RemembersNothing, "test_loaded_collections_never_lie"),
        (ForgetsPending, "test_pending_changes_are_flushed"),
        (WaitsForNobody, "test_sets_of_one_owner_wait"),
    ],
)
async def test_associations(mutant: type[MemoryAssociations], broken: str) -> None:
    """Counts, sets, conflicts, checks, collections, pending changes and concurrent sets that are
    wrong."""

    def fixtures() -> dict[str, Any]:
        return {"associations": mutant(), "links": linked(MemoryDatabase().session, "plain")}

    assert broken in await failures(AssociationWriterContract, fixtures)


# Watching


class SeesTheUncommitted(MemoryWatcher):
    """Looks with the eyes of whoever is in the middle of a transaction."""

    @property
    def _onlooker(self) -> Work:
        return next(iter(self._store.works.values()), Work(self._store, 0))


class IgnoresBaseline(MemoryWatcher):
    async def wait_for_row_change(self, *arguments: Any, **options: Any) -> Any:
        options.pop("baseline", None)
        return await super().wait_for_row_change(*arguments, **options)


class OverwritesPending(MemoryWatcher):
    async def wait_for_row_change(self, session: Any, *arguments: Any, **options: Any) -> Any:
        row = await super().wait_for_row_change(session, *arguments, **options)
        await session.refresh(row)
        return row


class CopiesTheRow(MemoryWatcher):
    async def wait_for_row_change(self, session: Any, *arguments: Any, **options: Any) -> Any:
        session.expunge_all()
        return await super().wait_for_row_change(session, *arguments, **options)


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (SeesTheUncommitted, "test_what_is_not_committed"),
        (IgnoresBaseline, "test_baseline"),
        (OverwritesPending, "test_the_callers_work_is_left_alone"),
        (CopiesTheRow, "test_a_change"),
    ],
)
async def test_change_waiters(mutant: type[MemoryWatcher], broken: str) -> None:
    """A waiter that sees too much, forgets what the caller has seen, or touches what is the
    caller's."""

    def fixtures() -> dict[str, Any]:
        database = MemoryDatabase()
        return {
            "waiter": mutant(database),
            "harness": MappedRows(database.session, Item, value="name"),
        }

    assert broken in await failures(ChangeWaiterContract, fixtures)


class WatchesEverything(MemoryWatcher):
    def _parse(self, model: Any, pk_value: Any, columns: Any) -> Any:
        super()._parse(model, pk_value, columns)
        return super()._parse(model, pk_value, None)


class ClosesQuietly(MemoryWatcher):
    async def close(self) -> None:
        self._known.clear()
        await super().close()


class TellsOne(MemoryWatcher):
    def _look(self) -> None:
        known = self._known
        self._known = dict(list(known.items())[:1])
        super()._look()
        self._known = known | self._known


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (WatchesEverything, "test_wait"),
        (ClosesQuietly, "test_closing"),
        (TellsOne, "test_many_waiters"),
    ],
)
async def test_watchers(mutant: type[MemoryWatcher], broken: str) -> None:
    """A watcher that watches too much, leaves its waiters waiting, or tells one of them only."""

    def fixtures() -> dict[str, Any]:
        database = MemoryDatabase()
        return {
            "watcher": mutant(database),
            "harness": MappedRows(database.session, Item, value="name"),
        }

    assert broken in await failures(WatcherContract, fixtures)


async def test_the_doubles_themselves() -> None:
    """Run in the same way, the doubles fail nothing: what fails above is what was broken."""
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

    def fixtures() -> dict[str, Any]:
        return {
            "associations": MemoryAssociations(),
            "links": linked(MemoryDatabase().session, "plain"),
        }

    assert await failures(AssociationWriterContract, fixtures) == set()

    def watching() -> dict[str, Any]:
        database = MemoryDatabase()
        watcher = MemoryWatcher(database)
        return {
            "waiter": watcher,
            "watcher": watcher,
            "harness": MappedRows(database.session, Item, value="name"),
        }

    assert await failures(ChangeWaiterContract, watching) == set()
    assert await failures(WatcherContract, watching) == set()
