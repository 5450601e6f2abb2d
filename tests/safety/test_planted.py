"""Each name in the library's own SQL is PostgreSQL's, whatever a stranger plants in the path."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

import pgtoolset
import pgtoolset.testing
from pgtoolset import (
    DeadlineExceededError,
    LockMode,
    ReadReplicas,
    RowWatcher,
    TransactionStateError,
    advisory_lock,
    cleanup_tables,
    create_database,
    create_db_context,
    create_db_dependency,
    create_read_dependency,
    deadline,
    driver_connection,
    drop_database,
    get_transaction,
    holders,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    on_commit,
    release_connection,
    row_change_trigger,
    run_transaction,
    wait_for_row_change,
    warn_of_idle_transactions,
)
from pgtoolset._commands import COMMANDS
from pgtoolset._postgres.commit_status import confirm, end_backend, look, trace
from pgtoolset.cli import main
from pgtoolset.databases import seal_database
from pgtoolset.errors import (
    DatabaseInUseError,
    LockTimeoutError,
    OutsideReferenceError,
    TransactionAbortedError,
    TransactionLostError,
)
from pgtoolset.observe import subscribe
from pgtoolset.testing import create_db_session, create_test_client, create_worker_database
from pgtoolset.testing.templates import template_database
from pytest_pgtoolset._joined import Connections
from tests.proxy import Direction, Proxy
from tests.safety.shelf import Base, Book, Given, Pair, Seat, Tag, loose_tag, noted_tag
from tests.support import connect_args, plain_url, sqlalchemy_url, until

DIRECTIONS: list[Direction] = ["to client", "to server"]


@dataclass
class Place:
    """A database with the tables of `shelf`, in which `evil` comes first in the search_path."""

    url: str
    engine: AsyncEngine
    maker: async_sessionmaker[AsyncSession]

    @asynccontextmanager
    async def locked(self, statement: str) -> AsyncIterator[asyncpg.Connection]:
        """Open a transaction of another session that has run a statement."""
        other = await asyncpg.connect(plain_url(self.url))
        try:
            await other.execute(f"BEGIN; {statement}")
            yield other
        finally:
            await other.close()


@pytest.fixture
async def place(planted_url: str) -> AsyncIterator[Place]:
    engine = create_async_engine(sqlalchemy_url(planted_url), pool_size=5)
    # Another engine, so that no connection of the first one keeps a safe path.
    setup = create_async_engine(
        sqlalchemy_url(planted_url),
        poolclass=NullPool,
        connect_args=connect_args(search_path="public"),
    )
    async with setup.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Tag), [{"id": n} for n in range(1, 51)])
        await connection.execute(insert(Book), [{"id": n, "title": "t"} for n in range(1, 51)])
        await connection.execute(insert(Seat), [{"id": n, "row": n} for n in range(1, 5)])
        await connection.execute(insert(Pair), [{"a": n, "b": n} for n in range(1, 51)])
        await connection.execute(insert(Given), [{"id": n} for n in range(1, 51)])
    yield Place(planted_url, engine, async_sessionmaker(engine, expire_on_commit=False))
    await engine.dispose()
    async with setup.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


Call: TypeAlias = Callable[[Place], Awaitable[None]]
CALLS: list[Any] = []


def call(function: Call) -> Call:
    CALLS.append(pytest.param(function, id=function.__name__))
    return function


def call_of_asyncpg(function: Call) -> Call:
    mark = pytest.mark.asyncpg(reason="RowWatcher")
    CALLS.append(pytest.param(function, id=function.__name__, marks=mark))
    return function


@pytest.mark.parametrize("use", CALLS)
async def test_planted_names_are_never_found(place: Place, use: Call) -> None:
    """Every public function and command works where each name in the path is a stranger's."""
    await use(place)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_catalog.quote_ident(c.relname) FROM pg_class AS c",
        "SELECT quote_ident(c.relname) FROM pg_catalog.pg_class AS c",
        "SELECT unnest(CAST('{1}' AS integer[]))",
        "SELECT c.relname || CAST('x' AS pg_catalog.text) FROM pg_catalog.pg_class AS c",
        "SELECT count(*)",
        "SELECT row_number() OVER ()",
        "SELECT format('%I', c.relname) FROM pg_catalog.pg_class AS c",
        "SELECT 1 FROM pg_catalog.pg_class AS c WHERE c.oid = c.relowner",
        "SELECT 1 FROM pg_catalog.pg_class AS c WHERE c.oid IS DISTINCT FROM c.relowner",
        "SELECT 1 FROM pg_catalog.pg_class AS c WHERE c.relkind IN ('r', 'p')",
        "SELECT CAST('x' AS text)",
        "DO $$ DECLARE t text; BEGIN t := 'x'; END $$",
    ],
)
async def test_a_name_without_a_schema_is_noticed(planted_server: str, statement: str) -> None:
    """A statement of ours with one name that has no schema would fail here."""
    connection = await asyncpg.connect(
        plain_url(planted_server), server_settings={"search_path": "evil, pg_catalog, public"}
    )
    try:
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute(statement)
    finally:
        await connection.close()


