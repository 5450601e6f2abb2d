"""What the buttons of the page need beside the shop's own endpoints: a customer for each attempt,
what PostgreSQL holds of it afterwards, a hundred clients that wait, and a session in the way."""

import asyncio
import time
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, Field
from sqlalchemy import text

from examples.shop.client import Shop
from examples.shop.console import NotProved, eventually
from examples.shop.db import Session
from examples.shop.followers import Followers, affordable
from examples.shop.mail import Postman
from examples.shop.models import Customer, Voucher
from examples.shop.page import board
from examples.shop.page.counters import Counters
from examples.shop.page.holds import TillHolds
from examples.shop.page.observer import Observer
from examples.shop.schemas import Id, Incoming
from pgtoolset import LockTimeoutError

router = APIRouter(tags=["page"])

#: Seconds until each of the hundred must have received the change.
PATIENCE = 10.0
#: Seconds for which all of them wait, so that a visitor sees them in the counter.
VISIBLE = 0.8

EVIDENCE = text("""
    SELECT c.email,
        (SELECT count(*) FROM orders o WHERE o.customer_id = c.id) AS orders,
        (SELECT count(*) FROM parcels) AS parcels
    FROM customers c WHERE c.id = :id
""")


class CaseOut(BaseModel):
    """A customer and a voucher that are used for one attempt alone."""

    customer_id: int
    voucher: str


class EvidenceOut(BaseModel):
    """What is left of an attempt: rows that another connection sees, and mails that were sent."""

    orders: int
    mails: int
    parcels: int


class WaitersIn(Incoming):
    order_id: Id
    waiters: Annotated[int, Field(ge=1, le=100)] = 100


class WaitersOut(BaseModel):
    """How many clients received the change, by how many connections, and how long it took."""

    waiters: int
    received: int
    watching: int
    pool_in_use: int
    milliseconds: int


class HoldIn(Incoming):
    seconds: Annotated[float, Field(ge=0.5, le=10)] = 5.0


class HoldOut(BaseModel):
    """The session that holds the till."""

    pid: int
    seconds: float


@router.post("/cases", status_code=201)
async def open_case(session: Session) -> CaseOut:
    """A new customer and a new voucher, so that no other visitor changes what is counted."""
    name = uuid4().hex[:12]
    customer = Customer(name="Visitor", email=f"{name}@example.org")
    voucher = Voucher(code=f"V-{name.upper()}", percent=10)
    session.add_all([customer, voucher])
    await session.flush()
    return CaseOut(customer_id=customer.id, voucher=voucher.code)


@router.get("/cases/{customer_id}")
async def evidence(customer_id: Id, observer: Observer, mailer: Postman) -> EvidenceOut:
    """What is left of the attempt of a customer, seen over a connection beside the pool."""
    async with observer.connect() as connection:
        found = await board.rows(connection, EVIDENCE, {"id": customer_id})
    if not found:
        raise HTTPException(404, f"there is no customer {customer_id}")
    [row] = found
    mails = sum(mail.to == row["email"] for mail in mailer.sent)
    return EvidenceOut(orders=row["orders"], mails=mails, parcels=row["parcels"])


@router.post("/waiters")
async def wait_for_order(body: WaitersIn, request: Request, observer: Observer) -> WaitersOut:
    """Up to a hundred clients that follow an order over HTTP until it is paid; 409 where it is not
    placed, 429 while others do so."""
    state = request.app.state
    if state.waiters_at_work:
        raise HTTPException(429, "A hundred clients wait already; try again in a moment.")
    state.waiters_at_work = True
    try:
        host, port = request.scope["server"]
        async with Shop.at(f"http://{host}:{port}") as shop:
            return await waited(shop, body, request, observer)
    except NotProved as failure:
        raise HTTPException(503, str(failure)) from failure
    finally:
        state.waiters_at_work = False


async def waited(shop: Shop, body: WaitersIn, request: Request, observer: Observer) -> WaitersOut:
    """Let the clients wait, pay the order, and see who has received it."""
    order = await shop.http.get(f"/orders/{body.order_id}")
    if order.status_code != 200:
        raise HTTPException(404, f"there is no order {body.order_id}")
    if order.json()["status"] != "placed":
        raise HTTPException(409, f"order {body.order_id} is not new; place another one")
    count, state = affordable(body.waiters), request.app.state
    followers = Followers(shop.http.base_url, [body.order_id] * count)

    async def waiting() -> int:
        return followers.heard("placed")

    async def received() -> int:
        return followers.moved_from("placed")

    async with followers.following():
        await eventually("clients that wait", waiting, count, deadline=PATIENCE)
        async with observer.connect() as connection:
            watching = await board.watcher_connections(connection, state.settings.watcher_name)
        await asyncio.sleep(VISIBLE)
        await state.live.looked()
        counters: Counters = state.counters
        in_use = counters.as_json()["connections"]
        start = time.perf_counter()
        await shop.http.put(f"/orders/{body.order_id}/status", json={"status": "paid"})
        try:
            await eventually("clients that received it", received, count, deadline=PATIENCE)
        except NotProved:
            pass  # the number says it
        return WaitersOut(
            waiters=count,
            received=followers.moved_from("placed"),
            watching=watching,
            pool_in_use=in_use,
            milliseconds=round(1000 * (time.perf_counter() - start)),
        )


@router.post("/till/holds", status_code=201)
async def hold_till(body: HoldIn, request: Request) -> HoldOut:
    """Have another session hold the till for some seconds; 409 while one does."""
    holds: TillHolds = request.app.state.holds
    if holds.is_held:
        raise HTTPException(409, f"The till is held for {holds.remaining():.0f} s more.")
    try:
        pid = await holds.begin(body.seconds)
    except LockTimeoutError as error:
        raise HTTPException(503, str(error)) from error
    return HoldOut(pid=pid, seconds=body.seconds)
