"""Many calls at once: no lost set, no mixture, no deadlock; and what a cancellation leaves."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import asyncpg
import pytest
from sqlalchemy import delete, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set, run_transaction
from pgtoolset.m2m._analysis import association_of
from pgtoolset.m2m._rows import owner_parameters, related_parameters
from tests.m2m.models import (
    Box,
    CompositeA,
    CompositeB,
    Post,
    Tag,
    Thing,
    box_thing,
    composite_link,
    post_tag,
)
from tests.support import examples, interrupt_everywhere, until

TAGS = 30


async def store(session: AsyncSession) -> None:
    await session.execute(insert(Post), [{"id": number, "title": ""} for number in (1, 2)])
    await session.execute(insert(Tag), [{"key": number} for number in range(1, TAGS + 1)])
    await session.commit()


async def keys_of(session: AsyncSession, post: int) -> set[int]:
    found = await session.scalars(select(post_tag.c.tag).where(post_tag.c.post == post))
    keys = set(found)
    await session.commit()
    return keys


async def replace(engine: AsyncEngine, keys: set[int]) -> None:
    async with AsyncSession(engine) as session, get_transaction(session):
        post = await session.get_one(Post, 1)
        await m2m_set(session, post, Post.tags, pks=random.sample(sorted(keys), len(keys)))


async def add(engine: AsyncEngine, keys: set[int]) -> None:
    async with AsyncSession(engine) as session, get_transaction(session):
        post = await session.get_one(Post, 1)
        await m2m_add(
            session,
            post,
            Post.tags,
            pks=random.sample(sorted(keys), len(keys)),
            ignore_conflicts=True,
        )


async def until_one_waits(other: asyncpg.Connection) -> None:
    """Return once a statement in this database waits for a lock."""
    await until_waiting(other, 1)


async def until_waiting(other: asyncpg.Connection, count: int) -> None:
    """Return once as many statements in this database wait for a lock."""
    waiting = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )

    async def waits() -> bool:
        return bool(await other.fetchval(waiting) >= count)

    await until(waits)


async def test_sets(session: AsyncSession, engine: AsyncEngine) -> None:
    """Of sets at the same time the result is one of them, in many rounds."""
    await store(session)
    for number in range(examples(60)):
        sets = [
            set(random.Random((number, each).__hash__()).sample(range(1, TAGS + 1), 8))
            for each in range(4)
        ]
        async with asyncio.timeout(30):
            await asyncio.gather(*(replace(engine, keys) for keys in sets))
        assert await keys_of(session, 1) in sets


async def test_sets_and_adds(session: AsyncSession, engine: AsyncEngine) -> None:
    """Sets and adds of the same keys never deadlock, in many rounds; the result is a set, and what
    was added after."""
    await store(session)
    for number in range(examples(60)):
        chance = random.Random(number)
        sets = [set(chance.sample(range(1, TAGS + 1), 10)) for _ in range(2)]
        adds = [set(chance.sample(range(1, TAGS + 1), 10)) for _ in range(2)]
        async with asyncio.timeout(30):
            await asyncio.gather(
                *(replace(engine, keys) for keys in sets), *(add(engine, keys) for keys in adds)
            )
        found = await keys_of(session, 1)
        assert any(each <= found <= each | adds[0] | adds[1] for each in sets)


async def test_a_set_waits_for_another(
    session: AsyncSession, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """The second set waits for the first one's commit, and then sees what it has to take away."""
    await store(session)
    post = await session.get_one(Post, 1)
    await m2m_set(session, post, Post.tags, pks=[1, 2])
    task = asyncio.create_task(replace(engine, {3}))
    await until_one_waits(other)
    await session.commit()
    await task
    assert await keys_of(session, 1) == {3}


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_stale_snapshot(session: AsyncSession, engine: AsyncEngine, level: Any) -> None:
    """Two sets that cannot see one another: the second is a serialization failure, and a retry puts
    it right."""
    await store(session)
    maker = async_sessionmaker(engine)
    async with maker() as first, maker() as second:
        for each in (first, second):
            await each.connection(execution_options={"isolation_level": level})
            await each.scalar(select(Post.id).where(Post.id == 1))
        await m2m_set(first, await first.get_one(Post, 1), Post.tags, pks=[1])
        await first.commit()
        with pytest.raises(DBAPIError) as caught:
            await m2m_set(second, await second.get_one(Post, 1), Post.tags, pks=[2])
        assert (
            caught.value.orig is not None
            and getattr(caught.value.orig, "sqlstate", None) == "40001"
        )
        await second.rollback()
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        post = await session.get_one(Post, 1)
        if attempts == 1:
            await replace(engine, {1, 2, 3})
            async with engine.begin() as connection:
                await connection.execute(text("UPDATE m2m_post SET title = 'changed'"))
        await m2m_set(session, post, Post.tags, pks=[4])

    await run_transaction(maker, work, isolation_level=level)
    assert attempts == 2
    assert await keys_of(session, 1) == {4}


