"""Stock over HTTP: looking at it, filling it up, and taking from it under SERIALIZABLE."""

from fastapi import APIRouter, HTTPException
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.shop.db import Session, session_maker
from examples.shop.models import Delivery, DeliveryLine, Product
from examples.shop.schemas import (
    DeliveryIn,
    DeliveryOut,
    Line,
    ProductOut,
    ReservationIn,
    ReservationOut,
    Sku,
)
from pgtoolset import get_transaction, run_transaction

router = APIRouter(tags=["stock"])

#: Every failure is owed to another transaction's commit, so among N that compete none needs more
#: than N attempts.
RESERVATION_ATTEMPTS = 100


@router.get("/products")
async def products(session: Session) -> list[ProductOut]:
    """All products."""
    found = await session.scalars(select(Product).order_by(Product.sku))
    return [ProductOut.model_validate(product) for product in found]


@router.get("/products/{sku}")
async def product(sku: Sku, session: Session) -> ProductOut:
    """One product."""
    return ProductOut.model_validate(await find_product(session, sku))


@router.post("/products/{sku}/reservations", status_code=201)
async def reserve(sku: Sku, body: ReservationIn) -> ReservationOut:
    """Take from the shelf, in Python: look, think, write. 409 where there is not enough.

    Of two that look at the same time, one would overwrite the other's result. SERIALIZABLE makes
    PostgreSQL refuse the second, and `run_transaction` lets it look again.
    """
    attempts = 0

    async def take(session: AsyncSession) -> int:
        nonlocal attempts
        attempts += 1
        product = await find_product(session, sku)
        if product.stock < body.quantity:
            raise HTTPException(409, f"{sku} is out of stock")
        product.stock = product.stock - body.quantity
        return product.stock

    left = await run_transaction(
        session_maker, take, attempts=RESERVATION_ATTEMPTS, isolation_level="SERIALIZABLE"
    )
    return ReservationOut(sku=sku, stock=left, attempts=attempts)


@router.post("/deliveries", status_code=201)
async def deliver(body: DeliveryIn, session: Session) -> DeliveryOut:
    """A delivery. What does not fit on its shelf goes back, and only that."""
    delivery = Delivery(supplier=body.supplier)
    session.add(delivery)
    await session.flush()
    outcome = DeliveryOut(id=delivery.id, accepted=[], refused=[])
    for line in body.in_lock_order():
        await find_product(session, line.sku)
        try:
            async with get_transaction(session):
                await put_on_shelf(session, delivery.id, line)
        except IntegrityError:
            outcome.refused.append(line.sku)
        else:
            outcome.accepted.append(line.sku)
    return outcome


async def put_on_shelf(session: AsyncSession, delivery_id: int, line: Line) -> None:
    """Record a line of a delivery, then put it on the shelf; `IntegrityError` where the shelf is
    too small."""
    session.add(DeliveryLine(delivery_id=delivery_id, sku=line.sku, quantity=line.quantity))
    await session.flush()
    await session.execute(
        update(Product).where(Product.sku == line.sku).values(stock=Product.stock + line.quantity)
    )


async def find_product(session: AsyncSession, sku: str) -> Product:
    """The product with this SKU, or 404."""
    product = await session.get(Product, sku)
    if product is None:
        raise HTTPException(404, f"there is no product {sku}")
    return product
