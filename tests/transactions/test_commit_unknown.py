"""Section 1 of the contract, "in doubt": a connection that is lost between the sending of COMMIT
and its answer is `CommitUnknownError`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    PgToolsetError,
    TransactionAbortedError,
    TransactionStateError,
    cleanup_tables,
    create_database,
    create_db_context,
    create_db_dependency,
    drop_database,
    errors,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset._postgres.connections import is_closed
from pgtoolset._postgres.sqlstates import refuses_commit
from pgtoolset.testing import create_db_session
from tests.proxy import Cut, Direction, How, Proxy
from tests.support import (
    DRIVER,
    DRIVER_ERROR,
    Base,
    Item,
    Part,
    insert,
    pid_of,
    raw_of,
    stored,
    until,
)

Maker = async_sessionmaker[AsyncSession]

#: The work of a place stores item 1, registers a callback that logs, and commits through `cut`.
Place = Callable[["Lab"], Awaitable[None]]


class Lab:
    """An engine whose connections run through a proxy, and what its callbacks have logged."""

    def __init__(self, proxy: Proxy, engine: AsyncEngine) -> None:
        self.proxy = proxy
        self.engine = engine
        self.maker: Maker = async_sessionmaker(engine, expire_on_commit=False)
        self.log: list[str] = []
        self.cut: Callable[[], None] = lambda: None

    async def write(self, session: AsyncSession, id_: int = 1) -> None:
        await insert(session, id_)
        on_commit(session, lambda: self.log.append(f"callback {id_}"))


@pytest.fixture
async def lab(database_url: str, other: asyncpg.Connection) -> AsyncIterator[Lab]:
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(
            proxy.url,
            pool_size=2,
            max_overflow=0,
            connect_args={"command_timeout": 60} if DRIVER == "asyncpg" else {},
        )
        try:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
            yield Lab(proxy, engine)
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        finally:
            await engine.dispose()
            # A COMMIT that was sent may still hold its locks.
            await other.execute("TRUNCATE item, part, account")


# Places that commit


async def context(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()


async def generator(lab: Lab) -> None:
    async for session in create_db_dependency(lab.maker)():
        await lab.write(session)
        lab.cut()


async def block(lab: Lab) -> None:
    async with lab.maker() as session, get_transaction(session):
        await lab.write(session)
        lab.cut()


async def block_with_options(lab: Lab) -> None:
    async with (
        lab.maker() as session,
        get_transaction(session, isolation_level="SERIALIZABLE", durable=True),
    ):
        await lab.write(session)
        lab.cut()


async def flush_at_the_end(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: lab.log.append("callback 1"))
        session.add(Item(id=1))
        lab.cut()


async def retried(lab: Lab) -> None:
    async def work(session: AsyncSession) -> None:
        lab.log.append("attempt")
        await lab.write(session)
        lab.cut()

    try:
        await run_transaction(lab.maker, work)
    finally:
        assert lab.log == ["attempt"]  # never retried, and no callback
        lab.log.clear()


async def explicit(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        await session.commit()


async def explicit_in_a_block(lab: Lab) -> None:
    async with lab.maker() as session, get_transaction(session):
        await lab.write(session)
        lab.cut()
        await session.commit()


async def transaction_object(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        transaction = session.get_transaction()
        assert transaction is not None
        await transaction.commit()


async def in_run_sync(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        await session.run_sync(lambda sync: sync.commit())


async def plain_session_with_a_callback(lab: Lab) -> None:
    async with lab.maker() as session:
        await lab.write(session)
        lab.cut()
        await session.commit()


async def plain_begin_with_a_callback(lab: Lab) -> None:
    async with lab.maker() as session, session.begin():
        await lab.write(session)
        lab.cut()


async def swallowed(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()


async def swallowed_in_a_block(lab: Lab) -> None:
    async with lab.maker() as session, get_transaction(session):
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()


async def swallowed_in_a_nested_block(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(CommitUnknownError):
            async with get_transaction(session):
                await lab.write(session)
                lab.cut()
                with suppress(Exception):
                    await session.commit()


async def swallowed_twice(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        for _ in range(2):
            try:
                await session.commit()
            except CommitUnknownError as error:
                assert error.phase == "commit"


async def swallowed_and_rolled_back(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()
        await session.rollback()


async def swallowed_and_more_work(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()
        await session.rollback()
        await lab.write(session, 2)


async def swallowed_and_more_commits(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()
        await session.rollback()
        await lab.write(session, 2)
        transaction = session.get_transaction()
        assert transaction is not None
        for commit in (session.commit, transaction.commit):
            with pytest.raises(CommitUnknownError):
                await commit()


async def swallowed_and_closed(lab: Lab) -> None:
    async with create_db_context(lab.maker)() as session:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()
        await session.close()


AT_THE_END: list[Place] = [context, generator, block, block_with_options, flush_at_the_end, retried]
EXPLICIT: list[Place] = [
    explicit,
    explicit_in_a_block,
    transaction_object,
    in_run_sync,
    plain_session_with_a_callback,
    plain_begin_with_a_callback,
]
SWALLOWED: list[Place] = [
    swallowed,
    swallowed_in_a_block,
    swallowed_in_a_nested_block,
    swallowed_twice,
    swallowed_and_rolled_back,
    swallowed_and_more_work,
    swallowed_and_more_commits,
    swallowed_and_closed,
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("how", ["RST", "FIN", "half"])
@pytest.mark.parametrize("direction", ["to server", "to client"])
@pytest.mark.parametrize("place", [*AT_THE_END, *EXPLICIT, *SWALLOWED], ids=name_of)
async def test_lost_answer(
    lab: Lab, other: asyncpg.Connection, place: Place, direction: Direction, how: How
) -> None:
    """In doubt: at every place that commits, also where the block swallowed the driver's error."""
    lab.cut = lambda: lab.proxy.cut_at_commit(how, direction)
    with pytest.raises(CommitUnknownError) as caught:
        await place(lab)
    assert caught.value.phase == ("end" if place in AT_THE_END else "commit")
    assert type(caught.value.__cause__).__module__.startswith((DRIVER, "builtins"))
    assert "may have stored" in str(caught.value)
    assert lab.log == []
    # What came after the unknown commit is never stored.
    expected = {1} if direction == "to client" else set()
    await until(lambda: _stored_is(other, expected))
    async with create_db_context(lab.maker)() as session:
        await insert(session, 3)  # no broken connection is in the pool
    assert await stored(other) == expected | {3}


