"""Checked by mypy and pyright, never run: what the Many-to-Many functions are typed as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped

import pgtoolset
from pgtoolset import M2MChange, m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset._native import associations
from pgtoolset.protocols import AssociationRows, AssociationWriter


class Base(DeclarativeBase):
    pass


class Tag(Base):
    id: Mapped[int]


class Post(Base):
    tags: Mapped[list[Tag]]


writer: AssociationWriter = pgtoolset
rows: AssociationRows = associations


async def use(session: AsyncSession, post: Post, tag: Tag) -> None:
    assert_type(await m2m_add(session, post, Post.tags, tag, tag, pks=[1], ignore_conflicts=True, values={"a": 1}), int)
    assert_type(await m2m_remove(session, post, Post.tags, tag, pks=(1, 2)), int)
    change = await m2m_set(session, post, Post.tags, keep_existing=True)
    assert_type(change, M2MChange)
    assert_type(change.added, int)
    assert_type(await m2m_add_many(session, Post.tags, [(post, 1), (2, tag)]), int)
    assert_type(await writer.m2m_set(session, post, Post.tags, tag), M2MChange)


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
