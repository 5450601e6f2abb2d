"""`cleanup_tables` with many rows that reference others: no DELETE reads a table for each row."""

from __future__ import annotations

import re

import asyncpg
import pytest
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import cleanup_tables
from tests.databases.cleaning import counts, statements, tables
from tests.support import connect_args, roles

ROLE = "pgtoolset_costs"

#: `r` has many rows, `s` references them, and the empty `e` references `s`.
PLAIN = """
CREATE TABLE r (id int PRIMARY KEY);
CREATE TABLE s (id serial PRIMARY KEY, r int REFERENCES r, other int DEFAULT 1);
CREATE TABLE e (id serial PRIMARY KEY, s int REFERENCES s);
"""
PARTITIONED = """
CREATE TABLE r (id int PRIMARY KEY);
CREATE TABLE s (id serial, gone int, r int REFERENCES r, PRIMARY KEY (id, r))
  PARTITION BY RANGE (r);
ALTER TABLE s DROP COLUMN gone;
CREATE TABLE s1 PARTITION OF s FOR VALUES FROM (MINVALUE) TO (1000);
CREATE TABLE s2 PARTITION OF s DEFAULT PARTITION BY RANGE (r);
CREATE TABLE s3 PARTITION OF s2 DEFAULT;
CREATE TABLE e (id serial PRIMARY KEY, s int, r int, FOREIGN KEY (s, r) REFERENCES s);
"""
PARTITIONED_BELOW = """
CREATE TABLE r (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE r1 PARTITION OF r FOR VALUES FROM (MINVALUE) TO (1000);
CREATE TABLE r2 PARTITION OF r DEFAULT;
CREATE TABLE s (id serial PRIMARY KEY, r int REFERENCES r);
CREATE TABLE e (id serial PRIMARY KEY, s int REFERENCES s);
"""
FILL = """
INSERT INTO r (id) SELECT generate_series(1, {0});
INSERT INTO s (r) SELECT id FROM r;
"""

#: Of two columns.
COMPOSITE = """
CREATE TABLE r (a int, b int, PRIMARY KEY (a, b));
CREATE TABLE s (id serial PRIMARY KEY, a int, b int, other int, FOREIGN KEY (a, b) REFERENCES r);
CREATE TABLE e (id serial PRIMARY KEY, s int REFERENCES s);
"""
FILL_COMPOSITE = """
INSERT INTO r SELECT n, n FROM generate_series(1, {0}) n; INSERT INTO s (a, b) SELECT a, b FROM r;
"""

#: To itself, or in a cycle. `r` stands for both ends.
OF_ITSELF = """
CREATE TABLE r (id int PRIMARY KEY, r int REFERENCES r);
CREATE TABLE e (id serial PRIMARY KEY, s int REFERENCES r);
"""
FILL_OF_ITSELF = "INSERT INTO r SELECT n, nullif(n - 1, 0) FROM generate_series(1, {0}) n"
CYCLE = f"{PLAIN} ALTER TABLE r ADD s int REFERENCES s;"
FILL_CYCLE = f"{FILL} UPDATE r SET s = (SELECT min(id) FROM s WHERE s.r < 5)"

