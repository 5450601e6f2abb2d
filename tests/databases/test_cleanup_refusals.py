"""`cleanup_tables` where PostgreSQL refuses DELETE, and TRUNCATE is allowed or not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import OutsideReferenceError, cleanup_tables
from tests.databases.cleaning import counts, tables
from tests.support import connect_args, roles

ROLE = "pgtoolset_refused"

# Publications

OF_SCHEMA = "FOR TABLES IN SCHEMA public"


@pytest.mark.parametrize(
    "publication",
    [
        "FOR ALL TABLES",
        "FOR TABLE t",
        OF_SCHEMA,
        "FOR TABLE t WITH (publish = 'delete')",
        "FOR TABLE t WITH (publish = 'insert')",
    ],
)
@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE t (id int)",
        "CREATE TABLE t (id int UNIQUE)",
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE)",
        "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING",
        "CREATE TABLE t (id int PRIMARY KEY)",
        "CREATE TABLE t (id int); ALTER TABLE t REPLICA IDENTITY FULL",
        """CREATE TABLE t (id int NOT NULL CONSTRAINT u UNIQUE);
           ALTER TABLE t REPLICA IDENTITY USING INDEX u""",
        """CREATE TABLE t (id int) PARTITION BY LIST (id);
           CREATE TABLE leaf PARTITION OF t DEFAULT; INSERT INTO t VALUES (1)""",
    ],
)
async def test_published(
    session: AsyncSession, sql: asyncpg.Connection, made: str, publication: str
) -> None:
    """Whatever the replica identity of a published table is, it is emptied."""
    if publication == OF_SCHEMA and sql.get_server_version().major < 15:
        publication = "FOR ALL TABLES"
    await sql.execute(f"{made}; CREATE PUBLICATION news {publication}")
    await sql.execute("INSERT INTO t VALUES (2)")
    await cleanup_tables(session, tables("t"))
    assert await counts(sql, "t") == [0]


@pytest.mark.parametrize(
    "publication",
    ["t WHERE (other > 1)", "t (id, other)", "t (id) WITH (publish = 'insert, delete')"],
)
async def test_published_in_part(
    session: AsyncSession, sql: asyncpg.Connection, publication: str
) -> None:
    """Conditions of a publication that refuse a DELETE are no obstacle."""
    if sql.get_server_version().major < 15:
        pytest.skip("before PostgreSQL 15 a table is published as a whole")
    await sql.execute("CREATE TABLE t (id int PRIMARY KEY, other int)")
    await sql.execute(
        f"ALTER TABLE t REPLICA IDENTITY FULL; CREATE PUBLICATION news FOR TABLE {publication}"
    )
    await sql.execute("INSERT INTO t VALUES (1, 2)")
    await cleanup_tables(session, tables("t"))
    assert await counts(sql, "t") == [0]


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "NO ACTION"])
async def test_published_and_referencing(
    session: AsyncSession, sql: asyncpg.Connection, action: str
) -> None:
    """An empty table whose rows a DELETE would write is no obstacle: both are truncated."""
    await sql.execute(
        f"""CREATE TABLE t (id int PRIMARY KEY);
            CREATE TABLE empty (id int REFERENCES t ON DELETE {action});
            CREATE PUBLICATION news FOR TABLE empty; INSERT INTO t VALUES (1)"""
    )
    await cleanup_tables(session, tables("t", "empty"))
    assert await counts(sql, "t") == [0]


async def test_published_and_referenced_from_outside(
    session: AsyncSession, sql: asyncpg.Connection
) -> None:
    """No TRUNCATE reaches a table outside: rows of it are named, or PostgreSQL refuses both."""
    await sql.execute(
        """CREATE TABLE t (id int UNIQUE); INSERT INTO t VALUES (1);
           CREATE TABLE theirs (id int REFERENCES t (id), n int);
           CREATE PUBLICATION news FOR TABLE t;
           INSERT INTO theirs VALUES (1, 1)"""
    )
    with pytest.raises(OutsideReferenceError, match="theirs_id_fkey"):
        await cleanup_tables(session, tables("t"))
    await sql.execute("UPDATE theirs SET id = NULL")
    with pytest.raises(DBAPIError, match="replica identity"):
        await cleanup_tables(session, tables("t"))
    assert await counts(sql, "t", "theirs") == [1, 1]


# Rules and triggers

RULES = [
    "CREATE RULE keep AS ON DELETE TO t DO INSTEAD NOTHING",
    "CREATE RULE keep AS ON DELETE TO t WHERE old.id > 0 DO INSTEAD NOTHING",
    "CREATE RULE note AS ON DELETE TO t DO ALSO INSERT INTO log VALUES (old.id)",
    """CREATE RULE keep AS ON DELETE TO t DO INSTEAD NOTHING;
       ALTER TABLE t ENABLE ALWAYS RULE keep""",
    "CREATE RULE keep AS ON DELETE TO t DO INSTEAD NOTHING; ALTER TABLE t ENABLE REPLICA RULE keep",
]
_MODES = "SELECT rulename, ev_enabled FROM pg_rewrite WHERE ev_type = '4'"


@pytest.mark.parametrize("outside", ["", "CREATE TABLE theirs (id int REFERENCES t)"])
@pytest.mark.parametrize("rule", RULES)
async def test_rules(
    session: AsyncSession, sql: asyncpg.Connection, rule: str, outside: str
) -> None:
    """A rule on DELETE neither keeps rows nor acts, where TRUNCATE is allowed and where not."""
    await sql.execute("CREATE TABLE log (id int); CREATE TABLE t (id int PRIMARY KEY)")
    await sql.execute(f"INSERT INTO t VALUES (1), (2); {rule}; {outside}")
    before = await sql.fetch(_MODES)
    await cleanup_tables(session, tables("t"))
    assert await counts(sql, "t", "log") == [0, 0]
    assert await sql.fetch(_MODES) == before


@pytest.mark.parametrize("replica", [False, True])
@pytest.mark.parametrize("events", ["DELETE", "TRUNCATE", "DELETE OR TRUNCATE"])
@pytest.mark.parametrize("rows", [1, 5_000])
async def test_raising_triggers(
    own: AsyncEngine, sql: asyncpg.Connection, rows: int, events: str, replica: bool
) -> None:
    """A trigger that raises an error is no obstacle, whatever it is enabled for."""
    await sql.execute(
        f"""CREATE TABLE t (id serial);
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
              'BEGIN RAISE ''no''; END';
            CREATE TRIGGER refuse BEFORE {events} ON t EXECUTE FUNCTION refuse();
            CREATE TRIGGER replica BEFORE {events} ON t EXECUTE FUNCTION refuse();
            ALTER TABLE t ENABLE REPLICA TRIGGER replica;
            INSERT INTO t SELECT FROM generate_series(1, {rows})"""
    )
    role = "replica" if replica else "origin"
    engine = create_async_engine(own.url, connect_args=connect_args(session_replication_role=role))
    query = "SELECT tgname, tgenabled FROM pg_trigger ORDER BY 1"
    before = await sql.fetch(query)
    async with AsyncSession(engine) as session:
        await cleanup_tables(session, tables("t"))
    await engine.dispose()
    assert await counts(sql, "t") == [0]
    assert await sql.fetch(query) == before


# Privileges and row-level security


@pytest.fixture
async def role(url: str, own: AsyncEngine, sql: asyncpg.Connection) -> AsyncIterator[AsyncSession]:
    """A session of a role that owns nothing, unless the test gives it something."""
    await sql.execute(
        """CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1);
           CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'"""
    )
    async with roles(url, ROLE):
        engine = create_async_engine(own.url, connect_args=connect_args(role=ROLE))
        async with AsyncSession(engine) as session:
            yield session
        await engine.dispose()


