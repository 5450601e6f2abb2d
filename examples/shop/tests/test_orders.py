"""Orders, over HTTP and down to the tables."""

import asyncio

import httpx
import pytest
from examples.shop.models import Order, Product, product_tags
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession


async def register(shop: httpx.AsyncClient, email: str = "ada@example.org") -> int:
    response = await shop.post("/customers", json={"name": "Ada", "email": email})
    assert response.status_code == 201
    return int(response.json()["id"])


async def order(
    shop: httpx.AsyncClient, customer: int, sku: str, voucher: str | None = None
) -> httpx.Response:
    lines = [{"sku": sku, "quantity": 1}]
    return await shop.post(
        "/orders", json={"customer_id": customer, "lines": lines, "voucher": voucher}
    )


async def test_order(shop: httpx.AsyncClient, pg_session: AsyncSession) -> None:
    """An order is stored, its goods leave the shelf, and the customer hears of it."""
    response = await order(shop, await register(shop), "beans")
    assert response.status_code == 201
    stored = await pg_session.get_one(Order, response.json()["id"])
    assert stored.total_cents == 890
    assert (await pg_session.get_one(Product, "beans")).stock == 199
    assert [sent["to"] for sent in (await shop.get("/mails")).json()] == ["ada@example.org"]


async def test_out_of_stock(shop: httpx.AsyncClient, pg_session: AsyncSession) -> None:
    """What cannot be delivered leaves no order behind, and no mail."""
    customer = await register(shop)
    assert [(await order(shop, customer, "roaster")).status_code for _ in range(2)] == [201, 409]
    assert await pg_session.scalar(select(func.count()).select_from(Order)) == 1
    assert len((await shop.get("/mails")).json()) == 1


async def test_voucher_is_used_once(shop: httpx.AsyncClient) -> None:
    """The second order with a voucher stands, without the discount."""
    customer = await register(shop)
    first, second = [(await order(shop, customer, "kettle", "WELCOME10")).json() for _ in range(2)]
    assert (first["total_cents"], second["total_cents"]) == (3060, 3400)


async def test_email_belongs_to_one_customer(shop: httpx.AsyncClient) -> None:
    """A second registration is refused."""
    await register(shop)
    again = await shop.post("/customers", json={"name": "Eve", "email": "ada@example.org"})
    assert again.status_code == 409


async def test_tags_of_a_product(shop: httpx.AsyncClient, pg_session: AsyncSession) -> None:
    """A set of tags takes the place of another, and a product that does not exist has none."""
    first = await shop.put("/products/cup/tags", json={"tags": ["gift", "new"]})
    second = await shop.put("/products/cup/tags", json={"tags": ["new"]})
    assert [(change.json()["added"], change.json()["removed"]) for change in (first, second)] == [
        (2, 0),
        (0, 1),
    ]
    assert list(await pg_session.scalars(select(product_tags.c.tag))) == ["new"]
    assert (await shop.put("/products/none/tags", json={"tags": []})).status_code == 404


@pytest.mark.pg_commit
async def test_the_last_one_is_sold_once(shop: httpx.AsyncClient, pg_session: AsyncSession) -> None:
    """Ten customers at the same time, over ten connections, and one roaster."""
    customers = [await register(shop, f"{number}@example.org") for number in range(10)]
    responses = await asyncio.gather(*(order(shop, customer, "roaster") for customer in customers))
    assert sorted(response.status_code for response in responses) == [201] + 9 * [409]
    assert (await pg_session.get_one(Product, "roaster")).stock == 0
