"""Section 11 of the contract, "outcome": where it is asked for, a commit whose answer was lost is
resolved, at every place that commits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    TransactionAbortedError,
    TransactionLostError,
    TransactionStateError,
    create_db_context,
    create_db_dependency,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.testing import MemoryDatabase
from tests.proxy import Direction, How, Proxy
from tests.support import insert, interrupt_everywhere, sqlalchemy_url, stored, until

Maker = async_sessionmaker[AsyncSession]

#: Seconds: longer than any test, but for those in which no answer can come.
LONG = 60


class Lab:
    """An engine whose connections run through a proxy, and what its callbacks have logged."""

    def __init__(self, proxy: Proxy, engine: AsyncEngine) -> None:
        self.proxy = proxy
        self.engine = engine
        self.maker: Maker = async_sessionmaker(engine, expire_on_commit=False)
        self.log: list[int] = []
        self.cut: Callable[[], None] = lambda: None

    async def write(self, session: AsyncSession, id_: int = 1) -> None:
        await insert(session, id_)
        on_commit(session, lambda: self.log.append(id_))


@pytest.fixture
async def lab(database_url: str, other: asyncpg.Connection) -> AsyncIterator[Lab]:
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url), pool_size=2, max_overflow=0)
        try:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
            yield Lab(proxy, engine)
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        finally:
            await engine.dispose()
            await other.execute("TRUNCATE item, part, account")


# Places that commit. Each stores item 1 through a cut.


async def context(lab: Lab) -> None:
    async with create_db_context(lab.maker, resolve_commit="1min")() as session:
        await lab.write(session)
        lab.cut()


async def generator(lab: Lab) -> None:
    async for session in create_db_dependency(lab.maker, resolve_commit=LONG)():
        await lab.write(session)
        lab.cut()


async def block(lab: Lab) -> None:
    async with lab.maker() as session, get_transaction(session, resolve_commit=LONG):
        await lab.write(session)
        lab.cut()


async def block_with_options(lab: Lab) -> None:
    async with (
        lab.maker() as session,
        get_transaction(session, isolation_level="SERIALIZABLE", resolve_commit=LONG),
    ):
        await lab.write(session)
        lab.cut()


async def block_in_a_unit(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await session.commit()
        async with get_transaction(session, resolve_commit=LONG):
            await lab.write(session)
            lab.cut()


async def explicit(lab: Lab) -> None:
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await lab.write(session)
        lab.cut()
        await session.commit()


async def explicit_in_a_block(lab: Lab) -> None:
    async with lab.maker() as session, get_transaction(session, resolve_commit=LONG):
        await lab.write(session)
        lab.cut()
        await session.commit()


async def in_run_sync(lab: Lab) -> None:
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await lab.write(session)
        lab.cut()
        await session.run_sync(lambda sync: sync.commit())


async def on_a_connection(lab: Lab) -> None:
    async with lab.engine.connect() as connection:
        async with AsyncSession(connection) as session:
            async with get_transaction(session, resolve_commit=LONG):
                await lab.write(session)
                lab.cut()
            assert await session.scalar(text("SELECT 1")) == 1  # it connects again


PLACES: list[Callable[[Lab], Awaitable[None]]] = [
    context,
    generator,
    block,
    block_with_options,
    block_in_a_unit,
    explicit,
    explicit_in_a_block,
    in_run_sync,
    on_a_connection,
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("how", ["RST", "half"])
@pytest.mark.parametrize("direction", ["to server", "to client"])
@pytest.mark.parametrize("place", PLACES, ids=name_of)
async def test_resolved(
    lab: Lab,
    other: asyncpg.Connection,
    place: Callable[[Lab], Awaitable[None]],
    direction: Direction,
    how: How,
) -> None:
    """What is stored ends normally, and its callbacks have run; what is not is
    `TransactionLostError`."""
    lab.cut = lambda: lab.proxy.cut_at_commit(how, direction)
    if direction == "to client":
        await place(lab)
        assert (await stored(other), lab.log) == ({1}, [1])
    else:
        with pytest.raises(TransactionLostError, match="nothing of it is stored") as caught:
            await place(lab)
        assert type(caught.value.__cause__).__module__.startswith(("asyncpg", "psycopg", "builtin"))
        assert (await stored(other), lab.log) == (set(), [])
    async with create_db_context(lab.maker)() as session:
        await insert(session, 3)  # no broken connection is in the pool


@pytest.mark.parametrize("how", ["RST", "half", "whole"])
@pytest.mark.parametrize("direction", ["to server", "to client"])
async def test_run_transaction(
    lab: Lab, other: asyncpg.Connection, direction: Direction, how: How
) -> None:
    """`run_transaction` tries again exactly where nothing is stored."""
    attempts: list[int] = []
    lab.proxy.cut_at_commit(how, direction)

    async def work(session: AsyncSession) -> str:
        attempts.append(len(attempts) + 1)
        await lab.write(session, len(attempts))
        return "done"

    assert await run_transaction(lab.maker, work, resolve_commit=LONG) == "done"
    assert await stored(other) == {attempts[-1]} == set(lab.log)
    if how != "whole":
        assert len(attempts) == (1 if direction == "to client" else 2)


async def test_last_attempt(lab: Lab, other: asyncpg.Connection) -> None:
    """The error of the last attempt is `TransactionLostError`."""
    lab.proxy.cut_at_commit("RST", "to server", times=2)
    with pytest.raises(TransactionLostError):
        await run_transaction(lab.maker, lab.write, attempts=2, resolve_commit=LONG)
    assert await stored(other) == set()


@pytest.mark.parametrize("then", ["nothing", "rollback", "more work"])
async def test_swallowed(lab: Lab, other: asyncpg.Connection, then: str) -> None:
    """A block that swallows the error of its own lost commit never ends as if that was stored."""
    unit = create_db_context(lab.maker, resolve_commit=LONG)()
    expected: set[int] = set()
    with suppress(TransactionAbortedError):
        async with unit as session:
            await lab.write(session)
            lab.proxy.cut_at_commit("RST", "to server")
            with pytest.raises(TransactionLostError):
                await session.commit()
            if then != "nothing":
                await session.rollback()
            if then == "more work":
                await lab.write(session, 2)
                expected = {2}
        assert then != "nothing"
    assert await stored(other) == expected == set(lab.log)


async def test_goes_on_after_a_resolved_commit(lab: Lab, other: asyncpg.Connection) -> None:
    """After a `commit()` that was resolved as stored, the unit goes on over another connection."""
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await lab.write(session)
        lab.proxy.cut_at_commit("RST")
        await session.commit()
        await lab.write(session, 2)
    assert await stored(other) == {1, 2}
    assert lab.log == [1, 2]


async def _pids(engine: AsyncEngine) -> set[Any]:
    """Return the process ids behind the two connections of the pool."""
    async with engine.connect() as first, engine.connect() as second:
        return {await each.scalar(text("SELECT pg_backend_pid()")) for each in (first, second)}


async def test_others_of_the_pool(lab: Lab, other: asyncpg.Connection) -> None:
    """A commit that lost its connection has the pool replace the others, resolved as stored or
    not: whatever ended one has mostly ended them all."""
    for timeout in (LONG, None):
        before = await _pids(lab.engine)
        try:
            async with create_db_context(lab.maker, resolve_commit=timeout)() as session:
                await insert(session, 1)
                lab.proxy.cut_at_commit("RST")
        except CommitUnknownError:
            assert timeout is None
        assert not before & await _pids(lab.engine)
        await other.execute("TRUNCATE item, part, account")


@pytest.mark.parametrize("direction", ["to server", "to client"])
async def test_nothing_was_written(lab: Lab, direction: Direction) -> None:
    """A unit that has written nothing ends normally, and its callbacks run."""
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: lab.log.append(1))
        accepted = lab.proxy.accepted
        lab.proxy.cut_at_commit("RST", direction)
    assert lab.log == [1]
    assert lab.proxy.accepted == accepted  # and asks nobody


async def test_lost_before_the_question(lab: Lab, other: asyncpg.Connection) -> None:
    """A connection that is lost before COMMIT was sent is an ordinary error, and tried again."""
    attempts: list[int] = []

    async def work(session: AsyncSession) -> None:
        attempts.append(len(attempts) + 1)
        await lab.write(session, len(attempts))
        if len(attempts) == 1:
            lab.proxy.cut_at_chunk("to server", 1, "RST")

    with pytest.raises(DBAPIError):
        await run_transaction(lab.maker, work, attempts=1, resolve_commit=LONG)
    assert await stored(other) == set()
    attempts.clear()
    await run_transaction(lab.maker, work, resolve_commit=LONG)
    assert await stored(other) == {2} == set(lab.log)


async def test_aborted_unseen(lab: Lab, other: asyncpg.Connection) -> None:
    """Where an error that SQLAlchemy did not see has aborted the transaction, that is said."""
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
            await lab.write(session)
            raw: Any = await (await session.connection()).get_raw_connection()
            with suppress(Exception):
                await raw.driver_connection.execute("SELECT 1 / 0")
    assert await stored(other) == set()


async def test_cost(lab: Lab) -> None:
    """A commit costs one message and its answer more, and without the option none."""
    sent: list[int] = []
    for timeout in (None, LONG, LONG, None):
        async with create_db_context(lab.maker, resolve_commit=timeout)() as session:
            await session.execute(text("UPDATE account SET id = id"))
            await insert(session, len(sent))
            await session.flush()
            before = dict(lab.proxy.counts)
        sent.append(lab.proxy.counts["to server"] - before["to server"])
    plain, first, warm, again = sent
    assert plain == again == warm - 1
    assert first >= warm


async def test_nested(lab: Lab) -> None:
    """A nested block cannot have the option: it commits nothing. Nothing is sent."""
    async with create_db_context(lab.maker)() as session:
        sent = lab.proxy.counts["to server"]
        with pytest.raises(TransactionStateError, match="resolve_commit"):
            async with get_transaction(session, resolve_commit=1):
                raise AssertionError
        assert lab.proxy.counts["to server"] == sent


async def test_joined(lab: Lab, other: asyncpg.Connection) -> None:
    """A session that is joined to the transaction of its connection may have the option: its end
    sends no COMMIT, so there is nothing to ask. The COMMIT of the connection is the caller's."""
    async with lab.engine.connect() as connection:
        with pytest.raises(CommitUnknownError):
            async with connection.begin():
                await connection.execute(text("SELECT 1"))
                joined = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
                async with create_db_context(joined, resolve_commit=LONG)() as session:
                    await lab.write(session)
                async with joined() as session, get_transaction(session, resolve_commit=LONG):
                    await lab.write(session, 2)
                lab.proxy.cut_at_commit("RST")
    assert lab.log == []
    assert await stored(other) == {1, 2}


