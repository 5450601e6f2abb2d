"""What docs/migrating-from-fastapi-toolsets.md says about the version that is installed, observed.

`python -m tests.comparison.claims` prints it as JSON, for the version that is first on the path.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager, suppress
from importlib import import_module
from typing import Annotated, Any

import fastapi_toolsets
import fastapi_toolsets.db as peer
import httpx
from fastapi import Depends, FastAPI
from fastapi_toolsets.crud import CrudFactory
from fastapi_toolsets.exceptions import init_exceptions_handlers
from fastapi_toolsets.models import EventSession, ModelEvent, listens_for
from fastapi_toolsets.pytest import worker_database_url
from pydantic import BaseModel
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import selectinload

import pgtoolset
from pgtoolset.fastapi import install_error_handlers
from pgtoolset.testing import EmbeddedServer
from tests.comparison.models import Base, Item, Order, Part, Tag
from tests.comparison.stacks import plain

IS_3 = fastapi_toolsets.__version__.startswith("3.")
Facts = dict[str, Any]


class NewItem(BaseModel):
    id: int
    name: str


def dependency(engine: AsyncEngine, app: FastAPI) -> Any:
    """What stands in `Depends`, with the application prepared for it."""
    if IS_3:
        return peer.create_db_dependency(async_sessionmaker(engine, expire_on_commit=False))
    database = peer.Database(engine=engine)
    database.install(app)
    return database


def lock(session: AsyncSession, table: type[Base]) -> AbstractAsyncContextManager[Any]:
    """A table lock on the transaction of a session."""
    if IS_3:
        return peer.lock_tables(session, [table], timeout="100ms")
    return peer.lock_tables(None, [table], session=session, timeout="100ms")


async def error_of(work: Awaitable[Any]) -> str:
    """The name of the class of the error that some work raises."""
    try:
        await work
    except Exception as error:
        return type(error).__name__
    return "none"


async def locks(engine: AsyncEngine, url: str) -> Facts:
    async def locked(table: type[Base]) -> str:
        async with AsyncSession(engine) as session, session.begin():
            async with lock(session, table):
                pass
            return str(await session.scalar(text("SHOW lock_timeout")))

    facts = {"lock_timeout after a lock": await locked(Part)}
    facts["a table named order"] = await error_of(locked(Order))
    with plain(url) as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE part")
        facts["a lock that is not free"] = await error_of(locked(Part))
    if not IS_3:
        async with AsyncSession(engine) as session:
            with suppress(DBAPIError):
                async with peer.advisory_lock(session, 5):
                    await session.execute(text("SELECT 1/0"))
        with plain(url) as other:
            held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            facts["advisory locks left"] = other.execute(held).fetchone()[0]
    return facts


async def associations(engine: AsyncEngine) -> Facts:
    loaded = select(Item).options(selectinload(Item.tags))
    async with AsyncSession(engine) as session:
        item, tag = await session.get_one(Item, 1), await session.get_one(Tag, 1)
        twice = await error_of(peer.m2m_add(session, item, Item.tags, tag, tag))
    async with AsyncSession(engine, expire_on_commit=False) as session:
        item = (await session.scalars(loaded)).one()
        tag = await session.get_one(Tag, 1)
        returned = await peer.m2m_add(session, item, Item.tags, tag)
        seen = len((await session.scalars(loaded)).one().tags)
    return {"the same tag twice": twice, "m2m_add returns": returned, "a loaded collection": seen}


async def waits(engine: AsyncEngine) -> Facts:
    short = {"timeout": 0.1, "interval": 0.05}
    async with AsyncSession(engine) as session:
        missing = await error_of(peer.wait_for_row_change(session, Item, 99, **short))
        unchanged = await error_of(peer.wait_for_row_change(session, Item, 1, **short))
    async with AsyncSession(engine) as session:
        options = {"timeout": 0.6, "interval": 0.3}
        task = asyncio.create_task(peer.wait_for_row_change(session, Item, 1, **options))
        least = 1
        await asyncio.sleep(0.1)
        while not task.done():
            least = min(least, engine.pool.checkedout())
            await asyncio.sleep(0.01)
        await error_of(task)
    return {"no row": missing, "no change": unchanged, "connections of a wait": least}


async def requests(engine: AsyncEngine) -> Facts:
    """Requests to an application of theirs, with functions of ours on its session."""
    app = FastAPI()
    init_exceptions_handlers(app)
    theirs = dependency(engine, app)
    called: list[str] = []

    @app.post("/pending", status_code=201)
    async def pending(session: Annotated[Any, Depends(theirs)]) -> None:
        session.add(Item(id=1))

    @app.post("/flushed", status_code=201)
    async def flushed(session: Annotated[Any, Depends(theirs)]) -> None:
        session.add(Item(id=1))
        await session.flush()

    @app.post("/ours")
    async def ours(session: Annotated[Any, Depends(theirs)]) -> int:
        pgtoolset.on_commit(session, lambda: called.append("callback"))
        async with pgtoolset.get_transaction(session):
            item = await session.get_one(Item, 1)
            change = await pgtoolset.m2m_set(session, item, Item.tags, pks=[1, 2])
        async with pgtoolset.lock_tables(session, [Item], timeout="1s"):
            return change.added

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        return {
            "an exhausted pool": await exhausted(engine),
            "a commit that fails": (await client.post("/pending")).status_code,
            "a unique violation": (await client.post("/flushed")).status_code,
            "ours on their session": [(await client.post("/ours")).json(), *called],
        }


async def exhausted(engine: AsyncEngine) -> int:
    """The status of a request that finds no free connection."""
    small = create_async_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    app = FastAPI()
    init_exceptions_handlers(app)
    theirs = dependency(small, app)

    @app.post("/")
    async def read(session: Annotated[Any, Depends(theirs)]) -> None:
        await session.execute(text("SELECT 1"))

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        async with small.connect():
            status = (await client.post("/")).status_code
    await small.dispose()
    return status


async def side_by_side(engine: AsyncEngine, url: str) -> Facts:
    """CRUD of theirs on sessions of ours, and the handlers of both."""
    app = FastAPI()
    init_exceptions_handlers(app)
    install_error_handlers(app)
    get_db = pgtoolset.create_db_dependency(async_sessionmaker(engine, expire_on_commit=False))
    crud = CrudFactory(Item)

    @app.get("/items/{key}")
    async def read(key: int, session: Annotated[Any, Depends(get_db)]) -> int:
        return (await crud.get(session, [Item.id == key])).id

    @app.post("/items/{key}")
    async def create(
        key: int,
        session: Annotated[Any, Depends(get_db)],
        fail: bool = False,
    ) -> None:
        await crud.create(session, NewItem(id=key, name="new"))
        if fail:
            raise ValueError

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        reads = [(await client.get(f"/items/{key}")).status_code for key in (1, 99)]
        failed = (await client.post("/items/7?fail=1")).status_code
        with plain(url) as other:
            count = "SELECT count(*) FROM item WHERE id = 7"
            left = other.execute(count).fetchone()[0]
            created = (await client.post("/items/7")).status_code
            stored = other.execute(count).fetchone()[0]
        again = await client.post("/items/7")
    return {
        "crud reads": reads,
        "crud creates, and fails": [failed, left],
        "crud creates": [created, stored],
        "both handlers": [again.status_code, again.headers["content-type"]],
    }


async def events(engine: AsyncEngine) -> Facts:
    """Callbacks on rows, in units and transactions of ours."""
    seen: list[int] = []
    listens_for(Tag, [ModelEvent.CREATE])(lambda tag, *_: seen.append(tag.id))
    session_maker = async_sessionmaker(engine, expire_on_commit=False, class_=EventSession)
    unit = pgtoolset.create_db_context(session_maker)
    async with unit() as session:
        session.add(Tag(id=50))
    async with unit() as session:
        session.add(Tag(id=51))
        await session.commit()
    async with session_maker() as session, pgtoolset.get_transaction(session):
        session.add(Tag(id=52))
    return {"callbacks on rows": seen}


async def cleanup(engine: AsyncEngine, url: str) -> Facts:
    module = peer if IS_3 else import_module("fastapi_toolsets.db.testing")
    with plain(url) as other:
        other.execute("CREATE TABLE outside AS SELECT 1 AS id, 1 AS item_id")
        other.execute("ALTER TABLE outside ADD FOREIGN KEY (item_id) REFERENCES item")
        async with AsyncSession(engine) as session:
            await module.cleanup_tables(session, Base)
        return {"rows outside": other.execute("SELECT count(*) FROM outside").fetchone()[0]}


async def facts() -> Facts:
    with EmbeddedServer() as server:
        url = server.url()
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        with plain(url) as other:
            other.execute("INSERT INTO item VALUES (1, 'old')")
            other.execute("INSERT INTO tag VALUES (1), (2)")
        database = make_url(
            worker_database_url("postgresql+asyncpg://host/app", "test_db")
        ).database
        found = {"version": fastapi_toolsets.__version__, "worker database": database}
        for observed in (
            locks(engine, url),
            associations(engine),
            waits(engine),
            requests(engine),
            side_by_side(engine, url),
            events(engine),
            cleanup(engine, url),
        ):
            found |= await observed
        await engine.dispose()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(facts())))
