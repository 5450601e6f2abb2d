"""`cleanup_tables` and sequences: which are ours, which have moved, and where they start."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy import Column, Integer, MetaData, Sequence, Table
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import cleanup_tables
from tests.databases.cleaning import files, tables

UNOWNED = """
CREATE SCHEMA "Other";
CREATE SEQUENCE "Other"."The seq" START 7 INCREMENT -2 MINVALUE -100 MAXVALUE 100;
CREATE TABLE t (id int DEFAULT nextval('"Other"."The seq"'))
"""
OWNED = "CREATE TABLE t (id serial); ALTER SEQUENCE t_id_seq RENAME TO s; ALTER SEQUENCE s START 7"
IDENTITY = """CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME s START 7))"""
ONLY_OWNED = "CREATE TABLE t (id int); CREATE SEQUENCE s START 7 OWNED BY t.id"
OF_PARTITION = """
CREATE SEQUENCE s START 7;
CREATE TABLE t (id int) PARTITION BY LIST (id);
CREATE TABLE part PARTITION OF t (id DEFAULT nextval('s')) DEFAULT
"""
MOVES = ["nextval(s)", "setval(s, 7)", "setval(s, 5, false)", "setval(s, 7, true), nextval(s)"]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("made", [UNOWNED, OWNED, IDENTITY, ONLY_OWNED, OF_PARTITION])
async def test_moved(session: AsyncSession, sql: asyncpg.Connection, made: str, move: str) -> None:
    """However a column comes by its sequence, and however that has moved, it starts again."""
    await sql.execute(made)
    name = '"Other"."The seq"' if made is UNOWNED else "s"
    await sql.fetch(f"SELECT {move} FROM (SELECT '{name}'::regclass AS s) AS _")
    await cleanup_tables(session, tables("t"))
    assert await sql.fetchrow(f"SELECT last_value, is_called FROM {name}") == (7, False)
    before = await files(sql)
    await cleanup_tables(session, tables("t"))
    assert await files(sql) == before


async def test_of_the_metadata(own: AsyncEngine, sql: asyncpg.Connection) -> None:
    """A `Sequence()` that SQLAlchemy calls is ours, with its schema translated; others are not."""
    metadata = MetaData(schema="per_tenant")
    Table("plain", metadata, Column("id", Integer, Sequence("one", schema="per_tenant")))
    two = Sequence("two", schema="per_tenant")
    Table("called", metadata, Column("id", Integer, default=two.next_value() + 100))
    Table("none", metadata, Column("id", Integer, Sequence("no", optional=True), primary_key=True))
    Table("fixed", metadata, Column("id", Integer, default=5), Column("x", Integer, default=int))
    await sql.execute(
        """CREATE SCHEMA tenant; CREATE SCHEMA per_tenant; CREATE SEQUENCE no;
           CREATE SEQUENCE tenant.one START 3; CREATE SEQUENCE tenant.two;
           CREATE SEQUENCE per_tenant.one; CREATE SEQUENCE tenant.other;
           CREATE TABLE tenant.plain (id int)"""
    )
    names = ["tenant.one", "tenant.two", "per_tenant.one", "tenant.other", "no"]
    for name in names:
        await sql.fetchval(f"SELECT nextval('{name}')")
    translated = own.execution_options(schema_translate_map={"per_tenant": "tenant"})
    async with AsyncSession(translated) as session:
        await cleanup_tables(session, metadata)
    called = [await sql.fetchval(f"SELECT is_called FROM {name}") for name in names]
    assert called == [False, False, True, True, True]
    assert await sql.fetchval("SELECT last_value FROM tenant.one") == 3


@pytest.mark.parametrize(
    ("outside", "is_restarted"),
    [
        ("CREATE TABLE theirs (id int DEFAULT nextval('s'))", False),
        ("CREATE TABLE theirs (id int); ALTER SEQUENCE s OWNED BY theirs.id", False),
        ("CREATE TABLE child () INHERITS (t)", False),
        ("CREATE VIEW v AS TABLE t; ALTER VIEW v ALTER id SET DEFAULT nextval('s')", True),
        ("ALTER SEQUENCE s OWNED BY t.id; CREATE TABLE copy (LIKE t INCLUDING DEFAULTS)", True),
        ("CREATE TABLE known (id int DEFAULT nextval('s'))", True),
    ],
)
async def test_shared(
    session: AsyncSession, sql: asyncpg.Connection, outside: str, is_restarted: bool
) -> None:
    """A sequence that a table outside numbers its rows by goes on, unless a column of ours owns it.

    Whether it does is asked at each call, so a default that is set or dropped counts at once.
    """
    await sql.execute("CREATE SEQUENCE s; CREATE TABLE t (id int DEFAULT nextval('s'))")
    ours = tables("t", "known")
    await cleanup_tables(session, ours)
    await sql.execute(outside)
    await sql.execute("INSERT INTO t DEFAULT VALUES")
    await cleanup_tables(session, ours)
    assert await sql.fetchval("SELECT is_called FROM s") is not is_restarted
    assert not await sql.fetchval("SELECT count(*) FROM ONLY t")


async def test_new_at_each_call(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Tables, sequences, defaults and foreign keys that came since the last call count."""
    metadata = tables("one", "two")
    await sql.execute("CREATE TABLE one (id int PRIMARY KEY)")
    await cleanup_tables(session, metadata)
    await sql.execute(
        """CREATE SEQUENCE s; ALTER TABLE one ALTER id SET DEFAULT nextval('s');
           CREATE TABLE two (id int REFERENCES one); INSERT INTO one DEFAULT VALUES;
           INSERT INTO two VALUES (1)"""
    )
    await cleanup_tables(session, metadata)
    assert await sql.fetchval("SELECT is_called FROM s") is False
    assert await sql.fetchval("SELECT (SELECT count(*) FROM one) + count(*) FROM two") == 0
    await sql.execute(
        """ALTER SEQUENCE s START 50; DROP TABLE two;
           CREATE TABLE two (id int DEFAULT nextval('s'));
           INSERT INTO one VALUES (1); INSERT INTO two DEFAULT VALUES"""
    )
    await cleanup_tables(session, metadata)
    assert await sql.fetchrow("SELECT last_value, is_called FROM s") == (50, False)
    await sql.execute(
        "DROP TABLE one; CREATE TABLE one (id serial); INSERT INTO one DEFAULT VALUES"
    )
    await cleanup_tables(session, metadata)
    assert await sql.fetchval("INSERT INTO one DEFAULT VALUES RETURNING id") == 1
