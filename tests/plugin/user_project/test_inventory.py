"""Run by ../test_plugin.py under pytest-asyncio and anyio, in every scope of loops, by one process
and by two."""

import asyncio
from typing import Any

import httpx
import inventory
import pytest
from inventory import Item, Part
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

ROUNDS = pytest.mark.parametrize("number", range(3))


async def count(session: AsyncSession, model: Any = Item) -> int | None:
    return await session.scalar(select(func.count()).select_from(model))


@ROUNDS
async def test_commit_is_gone_afterwards(pg_session: AsyncSession, number: int) -> None:
    """Each round finds no row, and commits one."""
    assert await count(pg_session) == 0
    pg_session.add(Item(name="lamp"))
    await pg_session.commit()
    assert await count(pg_session) == 1


@ROUNDS
async def test_rollback_is_of_the_session(pg_session: AsyncSession, number: int) -> None:
    """A rollback undoes what came after the last commit, and nothing else."""
    pg_session.add(Item(name="lamp"))
    await pg_session.commit()
    pg_session.add(Item(name="chair"))
    await pg_session.rollback()
    assert list(await pg_session.scalars(select(Item.name))) == ["lamp"]


@ROUNDS
async def test_application(
    client: httpx.AsyncClient, pg_session: AsyncSession, number: int
) -> None:
    """The API commits and rolls back; the test sees what it did, and it sees what the test has
    prepared."""
    inventory.announced.clear()
    pg_session.add(Item(name="table"))
    await pg_session.commit()
    assert (await client.post("/items/lamp")).status_code == 201
    assert (await client.post("/items/chair/refused")).status_code == 409
    with pytest.raises(IntegrityError):
        await client.post("/items/lamp")
    assert (await client.get("/items")).json() == ["lamp", "table"]
    assert list(await pg_session.scalars(select(Item.name).order_by(Item.name))) == [
        "lamp",
        "table",
    ]
    assert inventory.announced == ["lamp"]


async def test_no_other_connection_sees_it(
    pg_session: AsyncSession, pg_engine: AsyncEngine
) -> None:
    """What the sessions of a test have committed is visible to them alone."""
    pg_session.add(Item(name="lamp"))
    await pg_session.commit()
    async with AsyncSession(pg_engine) as other:
        assert await count(other) == 0


async def test_deferred_constraint_at_a_commit(pg_session: AsyncSession) -> None:
    """A commit checks what is deferred, as a real one; afterwards it is deferred again."""
    pg_session.add(Part(item_id=1))
    with pytest.raises(IntegrityError, match="part_item_id_fkey"):
        await pg_session.commit()
    await pg_session.rollback()
    assert await count(pg_session, Part) == 0
    await pg_session.execute(text("INSERT INTO part (id, item_id) VALUES (1, 7)"))
    await pg_session.execute(
        text("""INSERT INTO "Stock room".item (id, name) VALUES (7, 'lamp')""")
    )
    await pg_session.commit()
    await pg_session.execute(text("INSERT INTO part (id, item_id) VALUES (2, 8)"))
    await pg_session.rollback()


async def test_error_that_is_left_alone(pg_session: AsyncSession) -> None:
    """A test may end in the middle of a transaction that an error has aborted."""
    with pytest.raises(Exception, match="division by zero"):
        await pg_session.execute(text("SELECT 1 / 0"))


async def test_lost_connection(pg_session: AsyncSession) -> None:
    """A test may lose its connection; the next one has another."""
    with pytest.raises(Exception, match=r"terminat|closed"):
        await pg_session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


async def test_advisory_lock_of_the_session(
    pg_session: AsyncSession, pg_engine: AsyncEngine
) -> None:
    """Not even a lock that belongs to the connection is left behind by a test."""
    assert not await pg_session.scalar(
        text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4")
    )
    await pg_session.execute(text("SELECT pg_advisory_lock(4)"))


async def test_advisory_lock_is_gone(pg_session: AsyncSession, pg_engine: AsyncEngine) -> None:
    """What the test above has locked is free."""
    async with pg_engine.connect() as other:
        assert await other.scalar(text("SELECT pg_try_advisory_lock(4)"))


@pytest.mark.pg_commit
@ROUNDS
async def test_real_commits(
    pg_session: AsyncSession, pg_session_maker: Any, pg_engine: AsyncEngine, number: int
) -> None:
    """With the marker sessions have connections of their own and commit for real; the database is
    empty afterwards."""
    assert await count(pg_session) == 0

    async def add(name: str) -> int:
        async with pg_session_maker.begin() as session:
            session.add(Item(name=name))
            return await session.scalar(text("SELECT pg_backend_pid()"))

    pids = await asyncio.gather(*(add(str(number)) for number in range(4)))
    assert len(set(pids)) == 4
    assert await count(pg_session) == 4
    async with pg_engine.connect() as connection:
        assert await connection.scalar(select(func.count()).select_from(Item)) == 4


@pytest.mark.pg_commit
async def test_real_commit_of_the_application(
    client: httpx.AsyncClient, pg_engine: AsyncEngine
) -> None:
    """The same client, the same API, and what it commits is there for everybody."""
    assert (await client.post("/items/lamp")).status_code == 201
    async with AsyncSession(pg_engine) as other:
        assert await count(other) == 1


@pytest.mark.pg_commit
def test_real_commits_of_a_sync_test(pg_session_maker: Any) -> None:
    """A test that runs a loop of its own can have the factory."""

    async def add() -> int | None:
        async with pg_session_maker.begin() as session:
            session.add(Item(name="lamp"))
            return await count(session)

    assert asyncio.run(add()) == 1


class TestsOfAClass:
    async def test_clean(self, pg_session: AsyncSession) -> None:
        """Tests in a class have the fixtures too, and find nothing of what has been committed so
        far."""
        assert await count(pg_session) == 0
