"""The FastAPI application of one contestant, served by uvicorn: `python -m benchmarks._app
CONTESTANT URL FD SIZE`.

Every contestant answers the same requests with the same statements; only where the session comes
from differs. The server listens on the inherited socket FD, has a pool that never lacks one of SIZE
connections, and ends with its standard input, so that it never outlives its starter.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import Column, Identity, Integer, MetaData, Table, Text, event, insert, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import create_db_dependency

Work: TypeAlias = Callable[[AsyncSession], Awaitable[dict[str, int]]]


def table_of(contestant: str) -> Table:
    """Each contestant writes into a table of its own, which autovacuum leaves in peace."""
    return Table(
        f"pgtoolset_benchmark_{contestant.replace(' ', '_')}",
        MetaData(),
        Column("id", Integer, Identity(), primary_key=True),
        Column("note", Text),
    )


def work_on(table: Table) -> dict[str, Work]:
    """What the endpoints do with their session, by path."""
    insertion = insert(table).values(note="measured").returning(table.c.id)
    newest = select(table.c.id).order_by(table.c.id.desc()).limit(1)

    async def insert_one(session: AsyncSession) -> dict[str, int]:
        return {"id": (await session.execute(insertion)).scalar_one()}

    async def select_and_insert(session: AsyncSession) -> dict[str, int]:
        before = (await session.execute(newest)).scalar_one_or_none()
        return {"before": before or 0, "id": (await session.execute(insertion)).scalar_one()}

    async def nothing(session: AsyncSession) -> dict[str, int]:
        return {"id": 0}

    return {"/insert": insert_one, "/select-insert": select_and_insert, "/idle": nothing}


def by_hand(app: FastAPI, engine: AsyncEngine, work: dict[str, Work]) -> None:
    """No dependency: each endpoint opens its session in its body, and commits before it returns."""
    session_maker = async_sessionmaker(engine, expire_on_commit=False)

    def add(path: str, do: Work) -> None:
        @app.post(path)
        async def endpoint() -> dict[str, int]:
            async with session_maker.begin() as session:
                answer = await do(session)
            return answer

    for path, do in work.items():
        add(path, do)


def with_dependency(app: FastAPI, dependency: Any, work: dict[str, Work]) -> None:
    def add(path: str, do: Work) -> None:
        @app.post(path)
        async def endpoint(session: AsyncSession = dependency) -> dict[str, int]:
            return await do(session)

    for path, do in work.items():
        add(path, do)


def bare_dependency(app: FastAPI, engine: AsyncEngine, work: dict[str, Work]) -> None:
    """The least that a dependency can be: what is left of its loss to `by_hand` is FastAPI's
    own."""
    session_maker = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with session_maker.begin() as session:
            yield session

    with_dependency(app, Depends(get_db, scope="function"), work)


def pgtoolset(app: FastAPI, engine: AsyncEngine, work: dict[str, Work]) -> None:
    get_db = create_db_dependency(session_maker=async_sessionmaker(engine, expire_on_commit=False))
    with_dependency(app, Depends(get_db), work)


def fastapi_toolsets(app: FastAPI, engine: AsyncEngine, work: dict[str, Work]) -> None:
    """As the library's own documentation tells: until version 3 a generator function, from 4 on a
    `Database`."""
    db = importlib.import_module("fastapi_toolsets.db")
    if hasattr(db, "Database"):
        database = db.Database(engine=engine)
        database.install(app)
        with_dependency(app, Depends(database), work)
    else:
        get_db = db.create_db_dependency(async_sessionmaker(engine, expire_on_commit=False))
        with_dependency(app, Depends(get_db), work)


def advanced_alchemy(app: FastAPI, engine: AsyncEngine, work: dict[str, Work]) -> None:
    """As the library's own documentation tells, with a commit after each request that succeeds."""
    extension = importlib.import_module("advanced_alchemy.extensions.fastapi")
    settings = extension.AsyncSessionConfig(expire_on_commit=False)
    config = extension.SQLAlchemyAsyncConfig(
        engine_instance=engine, session_config=settings, commit_mode="autocommit"
    )
    alchemy = extension.AdvancedAlchemy(config=config, app=app)
    with_dependency(app, Depends(alchemy.provide_session()), work)


CONTESTANTS: dict[str, Callable[[FastAPI, AsyncEngine, dict[str, Work]], None]] = {
    "by_hand": by_hand,
    "pgtoolset": pgtoolset,
    "bare_dependency": bare_dependency,
    "toolsets": fastapi_toolsets,
    "alchemy": advanced_alchemy,
}


def make_app(contestant: str, url: str, pool_size: int) -> FastAPI:
    engine = create_async_engine(url, pool_size=pool_size)
    checkouts = 0

    @event.listens_for(engine.sync_engine, "checkout")
    def count(*arguments: object) -> None:
        nonlocal checkouts
        checkouts += 1

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    kind = next(name for name in CONTESTANTS if contestant.startswith(name))
    CONTESTANTS[kind](app, engine, work_on(table_of(contestant)))

    @app.post("/usage")
    async def usage() -> dict[str, int]:
        return {"cpu": time.process_time_ns(), "checkouts": checkouts}

    return app


async def serve(app: FastAPI, listening: socket.socket) -> None:
    # A connection idles while the other contestants have their turns.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=3600)
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True
        asyncio.get_running_loop().remove_reader(sys.stdin)

    asyncio.get_running_loop().add_reader(sys.stdin, stop)
    await server.serve(sockets=[listening])


def main(contestant: str, url: str, descriptor: str, pool_size: str) -> None:
    config = uvicorn.Config("")
    app = make_app(contestant, url, int(pool_size))
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve(app, socket.socket(fileno=int(descriptor))))


if __name__ == "__main__":
    main(*sys.argv[1:])