async def _stored_is(other: asyncpg.Connection, ids: set[int]) -> bool:
    return await stored(other) == ids


@pytest.mark.asyncpg(reason="psycopg has no time limit for an answer")
@pytest.mark.parametrize("place", [retried, swallowed], ids=name_of)
async def test_no_answer_in_time(
    database_url: str, other: asyncpg.Connection, place: Place
) -> None:
    """In doubt: asyncpg's `command_timeout`, which gives a builtin TimeoutError without a message;
    the connection is closed, because its answer may still arrive."""
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(
            proxy.url,
            pool_size=1,
            max_overflow=0,
            connect_args={"command_timeout": 2},
        )
        lab = Lab(proxy, engine)
        lab.cut = lambda: proxy.cut_at_commit("silence")
        with pytest.raises(CommitUnknownError, match="TimeoutError") as caught:
            await place(lab)
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert lab.log == []
        accepted = proxy.accepted
        async with create_db_context(lab.maker)() as session:
            await insert(session, 2)
        assert proxy.accepted > accepted
        await engine.dispose()
    assert await stored(other) == {1, 2}
    await other.execute("TRUNCATE item, part")


@pytest.mark.parametrize("place", [context, explicit, block], ids=name_of)
async def test_lost_before_the_commit(lab: Lab, other: asyncpg.Connection, place: Place) -> None:
    """A connection that the driver knows to be lost before COMMIT is sent is not in doubt: the
    error is the driver's, and nothing is stored."""

    async def lost(session: AsyncSession, id_: int = 1) -> None:
        await insert(session, id_)
        raw = await raw_of(session)
        lab.proxy.drop()
        await until(lambda: is_closed(raw))

    lab.write = lost  # type: ignore[method-assign]
    with pytest.raises(DBAPIError):
        await place(lab)
    assert await stored(other) == set()


async def test_lost_before_the_commit_and_swallowed(lab: Lab, other: asyncpg.Connection) -> None:
    """Where the block swallowed that error, its end says that nothing is stored."""
    with pytest.raises(TransactionAbortedError, match="lost"):
        async with create_db_context(lab.maker)() as session:
            await insert(session, 1)
            lab.proxy.drop()
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1"))
    assert await stored(other) == set()


