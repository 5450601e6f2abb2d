"""Orders over HTTP: several rows of several tables, all of them or none."""

from functools import partial

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import JSONResponse
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from examples.shop.db import Session
from examples.shop.mail import Mailer, Postman
from examples.shop.models import Customer, Order, OrderLine, Product, Redemption, Voucher
from examples.shop.schemas import Id, Line, OrderIn, OrderOut
from pgtoolset import get_transaction, on_commit

router = APIRouter(tags=["orders"])


@router.post("/orders", status_code=201)
async def place_order(
    body: OrderIn, session: Session, mailer: Postman, response: Response
) -> OrderOut:
    """A new order, mailed to the customer; 409 where something is out of stock. A used voucher does
    not stop it."""
    order = await take_order(session, mailer, body)
    notes = []
    if body.voucher is not None:
        try:
            async with get_transaction(session):
                await redeem_voucher(session, order, body.voucher)
        except IntegrityError:
            notes.append(
                f"voucher {body.voucher} has been used before; the order stands without it"
            )
    response.headers["Location"] = f"/orders/{order.id}"
    return to_order_out(order, notes)


@router.post("/mistakes/orders")
async def place_order_carelessly(body: OrderIn, session: Session, mailer: Postman) -> Response:
    """The same order with a mistake: no savepoint around the step that may fail, so a used voucher
    loses it all.

    PostgreSQL has aborted the transaction when the error is caught, and would answer the COMMIT
    with a ROLLBACK that goes unnoticed. The "placed" below never reaches the client: `get_db` finds
    out first.
    """
    order = await take_order(session, mailer, body)
    if body.voucher is not None:
        try:
            await redeem_voucher(session, order, body.voucher)
        except IntegrityError:
            pass
    return JSONResponse({"id": order.id, "status": "placed"}, status_code=200)


@router.get("/orders/{order_id}")
async def order(order_id: Id, session: Session) -> OrderOut:
    """One order."""
    found = await session.scalar(
        select(Order).where(Order.id == order_id).options(selectinload(Order.lines))
    )
    if found is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return to_order_out(found)


async def take_order(session: AsyncSession, mailer: Mailer, body: OrderIn) -> Order:
    """Store an order, take its goods from the shelves and have it confirmed by mail once it is
    committed."""
    customer = await session.get(Customer, body.customer_id)
    if customer is None:
        raise HTTPException(404, f"there is no customer {body.customer_id}")
    order = Order(customer_id=customer.id, total_cents=0, lines=[])
    session.add(order)
    await session.flush()
    # The goods may still turn out to be out of stock: the order is rolled back then, and this
    # forgotten with it.
    on_commit(session, partial(mailer.send, customer.email, f"Thank you for order {order.id}"))
    for line in body.in_lock_order():
        product = await take_from_stock(session, line)
        order.lines.append(
            OrderLine(sku=line.sku, quantity=line.quantity, price_cents=product.price_cents)
        )
        order.total_cents += line.quantity * product.price_cents
    await session.flush()
    return order


async def take_from_stock(session: AsyncSession, line: Line) -> Product:
    """Decrement the stock in one statement, which needs no retry: the row is locked, then looked
    at."""
    product: Product | None = await session.scalar(
        update(Product)
        .where(Product.sku == line.sku, Product.stock >= line.quantity)
        .values(stock=Product.stock - line.quantity)
        .returning(Product)
    )
    if product is not None:
        return product
    if await session.get(Product, line.sku) is None:
        raise HTTPException(404, f"there is no product {line.sku}")
    raise HTTPException(409, f"{line.sku} is out of stock")


async def redeem_voucher(session: AsyncSession, order: Order, code: str) -> None:
    """Use a voucher for an order; `IntegrityError` where it was used before, 404 where there is
    none."""
    voucher = await session.get(Voucher, code)
    if voucher is None:
        raise HTTPException(404, f"there is no voucher {code}")
    await session.execute(insert(Redemption).values(voucher_code=code, order_id=order.id))
    order.total_cents -= order.total_cents * voucher.percent // 100


def to_order_out(order: Order, notes: list[str] | None = None) -> OrderOut:
    """An order as the client sees it."""
    return OrderOut(
        id=order.id,
        customer_id=order.customer_id,
        placed_at=order.placed_at,
        total_cents=order.total_cents,
        status=order.status,
        lines=[Line(sku=line.sku, quantity=line.quantity) for line in order.lines],
        notes=notes or [],
    )
