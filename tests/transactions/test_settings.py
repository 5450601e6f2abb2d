"""Each transaction of a unit has its settings from the first statement on; none outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    SettingMissingError,
    TransactionAbortedError,
    create_db_context,
    get_transaction,
    lock_tables,
    run_transaction,
)
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.proxy import Proxy
from tests.settings import (
    NOTHING,
    UNITS,
    Maker,
    Step,
    Unit,
    by_context,
    by_transaction,
    everything,
    left_behind,
    narrow,
    setting,
)
from tests.support import DRIVER, Item, Part, swallow_error, until

SETTINGS = {
    "app.tenant": "a",
    "statement_timeout": "20s",
    "lock_timeout": timedelta(seconds=5),
    "search_path": '"$user", public, pg_temp',
    "application_name": "unit",
}
SET = ("a", "20s", "5s", "none", '"$user", public, pg_temp', "unit")


@pytest.fixture
async def engine(database_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
    await other.execute("TRUNCATE item, part, account")


# The first statement, of each kind


async def by_text(session: AsyncSession) -> str:
    return await setting(session)


async def by_flush(session: AsyncSession) -> str:
    session.add(Item(id=1, name=func.current_setting("app.tenant", True)))
    await session.flush()
    return (await session.scalars(select(Item.name))).one()


async def by_many(session: AsyncSession) -> str:
    connection = await session.connection()
    statement = text("INSERT INTO item VALUES (:id, current_setting('app.tenant', true))")
    await connection.execute(statement, [{"id": 1}, {"id": 2}])
    return "".join(set((await session.scalars(select(Item.name))).all()))


async def by_values(session: AsyncSession) -> str:
    value = text("current_setting('app.tenant', true)")
    found = await session.scalars(insert(Item).values(id=1, name=value).returning(Item.name))
    return found.one()


async def by_stream(session: AsyncSession) -> str:
    found = await session.stream(text("SELECT current_setting('app.tenant', true)"))
    return "".join([str(row[0]) async for row in found])


async def by_driver_sql(session: AsyncSession) -> str:
    connection = await session.connection()
    statement = "SELECT current_setting('app.tenant', true)"
    found = await connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
    return str(found.scalar_one())


async def by_savepoint(session: AsyncSession) -> str:
    async with session.begin_nested():
        return await setting(session)


async def by_lock(session: AsyncSession) -> str:
    async with lock_tables(session, [Item]):
        return await setting(session)


FIRST: list[Step] = [
    by_text,
    by_flush,
    by_many,
    by_values,
    by_stream,
    by_driver_sql,
    by_savepoint,
    by_lock,
]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("unit", UNITS)
async def test_from_the_first_statement_on(engine: AsyncEngine, unit: Unit, first: Step) -> None:
    """The first statement has the settings, whatever its kind; the next user has none of them."""
    async with unit(async_sessionmaker(engine), settings=SETTINGS) as session:
        assert engine.pool.checkedout() == 0, "no connection before the first statement"  # type: ignore[attr-defined]
        assert await first(session) == "a"
        assert await everything(session) == SET
    assert await left_behind(engine) == NOTHING


@pytest.mark.parametrize("unit", UNITS)
async def test_after_each_end_inside(engine: AsyncEngine, unit: Unit) -> None:
    """A commit, a rollback, an error and a commit that fails are each followed by a transaction
    with the settings."""
    async with unit(async_sessionmaker(engine), settings=SETTINGS) as session:
        assert await everything(session) == SET
        if unit is not by_transaction:
            await session.commit()
            assert await everything(session) == SET
            await session.rollback()
            assert await everything(session) == SET
            await session.commit()
            await session.commit()
            await swallow_error(session)
            await session.rollback()
            assert await everything(session) == SET
            session.add(Part(id=1, item_id=404))  # its foreign key is checked at the commit
            with pytest.raises(IntegrityError):
                await session.commit()
            await session.rollback()
            assert await everything(session) == SET
    assert await left_behind(engine) == NOTHING


@pytest.mark.parametrize("unit", UNITS)
async def test_however_the_unit_ends(engine: AsyncEngine, unit: Unit) -> None:
    """An error, a swallowed error and a failed COMMIT leave nothing on the connection."""
    maker = async_sessionmaker(engine)
    with pytest.raises(KeyError):
        async with unit(maker, settings=SETTINGS) as session:
            assert await everything(session) == SET
            raise KeyError
    assert await left_behind(engine) == NOTHING
    with pytest.raises(TransactionAbortedError):
        async with unit(maker, settings=SETTINGS) as session:
            await swallow_error(session)
    assert await left_behind(engine) == NOTHING
    with pytest.raises(IntegrityError):
        async with unit(maker, settings=SETTINGS) as session:
            session.add(Part(id=1, item_id=404))
    assert await left_behind(engine) == NOTHING


async def test_session_of_a_block_that_has_ended(engine: AsyncEngine) -> None:
    """A session that goes on after its block has none of the block's settings, and one block has
    none of an earlier one's."""
    async with async_sessionmaker(engine)() as session:
        for value in ("a", "b"):
            async with get_transaction(session, settings={"app.tenant": value}):
                assert await setting(session) == value
            assert await setting(session) == ""
            await session.rollback()
        async with get_transaction(session):
            assert await setting(session) == ""


