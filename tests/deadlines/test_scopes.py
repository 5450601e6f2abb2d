"""Which deadline counts, where, and for how long."""

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    DeadlineExceededError,
    create_db_context,
    create_db_dependency,
    deadline,
    run_transaction,
)
from pgtoolset._deadlines import current
from tests.deadlines.lengths import growing
from tests.support import insert

Maker = async_sessionmaker[AsyncSession]

SLEEP = text("SELECT pg_sleep(60)")


@pytest.fixture(autouse=True)
async def nothing_is_left() -> Any:
    """No test leaves a deadline behind."""
    assert current() is None
    yield
    assert current() is None


@pytest.mark.parametrize("timeout", [0.3, "300ms", timedelta(milliseconds=300)])
async def test_forms(session_maker: Maker, timeout: Any) -> None:
    """Any form of a timeout will do."""
    with pytest.raises(DeadlineExceededError) as caught, deadline(timeout):
        async with session_maker() as session, session.begin():
            await insert(session, 1)
            await session.execute(SLEEP)
    assert caught.value.seconds == 0.3


@pytest.mark.parametrize(("outer", "inner"), [(0.3, 60), (60, 0.3)])
async def test_nested(session_maker: Maker, outer: float, inner: float) -> None:
    """Of two deadlines the one that ends first counts."""
    with pytest.raises(DeadlineExceededError) as caught, deadline(outer), deadline(inner):
        async with create_db_context(session_maker)() as session:
            await session.execute(SLEEP)
    assert caught.value.seconds == 0.3


async def test_inner_one_is_over(session_maker: Maker) -> None:
    """After an inner deadline the outer one counts again."""
    with deadline(60):
        async with create_db_context(session_maker)() as session:
            with pytest.raises(DeadlineExceededError), deadline(0.02):
                await asyncio.sleep(0.05)
                await insert(session, 1)
            await insert(session, 1)


async def test_tasks(session_maker: Maker) -> None:
    """A task that is started inside has the deadline, until the block ends."""
    db_context = create_db_context(session_maker)

    async def statement(event: asyncio.Event) -> int | None:
        async with db_context() as session:
            await event.wait()
            return await session.scalar(text("SELECT 1"))

    is_over, has_ended = asyncio.Event(), asyncio.Event()
    with deadline(0.05):
        early = asyncio.create_task(statement(is_over))
        late = asyncio.create_task(statement(has_ended))
        await asyncio.sleep(0.1)
        is_over.set()
        with pytest.raises(DeadlineExceededError):
            await early
    has_ended.set()
    assert await late == 1


@growing
async def test_used_again(seconds: float, session_maker: Maker) -> None:
    """Each block of one object has the whole time, also where tasks share it."""
    limit = deadline(seconds)
    db_context = create_db_context(session_maker)

    async def work(number: int) -> None:
        with limit:
            async with db_context() as session:
                await asyncio.sleep(0.01 * number)
                assert await session.scalar(text("SELECT 1")) == 1
                assert current() is not None
        assert current() is None

    await asyncio.gather(*(work(number) for number in range(3)))
    await asyncio.sleep(seconds)
    await work(0)


@growing
async def test_context(seconds: float, session_maker: Maker) -> None:
    """deadline= of a context counts from the begin of each unit, for all that is inside."""
    db_context = create_db_context(session_maker, deadline=seconds)
    for _ in range(2):
        with pytest.raises(DeadlineExceededError) as caught:
            async with db_context() as session:
                await session.execute(SLEEP)
        assert caught.value.spent_on == "statement"

    async def work(inner: AsyncSession) -> None:
        await inner.execute(SLEEP)

    with pytest.raises(DeadlineExceededError):
        async with db_context():
            await run_transaction(session_maker, work)


@growing
async def test_dependency(seconds: float, session_maker: Maker) -> None:
    """deadline= of a dependency counts from the begin of the unit of each request."""
    app = FastAPI()
    get_db = create_db_dependency(session_maker, deadline=f"{seconds * 1000:.0f}ms")

    @app.get("/")
    async def endpoint(sleep: float, session: Annotated[AsyncSession, Depends(get_db)]) -> str:
        await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": sleep})
        return "done"

    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        for _ in range(2):
            with pytest.raises(DeadlineExceededError):
                await client.get("/", params={"sleep": 60})
            assert current() is None
        assert (await client.get("/", params={"sleep": 0})).json() == "done"


async def test_dependency_without_fastapi(session_maker: Maker) -> None:
    """It does so where the generator is used by hand."""
    get_db = create_db_dependency(session_maker, deadline="300ms")
    with pytest.raises(DeadlineExceededError):
        async with asynccontextmanager(get_db)() as session:
            await session.execute(SLEEP)


async def test_end_in_another_context(session_maker: Maker) -> None:
    """A unit that ends in another context than it began in leaves no deadline behind."""
    unit = create_db_context(session_maker, deadline=60)()
    await asyncio.create_task(unit.__aenter__())
    await unit.__aexit__(None, None, None)

    begun = create_db_context(session_maker, deadline=60)()
    await begun.__aenter__()
    assert current() is not None
    await asyncio.create_task(begun.__aexit__(None, None, None))
    assert current() is None


@growing
async def test_plain_connection(seconds: float, engine: AsyncEngine, session_maker: Maker) -> None:
    """A connection of SQLAlchemy's own, on an engine that the library has seen, is limited too."""
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
    with pytest.raises(DeadlineExceededError) as caught, deadline(seconds):
        async with engine.begin() as connection:
            await connection.execute(SLEEP)
    assert caught.value.spent_on == "statement"
