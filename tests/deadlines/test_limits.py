"""The `statement_timeout` that a deadline sets: never longer, never left behind."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    DeadlineExceededError,
    TransactionAbortedError,
    create_db_context,
    deadline,
    get_transaction,
    lock_rows,
    lock_tables,
)
from pgtoolset._arguments import seconds
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.protocols import DatabaseContext
from tests.deadlines.lengths import growing
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.support import (
    Item,
    connect_args,
    examples,
    insert,
    interrupt_everywhere,
    raw_of,
    sqlalchemy_url,
    stored,
    until,
)

Maker = async_sessionmaker[AsyncSession]
Context = DatabaseContext[AsyncSession]

SLEEP = text("SELECT pg_sleep(60)")


async def limit(session: AsyncSession) -> float:
    """Return the limit of the next statement in seconds; 0 without one."""
    shown = str(await session.scalar(text("SHOW statement_timeout")))
    return 0.0 if shown == "0" else seconds("statement_timeout", shown)


async def test_limit_of_the_connection(database_url: str) -> None:
    """A shorter limit of the connection stays, and its error stays PostgreSQL's."""
    engine = create_async_engine(
        sqlalchemy_url(database_url), connect_args=connect_args(statement_timeout="500ms")
    )
    db_context = create_db_context(async_sessionmaker(engine))
    try:
        for _ in range(2):
            with deadline(60):
                async with db_context() as session:
                    assert await limit(session) == 0.5
                    with pytest.raises(DBAPIError) as caught:
                        await session.execute(SLEEP)
                    await session.rollback()
            assert sqlstate_of(caught.value) == "57014"
    finally:
        await engine.dispose()


async def test_longer_limit_of_the_connection(database_url: str) -> None:
    """A longer limit of the connection gives way."""
    engine = create_async_engine(
        sqlalchemy_url(database_url), connect_args=connect_args(statement_timeout="90s")
    )
    try:
        with deadline(60):
            async with create_db_context(async_sessionmaker(engine))() as session:
                assert 0 < await limit(session) <= 60
    finally:
        await engine.dispose()


@pytest.mark.parametrize("value", ["20000ms", 20000, "20s"])
async def test_limit_of_settings(session_maker: Maker, value: Any) -> None:
    """A shorter limit of `settings=` stays, and a longer one gives way."""
    db_context = create_db_context(session_maker, settings={"statement_timeout": value})
    with deadline(60):
        async with db_context() as session:
            assert await limit(session) == 20
    with deadline(15):
        async with db_context() as session:
            assert 0 < await limit(session) <= 15
    async with db_context() as session:
        with deadline(60):
            assert await limit(session) == 20
        assert await limit(session) == 20


async def test_limit_of_a_statement(db_context: Context) -> None:
    """A shorter limit that the caller sets by hand stays, of the transaction and the session."""
    with deadline(60):
        async with db_context() as session:
            await session.execute(text("SET LOCAL statement_timeout = '1s'"))
            assert await limit(session) == 1
            await session.execute(text("SELECT 1"))
            assert await limit(session) == 1
    async with db_context() as session:
        await session.execute(text("SET statement_timeout = '2s'"))
    with deadline(60):
        async with db_context() as session:
            assert await limit(session) == 2


async def test_other_cancellations(db_context: Context, other: asyncpg.Connection) -> None:
    """A statement that someone else cancels raises PostgreSQL's error."""
    with deadline(60):
        async with db_context() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            task = asyncio.create_task(session.execute(SLEEP))

            async def canceled() -> bool:
                await other.execute("SELECT pg_cancel_backend($1)", pid)
                return task.done()

            await until(canceled)
            with pytest.raises(DBAPIError) as caught:
                await task
            await session.rollback()
    assert sqlstate_of(caught.value) == "57014"


