"""`pgtoolset doctor`: triggers, statistics, sequences and indexes that need care."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import Column, Integer, MetaData, Numeric, String, Table
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import registry

from pgtoolset import row_change_trigger
from pgtoolset._postgres import sequence_ends
from tests.commands.test_doctor import examined, names
from tests.safety.names import NAMES
from tests.support import plain_url


@pytest.fixture
async def engine(empty_database: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(empty_database)
    yield engine
    await engine.dispose()


@pytest.fixture
async def owner(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser in a database of the test's own, beside the roles `pgts clerk` and its group."""
    connection = await asyncpg.connect(plain_url(empty_database))
    await connection.execute(
        """CREATE ROLE "pgts clerk"; CREATE ROLE "pgts group";
           CREATE SCHEMA evil; GRANT CREATE ON SCHEMA public, evil TO "pgts clerk", "pgts group" """
    )
    yield connection
    await connection.execute(
        """DROP OWNED BY "pgts clerk", "pgts group" CASCADE;
           DROP ROLE "pgts clerk", "pgts group" """
    )
    await connection.close()


async def watched(engine: AsyncEngine, *columns: Column[object], name: str = "item") -> str:
    """Create a table and its triggers; return the call of their function, quoted."""
    table = Table(name, MetaData(), *(columns or [Column("id", Integer, primary_key=True)]))
    model = type("Model", (), {})
    registry().map_imperatively(
        model, table, properties={f"c{n}": c for n, c in enumerate(table.c)}
    )
    async with engine.begin() as connection:
        await connection.run_sync(table.metadata.create_all)
        for ddl in row_change_trigger(model):
            await connection.execute(ddl)
        found = await connection.exec_driver_sql(
            "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'pgtoolset%%'"
            if engine.dialect.driver == "psycopg"
            else "SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'pgtoolset%'"
        )
        return str(found.scalars().all()[-1])


async def test_intact_triggers(
    engine: AsyncEngine, owner: asyncpg.Connection, empty_database: str
) -> None:
    """Triggers as they were made are no finding, whatever the table, its columns and keys are."""
    for name in [*NAMES, ")) AS pg_catalog.text"]:
        await watched(
            engine,
            Column(name, Integer, primary_key=True),
            Column("select", String, primary_key=True, quote=True),
            name=name,
        )
    await watched(engine, Column("by number", Numeric, primary_key=True), name="no named keys")
    code, report = await examined(empty_database)
    assert (code, report["findings"]) == (0, [])


TRIGGER = "CREATE OR REPLACE TRIGGER pgtoolset_insert AFTER INSERT ON item"
OTHERS = """CREATE FUNCTION evil.f() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN RETURN NULL; END'; """


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ('ALTER FUNCTION {f} OWNER TO "pgts clerk"', ["stolen_trigger_function"] * 4),
        (
            """CREATE OR REPLACE FUNCTION {f} RETURNS trigger LANGUAGE plpgsql AS
               'BEGIN RETURN NULL; END'""",
            ["altered_trigger_function"],
        ),
        ("ALTER FUNCTION {f} SECURITY DEFINER", ["altered_trigger_function"]),
        ("ALTER FUNCTION {f} SET search_path = evil", ["altered_trigger_function"]),
        ("DROP TRIGGER pgtoolset_update ON item", ["missing_triggers"]),
        ("ALTER TABLE item DISABLE TRIGGER pgtoolset_update", ["missing_triggers"]),
        ("ALTER TABLE item ENABLE REPLICA TRIGGER pgtoolset_update", ["missing_triggers"]),
        ("ALTER TABLE item ENABLE ALWAYS TRIGGER pgtoolset_update", []),
        ("DROP TABLE item; CREATE TABLE item ()", ["unused_trigger_function"]),
        (f"{OTHERS} {TRIGGER} EXECUTE FUNCTION evil.f()", ["stolen_trigger"]),
        (f"{TRIGGER} FOR EACH ROW EXECUTE FUNCTION {{f}}", ["altered_trigger"]),
        (f"{TRIGGER} FOR EACH STATEMENT WHEN (false) EXECUTE FUNCTION {{f}}", ["altered_trigger"]),
        (f"{TRIGGER} EXECUTE FUNCTION {{f}}", ["altered_trigger"]),
        ("CREATE TABLE evil.other (); ALTER TABLE item SET SCHEMA evil", []),
    ],
)
async def test_triggers(
    engine: AsyncEngine,
    owner: asyncpg.Connection,
    empty_database: str,
    statement: str,
    found: list[str],
) -> None:
    """A function or trigger that is missing, another's or altered is found, and nothing else."""
    call = await watched(engine)
    await owner.execute(statement.replace("{f}", call))
    code, report = await examined(empty_database)
    assert (code, names(report["findings"])) == (int(bool(found)), found)
    for each in report["findings"]:
        assert "row_change_trigger" in each["advice"]
        assert call in each["message"] or "item" in each["message"]


