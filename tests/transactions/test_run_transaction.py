"""Section 2 of the contract: `run_transaction`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    RetryAttempt,
    TransactionAbortedError,
    on_commit,
    run_transaction,
)
from pgtoolset.errors import CommitUnknownError
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
        await other.execute("DROP FUNCTION refuse_once CASCADE; DROP SEQUENCE refusals")
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
        return tuple(row.one())

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

    monkeypatch.setattr(random, "uniform", uniform)

    async def work(session: AsyncSession) -> None:
        await session.execute(raise_sqlstate("40001"))

    with pytest.raises(DBAPIError):
        await run_transaction(session_maker, work, attempts=9)
    assert ceilings == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0])


async def test_cancelled_while_it_waits(
    session_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation ends the waiting; there is no further attempt."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 60.0)
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await session.execute(raise_sqlstate("40001"))

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await run_transaction(session_maker, work)
    assert calls == 1


class DomainError(Exception):
    """An error of the application."""


async def as_it_is(session: AsyncSession) -> None:
    await session.execute(raise_sqlstate("40001"))


async def as_a_cause(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError as error:
        raise DomainError("the account is busy") from error


async def as_a_distant_cause(session: AsyncSession) -> None:
    try:
        await as_a_cause(session)
    except DomainError as error:
        raise RuntimeError from error


async def in_a_task_group(session: AsyncSession) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(as_it_is(session))


async def in_a_group_of_groups(session: AsyncSession) -> None:
    try:
        await in_a_task_group(session)
    except ExceptionGroup as group:
        raise ExceptionGroup("outer", [KeyError("beside it"), group]) from None


async def as_the_cause_of_a_member(session: AsyncSession) -> None:
    try:
        await as_a_cause(session)
    except DomainError as error:
        raise ExceptionGroup("members", [ValueError(), error]) from None


async def in_a_cycle(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError as error:
        domain = DomainError()
        domain.__cause__ = RuntimeError()
        domain.__cause__.__cause__ = ExceptionGroup("members", [domain, error])
        raise domain from domain.__cause__


async def swallowed(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError:
        pass


async def by_terminated_backend(session: AsyncSession) -> None:
    await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


async def by_swallowed_loss(session: AsyncSession) -> None:
    try:
        await by_terminated_backend(session)
    except Exception:
        pass


@pytest.mark.parametrize(
    "fail",
    [
        as_it_is,
        as_a_cause,
        as_a_distant_cause,
        in_a_task_group,
        in_a_group_of_groups,
        as_the_cause_of_a_member,
        in_a_cycle,
        swallowed,
        by_terminated_backend,
        by_swallowed_loss,
    ],
)
async def test_the_cause_counts(
    session_maker: Maker,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """A serialization failure, or a connection lost before the COMMIT, is tried again wherever it
    is: in an ExceptionGroup, under `raise ... from`, in a cycle of causes, or swallowed."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await insert(session, calls)
        if calls == 1:
            await fail(session)

    await run_transaction(session_maker, work)
    assert await stored(other) == {2}