@call
async def read_replicas(place: Place) -> None:
    replicas = ReadReplicas(place.maker, [place.maker])
    async with place.maker() as session:
        await session.execute(text("SET LOCAL synchronous_commit = off"))
        session.add(Book(id=200))
        await session.commit()
        token = await replicas.position(session)
        await session.execute(select(1))
        assert await replicas.position(session)
    for isolation_level in ("READ COMMITTED", "REPEATABLE READ"):
        async with replicas.read(after=token, isolation_level=isolation_level) as session:
            await session.get_one(Book, 200)
    async for session in create_read_dependency(replicas)():
        await session.get_one(Book, 200)

    async def work(session: AsyncSession) -> Book:
        return await session.get_one(Book, 200)

    assert await replicas.run(work, after="the primary")
    app = FastAPI()
    replicas.install(app)
    get_db = create_db_dependency(place.maker, replicas=replicas)
    needs_db = Depends(get_db)

    @app.post("/")
    async def write(session: AsyncSession = needs_db) -> None:
        await session.execute(text("SET LOCAL synchronous_commit = off"))
        session.add(Book(id=201))

    async with create_test_client(app) as client:
        assert (await client.post("/")).headers["X-Read-Token"].count(".") == 3


@call
async def sessions_and_transactions(place: Place) -> None:
    called: list[int] = []
    async with create_db_context(place.maker)() as session:
        session.add(Book(id=100))
        on_commit(session, lambda: called.append(1))
        async with get_transaction(session):
            await session.flush()
    async for session in create_db_dependency(place.maker)():
        await session.get_one(Book, 100)
    options: list[dict[str, Any]] = [
        {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
        {"isolation_level": "REPEATABLE READ", "read_only": False, "deferrable": False},
        {"durable": True},
        {"resolve_commit": 60},
        {"settings": {"app.tenant": "7"}},
    ]
    for each in options:
        async with place.maker() as session, get_transaction(session, **each):
            await session.get_one(Book, 100)
            async with get_transaction(session, settings={"app.tenant": "8", "lock_timeout": 5}):
                await session.get_one(Book, 100)

    async def work(session: AsyncSession) -> str:
        return (await session.get_one(Book, 100)).title

    assert await run_transaction(place.maker, work, isolation_level="SERIALIZABLE") == ""
    with pytest.raises(TransactionAbortedError):
        async with place.maker() as session, get_transaction(session):
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT 1 FROM missing"))
    assert called == [1]


@call
async def holders_and_idle_transactions(place: Place) -> None:
    stop = warn_of_idle_transactions(place.engine, 0.001)
    async with create_db_context(place.maker)() as session:
        await session.get_one(Book, 1)
        assert len(holders(place.engine)) == 1
        await asyncio.sleep(0.01)
    stop()
    assert holders(place.engine) == []


@call
async def observers(place: Place) -> None:
    events: list[Any] = []
    unsubscribe = subscribe(place.engine, events.append)
    async with create_db_context(place.maker)() as session:
        await session.get_one(Book, 1)
    unsubscribe()
    assert [type(each).__name__ for each in events] == ["PoolWaited", "TransactionEnded"]


@call
async def deadlines(place: Place) -> None:
    async with create_db_context(place.maker, deadline=60)() as session:
        await session.get_one(Book, 1)
        with deadline(30):
            await session.get_one(Book, 2)
            async with get_transaction(session):
                await session.get_one(Book, 3)
        await session.get(Book, 100)
    with pytest.raises(DeadlineExceededError), deadline(0.3):
        async with create_db_context(place.maker)() as session:
            await session.execute(text("SELECT pg_catalog.pg_sleep(60)"))


@call
async def lost_commits(place: Place) -> None:
    async with Proxy.to(place.url) as proxy:
        engine = create_async_engine(sqlalchemy_url(proxy.url))
        db_context = create_db_context(async_sessionmaker(engine), resolve_commit=60)
        for number, direction in enumerate(DIRECTIONS):
            with suppress(TransactionLostError):
                async with db_context() as session:
                    session.add(Book(id=200 + number))
                    await session.flush()
                    proxy.cut_at_commit("RST", direction)
                assert direction == "to client"
        # What ends a backend, and what waits for standbys.
        async with place.maker() as session, place.maker() as another:
            await session.execute(insert(Book).values(id=300))
            raw = (await session.connection()).sync_connection
            assert raw is not None
            noted = await greenlet_spawn(trace, raw.connection)
            assert noted.xid is not None and noted.refused is None
            connection = await another.connection()
            assert (await look(connection, noted)).status == "in progress"
            await confirm(connection, noted)
            await end_backend(connection, noted)

            async def is_ended() -> bool:
                return (await look(connection, noted)).status == "aborted"

            await until(is_ended)
            await session.invalidate()
        await engine.dispose()


@call
async def table_locks(place: Place) -> None:
    for level in ("READ COMMITTED", "SERIALIZABLE"):
        for keywords in ({}, {"nowait": True}, {"timeout": None}):
            async with place.maker() as session:
                async with get_transaction(session, isolation_level=level):
                    async with lock_tables(session, [Book, Tag], mode="EXCLUSIVE", **keywords):
                        pass


@call
async def table_locks_that_are_taken(place: Place) -> None:
    async with place.locked("LOCK TABLE public.tag IN SHARE MODE"):
        for keywords in ({"timeout": 1.5}, {"nowait": True}):
            async with place.maker() as session:
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Book, Tag], mode="EXCLUSIVE", **keywords):
                        pass
                assert [each.state for each in caught.value.blockers] == ["idle in transaction"]


