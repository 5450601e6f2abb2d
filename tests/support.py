"""Tables and small tools of the tests."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, LiteralString

import asyncpg
import psycopg
import uvicorn
from psycopg import sql
from sqlalchemy import ForeignKey, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: The driver of the engines that the fixtures give: `make test DRIVER=psycopg`. A connection beside
#: them, which only looks or stands in the way, is always one of asyncpg.
DRIVER = os.environ.get("DRIVER") or "asyncpg"

#: The name of the driver in a URL for SQLAlchemy.
DRIVERNAME = f"postgresql+{DRIVER}"

#: The root of the driver's errors.
DRIVER_ERROR: type[Exception] = asyncpg.PostgresError if DRIVER == "asyncpg" else psycopg.Error


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Part(Base):
    """Its foreign key is checked at the commit."""

    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(
        ForeignKey("item.id", deferrable=True, initially="DEFERRED")
    )


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)


def examples(number: int) -> int:
    """The examples of a property that needs a server; `EXAMPLES=20 make test` takes 20 times as
    many."""
    return number * int(os.environ.get("EXAMPLES", "1"))


def sqlalchemy_url(url: str) -> str:
    """The URL for the driver of this run."""
    return f"{DRIVERNAME}://" + url.partition("://")[2]


def plain_url(url: str) -> str:
    return "postgresql://" + url.partition("://")[2]


def connect_args(**settings: str) -> dict[str, Any]:
    """The arguments of the driver that give a connection settings of PostgreSQL."""
    if DRIVER == "asyncpg":
        return {"server_settings": settings}
    values = {
        name: value.replace("\\", r"\\").replace(" ", r"\ ") for name, value in settings.items()
    }
    return {"options": " ".join(f"-c {name}={value}" for name, value in values.items())}


async def send_past(connection: AsyncConnection, statement: str) -> None:
    """Run a statement on the connection of the driver, which SQLAlchemy does not see."""
    raw: Any = await connection.get_raw_connection()
    await raw.driver_connection.execute(statement)


async def raw_of(session: AsyncSession) -> Any:
    """Return the connection of the driver below a session, which stays checked out."""
    pooled: Any = await (await session.connection()).get_raw_connection()
    return pooled.driver_connection


def pid_of(raw: Any) -> int:
    """Return the process id of the backend of a connection of the driver."""
    return int(raw.get_server_pid() if DRIVER == "asyncpg" else raw.info.backend_pid)


async def insert(session: AsyncSession, *ids: int) -> None:
    """Insert items by a statement, not through the unit of work."""
    for id_ in ids:
        await session.execute(text("INSERT INTO item (id, name) VALUES (:id, '')"), {"id": id_})


async def swallow_error(session: AsyncSession) -> BaseException:
    """Run a statement that fails, and return the error."""
    try:
        await session.execute(text("SELECT 1 / 0"))
    except Exception as error:
        return error
    raise AssertionError("the statement did not fail")


async def stored(connection: asyncpg.Connection) -> set[int]:
    """Return the ids of the items that another connection sees."""
    return {row["id"] for row in await connection.fetch("SELECT id FROM item")}


def set_aside_what_lives() -> None:
    """Take what lives now away from the garbage collector, for as long as it lives.

    Modules and tests are half a million of objects, which it would visit each time that it is
    called. A test that calls it often sets aside what the tests before it have added.
    """
    gc.collect()
    gc.freeze()


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 60.0) -> None:
    """Wait until `condition()` holds; fail where it does not in time on a busy machine."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline, f"{condition} did not hold within {seconds} s"
        await asyncio.sleep(0.01)


async def at_best(attempt: Callable[[], Awaitable[bool]], tries: int = 10) -> None:
    """Run `attempt()` until it is in time; fail where it is late each time.

    A busy machine may be late at any time, and a fault always is.
    """
    for _ in range(tries):
        if await attempt():
            return
    raise AssertionError(f"{attempt} was late {tries} times")


@asynccontextmanager
async def roles(url: str, *names: str) -> AsyncIterator[None]:
    """Make roles of a server for a block, and drop them with what they own in the database.

    A role outlives its database: one that an interrupted test has left is dropped at first.
    """
    await _drop_roles(url, names)
    try:
        connection = await asyncpg.connect(plain_url(url))
        try:
            await connection.execute("; ".join(f'CREATE ROLE "{name}" LOGIN' for name in names))
        finally:
            await connection.close()
        yield
    finally:
        await _drop_roles(url, names)