async def test_option_ends_with_its_block(lab: Lab, other: asyncpg.Connection) -> None:
    """The option of a block holds for the block, and no longer."""
    with pytest.raises(CommitUnknownError):
        async with create_db_context(lab.maker)() as session:
            await session.commit()
            async with get_transaction(session, resolve_commit=LONG):
                await lab.write(session)
            await lab.write(session, 2)
            lab.proxy.cut_at_commit("RST")
    assert await stored(other) == {1, 2}
    assert lab.log == [1]


async def test_option_of_the_unit_is_back_after_a_block(lab: Lab) -> None:
    """After a block with the option, the option of the unit around it holds again."""
    async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
        await session.commit()
        for options in ({}, {"durable": True}, {"resolve_commit": 50}):
            async with get_transaction(session, **options):
                await insert(session, 1)
                await session.rollback()
        await lab.write(session, 2)
        lab.proxy.cut_at_commit("RST")
    assert lab.log == [2]


def test_doubles() -> None:
    """A session that is not SQLAlchemy's cannot have the option."""

    async def run() -> None:
        database = MemoryDatabase()
        with pytest.raises(TypeError, match=r"^resolve_commit: only an AsyncSession"):
            async with create_db_context(database.session, resolve_commit=LONG)():
                raise AssertionError
        with pytest.raises(TypeError, match=r"^resolve_commit: only an AsyncSession"):
            await run_transaction(database.session, lambda _: asyncio.sleep(0), resolve_commit=LONG)

    asyncio.run(run())