@call
async def table_locks_that_are_waited_for(place: Place) -> None:
    async with place.locked("LOCK TABLE public.tag IN SHARE MODE") as other:
        async with place.maker() as session:

            async def lock() -> None:
                async with lock_tables(session, [Book, Tag], mode=LockMode.EXCLUSIVE):
                    pass

            task = asyncio.create_task(lock())
            await until(lambda: _someone_waits(place))
            await other.execute("COMMIT")
            await task


@call
async def advisory_locks(place: Place) -> None:
    async with place.maker() as session:
        for keywords in ({}, {"shared": True}, {"nowait": True}, {"timeout": 5}):
            for key in (1, (1, 2), "night"):
                async with advisory_lock(session, key, **keywords) as is_mine:
                    assert is_mine
    async with place.locked("SELECT pg_catalog.pg_advisory_lock(7)"), place.maker() as session:
        with pytest.raises(LockTimeoutError) as caught:
            async with advisory_lock(session, 7, timeout=1.5):
                pass
        assert len(caught.value.blockers) == 1


@call
async def connections(place: Place) -> None:
    async with place.maker() as session:
        await session.execute(text("SELECT"))
        async with release_connection(session):
            pass
        await session.execute(text("LOCK TABLE public.book IN SHARE MODE"))
        with pytest.raises(TransactionStateError, match="a lock on"):
            async with release_connection(session):
                pass
        async with driver_connection(session) as connection:
            await connection.execute("SELECT")


@call
async def row_locks(place: Place) -> None:
    keys: list[tuple[Any, Any]] = [(Book, [2, 1]), (Pair, [(1, 1), (2, 2)]), (Given, [1, -2])]
    for model, pks in keys:
        for keywords in ({}, {"skip_locked": True}, {"nowait": True}, {"timeout": 5}):
            async with place.maker() as session:
                assert len(await lock_rows(session, model, pks, **keywords)) == 2
                await session.commit()