@pytest.mark.parametrize(("is_member", "found"), [(True, 0), (False, 4)])
async def test_whose_function(
    engine: AsyncEngine,
    owner: asyncpg.Connection,
    empty_database: str,
    is_member: bool,
    found: int,
) -> None:
    """A member of the role that owns the table may own the function, and no other role may."""
    call = await watched(engine)
    await owner.execute(
        f"""ALTER TABLE item OWNER TO "pgts group"; ALTER FUNCTION {call} OWNER TO "pgts clerk" """
    )
    if is_member:
        await owner.execute('GRANT "pgts group" TO "pgts clerk"')
    _, report = await examined(empty_database)
    assert names(report["findings"]) == ["stolen_trigger_function"] * found
    for each in report["findings"]:
        assert f"{call} belongs to pgts clerk, and public.item to pgts group" in each["message"]


async def test_statistics(
    engine: AsyncEngine, owner: asyncpg.Connection, empty_database: str
) -> None:
    """A watched table that was filled and never analyzed is found, and one that is small is not."""
    await watched(engine)
    await owner.execute("CREATE TABLE unwatched AS SELECT generate_series(1, 5000)")
    _, report = await examined(empty_database)
    assert report["findings"] == []
    await owner.execute("ALTER TABLE item SET (autovacuum_enabled = false)")
    await owner.execute("INSERT INTO item SELECT generate_series(1, 1000)")
    code, report = await examined(empty_database)
    assert (code, names(report["findings"])) == (1, ["no_statistics"])
    assert report["findings"][0]["advice"] == "ANALYZE public.item"
    await owner.execute(report["findings"][0]["advice"])
    _, report = await examined(empty_database)
    assert report["findings"] == []


async def test_statistics_of_partitions(owner: asyncpg.Connection, empty_database: str) -> None:
    """The partitions of a watched table have the statistics, and are named."""
    table = Table("parted", MetaData(), Column("id", Integer, primary_key=True))
    model = type("Model", (), {})
    registry().map_imperatively(model, table)
    await owner.execute(
        """CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
           CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (2000)
             WITH (autovacuum_enabled = false);
           CREATE TABLE high PARTITION OF parted FOR VALUES FROM (2000) TO (4000);"""
    )
    engine = create_async_engine(empty_database)
    async with engine.begin() as connection:
        for ddl in row_change_trigger(model):
            await connection.execute(ddl)
    await engine.dispose()
    await owner.execute("INSERT INTO parted SELECT generate_series(1, 1000)")
    _, report = await examined(empty_database)
    assert [each["advice"] for each in report["findings"]] == ["ANALYZE public.low"]