async def test_block_inside_a_unit(engine: AsyncEngine) -> None:
    """An outermost block in a unit has the unit's settings with its own, which win; the unit has
    its own again afterwards."""
    settings = {"app.tenant": "a", "lock_timeout": "1s"}
    async with by_context(async_sessionmaker(engine), settings=settings) as session:
        await session.commit()
        async with get_transaction(session, settings={"app.tenant": "b", "app.user": 7}):
            assert await setting(session) == "b"
            assert await setting(session, "lock_timeout") == "1s"
            assert await setting(session, "app.user") == "7"
        assert await setting(session) == "a"
        assert await setting(session, "app.user") == ""


async def test_each_attempt(engine: AsyncEngine) -> None:
    """Each attempt of run_transaction has the settings; the function that gives them is called
    once."""
    calls: list[int] = []
    seen: list[str] = []

    def settings() -> dict[str, Any]:
        calls.append(1)
        return {"app.tenant": "a"}

    async def work(session: AsyncSession) -> None:
        seen.append(await setting(session))
        if len(seen) < 3:
            await session.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
            )

    await run_transaction(async_sessionmaker(engine), work, settings=settings)
    assert (seen, calls) == (["a"] * 3, [1])
    assert await left_behind(engine) == NOTHING


async def test_function_for_each_unit(engine: AsyncEngine) -> None:
    """A function gives the settings of each unit, once; later transactions of it have the same."""
    tenants = iter("abc")
    db_context = create_db_context(
        async_sessionmaker(engine), settings=lambda: {"app.tenant": next(tenants)}
    )
    for tenant in "abc":
        async with db_context() as session:
            assert await setting(session) == tenant
            await session.commit()
            assert await setting(session) == tenant


async def messages_of(proxy: Proxy, maker: Maker, unit: Unit, **options: Any) -> int:
    """The messages that a unit with one statement sends, on a connection that is open."""
    before = 0
    for _ in range(8):  # the driver prepares the statement first, or at the fifth time
        before = proxy.counts["to server"]
        async with unit(maker, **options) as session:
            await session.execute(text("SELECT 1"))
    return proxy.counts["to server"] - before


@pytest.mark.parametrize("unit", UNITS)
async def test_messages(database_url: str, unit: Unit) -> None:
    """With asyncpg settings cost no message, with psycopg one."""
    async with Proxy.to(database_url) as proxy, narrow(proxy.url) as engine:
        maker = async_sessionmaker(engine)
        plain = await messages_of(proxy, maker, unit)
        assert plain >= 3
        given = await messages_of(proxy, maker, unit, settings=SETTINGS)
        assert given == plain + (DRIVER == "psycopg")