@call
async def row_locks_that_are_taken(place: Place) -> None:
    share = "SELECT FROM public.book WHERE title IS NOT NULL FOR SHARE"
    async with place.locked(share), place.locked(share):
        for keywords in ({"timeout": 1.5}, {"nowait": True}):
            async with place.maker() as session:
                with pytest.raises(LockTimeoutError) as caught:
                    await lock_rows(session, Book, [1, 2], **keywords)
                assert caught.value.blockers


@call
async def waits(place: Place) -> None:
    async with _waiting(place):
        async with place.engine.connect() as connection, place.maker() as session:
            for source in (place.engine, connection, session):
                (wait,) = await list_lock_waits(source)
                assert (wait.relation, wait.mode) == ("public.tag", "ACCESS EXCLUSIVE")
                assert len(wait.blocked_by) == 1


@call
async def command_locks(place: Place) -> None:
    async with _waiting(place):
        (wait,) = await list_lock_waits(place.engine)
        assert await asyncio.to_thread(main, ["locks", place.url]) == 0
        assert await asyncio.to_thread(main, ["locks", place.url, "--json"]) == 0
        command = ["locks", place.url, "--yes", "--terminate", str(wait.blocked_by[0])]
        assert await asyncio.to_thread(main, command) == 0


@call
async def command_doctor(place: Place) -> None:
    async with place.engine.begin() as connection:
        for ddl in row_change_trigger(Book):
            await connection.execute(ddl)
    await _sql(place, "CREATE SEQUENCE public.short MAXVALUE 10; SELECT setval('public.short', 9)")
    try:
        with redirect_stdout(io.StringIO()) as output:
            code = await asyncio.to_thread(
                main, ["doctor", place.url, "--json", "--processes", "1"]
            )
        report = json.loads(output.getvalue())
        assert code == 1
        found = {each["name"] for each in report["findings"]}
        # Another call may have left its trigger function.
        assert found - {"unused_trigger_function"} == {"sequence_end"}
        assert "not_checked" not in {each["name"] for each in report["notes"]}
    finally:
        await _sql(place, "DROP SEQUENCE public.short")


@call
async def many_to_many(place: Place) -> None:
    for attribute in (Book.tags, Book.loose, Book.noted):
        async with place.maker.begin() as session:
            book = await session.get_one(Book, 1)
            tag = await session.get_one(Tag, 1)
            assert await m2m_add(session, book, attribute, tag) == 1
            assert await m2m_add(session, book, attribute, tag, ignore_conflicts=True) == 0
            assert await m2m_add(session, book, attribute, tag, pks=[2, 3], ignore_conflicts=True)
            assert await m2m_add_many(session, attribute, [(book, 4), (2, tag), (2, 2)]) == 3
            assert await m2m_remove(session, book, attribute, tag, pks=[2]) == 2
            assert await m2m_set(session, book, attribute, tag, pks=[3, 5]) == (2, 1)
            assert await m2m_set(session, book, attribute, pks=[5, 6], keep_existing=True) == (1, 2)
            assert await m2m_set(session, book, attribute) == (0, 2)


@call
async def many_to_many_with_values(place: Place) -> None:
    async with place.maker.begin() as session:
        await session.execute(insert(loose_tag), [{"book_id": 1, "tag_id": 1}] * 3)
        book = await session.get_one(Book, 1)
        assert await m2m_set(session, book, Book.loose, pks=[1, 2]) == (1, 0)
        values = {"note": "x"}
        assert await m2m_add(session, book, Book.noted, pks=[1, 2], values=values) == 2
        assert await m2m_set(session, book, Book.noted, pks=[2, 3], values=values) == (1, 1)
        links = [(1, 4), (1, 5)]
        assert await m2m_add_many(session, Book.noted, links, values=values) == 2
        assert {row.note for row in await session.execute(noted_tag.select())} == {"x"}


@call
async def many_to_many_by_a_unique_column(place: Place) -> None:
    async with place.maker.begin() as session:
        assert await m2m_add_many(session, Seat.tags, [(1, 1), (2, 2)]) == 2
    async with place.maker() as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        seat = await session.get_one(Seat, 1)
        assert await m2m_set(session, seat, Seat.tags, pks=[2, 3]) == (2, 1)
        await session.commit()


