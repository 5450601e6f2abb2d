"""Tags of orders over HTTP: rows of an association table, written without loading a collection."""

from fastapi import APIRouter, HTTPException
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from examples.shop.db import Session
from examples.shop.models import Order, Product, Tag, order_tags
from examples.shop.schemas import Id, Sku, TagsIn, TagsOut
from examples.shop.stock import find_product
from pgtoolset import get_transaction, lock_tables, m2m_add, m2m_set

router = APIRouter(tags=["tags"])


@router.post("/tags", status_code=201)
async def make_tags(body: TagsIn, session: Session) -> int:
    """New tags; how many there are now."""
    await session.execute(
        insert(Tag).on_conflict_do_nothing(), [{"name": name} for name in body.tags]
    )
    return await session.scalar(select(func.count()).select_from(Tag)) or 0


@router.put("/orders/{order_id}/tags")
async def replace_tags(order_id: Id, body: TagsIn, session: Session) -> TagsOut:
    """The order has exactly these tags from now on, or none. 409, and nothing is changed, for an
    unknown one."""
    order = await find_order(session, order_id)
    try:
        async with get_transaction(session):
            change = await m2m_set(session, order, Order.tags, pks=body.tags)
    except IntegrityError:
        raise HTTPException(409, "there is no such tag") from None
    return TagsOut(added=change.added, removed=change.removed)


@router.put("/products/{sku}/tags")
async def replace_product_tags(sku: Sku, body: TagsIn, session: Session) -> TagsOut:
    """The product has exactly these tags from now on, or none. Of two sets at the same time, one
    is the result."""
    product = await find_product(session, sku)
    try:
        async with get_transaction(session):
            change = await m2m_set(session, product, Product.tags, pks=body.tags)
    except IntegrityError:
        raise HTTPException(409, "there is no such tag") from None
    return TagsOut(added=change.added, removed=change.removed)


@router.post("/orders/{order_id}/tags")
async def add_tags(order_id: Id, body: TagsIn, session: Session) -> TagsOut:
    """Tag the order with each of these that exists, in a nested transaction of its own, so that the
    others stay."""
    order = await find_order(session, order_id)
    out = TagsOut()
    for name in body.tags:
        try:
            async with get_transaction(session):
                out.added += await m2m_add(
                    session, order, Order.tags, pks=[name], ignore_conflicts=True
                )
        except IntegrityError:
            out.unknown.append(name)
            # As after a rollback: no attribute of the order could be read here without a load. Its
            # key is known.
            session.expire(order)
    return out


@router.post("/orders/{order_id}/tags/reset", status_code=200)
async def reset_tags(order_id: Id, body: TagsIn, session: Session) -> TagsOut:
    """Clear the tags of an order and add others, while no other request writes any."""
    order = await find_order(session, order_id)
    async with lock_tables(session, [order_tags], mode="SHARE ROW EXCLUSIVE"):
        cleared = await m2m_set(session, order, Order.tags)
        return TagsOut(
            removed=cleared.removed, added=await m2m_add(session, order, Order.tags, pks=body.tags)
        )


async def find_order(session: AsyncSession, order_id: int) -> Order:
    """The order, without its tags, or 404."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order


@router.get("/orders/{order_id}/tags")
async def tags_of(order_id: Id, session: Session) -> list[str]:
    """The tags of an order."""
    names = (
        select(order_tags.c.tag).where(order_tags.c.order_id == order_id).order_by(order_tags.c.tag)
    )
    return list(await session.scalars(names))
