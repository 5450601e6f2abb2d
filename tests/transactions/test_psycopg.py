"""What only psycopg does, or does in its own way: pipelines, cancellation, options, its pool."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from pgtoolset import (
    CommitUnknownError,
    TransactionAbortedError,
    TransactionStateError,
    _lifecycle,
    create_db_context,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset._postgres.connections import backend_pid, is_closed
from pgtoolset._postgres.discards import is_running
from pgtoolset._postgres.drivers import driver_of
from pgtoolset._postgres.engines import see
from tests.proxy import Proxy
from tests.support import Part, insert, plain_url, stored, swallow_error, until


@pytest.fixture
def psycopg_url(database_url: str) -> str:
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


@pytest.fixture
async def engine(psycopg_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection, which each session gets from the last one."""
    engine = create_async_engine(psycopg_url, pool_size=1, max_overflow=0, pool_timeout=30)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()
    await other.execute("TRUNCATE item, part")


@pytest.fixture
def maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


async def raw_of(session: AsyncSession) -> Any:
    pooled: Any = await (await session.connection()).get_raw_connection()
    return pooled.driver_connection


async def pid_of(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)


# Honesty


async def test_error_on_the_raw_connection(maker: Any, other: asyncpg.Connection) -> None:
    """An error that SQLAlchemy did not see is known without a round trip, and discards nothing but
    its transaction."""
    with pytest.raises(TransactionAbortedError, match="did not see"):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            with pytest.raises(psycopg.errors.DivisionByZero):
                await (await raw_of(session)).execute("SELECT 1 / 0")
    async with create_db_context(maker)() as session:
        await insert(session, 2)
    assert await stored(other) == {2}


async def test_error_while_the_commit_waits(maker: Any, other: asyncpg.Connection) -> None:
    """A statement that another task squeezes in before the COMMIT cannot make it lie."""
    with pytest.raises((TransactionAbortedError, TransactionStateError)):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            raw = await raw_of(session)
            await raw.lock.acquire()
            bad = asyncio.create_task(raw.execute("SELECT 1 / 0"))
            await asyncio.sleep(0)
            raw.lock.release()  # the other task has it next, and has not run yet
    with pytest.raises(psycopg.Error):
        await bad
    assert await stored(other) == set()


@pytest.mark.parametrize("ends", [True, False])
async def test_error_in_a_pipeline(maker: Any, other: asyncpg.Connection, ends: bool) -> None:
    """An error that a pipeline has not delivered yet is known before the COMMIT."""
    with pytest.raises((TransactionAbortedError, psycopg.Error, DBAPIError)):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            raw = await raw_of(session)
            if ends:
                with suppress(psycopg.Error):
                    async with raw.pipeline():
                        await raw.execute("SELECT 1 / 0")
            else:
                pipeline = raw.pipeline()
                await pipeline.__aenter__()
                await raw.execute("SELECT 1 / 0")
    if not ends:
        with suppress(psycopg.Error):
            await pipeline.__aexit__(None, None, None)
    assert await stored(other) == set()


async def test_commit_in_a_pipeline(maker: Any, other: asyncpg.Connection) -> None:
    """A unit that ends inside a pipeline stores what it has sent."""
    async with create_db_context(maker)() as session:
        raw = await raw_of(session)
        await insert(session, 1)
        async with raw.pipeline():
            await raw.execute("INSERT INTO item (id, name) VALUES (2, '')")
            await session.commit()
            assert await stored(other) == {1, 2}
        await insert(session, 3)
    assert await stored(other) == {1, 2, 3}


async def test_deferred_constraint(maker: Any, other: asyncpg.Connection) -> None:
    """An error of the COMMIT itself is an answer, and the connection is used again."""
    pid = await pid_of(maker.kw["bind"])
    with pytest.raises(IntegrityError):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            session.add(Part(id=1, item_id=99))
    assert await stored(other) == set()
    assert await pid_of(maker.kw["bind"]) == pid


