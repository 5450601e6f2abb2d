"""Mappings that are made for one test: an owner, a related class, and the association of its
choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import registry, relationship


@dataclass(frozen=True)
class Shape:
    """Two mapped classes and the association table between them.

    `Owner.others` and `Related.owners` are the two sides; the keys are called `id`.
    """

    owner: Any
    related: Any
    link: Table
    metadata: MetaData

    async def store(self, session: AsyncSession, count: int = 4) -> tuple[list[Any], list[Any]]:
        """Commit owners and related 1, 2, ..."""
        owners = [self.owner(id=number) for number in range(1, count + 1)]
        related = [self.related(id=number) for number in range(1, count + 1)]
        session.add_all([*owners, *related])
        await session.commit()
        return owners, related


def shape(
    *extra: Any,
    names: Sequence[str] = ("shape_owner", "shape_related", "shape_link"),
    keys: Sequence[str] = ("owner", "related"),
    primary_key: bool = True,
    references: bool = True,
    schema: str | None = None,
    lazy: Any = "select",
    owner_columns: Sequence[Any] = (),
    version: str | None = None,
) -> Shape:
    """Make a shape.

    Args:
        extra: more columns and constraints of the association table.
        names: of the tables of the owner, of the related, and of the association.
        keys: the names of the columns of the association table.
        primary_key: whether the pair is its primary key.
        references: whether it has foreign keys.
        schema: of all three.
        lazy: how the collections are loaded.
        owner_columns: more columns of the owner.
        version: the column that is the owner's version, which the server makes.
    """
    metadata = MetaData(schema=schema)
    mapped = registry(metadata=metadata)
    tables = [Table(name, metadata, Column("id", Integer, primary_key=True)) for name in names[:2]]
    for column in owner_columns:
        tables[0].append_column(column)
    columns = [
        Column(
            key,
            Integer,
            *([ForeignKey(table.c.id)] if references else []),
            primary_key=primary_key,
            autoincrement=False,
        )
        for key, table in zip(keys, tables, strict=True)
    ]
    link = Table(names[2], metadata, *columns, *extra)

    class Owner:
        def __init__(self, id: int) -> None:
            self.id = id

    class Related:
        def __init__(self, id: int) -> None:
            self.id = id

    joins: dict[str, Any] = {
        "primaryjoin": tables[0].c.id == link.c[keys[0]],
        "secondaryjoin": tables[1].c.id == link.c[keys[1]],
    }
    if not references:
        joins["foreign_keys"] = [link.c[key] for key in keys]
    others = relationship(
        Related,
        secondary=link,
        back_populates="owners",
        lazy=lazy,
        order_by=tables[1].c.id,
        **joins,
    )
    joins["primaryjoin"], joins["secondaryjoin"] = joins["secondaryjoin"], joins["primaryjoin"]
    owners = relationship(
        Owner, secondary=link, back_populates="others", lazy=lazy, order_by=tables[0].c.id, **joins
    )
    options: dict[str, Any] = {}
    if version is not None:
        options = {"version_id_col": tables[0].c[version], "version_id_generator": False}
    mapped.map_imperatively(Owner, tables[0], properties={"others": others}, **options)
    mapped.map_imperatively(Related, tables[1], properties={"owners": owners})
    mapped.configure()
    return Shape(Owner, Related, link, metadata)


@asynccontextmanager
async def created(
    engine: AsyncEngine, made: Shape, *statements: str
) -> AsyncIterator[AsyncSession]:
    """A session on the tables of a shape, after these statements.

    The tables are dropped, and `shape_base`, `shape_check()` and `shape_count(integer)`, which the
    statements may have made.
    """
    async with engine.begin() as connection:
        await connection.run_sync(made.metadata.create_all)
        for statement in statements:
            await connection.execute(text(statement))
    try:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            yield session
    finally:
        names = [f'"{table.name}"' for table in made.metadata.sorted_tables]
        async with engine.begin() as connection:
            for name in (*names, "shape_base"):
                kind = await connection.scalar(
                    text("SELECT relkind::text FROM pg_class WHERE oid = to_regclass(:name)"),
                    {"name": name},
                )
                words = {"v": "VIEW", "m": "MATERIALIZED VIEW", "f": "FOREIGN TABLE"}
                if kind is not None:
                    what = words.get(kind, "TABLE")
                    await connection.execute(text(f"DROP {what} {name} CASCADE"))
            for name in ("shape_check()", "shape_count(integer)"):
                await connection.execute(text(f"DROP FUNCTION IF EXISTS {name} CASCADE"))