@call
async def waiting_for_a_row(place: Place) -> None:
    keys: list[tuple[Any, Any]] = [(Book, 1), (Pair, (1, 1)), (Given, -1)]
    for model, key in keys:
        name = "title" if model is Book else "name"
        async with place.maker() as session:
            for _ in range(2):
                await wait_for_row_change(session, model, key, baseline={name: "new"})


@call_of_asyncpg
async def watching_rows(place: Place) -> None:
    keys: list[tuple[Any, Any]] = [
        (Book, range(1, 41)),
        (Pair, [(n, n) for n in range(1, 41)]),
        (Given, range(1, 41)),
    ]
    for model, pks in keys:
        name = "title" if model is Book else "name"
        async with place.engine.begin() as connection:
            for ddl in (*row_change_trigger(model), *row_change_trigger(model)):
                await connection.execute(ddl)
        async with RowWatcher(place.engine, interval=0.05, notify=True) as watcher:
            streams = [watcher.changes(model, pk) for pk in pks]
            async with streams[0] as first:
                await asyncio.gather(*(stream.__aenter__() for stream in streams[1:]))
                table = model.__table__
                async with place.engine.begin() as connection:
                    await connection.execute(table.update().values({name: "changed"}))
                change = await anext(first)
                assert change.after is not None and change.after[name] == "changed"
                async with place.engine.begin() as connection:
                    await connection.execute(table.delete())
                    await connection.execute(
                        table.insert().values({key.name: 1 for key in table.primary_key})
                    )
                assert (await anext(first)).kind in ("update", "delete")
            for stream in streams:
                await stream.aclose()


@call
async def command_watch(place: Place) -> None:
    command = ["watch", plain_url(place.url), "book", "1", "--interval", "0.05"]

    async def stop() -> None:
        await until(lambda: _someone_watches(place))
        async with place.engine.begin() as connection:
            await connection.execute(text("DROP TABLE public.book CASCADE"))

    stopping = asyncio.create_task(stop())
    assert await asyncio.to_thread(main, command) == 1
    await stopping


@call
async def cleaning(place: Place) -> None:
    await _sql(
        place,
        """CREATE SEQUENCE public.counter OWNED BY public.book.title;
           SELECT pg_catalog.nextval('public.counter');
           CREATE FUNCTION public.noticed() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RETURN NULL; END $$;
           CREATE TRIGGER noticed AFTER DELETE ON public.book
             EXECUTE FUNCTION public.noticed();
           CREATE TRIGGER noticed AFTER TRUNCATE ON public.tag
             EXECUTE FUNCTION public.noticed();
           INSERT INTO public.book_tag (book_id, tag_id) VALUES (1, 1);
           INSERT INTO public.pair (a, b, name)
             SELECT n, 0, '' FROM pg_catalog.generate_series(1, 30000) AS n;""",
    )
    async with place.maker() as session:
        await cleanup_tables(session, Base)
        for table in Base.metadata.sorted_tables:
            assert (await session.execute(table.select())).first() is None
        await cleanup_tables(session, Base)
    await _sql(place, "DROP FUNCTION public.noticed() CASCADE")


@call
async def cleaning_that_is_refused(place: Place) -> None:
    await _sql(
        place,
        """CREATE TABLE public.outside (id int2 REFERENCES public.book);
           INSERT INTO public.outside VALUES (1)""",
    )
    try:
        async with place.maker() as session:
            with pytest.raises(OutsideReferenceError):
                await cleanup_tables(session, Base)
            await _sql(place, "TRUNCATE public.outside")
            async with place.locked("LOCK TABLE public.tag"):
                with pytest.raises(LockTimeoutError):
                    await cleanup_tables(session, Base, timeout=0.3)
    finally:
        await _sql(place, "DROP TABLE public.outside")


@call
async def databases(place: Place) -> None:
    await create_database("Shop, 1", server_url=place.url)
    used = await asyncpg.connect(plain_url(place.url), database="Shop, 1")
    with pytest.raises(DatabaseInUseError) as caught:
        await drop_database("Shop, 1", server_url=place.url)
    assert len(caught.value.sessions) == 1
    await seal_database("Shop, 1", server_url=place.url)
    await used.close()
    await create_database("Shop, 2", server_url=place.url, template="Shop, 1")
    for name in ("Shop, 1", "Shop, 2"):
        await drop_database(name, server_url=place.url, force=True)


