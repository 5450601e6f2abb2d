"""Bad input gets a clear error before any SQL."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

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
    "URL": lambda: URL,
    "class": lambda: Post,
    "nothing": lambda: None,
    "property": lambda: Post.tags.property,
    "proxy": lambda: association_proxy("tags", "key"),
    "conditions": lambda: Shelf.conditional,
}


#: Given by mistake, a URL is not echoed.
URL: Any = "postgresql://user:secret@host/database"


async def refused(statements: Statements, error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        await call
    assert statements == []
    assert "secret" not in str(caught.value)


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
                statements,
                TypeError,
                "^rel_attr.*Many-to-Many",
                call(session, post, attribute, Tag()),
            )
        await refused(
            statements,
            TypeError,
            "^rel_attr.*Many-to-Many",
            m2m_add_many(session, attribute, [(1, 1)]),
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
    wrong: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (tag, (tag,), TypeError, "^instance must be an instance of Post, not a Tag$"),
        (post, (post,), TypeError, "^related must be an instance of Tag, not a Post$"),
        (post, ([tag],), TypeError, r"^related must .* not \[a Tag\]; unpack a collection with"),
        ([post], (tag,), TypeError, r"^instance must .* not \[a Post\]; unpack"),
        (post, (1,), TypeError, "^related must .* not 1; a primary key goes into pks"),
        (1, (tag,), TypeError, "^instance must be an instance of Post, not 1$"),
        (post, (None,), TypeError, "^related must be an instance of Tag, not None"),
        (None, (tag,), TypeError, "^instance must be an instance of Post, not None"),
        (post, (URL,), TypeError, "^related must be an instance of Tag, not a URL"),
        (Post(id=1), (tag,), ValueError, "^instance: this instance of Post is transient"),
        (post, (tag, Tag(key=1)), ValueError, "^related: this instance of Tag is transient"),
        (post, (going,), ValueError, "^related: this instance of Tag has been deleted"),
        (post, (gone,), ValueError, "^related: this instance of Tag has been deleted"),
        (post, (pending,), ValueError, "^related: .* pending in another session"),
    ]
    wrong_links: list[tuple[Any, type[Exception], str]] = [
        ((tag, tag), TypeError, "^links: expected an instance or a primary key of Post, not a Tag"),
        ((post, post), TypeError, "^links: expected .* of Tag, not a Post"),
        ((1, post), TypeError, "^links: expected .* of Tag, not a Post"),
        ((tag, 1), TypeError, "^links: expected .* of Post, not a Tag"),
        ((1, Tag(key=1)), ValueError, "^links: this instance of Tag is transient"),
        ((Post(id=1), 1), ValueError, "^links: this instance of Post is transient"),
        ((1, gone), ValueError, "^links: this instance of Tag has been deleted"),
        ((1, pending), ValueError, "^links: .* pending in another session"),
    ]
    async with AsyncSession(engine) as other:
        other.add(pending)
        with recorded(engine) as statements:
            for owner, related, error, match in wrong:
                for call in (m2m_add, m2m_remove, m2m_set):
                    await refused(
                        statements, error, match, call(session, owner, Post.tags, *related)
                    )
            for link, error, match in wrong_links:
                for links in ([link], [(1, 1), link]):
                    await refused(statements, error, match, m2m_add_many(session, Post.tags, links))
    await session.rollback()


async def test_wrong_keys(session: AsyncSession, engine: AsyncEngine) -> None:
    """A key of the wrong arity, None, an instance, and what is no iterable of keys."""
    post, a = Post(id=1), CompositeA(two=1, one=1)
    session.add_all([post, a])
    await session.commit()
    tags, bs = Post.tags, CompositeA.bs
    wrong: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (post, tags, [(1, 2)], ValueError, r"^pks: a primary key of Tag has 1 column \(key\)"),
        (a, bs, [1], TypeError, r"^pks: .* has 2 columns \(number, text\), as a tuple; got 1"),
        (a, bs, [(1, "x", 2)], ValueError, r"^pks: .* 2 columns"),
        (post, tags, [None], ValueError, r"^pks: Tag\.key .* never None"),
        (a, bs, [(1, None)], ValueError, r"^pks: CompositeB\.text .* never None"),
        (post, tags, 1, TypeError, "^pks must be an iterable of primary keys of Tag, not 1"),
        (post, tags, "12", TypeError, "^pks must be an iterable"),
        (post, tags, None, TypeError, "^pks must be an iterable"),
        (post, tags, {1: 2}, TypeError, "^pks must be an iterable"),
        (post, tags, [{1}], TypeError, r"^pks: Tag\.key is an integer, not a set"),
        (post, tags, [Tag(key=1)], TypeError, "^pks: .* primary key, not an instance"),
        (a, bs, [Tag(key=1)], TypeError, "^pks: .* as a tuple; got a Tag"),
        (post, tags, [URL], TypeError, r"^pks: Tag\.key is an integer, not a URL"),
    ]
    wrong_links: list[tuple[Any, type[Exception], str]] = [
        ([(1, (1, 2))], ValueError, "^links: .* 1 column"),
        ([(1, 2, 3)], ValueError, "^links .* has 3 elements"),
        ([1], TypeError, "^links must hold pairs"),
        (["12"], TypeError, "^links must hold pairs"),
        ("12", TypeError, "^links must be an iterable"),
        (None, TypeError, "^links must be an iterable"),
        ({1: 2}, TypeError, "^links must be an iterable"),
        ([(None, 1)], ValueError, r"^links: Post\.id .* never None"),
        ([(1, URL)], TypeError, "^links: .* not a URL"),
    ]
    with recorded(engine) as statements:
        for owner, attribute, keys, error, match in wrong:
            for call in (m2m_add, m2m_remove, m2m_set):
                await refused(statements, error, match, call(session, owner, attribute, pks=keys))
        for links, error, match in wrong_links:
            await refused(statements, error, match, m2m_add_many(session, tags, links))


async def test_wrong_options(session: AsyncSession, engine: AsyncEngine) -> None:
    """values that name no extra column or are SQL, flags that are none, a session that is none."""
    box, thing, post = Box(id=1), Thing(id=1), Post(id=1)
    session.add_all([box, thing, post])
    await session.commit()
    things: Any = Box.things
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"nothing": 1}, ValueError, "^values: 'nothing' is not an extra column"),
        ({"box": 1}, ValueError, "^values: 'box' is not"),
        ({"plain_key": 1}, ValueError, "^values: 'plain_key' is not"),
        ({1: 1}, ValueError, "^values: 1 is not"),
        (["note"], TypeError, r"^values must be a mapping .* not \['note'\]"),
        (URL, TypeError, "^values must be a mapping .* not a URL"),
        ({"note": func.now()}, TypeError, "^values: note must be a value, not an SQL expression"),
    ]
    call: Any
    add, put, add_many = (cast("Any", each) for each in (m2m_add, m2m_set, m2m_add_many))
    with recorded(engine) as statements:
        for values, error, match in wrong:
            for call in (add, put):
                await refused(
                    statements, error, match, call(session, box, things, thing, values=values)
                )
            await refused(
                statements, error, match, add_many(session, things, [(1, 1)], values=values)
            )
        for call in (add, put):
            none = call(session, post, Post.tags, values={"post": 1})
            await refused(statements, ValueError, "there are no extra columns", none)
        for flag in (1, None, "yes"):
            ignoring = (
                add(session, box, things, thing, ignore_conflicts=flag),
                add_many(session, things, [(1, 1)], ignore_conflicts=flag),
            )
            for each in ignoring:
                await refused(statements, TypeError, "^ignore_conflicts must be True or", each)
            keeping = put(session, box, things, thing, keep_existing=flag)
            await refused(statements, TypeError, "^keep_existing must be True or", keeping)
        for other in (Session(engine.sync_engine), None, engine):
            for call in (add, m2m_remove, put):
                await refused(
                    statements,
                    TypeError,
                    "^session must be an AsyncSession",
                    call(other, box, things, thing),
                )
            await refused(
                statements, TypeError, "^session must be", add_many(other, things, [(1, 1)])
            )


async def test_no_text_is_made_for_messages(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call in which nothing is wrong makes no text that only an error would show."""
    post, tag = Post(id=1), Tag(key=1)
    session.add_all([post, tag])
    await session.commit()

    async def calls() -> None:
        await m2m_add(session, post, Post.tags, tag)
        await m2m_set(session, post, Post.tags, pks=[1])
        await m2m_remove(session, post, Post.tags, tag)
        await m2m_add_many(session, Post.tags, [(post, tag)])
        await session.rollback()

    await calls()
    made: list[str] = []
    # The package has a function of the same name as the module.
    module = sys.modules["pgtoolset._arguments.shown"]
    monkeypatch.setattr(module, "may_hold_password", made.append)
    await calls()
    assert made == []
