"""`cleanup_tables`: all tables are empty and restarted, and nothing else was touched."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Identity,
    MetaData,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgtoolset import (
    LockTimeoutError,
    TransactionStateError,
    cleanup_tables,
    create_db_context,
    get_transaction,
    on_commit,
)
from tests.databases.cleaning import counts, files, statements, waiting
from tests.support import Item, connect_args, interrupt_everywhere, swallow_error

# What is promised


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(server_default="")


class Order(Base):
    """A reserved name, an identity, a reference."""

    __tablename__ = "order"

    id: Mapped[int] = mapped_column(BigInteger, Identity(start=100, increment=5), primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


@pytest.fixture
async def shop(own: AsyncEngine) -> None:
    async with own.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.mark.usefixtures("shop")
async def test_empty_and_restarted(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Rows are gone, committed; serials and identities begin anew, at their own starts."""
    author = Author()
    session.add(author)
    await session.flush()
    session.add_all([Order(author_id=author.id), Order(author_id=author.id)])
    await session.commit()
    await cleanup_tables(session, Base)
    assert not session.in_transaction()
    assert await counts(sql, "author", '"order"') == [0, 0]
    assert await sql.fetchval("INSERT INTO author (name) VALUES ('') RETURNING id") == 1
    assert await sql.fetch('INSERT INTO "order" (author_id) VALUES (1), (1) RETURNING id') == [
        (100,),
        (105,),
    ]


