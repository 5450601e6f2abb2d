"""m2m_add, m2m_remove, m2m_set and m2m_add_many: what they return and what they do to the table."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import M2MChange, get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import (
    Box,
    Post,
    Shelf,
    Tag,
    Thing,
    loose,
    noted,
    pairs,
    post_tag,
    ranked,
    recorded,
)


async def stored(
    session: AsyncSession, posts: int = 2, tags: int = 5
) -> tuple[list[Post], list[Tag]]:
    """Posts 1, 2, ... and tags 1, 2, ..."""
    owners = [Post(id=number) for number in range(1, posts + 1)]
    related = [Tag(key=number) for number in range(1, tags + 1)]
    session.add_all([*owners, *related])
    await session.commit()
    return owners, related


async def boxes(session: AsyncSession) -> tuple[Shelf, list[Thing]]:
    session.add_all([Box(id=1), Box(id=2), *(Thing(id=number) for number in range(1, 6))])
    await session.commit()
    shelf = await session.get_one(Shelf, 1)
    return shelf, [await session.get_one(Thing, number) for number in range(1, 6)]


async def test_add(session: AsyncSession) -> None:
    """Instances and keys, each once however often it is named; the number of rows is returned."""
    (post, _), (one, two, *_) = await stored(session)
    assert await m2m_add(session, post, Post.tags, one, two, one, pks=[2, 3, 3]) == 3
    assert await pairs(session, post_tag) == {(1, 1), (1, 2), (1, 3)}
    assert await m2m_add(session, post, Post.tags) == 0


async def test_add_what_exists(session: AsyncSession) -> None:
    """An existing association is an IntegrityError, or skipped."""
    (post, _), (one, two, *_) = await stored(session)
    await m2m_add(session, post, Post.tags, one)
    with pytest.raises(IntegrityError):
        async with get_transaction(session):
            await m2m_add(session, post, Post.tags, one, two)
    assert await m2m_add(session, post, Post.tags, one, two, ignore_conflicts=True) == 1
    assert await pairs(session, post_tag) == {(1, 1), (1, 2)}


async def test_add_what_is_not_there(session: AsyncSession) -> None:
    """A key without a row is for PostgreSQL to refuse, with and without ignore_conflicts."""
    (post, _), _ = await stored(session)
    for ignore in (False, True):
        with pytest.raises(IntegrityError):
            async with get_transaction(session):
                await m2m_add(session, post, Post.tags, pks=[99], ignore_conflicts=ignore)


async def test_remove(session: AsyncSession) -> None:
    """What exists is removed, what does not is no error, other owners are left alone."""
    (post, other), (one, two, three, *_) = await stored(session)
    await m2m_add(session, post, Post.tags, one, two)
    await m2m_add(session, other, Post.tags, one)
    assert await m2m_remove(session, post, Post.tags, one, three, pks=[1, 99]) == 1
    assert await m2m_remove(session, post, Post.tags) == 0
    assert await pairs(session, post_tag) == {(1, 2), (2, 1)}


async def test_set(session: AsyncSession) -> None:
    """The owner's rows become exactly the set; no arguments clear it; other owners are left
    alone."""
    (post, other), (one, two, three, *_) = await stored(session)
    await m2m_add(session, other, Post.tags, one)
    assert await m2m_set(session, post, Post.tags, one, two) == M2MChange(2, 0)
    assert await m2m_set(session, post, Post.tags, two, three, pks=[3, 4]) == M2MChange(2, 1)
    assert await m2m_set(session, post, Post.tags, two, three, pks=[3, 4]) == (0, 0)
    assert await pairs(session, post_tag) == {(1, 2), (1, 3), (1, 4), (2, 1)}
    assert await m2m_set(session, post, Post.tags) == M2MChange(added=0, removed=3)
    assert await pairs(session, post_tag) == {(2, 1)}


async def test_add_many(session: AsyncSession) -> None:
    """Pairs of instances and keys, mixed, in one statement; existing ones as in m2m_add."""
    (post, other), (one, *_) = await stored(session)
    links: list[tuple[Any, Any]] = [
        (post, one),
        (post, 1),
        (1, one),
        (2, 5),
        (other, 4),
        ((1,), (2,)),
    ]
    assert await m2m_add_many(session, Post.tags, links) == 4
    assert await pairs(session, post_tag) == {(1, 1), (1, 2), (2, 4), (2, 5)}
    assert await m2m_add_many(session, Post.tags, [(2, 5), (2, 1)], ignore_conflicts=True) == 1
    assert await m2m_add_many(session, Post.tags, iter([])) == 0
    with pytest.raises(IntegrityError):
        await m2m_add_many(session, Post.tags, [(2, 5), (2, 2)])
    await session.rollback()


async def test_the_other_side(session: AsyncSession) -> None:
    """Each side of a bidirectional pair writes the same rows."""
    (post, other), (one, two, *_) = await stored(session)
    assert await m2m_add(session, one, Tag.posts, post, other) == 2
    assert await m2m_set(session, two, Tag.posts, pks=[2]) == (1, 0)
    assert await m2m_remove(session, one, Tag.posts, post) == 1
    assert await m2m_add_many(session, Tag.posts, [(3, 1)]) == 1
    assert await pairs(session, post_tag) == {(2, 1), (2, 2), (1, 3)}


async def test_one_statement(session: AsyncSession, engine: AsyncEngine) -> None:
    """One statement each; a set locks the owner in one before; parameters and text do not depend on
    the size."""
    (post, _), _ = await stored(session, tags=300)
    with recorded(engine) as statements:
        await m2m_set(session, post, Post.tags)
    # What the table is, which PostgreSQL is asked once.
    assert statements.verbs == ["SELECT", "SELECT", "WITH"]
    for size in (2, 250):
        keys = range(1, size + 1)
        with recorded(engine) as statements:
            await m2m_add(session, post, Post.tags, pks=keys)
            await m2m_remove(session, post, Post.tags, pks=keys)
            await m2m_add_many(session, Post.tags, [(1, key) for key in keys])
            await m2m_add_many(
                session, Post.tags, [(1, key) for key in keys], ignore_conflicts=True
            )
            await m2m_set(session, post, Post.tags, pks=keys)
            await m2m_set(session, post, Post.tags)
        assert statements.verbs == [
            "INSERT",
            "DELETE",
            "INSERT",
            "INSERT",
            "SELECT",
            "WITH",
            "SELECT",
            "WITH",
        ]
        assert [len(parameters) for _, parameters in statements] == [2, 2, 2, 2, 1, 2, 1, 2]
        if size == 2:
            first = [statement for statement, _ in statements]
    assert [statement for statement, _ in statements] == first
    assert "FOR NO KEY UPDATE" in first[4]


async def test_one_row(session: AsyncSession, engine: AsyncEngine) -> None:
    """One row is a plain INSERT with VALUES, with the same answers."""
    (post, _), (one, *_) = await stored(session)
    await m2m_set(session, post, Post.tags)
    with recorded(engine) as statements:
        assert await m2m_add(session, post, Post.tags, one) == 1
        assert await m2m_add(session, post, Post.tags, one, ignore_conflicts=True) == 0
        assert await m2m_add(session, post, Post.tags, one, pks=[1], ignore_conflicts=True) == 0
    assert all(
        "VALUES" in statement and "unnest" not in statement for statement, _ in statements[:2]
    )
    assert [len(parameters) for _, parameters in statements] == [2, 2, 2]
    with pytest.raises(IntegrityError):
        await m2m_add(session, post, Post.tags, one)
    await session.rollback()


async def test_statements_are_made_once(session: AsyncSession, engine: AsyncEngine) -> None:
    """SQLAlchemy compiles each statement once, whatever the number of calls and rows."""
    (post, _), _ = await stored(session)
    await boxes(session)
    box = await session.get_one(Box, 1)
    found: list[tuple[str, str]] = []

    def listener(
        connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
    ) -> None:
        found.append((context.cache_hit.name, sql))

    async def round_(*keys: int) -> None:
        await m2m_add(session, post, Post.tags, pks=keys)
        await m2m_add(session, post, Post.tags, pks=keys, ignore_conflicts=True)
        await m2m_set(session, post, Post.tags, pks=keys[1:])
        await m2m_add_many(session, Post.tags, [(post, keys[0])])
        await m2m_add_many(session, Post.tags, [(post, key) for key in keys], ignore_conflicts=True)
        await m2m_remove(session, post, Post.tags, pks=keys)
        await m2m_set(session, box, Box.things, pks=keys, values={"note": "new"})
        await m2m_set(session, box, Box.things, pks=keys[1:], keep_existing=True)

    await round_(1, 2)
    await round_(1)
    event.listen(engine.sync_engine, "before_cursor_execute", listener)
    try:
        await round_(3)
        await round_(1, 2, 3, 4, 5)
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", listener)
    assert len(found) >= 20
    assert [sql for hit, sql in found if hit != "CACHE_HIT"] == []


async def test_large(session: AsyncSession) -> None:
    """100,000 associations in one call."""
    await session.execute(insert(Post), [{"id": 1, "title": ""}, {"id": 2, "title": ""}])
    await session.execute(text("INSERT INTO m2m_tag SELECT generate_series(1, 100000)"))
    post = await session.get_one(Post, 1)
    assert await m2m_add(session, post, Post.tags, pks=range(1, 100_001)) == 100_000
    assert await m2m_set(session, post, Post.tags, pks=range(1000, 100_001)) == (0, 999)
    assert (
        await m2m_add_many(session, Post.tags, [(2, key) for key in range(1, 100_001)]) == 100_000
    )
    assert await m2m_remove(session, post, Post.tags, pks=range(1, 100_001)) == 99_001


async def test_without_a_unique_constraint(session: AsyncSession) -> None:
    """ignore_conflicts adds nothing twice, without it PostgreSQL judges, and a set leaves each pair
    once."""
    shelf, (one, two, three, *_) = await boxes(session)

    async def rows() -> list[tuple[int, int]]:
        found = await session.execute(select(loose).order_by(loose.c.box, loose.c.thing))
        return [(box, thing) for box, thing in found]

    assert await m2m_add(session, shelf, Shelf.loose, one) == 1
    assert await m2m_add(session, shelf, Shelf.loose, one, two, ignore_conflicts=True) == 1
    assert (
        await m2m_add_many(
            session, Shelf.loose, [(1, 2), (1, 3), (2, 1), (2, 1)], ignore_conflicts=True
        )
        == 2
    )
    assert await rows() == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert await m2m_add(session, shelf, Shelf.loose, one, two) == 2
    assert await m2m_set(session, shelf, Shelf.loose, one, two) == (0, 1)
    assert await rows() == [(1, 1), (1, 2), (2, 1)]
    await m2m_add(session, shelf, Shelf.loose, one)
    assert await m2m_set(session, shelf, Shelf.loose, three) == (1, 2)
    assert await rows() == [(1, 3), (2, 1)]
    await m2m_add(session, shelf, Shelf.loose, three)
    assert await m2m_remove(session, shelf, Shelf.loose, three) == 2


async def test_rewriting_without_a_unique_constraint(session: AsyncSession) -> None:
    """Rows that stay are rewritten where no constraint covers the pair, and are there once then;
    with `keep_existing` all of them are kept."""
    shelf, (one, two, *_) = await boxes(session)
    await session.execute(
        insert(noted), [{"box": 1, "thing": thing, "note": "old"} for thing in (1, 1, 2)]
    )
    assert await m2m_set(session, shelf, Shelf.noted, one, keep_existing=True) == (0, 1)
    rows = (await session.execute(select(noted))).all()
    assert [tuple(row) for row in rows] == [(1, 1, "old"), (1, 1, "old")]
    assert await m2m_set(session, shelf, Shelf.noted, one, two) == (1, 0)
    assert await pairs(session, noted) == {(1, 1, "new"), (1, 2, "new")}
    assert await m2m_set(session, shelf, Shelf.noted, two, values={"note": "given"}) == (0, 1)
    assert await pairs(session, noted) == {(1, 2, "given")}


async def test_another_unique_constraint(session: AsyncSession) -> None:
    """Who takes the rank of one that goes gets it; who takes that of one that stays, or of another
    pair, does not."""
    shelf, (one, two, *_) = await boxes(session)

    async def rows() -> set[tuple[int, int]]:
        return {
            (thing, rank)
            for thing, rank in await session.execute(select(ranked.c.thing, ranked.c.rank))
        }

    await m2m_add(session, shelf, Shelf.ranked, one, values={"rank": 1})
    assert await m2m_set(session, shelf, Shelf.ranked, two, values={"rank": 1}) == (1, 1)
    assert await rows() == {(2, 1)}
    assert await m2m_set(session, shelf, Shelf.ranked, two, values={"rank": 5}) == (0, 0)
    assert await m2m_set(
        session, shelf, Shelf.ranked, one, keep_existing=True, values={"rank": 5}
    ) == (1, 1)
    assert await rows() == {(1, 5)}
    with pytest.raises(IntegrityError):
        async with get_transaction(session):
            await m2m_set(
                session, shelf, Shelf.ranked, one, two, keep_existing=True, values={"rank": 5}
            )
    with pytest.raises(IntegrityError):
        async with get_transaction(session):
            await m2m_add(
                session, shelf, Shelf.ranked, two, values={"rank": 5}, ignore_conflicts=True
            )
    assert (
        await m2m_add(session, shelf, Shelf.ranked, one, values={"rank": 7}, ignore_conflicts=True)
        == 0
    )
    assert await rows() == {(1, 5)}
