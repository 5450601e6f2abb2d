"""release_connection where sessions are used: requests, streams, tests, replicas, several engines,
and connections that are lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    ReadReplicas,
    TransactionLostError,
    TransactionStateError,
    create_db_context,
    create_db_dependency,
    deadline,
    get_transaction,
    on_commit,
    release_connection,
    run_transaction,
)
from tests.proxy import Cut, Proxy
from tests.support import DRIVER, Account, Item, insert, stored

Maker = async_sessionmaker[AsyncSession]


def held(engine: AsyncEngine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


async def read(session: AsyncSession) -> None:
    await session.execute(text("SELECT count(*) FROM item"))


async def test_request(engine: AsyncEngine, session_maker: Maker, other: Any) -> None:
    """In an endpoint, and in the stream of its response, the connection is in the pool; what is
    written afterwards is stored."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker)
    needs_db = Depends(get_db)
    seen: list[int] = []

    @app.get("/")
    async def endpoint(session: AsyncSession = needs_db) -> StreamingResponse:
        await read(session)
        async with release_connection(session):
            seen.append(held(engine))
        await insert(session, 1)

        async def stream() -> AsyncIterator[str]:
            await read(session)
            async with release_connection(session):
                seen.append(held(engine))
                yield "first"
            await insert(session, 2)
            yield "second"

        return StreamingResponse(stream())

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).text == "firstsecond"
    assert seen == [0, 0]
    assert await stored(other) == {1, 2}


async def test_session_of_a_test(pg_session: AsyncSession) -> None:
    """In a session of `pg_session` the block runs, what the test has set up is no obstacle, and
    what the code under test has written is."""
    pg_session.add(Item(id=1))
    await pg_session.commit()
    await read(pg_session)
    async with release_connection(pg_session):
        assert await pg_session.get(Item, 1) is not None
    log: list[int] = []
    await insert(pg_session, 2)
    on_commit(pg_session, lambda: log.append(2))
    with pytest.raises(TransactionStateError, match="callbacks"):
        async with release_connection(pg_session):
            raise AssertionError("the block has begun")
    async with release_connection(pg_session, commit=True):
        assert log == [2]
    await insert(pg_session, 3)
    with pytest.raises(TransactionStateError, match="written"):
        async with release_connection(pg_session):
            raise AssertionError("the block has begun")


async def test_read_block(session_maker: Maker) -> None:
    """A read block of ReadReplicas is one transaction on one node, and is refused."""
    replicas = ReadReplicas(session_maker, [session_maker])
    async with replicas.read() as session:
        await read(session)
        with pytest.raises(TransactionStateError, match="read block"):
            async with release_connection(session):
                raise AssertionError("the block has begun")
        await read(session)


async def test_several_engines(engine: AsyncEngine, database_url: str) -> None:
    """Each connection of the session is given back, and each next transaction has its own modes."""
    second = create_async_engine(database_url)
    maker = async_sessionmaker(binds={Item: engine, Account: second})
    isolation = text("SELECT current_setting('transaction_isolation')")
    async with create_db_context(maker)() as session:
        await session.connection(
            bind_arguments={"mapper": Account},
            execution_options={"isolation_level": "SERIALIZABLE"},
        )
        for model in (Item, Account):
            await session.get(model, 1)
        async with release_connection(session):
            assert held(engine) == held(second) == 0
        levels = [
            await session.scalar(isolation, bind_arguments={"mapper": model})
            for model in (Account, Item)
        ]
        assert levels == ["serializable", "read committed"]
    await second.dispose()


async def test_deadline(session_maker: Maker) -> None:
    """A deadline around the block bounds the next transaction too, and the options of the last one
    are set before it."""
    async with session_maker() as session:
        with deadline(60):
            async with get_transaction(session, isolation_level="REPEATABLE READ"):
                await read(session)
                async with release_connection(session):
                    pass
                terms = (
                    "current_setting('transaction_isolation'), current_setting('statement_timeout')"
                )
                level, limit = (await session.execute(text(f"SELECT {terms}"))).one()
                assert level == "repeatable read"
                assert limit != "0"


@pytest.mark.usefixtures("engine")  # which empties the tables
@pytest.mark.parametrize("resolve_commit", [None, 5])
async def test_connection_that_is_lost(database_url: str, other: Any, resolve_commit: Any) -> None:
    """A connection that is lost at the COMMIT has lost nothing: TransactionLostError, and
    run_transaction tries again."""
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(
            proxy.url, connect_args={"command_timeout": 60} if DRIVER == "asyncpg" else {}
        )
        maker = async_sessionmaker(engine)
        errors: list[BaseException] = []
        begun: list[int] = []

        async def work(session: AsyncSession) -> None:
            await read(session)
            if not errors:
                proxy.cut = Cut("to server", lambda chunk: b"COMMIT" in chunk, "whole")
            try:
                async with release_connection(session):
                    begun.append(1)
            except BaseException as error:
                errors.append(error)
                raise
            await insert(session, 1)

        await run_transaction(maker, work, resolve_commit=resolve_commit)
        assert [type(error) for error in errors] == [TransactionLostError]
        assert begun == [1]
        assert await stored(other) == {1}
        await engine.dispose()
