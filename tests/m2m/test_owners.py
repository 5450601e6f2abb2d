"""The lock of a set: an owner that cannot be locked is an error, and a version is not lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Column, FetchedValue, Integer, String, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import RowNotFoundError, m2m_add, m2m_set
from tests.m2m.shapes import Shape, created, shape
from tests.support import roles

ROLE = "shape_role"


@pytest.fixture
async def role(database_url: str) -> AsyncIterator[str]:
    """A role without privileges on the tables."""
    async with roles(database_url, ROLE):
        yield ROLE


async def rows(session: AsyncSession, made: Shape) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in await session.execute(select(made.link))}


GRANTS = (
    f"GRANT SELECT ON shape_owner, shape_related TO {ROLE}",
    f"GRANT SELECT, INSERT, DELETE ON shape_link TO {ROLE}",
)


async def test_no_privilege(engine: AsyncEngine, role: str) -> None:
    """Without UPDATE on the owner a set is refused before anything is written, and an add works."""
    made = shape(references=False)
    async with created(engine, made, *GRANTS) as session:
        (owner, *_), _ = await made.store(session)
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        assert await m2m_add(session, owner, made.owner.others, pks=[1, 2]) == 2
        assert await m2m_add(session, owner, made.owner.others, pks=[1], ignore_conflicts=True) == 0
        await session.commit()
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        with pytest.raises(DBAPIError, match="permission denied") as caught:
            await m2m_set(session, owner, made.owner.others, pks=[3])
        (note,) = caught.value.__notes__
        assert "UPDATE" in note and "Owner.others" in note and "Nothing has been written" in note
        await session.rollback()
        assert await rows(session, made) == {(1, 1), (1, 2)}
        await session.execute(text(f"GRANT UPDATE (id) ON shape_owner TO {role}"))
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        assert await m2m_set(session, owner, made.owner.others, pks=[3]) == (1, 2)
        await session.commit()


@pytest.mark.parametrize("command", ["ALL", "UPDATE"])
async def test_row_level_security(engine: AsyncEngine, role: str, command: str) -> None:
    """An owner that the policies hide, from UPDATE alone too, is an error and nothing is
    written."""
    made = shape(references=False)
    statements = [
        *GRANTS,
        f"GRANT UPDATE ON shape_owner TO {ROLE}",
        "ALTER TABLE shape_owner ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY one ON shape_owner FOR {command} USING (id = 2)",
    ]
    if command == "UPDATE":
        statements.append("CREATE POLICY other ON shape_owner FOR SELECT USING (true)")
    async with created(engine, made, *statements) as session:
        (hidden, seen, *_), _ = await made.store(session)
        await m2m_add(session, hidden, made.owner.others, pks=[1])
        await session.commit()
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        for keys in ([2], []):
            with pytest.raises(RowNotFoundError, match="row-level security"):
                await m2m_set(session, hidden, made.owner.others, pks=keys)
        assert await m2m_set(session, seen, made.owner.others, pks=[2]) == (1, 0)
        await session.commit()
        assert await rows(session, made) == {(1, 1), (2, 2)}
        await session.rollback()


async def test_policies_of_the_association(engine: AsyncEngine, role: str) -> None:
    """A policy of the association table that counts rows sees those that a set has deleted as
    gone."""
    made = shape(references=False)
    statements = [
        *GRANTS,
        f"GRANT UPDATE ON shape_owner TO {ROLE}",
        (
            "CREATE FUNCTION shape_count(integer) RETURNS bigint LANGUAGE sql STABLE AS "
            "'SELECT count(*) FROM shape_link WHERE owner = $1'"
        ),
        "ALTER TABLE shape_link ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY one ON shape_link FOR INSERT WITH CHECK (shape_count(owner) = 0)",
        "CREATE POLICY two ON shape_link FOR SELECT USING (true)",
        "CREATE POLICY three ON shape_link FOR DELETE USING (true)",
    ]
    async with created(engine, made, *statements) as session:
        (owner, *_), _ = await made.store(session)
        await session.execute(text(f"SET LOCAL ROLE {role}"))
        for key in (1, 2, 1):
            await m2m_set(session, owner, made.owner.others, pks=[key])
            assert await rows(session, made) == {(1, key)}
        await session.rollback()


@pytest.mark.parametrize(
    "view",
    [
        "CREATE MATERIALIZED VIEW shape_owner AS SELECT id FROM shape_base",
        "CREATE VIEW shape_owner AS SELECT id FROM shape_base GROUP BY id",
        "CREATE VIEW shape_owner AS SELECT DISTINCT id FROM shape_base",
    ],
)
async def test_an_owner_that_cannot_be_locked(engine: AsyncEngine, view: str) -> None:
    """A materialized view or a grouped one: an error that says so, and nothing is written."""
    made = shape(references=False)
    create = ("ALTER TABLE shape_owner RENAME TO shape_base", "INSERT INTO shape_base VALUES (1)")
    async with created(engine, made, *create, view) as session:
        owner = await session.get_one(made.owner, 1)
        assert await m2m_add(session, owner, made.owner.others, pks=[1]) == 1
        await session.commit()
        with pytest.raises(DBAPIError) as caught:
            await m2m_set(session, owner, made.owner.others, pks=[2])
        assert "updatable view" in caught.value.__notes__[0]
        await session.rollback()
        assert await rows(session, made) == {(1, 1)}
        await session.rollback()


async def test_a_deleted_owner(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """An owner that another session has deleted."""
    made = shape()
    async with created(engine, made) as session:
        (owner, *_), _ = await made.store(session)
        await other.execute("DELETE FROM shape_owner WHERE id = 1")
        with pytest.raises(RowNotFoundError, match=r"Owner\.others.*Nothing has been written"):
            await m2m_set(session, owner, made.owner.others)
        await session.rollback()


LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.mark.parametrize("level", LEVELS)
async def test_a_system_column_as_version(engine: AsyncEngine, level: str) -> None:
    """`xmin` as `version_id_col`: a set works under every level, and the next flush too."""
    made = shape(
        owner_columns=[
            Column("title", String, default=""),
            Column("xmin", Integer, system=True, server_default=FetchedValue()),
        ],
        version="xmin",
    )
    async with created(engine, made) as session:
        (owner, *_), (one, *_) = await made.store(session)
        await session.connection(execution_options={"isolation_level": level})
        await session.refresh(owner)
        assert await m2m_set(session, owner, made.owner.others, one) == (1, 0)
        assert "title" not in inspect(owner).unloaded
        owner.title = "changed"
        await session.commit()
        title = made.owner.__mapper__.local_table.c.title
        assert await session.scalar(select(title).limit(1).order_by(title.desc())) == "changed"
        await session.rollback()


@pytest.mark.parametrize("level", LEVELS)
async def test_triggers_of_the_owner(engine: AsyncEngine, level: str) -> None:
    """What a trigger changes as a set updates the owner's row is expired, and nothing else is."""
    made = shape(owner_columns=[Column("title", String, default=""), Column("count", Integer)])
    statements = (
        """CREATE FUNCTION shape_check() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.count = COALESCE(OLD.count, 0) + 1; RETURN NEW; END'""",
        """CREATE TRIGGER shape_check BEFORE UPDATE ON shape_owner
            FOR EACH ROW EXECUTE FUNCTION shape_check()""",
    )
    async with created(engine, made, *statements) as session:
        (owner, *_), _ = await made.store(session)
        await session.connection(execution_options={"isolation_level": level})
        await session.refresh(owner)
        await m2m_set(session, owner, made.owner.others, pks=[1])
        assert ("count" in inspect(owner).unloaded) is (level != "READ COMMITTED")
        assert "id" not in inspect(owner).unloaded
        await session.refresh(owner)
        assert owner.count == (None if level == "READ COMMITTED" else 1)
        await session.rollback()