async def test_statement_that_runs(lab: Lab, other: asyncpg.Connection) -> None:
    """A COMMIT that is refused, because a statement is still running on the connection, is not in
    doubt: asyncpg refuses it, and psycopg would send it after the statement. The connection is
    closed: its transaction is still open."""
    running: list[asyncio.Task[Any]] = []
    pid = 0
    refusal: type[Exception] = DBAPIError if DRIVER == "asyncpg" else TransactionStateError
    with pytest.raises(refusal, match=r"another (operation is in progress|task)"):
        async with create_db_context(lab.maker)() as session:
            await insert(session, 1)
            raw = await raw_of(session)
            running.append(asyncio.create_task(raw.execute("SELECT pg_sleep(60)")))
            await asyncio.sleep(0)
            pid = pid_of(raw)
    with pytest.raises(DRIVER_ERROR):
        await running[0]
    await other.execute(f"SELECT pg_terminate_backend({pid}, 60000)")
    assert await stored(other) == set()
    async with create_db_context(lab.maker)() as session:
        await insert(session, 2)
    assert await stored(other) == {2}


async def test_without_a_statement(lab: Lab) -> None:
    """Where no statement was run, no COMMIT is sent, and there is nothing to doubt."""
    log: list[str] = []
    async with create_db_context(lab.maker)() as session:
        await session.connection()
        on_commit(session, lambda: log.append("callback"))
        lab.proxy.drop()
    assert log == ["callback"]


async def test_refused_commit(lab: Lab, other: asyncpg.Connection) -> None:
    """PostgreSQL's error as the answer to COMMIT is not in doubt, and propagates unchanged."""
    with pytest.raises(IntegrityError):
        async with create_db_context(lab.maker)() as session:
            session.add(Part(id=1, item_id=99))
    assert await stored(other) == set()


async def test_cancelled_at_the_commit(lab: Lab) -> None:
    """A cancellation that arrives while the answer is awaited does not hide that it is unknown."""
    cuts: list[None] = []

    def cut() -> None:
        lab.proxy.cut_at_commit("silence")
        cuts.append(None)

    lab.cut = cut
    outcome: list[BaseException] = []

    async def work() -> None:
        try:
            await context(lab)
        except BaseException as error:
            outcome.append(error)
        await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await until(lambda: bool(cuts) and lab.proxy.cut is None)
    task.cancel()
    await asyncio.sleep(0)
    assert outcome == []
    lab.proxy.drop()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(each) for each in outcome] == [CommitUnknownError]


async def test_cleanup_tables(lab: Lab, other: asyncpg.Connection) -> None:
    """In doubt: the commit of `cleanup_tables`."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    async with lab.maker() as session:
        lab.proxy.cut_at_commit("RST")
        with pytest.raises(CommitUnknownError) as caught:
            await cleanup_tables(session, Base)
    assert caught.value.phase == "end"


async def test_db_session(empty_database: str) -> None:
    """In doubt: the commit with which `create_db_session` creates its tables. That which drops them
    is sent again, because it may be."""
    async with Proxy.to(empty_database) as proxy:
        proxy.cut_at_commit("RST")
        with pytest.raises(CommitUnknownError) as caught:
            async with create_db_session(proxy.url, Base):
                raise AssertionError
        assert caught.value.phase == "end"
        async with create_db_session(proxy.url, Base):
            proxy.cut_at_commit("RST")
        assert proxy.cut is None


# In a request


@pytest.fixture
def app(lab: Lab) -> FastAPI:
    app = FastAPI()
    db: Any = Depends(create_db_dependency(lab.maker))

    @app.post("/end", status_code=201)
    async def end(session: AsyncSession = db) -> None:
        await lab.write(session)
        lab.cut()

    @app.post("/swallowed", status_code=201)
    async def swallowed(session: AsyncSession = db) -> None:
        await lab.write(session)
        lab.cut()
        with suppress(Exception):
            await session.commit()

    @app.post("/rolled-back", status_code=201)
    async def rolled_back(session: AsyncSession = db) -> None:
        await swallowed(session)
        await session.rollback()

    @app.post("/stream", status_code=201)
    async def stream(session: AsyncSession = db) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await lab.write(session)
            lab.cut()

        return StreamingResponse(body(), status_code=201)

    return app


@pytest.mark.parametrize("path", ["/end", "/swallowed", "/rolled-back"])
async def test_request(lab: Lab, app: FastAPI, other: asyncpg.Connection, path: str) -> None:
    """In doubt: a request whose commit is unknown is answered by an error, never by a 2xx."""
    lab.cut = lambda: lab.proxy.cut_at_commit("RST")
    seen: list[CommitUnknownError] = []

    @app.exception_handler(CommitUnknownError)
    async def handler(request: object, error: CommitUnknownError) -> Any:
        seen.append(error)
        return PlainTextResponse("unknown", status_code=503)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        response = await client.post(path)
    assert response.status_code == 503
    assert [error.phase for error in seen] == ["end" if path == "/end" else "commit"]
    assert lab.log == []
    assert await stored(other) == {1}


async def test_stream(lab: Lab, app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """In doubt: the commit at the end of a stream, whose response has started, raises for the
    server's log."""
    lab.cut = lambda: lab.proxy.cut_at_commit("RST")
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        with pytest.raises(CommitUnknownError) as caught:
            await client.post("/stream")
    assert caught.value.phase == "end"
    assert lab.log == []