async def test_snapshot(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """Settings take no snapshot: a lock that follows them sees what was committed while it
    waited."""
    waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'item'::regclass"
    await other.execute("BEGIN; LOCK TABLE item; INSERT INTO item VALUES (1, 'late')")

    async def commit_later() -> None:
        await until(lambda: other.fetchval(waiting))
        await other.execute("COMMIT")

    async with by_transaction(
        async_sessionmaker(engine), isolation_level="SERIALIZABLE", settings=SETTINGS
    ) as session:
        task = asyncio.create_task(commit_later())
        async with lock_tables(session, [Item], mode="SHARE"):
            assert (await session.scalars(select(Item.name))).all() == ["late"]
        assert await setting(session, "transaction_isolation") == "serializable"
        await task


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"])
@pytest.mark.parametrize("bound", [False, True])
async def test_with_options(engine: AsyncEngine, level: Any, read_only: bool, bound: bool) -> None:
    """Options and settings of a transaction hold side by side, on a bound connection too."""
    async with engine.connect() as connection:
        session = AsyncSession(connection if bound else engine)
        if not bound:
            await connection.close()
        options: dict[str, Any] = {"isolation_level": level, "read_only": read_only}
        if read_only and level == "SERIALIZABLE":
            options["deferrable"] = True
        async with session, get_transaction(session, settings=SETTINGS, **options):
            assert await everything(session) == SET
            assert await setting(session, "transaction_isolation") == level.lower()
            found = await setting(session, "transaction_read_only")
            assert found == ("on" if read_only else "off")
            assert await setting(session, "transaction_deferrable") == (
                "on" if "deferrable" in options else "off"
            )
    assert await left_behind(engine) == NOTHING


async def test_several_engines(engine: AsyncEngine, database_url: str) -> None:
    """A unit on two engines has the settings on each connection."""
    async with narrow(database_url) as second:
        maker = async_sessionmaker(binds={Item: engine, Part: second})
        async with by_context(maker, settings=SETTINGS) as session:
            for _ in range(2):
                for model in (Item, Part):
                    found = await session.execute(
                        text("SELECT current_setting('app.tenant', true)"),
                        bind_arguments={"mapper": model},
                    )
                    assert found.scalar_one() == "a"
                await session.commit()
        assert await left_behind(second) == NOTHING
    assert await left_behind(engine) == NOTHING


async def test_connection_lost(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A connection lost in a unit is replaced after the rollback by one that has the settings."""
    async with by_context(async_sessionmaker(engine), settings=SETTINGS) as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await other.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1"))
        await session.rollback()
        assert await everything(session) == SET
        await session.commit()
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await session.commit()
        await other.fetchval("SELECT pg_terminate_backend($1, 10000)", pid)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1"))
        await session.rollback()
        assert await everything(session) == SET
    assert await left_behind(engine) == NOTHING


async def test_behind_pgbouncer(database_url: str) -> None:
    """The same over a pooler's backends: another client on the same one sees nothing of it, and
    neither does this one afterwards, of application_name too, which PgBouncer itself tracks."""
    async with (
        pgbouncer(database_url) as url,
        narrow(url, connect_args=WITHOUT_CACHES) as engine,
        narrow(url, connect_args=WITHOUT_CACHES) as neighbour,
    ):
        async with neighbour.connect() as connection:
            before = await everything(connection)
        for _ in range(5):
            async with by_context(async_sessionmaker(engine), settings=SETTINGS) as session:
                assert await everything(session) == SET
                await session.commit()
                assert await left_behind(neighbour) == before
                assert await everything(session) == SET
            assert await left_behind(neighbour) == before
            assert await left_behind(engine) == before


HOSTILE = [
    "it's",
    "back\\slash \\' \\\\",
    "'; DROP TABLE item; --",
    "$1 $$ %s %(a)s :name %%",
    "two\nlines\ttab",
    "\u00e9\u4e2d\U0001f600",
    "a" * 2**20,
    "/* not a comment",
    '"quoted"',
    " ",
    "E'\\x41'",
]


@pytest.mark.parametrize("conforming", ["on", "off"])
@pytest.mark.parametrize("unit", UNITS)
async def test_values(engine: AsyncEngine, unit: Unit, conforming: str) -> None:
    """A value arrives as it is, whatever it contains and however strings are read."""
    values = {f"app.value{number}": value for number, value in enumerate(HOSTILE)}
    settings = {"standard_conforming_strings": conforming, **values}
    maker = async_sessionmaker(engine)
    async with engine.connect() as connection:
        await connection.execute(text(f"SET standard_conforming_strings = {conforming}"))
        await connection.commit()
    async with unit(maker, settings=settings) as session:
        assert {name: await setting(session, name) for name in values} == values
        async with get_transaction(session, settings=dict.fromkeys(values, "x")):
            assert await setting(session, "app.value3") == "x"
        assert {name: await setting(session, name) for name in values} == values
    async with unit(maker) as session, get_transaction(session, settings=settings):
        assert {name: await setting(session, name) for name in values} == values
    await engine.dispose()


TYPED: dict[str, tuple[Any, str]] = {
    "app.integer": (7, "7"),
    "app.float": (0.5, "0.5"),
    "app.true": (True, "on"),
    "statement_timeout": (timedelta(milliseconds=1500), "1500ms"),
    "work_mem": (1024, "1MB"),
    "random_page_cost": (1.25, "1.25"),
    "enable_seqscan": (False, "off"),
    "vacuum_cost_delay": (timedelta(microseconds=500), "500us"),
    "DateStyle": ("SQL, DMY", "SQL, DMY"),
    "TimeZone": ("Asia/Tokyo", "Asia/Tokyo"),
    "App.Mixed_Case$": ("x", "x"),
    "app.user": ("u", "u"),
    "select.table.from": ("keywords", "keywords"),
}


@pytest.mark.parametrize("name", TYPED)
async def test_types_and_names(engine: AsyncEngine, name: str) -> None:
    """Each type is written as PostgreSQL reads it, and any name of a setting is found."""
    value, shown = TYPED[name]
    async with by_context(async_sessionmaker(engine), settings={name: value}) as session:
        assert await setting(session, name) == shown
        await session.rollback()
    maker = async_sessionmaker(engine)
    async with by_context(maker) as session, get_transaction(session, settings={name: value}):
        assert await setting(session, name) == shown


LISTS = {
    "a": ["a"],
    "A": ["a"],
    '"A"': ["A"],
    'a, "A" ,"b c"': ["a", "A", "b c"],
    '"quo""te",a': ['quo"te', "a"],
    "\u00c9": ["\u00c9"],
    '  a\t,\n"A"': ["a", "A"],
    "$user": [],
    '"$user", a': ["a"],
    "": [],
    " ": [],
    '"a, b"': ["a, b"],
    "no such schema".replace(" ", "_"): [],
}


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("is_nested", [False, True])
async def test_lists_of_names(empty_database: str, path: str, is_nested: bool) -> None:
    """A search_path of several names is a list, with names as PostgreSQL folds and quotes them."""
    names = sorted({name for found in LISTS.values() for name in found})
    async with narrow(empty_database) as engine:
        async with engine.begin() as connection:
            for name in names:
                quoted = name.replace('"', '""')
                await connection.execute(text(f'CREATE SCHEMA "{quoted}"'))
        maker = async_sessionmaker(engine)
        given = {"settings": {"search_path": path}}
        async with by_context(maker, **({} if is_nested else given)) as session:
            async with get_transaction(session, **(given if is_nested else {})):  # type: ignore[arg-type]
                found = await session.scalar(text("SELECT current_schemas(false)"))
                assert found == LISTS[path]
        assert (await left_behind(engine))[4] == NOTHING[4]


async def test_a_schema_for_each_tenant(empty_database: str) -> None:
    """A search_path for each tenant leads one statement to the table of each, over one connection
    that has prepared it."""
    async with narrow(empty_database) as engine:
        async with engine.begin() as connection:
            for name in ("a", "b"):
                await connection.execute(text(f"CREATE SCHEMA {name}"))
                await connection.execute(text(f"CREATE TABLE {name}.place AS SELECT '{name}' AS x"))
        for name in "ab" * 8:
            settings = {"search_path": name}
            async with by_context(async_sessionmaker(engine), settings=settings) as session:
                assert await session.scalar(text("SELECT x FROM place")) == name


async def test_role(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A role holds for the transaction, with its rights and no others."""
    await other.execute('CREATE ROLE "limited one"; GRANT SELECT ON item TO "limited one"')
    try:
        settings = {"role": "limited one"}
        with pytest.raises(DBAPIError, match="permission denied"):
            async with by_context(async_sessionmaker(engine), settings=settings) as session:
                assert await session.scalar(text("SELECT current_user")) == "limited one"
                session.add(Item(id=1))
        async with by_context(async_sessionmaker(engine)) as session:
            session.add(Item(id=1))
            async with get_transaction(session, settings=settings):
                assert await session.scalar(text("SELECT current_user")) == "limited one"
            session.add(Item(id=2))
        assert await left_behind(engine) == NOTHING
    finally:
        await other.execute('DROP OWNED BY "limited one"; DROP ROLE "limited one"')


async def test_names_that_differ_by_case(engine: AsyncEngine) -> None:
    """A block's setting replaces the unit's by any spelling of its name."""
    settings = {"APP.Tenant": "a"}
    async with by_context(async_sessionmaker(engine), settings=settings) as session:
        await session.commit()
        async with get_transaction(session, settings={"app.TENANT": "b"}):
            assert await setting(session) == "b"
        assert await setting(session) == "a"


@pytest.mark.parametrize(
    "settings", [None, {}, {"app.user": "7"}, {"app.tenant": ""}, {"app.tenant": " "}, dict]
)
async def test_required(engine: AsyncEngine, settings: Any) -> None:
    """Without a required setting no unit begins: nothing is sent, and the error names it."""
    sent: list[Any] = []
    event.listen(engine.sync_engine, "checkout", lambda *arguments: sent.append(arguments))
    for unit in UNITS[:2]:
        with pytest.raises(SettingMissingError, match=r"app\.tenant") as caught:
            async with unit(
                async_sessionmaker(engine), settings=settings, require=("App.Tenant",)
            ) as session:
                await session.execute(text("SELECT 1"))
        assert caught.value.names == ("app.tenant",)
        assert isinstance(caught.value, LookupError)
    assert sent == []


@pytest.mark.parametrize("given", [{"app.tenant": "a"}, lambda: {"APP.TENANT": 7}])
async def test_required_and_given(engine: AsyncEngine, given: Any) -> None:
    """A unit with its required settings begins."""
    for unit in UNITS[:2]:
        async with unit(
            async_sessionmaker(engine), settings=given, require=["app.tenant"]
        ) as session:
            assert await setting(session) in ("a", "7")