async def test_own_transaction_block_of_psycopg(maker: Any, other: asyncpg.Connection) -> None:
    """A COMMIT that psycopg refuses to send is its own error, not a doubt."""
    with pytest.raises(DBAPIError, match="commit"):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            block = (await raw_of(session)).transaction()
            await block.__aenter__()
    assert await stored(other) == set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # psycopg's own
async def test_server_side_cursor(maker: Any, other: asyncpg.Connection) -> None:
    """A stream that is not read to its end does not hinder the COMMIT, and its error aborts."""
    async with create_db_context(maker)() as session:
        await insert(session, 1)
        rows = await session.stream(
            text("SELECT generate_series(1, 1000)").execution_options(yield_per=10)
        )
        await rows.fetchone()
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(maker)() as session:
            await insert(session, 2)
            with pytest.raises(DBAPIError):
                rows = await session.stream(text("SELECT 1 / (n - 3) FROM generate_series(1, 9) n"))
                await rows.all()
    assert await stored(other) == {1}


# Cancellation and loss


@pytest.fixture
async def held_commit(other: asyncpg.Connection) -> AsyncIterator[None]:
    """Each COMMIT after an INSERT into item waits for an advisory lock, 4712."""
    await other.execute(
        """
        CREATE OR REPLACE FUNCTION held() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock(4712); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER held AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION held();
        """
    )
    yield
    await other.execute("DROP FUNCTION held CASCADE")


@pytest.mark.usefixtures("held_commit")
async def test_cancelled_commit(maker: Any, other: asyncpg.Connection) -> None:
    """A COMMIT that is cancelled runs to its end: what the unit says is what is stored."""
    log: list[int] = []

    async def unit(id_: int) -> None:
        async with create_db_context(maker)() as session:
            await insert(session, id_)
            on_commit(session, lambda: log.append(id_))
        await asyncio.sleep(0)
        raise AssertionError("the cancellation is lost")

    async def waits() -> bool:
        look = "SELECT count(*) FROM pg_locks WHERE objid = 4712 AND NOT granted"
        return bool(await other.fetchval(look))

    for id_ in range(1, 5):
        await other.execute("SELECT pg_advisory_lock(4712)")
        task = asyncio.create_task(unit(id_))
        await until(waits)
        task.cancel()
        for _ in range(id_):
            await asyncio.sleep(0)  # it hears of that, in the middle of its COMMIT
        await other.execute("SELECT pg_advisory_unlock(4712)")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (id_ in await stored(other)) == (id_ in log)
    assert log
    assert maker.kw["bind"].pool.checkedout() == 0


async def test_lost_answer_and_lost_before(psycopg_url: str, other: asyncpg.Connection) -> None:
    """A lost answer to the COMMIT is in doubt, and a connection that was lost before is not."""
    async with Proxy.to(psycopg_url) as proxy:
        engine = create_async_engine(proxy.url, poolclass=NullPool)
        db_context = create_db_context(async_sessionmaker(engine))
        for how in ("RST", "FIN", "half"):
            with pytest.raises(CommitUnknownError) as unknown:
                async with db_context() as session:
                    await insert(session, 1)
                    proxy.cut_at_commit(how)
            assert isinstance(unknown.value.__cause__, psycopg.OperationalError)
            await other.execute("TRUNCATE item, part")
        with pytest.raises(OperationalError):
            async with db_context() as session:
                await insert(session, 2)
                raw = await raw_of(session)
                proxy.drop()
                await until(lambda: is_closed(raw))
        await engine.dispose()
    assert await stored(other) == set()


async def test_ended_before_the_commit(maker: Any, other: asyncpg.Connection) -> None:
    """A backend that was ended while the unit did something else has stored nothing for certain,
    and `run_transaction` runs again."""
    attempts: list[int] = []

    async def work(session: AsyncSession) -> None:
        await insert(session, 1)
        attempts.append(1)
        if len(attempts) == 1:
            raw = await raw_of(session)
            await other.execute("SELECT pg_terminate_backend($1, 60000)", raw.info.backend_pid)
            await until(lambda: is_closed(raw))

    await run_transaction(maker, work)
    assert len(attempts) == 2
    assert await stored(other) == {1}


