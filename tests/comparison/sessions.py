"""Promises about sessions and requests: one unit, committed before the response, honest."""

import asyncio
import re
from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.comparison.promises import promise
from tests.comparison.stacks import (
    ASYNC,
    Refused,
    Stack,
    plain,
    until,
)

INSERT = "INSERT INTO item (id) VALUES (1)"


def stored(stack: Stack) -> int:
    """The number of items that a connection of another client sees."""
    with plain(stack.url) as connection:
        return connection.execute("SELECT count(*) FROM item").fetchone()[0]


async def post(stack: Stack, body: Any, **options: Any) -> int:
    """The status of a request to an application of the stack."""
    async with stack.client(stack.application(body, **options)) as client:
        return (await client.post("/do")).status_code


@promise()
async def one_unit(stack: Stack) -> bool:
    """An endpoint that raises stores nothing."""

    async def body(run: Any) -> None:
        await run(INSERT)
        raise Refused

    return await post(stack, body) >= 500 and stored(stack) == 0


@promise()
async def commits(stack: Stack) -> bool:
    """An endpoint that returns has stored its work, without a commit in the endpoint."""

    async def body(run: Any) -> None:
        await run(INSERT)

    async def no_commit(session: Any) -> None:
        pass

    if stack.is_sync:
        stack.finish = no_commit  # type: ignore[method-assign]
    return await post(stack, body) == 201 and stored(stack) == 1


@promise()
async def before_the_response(stack: Stack) -> bool:
    """A commit that fails gives the client an error, never a 2xx."""

    async def body(run: Any) -> None:
        await run("INSERT INTO part (item_id) VALUES (7)")  # its foreign key is checked at COMMIT

    return await post(stack, body) >= 400


@promise()
async def honest(stack: Stack) -> bool:
    """A database error that the endpoint swallows is not reported as success."""

    async def body(run: Any) -> None:
        await run(INSERT)
        try:
            await run("SELECT 1/0")
        except DBAPIError:
            pass

    return not (await post(stack, body) < 300 and stored(stack) == 0)


@promise()
async def swallowed_by_a_dependency(stack: Stack) -> bool:
    """An error of the endpoint that another dependency swallows rolls back too."""

    async def body(run: Any) -> None:
        await run(INSERT)
        raise Refused

    app = stack.application(body)
    dependency = stack.dependency

    async def swallow(session: Annotated[Any, Depends(dependency)]) -> Any:
        try:
            yield
        except Refused:
            pass

    @app.post("/swallowed", status_code=201)
    async def swallowed(
        session: Annotated[Any, Depends(dependency)],
        _: Annotated[Any, Depends(swallow)],
    ) -> None:
        await stack.run(session, INSERT)
        raise Refused

    async with stack.client(app) as client:
        response = await client.post("/swallowed")
    return response.status_code >= 500 and stored(stack) == 0


@promise()
async def lazy(stack: Stack) -> bool:
    """A request that runs no SQL takes no connection."""
    seen: list[int] = []

    async def body(run: Any) -> None:
        seen.append(stack.checked_out())

    return await post(stack, body) == 201 and seen == [0]


@promise()
async def streams(stack: Stack) -> bool:
    """What a streaming response writes is stored."""

    async def body(run: Any) -> None:
        await run("SELECT 1")

    async def stream(run: Any) -> None:
        await run(INSERT)

    return await post(stack, body, stream=stream) == 201 and stored(stack) == 1


@promise()
async def released(stack: Stack) -> bool:
    """Every connection is back in the pool after the response."""

    async def body(run: Any) -> None:
        await run(INSERT)

    async def failing(run: Any) -> None:
        await run("SELECT 1")
        raise Refused

    await post(stack, body)
    await post(stack, failing)
    return stack.checked_out() == 0


@promise()
async def http_answers(stack: Stack) -> bool:
    """A unique violation can be answered with a 409 by one call at start-up."""

    async def body(run: Any) -> None:
        await run(INSERT)
        await run(INSERT)

    return await post(stack, body) == 409


@promise(*ASYNC, lacking=r"\w*cancel\w*commit\w*")
async def cancelled_commit(stack: Stack) -> bool:
    """A cancellation during COMMIT does not hide that the work is stored."""
    # The commit of this row waits for an advisory lock, and survives the cancellation of its wait.
    with plain(stack.url) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")

        async def work() -> None:
            async with stack.unit() as session:
                await stack.run(session, "INSERT INTO slow (id) VALUES (1)")

        task = asyncio.create_task(work())
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        await until(lambda: gate.execute(waiting).fetchone() == (1,))
        task.cancel()
        await asyncio.sleep(0.1)
        gate.execute("SELECT pg_advisory_unlock(1)")
        try:
            await task
        except asyncio.CancelledError:
            reported = False
        else:
            reported = True
        await until(lambda: gate.execute("SELECT count(*) FROM slow").fetchone() == (1,))
    return reported


@promise()
async def holders(stack: Stack) -> bool:
    """The error of an exhausted pool names who holds the connections."""
    small = type(stack)(stack.url, pool_size=1, max_overflow=0, pool_timeout=0.2)

    async def message() -> str:
        async with small.unit() as session:
            await small.run(session, "SELECT 1")
            try:
                async with small.unit() as second:
                    await small.run(second, "SELECT 1")
            except Exception as error:
                return str(error)
        raise AssertionError("the pool had a second connection")

    try:
        return re.search(r"\w+\.py", await message()) is not None
    finally:
        await small.close()


@promise()
async def other_databases(stack: Stack) -> bool:
    """Sessions on other databases, such as SQLite."""
    try:
        other = type(stack)("sqlite+aiosqlite://")
        async with other.unit() as session:
            await other.run(session, "SELECT 1")
        await other.close()
    except Exception:
        return False
    return True


@promise()
async def other_driver(stack: Stack) -> bool:
    """Sessions over psycopg 3 as well as asyncpg."""
    url = stack.url.replace("+asyncpg", "+psycopg")
    if stack.is_sync:
        return await other_driver_of_sync(stack)
    other = type(stack)(url)
    try:
        async with other.unit() as session:
            await other.run(session, text("SELECT 1"))
        return True
    finally:
        await other.close()


async def other_driver_of_sync(stack: Stack) -> bool:
    """SQLModel has an AsyncSession too, which its tutorial does not show."""
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlmodel.ext.asyncio.session import AsyncSession

    engine = create_async_engine(stack.url)
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
    await engine.dispose()
    return True
