"""Where the statements go: the tenant's schema, and the engine that a routing session chooses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Delete, Insert, Update, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema, DropSchema

from pgtoolset import m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import Group, User
from tests.m2m.shapes import Shape, created, shape

TENANTS = ["shape_tenant", 'Shape "tenant\'s" $1 %s', "shape:tenant"]


@pytest.fixture(params=["none", "a name"])
async def tenants(engine: AsyncEngine, request: pytest.FixtureRequest) -> AsyncIterator[Shape]:
    """The tables of a shape in `public`, which is empty, and in the schema of each tenant."""
    schema = None if request.param == "none" else "shape_schema"
    made = shape(schema=schema)
    schemas = [*TENANTS, *([schema] if schema else [])]
    async with engine.begin() as connection:
        for each in schemas:
            await connection.execute(CreateSchema(each))
        await connection.run_sync(made.metadata.create_all)
        for tenant in TENANTS:
            copy = await connection.execution_options(schema_translate_map={schema: tenant})
            await copy.run_sync(made.metadata.create_all, checkfirst=False)
        await connection.execution_options(schema_translate_map={schema: schema})
    yield made
    async with engine.begin() as connection:
        if schema is None:
            await connection.run_sync(made.metadata.drop_all)
        for each in schemas:
            await connection.execute(DropSchema(each, cascade=True))


@asynccontextmanager
async def by_engine(engine: AsyncEngine, options: dict[str, Any]) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine.execution_options(**options), expire_on_commit=False) as session:
        yield session


@asynccontextmanager
async def by_connection(
    engine: AsyncEngine, options: dict[str, Any]
) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        await session.connection(execution_options=options)
        yield session


@asynccontextmanager
async def by_one_connection(
    engine: AsyncEngine, options: dict[str, Any]
) -> AsyncIterator[AsyncSession]:
    async with engine.connect() as connection:
        await connection.execution_options(**options)
        async with AsyncSession(connection, expire_on_commit=False) as session:
            yield session
            await session.flush()
            await connection.commit()


@asynccontextmanager
async def by_session(engine: AsyncEngine, options: dict[str, Any]) -> AsyncIterator[AsyncSession]:
    if sqlalchemy.__version__ < "2.1":
        pytest.skip("SQLAlchemy 2.1 has options of a session")
    more: Any = {"execution_options": options}
    async with AsyncSession(engine, expire_on_commit=False, **more) as session:
        yield session


WAYS = [by_engine, by_connection, by_one_connection, by_session]


async def use(session: AsyncSession, made: Shape) -> None:
    """Every function in one transaction, that of an unusual isolation level too."""
    owners = [made.owner(id=number) for number in (1, 2, 3, 4)]
    session.add_all([*owners, *(made.related(id=number) for number in (1, 2, 3, 4))])
    others = made.owner.others
    assert await m2m_add(session, owners[0], others, pks=[1]) == 1
    assert await m2m_add(session, owners[0], others, pks=[1, 2], ignore_conflicts=True) == 1
    assert await m2m_add_many(session, others, [(1, 2), (2, 2)], ignore_conflicts=True) == 1
    assert await m2m_set(session, owners[0], others, pks=[2, 3]) == (1, 1)
    assert await m2m_set(session, owners[0], others, pks=[3, 4], keep_existing=True) == (1, 1)
    assert await m2m_remove(session, owners[0], others, pks=[4]) == 1


@pytest.mark.parametrize("way", WAYS)
async def test_tenants(engine: AsyncEngine, tenants: Shape, way: Any) -> None:
    """Each tenant's session sees and writes its own rows alone, whatever its schema is called and
    however it is translated."""
    made, schema = tenants, tenants.metadata.schema
    tenant: Any
    for tenant in TENANTS:
        async with way(engine, {"schema_translate_map": {schema: tenant}}) as session:
            await use(session, made)
            await session.commit()
        for each in [schema, *TENANTS]:
            async with by_engine(engine, {"schema_translate_map": {schema: each}}) as session:
                found = (await session.execute(select(made.link).order_by(*made.link.c))).all()
                expected = [(1, 3), (2, 2)] if each == tenant else []
                assert [tuple(row) for row in found] == expected
                await session.execute(made.link.delete())
                for mapped in (made.owner, made.related):
                    await session.execute(sqlalchemy.delete(mapped))
                await session.commit()


@pytest.mark.parametrize("way", WAYS)
async def test_what_a_tenant_has(engine: AsyncEngine, tenants: Shape, way: Any) -> None:
    """An index of one tenant alone is known for that tenant alone."""
    made, schema = tenants, tenants.metadata.schema
    tenant = TENANTS[1]
    quoted = engine.dialect.identifier_preparer.quote_schema(tenant)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(f"CREATE UNIQUE INDEX ON {quoted}.shape_link (owner)")
    for each in (TENANTS[0], tenant, TENANTS[0], tenant):
        async with way(engine, {"schema_translate_map": {schema: each}}) as session:
            owner = made.owner(id=1)
            session.add_all([owner, *(made.related(id=number) for number in (1, 2))])
            for key in (1, 2):
                change = await m2m_set(session, owner, made.owner.others, pks=[key])
                assert change == (1, key - 1)
            if each != tenant:
                assert await m2m_set(session, owner, made.owner.others, pks=[1, 2]) == (1, 0)
            await session.flush()
            await session.rollback()


class Documented(Session):
    """SQLAlchemy's recipe: docs.sqlalchemy.org/en/20/orm/persistence_techniques.html"""

    leader: Any
    follower: Any

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        if self._flushing or isinstance(clause, Update | Delete):
            return self.leader
        return self.follower