USABLE = [
    (PLAIN, "CREATE INDEX ON s (r)", FILL),
    (PLAIN, "CREATE INDEX ON s USING hash (r)", FILL),
    (PLAIN, "CREATE INDEX ON s (r DESC, other)", FILL),
    (PLAIN, "CREATE UNIQUE INDEX ON s (r) INCLUDE (other)", FILL),
    (COMPOSITE, "CREATE INDEX ON s (b, a, other)", FILL_COMPOSITE),
    (COMPOSITE, "CREATE UNIQUE INDEX ON s (b)", FILL_COMPOSITE),
    (PARTITIONED, "CREATE INDEX ON s (r)", FILL),
    (PARTITIONED, "CREATE INDEX ON s1 (r); CREATE INDEX ON s3 (r)", FILL),
    (PARTITIONED_BELOW, "CREATE INDEX ON s (r)", FILL),
    (OF_ITSELF, "CREATE INDEX ON r (r)", FILL_OF_ITSELF),
    (CYCLE, "CREATE INDEX ON s (r); CREATE INDEX ON r (s)", FILL_CYCLE),
]
NOT_USABLE = [
    (PLAIN, "", FILL),
    (PLAIN, "CREATE INDEX ON s (r) WHERE other > 0", FILL),
    (
        PLAIN,
        """CREATE INDEX broken ON s (r);
           UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass""",
        FILL,
    ),
    (PLAIN, "CREATE INDEX ON s USING brin (r)", FILL),
    (PLAIN, "CREATE INDEX ON s (other, r)", FILL),
    (PLAIN, "CREATE INDEX ON s (other) INCLUDE (r)", FILL),
    (PLAIN, "CREATE UNIQUE INDEX ON s ((r + 0), id)", FILL),
    (COMPOSITE, "CREATE INDEX ON s (a)", FILL_COMPOSITE),
    (COMPOSITE, "CREATE INDEX ON s (a, other, b)", FILL_COMPOSITE),
    (PARTITIONED, "", FILL),
    (PARTITIONED, "CREATE INDEX ON s1 (r)", FILL),
    (PARTITIONED, "CREATE INDEX ON ONLY s (r)", FILL),
    (PARTITIONED_BELOW, "", FILL),
    (OF_ITSELF, "", FILL_OF_ITSELF),
    (CYCLE, "CREATE INDEX ON s (r)", FILL_CYCLE),
]


def metadata_of(made: str) -> MetaData:
    """The tables that are no partitions."""
    return tables(*re.findall(r"CREATE TABLE (\w+) \(", made))


def truncated(sent: list[str]) -> set[str]:
    """The tables that the statements truncate."""
    found = re.findall(r"TRUNCATE ([^;]*);", "\n".join(sent))
    return {name for each in found for name in re.findall(r"public\.(\w+)", each)}


async def scans(session: AsyncSession, sql: asyncpg.Connection) -> int:
    """How often the session and others have read a table from end to end, but for the empty `e`."""
    if sql.get_server_version().major >= 15:
        await session.execute(text("SELECT pg_stat_force_next_flush()"))
    await session.commit()
    found: int = await sql.fetchval(
        """SELECT sum(pg_stat_get_numscans(oid)) FROM pg_class
           WHERE relkind = 'r' AND relname LIKE ANY ('{r%,s%,theirs}')
           AND relnamespace = 'public'::regnamespace"""
    )
    return found


@pytest.mark.parametrize(
    ("made", "index", "fill", "is_usable"),
    [*((*each, True) for each in USABLE), *((*each, False) for each in NOT_USABLE)],
)
async def test_indexes(
    own: AsyncEngine,
    session: AsyncSession,
    sql: asyncpg.Connection,
    made: str,
    index: str,
    fill: str,
    is_usable: bool,
) -> None:
    """Where each foreign key has an index, rows are deleted and an empty table is not touched;
    where one has no index that helps, the tables are truncated, with empty ones."""
    await sql.execute(f"{made}; {index}; {fill.format(2_000)}")
    sent = statements(own)
    metadata = metadata_of(made)
    await cleanup_tables(session, metadata)
    assert truncated(sent) == (set() if is_usable else set(metadata.tables))
    assert await counts(sql, "r", "e") == [0, 0]
    assert await scans(session, sql) < 100


@pytest.mark.parametrize(("rows", "fill"), [(20, FILL), (20_000, "INSERT INTO r VALUES (1)")])
async def test_cheap_without_an_index(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection, rows: int, fill: str
) -> None:
    """Few rows, or many that no row references, are deleted: an empty table is not touched."""
    await sql.execute(f"{PLAIN}; {fill.format(rows)}")
    sent = statements(own)
    await cleanup_tables(session, metadata_of(PLAIN))
    assert truncated(sent) == set()
    assert await counts(sql, "r", "s") == [0, 0]