SECURE = "ALTER TABLE t ENABLE ROW LEVEL SECURITY"
FORCE = f"ALTER TABLE t OWNER TO cleaner; {SECURE}; ALTER TABLE t FORCE ROW LEVEL SECURITY"


@pytest.mark.parametrize(
    "given",
    [
        f"ALTER TABLE t OWNER TO cleaner; {SECURE}",
        FORCE,
        f"{FORCE}; CREATE TABLE theirs (id int)",
        f"{SECURE}; GRANT SELECT, TRUNCATE ON t TO cleaner",
        f"{SECURE}; GRANT SELECT, DELETE, TRUNCATE ON t TO cleaner",
        "GRANT SELECT, TRUNCATE ON t TO cleaner",
        "GRANT SELECT, DELETE ON t TO cleaner",
        """GRANT SELECT, DELETE, TRUNCATE ON t TO cleaner;
            CREATE TRIGGER refuse BEFORE DELETE ON t EXECUTE FUNCTION refuse()""",
        """GRANT SELECT, DELETE, TRUNCATE ON t TO cleaner;
            CREATE TABLE parent (id int NOT NULL) PARTITION BY LIST (id);
            CREATE TRIGGER refuse AFTER DELETE ON parent FOR EACH ROW EXECUTE FUNCTION refuse();
            ALTER TABLE parent ATTACH PARTITION t DEFAULT""",
        """GRANT SELECT, DELETE, TRUNCATE ON t TO cleaner;
            CREATE RULE keep AS ON DELETE TO t DO INSTEAD NOTHING""",
    ],
)
async def test_roles_that_may(role: AsyncSession, sql: asyncpg.Connection, given: str) -> None:
    """A role that may empty the table in one of the two ways does."""
    await sql.execute(given.replace("cleaner", ROLE))
    await cleanup_tables(role, tables("t"))
    assert await counts(sql, "t") == [0]
    await cleanup_tables(role, tables("t"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (f"{SECURE}; GRANT SELECT, DELETE ON t TO cleaner", "row-level security"),
        (
            f"""{FORCE}; CREATE TABLE theirs (id int REFERENCES t);
                GRANT SELECT ON theirs TO cleaner""",
            "row-level security",
        ),
        ("GRANT SELECT ON t TO cleaner", "permission denied"),
        (
            """GRANT SELECT, DELETE ON t TO cleaner;
                CREATE TRIGGER refuse BEFORE DELETE ON t EXECUTE FUNCTION refuse()""",
            "must be owner",
        ),
    ],
)
async def test_roles_that_may_not(
    role: AsyncSession, sql: asyncpg.Connection, given: str, message: str
) -> None:
    """Where a role may do neither, PostgreSQL's error says why, and no row is forgotten."""
    await sql.execute(given.replace("cleaner", ROLE))
    with pytest.raises(DBAPIError, match=message):
        await cleanup_tables(role, tables("t"))
    assert await counts(sql, "t") == [1]
