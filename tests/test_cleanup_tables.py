"""`cleanup_tables`: all of ours is empty and restarted, and nothing else has been touched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Identity,
    Integer,
    MetaData,
    Table,
    event,
    insert,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgtoolset import (
    LockTimeoutError,
    OutsideReferenceError,
    TransactionStateError,
    cleanup_tables,
    create_db_context,
    get_transaction,
    on_commit,
)
from pgtoolset.testing import create_worker_database

from .support import Item, interrupt_everywhere, plain_url, swallow_error


@pytest.fixture
async def url(server_url: str) -> AsyncIterator[str]:
    """A database of the test's own."""
    async with create_worker_database(server_url, prefix="pgtoolset cleanup") as url:
        yield url


@pytest.fixture
async def own(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()


@pytest.fixture
async def sql(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that has nothing to do with the engine."""
    connection = await asyncpg.connect(plain_url(url), server_settings={"application_name": "who forgot"})
    yield connection
    await connection.close()


@pytest.fixture
async def session(own: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(own, expire_on_commit=False) as session:
        yield session


def tables(*names: str, schema: str | None = None) -> MetaData:
    """Metadata that knows these tables by their names alone; what they look like is the database's business."""
    metadata = MetaData(schema=schema)
    for name in names:
        Table(name, metadata, Column("id", Integer, primary_key=True))
    return metadata


async def counts(sql: asyncpg.Connection, *names: str) -> list[int]:
    return [await sql.fetchval(f"SELECT count(*) FROM {name}") for name in names]


async def files(sql: asyncpg.Connection) -> dict[str, tuple[Any, ...]]:
    """What changes when a table or sequence is truncated, altered or written: its file, its row in the catalog."""
    rows = await sql.fetch(
        """SELECT c.oid::regclass::text AS name, c.relfilenode, c.xmin::text, pg_stat_get_tuples_deleted(c.oid)
           FROM pg_class c WHERE c.relkind IN ('r', 'p', 'S') AND c.relnamespace = 'public'::regnamespace"""
    )
    return {row["name"]: tuple(row) for row in rows}


def statements(engine: AsyncEngine) -> list[str]:
    """What the engine sends from now on."""
    sent: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    return sent


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
    assert await sql.fetch('INSERT INTO "order" (author_id) VALUES (1), (1) RETURNING id') == [(100,), (105,)]


@pytest.mark.usefixtures("shop")
async def test_nothing_to_do(own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Where nothing is to be done nothing is: no table, no sequence, no lock beyond that of reading."""
    before = await files(sql)
    sent = statements(own)
    await cleanup_tables(session, Base)
    await cleanup_tables(session, MetaData())
    assert await files(sql) == before
    assert not [statement for statement in sent if not statement.lstrip().startswith(("SELECT", "WITH"))]


@pytest.mark.usefixtures("shop")
async def test_touches_only_what_changed(own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A table that is empty and a sequence that has not moved are as they were, however large the others are."""
    for rows in (1, 20_000):
        await sql.execute(
            "INSERT INTO author (id, name) SELECT n, repeat('x', 100) FROM generate_series(1, $1) n", rows
        )
        before = await files(sql)
        await cleanup_tables(session, Base)
        after = await files(sql)
        assert [name for name in after if after[name] != before[name] and name != "author"] == []
        assert await counts(sql, "author") == [0]


@pytest.mark.parametrize(
    "move",
    ["SELECT nextval(s)", "SELECT setval(s, 1)", "SELECT setval(s, 7, false)", "SELECT setval(s, 1, true), nextval(s)"],
)
@pytest.mark.usefixtures("shop")
async def test_sequence_of_an_empty_table(session: AsyncSession, sql: asyncpg.Connection, move: str) -> None:
    """A sequence that has moved is restarted though its table is empty, in whatever way it has moved."""
    await sql.fetch(f"{move} FROM (SELECT 'author_id_seq'::regclass AS s) AS _")
    await cleanup_tables(session, Base)
    assert await sql.fetchrow("SELECT last_value, is_called FROM author_id_seq") == (1, False)


@pytest.mark.usefixtures("shop")
async def test_one_statement_finds_it(own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection) -> None:
    """One statement looks into the tables, whatever their number."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    sent = statements(own)
    await cleanup_tables(session, Base)
    assert len([statement for statement in sent if "EXISTS (SELECT FROM ONLY public" in statement]) == 1


# The session


@pytest.mark.usefixtures("shop")
async def test_objects_do_not_survive(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """What was unsaved, flushed or loaded is out of the session: a later flush or commit brings nothing back."""
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
    """A transaction that has failed, by a statement or a flush, in a savepoint or not, is no obstacle."""
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
    """Inside a `db_context` or a `get_transaction` the session goes on afterwards; callbacks of what was rolled back
    are not called."""
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
    """A block that is the session's transaction could not go on afterwards: refused before any SQL."""
    async with session.begin():
        with pytest.raises(TransactionStateError, match="block"):
            await cleanup_tables(session, Base)
        for block in (session.begin_nested(), get_transaction(session)):
            async with block:
                with pytest.raises(TransactionStateError, match="block"):
                    await cleanup_tables(session, Base)


@pytest.mark.usefixtures("shop")
async def test_session_on_a_connection(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """A session that is joined to a connection's transaction cleans in it, and leaves the settings alone."""
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


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
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
            await asyncio.sleep(0.3)  # by now it waits for the lock; the test holds where it does not
        await task
        assert await counts(sql, "author") == [0]
        assert await session.scalar(text("SHOW transaction_isolation")) == {"AUTOCOMMIT": "read committed"}.get(
            level, level.lower()
        )


@pytest.mark.usefixtures("shop")
async def test_settings_are_unchanged(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """The connection's search_path and lock_timeout are what they were."""
    engine = create_async_engine(
        own.url, connect_args={"server_settings": {"search_path": "other, public", "lock_timeout": "1234"}}
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
        ({"session": None}, TypeError),
        ({"session": Session()}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "5"}, ValueError),
    ],
)
async def test_bad_arguments(own: AsyncEngine, arguments: dict[str, Any], error: type[Exception] | None) -> None:
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


# Tables of every kind


async def test_names_and_schemas(own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Schemas, reserved words, quotes, dollars: each is the table of that name, and no other."""
    odd = ["select", "MixedCase", "with \"quotes\" and 'more'", "back\\slash", "$pgtoolset$", "a.b", "per%cent :x"]
    metadata = MetaData()
    for schema in (None, 'Odd "schema"'):
        for name in odd:
            Table(name, metadata, Column("id", Integer, primary_key=True), schema=schema)
    await sql.execute('CREATE SCHEMA "Odd ""schema"""; CREATE SCHEMA a; CREATE TABLE a.b (id serial)')
    async with own.begin() as connection:
        await connection.run_sync(metadata.create_all)
        for table in metadata.tables.values():
            await connection.execute(insert(table))
    await sql.execute("INSERT INTO a.b DEFAULT VALUES")
    await cleanup_tables(session, metadata)
    for table in metadata.tables.values():
        assert not (await session.execute(table.select())).all()
        assert (await session.execute(insert(table).returning(table.c.id))).scalar_one() == 1
    await session.rollback()
    assert await counts(sql, "a.b") == [1]


async def test_translated_schemas(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """`schema_translate_map` leads to the same tables as in any statement of the session."""
    await sql.execute(
        "CREATE SCHEMA tenant; CREATE SCHEMA per_tenant;"
        "CREATE TABLE tenant.thing AS SELECT 1 AS id; CREATE TABLE per_tenant.thing AS SELECT 1 AS id;"
        "CREATE TABLE thing AS SELECT 1 AS id"
    )
    metadata = tables("thing", schema="per_tenant")
    translated = own.execution_options(schema_translate_map={"per_tenant": "tenant"})
    async with AsyncSession(translated) as session:
        await cleanup_tables(session, metadata)
    assert await counts(sql, "tenant.thing", "per_tenant.thing", "thing") == [0, 1, 1]


async def test_missing_tables_and_views(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """What the database lacks is skipped, and what is no table."""
    await sql.execute(
        "CREATE TABLE there AS SELECT 1 AS id; CREATE TABLE under AS SELECT 1 AS id; CREATE VIEW view AS TABLE under;"
        "CREATE MATERIALIZED VIEW materialized AS TABLE under"
    )
    await cleanup_tables(session, tables("there", "missing", "view", "materialized"))
    await cleanup_tables(session, tables("missing", schema="nowhere"))
    assert await counts(sql, "there", "under", "materialized") == [0, 1, 1]


CYCLES = """
CREATE TABLE a (id serial PRIMARY KEY, b int, parent int REFERENCES a ON DELETE {action});
CREATE TABLE b (id serial PRIMARY KEY, c int NOT NULL);
CREATE TABLE c (id serial PRIMARY KEY, a int NOT NULL REFERENCES a ON DELETE {action});
ALTER TABLE a ADD FOREIGN KEY (b) REFERENCES b ON DELETE {action} {deferrable};
ALTER TABLE b ADD FOREIGN KEY (c) REFERENCES c ON DELETE {action};
"""


@pytest.mark.parametrize("deferrable", ["", "DEFERRABLE INITIALLY DEFERRED"])
@pytest.mark.parametrize("action", ["NO ACTION", "RESTRICT", "CASCADE", "SET NULL"])
@pytest.mark.parametrize("rows", [3, 3_000])
async def test_cycles(session: AsyncSession, sql: asyncpg.Connection, action: str, deferrable: str, rows: int) -> None:
    """Foreign keys in a cycle, and to a table itself, are no obstacle, whatever they do on a deletion."""
    await sql.execute(CYCLES.format(action=action, deferrable=deferrable))
    await sql.execute(
        f"""INSERT INTO a (parent) SELECT nullif(n - 1, 0) FROM generate_series(1, {rows}) n;
            INSERT INTO c (a) SELECT id FROM a; INSERT INTO b (c) SELECT id FROM c; UPDATE a SET b = id"""
    )
    await cleanup_tables(session, tables("a", "b", "c"))
    assert await counts(sql, "a", "b", "c") == [0, 0, 0]
    assert await sql.fetchval("INSERT INTO a DEFAULT VALUES RETURNING id") == 1


async def test_partitions(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A partitioned table is emptied with its partitions, whether the metadata knows them or not; a partition that
    the metadata knows without its parent is emptied alone."""
    await sql.execute(
        """CREATE TABLE parent (id int GENERATED BY DEFAULT AS IDENTITY, k int) PARTITION BY LIST (k);
           CREATE TABLE one PARTITION OF parent FOR VALUES IN (1);
           CREATE TABLE two PARTITION OF parent FOR VALUES IN (2) PARTITION BY LIST (k);
           CREATE TABLE leaf PARTITION OF two DEFAULT; CREATE SCHEMA s; ALTER TABLE leaf SET SCHEMA s"""
    )
    for metadata in (tables("parent"), tables("parent", "one"), tables("one", "two"), tables("two", "parent")):
        for rows in (1, 30_000):
            await sql.execute(f"INSERT INTO parent (k) SELECT 1 + n % 2 FROM generate_series(1, {2 * rows}) n")
            await cleanup_tables(session, metadata)
            assert await counts(sql, "parent") == [0]
            if "parent" in metadata.tables:
                assert await sql.fetchval("INSERT INTO parent (k) VALUES (1) RETURNING id") == 1
    await sql.execute("INSERT INTO parent (k) VALUES (1), (2)")
    await cleanup_tables(session, tables("one"))
    assert await counts(sql, "one", "two") == [0, 1]


async def test_inheritance(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """The rows of an inheritance child belong to the child: they go if the metadata knows it."""
    await sql.execute("CREATE TABLE parent (id serial); CREATE TABLE child () INHERITS (parent)")
    for rows in (1, 30_000):
        fill = "INSERT INTO {} SELECT FROM generate_series(1, {})"
        await sql.execute(fill.format("parent", rows))
        await sql.execute(fill.format("child", rows))
        await cleanup_tables(session, tables("parent"))
        assert await counts(sql, "ONLY parent", "child") == [0, rows]
        await cleanup_tables(session, tables("parent", "child"))
        assert await counts(sql, "parent") == [0]


@pytest.mark.parametrize("rows", [10, 100_000])
async def test_large_tables(session: AsyncSession, sql: asyncpg.Connection, rows: int) -> None:
    """A hundred thousand rows with references between them go as ten do, and the space they took with them."""
    await sql.execute(
        f"""CREATE TABLE a (id serial PRIMARY KEY); CREATE TABLE b (id serial PRIMARY KEY, a int REFERENCES a);
            CREATE TABLE alone (id serial);
            INSERT INTO a SELECT FROM generate_series(1, {rows}); INSERT INTO b (a) SELECT id FROM a;
            INSERT INTO alone SELECT FROM generate_series(1, {rows})"""
    )
    async with asyncio.timeout(10):
        await cleanup_tables(session, tables("a", "b", "alone"))
    assert await counts(sql, "a", "b", "alone") == [0, 0, 0]
    if rows > 10:
        assert await sql.fetchval("SELECT pg_relation_size('a') + pg_relation_size('b')") == 0


@pytest.mark.parametrize("rows", [1, 5_000])
async def test_triggers(session: AsyncSession, sql: asyncpg.Connection, rows: int) -> None:
    """The user's triggers do not fire: what one would keep goes, what one would write is not there, and they are
    switched on afterwards as they were before."""
    await sql.execute(
        """CREATE TABLE t (id serial); CREATE TABLE log (what text); CREATE TABLE p (k int) PARTITION BY LIST (k);
           CREATE TABLE p1 PARTITION OF p DEFAULT;
           CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
           CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO log VALUES (TG_OP); RETURN NULL; END';
           CREATE TRIGGER "Keep it" BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION keep();
           CREATE TRIGGER always BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION keep();
           ALTER TABLE t ENABLE ALWAYS TRIGGER always;
           CREATE TRIGGER off BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION keep();
           ALTER TABLE t DISABLE TRIGGER off;
           CREATE TRIGGER replica BEFORE DELETE ON t FOR EACH ROW EXECUTE FUNCTION keep();
           ALTER TABLE t ENABLE REPLICA TRIGGER replica;
           CREATE TRIGGER statement AFTER DELETE ON t EXECUTE FUNCTION note();
           CREATE TRIGGER truncated AFTER TRUNCATE ON t EXECUTE FUNCTION note();
           CREATE CONSTRAINT TRIGGER late AFTER DELETE ON t DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION note();
           CREATE TRIGGER rows AFTER DELETE ON p FOR EACH ROW EXECUTE FUNCTION note()"""
    )
    await sql.execute(f"INSERT INTO t SELECT FROM generate_series(1, {rows}); INSERT INTO p SELECT id FROM t")
    query = "SELECT tgrelid::regclass::text, tgname, tgenabled FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2"
    before = await sql.fetch(query)
    await cleanup_tables(session, tables("t", "p", "log"))
    assert await counts(sql, "t", "log", "p") == [0, 0, 0]
    assert await sql.fetch(query) == before
    assert {row["tgenabled"] for row in before} == {b"O", b"A", b"D", b"R"}


ROLE = f"pgtoolset_cleaner_{os.getpid()}"


async def test_as_the_owner(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """A role that owns the tables, and is no more than that, will do: for triggers, sequences, large tables."""
    await sql.execute(
        f"""CREATE ROLE {ROLE}; GRANT CREATE ON SCHEMA public TO {ROLE}; SET ROLE {ROLE};
            CREATE TABLE a (id serial PRIMARY KEY); CREATE TABLE b (id serial PRIMARY KEY, a int REFERENCES a);
            CREATE TABLE c (id int GENERATED ALWAYS AS IDENTITY);
            CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
            CREATE TRIGGER keep BEFORE DELETE ON c FOR EACH ROW EXECUTE FUNCTION keep();
            INSERT INTO a SELECT FROM generate_series(1, 3000); INSERT INTO b (a) SELECT id FROM a;
            INSERT INTO c DEFAULT VALUES; RESET ROLE"""
    )
    try:
        engine = create_async_engine(own.url, connect_args={"server_settings": {"role": ROLE}})
        async with AsyncSession(engine) as session:
            await cleanup_tables(session, tables("a", "b", "c"))
        await engine.dispose()
        assert await counts(sql, "a", "b", "c") == [0, 0, 0]
        assert await sql.fetchval("INSERT INTO c DEFAULT VALUES RETURNING id") == 1
    finally:
        await sql.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}")


async def test_row_security(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """Rows that a policy hides from this role are an error, not forgotten."""
    await sql.execute(
        f"""CREATE TABLE t (id serial PRIMARY KEY); INSERT INTO t DEFAULT VALUES;
           CREATE ROLE {ROLE};
           ALTER TABLE t OWNER TO {ROLE};
           ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY"""
    )
    try:
        engine = create_async_engine(own.url, connect_args={"server_settings": {"role": ROLE}})
        async with AsyncSession(engine) as session:
            with pytest.raises(DBAPIError, match="row-level security"):
                await cleanup_tables(session, tables("t"))
        await sql.execute("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
        async with AsyncSession(engine) as session:
            await cleanup_tables(session, tables("t"))
        await engine.dispose()
        assert await counts(sql, "t") == [0]
    finally:
        await sql.execute(f"DROP TABLE t; DROP ROLE {ROLE}")


async def test_rules(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A rule that would keep the rows is an error."""
    await sql.execute("CREATE TABLE t (id serial); CREATE RULE keep AS ON DELETE TO t DO INSTEAD NOTHING")
    await sql.execute("INSERT INTO t DEFAULT VALUES")
    with pytest.raises(DBAPIError, match="rule"):
        await cleanup_tables(session, tables("t"))


# What is not ours


@pytest.mark.parametrize("rows", [1, 5_000])
@pytest.mark.parametrize("action", ["NO ACTION", "RESTRICT", "CASCADE", "SET NULL", "SET DEFAULT"])
async def test_references_from_outside(session: AsyncSession, sql: asyncpg.Connection, action: str, rows: int) -> None:
    """Rows of other tables that reference ours are an error that says which, whatever a deletion would do to them;
    without them the other tables are no obstacle."""
    await sql.execute(
        f"""CREATE SCHEMA "Other"; CREATE TABLE ours (id serial PRIMARY KEY, k int UNIQUE);
            CREATE TABLE "Other".theirs (
              id serial, "Our" int CONSTRAINT "to us" REFERENCES ours ON DELETE {action}, k int REFERENCES ours (k));
            INSERT INTO ours SELECT n, n FROM generate_series(1, {rows}) n;
            INSERT INTO "Other".theirs ("Our") VALUES (1)"""
    )
    with pytest.raises(OutsideReferenceError) as raised:
        await cleanup_tables(session, tables("ours"))
    assert raised.value.references == ("Other.theirs (to us)",)
    assert "Other.theirs (to us)" in str(raised.value)
    assert await counts(sql, "ours", '"Other".theirs') == [rows, 1]
    await sql.execute('UPDATE "Other".theirs SET "Our" = NULL')
    before = await sql.fetch('SELECT *, xmin, ctid FROM "Other".theirs')
    await cleanup_tables(session, tables("ours"))
    assert await counts(sql, "ours") == [0]
    assert await sql.fetch('SELECT *, xmin, ctid FROM "Other".theirs') == before


async def test_references_from_outside_to_partitions(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """That holds for references to a partition, and from a partitioned table."""
    await sql.execute(
        """CREATE TABLE ours (id int PRIMARY KEY) PARTITION BY LIST (id);
           CREATE TABLE part PARTITION OF ours DEFAULT; INSERT INTO ours VALUES (1);
           CREATE TABLE theirs (id int REFERENCES part ON DELETE CASCADE) PARTITION BY LIST (id);
           CREATE TABLE their_part PARTITION OF theirs DEFAULT"""
    )
    await sql.execute("INSERT INTO theirs VALUES (1)")
    with pytest.raises(OutsideReferenceError, match=r"public\.theirs \("):
        await cleanup_tables(session, tables("ours"))
    assert await counts(sql, "ours", "theirs") == [1, 1]


async def test_reference_that_comes_meanwhile(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A row of another table that references ours and is committed while the lock is waited for is not lost."""
    await sql.execute(
        """CREATE TABLE ours (id serial PRIMARY KEY); INSERT INTO ours DEFAULT VALUES;
           CREATE TABLE theirs (id int REFERENCES ours ON DELETE CASCADE)"""
    )
    async with sql.transaction():
        await sql.execute("INSERT INTO theirs VALUES (1)")
        task = asyncio.create_task(cleanup_tables(session, tables("ours")))
        await asyncio.sleep(0.3)
        assert not task.done()
    with pytest.raises(OutsideReferenceError):
        await task
    assert await counts(sql, "ours", "theirs") == [1, 1]


# Others in the way


@pytest.mark.parametrize(
    "statement", ["INSERT INTO author DEFAULT VALUES", "LOCK TABLE author IN ACCESS EXCLUSIVE MODE"]
)
@pytest.mark.usefixtures("shop")
async def test_forgotten_transaction(session: AsyncSession, sql: asyncpg.Connection, statement: str) -> None:
    """A transaction that somebody forgot yields an error that names it, in time, and nothing was touched."""
    await sql.execute("INSERT INTO author DEFAULT VALUES")
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute(statement)
    with pytest.raises(LockTimeoutError, match="who forgot") as raised:
        async with asyncio.timeout(5):
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
async def test_reader_is_not_in_the_way(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A transaction that has only read a small table is in nobody's way."""
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
    """Cancelled at any suspension: either all is done or nothing, and the session can be used again."""

    async def work(_: int) -> None:
        await sql.execute("TRUNCATE author RESTART IDENTITY CASCADE; INSERT INTO author DEFAULT VALUES")
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


# By property

edges = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from(["NO ACTION", "RESTRICT", "CASCADE", "SET NULL"]),
        st.sampled_from(["", "DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"]),
    ),
    max_size=10,
)
rows = st.lists(st.sampled_from([0, 0, 1, 5, 400]), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=edges, rows=rows, outside=st.sampled_from([0, 0, 1]), linked=st.booleans())
async def test_any_graph(
    session: AsyncSession, sql: asyncpg.Connection, edges: list[Any], rows: list[int], outside: int, linked: bool
) -> None:
    """Whatever references whatever: all of ours is empty and restarted, or rows from outside are told and all stays."""
    await sql.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for number in range(6):
        await sql.execute(f"CREATE TABLE t{number} (id serial PRIMARY KEY)")
    for number, (one, other, action, deferrable) in enumerate(edges):
        await sql.execute(
            f"ALTER TABLE t{one} ADD COLUMN r{number} int REFERENCES t{other} ON DELETE {action} {deferrable}"
        )
    for number, count in enumerate(rows):
        await sql.execute(f"INSERT INTO t{number} SELECT FROM generate_series(1, {count})")
    for number, (one, other, _, _) in enumerate(edges):
        least = min(rows[one], rows[other]) if linked else 0
        await sql.execute(f"UPDATE t{one} SET r{number} = id WHERE id <= {least}")
    ours = [f"t{number}" for number in range(outside, 6)]
    into_ours = any(one < outside <= other and linked and min(rows[one], rows[other]) for one, other, _, _ in edges)
    before = await counts(sql, *(f"t{number}" for number in range(6)))
    if into_ours:
        with pytest.raises(OutsideReferenceError):
            await cleanup_tables(session, tables(*ours))
        assert await counts(sql, *(f"t{number}" for number in range(6))) == before
        return
    await cleanup_tables(session, tables(*ours))
    assert await counts(sql, *ours) == [0] * len(ours)
    assert await counts(sql, "t0") == ([rows[0]] if outside else [0])
    for name in ours:
        assert await sql.fetchval(f"INSERT INTO {name} DEFAULT VALUES RETURNING id") == 1


async def test_the_tables_of_the_suite(engine: AsyncEngine) -> None:
    """The tables that this suite itself uses are emptied by it."""
    async with AsyncSession(engine) as session:
        session.add(Item())
        await session.commit()
        await cleanup_tables(session, Item)
        assert await session.scalar(text("SELECT count(*) FROM item")) == 0
