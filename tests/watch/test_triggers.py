"""`row_change_trigger`: who owns the function, and names that try to break out of the statement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import registry

from pgtoolset import row_change_trigger
from pgtoolset._postgres.notifications import channel_in, channel_of
from tests import support
from tests.safety.names import NAMES
from tests.support import plain_url, until


def mapped(
    name: str = "order", *, key: str = "id", schema: str | None = None
) -> tuple[type, Table]:
    table = Table(name, MetaData(), Column(key, Integer, primary_key=True), schema=schema)
    model = type("Model", (), {})
    registry().map_imperatively(model, table)
    return model, table


@pytest.fixture
async def engine(empty_database: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(empty_database)
    yield engine
    await engine.dispose()


@pytest.fixture
async def roles(empty_database: str, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection of a superuser, who has made the roles `owner`, `member` and `stranger`.

    `member` is a member of `owner`. All of them may create in the schema `public`, as on
    PostgreSQL 14.
    """
    names = ["pgts owner", "pgts member", "pgts stranger"]
    async with support.roles(empty_database, *names), engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        for name in names:
            await connection.execute(text(f'GRANT CREATE ON SCHEMA public TO "{name}"'))
        await connection.execute(text('GRANT "pgts owner" TO "pgts member"'))
        yield connection


async def migrate(connection: AsyncConnection, model: type) -> None:
    for ddl in row_change_trigger(model):
        await connection.execute(ddl)


async def owner_of(connection: AsyncConnection, table: Table) -> str:
    found = await connection.scalar(
        text("SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE proname = :name"),
        {"name": channel_of(table)},
    )
    return str(found)


async def make(connection: AsyncConnection, table: Table, owner: str = "pgts owner") -> None:
    await connection.run_sync(table.create)
    await connection.execute(text(f'ALTER TABLE "{table.name}" OWNER TO "{owner}"'))


async def plant(connection: AsyncConnection, table: Table) -> None:
    await connection.execute(
        text(
            f"CREATE FUNCTION {channel_of(table)}() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN RETURN NULL; END'"
        )
    )


async def test_the_caller_owns_the_function(roles: AsyncConnection) -> None:
    """A migration, and the same one again, leave a function that the caller owns."""
    model, table = mapped()
    await make(roles, table)
    await roles.execute(text('SET ROLE "pgts owner"'))
    await migrate(roles, model)
    await migrate(roles, model)
    assert await owner_of(roles, table) == "pgts owner"


@pytest.mark.parametrize("caller", [None, "pgts owner"])
@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED", "SERIALIZABLE"])
async def test_a_strangers_function_is_refused(
    roles: AsyncConnection, engine: AsyncEngine, caller: str | None, level: str
) -> None:
    """Where another role owns a function of that name, an error names the role, and it stays."""
    model, table = mapped()
    await make(roles, table)
    await roles.execute(text('SET ROLE "pgts stranger"'))
    await plant(roles, table)
    await roles.execute(text("RESET ROLE"))
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        if caller is not None:
            await connection.execute(text(f'SET ROLE "{caller}"'))
        with pytest.raises(ProgrammingError, match='belongs to the role "pgts stranger"') as caught:
            await migrate(connection, model)
        assert caught.value.orig is not None
        assert caught.value.orig.sqlstate == "42501"  # type: ignore[attr-defined]
        await connection.rollback()
        await connection.execute(text("RESET ROLE"))
        await connection.commit()
    assert await owner_of(roles, table) == "pgts stranger"
    assert not await roles.scalar(text("SELECT count(*) FROM pg_trigger WHERE tgname ~ '^pgto'"))


async def test_a_member_of_the_owner_is_told_to_set_the_role(roles: AsyncConnection) -> None:
    """A member of the owning role is not the owner; with SET ROLE it is."""
    model, table = mapped()
    await make(roles, table)
    await roles.execute(text('SET ROLE "pgts owner"'))
    await migrate(roles, model)
    await roles.execute(text('SET ROLE "pgts member"'))
    with pytest.raises(ProgrammingError, match="SET ROLE"):
        await migrate(roles, model)
    await roles.execute(text('SET ROLE "pgts owner"'))
    await migrate(roles, model)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_function_that_appears_during_the_migration(
    roles: AsyncConnection, engine: AsyncEngine, level: str
) -> None:
    """A superuser's migration does not take over a function that its snapshot does not show."""
    model, table = mapped()
    await make(roles, table)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        await connection.execute(text("SELECT 1"))  # takes the snapshot
        await roles.execute(text('SET ROLE "pgts stranger"'))
        await plant(roles, table)
        await roles.execute(text("RESET ROLE"))
        with pytest.raises(ProgrammingError, match="pgts stranger"):
            await migrate(connection, model)
        await connection.rollback()
    assert await owner_of(roles, table) == "pgts stranger"


async def test_a_trigger_does_not_use_a_strangers_function(roles: AsyncConnection) -> None:
    """A function that took the place of ours between the two statements is refused as well."""
    model, table = mapped()
    await make(roles, table)
    await roles.execute(text('SET ROLE "pgts stranger"'))
    await plant(roles, table)
    await roles.execute(text("RESET ROLE"))
    _, trigger, *_ = row_change_trigger(model)
    with pytest.raises(ProgrammingError, match="pgts stranger"):
        await roles.execute(trigger)
    assert not await roles.scalar(text("SELECT count(*) FROM pg_trigger WHERE tgname ~ '^pgto'"))


async def test_migrations_at_the_same_time(engine: AsyncEngine) -> None:
    """Of several migrations at a time none fails, whether the function exists or not."""
    model, table = mapped()
    async with engine.begin() as connection:
        await connection.run_sync(table.create)

    async def run() -> None:
        async with engine.begin() as connection:
            await migrate(connection, model)

    for _ in range(3):
        await asyncio.gather(*(run() for _ in range(5)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_translated", [False, True])
async def test_any_name_is_a_name(empty_database: str, name: str, is_translated: bool) -> None:
    """A table, its schema and its key may have any name; the triggers announce the key."""
    schema = f"{name[:40]} "
    model, table = mapped(name, key=name, schema="given" if is_translated else schema)
    engine = create_async_engine(empty_database)
    if is_translated:
        engine = engine.execution_options(schema_translate_map={"given": schema})
    listener = await asyncpg.connect(plain_url(empty_database))
    heard: list[str] = []
    channel = channel_in(table, schema)
    await listener.add_listener(channel, lambda *arguments: heard.append(arguments[3]))
    try:
        async with engine.begin() as connection:
            preparer = connection.dialect.identifier_preparer
            await connection.exec_driver_sql(f"CREATE SCHEMA {preparer.quote_schema(schema)}")
            await connection.run_sync(table.create)
            await migrate(connection, model)
            await migrate(connection, model)
        async with engine.begin() as connection:
            await connection.execute(table.insert().values({name: 7}))
        await until(lambda: heard == ["[[7]]"])
    finally:
        await listener.close()
        await engine.dispose()
