"""`m2m._names`: no alias and no parameter of ours meets a name of theirs."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset import m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset.m2m._names import free_prefix
from tests.m2m.shapes import Shape, created, shape

ALIASES = (
    "rows numbered links wanted present difference inserted deleted kept surplus doomed diff "
    "excluded old new c i k d a t value order select"
).split()
COLUMNS = ["r0", "o0", "v0", "x0", "w_r0", "p_r0", "n", "number", "position", "count"]


def names_of(number: int) -> dict[str, Any]:
    """Names for all three tables and for both columns, each among those of `ALIASES`."""
    count = len(ALIASES)
    return {
        "names": [ALIASES[(number + at) % count] for at in range(3)],
        "keys": [COLUMNS[(number + at) % len(COLUMNS)] for at in range(2)],
    }


async def use(engine: AsyncEngine, made: Shape) -> None:
    """Every function, and what it leaves in the table."""
    key = list(made.link.c)[:2]
    async with created(engine, made) as session:
        (owner, *_), (one, *_) = await made.store(session)
        others = made.owner.others

        async def pairs() -> list[tuple[int, int]]:
            found = await session.execute(select(*key).order_by(*key))
            return [(left, right) for left, right in found]

        assert await m2m_add(session, owner, others, one) == 1
        assert await m2m_add(session, owner, others, pks=[1, 2], ignore_conflicts=True) == 1
        assert await m2m_add_many(session, others, [(1, 2), (2, 1)], ignore_conflicts=True) == 1
        assert await m2m_add_many(session, made.related.owners, [(4, 4)]) == 1
        assert await m2m_set(session, owner, others, pks=[2, 3]) == (1, 1)
        assert await m2m_set(session, owner, others, pks=[3, 4], keep_existing=True) == (1, 1)
        assert await m2m_set(session, one, made.related.owners, pks=[1, 2]) == (1, 0)
        assert await m2m_remove(session, owner, others, pks=[1, 2, 3]) == 2
        assert await pairs() == [(1, 4), (2, 1), (4, 4)]
        await session.commit()
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert await m2m_set(session, owner, others, one) == (1, 1)
        await session.rollback()


@pytest.mark.parametrize("number", range(len(ALIASES)))
@pytest.mark.parametrize("kind", ["plain", "defaults", "loose"])
async def test_their_names(engine: AsyncEngine, number: int, kind: str) -> None:
    """Tables and columns may be called as an alias or a parameter would be."""
    names = names_of(number)
    extra = [name for name in COLUMNS if name not in names["keys"]][:2]
    if kind == "plain":
        await use(engine, shape(**names))
    elif kind == "defaults":
        columns = [
            Column(extra[0], Integer, default=lambda: 7),
            Column(extra[1], Integer, default=8),
        ]
        await use(engine, shape(*columns, **names))
    else:
        await use(engine, shape(primary_key=False, **names))


async def test_a_name_with_our_prefix(engine: AsyncEngine) -> None:
    """The prefix of our names is one that theirs do not have, in capitals neither."""
    made = shape(
        Column("mm2m_v0", Integer, default=lambda: 1),
        names=("M2M_owner", "m2m_related", "m2m_links"),
        keys=("m2m_o0", "m2m_r0"),
    )
    assert free_prefix([made.link]) == "mmm2m_"
    await use(engine, made)
    assert free_prefix([shape().link]) == "m2m_"


@pytest.mark.parametrize("name", ["m2m_difference", "m2m_wanted", "m2m_links", "m2m_rows"])
async def test_a_default_that_reads_a_table(engine: AsyncEngine, name: str) -> None:
    """A table in an SQL default is not taken for one of our aliases."""
    source = Table(name, MetaData(), Column("number", Integer))
    made = shape(Column("extra", Integer, default=select(source.c.number).limit(1)))
    async with created(engine, made) as session:
        await session.run_sync(lambda sync: source.create(sync.connection()))
        await session.execute(insert(source), {"number": 5})
        (owner, *_), _ = await made.store(session)
        assert await m2m_add(session, owner, made.owner.others, pks=[1, 2]) == 2
        assert await m2m_set(session, owner, made.owner.others, pks=[2, 3]) == (1, 1)
        assert (await session.scalars(select(made.link.c.extra))).all() == [5, 5]
        await session.run_sync(lambda sync: source.drop(sync.connection()))
        await session.commit()
