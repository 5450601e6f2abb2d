"""Checked by mypy and pyright, never run: what the Many-to-Many functions are typed as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, assert_type

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    InstrumentedAttribute,
    Mapped,
    WriteOnlyMapped,
    aliased,
    registry,
    relationship,
)

import pgtoolset
from pgtoolset import M2MChange, m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset._native import associations
from pgtoolset.protocols import AssociationRows, AssociationWriter


class Base(DeclarativeBase):
    pass


class Tag(Base):
    id: Mapped[int]


class Special(Tag):
    pass


class Bag:
    """A collection class of a user's own."""

    def __iter__(self) -> Iterator[Tag]:
        return iter(())


post_tag = Table("post_tag", Base.metadata)


class Post(Base):
    id: Mapped[int]
    title: Mapped[str]
    numbers: Mapped[list[int]]
    tags: Mapped[list[Tag]] = relationship(secondary=post_tag)
    tag_set: Mapped[set[Tag]] = relationship(secondary=post_tag)
    by_name: Mapped[dict[str, Tag]] = relationship(secondary=post_tag)
    sequence: Mapped[Sequence[Tag]] = relationship(secondary=post_tag, collection_class=list)
    bag: Mapped[Bag] = relationship(secondary=post_tag)
    one: Mapped[Tag] = relationship(secondary=post_tag)
    one_or_none: Mapped[Tag | None] = relationship(secondary=post_tag)
    write_only: WriteOnlyMapped[Tag] = relationship(secondary=post_tag)
    dynamic: DynamicMapped[Tag] = relationship(secondary=post_tag)
    untyped = relationship("Tag", secondary=post_tag)


@registry().mapped
class Decorated:
    others: Mapped[list[Decorated]] = relationship(secondary=post_tag)


writer: AssociationWriter = pgtoolset
rows: AssociationRows = associations


async def use(session: AsyncSession, post: Post, tag: Tag) -> None:
    assert_type(
        await m2m_add(
            session, post, Post.tags, tag, tag, pks=[1], ignore_conflicts=True, values={"a": 1}
        ),
        int,
    )
    assert_type(await m2m_remove(session, post, Post.tags, tag, pks=(1, 2)), int)
    change = await m2m_set(session, post, Post.tags, keep_existing=True)
    assert_type(change, M2MChange)
    assert_type(change.added, int)
    assert_type(await m2m_add_many(session, Post.tags, [(post, 1), (2, tag)]), int)
    assert_type(await writer.m2m_set(session, post, Post.tags, tag), M2MChange)


async def every_kind_of_relationship(
    session: AsyncSession, post: Post, tag: Tag, special: Special, decorated: Decorated
) -> None:
    await m2m_add(session, post, Post.tags, tag, special)
    await m2m_add(session, post, Post.tags, *[special], *post.tags)
    await m2m_add(session, post, Post.tag_set, tag, special)
    await m2m_add(session, post, Post.by_name, tag, special)
    await m2m_add(session, post, Post.sequence, tag, special)
    await m2m_add(session, post, Post.bag, tag, special)
    await m2m_add(session, post, Post.one, tag)
    await m2m_add(session, post, Post.one_or_none, tag)
    await m2m_add(session, post, Post.write_only, tag)
    await m2m_add(session, post, Post.dynamic, tag)
    await m2m_add(session, post, Post.untyped, tag)
    await m2m_add(session, post, Post.tags.of_type(Special), special)
    await m2m_add(session, post, aliased(Post).tags, tag)
    await m2m_add(session, decorated, Decorated.others, decorated)


async def through_a_function_of_a_users(
    session: AsyncSession,
    post: Post,
    relationship: InstrumentedAttribute[Any],
    related: Iterable[Any],
) -> int:
    return await m2m_add(session, post, relationship, *related)


class Double:
    """Needs no import of ours but the value that it returns."""

    async def m2m_add(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        return len(related)

    async def m2m_remove(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, pks: Iterable[Any] = ()
    ) -> int:
        return 0

    async def m2m_set(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        values: Mapping[str, Any] | None = None,
        keep_existing: bool = False,
    ) -> M2MChange:
        return M2MChange(0, 0)

    async def m2m_add_many(
        self,
        session: Any,
        rel_attr: Any,
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        return 0


double: AssociationWriter = Double()


async def wrong(session: AsyncSession, post: Post, tag: Tag) -> None:
    await m2m_add(session, post, Post.tags, tag, ignore_conflicts="yes")  # type: ignore[arg-type]
    await m2m_add(session, post, Post.tags, pks=1)  # type: ignore[arg-type]
    await m2m_set(session, post, Post.tags, values=[1])  # type: ignore[arg-type]
    await m2m_add_many(session, Post.tags, [1])  # type: ignore[list-item]
    await m2m_remove(post, Post.tags, tag)  # type: ignore[arg-type]
