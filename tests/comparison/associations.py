"""Promises about many-to-many associations."""

import asyncio
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from tests.comparison.models import Item, Tag, create_tables, item_tag
from tests.comparison.promises import promise
from tests.comparison.stacks import ASYNC, FastapiToolsets, PgToolset, Stack, plain, until


async def associate(stack: Stack, session: Any, item: Any, tags: list[Any]) -> None:
    """Add tags to an item, as the stack does it."""
    if isinstance(stack, PgToolset):
        from pgtoolset import m2m_add

        await m2m_add(session, item, Item.tags, *tags)
    elif isinstance(stack, FastapiToolsets):
        from fastapi_toolsets.db import m2m_add

        await m2m_add(session, item, Item.tags, *tags)
    else:
        item.tags.extend(tags)
        await session.flush()


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def without_loading(stack: Stack) -> bool:
    """Tags are added to an item whose collection was never loaded, in async code."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        item = await session.get_one(Item, 1)
        tags = list(await session.scalars(select(Tag)))
        try:
            await associate(stack, session, item, tags)
        except SQLAlchemyError:
            return False
        return len((await session.scalars(select(item_tag.c.tag_id))).all()) == 3


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def never_stale(stack: Stack) -> bool:
    """A collection that was loaded before shows the added tags, or is expired."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        loaded = select(Item).options(selectinload(Item.tags))
        item = (await session.scalars(loaded)).one()
        await associate(stack, session, item, list(await session.scalars(select(Tag))))
        return len((await session.scalars(loaded)).one().tags) == 3


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def any_number(stack: Stack) -> bool:
    """Twenty thousand tags are added at once."""
    create_tables(stack, rows=20_000)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        loaded = select(Item).options(selectinload(Item.tags))
        item = (await session.scalars(loaded)).one()
        tags = list(await session.scalars(select(Tag)))
        try:
            await associate(stack, session, item, tags)
        except SQLAlchemyError:
            return False
        return True


async def replace(stack: Stack, session: Any, tag: int) -> None:
    """Make a tag the only one of the item, as the stack does it."""
    loaded = select(Item).options(selectinload(Item.tags))
    item = (await session.scalars(loaded)).one()
    if isinstance(stack, PgToolset):
        from pgtoolset import m2m_set
    elif isinstance(stack, FastapiToolsets):
        from fastapi_toolsets.db import m2m_set
    else:
        item.tags = [await session.get_one(Tag, tag)]
        return await session.flush()
    await m2m_set(session, item, Item.tags, await session.get_one(Tag, tag))


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def concurrent_sets(stack: Stack) -> bool:
    """Two transactions that replace the tags at the same time end as one of the two sets."""
    create_tables(stack)

    async def second() -> None:
        async with AsyncSession(stack.engine, expire_on_commit=False) as session:
            await replace(stack, session, 2)
            await session.commit()

    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        await replace(stack, session, 1)
        task = asyncio.create_task(second())
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with plain(stack.url) as other:
            await until(lambda: task.done() or other.execute(waiting).fetchone() == (1,))
        await session.commit()
        await task
        return len((await session.scalars(select(item_tag.c.tag_id))).all()) == 1