# The error


def test_error() -> None:
    """It is a PgToolsetError and a ConnectionError, and no TimeoutError; every module that its
    reader looks in has it."""
    assert issubclass(CommitUnknownError, PgToolsetError)
    assert issubclass(CommitUnknownError, ConnectionError)
    assert not issubclass(CommitUnknownError, (TimeoutError, TransactionAbortedError))
    assert errors.CommitUnknownError is CommitUnknownError


def answer(state: str, severity: str, driver: str = "asyncpg") -> Exception:
    """Return the driver's error for a message of a server that speaks German."""
    fields = {"S": "FEHLER", "V": severity, "C": state, "M": "message"}
    if driver == "asyncpg":
        return asyncpg.PostgresError.new(fields)
    try:
        kind = psycopg.errors.lookup(state)
    except KeyError:
        kind = psycopg.DatabaseError
    return kind("message", info={ord(code): text.encode() for code, text in fields.items()})


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    ("state", "severity", "is_refusal"),
    [
        ("40001", "ERROR", True),
        ("40P01", "ERROR", True),
        ("23503", "ERROR", True),
        ("23505", "ERROR", True),
        ("57014", "ERROR", True),
        ("53100", "ERROR", True),
        ("P0001", "ERROR", True),
        ("XX000", "ERROR", True),
        ("25P03", "FATAL", True),
        ("57P01", "FATAL", False),
        ("57P02", "WARNING", False),
        ("57P03", "FATAL", False),
        ("57P05", "FATAL", False),
        ("25P04", "FATAL", False),
        ("XX000", "PANIC", False),
        # Of poolers, and of databases that commit elsewhere.
        ("08P01", "ERROR", False),
        ("08006", "ERROR", False),
        ("08007", "ERROR", False),
        ("57P01", "ERROR", False),
        ("40003", "ERROR", False),
    ],
)
def test_answers(state: str, severity: str, is_refusal: bool, driver: str) -> None:
    """Which answers to a COMMIT say that it was rolled back, whatever the server's language."""
    assert refuses_commit(answer(state, severity, driver)) is is_refusal


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        OSError(),
        asyncio.CancelledError(),
        asyncpg.InterfaceError("x"),
        asyncpg.InternalClientError("x"),
        asyncpg.ConnectionDoesNotExistError("x"),
        psycopg.OperationalError("x"),
        psycopg.InterfaceError("x"),
        psycopg.errors.UniqueViolation("x"),  # the class alone says nothing
    ],
    ids=repr,
)
def test_no_answer(error: BaseException) -> None:
    """An error of the client's side is no answer of PostgreSQL."""
    assert not refuses_commit(error)


def test_end_of_an_idle_transaction() -> None:
    """The timeout of an idle transaction ends it before the COMMIT is read, although asyncpg then
    reports a lost connection."""
    lost = asyncpg.ConnectionDoesNotExistError("lost")
    lost.__cause__ = answer("25P03", "FATAL")
    assert refuses_commit(lost)


# Statements that commit by themselves


@pytest.mark.parametrize("statement", ["CREATE DATABASE", "DROP DATABASE"])
async def test_statement(server_url: str, statement: str) -> None:
    """In doubt: the answer to a statement that commits by itself, of a whole database."""
    name = "pgtoolset in doubt"
    async with Proxy.to(server_url) as proxy:
        if statement == "DROP DATABASE":
            await create_database(name, server_url=server_url)
        proxy.cut = Cut("to client", lambda chunk: statement.encode() in chunk, "RST")
        with pytest.raises(CommitUnknownError) as caught:
            if statement == "CREATE DATABASE":
                await create_database(name, server_url=proxy.url)
            else:
                await drop_database(name, server_url=proxy.url)
    assert caught.value.phase == "statement"
    await drop_database(name, server_url=server_url, missing_ok=True)