# In a request


@pytest.mark.parametrize("path", ["/end", "/commit"])
@pytest.mark.parametrize("direction", ["to server", "to client"])
async def test_request(
    lab: Lab, other: asyncpg.Connection, direction: Direction, path: str
) -> None:
    """A request is answered after its commit was resolved: 201 for what is stored, and an error for
    what is not."""
    app = FastAPI()
    db: Any = Depends(create_db_dependency(lab.maker, resolve_commit=LONG))

    @app.post("/end", status_code=201)
    async def end(session: AsyncSession = db) -> None:
        await lab.write(session)
        lab.proxy.cut_at_commit("RST", direction)

    @app.post("/commit", status_code=201)
    async def commit(session: AsyncSession = db) -> None:
        await end(session)
        await session.commit()

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(path)
    assert response.status_code == (201 if direction == "to client" else 500)
    assert await stored(other) == set(lab.log) == ({1} if direction == "to client" else set())


# Cancellation


@pytest.mark.parametrize("direction", ["to server", "to client"])
async def test_cancelled_everywhere(
    lab: Lab, other: asyncpg.Connection, direction: Direction
) -> None:
    """Cancelled at any suspension, the resolution included: what was reported is what is stored,
    and the cancellation arrives afterwards."""
    reported: dict[int, str] = {}

    async def work(n: int) -> None:
        try:
            async with create_db_context(lab.maker, resolve_commit=LONG)() as session:
                await insert(session, n)
                lab.proxy.cut_at_commit("RST", direction)
        except asyncio.CancelledError:
            reported[n] = "cancelled"
            raise
        except TransactionLostError:
            reported[n] = "lost"
        else:
            reported[n] = "stored"
        await asyncio.sleep(0.05)
        reported[n] += ", not cancelled"

    async def check(n: int) -> None:
        lab.proxy.cut = None
        assert lab.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        is_stored = reported.get(n, "cancelled").startswith("stored")
        assert (n in await stored(other)) == is_stored, f"at suspension {n}: {reported.get(n)}"
        async with create_db_context(lab.maker)() as session:
            await session.execute(text("SELECT 1"))

    assert await interrupt_everywhere(work, check) >= 5
    end = "stored" if direction == "to client" else "lost"
    assert set(reported.values()) == {"cancelled", end, f"{end}, not cancelled"}