async def test_many_rows(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """Twenty thousand rows go without an index, and another ten tables hang on them."""
    chain = "".join(
        f"CREATE TABLE e{n} (id int PRIMARY KEY REFERENCES {f'e{n - 1}' if n else 's'});"
        for n in range(10)
    )
    made = f"{PLAIN} {chain}"
    await sql.execute(f"{made} {FILL.format(20_000)}")
    await cleanup_tables(session, metadata_of(made))
    assert await counts(sql, "r", "s") == [0, 0]
    assert await scans(session, sql) < 100


async def test_rows_that_are_dead(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """An empty table with the pages of deleted rows is not read for each row either."""
    await sql.execute(f"{PLAIN} ALTER TABLE s SET (autovacuum_enabled = false)")
    await sql.execute(f"{FILL.format(5_000)}; DELETE FROM s; DELETE FROM r WHERE id > 200")
    sent = statements(own)
    await cleanup_tables(session, metadata_of(PLAIN))
    assert truncated(sent) == {"r", "s", "e"}
    assert await counts(sql, "r", "s") == [0, 0]


async def test_plan_of_a_small_table(session: AsyncSession, sql: asyncpg.Connection) -> None:
    """A plan that PostgreSQL has made for a few rows reads no large table, though it has one."""
    made = f"{PLAIN} CREATE INDEX ON s (r)"
    await sql.execute(f"{made}; {FILL.format(2)}; ANALYZE")
    await cleanup_tables(session, metadata_of(PLAIN))
    await sql.execute(FILL.format(2_000))
    await cleanup_tables(session, metadata_of(PLAIN))
    assert await counts(sql, "r", "s") == [0, 0]
    assert await scans(session, sql) < 100


# Where TRUNCATE is not possible


@pytest.mark.parametrize("to", ["r", "s"])
@pytest.mark.parametrize("action", ["NO ACTION", "CASCADE"])
async def test_referenced_from_outside(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection, action: str, to: str
) -> None:
    """A table outside, with rows that reference none, is neither touched nor read for each row."""
    await sql.execute(
        f"""{PLAIN} {FILL.format(2_000)}; CREATE TABLE log (id int);
            CREATE TABLE theirs (id int, their int REFERENCES {to} ON DELETE {action});
            CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
              'BEGIN INSERT INTO log VALUES (1); RETURN OLD; END';
            CREATE TRIGGER note AFTER DELETE ON r FOR EACH ROW EXECUTE FUNCTION note();
            ALTER TABLE r ENABLE REPLICA TRIGGER note;
            INSERT INTO theirs SELECT generate_series(1, 2000)"""
    )
    before = await sql.fetch("SELECT *, xmin, ctid FROM theirs")
    await cleanup_tables(session, metadata_of(PLAIN))
    assert await counts(sql, "r", "s", "log") == [0, 0, 0]
    assert await sql.fetch("SELECT *, xmin, ctid FROM theirs") == before
    assert await scans(session, sql) < 100
    assert await session.scalar(text("SHOW session_replication_role")) == "origin"
    await session.rollback()
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await sql.execute("INSERT INTO s (r) VALUES (1)")


async def test_only_one_of_the_two(
    own: AsyncEngine, session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """Where the referenced table cannot be truncated, the one that would be read is."""
    await sql.execute(f"{PLAIN} {FILL.format(2_000)}; CREATE TABLE theirs (id int REFERENCES r)")
    sent = statements(own)
    await cleanup_tables(session, metadata_of(PLAIN))
    assert truncated(sent) == {"s", "e"}
    assert await counts(sql, "r", "s") == [0, 0]
    assert not any("'replica'" in each for each in sent)


@pytest.mark.parametrize("missing", ["r, s, e", "e", "s", "r"])
async def test_without_the_privilege(url: str, sql: asyncpg.Connection, missing: str) -> None:
    """A role that may not truncate one of the tables deletes its rows, however long that takes."""
    await sql.execute(
        f"""{PLAIN} INSERT INTO r SELECT generate_series(1, 1000);
            INSERT INTO s (id, r) SELECT id, id FROM r; INSERT INTO e (id, s) VALUES (1, 1)"""
    )
    async with roles(url, ROLE):
        await sql.execute(
            f"""GRANT SELECT, DELETE, TRUNCATE ON r, s, e TO {ROLE};
                GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO {ROLE};
                REVOKE TRUNCATE ON {missing} FROM {ROLE}"""
        )
        engine = create_async_engine(url, connect_args=connect_args(role=ROLE))
        async with AsyncSession(engine) as session:
            await cleanup_tables(session, metadata_of(PLAIN))
        await engine.dispose()
        assert await counts(sql, "r", "s", "e") == [0, 0, 0]