async def test_idle_timeout_before_the_commit(maker: Any, other: asyncpg.Connection) -> None:
    """The timeout of an idle transaction names itself, and is not in doubt."""
    with pytest.raises(DBAPIError) as caught:
        async with create_db_context(maker)() as session:
            await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 10"))
            await insert(session, 1)
            raw = await raw_of(session)
            await until(lambda: is_closed(raw))
    assert not isinstance(caught.value, CommitUnknownError)
    assert await stored(other) == set()


# Connections that must not be pooled


async def test_statement_of_another_task(maker: Any, other: asyncpg.Connection) -> None:
    """A COMMIT beside a statement that runs is refused, the statement is ended on the server, and
    the connection is replaced."""
    pid = await pid_of(maker.kw["bind"])
    with pytest.raises(TransactionStateError, match="another task"):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            pooled: Any = await (await session.connection()).get_raw_connection()
            running = asyncio.create_task(session.execute(text("SELECT pg_sleep(600)")))
            await until(lambda: is_running(pooled))
    with pytest.raises((DBAPIError, asyncio.CancelledError)):
        await running
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"

    async def is_gone() -> bool:
        return await other.fetchval(query, pid) == 0

    await until(is_gone)
    assert await pid_of(maker.kw["bind"]) != pid
    assert await stored(other) == set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # psycopg's own
async def test_copy_that_has_begun(maker: Any, other: asyncpg.Connection) -> None:
    """A COPY that was not ended counts as a statement that runs."""
    with pytest.raises(TransactionStateError, match="another task"):
        async with create_db_context(maker)() as session:
            await insert(session, 1)
            cursor = (await raw_of(session)).cursor()
            copy = cursor.copy("COPY item (id, name) FROM STDIN")
            await copy.__aenter__()
    assert await stored(other) == set()


ACTIVE = psycopg.pq.TransactionStatus.ACTIVE


async def waits(raw: Any) -> Any:
    await raw.execute("SELECT pg_sleep(600)")


async def waits_in_a_copy(raw: Any) -> Any:
    query = "SELECT repeat('x', 9999) UNION ALL SELECT pg_sleep(600)::text"
    async with raw.cursor().copy(f"COPY ({query}) TO STDOUT") as copy:
        async for _ in copy:
            pass


async def has_its_answer(raw: Any) -> Any:
    await raw.execute("SELECT 1")


@pytest.mark.parametrize("work", [waits, waits_in_a_copy, has_its_answer])
async def test_closed_under_a_waiting_task(psycopg_url: str, work: Any) -> None:
    """A connection that is closed while a task waits on it wakes that task, and its socket's number
    is free only then; also where the task finds its answer, and sees nothing of the loss."""
    url = make_url(psycopg_url).set(drivername="postgresql").render_as_string(hide_password=False)
    raw = await psycopg.AsyncConnection.connect(url, autocommit=True)
    number = raw.fileno()
    waiting = asyncio.create_task(work(raw))
    if work is has_its_answer:
        await asyncio.sleep(0)
        assert select.select([number], [], [], 60)[0]  # the task cannot run meanwhile
    else:
        await until(lambda: raw.pgconn.transaction_status == ACTIVE)
        await asyncio.sleep(0.1)
    driver_of(raw).terminate(raw)
    assert os.fstat(number)
    assert driver_of(raw).is_closed(raw)
    async with asyncio.timeout(60):
        with suppress(psycopg.OperationalError):
            await waiting
            assert work is has_its_answer
    await until(lambda: raw.closed)
    driver_of(raw).terminate(raw)  # once more does nothing