class WithInserts(Documented):
    """As the routing sessions of other libraries: an INSERT and a locking SELECT are writes too."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        if self._flushing or isinstance(clause, Insert | Update | Delete):
            return self.leader
        if getattr(clause, "_for_update_arg", None) is not None:
            return self.leader
        return self.follower


class ByTable(Documented):
    """Looks for the table that is written."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        table = getattr(clause, "table", None)
        return self.leader if self._flushing or table is not None else self.follower


@pytest.mark.parametrize("session_class", [Documented, WithInserts, ByTable])
async def test_a_routing_session(engine: AsyncEngine, session_class: type[Documented]) -> None:
    """Every statement of a write goes to the writer, with the documented recipe and with others;
    the reader sees none."""
    made = shape()
    reader = create_async_engine(engine.url)
    seen: list[str] = []

    def before(_: Any, __: Any, statement: str, *___: Any) -> None:
        seen.append(statement)

    class Routing(session_class):  # type: ignore[valid-type,misc]
        leader = engine.sync_engine
        follower = reader.sync_engine

    async with created(engine, made, "CREATE UNIQUE INDEX ON shape_link (related) WHERE owner = 4"):
        event.listen(reader.sync_engine, "before_cursor_execute", before)
        for level in ("READ COMMITTED", "REPEATABLE READ"):
            async with AsyncSession(sync_session_class=Routing, expire_on_commit=False) as session:
                options = {"isolation_level": level}
                await session.connection(
                    bind_arguments={"clause": sqlalchemy.update(made.link)},
                    execution_options=options,
                )
                await use(session, made)
                found = await session.execute(
                    select(made.link), bind_arguments={"clause": sqlalchemy.update(made.link)}
                )
                assert {tuple(row) for row in found} == {(1, 3), (2, 2)}
                await session.rollback()
    assert seen == []
    await reader.dispose()


async def test_a_referenced_column(engine: AsyncEngine, tables: None) -> None:
    """The SELECT of a referenced column that is not the key goes to the writer as well: the reader
    may not have the row yet."""
    reader = create_async_engine(engine.url)
    seen: list[str] = []

    class Routing(Documented):
        leader = engine.sync_engine
        follower = reader.sync_engine

    def before(_: Any, __: Any, statement: str, *___: Any) -> None:
        seen.append(statement)

    event.listen(reader.sync_engine, "before_cursor_execute", before)
    async with AsyncSession(sync_session_class=Routing, expire_on_commit=False) as session:
        user = User(id=1, mail="1@x")
        session.add_all([user, Group(id=1, name="g1"), Group(id=2, name="g2")])
        assert await m2m_add(session, user, User.groups, pks=[1, 2]) == 2
        await session.rollback()
    assert seen == []
    await reader.dispose()


async def test_binds(engine: AsyncEngine) -> None:
    """`binds` of classes and of tables lead to their engine."""
    made = shape()
    other = create_async_engine("postgresql+asyncpg://nowhere.invalid/none")
    async with created(engine, made):
        choices: list[dict[Any, AsyncEngine]] = [
            {made.owner: engine, made.related: engine, made.link: engine},
            dict.fromkeys(made.metadata.sorted_tables, engine),
        ]
        for binds in choices:
            async with AsyncSession(other, binds=binds, expire_on_commit=False) as session:
                await use(session, made)
                await session.rollback()
    await other.dispose()
