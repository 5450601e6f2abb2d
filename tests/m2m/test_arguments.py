"""Bad input gets a clear error before any SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func
from sqlalchemy.ext.associationproxy import association_proxy
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgtoolset import m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import Box, CompositeA, Post, Shelf, Statements, Tag, Thing, recorded

WRONG_RELATIONSHIPS: dict[str, Callable[[], Any]] = {
    "column": lambda: Post.title,
    "one to many": lambda: Post.comments,
    "viewonly": lambda: Post.seen,
    "name": lambda: "tags",
    "class": lambda: Post,
    "nothing": lambda: None,
    "property": lambda: Post.tags.property,
    "proxy": lambda: association_proxy("tags", "key"),
    "conditions": lambda: Shelf.conditional,
}


async def refused(statements: Statements, error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        await call
    assert statements == []


@pytest.mark.parametrize("name", WRONG_RELATIONSHIPS)
async def test_not_many_to_many(session: AsyncSession, engine: AsyncEngine, name: str) -> None:
    """What is no Many-to-Many relationship that can be written is a TypeError that says
    Many-to-Many."""
    attribute = WRONG_RELATIONSHIPS[name]()
    post = Post(id=1)
    session.add(post)
    with recorded(engine) as statements:
        for call in (m2m_add, m2m_remove, m2m_set):
            await refused(
                statements, TypeError, "Many-to-Many", call(session, post, attribute, Tag())
            )
        await refused(
            statements, TypeError, "Many-to-Many", m2m_add_many(session, attribute, [(1, 1)])
        )
    session.expunge_all()


async def test_wrong_instances(session: AsyncSession, engine: AsyncEngine) -> None:
    """Another class is a TypeError; a transient, deleted or foreign pending instance a
    ValueError."""
    post, tag, going, gone = Post(id=1), Tag(key=1), Tag(key=2), Tag(key=3)
    session.add_all([post, tag, going, gone])
    await session.flush()
    await session.delete(gone)
    await session.flush()
    await session.delete(going)
    pending = Tag(key=4)
    async with AsyncSession(engine) as other:
        other.add(pending)
        with recorded(engine) as statements:
            for call in (m2m_add, m2m_remove, m2m_set):
                await refused(
                    statements,
                    TypeError,
                    "takes instances of Post",
                    call(session, tag, Post.tags, tag),
                )
                await refused(
                    statements,
                    TypeError,
                    "takes instances of Tag",
                    call(session, post, Post.tags, post),
                )
                await refused(
                    statements, TypeError, "unpack", call(session, post, Post.tags, [tag])
                )
                await refused(
                    statements, TypeError, "goes into pks", call(session, post, Post.tags, 1)
                )
                await refused(
                    statements, TypeError, "instances of Tag", call(session, post, Post.tags, None)
                )
                await refused(
                    statements, ValueError, "transient", call(session, Post(id=1), Post.tags, tag)
                )
                await refused(
                    statements,
                    ValueError,
                    "transient",
                    call(session, post, Post.tags, tag, Tag(key=1)),
                )
                await refused(
                    statements,
                    ValueError,
                    "has been deleted",
                    call(session, post, Post.tags, going),
                )
                await refused(
                    statements, ValueError, "has been deleted", call(session, post, Post.tags, gone)
                )
                await refused(
                    statements,
                    ValueError,
                    "another session",
                    call(session, post, Post.tags, pending),
                )
            for link in ((tag, tag), (post, post), (1, post), (tag, 1)):
                await refused(
                    statements, TypeError, "Post.tags", m2m_add_many(session, Post.tags, [link])
                )
            await refused(
                statements,
                ValueError,
                "transient",
                m2m_add_many(session, Post.tags, [(1, Tag(key=1))]),
            )
            await refused(
                statements,
                ValueError,
                "deleted",
                m2m_add_many(session, Post.tags, [(1, 1), (1, gone)]),
            )
    await session.rollback()


async def test_wrong_keys(session: AsyncSession, engine: AsyncEngine) -> None:
    """A key of the wrong arity, None, and what is no list of keys."""
    post, a = Post(id=1), CompositeA(two=1, one=1)
    session.add_all([post, a])
    await session.commit()
    with recorded(engine) as statements:
        for call in (m2m_add, m2m_remove, m2m_set):
            await refused(
                statements,
                ValueError,
                r"1 column \(key\)",
                call(session, post, Post.tags, pks=[(1, 2)]),
            )
            await refused(
                statements, ValueError, "2 columns", call(session, a, CompositeA.bs, pks=[1])
            )
            await refused(
                statements,
                ValueError,
                "2 columns",
                call(session, a, CompositeA.bs, pks=[(1, "x", 2)]),
            )
            await refused(
                statements, ValueError, "None is no", call(session, post, Post.tags, pks=[None])
            )
            await refused(
                statements,
                ValueError,
                "None is no",
                call(session, a, CompositeA.bs, pks=[(1, None)]),
            )
            await refused(statements, TypeError, "iterable", call(session, post, Post.tags, pks=1))
            await refused(
                statements, TypeError, "iterable", call(session, post, Post.tags, pks="12")
            )
            await refused(
                statements, TypeError, "no primary key", call(session, post, Post.tags, pks=[{1}])
            )
            await refused(
                statements,
                TypeError,
                "primary key",
                call(session, post, Post.tags, pks=[Tag(key=1)]),
            )
        links: list[tuple[Any, type[Exception], str]] = [
            ([(1, (1, 2))], ValueError, "1 column"),
            ([(1, 2, 3)], ValueError, "has 3 elements"),
            ([1], TypeError, "pairs"),
            ("12", TypeError, "iterable"),
            (None, TypeError, "iterable"),
            ({1: 2}, TypeError, "iterable"),
            ([(None, 1)], ValueError, "None is no"),
        ]
        for link, error, match in links:
            await refused(statements, error, match, m2m_add_many(session, Post.tags, link))


async def test_wrong_options(session: AsyncSession, engine: AsyncEngine) -> None:
    """values that name no extra column or are SQL, flags that are none, a session that is none."""
    box, thing, post = Box(id=1), Thing(id=1), Post(id=1)
    session.add_all([box, thing, post])
    await session.commit()
    things = Box.things
    call: Any
    sync: Any = Session(engine.sync_engine)
    with recorded(engine) as statements:
        for call in (m2m_add, m2m_set):
            for name in ("nothing", "box", "plain_key"):
                wrong = {name: 1}
                await refused(
                    statements,
                    ValueError,
                    repr(name),
                    call(session, box, things, thing, values=wrong),
                )
            await refused(
                statements,
                ValueError,
                "it has none",
                call(session, post, Post.tags, values={"post": 1}),
            )
            await refused(
                statements, TypeError, "mapping", call(session, box, things, thing, values=["note"])
            )
            sql = {"note": func.now()}
            await refused(
                statements,
                TypeError,
                "SQL expression",
                call(session, box, things, thing, values=sql),
            )
        await refused(
            statements,
            TypeError,
            "ignore",
            m2m_add(session, box, things, thing, ignore_conflicts=1),
        )  # type: ignore[arg-type]
        await refused(
            statements, TypeError, "keep", m2m_set(session, box, things, thing, keep_existing=None)
        )  # type: ignore[arg-type]
        for other in (sync, None, engine):
            for call in (m2m_add, m2m_remove, m2m_set):
                await refused(
                    statements, TypeError, "AsyncSession", call(other, box, things, thing)
                )
            await refused(
                statements, TypeError, "AsyncSession", m2m_add_many(other, things, [(1, 1)])
            )
