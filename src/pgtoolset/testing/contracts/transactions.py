"""Sessions and their transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset._postgres.sqlstates import DEADLOCK_DETECTED, SERIALIZATION_FAILURE
from pgtoolset.testing.contracts.harness import (
    RowsHarness,
    TransactionHarness,
    Undone,
    missing,
    opened,
)

__all__ = ["AbortedTransactionContract", "SessionFactoryContract", "TransactionalSessionContract"]


class TransactionalSessionContract:
    """What `TransactionalSession` promises. Fixtures: `harness`, a `TransactionHarness`."""

    @pytest.fixture
    def harness(self) -> TransactionHarness:
        missing("harness", "a TransactionHarness, such as MappedRows(session_maker, Model)")

    async def test_the_end_of_a_block_commits(self, harness: TransactionHarness) -> None:
        """The writes of a block are stored at its end, and no other session sees them before."""
        async with opened(harness) as session:
            assert not session.in_transaction()
            async with get_transaction(session) as same:
                assert same is session
                assert session.in_transaction()
                await harness.write(session, 1)
                assert await harness.stored() == set()
            assert not session.in_transaction()
            assert await harness.stored() == {1}

    @pytest.mark.parametrize(
        "error", [Undone(), asyncio.CancelledError(), KeyboardInterrupt()], ids=repr
    )
    async def test_an_exception_rolls_back(
        self, harness: TransactionHarness, error: BaseException
    ) -> None:
        """An exception rolls back the block and propagates; the session can be used again."""
        async with opened(harness) as session:
            with pytest.raises(type(error)) as caught:
                async with get_transaction(session):
                    await harness.write(session, 1)
                    raise error
            assert caught.value is error
            assert not session.in_transaction()
            assert await harness.stored() == set()
            async with get_transaction(session):
                await harness.write(session, 2)
            assert await harness.stored() == {2}

    @pytest.mark.parametrize("failing", range(4))
    async def test_an_exception_undoes_its_own_level(
        self, harness: TransactionHarness, failing: int
    ) -> None:
        """An exception rolls back the block that it leaves, with those inside, and no other."""

        async def nest(session: Any, level: int) -> None:
            try:
                async with get_transaction(session):
                    await harness.write(session, level)
                    if level < 3:
                        await nest(session, level + 1)
                    await harness.write(session, 10 + level)
                    if level == failing:
                        raise Undone
            except Undone:
                assert session.in_transaction() is (level > 0)

        async with opened(harness) as session:
            await nest(session, 0)
            assert await harness.stored() == {*range(failing), *range(10, 10 + failing)}

    async def test_a_released_level_belongs_to_the_one_around(
        self, harness: TransactionHarness
    ) -> None:
        """A nested block that ended normally is rolled back with the block around it, and is not
        stored before."""
        async with opened(harness) as session:
            with pytest.raises(Undone):
                async with get_transaction(session):
                    async with get_transaction(session):
                        await harness.write(session, 1)
                    assert await harness.stored() == set()
                    raise Undone
            assert await harness.stored() == set()

    async def test_levels_in_a_row(self, harness: TransactionHarness) -> None:
        """Levels that follow each other are independent."""
        async with opened(harness) as session:
            async with get_transaction(session):
                for number in range(6):
                    try:
                        async with get_transaction(session):
                            await harness.write(session, number)
                            if number % 2:
                                raise Undone
                    except Undone:
                        pass
            assert await harness.stored() == {0, 2, 4}

    async def test_callbacks_run_after_the_commit(self, harness: TransactionHarness) -> None:
        """Callbacks run after the outermost commit, in order; a level that rolls back drops its
        own."""
        ran: list[Any] = []

        def callback(name: str) -> Callable[[], Any]:
            async def run() -> None:
                ran.append((name, await harness.stored()))

            return run

        async with opened(harness) as session:
            async with get_transaction(session):
                on_commit(session, callback("first"))
                with pytest.raises(Undone):
                    async with get_transaction(session):
                        on_commit(session, callback("never"))
                        async with get_transaction(session):
                            on_commit(session, callback("never either"))
                        raise Undone
                async with get_transaction(session):
                    await harness.write(session, 1)
                    on_commit(session, callback("nested"))
                on_commit(session, callback("last"))
                assert ran == []
            assert ran == [("first", {1}), ("nested", {1}), ("last", {1})]
            with pytest.raises(Undone):
                async with get_transaction(session):
                    on_commit(session, callback("never"))
                    raise Undone
            assert len(ran) == 3
            with pytest.raises(TransactionStateError):
                on_commit(session, callback("never"))

    async def test_durable_is_outermost(self, harness: TransactionHarness) -> None:
        """A durable block is refused inside another block, which goes on."""
        async with opened(harness) as session:
            async with get_transaction(session, durable=True):
                await harness.write(session, 1)
                with pytest.raises(TransactionStateError):
                    async with get_transaction(session, durable=True):
                        await harness.write(session, 2)
                await harness.write(session, 3)
            assert await harness.stored() == {1, 3}


class SessionFactoryContract:
    """What `SessionFactory` and `ManagedSession` promise. Fixtures: `harness`, a
    `TransactionHarness`."""

    @pytest.fixture
    def harness(self) -> TransactionHarness:
        missing("harness", "a TransactionHarness whose session() is the factory")

    async def test_each_call_makes_a_session(self, harness: TransactionHarness) -> None:
        """Two sessions share only the committed rows."""
        async with opened(harness) as one, opened(harness) as other:
            assert one is not other
            async with get_transaction(one):
                await harness.write(one, 1)
                assert not other.in_transaction()
                async with get_transaction(other):
                    await harness.write(other, 2)
                assert await harness.stored() == {2}

    async def test_a_unit_of_work(self, harness: TransactionHarness) -> None:
        """A context yields a session in a transaction; its end commits, an exception rolls back."""
        db_context = create_db_context(harness.session)
        async with db_context() as session:
            assert session.in_transaction()
            await harness.write(session, 1)
        assert not session.in_transaction()
        with pytest.raises(Undone):
            async with db_context() as session:
                await harness.write(session, 2)
                raise Undone
        assert not session.in_transaction()
        assert await harness.stored() == {1}

    async def test_the_block_may_end_its_transaction(self, harness: TransactionHarness) -> None:
        """The block may commit and roll back and go on; its end commits the open transaction."""
        async with create_db_context(harness.session)() as session:
            await harness.write(session, 1)
            await session.commit()
            assert await harness.stored() == {1}
            async with get_transaction(session):
                await harness.write(session, 2)
                await session.rollback()
            async with get_transaction(session):
                await harness.write(session, 3)
        assert await harness.stored() == {1, 3}

    async def test_nothing_to_end(self, harness: TransactionHarness) -> None:
        """Commit and rollback without a transaction do nothing, and close ends an open one."""
        async with opened(harness) as session:
            await session.commit()
            await session.rollback()
            await session.begin()
            await harness.write(session, 1)
            assert session.in_transaction()
        assert not session.in_transaction()
        assert await harness.stored() == set()


class AbortedTransactionContract:
    """What a session promises after an error of the database. Fixtures: `harness`, a
    `RowsHarness`."""

    @pytest.fixture
    def harness(self) -> RowsHarness:
        missing("harness", "a RowsHarness, such as MappedRows(session_maker, Model)")

    async def test_a_swallowed_error_is_raised(self, harness: RowsHarness) -> None:
        """A block that swallowed the error which aborted its transaction raises, with that cause,
        and stores nothing."""
        async with opened(harness) as session:
            swallowed: list[BaseException] = []
            with pytest.raises(TransactionAbortedError) as caught:
                async with get_transaction(session):
                    await harness.write(session, 1)
                    try:
                        await harness.fail(session, "22012")
                    except DBAPIError as error:
                        swallowed.append(error)
            assert [caught.value.__cause__] == swallowed
            assert caught.value.sqlstate == "22012"
            assert await harness.stored() == set()

    async def test_nothing_works_in_an_aborted_transaction(self, harness: RowsHarness) -> None:
        """After an error every statement is refused, until the level is rolled back."""
        async with opened(harness) as session:
            async with get_transaction(session):
                await harness.write(session, 1)
                with pytest.raises(DBAPIError) as caught:
                    async with get_transaction(session):
                        await harness.write(session, 2)
                        with pytest.raises(DBAPIError):
                            await harness.fail(session, "22012")
                        await harness.statement(session)
                assert getattr(caught.value.orig, "sqlstate", None) == "25P02"
                await harness.write(session, 3)
            assert await harness.stored() == {1, 3}

    async def test_a_swallowed_error_costs_its_own_level(self, harness: RowsHarness) -> None:
        """A nested block that swallowed an error raises, and the level around it is as it was."""
        async with opened(harness) as session:
            async with get_transaction(session):
                await harness.write(session, 1)
                with pytest.raises(TransactionAbortedError):
                    async with get_transaction(session):
                        await harness.write(session, 2)
                        with pytest.raises(DBAPIError):
                            await harness.fail(session, "22012")
                await harness.write(session, 3)
            assert await harness.stored() == {1, 3}

    async def test_an_explicit_commit_is_honest(self, harness: RowsHarness) -> None:
        """A `commit()` of an aborted transaction inside a unit of work raises too."""
        with pytest.raises(TransactionAbortedError):
            async with create_db_context(harness.session)() as session:
                await harness.write(session, 1)
                with pytest.raises(DBAPIError):
                    await harness.fail(session, "22012")
                await session.commit()
        assert await harness.stored() == set()

    @pytest.mark.parametrize("sqlstate", [SERIALIZATION_FAILURE, DEADLOCK_DETECTED])
    async def test_run_transaction_tries_again(self, harness: RowsHarness, sqlstate: str) -> None:
        """After a serialization failure or a deadlock the work runs again, in a new session."""
        sessions: list[Any] = []

        async def work(session: Any) -> str:
            sessions.append(session)
            await harness.write(session, len(sessions))
            if len(sessions) < 3:
                await harness.fail(session, sqlstate)
            return "done"

        assert await run_transaction(harness.session, work) == "done"
        assert len(set(map(id, sessions))) == 3
        assert await harness.stored() == {3}

    async def test_run_transaction_gives_up(self, harness: RowsHarness) -> None:
        """Any other error propagates, and so does the error of the last attempt."""
        tried: list[int] = []

        async def work(session: Any) -> None:
            tried.append(1)
            await harness.fail(session, SERIALIZATION_FAILURE if len(tried) < 2 else "22012")

        with pytest.raises(DBAPIError):
            await run_transaction(harness.session, work)
        assert len(tried) == 2
        tried.clear()
        with pytest.raises(DBAPIError):
            await run_transaction(harness.session, work, attempts=1)
        assert len(tried) == 1
