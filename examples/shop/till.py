"""The till over HTTP: sales all day, and a closing that must not miss one."""

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import func, insert, select, update

from examples.shop.db import Session
from examples.shop.models import TillClosing, TillSale
from pgtoolset import LockTimeoutError, lock_tables

router = APIRouter(prefix="/till", tags=["till"])


class SaleIn(BaseModel):
    """What a customer pays at the till."""

    cents: int = Field(gt=0, le=10_000_000)


class ClosingOut(BaseModel):
    """What was in the till."""

    id: int
    sales: int
    cents: int


@router.post("/sales", status_code=201)
async def sell(body: SaleIn, session: Session) -> int:
    """A sale; its number."""
    return int(
        await session.scalar(insert(TillSale).values(cents=body.cents).returning(TillSale.id)) or 0
    )


@router.post("/closings", status_code=201)
async def close_till(session: Session, patience: float = 2.0) -> ClosingOut:
    """Count the sales since the last closing and mark them; 503 where the lock times out.

    EXCLUSIVE lets others read and makes those who write wait: no sale falls between the counting
    and the marking.
    """
    if not 0.05 <= patience <= 60:
        raise HTTPException(422, "patience must be from 0.05 to 60 seconds")
    try:
        async with lock_tables(session, [TillSale], mode="EXCLUSIVE", timeout=patience):
            counted = select(func.count(TillSale.id), func.coalesce(func.sum(TillSale.cents), 0))
            sales, cents = (
                await session.execute(counted.where(TillSale.closing_id.is_(None)))
            ).one()
            closing = TillClosing(sales=sales, cents=cents)
            session.add(closing)
            await session.flush()
            await session.execute(
                update(TillSale).where(TillSale.closing_id.is_(None)).values(closing_id=closing.id),
                execution_options={"synchronize_session": False},
            )
    except LockTimeoutError as error:
        raise HTTPException(
            503, {"message": str(error), "blockers": [blocker.pid for blocker in error.blockers]}
        ) from error
    return ClosingOut(id=closing.id, sales=sales, cents=cents)