@pytest.mark.parametrize(
    ("ddl", "value", "severity", "says"),
    [
        ("CREATE TABLE t (id serial)", 1_717_986_917, None, ""),
        ("CREATE TABLE t (id serial)", 1_717_986_919, "warning", "429,496,728 left"),
        ("CREATE TABLE t (id serial)", 2_100_000_000, "error", "by the integer column public.t.id"),
        ("CREATE TABLE t (id serial)", 2_147_483_647, "error", "0 left"),
        ("CREATE TABLE t (id bigserial)", 2_147_483_647, None, ""),
        ("CREATE TABLE t (id bigserial)", 9_000_000_000_000_000_000, "error", "bigint"),
        (
            "CREATE TABLE t (id smallint GENERATED ALWAYS AS IDENTITY)",
            30_000,
            "warning",
            "smallint",
        ),
        (
            "CREATE TABLE t (id int); CREATE SEQUENCE t_id_seq OWNED BY t.id",
            2_100_000_000,
            "error",
            "by the integer column public.t.id",
        ),
        (
            "CREATE TABLE t (id int); CREATE SEQUENCE t_id_seq OWNED BY t.id",
            3_000_000_000,
            "error",
            "100% of its values and has 0 left",
        ),
        (
            """CREATE SEQUENCE t_id_seq;
               CREATE TABLE t (id int DEFAULT nextval('t_id_seq'), big bigint)""",
            2_100_000_000,
            "error",
            "by the integer column public.t.id",
        ),
        (
            """CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE SEQUENCE t_id_seq;
               CREATE TABLE t (id positive DEFAULT nextval('t_id_seq'))""",
            2_100_000_000,
            "error",
            "by the integer column public.t.id",
        ),
        ("CREATE SEQUENCE t_id_seq MAXVALUE 10", 8, "warning", "ends at 10"),
        ("CREATE SEQUENCE t_id_seq MAXVALUE 10", 10, "error", "ends at 10"),
        ("CREATE SEQUENCE t_id_seq MAXVALUE 10 CYCLE", 10, None, ""),
        ("CREATE SEQUENCE t_id_seq INCREMENT -1 MINVALUE -10", -5, None, ""),
        ("CREATE SEQUENCE t_id_seq INCREMENT -1 MINVALUE -10", -9, "warning", "ends at -10"),
        ("CREATE SEQUENCE t_id_seq AS int MINVALUE -2147483648 START -2147483648", 1, None, ""),
        (
            "CREATE TABLE t (id text); CREATE SEQUENCE t_id_seq OWNED BY t.id",
            3_000_000_000,
            None,
            "",
        ),
        ("CREATE UNLOGGED TABLE t (id serial)", 2_100_000_000, "error", "integer"),
    ],
)
async def test_sequences(
    owner: asyncpg.Connection,
    empty_database: str,
    ddl: str,
    value: int,
    severity: str | None,
    says: str,
) -> None:
    """A sequence is a finding from 80 % of what it, or its column, can count on."""
    await owner.execute(ddl)
    code, report = await examined(empty_database)
    assert (code, report["findings"]) == (0, []), "a sequence without a value"
    await owner.execute(f"SELECT setval('t_id_seq', {value})")
    code, report = await examined(empty_database)
    assert [each["severity"] for each in report["findings"]] == [severity] * bool(severity)
    assert code == bool(severity)
    for each in report["findings"]:
        assert each["name"] == "sequence_end"
        assert "public.t_id_seq" in each["message"]
        assert says in each["message"]


async def test_many_sequences(
    owner: asyncpg.Connection, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are read in parts, so that their locks fit into the server's memory."""
    monkeypatch.setattr(sequence_ends, "_AT_ONCE", 2)
    for number in range(5):
        await owner.execute(f"CREATE SEQUENCE s{number} MAXVALUE 10; SELECT setval('s{number}', 9)")
    _, report = await examined(empty_database)
    assert names(report["findings"]) == ["sequence_end"] * 5


async def test_a_sequence_that_is_locked(owner: asyncpg.Connection, empty_database: str) -> None:
    """A lock delays a check for a moment, and the report says what was not checked."""
    await owner.execute("CREATE SEQUENCE s")
    await owner.execute("BEGIN; ALTER SEQUENCE s MAXVALUE 10")
    code, report = await examined(empty_database)
    await owner.execute("ROLLBACK")
    assert (code, report["findings"]) == (0, [])
    [note] = [each for each in report["notes"] if each["name"] == "not_checked"]
    assert "not checked: sequences; canceling statement due to lock timeout" in note["message"]


async def test_indexes(owner: asyncpg.Connection, empty_database: str) -> None:
    """An index that a failed CREATE INDEX CONCURRENTLY has left is found, and how to mend it."""
    await owner.execute("CREATE TABLE t AS SELECT 1 AS id UNION ALL SELECT 1")
    with pytest.raises(asyncpg.UniqueViolationError):
        await owner.execute("CREATE UNIQUE INDEX CONCURRENTLY once ON t (id)")
    await owner.execute(
        """CREATE TABLE parted (id int) PARTITION BY RANGE (id);
           CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (9);
           CREATE INDEX ON ONLY parted (id)"""
    )
    code, report = await examined(empty_database)
    assert (code, names(report["findings"])) == (1, ["invalid_index"])
    assert "the index public.once of public.t is invalid" in report["findings"][0]["message"]
    assert "DROP INDEX CONCURRENTLY public.once" in report["findings"][0]["advice"]