async def test_refreshed(db_context: Context) -> None:
    """Each statement is limited by what is left, and by a tenth of that more at most."""
    with deadline(20):
        ends = time.monotonic() + 20
        async with db_context() as session:
            seen = []
            while (left := ends - time.monotonic()) > 18.5:
                assert await limit(session) <= left * 1.1 + 0.02
                seen.append(left)
                await asyncio.sleep(0.1)
    assert seen


async def test_statements_of_their_own(
    db_context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short transaction sends no statement of its own with asyncpg, and one with psycopg."""
    sent: list[str] = []
    async with db_context() as session:
        raw = await raw_of(session)
        execute = type(raw).execute

    async def noted(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        sent.append(str(query))
        return await execute(self, query, *arguments, **options)

    monkeypatch.setattr(type(raw), "execute", noted)
    with deadline(60):
        async with db_context() as session:
            await session.execute(text("SELECT 1"))
            await session.execute(text("SELECT 2"))
    of_ours = [each for each in sent if "statement_timeout" in each]
    assert len(of_ours) == 1
    if hasattr(raw, "fetchval"):
        assert of_ours[0].startswith("BEGIN")
        assert sent == [of_ours[0], "COMMIT;"]


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), does_time_pass=st.booleans())
async def test_model(session_maker: Maker, data: st.DataObject, does_time_pass: bool) -> None:
    """Whatever is nested in a transaction, a deadline shortens the limit while it is open, and
    afterwards the limit is what it would have been without, however little time passes."""
    db_context = create_db_context(session_maker)
    now = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if not does_time_pass:
            patch.setattr("pgtoolset._deadlines.monotonic", lambda: now)
        async with db_context() as session:
            base = await _follow(session, data, 0.0, depth=0)
            assert await limit(session) == base
    async with db_context() as session:
        assert await limit(session) == 0


@pytest.mark.parametrize("value", [1000, 999_990, 1_000_000, 700_000])
async def test_a_limit_that_is_as_long_as_a_deadline(
    db_context: Context, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    """A limit of the caller that is as long as one that a deadline has set stays the caller's,
    whatever a savepoint puts back."""
    now = time.monotonic()
    monkeypatch.setattr("pgtoolset._deadlines.monotonic", lambda: now)
    set_local = text(f"SET LOCAL statement_timeout = {value}")
    async with db_context() as session:
        with deadline(1000):
            await session.execute(text("SELECT 1"))
            with pytest.raises(KeyError):
                async with get_transaction(session):
                    await session.execute(text("SET LOCAL statement_timeout = '2000s'"))
                    await session.execute(text("SELECT 1"))
                    raise KeyError
            await session.execute(text("SELECT 1"))
        assert await limit(session) == 0
        with deadline(1000):
            await session.execute(set_local)
            assert await limit(session) == pytest.approx(value / 1000, abs=0.01)
        assert await limit(session) == value / 1000


async def _follow(
    session: AsyncSession, data: st.DataObject, base: float, *, depth: int, end: float = 0.0
) -> float:
    """Do anything; `base` is the limit without the deadlines around, of which `end` is the first.

    Return the limit without deadlines afterwards.
    """

    async def check() -> None:
        seen = await limit(session)
        if not end or (base and base <= end * 0.9):
            assert seen == base
        elif not base or base > end:
            assert end * 0.9 < seen <= end + 0.001  # milliseconds are rounded up

    for _ in range(data.draw(st.integers(1, 3))):
        kinds = ["statement", "set", "lock"]
        if depth < 3:
            kinds += ["deadline", "release", "rollback", "settings"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "statement":
            await check()
        elif kind == "set":
            base = float(data.draw(st.sampled_from([500, 5000, 50000])))
            await session.execute(text(f"SET LOCAL statement_timeout = '{base:g}s'"))
        elif kind == "lock":
            await lock_rows(session, Item, [1], timeout=60)
            async with lock_tables(session, [Item], timeout=60):
                pass
        elif kind == "deadline":
            length = data.draw(st.sampled_from([1000, 10000]))
            with deadline(length):
                inner = min(end, length) if end else length
                base = await _follow(session, data, base, depth=depth + 1, end=inner)
        elif kind == "release":
            async with get_transaction(session):
                base = await _follow(session, data, base, depth=depth + 1, end=end)
        elif kind == "rollback":
            with pytest.raises(KeyError):
                async with get_transaction(session):
                    await _follow(session, data, base, depth=depth + 1, end=end)
                    raise KeyError
        else:
            async with get_transaction(session, settings={"statement_timeout": "700s"}):
                await _follow(session, data, 700.0, depth=depth + 1, end=end)
        await check()
    return base


@pytest.mark.parametrize("end", ["commit", "rollback", "error", "swallowed", "cancelled"])
async def test_nothing_outlives_the_transaction(engine: AsyncEngine, end: str) -> None:
    """However a transaction ends, its connection has no limit afterwards."""
    one = create_async_engine(engine.url, pool_size=1, max_overflow=0)
    db_context = create_db_context(async_sessionmaker(one))

    async def unit() -> None:
        with deadline(1 if end in ("error", "swallowed") else 60):
            async with db_context() as session:
                await session.execute(text("SELECT 1"))
                if end == "rollback":
                    await session.rollback()
                elif end == "error":
                    await session.execute(SLEEP)
                elif end == "swallowed":
                    with pytest.raises(DeadlineExceededError):
                        await session.execute(SLEEP)
                elif end == "cancelled":
                    asyncio.get_running_loop().call_later(0.05, task.cancel)
                    await session.execute(SLEEP)

    try:
        task = asyncio.create_task(unit())
        await asyncio.wait([task])
        kinds = {"error": DeadlineExceededError, "swallowed": TransactionAbortedError}
        if end == "cancelled":
            assert task.cancelled()
        else:
            assert type(task.exception()) is kinds.get(end, type(None))
        async with db_context() as session:
            assert await limit(session) == 0
    finally:
        await one.dispose()


@growing
async def test_pgbouncer(seconds: float, database_url: str) -> None:
    """Behind PgBouncer each transaction has its own limit, and no backend keeps one."""
    async with pgbouncer(database_url) as url:
        engine = create_async_engine(url, connect_args=WITHOUT_CACHES)
        db_context = create_db_context(async_sessionmaker(engine))

        async def unit(number: int) -> None:
            with deadline(60) if number % 2 else ExitStack():
                async with db_context() as session:
                    assert (await limit(session) > 0) is bool(number % 2)

        try:
            await asyncio.gather(*(unit(number) for number in range(20)))
            with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
                async with db_context() as session:
                    await session.execute(SLEEP)
            assert caught.value.spent_on == "statement"
            await asyncio.gather(*(unit(number) for number in range(6)))
        finally:
            await engine.dispose()


async def test_cancelled_everywhere(db_context: Context, engine: AsyncEngine) -> None:
    """A cancellation at any moment of a block under a deadline leaves the pool whole."""
    pool: Any = engine.pool

    async def block(_: int) -> None:
        with deadline(60):
            async with db_context() as session:
                await session.execute(text("SELECT 1"))
                with deadline(30):
                    await session.execute(text("SELECT 1"))

    async def check(_: int) -> None:
        assert pool.checkedout() == 0
        async with db_context() as session:
            assert await limit(session) == 0

    assert await interrupt_everywhere(block, check) > 3


async def test_unseen_error(db_context: Context, other: asyncpg.Connection) -> None:
    """honest: a COMMIT under a deadline of a transaction that an unseen error has aborted."""
    with pytest.raises(TransactionAbortedError), deadline(60):
        async with db_context() as session:
            await insert(session, 1)
            raw = await raw_of(session)
            with pytest.raises(Exception, match="division"):
                await raw.execute("SELECT 1 / 0")
    assert await stored(other) == set()
    async with db_context() as session:
        assert await limit(session) == 0
