"""Section 2 of the contract: `run_transaction`."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from pgtoolset import TransactionAbortedError, on_commit, run_transaction, transactions
from tests.support import Account, insert, stored

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
async def account(session_maker: Maker) -> None:
    async with session_maker.begin() as session:
        session.add(Account(id=1, balance=100))


async def balance(connection: asyncpg.Connection) -> Any:
    return await connection.fetchval("SELECT balance FROM account WHERE id = 1")


def raise_sqlstate(code: str) -> Any:
    return text(f"DO $$ BEGIN RAISE EXCEPTION 'provoked' USING ERRCODE = '{code}'; END $$")


async def test_returns_the_result(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Returns what work returned, when it is committed."""

    async def work(session: AsyncSession) -> str:
        await insert(session, 1)
        return "result"

    assert await run_transaction(session_maker, work) == "result"
    assert await stored(other) == {1}


async def test_serialization_failures(
    session_maker: Maker, account: None, other: asyncpg.Connection
) -> None:
    """Under SERIALIZABLE every concurrent read-modify-write succeeds, and no update is lost."""
    calls = 0

    async def withdraw(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        row = await session.get_one(Account, 1)
        await asyncio.sleep(0)
        row.balance -= 1

    await asyncio.gather(
        *(
            run_transaction(session_maker, withdraw, isolation_level="SERIALIZABLE", attempts=100)
            for _ in range(20)
        )
    )
    assert await balance(other) == 80
    assert calls > 20, "without a conflict the test proves nothing"


async def test_deadlock(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Two transactions that lock the same rows in opposite orders both get through."""
    async with session_maker.begin() as session:
        session.add_all([Account(id=1), Account(id=2)])
    calls = 0
    barrier = asyncio.Barrier(2)

    def transfer(first: int, second: int) -> Any:
        met = False

        async def work(session: AsyncSession) -> None:
            nonlocal calls, met
            calls += 1
            update = text("UPDATE account SET balance = balance + 1 WHERE id = :id")
            await session.execute(update, {"id": first})
            if not met:
                met = True
                await barrier.wait()
            await session.execute(update, {"id": second})

        return work

    await asyncio.gather(
        run_transaction(session_maker, transfer(1, 2)),
        run_transaction(session_maker, transfer(2, 1)),
    )
    assert [row["balance"] for row in await other.fetch("SELECT balance FROM account")] == [2, 2]
    assert calls == 3


async def test_failure_at_the_commit(
    session_maker: Maker, account: None, other: asyncpg.Connection
) -> None:
    """A serialization failure that PostgreSQL reports only at the COMMIT is tried again as well."""
    await other.execute(
        """
        CREATE OR REPLACE FUNCTION refuse_once() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('refusals') <= 2 THEN
                RAISE EXCEPTION 'provoked' USING ERRCODE = '40001';
            END IF;
            RETURN NULL;
        END $$;
        CREATE SEQUENCE refusals;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse_once();
        """
    )
    sessions: list[AsyncSession] = []

    async def work(session: AsyncSession) -> None:
        sessions.append(session)
        await insert(session, 1)

    try:
        await run_transaction(session_maker, work)
    finally:
        await other.execute("DROP TRIGGER refuse ON item; DROP SEQUENCE refusals")
    assert len(sessions) == len({id(session) for session in sessions}) == 3, (
        "each attempt has a session of its own"
    )
    assert await stored(other) == {1}


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_last_error_propagates(session_maker: Maker, code: str, engine: AsyncEngine) -> None:
    """After the last attempt its error propagates."""
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await session.execute(raise_sqlstate(code))

    with pytest.raises(DBAPIError) as caught:
        await run_transaction(session_maker, work, attempts=3)
    assert calls == 3
    assert getattr(caught.value.orig, "sqlstate", None) == code


@pytest.mark.parametrize("attempts", [1, 5])
async def test_other_errors_propagate_at_once(
    session_maker: Maker, attempts: int, other: asyncpg.Connection
) -> None:
    """Any other error, of the database or not, is not tried again."""
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await insert(session, calls)
        await session.execute(text("SELECT 1 / 0"))

    with pytest.raises(DBAPIError, match="division by zero"):
        await run_transaction(session_maker, work, attempts=attempts)

    async def fail(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        raise KeyError

    with pytest.raises(KeyError):
        await run_transaction(session_maker, fail, attempts=attempts)
    assert calls == 2
    assert await stored(other) == set()


async def test_swallowed_serialization_failure(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Work that swallowed a serialization failure is tried again."""
    calls = 0

    async def work(session: AsyncSession) -> int:
        nonlocal calls
        calls += 1
        await insert(session, calls)
        if calls < 3:
            try:
                await session.execute(raise_sqlstate("40001"))
            except DBAPIError:
                pass
        return calls

    assert await run_transaction(session_maker, work) == 3
    assert await stored(other) == {3}


async def test_swallowed_other_error(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Work that swallowed another error raises TransactionAbortedError."""

    async def work(session: AsyncSession) -> None:
        await insert(session, 1)
        try:
            await session.execute(raise_sqlstate("23505"))
        except DBAPIError:
            pass

    with pytest.raises(TransactionAbortedError) as caught:
        await run_transaction(session_maker, work)
    assert caught.value.sqlstate == "23505"
    assert await stored(other) == set()


async def test_on_commit_runs_once(session_maker: Maker) -> None:
    """Callbacks of attempts that failed are forgotten."""
    log: list[int] = []
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        call = calls
        on_commit(session, lambda: log.append(call))
        if calls < 3:
            await session.execute(raise_sqlstate("40P01"))

    await run_transaction(session_maker, work)
    assert log == [3]


async def test_options(session_maker: Maker) -> None:
    """`isolation_level` and `read_only` hold in every attempt."""
    calls = 0

    async def work(session: AsyncSession) -> tuple[str, str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            await session.execute(raise_sqlstate("40001"))
        row = await session.execute(
            text(
                "SELECT current_setting('transaction_isolation'),"
                " current_setting('transaction_read_only')"
            )
        )
        return tuple(row.one())  # type: ignore[return-value]

    assert await run_transaction(
        session_maker, work, isolation_level="REPEATABLE READ", read_only=True
    ) == (
        "repeatable read",
        "on",
    )


async def test_backoff(
    session_maker: Maker, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine
) -> None:
    """The pause has full jitter under an exponential limit, and holds no connection."""
    ceilings: list[float] = []
    pool: Any = engine.pool

    def uniform(low: float, high: float) -> float:
        assert low == 0
        assert pool.checkedout() == 0
        ceilings.append(high)
        return 0.0

    monkeypatch.setattr(transactions.random, "uniform", uniform)

    async def work(session: AsyncSession) -> None:
        await session.execute(raise_sqlstate("40001"))

    with pytest.raises(DBAPIError):
        await run_transaction(session_maker, work, attempts=9)
    assert ceilings == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0])


async def test_cancelled_while_it_waits(
    session_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation ends the waiting; there is no further attempt."""
    monkeypatch.setattr(transactions.random, "uniform", lambda low, high: 60.0)
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await session.execute(raise_sqlstate("40001"))

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await run_transaction(session_maker, work)
    assert calls == 1


async def nothing(session: AsyncSession) -> None:
    raise AssertionError("must not be reached")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attempts": -1}, ValueError),
        ({"attempts": 0}, ValueError),
        ({"attempts": 2.0}, TypeError),
        ({"attempts": "3"}, TypeError),
        ({"attempts": True}, TypeError),
        ({"attempts": None}, TypeError),
        ({"isolation_level": "SNAPSHOT"}, ValueError),
        ({"read_only": "yes"}, TypeError),
        ({"work": None}, TypeError),
        ({"work": "postgresql://u:secret@host/db"}, TypeError),
        ({"attempts": "postgresql://u:secret@host/db"}, TypeError),
        ({"session_maker": None}, TypeError),
        ({"session_maker": "postgresql://u:secret@host/db"}, TypeError),
    ],
)
async def test_bad_argument(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused by its name, before any SQL and before work is called."""
    with pytest.raises(error, match=f"^{next(iter(arguments))} must be") as caught:
        await run_transaction(**{"session_maker": session_maker, "work": nothing, **arguments})
    assert "secret" not in str(caught.value)


async def test_async_scoped_session() -> None:
    """A factory that makes an `async_scoped_session` is refused, with what to pass instead."""
    scoped: Any = async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1)
    with pytest.raises(TypeError, match=r"^session_maker must make .*scoped\(\)$"):
        await run_transaction(lambda: scoped, nothing)


async def test_work_that_is_not_async(session_maker: Maker) -> None:
    """A sync function is found out when it returns something that cannot be awaited."""
    work: Any = lambda session: 3  # noqa: E731
    with pytest.raises(TypeError, match="work"):
        await run_transaction(session_maker, work)
