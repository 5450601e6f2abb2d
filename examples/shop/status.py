"""The status of an order: changed by the shop, and followed by any number of clients over
server-sent events."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse

from examples.shop.db import Session
from examples.shop.models import Order
from examples.shop.page.counters import Counters
from examples.shop.schemas import Id, StatusIn, StatusOut
from pgtoolset import RowWatcher, WatcherClosedError
from pgtoolset.watch import RowChanges

router = APIRouter(tags=["status"])


@router.put("/orders/{order_id}/status")
async def set_status(order_id: Id, body: StatusIn, session: Session) -> StatusOut:
    """Move an order on. Whoever follows it hears of it once this is committed, and never if it is
    not."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    order.status = body.status
    return StatusOut(id=order_id, status=body.status)


async def followed(order_id: Id, request: Request) -> AsyncIterator[RowChanges[Order]]:
    """The changes of an order's status until the response has been sent, or the client has hung
    up."""
    watcher: RowWatcher = request.app.state.watcher
    counters: Counters = request.app.state.counters
    async with watcher.changes(Order, order_id, columns=[Order.status]) as changes:
        if changes.current is None:
            raise HTTPException(404, f"there is no order {order_id}")
        with counters.waiter():
            yield changes


@router.get("/orders/{order_id}/events")
async def events(changes: Annotated[RowChanges[Order], Depends(followed)]) -> StreamingResponse:
    """The status of an order now, and whenever it changes. A client that is slow gets the
    latest."""

    async def body() -> AsyncIterator[str]:
        if changes.current is not None:
            yield event(changes.current["status"])
        with suppress(WatcherClosedError):  # the application ends
            async for change in changes:
                if change.after is None:
                    return
                yield event(change.after["status"])

    return StreamingResponse(
        body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


def event(status: str) -> str:
    """A server-sent event. A status is one word, so it needs no escaping."""
    return f"data: {status}\n\n"
