"""`m2m._catalog`: what is legal for delete-then-insert is legal, whatever the database has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Computed,
    Identity,
    Index,
    Integer,
    UniqueConstraint,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset.m2m._analysis import association_of
from pgtoolset.m2m._catalog import Storage
from pgtoolset.m2m._statements import ask
from tests.m2m.models import recorded
from tests.m2m.shapes import Shape, created, shape

COUNTED = """
    CREATE FUNCTION shape_check() RETURNS trigger LANGUAGE plpgsql {volatility} AS $$
    BEGIN
        IF (SELECT count(*) FROM shape_link WHERE owner = NEW.owner) >= 2 THEN
            RAISE EXCEPTION 'at most two' USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$
"""
COUNT_FUNCTION = """
    CREATE FUNCTION shape_count(integer) RETURNS bigint LANGUAGE sql {volatility} AS
    'SELECT count(*) FROM shape_link WHERE owner = $1'
"""
TRIGGER = (
    "CREATE TRIGGER shape_check {when} INSERT ON shape_link {each} EXECUTE FUNCTION shape_check()"
)


async def pairs(session: AsyncSession, made: Shape) -> list[tuple[int, int]]:
    keys = [made.link.c[name] for name in list(made.link.c.keys())[:2]]
    found = await session.execute(select(*keys).order_by(*keys))
    return [(one, other) for one, other in found]


async def storage_of(session: AsyncSession, made: Shape) -> Storage:
    row = (await session.execute(ask(association_of(made.owner.others)))).one()
    return Storage(row[1])


#: What a table may have against a second row of an owner, or a third: columns and constraints of
#: the metadata, statements, and how many rows of one owner it allows.
LIMITS: dict[str, tuple[Callable[[], list[Any]], tuple[str, ...], int]] = {
    "exclusion constraint": (
        lambda: [ExcludeConstraint(("owner", "="), using="btree")],
        (),
        1,
    ),
    "exclusion constraint of the database": (
        list,
        ("ALTER TABLE shape_link ADD EXCLUDE USING btree (owner WITH =)",),
        1,
    ),
    "unique index of the metadata": (
        lambda: [Index("shape_one", "owner", unique=True)],
        (),
        1,
    ),
    "unique index of the database": (list, ("CREATE UNIQUE INDEX ON shape_link (owner)",), 1),
    "partial unique index": (
        list,
        ("CREATE UNIQUE INDEX ON shape_link (owner) WHERE related > 0",),
        1,
    ),
    "unique index on an expression": (
        list,
        ("CREATE UNIQUE INDEX ON shape_link ((owner % 100))",),
        1,
    ),
    "trigger": (
        list,
        (COUNTED.format(volatility="VOLATILE"), TRIGGER.format(when="BEFORE", each="FOR EACH ROW")),
        2,
    ),
    "stable trigger": (
        list,
        (COUNTED.format(volatility="STABLE"), TRIGGER.format(when="BEFORE", each="FOR EACH ROW")),
        2,
    ),
    "trigger of the parent table": (
        list,
        (
            COUNTED.format(volatility="VOLATILE"),
            "CREATE TABLE shape_base (LIKE shape_link) PARTITION BY LIST (owner)",
            """CREATE TRIGGER shape_check BEFORE INSERT ON shape_base FOR EACH ROW
               EXECUTE FUNCTION shape_check()""",
            "ALTER TABLE shape_base ATTACH PARTITION shape_link DEFAULT",
        ),
        2,
    ),
    "check that counts": (
        list,
        (
            COUNT_FUNCTION.format(volatility="STABLE"),
            "ALTER TABLE shape_link ADD CHECK (shape_count(owner) < 2)",
        ),
        2,
    ),
}


@pytest.mark.parametrize("keep_existing", [False, True])
@pytest.mark.parametrize("has_extra", [False, True])
@pytest.mark.parametrize("name", LIMITS)
async def test_limits(engine: AsyncEngine, name: str, has_extra: bool, keep_existing: bool) -> None:
    """A set replaces rows that stand in the way of new ones, and exceeds no limit."""
    extra, statements, most = LIMITS[name]
    columns = [Column("note", Integer, default=1)] if has_extra else []
    made = shape(*columns, *extra())
    async with created(engine, made, *statements) as session:
        (owner, other, *_), _ = await made.store(session)
        for keys in ([1], [2], [3, 4][:most], [1, 2][:most], [2, 3][:most], [2]):
            await m2m_set(session, owner, made.owner.others, pks=keys, keep_existing=keep_existing)
            assert await pairs(session, made) == [(1, key) for key in keys]
        await m2m_set(session, other, made.owner.others, pks=[2][:most])
        if "STABLE" not in "".join(statements):  # that sees no row of its own statement
            with pytest.raises(DBAPIError) as caught:
                async with get_transaction(session):
                    await m2m_set(session, owner, made.owner.others, pks=range(1, most + 2))
            assert getattr(caught.value.orig, "sqlstate", None) in ("23505", "23P01", "23514")
        assert await m2m_set(session, owner, made.owner.others) == (0, 1)
        assert await pairs(session, made) == [(2, 2)]
        assert await storage_of(session, made) is Storage.RESTRICTED
        await session.rollback()


async def _install(engine: AsyncEngine, extension: str) -> None:
    async with engine.begin() as connection:
        available = await connection.scalar(
            text("SELECT count(*) FROM pg_available_extensions WHERE name = :name"),
            {"name": extension},
        )
        if not available:
            pytest.skip(f"this server has no {extension}")
        await connection.execute(text(f"CREATE EXTENSION IF NOT EXISTS {extension}"))


#: Tables whose constraint ON CONFLICT cannot name, or which are no tables.
NO_ARBITER: dict[str, tuple[dict[str, Any], Callable[[], list[Any]], tuple[str, ...], Storage]] = {
    "initially deferred alone": (
        {"primary_key": False},
        lambda: [UniqueConstraint("owner", "related", initially="DEFERRED")],
        (),
        Storage.WITHOUT_ARBITER,
    ),
    "deferrable": (
        {"primary_key": False},
        lambda: [UniqueConstraint("owner", "related", deferrable=True)],
        (),
        Storage.WITHOUT_ARBITER,
    ),
    "deferrable in the database alone": (
        {},
        list,
        (
            "ALTER TABLE shape_link DROP CONSTRAINT shape_link_pkey",
            "ALTER TABLE shape_link ADD PRIMARY KEY (owner, related) DEFERRABLE",
        ),
        Storage.WITHOUT_ARBITER,
    ),
    "no key in the database": (
        {},
        list,
        ("ALTER TABLE shape_link DROP CONSTRAINT shape_link_pkey",),
        Storage.WITHOUT_ARBITER,
    ),
    "view": (
        {},
        list,
        (
            "ALTER TABLE shape_link RENAME TO shape_base",
            "CREATE VIEW shape_link AS SELECT * FROM shape_base",
        ),
        Storage.INDIRECT,
    ),
    "view with INSTEAD OF triggers": (
        {},
        list,
        (
            "ALTER TABLE shape_link RENAME TO shape_base",
            "CREATE VIEW shape_link AS SELECT owner, related FROM shape_base GROUP BY 1, 2",
            """CREATE FUNCTION shape_check() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF TG_OP = 'INSERT' THEN
                    INSERT INTO shape_base VALUES (NEW.owner, NEW.related); RETURN NEW;
                END IF;
                DELETE FROM shape_base WHERE owner = OLD.owner AND related = OLD.related;
                RETURN OLD;
            END $$""",
            """CREATE TRIGGER shape_check INSTEAD OF INSERT OR DELETE ON shape_link
                FOR EACH ROW EXECUTE FUNCTION shape_check()""",
        ),
        Storage.INDIRECT,
    ),
    "rules": (
        {},
        list,
        (
            "CREATE TABLE shape_base (LIKE shape_link INCLUDING ALL)",
            (
                "CREATE RULE i AS ON INSERT TO shape_link DO INSTEAD "
                "INSERT INTO shape_base VALUES (NEW.owner, NEW.related)"
            ),
            "CREATE RULE d AS ON DELETE TO shape_base DO ALSO NOTHING",
            "DROP TABLE shape_link",
            "CREATE VIEW shape_link AS SELECT * FROM shape_base",
            (
                "CREATE RULE i AS ON INSERT TO shape_link DO INSTEAD "
                "INSERT INTO shape_base VALUES (NEW.owner, NEW.related)"
            ),
            (
                "CREATE RULE d AS ON DELETE TO shape_link DO INSTEAD "
                "DELETE FROM shape_base WHERE owner = OLD.owner AND related = OLD.related"
            ),
        ),
        Storage.INDIRECT,
    ),
    "a table with a rule": (
        {},
        list,
        (
            "CREATE TABLE shape_base (owner integer, related integer)",
            (
                "CREATE RULE r AS ON INSERT TO shape_link DO ALSO "
                "INSERT INTO shape_base VALUES (NEW.owner, NEW.related)"
            ),
        ),
        Storage.INDIRECT,
    ),
}


@pytest.mark.parametrize("name", NO_ARBITER)
async def test_without_an_arbiter(engine: AsyncEngine, name: str) -> None:
    """All functions do what they say where ON CONFLICT cannot help."""
    options, extra, statements, storage = NO_ARBITER[name]
    made = shape(*extra(), **options)
    async with created(engine, made, *statements) as session:
        (owner, *_), (one, *_) = await made.store(session)
        others = made.owner.others
        assert await storage_of(session, made) is storage
        assert await m2m_add(session, owner, others, one, pks=[2]) == 2
        assert await m2m_add(session, owner, others, one, ignore_conflicts=True) == 0
        assert await m2m_add(session, owner, others, pks=[2, 3], ignore_conflicts=True) == 1
        links = [(1, 3), (1, 4), (2, 1)]
        assert await m2m_add_many(session, others, links, ignore_conflicts=True) == 2
        assert await m2m_set(session, owner, others, pks=[4, 3]) == (0, 2)
        assert await m2m_set(session, owner, others, pks=[2, 3], keep_existing=True) == (1, 1)
        assert await m2m_set(session, one, made.related.owners, pks=[1, 3]) == (2, 1)
        assert await m2m_remove(session, owner, others, pks=[3, 4]) == 1
        assert await pairs(session, made) == [(1, 1), (1, 2), (3, 1)]
        assert await m2m_set(session, owner, others) == (0, 2)
        await session.commit()
        assert await pairs(session, made) == [(3, 1)]
        await session.rollback()


async def test_a_foreign_table(engine: AsyncEngine, database_url: str) -> None:
    """All functions work on a foreign table."""
    await _install(engine, "postgres_fdw")
    made = shape(references=False)
    where = engine.url
    options = f"host '{where.host or where.query['host']}', dbname '{where.database}'"
    if where.port or where.query.get("port"):
        options += f", port '{where.port or where.query['port']}'"
    statements = (
        "ALTER TABLE shape_link RENAME TO shape_base",
        f"CREATE SERVER shape FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({options})",
        f"CREATE USER MAPPING FOR CURRENT_USER SERVER shape OPTIONS (user '{where.username}')",
        (
            "CREATE FOREIGN TABLE shape_link (owner integer, related integer) SERVER shape "
            "OPTIONS (table_name 'shape_base')"
        ),
    )
    try:
        async with created(engine, made, *statements) as session:
            (owner, *_), _ = await made.store(session)
            others = made.owner.others
            assert await m2m_add(session, owner, others, pks=[1, 2]) == 2
            assert await m2m_add(session, owner, others, pks=[2, 3], ignore_conflicts=True) == 1
            assert await m2m_set(session, owner, others, pks=[3, 4]) == (1, 2)
            assert await m2m_remove(session, owner, others, pks=[3]) == 1
            assert await pairs(session, made) == [(1, 4)]
            assert await storage_of(session, made) is Storage.INDIRECT
            await session.rollback()
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("DROP SERVER IF EXISTS shape CASCADE"))


async def test_partitions(engine: AsyncEngine) -> None:
    """A partitioned table, of which one partition has an index of its own."""
    made = shape()
    statements = (
        "DROP TABLE shape_link",
        (
            "CREATE TABLE shape_link (owner integer, related integer, "
            "PRIMARY KEY (owner, related)) PARTITION BY LIST (owner)"
        ),
        "CREATE TABLE shape_link_1 PARTITION OF shape_link FOR VALUES IN (1)",
        "CREATE TABLE shape_link_2 PARTITION OF shape_link DEFAULT",
        "CREATE UNIQUE INDEX ON shape_link_1 (owner)",
    )
    async with created(engine, made, *statements) as session:
        (one, two, *_), _ = await made.store(session)
        assert await storage_of(session, made) is Storage.RESTRICTED
        for key in (1, 2):
            assert await m2m_set(session, one, made.owner.others, pks=[key]) == (1, key - 1)
        assert await m2m_set(session, two, made.owner.others, pks=[1, 2]) == (2, 0)
        assert await m2m_add(session, one, made.owner.others, pks=[2], ignore_conflicts=True) == 0
        assert await pairs(session, made) == [(1, 2), (2, 1), (2, 2)]
        await session.rollback()


# SQLAlchemy 2.1 says that a column of ours is stored before PostgreSQL 18.
@pytest.mark.filterwarnings("ignore:Computed column shape_link.sum")
@pytest.mark.parametrize(
    ("extra", "statements"),
    [
        (list, ()),
        (lambda: [Index("shape_pair", "related", "owner", unique=True)], ()),
        (list, ("CREATE UNIQUE INDEX ON shape_link (related, owner) WHERE owner > 5",)),
        (list, ("CREATE INDEX ON shape_link (owner)",)),
        (list, ("ALTER TABLE shape_link ADD CHECK (owner + related > 0)",)),
        (lambda: [Column("sum", Integer, Computed("owner + related"))], ()),
        (list, ("CREATE UNIQUE INDEX ON shape_link (owner, related) INCLUDE (owner)",)),
    ],
)
async def test_plain_tables(
    engine: AsyncEngine, extra: Callable[[], list[Any]], statements: tuple[str, ...]
) -> None:
    """What cannot refuse a row of another pair leaves a set one statement beside the lock."""
    made = shape(*extra())
    async with created(engine, made, *statements) as session:
        (owner, *_), _ = await made.store(session)
        assert await storage_of(session, made) is Storage.PLAIN
        await m2m_set(session, owner, made.owner.others, pks=[1])
        with recorded(engine) as sent:
            await m2m_set(session, owner, made.owner.others, pks=[2])
        assert sent.verbs == ["SELECT", "WITH"]
        await session.rollback()


async def test_a_surrogate_key(engine: AsyncEngine) -> None:
    """A generated key beside the unique pair cannot collide."""
    made = shape(
        Column("id", Integer, Identity(), primary_key=True),
        UniqueConstraint("owner", "related"),
        primary_key=False,
    )
    async with created(engine, made) as session:
        await made.store(session)
        assert await storage_of(session, made) is Storage.PLAIN
        await session.rollback()


async def test_a_key_wider_than_the_pair(engine: AsyncEngine) -> None:
    """A set that keeps what exists keeps every row of an association that stays; one that does not
    writes one row for each."""
    made = shape(Column("term", Integer, primary_key=True, server_default="0"))
    async with created(engine, made) as session:
        (owner, *_), _ = await made.store(session)
        others = made.owner.others

        async def rows() -> list[tuple[int, ...]]:
            found = await session.execute(select(made.link).order_by(*made.link.c))
            return [tuple(row) for row in found]

        for term in (1, 2, 3):
            assert await m2m_add(session, owner, others, pks=[1, 2], values={"term": term}) == 2
        change = await m2m_set(
            session, owner, others, pks=[2, 3], values={"term": 9}, keep_existing=True
        )
        assert change == (1, 1)
        assert await rows() == [(1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 3, 9)]
        assert await m2m_set(
            session, owner, others, pks=[2, 3], values={"term": 5}, keep_existing=True
        ) == (0, 0)
        assert await rows() == [(1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 3, 9)]
        assert await m2m_set(session, owner, others, pks=[2], values={"term": 2}) == (0, 1)
        assert await rows() == [(1, 2, 2)]
        with pytest.raises(IntegrityError):
            await m2m_add(session, owner, others, pks=[2], values={"term": 2})
        await session.rollback()
