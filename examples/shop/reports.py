"""Slow answers, long answers, and a look at the connection pool."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from examples.shop.db import Session
from examples.shop.models import Order
from examples.shop.schemas import PoolOut, TurnoverOut

router = APIRouter(tags=["reports"])


@router.get("/reports/turnover")
async def turnover(
    session: Session, seconds: Annotated[float, Query(ge=0, le=10)] = 0.5
) -> TurnoverOut:
    """A report that takes its time: it sleeps in PostgreSQL, with a connection in its hands."""
    await session.execute(select(func.pg_sleep(seconds)))
    orders, total = (
        await session.execute(select(func.count(Order.id), func.sum(Order.total_cents)))
    ).one()
    return TurnoverOut(orders=orders, total_cents=total or 0)


@router.get("/reports/export")
async def export(
    session: Session, lines: Annotated[int, Query(ge=1, le=100_000_000)] = 1000
) -> StreamingResponse:
    """As many lines as you like, from a cursor, while the client reads. They stand in for a large
    table."""

    async def body() -> AsyncIterator[str]:
        numbers = await session.stream_scalars(select(func.generate_series(1, lines)))
        async for part in numbers.partitions(500):
            yield "".join(f"{number};a line of the export\n" for number in part)

    return StreamingResponse(body(), media_type="text/csv")


@router.get("/pool")
async def pool(request: Request) -> PoolOut:
    """The pool's size and how many of its connections are checked out. Asking takes none."""
    engine = request.app.state.engine
    assert isinstance(engine, AsyncEngine)
    assert isinstance(engine.pool, QueuePool)
    return PoolOut(size=engine.pool.size(), checked_out=engine.pool.checkedout())
