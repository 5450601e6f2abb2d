"""Mistakes and accidents on purpose: the client must learn of them, and the database must not."""

from fastapi import APIRouter
from sqlalchemy import func, select

from examples.shop.db import Session
from examples.shop.mail import Postman
from examples.shop.models import Order, Parcel
from examples.shop.orders import take_order
from examples.shop.page.observer import Observer
from examples.shop.schemas import OrderIn

router = APIRouter(prefix="/mistakes", tags=["mistakes"])

#: PostgreSQL's largest integer: the shop never has so many orders.
NO_ORDER = 2**31 - 1


@router.post("/parcels", status_code=201)
async def send_to_nobody(body: OrderIn, session: Session, mailer: Postman) -> int:
    """An order, and a parcel for another one that does not exist. The constraint is deferred: each
    statement succeeds, this returns 201, and the COMMIT fails."""
    order = await take_order(session, mailer, body)
    session.add(Parcel(order_id=NO_ORDER))
    await session.flush()
    return order.id


@router.post("/lost-connections", status_code=201)
async def lose_connection(
    body: OrderIn, session: Session, mailer: Postman, observer: Observer
) -> int:
    """An order whose connection PostgreSQL ends in the middle of the transaction."""
    order = await take_order(session, mailer, body)
    pid = await session.scalar(select(func.pg_backend_pid()))
    async with observer.connect() as connection:
        await connection.execute(select(func.pg_terminate_backend(pid, 5000)))
    return await session.scalar(select(func.count()).select_from(Order)) or order.id
