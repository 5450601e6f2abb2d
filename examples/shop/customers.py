"""Customers over HTTP."""

from fastapi import APIRouter, HTTPException
from sqlalchemy.exc import IntegrityError

from examples.shop.db import Session
from examples.shop.models import Customer
from examples.shop.schemas import CustomerIn, CustomerOut, Id

router = APIRouter(prefix="/customers", tags=["customers"])


@router.post("", status_code=201)
async def register(body: CustomerIn, session: Session) -> CustomerOut:
    """A new customer; 409 where the e-mail address is taken."""
    customer = Customer(name=body.name, email=body.email)
    session.add(customer)
    try:
        await session.flush()
    except IntegrityError as error:
        # It ends as an exception, so the transaction is rolled back.
        raise HTTPException(409, f"{body.email} is registered already") from error
    return CustomerOut(id=customer.id, name=customer.name, email=customer.email)


@router.get("/{customer_id}")
async def customer(customer_id: Id, session: Session) -> CustomerOut:
    """One customer."""
    found = await session.get(Customer, customer_id)
    if found is None:
        raise HTTPException(404, f"there is no customer {customer_id}")
    return CustomerOut(id=found.id, name=found.name, email=found.email)