async def as_a_context(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError:
        raise DomainError("the account is busy")  # noqa: B904


async def with_its_cause_denied(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError:
        raise DomainError("the account is busy") from None


async def with_an_unknown_commit(session: AsyncSession) -> None:
    try:
        await as_it_is(session)
    except DBAPIError as error:
        raise ExceptionGroup("both", [error, CommitUnknownError("?", phase="commit")]) from None


async def over_an_unknown_commit(session: AsyncSession) -> None:
    raise DomainError from CommitUnknownError("?", phase="commit")


async def by_an_unknown_commit(session: AsyncSession) -> None:
    error = CommitUnknownError("?", phase="end")
    error.__cause__ = ConnectionResetError()
    raise error


@pytest.mark.parametrize("fail", [as_a_context, with_its_cause_denied])
async def test_a_context_is_no_cause(
    session_maker: Maker, fail: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """An error that was raised while another was handled, without `from`, is not tried again."""
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await fail(session)

    with pytest.raises(DomainError):
        await run_transaction(session_maker, work)
    assert calls == 1


@pytest.mark.parametrize(
    "fail", [by_an_unknown_commit, with_an_unknown_commit, over_an_unknown_commit]
)
async def test_an_unknown_commit_is_never_tried_again(
    session_maker: Maker, fail: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """A commit whose outcome is unknown is not tried again, whatever stands beside it."""
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await fail(session)

    with pytest.raises(Exception) as caught:
        await run_transaction(session_maker, work, retry_on=lambda error: True)
    assert not isinstance(caught.value, DBAPIError)
    assert calls == 1


async def test_retry_on_adds_errors(session_maker: Maker, other: asyncpg.Connection) -> None:
    """`retry_on` is asked for each error that is not tried again anyway, and decides."""
    asked: list[Exception] = []
    failures = [as_it_is, by_domain_error, by_key_error]
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await insert(session, calls)
        await failures[calls - 1](session)

    def retry_on(error: Exception) -> bool:
        asked.append(error)
        return isinstance(error, DomainError)

    with pytest.raises(KeyError) as caught:
        await run_transaction(session_maker, work, retry_on=retry_on)
    assert [type(error) for error in asked] == [DomainError, KeyError]
    assert asked[-1] is caught.value
    assert await stored(other) == set()


async def by_domain_error(session: AsyncSession) -> None:
    raise DomainError


async def by_key_error(session: AsyncSession) -> None:
    raise KeyError


async def test_retry_on_that_fails(session_maker: Maker) -> None:
    """An error of `retry_on` propagates, and one that returns no bool is a TypeError."""

    def broken(error: Exception) -> bool:
        raise LookupError

    for retry_on, expected in ((broken, LookupError), (lambda error: None, TypeError)):
        with pytest.raises(expected):
            await run_transaction(session_maker, by_key_error, retry_on=retry_on)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_async", [False, True])
async def test_on_retry(
    session_maker: Maker, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """`on_retry` is called before each pause, with the number of the attempt that failed, its
    error and the pause, when its connection is in the pool; not after the last attempt."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high / 1000)
    pool: Any = engine.pool
    attempts: list[RetryAttempt] = []

    def observe(attempt: RetryAttempt) -> None:
        assert pool.checkedout() == 0
        attempts.append(attempt)

    async def observe_async(attempt: RetryAttempt) -> None:
        await asyncio.sleep(0)
        observe(attempt)

    with pytest.raises(DBAPIError) as caught:
        await run_transaction(
            session_maker, as_it_is, attempts=3, on_retry=observe_async if is_async else observe
        )
    assert [attempt.number for attempt in attempts] == [1, 2]
    assert [attempt.pause for attempt in attempts] == pytest.approx([0.00002, 0.00004])
    assert all(isinstance(attempt.error, DBAPIError) for attempt in attempts)
    assert caught.value not in [attempt.error for attempt in attempts]


async def test_on_retry_that_fails(session_maker: Maker) -> None:
    """An error of `on_retry` ends the retries and propagates."""
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await as_it_is(session)

    def broken(attempt: RetryAttempt) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await run_transaction(session_maker, work, on_retry=broken)
    assert calls == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError("stop"), SystemExit(3)])
async def test_what_is_no_exception_propagates(session_maker: Maker, error: BaseException) -> None:
    """A cancellation propagates unchanged, and `retry_on` is not asked."""

    async def work(session: AsyncSession) -> None:
        try:
            await as_it_is(session)
        except DBAPIError as cause:
            raise error from cause

    with pytest.raises(type(error)) as caught:
        await run_transaction(session_maker, work, retry_on=lambda error: True)
    assert caught.value is error


async def test_a_server_that_refuses(database_url: str) -> None:
    """A connection that cannot be made is not one that was lost: the error propagates at once."""
    calls = 0
    url = make_url(database_url).set(database="no such database")
    engine = create_async_engine(url)

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await session.execute(text("SELECT 1"))

    # SQLAlchemy before 2.1 passes asyncpg's error through.
    with pytest.raises((DBAPIError, asyncpg.InvalidCatalogNameError)):
        await run_transaction(async_sessionmaker(engine), work)
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

    def work(session: AsyncSession) -> Any:
        return 3

    with pytest.raises(TypeError, match="work"):
        await run_transaction(session_maker, work)