@call
async def worker_databases(place: Place) -> None:
    async with create_worker_database(place.url, prefix="planted") as url:
        connection = await asyncpg.connect(plain_url(url))
        await connection.close()


@call
async def template_databases(place: Place) -> None:
    async def make(url: str) -> None:
        engine = create_async_engine(
            url,
            poolclass=NullPool,
            connect_args=connect_args(search_path="public"),
        )
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Tag), [{"id": 1}])

    for version in ("v1", "v1", None):
        async with template_database(place.url, make, run="r1", version=version) as template:
            assert template.has_rows
            await create_database("copy", server_url=place.url, template=template.name)
            await drop_database("copy", server_url=place.url)
    await drop_database("pgtoolset_template_v1", server_url=place.url)


@call
async def db_sessions(place: Place) -> None:
    async with create_worker_database(place.url, prefix="planted") as url:
        await _sql(place, "ALTER SCHEMA public OWNER TO CURRENT_USER", url=url)
        arguments = connect_args(search_path="public, evil, pg_catalog")
        for keywords in ({"drop_tables": False, "cleanup": True}, {}):
            async with create_db_session(
                url,
                Base,
                engine_kwargs={"connect_args": arguments},
                **keywords,  # type: ignore[arg-type]
            ) as session:
                session.add(Book(id=1))
                await session.commit()


@call
async def sessions_of_the_plugin(place: Place) -> None:
    connections = Connections(place.engine)
    async with connections.sessions({}, lambda: True) as joined:
        session = joined.session
        session.add(Book(id=101))
        await session.commit()
        async with get_transaction(session):
            await session.get_one(Book, 101)
    await connections.close()


async def _sql(place: Place, statements: str, *, url: str = "") -> None:
    connection = await asyncpg.connect(
        plain_url(url or place.url), server_settings={"search_path": "pg_catalog"}
    )
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


@asynccontextmanager
async def _waiting(place: Place) -> AsyncIterator[None]:
    """Have one session wait for another."""
    async with place.locked("LOCK TABLE public.tag IN SHARE MODE"):
        waiting = await asyncpg.connect(plain_url(place.url))
        task = asyncio.create_task(waiting.execute("BEGIN; LOCK TABLE public.tag"))
        try:
            await until(lambda: _someone_waits(place))
            yield
        finally:
            waiting.terminate()
            await asyncio.wait([task])
            task.exception()


async def _someone_waits(place: Place) -> bool:
    return bool(await list_lock_waits(place.engine))


async def _someone_watches(place: Place) -> bool:
    connection = await asyncpg.connect(
        plain_url(place.url), server_settings={"search_path": "pg_catalog"}
    )
    try:
        return bool(
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name = 'pgtoolset' AND query LIKE '%pgtoolset%is_exact%'"
                "    OR application_name = 'pgtoolset' AND query LIKE '%convert_to%'"
            )
        )
    finally:
        await connection.close()


def test_every_public_function_is_called() -> None:
    """A new public function, command or module for tests is called here too."""
    code = Path(__file__).read_text()
    named = [each for each in pgtoolset.__all__ if each.islower() and each != "implementation"]
    named += [each for each in pgtoolset.testing.__all__ if each.startswith("create_")]
    named.remove("create_test_client")  # it sends no statement, as pgtoolset.fastapi
    for name in named:
        assert re.search(rf"\b{name}\(", code), f"{name} is not called"
    for command in COMMANDS:
        assert f'["{command}", ' in code, f"the command {command} is not called"


def test_one_module_makes_functions_of_sql() -> None:
    """`func` of SQLAlchemy names no schema, so no module but one imports it."""
    source = Path(pgtoolset.__file__).parent
    importing = [
        path.relative_to(source).as_posix()
        for path in [*source.rglob("*.py"), *source.parent.glob("pytest_pgtoolset/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and any(each.name == "func" for each in node.names)
    ]
    assert importing == ["_postgres/catalog.py"]