async def _drop_roles(url: str, names: tuple[str, ...]) -> None:
    connection = await asyncpg.connect(plain_url(url))
    try:
        look = "SELECT quote_ident(rolname) FROM pg_roles WHERE rolname = ANY($1)"
        for (name,) in await connection.fetch(look, names):
            await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
    finally:
        await connection.close()


class Standing:
    """A connection that stays from test to test; it is made again where a test has ended it.

    It belongs to no event loop: one that each test made in its own would cost more than many a
    test does.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = plain_url(url)
        self._name = name
        self._connection: psycopg.Connection | None = None

    def execute(self, statement: LiteralString | sql.Composed, *values: Any) -> psycopg.Cursor:
        """Execute statements in the place of a test."""
        if self._connection is not None:
            try:
                return self._connection.execute(statement, values or None)
            except psycopg.OperationalError:
                self._connection.close()  # a test has ended every session
        self._connection = psycopg.connect(self._url, autocommit=True, application_name=self._name)
        return self._connection.execute(statement, values or None)

    def value(self, statement: LiteralString, *values: Any) -> Any:
        """Return the value that a query finds."""
        (value,) = self.execute(statement, *values).fetchone() or (None,)
        return value

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Renewer(Standing):
    """Makes a database anew, by a connection to another one of its server."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "renewer")

    def make_anew(self, url: str) -> None:
        """Replace a database by an empty one of the same name, owner's mark and all.

        A publication, an extension or a default privilege outlives each schema, and what an
        interrupted test leaves has no list; nothing outlives its database.
        """
        name = make_url(url).database
        assert name is not None
        mark = self.value(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", name
        )
        # A copy of the files costs half of what the pages in the WAL do.
        copies = self.value("SELECT current_setting('server_version_num')::int >= 150000")
        strategy = sql.SQL("STRATEGY file_copy" if copies else "")
        named = sql.Identifier(name)
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(named))
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 {}").format(named, strategy))
        self.execute(sql.SQL("COMMENT ON DATABASE {} IS {}").format(named, mark))

    async def until_nothing_is_open(self, url: str) -> None:
        """Wait until no session of a database is in a transaction; one that stays is a leak."""
        look = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND xact_start IS NOT NULL"
        name = make_url(url).database
        await until(lambda: self.value(look, name) == 0)


class Cleaner(Standing):
    """Empties the tables of `Base`."""

    _IDLE = """
        SELECT NOT EXISTS (
            SELECT FROM pg_stat_activity WHERE datname = current_database()
            AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'
        )
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, "cleaner")

    async def empty(self) -> None:
        """Empty the tables as soon as no session is in a transaction; one that stays is a leak."""
        await until(lambda: bool(self.value(self._IDLE)))
        tables = reversed(Base.metadata.sorted_tables)
        self.execute("; ".join(f'DELETE FROM "{table.name}"' for table in tables))


class Interrupted:
    """A coroutine whose task is cancelled during its `at`-th suspension."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int) -> None:
        self._work = work
        self._at = at
        self.suspensions = 0

    @property
    def happened(self) -> bool:
        return self.suspensions >= self._at

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        task = asyncio.current_task()
        assert task is not None
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                future = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration as stop:
                return stop.value
            finally:
                error = None  # or this frame and the error would keep each other, and a connection
            answer = error = None
            self.suspensions += 1
            if self.suspensions == self._at:
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                answer = yield future
            except BaseException as thrown:
                error = thrown


async def interrupt_everywhere(
    work: Callable[[int], Coroutine[Any, Any, None]],
    check: Callable[[int], Awaitable[None]],
    limit: int = 500,
) -> int:
    """Run `work(n)` with a cancellation at its n-th suspension, then `check(n)`, for each
    suspension."""
    for n in range(1, limit):
        interrupted = Interrupted(work(n), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=60)
        assert task.done(), f"hangs when it is cancelled at suspension {n}"
        if not task.cancelled() and task.exception() is not None:
            await task
        await check(n)
        if not interrupted.happened:
            return n - 1
    raise AssertionError(f"not finished after {limit} suspensions")


class QuietServer(uvicorn.Server):
    """A server that leaves the signals of the process to pytest."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """Serve `app` with uvicorn on a free port of the loopback interface; yield the port."""
    server = QuietServer(
        uvicorn.Config(
            app,
            port=0,
            log_level="critical",
            lifespan="off",
            ws="none",
            timeout_keep_alive=3600,  # or a slow client meets a connection that was just closed
        )
    )
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task