# No answer


async def test_no_server(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """Where no server answers in time, the outcome stays unknown, and no log has a password."""
    url = lab.engine.url.set(password="a secret")
    engine = create_async_engine(url, pool_size=1)
    caplog.set_level(logging.DEBUG, "pgtoolset")

    async def refuse() -> None:
        lab.proxy.refusing = True

    with pytest.raises(CommitUnknownError, match="could not find out: the server did not answer"):
        async with create_db_context(async_sessionmaker(engine), resolve_commit=0.2)() as session:
            await insert(session, 1)
            lab.proxy.cut_at_commit("RST", meanwhile=refuse)
    assert "asking for the outcome of a COMMIT has failed" in caplog.text
    assert "a secret" not in caplog.text
    await engine.dispose()


async def test_frozen_server(lab: Lab) -> None:
    """A server that is frozen does not keep the block longer than the timeout."""

    async def freeze() -> None:
        lab.proxy.frozen = True

    with pytest.raises(CommitUnknownError, match=r"within 0\.2 s"):
        async with create_db_context(lab.maker, resolve_commit="200ms")() as session:
            await insert(session, 1)
            lab.proxy.cut_at_commit("RST", meanwhile=freeze)


async def test_unknown_is_not_tried_again(lab: Lab) -> None:
    """`run_transaction` does not try again what is still unknown."""
    attempts: list[int] = []

    async def refuse() -> None:
        lab.proxy.refusing = True

    async def work(session: AsyncSession) -> None:
        attempts.append(1)
        await insert(session, 1)
        lab.proxy.cut_at_commit("RST", "to server", meanwhile=refuse)

    with pytest.raises(CommitUnknownError):
        await run_transaction(lab.maker, work, resolve_commit=0.1)
    assert attempts == [1]
    await until(lambda: lab.proxy.cut is None)