async def test_rewriting_sets(session: AsyncSession, engine: AsyncEngine) -> None:
    """Where rows that stay are rewritten, all rows are those of one set."""
    session.add_all([Box(id=1), *(Thing(id=number) for number in range(1, 11))])
    await session.commit()

    async def rewrite(note: str, keys: set[int]) -> None:
        async with AsyncSession(engine) as session, get_transaction(session):
            box = await session.get_one(Box, 1)
            await m2m_set(session, box, Box.things, pks=keys, values={"note": note})

    for number in range(40):
        chance = random.Random(number)
        sets = {str(each): set(chance.sample(range(1, 11), 5)) for each in range(4)}
        await asyncio.gather(*(rewrite(note, keys) for note, keys in sets.items()))
        rows = (await session.execute(select(box_thing.c.note, box_thing.c.thing))).all()
        await session.commit()
        (note,) = {row.note for row in rows}
        assert {row.thing for row in rows} == sets[note]


async def test_cancelled_everywhere(session: AsyncSession, engine: AsyncEngine) -> None:
    """A cancellation at any suspension leaves the old rows or the new ones, and no connection
    behind."""
    await store(session)
    await replace(engine, {1, 2})

    async def work(_: int) -> None:
        await replace(engine, {2, 3, 4})

    async def check(_: int) -> None:
        assert await keys_of(session, 1) in ({1, 2}, {2, 3, 4})
        await replace(engine, {1, 2})

    assert await interrupt_everywhere(work, check) > 3


async def test_cancelled_and_committed(
    session: AsyncSession, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A caller that swallows a cancellation has the one set or the other, and a collection that
    shows it."""
    await store(session)
    await replace(engine, {1, 2})
    async with AsyncSession(engine) as blocker:
        await blocker.execute(text("SELECT 1 FROM m2m_tag WHERE tag_id = 3 FOR UPDATE"))
        post = await session.get_one(Post, 1)
        await session.refresh(post, ["tags"])
        task = asyncio.create_task(m2m_set(session, post, Post.tags, pks=[3]))
        await until_one_waits(other)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "tags" not in post.__dict__
        await session.rollback()
    assert await keys_of(session, 1) == {1, 2}


async def test_removes_and_adds_leave_other_owners_alone(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    """Writers of different owners do not wait for one another."""
    await store(session)
    post, other = await session.get_one(Post, 1), await session.get_one(Post, 2)
    await m2m_set(session, post, Post.tags, pks=range(1, TAGS + 1))
    async with AsyncSession(engine) as second, asyncio.timeout(10):
        await m2m_set(second, other, Post.tags, pks=range(1, TAGS + 1))
        await m2m_remove(second, other, Post.tags, pks=[1])
        await second.commit()
    await session.commit()
    assert len(await keys_of(session, 1)) == len(await keys_of(session, 2)) + 1


async def test_adds_from_both_sides(
    session: AsyncSession, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Adds of the same pairs from both sides at once do not deadlock: both insert in one order."""
    await store(session)

    async def add_pairs(attribute: Any, links: list[tuple[int, int]]) -> int:
        async with AsyncSession(engine) as session, get_transaction(session):
            return await m2m_add_many(session, attribute, links, ignore_conflicts=True)

    async with AsyncSession(engine) as blocker, asyncio.timeout(60):
        await blocker.execute(insert(post_tag), {"post": 1, "tag": 3})
        # This one has inserted (1, 2), waits for the blocker, and then wants (2, 1).
        posts = asyncio.create_task(add_pairs(Post.tags, [(2, 1), (1, 3), (1, 2)]))
        await until_waiting(other, 1)
        # This one must not insert (2, 1) before it waits for (1, 2).
        tags = asyncio.create_task(add_pairs(Tag.posts, [(1, 2), (2, 1)]))
        await until_waiting(other, 2)
        await blocker.rollback()
        assert [await posts, await tags] == [3, 0]
    assert (await keys_of(session, 1), await keys_of(session, 2)) == ({2, 3}, {1})


async def test_adds_of_composite_keys_from_both_sides(
    session: AsyncSession, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Rows are inserted in the order of the table's columns, whichever side names them."""
    for rel_attr in (CompositeA.bs, CompositeB.as_):
        association = association_of(rel_attr)
        keys = {**owner_parameters(association), **related_parameters(association)}
        ordered = [keys[name].name for name in association.in_table_order(keys)]
        assert ordered == ["b1", "b2", "a1", "a2"]
    session.add_all([CompositeA(one=1, two=number) for number in (1, 2)])
    session.add_all([CompositeB(number=number, text="x") for number in (1, 2)])
    await session.flush()
    links = [((a, 1), (b, "x")) for a in (2, 1) for b in (2, 1)]
    for attribute, pairs in (
        (CompositeA.bs, links),
        (CompositeB.as_, [(b, a) for a, b in links]),
    ):
        await session.execute(delete(composite_link))
        rel_attr = cast("Any", attribute)
        assert await m2m_add_many(session, rel_attr, pairs) == 4
        stored = select(composite_link.c.b1, composite_link.c.a2).order_by(text("ctid"))
        rows = [tuple(row) for row in await session.execute(stored)]
        assert rows == [(1, 1), (1, 2), (2, 1), (2, 2)]
