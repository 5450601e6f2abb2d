"""Collections that were loaded never lie, and nothing is ever lazily loaded."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from sqlalchemy import inspect, select
from sqlalchemy.exc import (
    IntegrityError,
    InvalidRequestError,
    MissingGreenlet,
    StatementError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from pgtoolset import get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import (
    Person,
    Post,
    Pupil,
    Subject,
    Tag,
    Term,
    pairs,
    post_tag,
)
from tests.m2m.shapes import created, shape


async def loaded(session: AsyncSession) -> tuple[Post, list[Tag]]:
    """Post 1 with tag 1 of three, all collections loaded."""
    session.add(Post(id=1, tags=[Tag(key=1)]))
    session.add_all([Tag(key=2), Tag(key=3)])
    await session.commit()
    session.expunge_all()
    post = await session.get_one(
        Post, 1, options=[selectinload(Post.tags), selectinload(Post.seen)]
    )
    tags = (
        await session.scalars(select(Tag).order_by(Tag.key).options(selectinload(Tag.posts)))
    ).all()
    await session.commit()
    return post, list(tags)


async def shown(session: AsyncSession, instance: Any, name: str) -> list[Any]:
    """The keys in a collection: what it shows without a load, or where it is expired, after one."""
    if name in inspect(instance).unloaded:
        await session.refresh(instance, [name])
    return sorted(inspect(each).identity[0] for each in getattr(instance, name))


async def check(session: AsyncSession, post: Post, tags: list[Tag], *keys: int) -> None:
    assert await shown(session, post, "tags") == list(keys)
    assert await shown(session, post, "seen") == list(keys)
    for tag in tags:
        assert await shown(session, tag, "posts") == ([1] if tag.key in keys else [])
    assert {key for _, key in await pairs(session, post_tag)} == set(keys)


async def test_after_each_call(session: AsyncSession) -> None:
    """Both sides, and a viewonly view of them, after every kind of call, from either side, by
    instance and by key."""
    post, tags = await loaded(session)
    await m2m_add(session, post, Post.tags, tags[1])
    await check(session, post, tags, 1, 2)
    await m2m_add(session, post, Post.tags, pks=[3])
    await check(session, post, tags, 1, 2, 3)
    await m2m_remove(session, tags[0], Tag.posts, pks=[1])
    await check(session, post, tags, 2, 3)
    await m2m_set(session, post, Post.tags, tags[0])
    await check(session, post, tags, 1)
    await m2m_add_many(session, Post.tags, [(1, 2), (post, tags[2])])
    await check(session, post, tags, 1, 2, 3)
    await m2m_set(session, tags[1], Tag.posts)
    await check(session, post, tags, 1, 3)


async def test_only_what_changed_is_expired(session: AsyncSession) -> None:
    """Columns stay loaded, and so do the collections of others."""
    post, tags = await loaded(session)
    await m2m_add(session, post, Post.tags, tags[1])
    assert "tags" in inspect(post).unloaded and "title" not in inspect(post).unloaded
    assert "posts" in inspect(tags[1]).unloaded and "posts" not in inspect(tags[2]).unloaded
    await m2m_remove(session, post, Post.tags, pks=[1])
    assert "posts" in inspect(tags[0]).unloaded and "posts" not in inspect(tags[2]).unloaded


async def test_after_a_savepoint(session: AsyncSession) -> None:
    """What was loaded inside a savepoint that is rolled back is loaded again, that of a released
    inner one too."""
    post, tags = await loaded(session)
    for release in (False, True):
        with pytest.raises(LookupError):
            async with get_transaction(session):
                await session.execute(select(1))
                async with get_transaction(session):
                    if release:
                        async with get_transaction(session):
                            await m2m_set(session, post, Post.tags, tags[1], pks=[3])
                    else:
                        await m2m_set(session, post, Post.tags, tags[1], pks=[3])
                    await check(session, post, tags, 2, 3)
                    raise LookupError
        await check(session, post, tags, 1)
        await session.commit()


async def test_after_an_inner_savepoint(session: AsyncSession) -> None:
    """Only the level that is rolled back is undone."""
    post, tags = await loaded(session)
    async with get_transaction(session):
        await m2m_add(session, post, Post.tags, tags[1])
        with pytest.raises(IntegrityError):
            async with get_transaction(session):
                await m2m_remove(session, post, Post.tags, pks=[1, 2])
                await check(session, post, tags)
                await m2m_add(session, post, Post.tags, pks=[99])
        await check(session, post, tags, 1, 2)
    await check(session, post, tags, 1, 2)


async def test_after_a_rollback(session: AsyncSession) -> None:
    """The same for a whole transaction."""
    post, tags = await loaded(session)
    await m2m_set(session, post, Post.tags, tags[1])
    await check(session, post, tags, 2)
    await session.rollback()
    await session.refresh(post)
    for tag in tags:
        await session.refresh(tag)
    await check(session, post, tags, 1)


async def test_pending_changes_are_flushed_first(session: AsyncSession) -> None:
    """A change to either side's collection that is pending is in the table before the call, not
    lost by it."""
    post, tags = await loaded(session)
    post.tags.append(tags[1])
    assert await m2m_add(session, post, Post.tags, tags[2]) == 1
    await check(session, post, tags, 1, 2, 3)
    tags[0].posts.remove(post)
    assert await m2m_remove(session, post, Post.tags, tags[0]) == 0
    await check(session, post, tags, 2, 3)
    post.tags.append(tags[0])
    assert await m2m_set(session, post, Post.tags, tags[0]) == (0, 2)
    await check(session, post, tags, 1)


async def test_pending_instances(session: AsyncSession) -> None:
    """Pending instances are flushed, with keys that the server makes."""
    post, tag = Post(), Tag()
    session.add_all([post, tag])
    assert await m2m_add(session, post, Post.tags, tag) == 1
    assert await pairs(session, post_tag) == {(post.id, tag.key)}


async def test_expired_instances(session: AsyncSession) -> None:
    """After a rollback everything is expired, and every function still works."""
    post, tags = await loaded(session)
    await session.rollback()
    session.expire_all()
    assert await m2m_add(session, post, Post.tags, tags[1]) == 1
    assert await m2m_set(session, post, Post.tags, tags[2]) == (1, 2)
    assert await m2m_add_many(session, Tag.posts, [(tags[0], post)]) == 1
    assert await m2m_remove(session, tags[2], Tag.posts, post) == 1
    assert await pairs(session, post_tag) == {(1, 1)}


async def test_detached_instances(session: AsyncSession) -> None:
    """Detached instances work; their collections say that they cannot be loaded, in place of
    something false."""
    post, tags = await loaded(session)
    session.expunge_all()
    twin = await session.get_one(Post, 1, options=[selectinload(Post.tags)])
    assert await m2m_add(session, post, Post.tags, tags[1]) == 1
    assert await shown(session, twin, "tags") == [1, 2]
    with pytest.raises(DetachedInstanceError):
        _ = post.tags
    with pytest.raises(DetachedInstanceError):
        _ = tags[1].posts
    assert [each.id for each in tags[0].posts] == [1]


async def test_never_loaded_instances(session: AsyncSession) -> None:
    """An instance of which nothing but the key is known."""
    await loaded(session)
    session.expunge_all()
    post, tag = Post(id=1), Tag(key=2)
    for instance in (post, tag):
        state: Any = inspect(instance)
        state.key = state.mapper.identity_key_from_instance(instance)
    assert await m2m_add(session, post, Post.tags, tag) == 1
    assert await pairs(session, post_tag) == {(1, 1), (1, 2)}


async def test_self_reference(session: AsyncSession) -> None:
    """Both collections of a class that is related to itself."""
    one, two = Person(id=1, follows=[], followers=[]), Person(id=2, follows=[], followers=[])  # type: ignore[call-arg]
    session.add_all([one, two])
    await session.flush()
    await m2m_add(session, one, Person.follows, two, one)
    assert await shown(session, one, "follows") == [1, 2]
    assert await shown(session, one, "followers") == [1]
    assert await shown(session, two, "followers") == [1]
    assert await shown(session, two, "follows") == []


async def test_a_failed_call_expires_nothing(session: AsyncSession) -> None:
    """Where the statement failed the collection is still what it was."""
    post, tags = await loaded(session)
    await session.begin()
    nested = await session.begin_nested()
    with pytest.raises(IntegrityError):
        await m2m_add(session, post, Post.tags, tags[0])
    assert "tags" not in inspect(post).unloaded
    await nested.rollback()
    await check(session, post, tags, 1)


async def link_objects(session: AsyncSession) -> tuple[Any, Any, Any]:
    """A student with two courses, the objects of the association, and a term that shows both."""
    student, term = Pupil(id=1), Term(id=1)
    session.add_all([student, term, *(Subject(id=number) for number in (1, 2, 3))])
    await session.flush()
    await m2m_add(session, student, Pupil.subjects, pks=[1, 2], values={"term": 1, "mark": 5})
    await session.commit()
    session.expunge_all()
    student = await session.get_one(
        Pupil, 1, options=[selectinload(Pupil.entries), selectinload(Pupil.subjects)]
    )
    term = await session.get_one(Term, 1, options=[selectinload(Term.pupils)])
    entries = {each.subject: each for each in student.entries}
    return student, term, entries


async def test_association_objects(session: AsyncSession) -> None:
    """Objects of the association table, and collections of them, are never stale."""
    student, term, entries = await link_objects(session)
    one, two = entries[1], entries[2]
    await m2m_set(session, student, Pupil.subjects, pks=[2, 3], values={"term": 1, "mark": 7})
    assert {"entries", "subjects"} <= inspect(student).unloaded
    assert "pupils" in inspect(term).unloaded
    await session.refresh(two)
    assert two.mark == 7
    with pytest.raises(InvalidRequestError):
        await session.refresh(one)
    await session.refresh(student, ["entries"])
    assert sorted(each.subject for each in student.entries) == [2, 3]
    await session.refresh(student, ["entries"])
    await session.refresh(two)
    await m2m_remove(session, student, Pupil.subjects, pks=[2])
    assert "mark" in inspect(two).unloaded and "entries" in inspect(student).unloaded


async def test_association_objects_of_others(session: AsyncSession) -> None:
    """Objects of other rows stay loaded."""
    student, _, entries = await link_objects(session)
    await m2m_remove(session, student, Pupil.subjects, pks=[1])
    assert "mark" in inspect(entries[1]).unloaded and entries[2].mark == 5
    await m2m_add_many(session, Pupil.subjects, [(1, 3)], values={"term": 1})
    assert entries[2].mark == 5
    session.add(other := Pupil(id=2))
    await m2m_set(session, other, Pupil.subjects, pks=[2], values={"term": 1})
    assert entries[2].mark == 5


async def test_association_objects_after_a_savepoint(session: AsyncSession) -> None:
    """What was read in a savepoint that is rolled back is read again."""
    student, term, entries = await link_objects(session)
    two = entries[2]
    with pytest.raises(LookupError):
        async with get_transaction(session):
            await m2m_set(session, student, Pupil.subjects, pks=[2], values={"term": 1, "mark": 9})
            await session.refresh(two)
            await session.refresh(term, ["pupils"])
            await session.refresh(student, ["entries"])
            assert two.mark == 9
            raise LookupError
    await session.refresh(two)
    assert two.mark == 5
    assert "pupils" in inspect(term).unloaded and "entries" in inspect(student).unloaded


async def test_collections_that_are_not_loaded(engine: AsyncEngine) -> None:
    """With lazy="noload" a loaded collection is expired as any other, and not read as empty, after
    a savepoint that is rolled back too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of SQLAlchemy 2.1
        made = shape(lazy="noload")
    async with created(engine, made) as session:
        (first, *_), _ = await made.store(session)
        await m2m_add(session, first, made.owner.others, pks=[1])
        session.expunge_all()
        loaded = [selectinload(made.owner.others)]
        owner = await session.get_one(made.owner, 1, options=loaded)
        assert [each.id for each in owner.others] == [1]

        async def keys() -> list[int]:
            return await session.run_sync(lambda _: [each.id for each in owner.others])

        await m2m_add(session, owner, made.owner.others, pks=[2])
        # SQLAlchemy's adapter of psycopg meets the missing greenlet within the statement.
        with pytest.raises((MissingGreenlet, StatementError), match="greenlet_spawn"):
            _ = owner.others
        assert await keys() == [1, 2]
        await m2m_set(session, owner, made.owner.others, pks=[2, 3])
        assert await keys() == [2, 3]
        with pytest.raises(LookupError):
            async with get_transaction(session):
                await m2m_set(session, owner, made.owner.others)
                assert await keys() == []
                raise LookupError
        assert await keys() == [2, 3]
        await session.rollback()