def test_closed_at_the_end_of_the_loop(psycopg_url: str) -> None:
    """A connection that is closed under a waiting task is closed where the event loop ends too."""
    url = make_url(psycopg_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connections: list[Any] = []

    async def leave() -> None:
        raw = await psycopg.AsyncConnection.connect(url, autocommit=True)
        connections.append(raw)
        connections.append(asyncio.create_task(waits(raw)))
        await until(lambda: raw.pgconn.transaction_status == ACTIVE)
        driver_of(raw).terminate(raw)

    with suppress(psycopg.OperationalError):
        asyncio.run(leave())
    assert connections[0].closed


async def test_closed_where_a_cancel_would_block(
    psycopg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where libpq can cancel only by blocking the process, a connection is closed without that."""
    cancelled: list[object] = []

    async def cancel_safe(self: object, **_: object) -> None:
        cancelled.append(self)

    monkeypatch.setattr(psycopg.AsyncConnection, "cancel_safe", cancel_safe)
    url = make_url(psycopg_url).set(drivername="postgresql").render_as_string(hide_password=False)
    for is_safe in (False, True):
        monkeypatch.setattr(
            psycopg.capabilities, "has_cancel_safe", lambda is_safe=is_safe: is_safe
        )
        raw = await psycopg.AsyncConnection.connect(url, autocommit=True)
        waiting = asyncio.create_task(waits(raw))
        await until(lambda raw=raw: raw.pgconn.transaction_status == ACTIVE)
        await driver_of(raw).close(raw)
        async with asyncio.timeout(60):
            with pytest.raises(psycopg.OperationalError):
                await waiting
        assert set(cancelled) == ({raw} if is_safe else set())
        await until(lambda raw=raw: raw.closed)


async def test_rollback_that_hangs(
    maker: Any, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose ROLLBACK gets no answer in time is discarded."""
    monkeypatch.setattr(_lifecycle, "ROLLBACK_TIMEOUT", 0.3)
    frozen = 0
    try:
        with pytest.raises(KeyError):
            async with create_db_context(maker)() as session:
                await insert(session, 1)
                frozen = (await raw_of(session)).info.backend_pid
                os.kill(frozen, signal.SIGSTOP)
                raise KeyError
        assert await pid_of(maker.kw["bind"]) != frozen
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert await stored(other) == set()


# The backend


async def test_backend_pid(engine: AsyncEngine) -> None:
    """The pid is that of the backend, and unknown where nothing may be prepared, as behind a
    pooler."""
    async with engine.connect() as connection:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        sync: Any = connection.sync_connection
        assert backend_pid(sync) == pid
        (await connection.get_raw_connection()).driver_connection.prepare_threshold = None  # type: ignore[union-attr]
        assert backend_pid(sync) is None


# Options


@pytest.mark.parametrize("own", [True, False], ids=["get_transaction", "execution_options"])
async def test_options_of_a_read_only_role(
    psycopg_url: str, other: asyncpg.Connection, own: bool
) -> None:
    """Options end with their transaction: a role that is read-only by default stays so, and its
    isolation level is the one that it has now. Options of the caller's own end likewise."""
    engine = create_async_engine(
        psycopg_url,
        pool_size=1,
        max_overflow=0,
        connect_args={"options": "-c default_transaction_read_only=on"},
    )
    maker = async_sessionmaker(engine)
    options: dict[str, Any] = {"isolation_level": "SERIALIZABLE"}
    for names in (
        options | {"read_only": True, "deferrable": True},
        options | {"postgresql_readonly": True, "postgresql_deferrable": True},
    ):
        async with maker() as session:
            if own != ("read_only" in names):
                continue
            if own:
                async with get_transaction(session, **names):
                    await session.execute(text("SELECT 1"))
            else:
                async with get_transaction(session):
                    await session.connection(execution_options=names)
                    await session.execute(text("SELECT 1"))
            raw = await raw_of(session)
            assert (raw.isolation_level, raw.read_only, raw.deferrable) == (None, None, None)
            assert await session.scalar(text("SHOW transaction_read_only")) == "on"
            assert await session.scalar(text("SHOW transaction_isolation")) == "read committed"
    await engine.dispose()


async def test_isolation_level_of_the_engine(psycopg_url: str) -> None:
    """After a transaction with another level the engine's own level is back."""
    engine = create_async_engine(psycopg_url, pool_size=1, isolation_level="REPEATABLE READ")
    maker = async_sessionmaker(engine)
    async with maker() as session:
        async with get_transaction(session, isolation_level="SERIALIZABLE"):
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
        async with get_transaction(session):
            assert await session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    await engine.dispose()


# Wrappers


class Loose:
    """A proxy that passes on what it does not know, and keeps attributes to itself."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class Slotted:
    """A proxy that takes no attribute."""

    __slots__ = ("_wrapped",)

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "_wrapped", wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class Subclass(psycopg.AsyncConnection[Any]):
    """A class of the caller's own."""


@pytest.fixture
async def emptied(other: asyncpg.Connection) -> AsyncIterator[None]:
    yield
    await other.execute("TRUNCATE item, part")


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("kind", ["pool", "subclass", "loose", "slotted"])
async def test_wrapped(psycopg_url: str, other: asyncpg.Connection, kind: str) -> None:
    """Commits, callbacks, honesty and losses are as with psycopg's own connection, and the pool of
    psycopg gives connections afterwards."""
    async with Proxy.to(psycopg_url) as proxy:
        url = plain_url(proxy.url)
        pool = AsyncConnectionPool(url, min_size=1, max_size=2, open=False, close_returns=True)
        if kind == "pool":
            await pool.open(wait=True)

        async def create() -> Any:
            if kind == "pool":
                return await pool.getconn(timeout=60)
            cls = Subclass if kind == "subclass" else psycopg.AsyncConnection
            raw = await cls.connect(url)
            return {"loose": Loose, "slotted": Slotted}.get(kind, lambda each: each)(raw)

        engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=create,
            poolclass=NullPool,
            use_native_hstore=False,
        )
        db_context = create_db_context(async_sessionmaker(engine))
        log: list[str] = []
        async with db_context() as session:
            await insert(session, 1)
            on_commit(session, lambda: log.append("end"))
            async with get_transaction(session):
                await insert(session, 2)
        assert log == ["end"]
        with pytest.raises(TransactionAbortedError, match="did not see"):
            async with db_context() as session:
                await insert(session, 3)
                with pytest.raises(psycopg.Error):
                    await (await raw_of(session)).execute("SELECT 1 / 0")
        with pytest.raises(TransactionAbortedError):
            async with db_context() as session:
                await swallow_error(session)
        for _ in range(3):
            with pytest.raises(CommitUnknownError):
                async with db_context() as session:
                    await session.execute(text("SELECT 1"))
                    proxy.cut_at_commit("RST")
        async with db_context() as session:
            await insert(session, 4)
        await engine.dispose()
        await pool.close()
    assert await stored(other) == {1, 2, 4}


@pytest.mark.parametrize("way", ["invalidate", "dispose"])
async def test_closed_below_a_task(maker: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """psycopg does not free a connection on which a task waits for an answer, whoever closes it."""
    close = psycopg.AsyncConnection.close
    freed: list[bool] = []

    async def noted(raw: psycopg.AsyncConnection[Any]) -> None:
        freed.append(raw.lock.locked())
        if not raw.lock.locked():
            await close(raw)

    monkeypatch.setattr(psycopg.AsyncConnection, "close", noted)
    engine: AsyncEngine = maker.kw["bind"]
    see(engine)
    connection = await engine.connect()
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    task = asyncio.ensure_future(raw.execute("SELECT pg_sleep(2)"))
    await until(raw.lock.locked)
    if way == "invalidate":
        await connection.invalidate()
    else:
        entry = (await connection.get_raw_connection())._connection_record
        await connection.run_sync(lambda _: entry.close())
    with pytest.raises(psycopg.Error):
        await task
    await connection.invalidate()
    await connection.close()
    assert True not in freed