@pytest.mark.usefixtures("shop")
async def test_nothing_to_do(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """Where nothing has changed, no table and no sequence is touched, and locks are for reading."""
    before = await files(sql)
    sent = statements(own)
    await cleanup_tables(session, Base)
    await cleanup_tables(session, MetaData())
    assert await files(sql) == before
    assert not [
        statement for statement in sent if not statement.lstrip().startswith(("SELECT", "WITH"))
    ]


@pytest.mark.usefixtures("shop")
async def test_touches_only_what_changed(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """An empty table and a sequence that has not moved stay as they are."""
    for rows in (1, 20_000):
        await sql.execute(
            """INSERT INTO author (id, name)
               SELECT n, repeat('x', 100) FROM generate_series(1, $1) n""",
            rows,
        )
        before = await files(sql)
        await cleanup_tables(session, Base)
        after = await files(sql)
        assert [name for name in after if after[name] != before[name] and name != "author"] == []
        assert await counts(sql, "author") == [0]


@pytest.mark.parametrize(
    "move",
    [
        "SELECT nextval(s)",
        "SELECT setval(s, 1)",
        "SELECT setval(s, 7, false)",
        "SELECT setval(s, 1, true), nextval(s)",
    ],
)
@pytest.mark.usefixtures("shop")
async def test_sequence_of_an_empty_table(
    session: AsyncSession, sql: asyncpg.Connection, move: str
) -> None:
    """A sequence that has moved in any way is restarted, though its table is empty."""
    await sql.fetch(f"{move} FROM (SELECT 'author_id_seq'::regclass AS s) AS _")
    await cleanup_tables(session, Base)
    assert await sql.fetchrow("SELECT last_value, is_called FROM author_id_seq") == (1, False)


@pytest.mark.usefixtures("shop")
async def test_one_statement_finds_it(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """One statement looks into the tables, whatever their number."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    sent = statements(own)
    await cleanup_tables(session, Base)
    assert (
        len([statement for statement in sent if "EXISTS (SELECT FROM ONLY public" in statement])
        == 1
    )


# The session


@pytest.mark.usefixtures("shop")
async def test_objects_do_not_survive(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Unsaved, flushed and loaded objects leave the session, and no flush brings them back."""
    stored = Author(name="stored")
    session.add(stored)
    await session.commit()
    stored.name = "changed"
    session.add(Author(name="flushed"))
    await session.flush()
    session.add(Author(name="pending"))
    await cleanup_tables(session, Base)
    assert not list(session)
    assert not session.new and not session.dirty
    await session.commit()
    assert await counts(sql, "author") == [0]
    session.add(Author(name="afterwards"))
    await session.commit()
    assert await sql.fetchval("SELECT id FROM author") == 1


@pytest.mark.usefixtures("shop")
async def test_failed_transaction(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A failed transaction, by a statement or a flush, in a savepoint or not, is no obstacle."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    await swallow_error(session)
    await cleanup_tables(session, Base)
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    session.add(Order(author_id=77))
    with pytest.raises(DBAPIError):
        await session.flush()
    await cleanup_tables(session, Base)
    await session.begin_nested()
    await swallow_error(session)
    await cleanup_tables(session, Base)
    assert await counts(sql, "author", '"order"') == [0, 0]


@pytest.mark.usefixtures("shop")
async def test_in_a_context(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """Inside a `db_context` or `get_transaction` the session goes on, without earlier callbacks."""
    called: list[str] = []
    async with create_db_context(async_sessionmaker(own))() as session:
        session.add(Author())
        await session.flush()
        on_commit(session, lambda: called.append("before"))
        await cleanup_tables(session, Base)
        session.add(Author(name="afterwards"))
    assert not called
    assert await counts(sql, "author") == [1]
    async with AsyncSession(own) as session, get_transaction(session):
        session.add(Author(name="before"))
        await session.flush()
        await cleanup_tables(session, Base)
        session.add(Author(name="afterwards"))
    assert await sql.fetch("SELECT id, name FROM author") == [(1, "afterwards")]


async def test_inside_a_transaction_block(session: AsyncSession) -> None:
    """Inside a block such as session.begin() the call is refused before any SQL."""
    async with session.begin():
        with pytest.raises(TransactionStateError, match="block"):
            await cleanup_tables(session, Base)
        for block in (session.begin_nested(), get_transaction(session)):
            async with block:
                with pytest.raises(TransactionStateError, match="block"):
                    await cleanup_tables(session, Base)


@pytest.mark.usefixtures("shop")
async def test_session_on_a_connection(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """A session joined to a connection's transaction cleans in it and keeps its settings."""
    async with own.connect() as connection:
        await connection.execute(text("SET LOCAL lock_timeout = '7s'"))
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Author())
            await session.commit()
            await cleanup_tables(session, Base)
            assert await session.scalar(text("SELECT count(*) FROM author")) == 0
            assert await session.scalar(text("SHOW lock_timeout")) == "7s"
            await cleanup_tables(session, Base)
            assert await session.scalar(text("SHOW lock_timeout")) == "7s"
            assert await session.scalar(text("SHOW row_security")) == "on"
        await connection.rollback()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.usefixtures("shop")
async def test_isolation_levels(own: AsyncEngine, sql: asyncpg.Connection, level: Any) -> None:
    """Whatever the engine's isolation level is, what others have committed meanwhile goes too."""
    engine = own.execution_options(isolation_level=level)
    async with AsyncSession(engine) as session:
        async with sql.transaction():
            await sql.execute("INSERT INTO author DEFAULT VALUES")
            await session.execute(text("INSERT INTO author DEFAULT VALUES"))
            await session.commit()
            task = asyncio.create_task(cleanup_tables(session, Base))
            await waiting(sql)
        await task
        assert await counts(sql, "author") == [0]
        assert await session.scalar(text("SHOW transaction_isolation")) == level.lower()


@pytest.mark.usefixtures("shop")
async def test_autocommit(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """In AUTOCOMMIT a cleanup would not be one transaction: it is refused, and touches nothing."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    async with AsyncSession(own.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            await cleanup_tables(session, Base)
    assert await counts(sql, "author") == [1]


@pytest.mark.usefixtures("shop")
async def test_settings_are_unchanged(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """The connection's search_path and lock_timeout are what they were."""
    engine = create_async_engine(
        own.url,
        connect_args=connect_args(search_path="other, public", lock_timeout="1234"),
    )
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    async with AsyncSession(engine) as session:
        for _ in range(2):
            await cleanup_tables(session, Base)
            assert await session.scalar(text("SHOW search_path")) == "other, public"
            assert await session.scalar(text("SHOW lock_timeout")) == "1234ms"
    await engine.dispose()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"base": None}, TypeError),
        ({"base": Base()}, None),
        ({"base": "author"}, TypeError),
        ({"base": Author()}, TypeError),
        ({"session": None}, TypeError),
        ({"session": Session()}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "5"}, ValueError),
    ],
)
async def test_bad_arguments(
    own: AsyncEngine, arguments: dict[str, Any], error: type[Exception] | None
) -> None:
    """What cannot be meant is refused before any SQL, and before anything is rolled back."""
    sent = statements(own)
    async with AsyncSession(own) as session:
        pending = Author()
        session.add(pending)
        if error is None:
            await cleanup_tables(**({"session": session} | arguments))
            return
        with pytest.raises(error):
            await cleanup_tables(**({"session": session, "base": Base} | arguments))
        assert pending in session
    assert not sent


# Others in the way


@pytest.mark.parametrize(
    "statement", ["INSERT INTO author DEFAULT VALUES", "LOCK TABLE author IN ACCESS EXCLUSIVE MODE"]
)
@pytest.mark.usefixtures("shop")
async def test_forgotten_transaction(
    session: AsyncSession, sql: asyncpg.Connection, statement: str
) -> None:
    """A forgotten transaction is named in the error, in time, and nothing was touched."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute(statement)
    with pytest.raises(LockTimeoutError, match="who forgot") as raised:
        async with asyncio.timeout(30):
            await cleanup_tables(session, Base, timeout="500ms")
    (blocker,) = raised.value.blockers
    assert (blocker.pid, blocker.query) == (sql.get_server_pid(), statement)
    assert raised.value.timeout == 0.5
    assert not session.in_transaction()
    await transaction.rollback()
    assert await counts(sql, "author") == [1]
    await cleanup_tables(session, Base, timeout=None)
    assert await counts(sql, "author") == [0]


@pytest.mark.usefixtures("shop")
async def test_sixty_days(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A timeout longer than PostgreSQL's setting can hold waits, and nothing is left of it."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    async with sql.transaction():
        await sql.execute("LOCK TABLE author IN ACCESS EXCLUSIVE MODE")
        task = asyncio.create_task(cleanup_tables(session, Base, timeout="60d"))
        await waiting(sql)
    await task
    assert await counts(sql, "author") == [0]
    assert await session.scalar(text("SHOW lock_timeout")) == "0"


@pytest.mark.usefixtures("shop")
async def test_reader_is_not_in_the_way(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A transaction that has only read a small table does not block the call."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    async with sql.transaction():
        await sql.execute("SELECT FROM author")
        await cleanup_tables(session, Base, timeout="500ms")


@pytest.mark.usefixtures("shop")
async def test_many_at_once(url: str, sql: asyncpg.Connection) -> None:
    """Several at a time, of tables that are truncated, take turns instead of deadlocking."""
    engine = create_async_engine(url)

    async def clean() -> None:
        async with AsyncSession(engine) as session:
            await cleanup_tables(session, Base)

    for _ in range(5):
        await sql.execute("INSERT INTO author (name) SELECT '' FROM generate_series(1, 3000)")
        await sql.execute('INSERT INTO "order" (author_id) SELECT id FROM author')
        await asyncio.gather(*(clean() for _ in range(4)))
        assert await counts(sql, "author", '"order"') == [0, 0]
    await engine.dispose()


@pytest.mark.usefixtures("shop")
async def test_cancelled_everywhere(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """Cancelled at any suspension, a call has done all or nothing, and the session is usable."""

    async def work(_: int) -> None:
        await sql.execute(
            "TRUNCATE author RESTART IDENTITY CASCADE; INSERT INTO author DEFAULT VALUES"
        )
        async with AsyncSession(own) as session:
            try:
                await cleanup_tables(session, Base)
            finally:
                assert not session.in_transaction()

    async def check(_: int) -> None:
        rows = await counts(sql, "author")
        moved = await sql.fetchval("SELECT is_called FROM author_id_seq")
        assert (rows, moved) in (([1], True), ([0], False))
        assert own.pool.checkedout() == 0  # type: ignore[attr-defined]

    async def only_cleaning(n: int) -> None:
        await work(n)

    assert await interrupt_everywhere(only_cleaning, check) > 8


async def test_the_tables_of_the_suite(engine: AsyncEngine) -> None:
    """The tables that this suite itself uses are emptied by it."""
    async with AsyncSession(engine) as session:
        session.add(Item())
        await session.commit()
        await cleanup_tables(session, Item)
        assert await session.scalar(text("SELECT count(*) FROM item")) == 0
