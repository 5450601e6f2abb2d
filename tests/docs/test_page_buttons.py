"""What the buttons of the shop's page do: the promises hold, nonsense is refused in one line, and
visitors do not disturb each other."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from examples.shop.app import report_lost_connection
from examples.shop.page import visitors
from fastapi import Request

from tests.docs.served_shop import ROOM, Served
from tests.support import until

pytestmark = ROOM

WINDOW = {"X-Shop-Window": "a test"}
NONE = 2**31 - 1


async def test_swallowed_error(shop: Served) -> None:
    """An endpoint that swallows an error and returns 200 answers 500; the first order stays."""
    order = await shop.case()
    assert (await shop.http.post("/orders", json=order)).status_code == 201
    assert (await shop.http.post("/mistakes/orders", json=order)).status_code == 500
    assert await shop.evidence(order) == {"orders": 1, "mails": 1, "parcels": 0}


async def test_failing_commit(shop: Served) -> None:
    """An endpoint that returns 201 and whose COMMIT fails answers 409; nothing is stored, no mail
    leaves, and the counters have a transaction more that was rolled back."""
    order, counters = await shop.case(), shop.app.state.counters
    rolled_back = counters.rolled_back
    response = await shop.http.post("/mistakes/parcels", json=order)
    assert (response.status_code, response.json()["title"]) == (409, "Conflict")
    assert await shop.evidence(order) == {"orders": 0, "mails": 0, "parcels": 0}
    assert counters.rolled_back == rolled_back + 1


async def test_killed_connection(shop: Served) -> None:
    """A connection that PostgreSQL ends in a transaction is 503 and leaves nothing; the next
    request has another connection."""
    order, counters = await shop.case(), shop.app.state.counters
    rolled_back = counters.rolled_back
    response = await shop.http.post("/mistakes/lost-connections", json=order)
    assert response.status_code == 503 and response.headers["retry-after"]
    assert await shop.evidence(order) == {"orders": 0, "mails": 0, "parcels": 0}
    assert counters.rolled_back == rolled_back + 1
    assert (await shop.http.post("/orders", json=order)).status_code == 201
    assert await shop.evidence(order) == {"orders": 1, "mails": 1, "parcels": 0}


async def test_hundred_waiters(shop: Served) -> None:
    """A hundred clients receive a change over one connection, and an open window sees all of them
    wait; an order that has changed before is refused."""
    placed = (await shop.http.post("/orders", json=await shop.case())).json()["id"]
    body = {"order_id": placed}
    async with shop.window() as window, asyncio.TaskGroup() as group:
        await window.until("counters")
        work = group.create_task(shop.http.post("/waiters", json=body))
        await window.until("counters", lambda counters: counters["waiters"] >= 100)
        outcome = (await work).json()
    del outcome["milliseconds"]
    assert outcome == {"waiters": 100, "received": 100, "watching": 1, "pool_in_use": 0}
    refused = await shop.http.post("/waiters", json=body)
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        f"order {placed} is not new; place another one",
    )
    await until(lambda: shop.app.state.counters.waiters == 0)


async def test_two_hundred_waiters(shop: Served) -> None:
    """While a hundred clients wait, others are refused."""
    shop.app.state.waiters_at_work = True
    try:
        assert (await shop.http.post("/waiters", json={"order_id": 1})).status_code == 429
    finally:
        shop.app.state.waiters_at_work = False


async def test_tags_of_products(shop: Served) -> None:
    """A set of tags replaces another; an unknown tag is 409 and changes nothing. A window that is
    opened later shows nothing of what an earlier one had."""

    async def put(*tags: str) -> httpx.Response:
        return await shop.http.put("/products/kettle/tags", json={"tags": tags})

    async with shop.window() as window:
        await window.until("products")
    await until(lambda: shop.live.windows == 0)
    assert (await put("gift", "new")).json() == {"added": 2, "removed": 0, "unknown": []}
    assert (await put("new", "fragile", "seasonal")).json()["removed"] == 1
    assert (await put("gift", "unheard-of")).status_code == 409
    async with shop.window() as window:
        [kettle] = [each for each in await window.until("products") if each["sku"] == "kettle"]
    assert kettle["tags"] == ["fragile", "new", "seasonal"]
    assert (await put()).json()["removed"] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/waiters", {"order_id": 0}, 422),
        ("POST", "/waiters", {"order_id": NONE}, 404),
        ("POST", "/waiters", {"order_id": 1, "waiters": 101}, 422),
        ("POST", "/waiters", {"order_id": 1, "waiters": 0}, 422),
        ("POST", "/waiters", {"order_id": "one"}, 422),
        ("POST", "/waiters", {"order_id": 1, "more": True}, 422),
        ("POST", "/waiters", None, 422),
        ("POST", "/till/holds", {"seconds": 0}, 422),
        ("POST", "/till/holds", {"seconds": 3600}, 422),
        ("POST", "/till/holds", {"seconds": "nan"}, 422),
        ("POST", "/till/holds", {"seconds": None}, 422),
        ("POST", "/till/closings?patience=nan", None, 422),
        ("POST", "/till/closings?patience=0", None, 422),
        ("POST", "/till/sales", {"cents": -1}, 422),
        ("GET", "/cases/0", None, 422),
        ("GET", f"/cases/{NONE}", None, 404),
        ("GET", "/cases/x", None, 422),
        ("PUT", "/products/none/tags", {"tags": []}, 404),
        ("PUT", "/products/cup/tags", {"tags": ["NOT A TAG"]}, 422),
        ("PUT", "/products/cup/tags", {"tags": "gift"}, 422),
        ("PUT", "/products/%00/tags", {"tags": []}, 422),
        ("PUT", "/orders/1/status", {"status": "lost"}, 422),
        ("POST", "/mistakes/parcels", {"customer_id": NONE, "lines": []}, 422),
        ("POST", "/mistakes/lost-connections", {"customer_id": 1}, 422),
        ("POST", "/live", None, 405),
    ],
)
async def test_nonsense(
    shop: Served,
    method: str,
    path: str,
    body: Any,
    status: int,
) -> None:
    """Nonsense is a 4xx with one clear line."""
    response = await shop.http.request(method, path, json=body)
    assert response.status_code == status
    line = response.json()["detail"]
    assert line and "\n" not in line and len(line) < 200


async def test_unreadable(shop: Served) -> None:
    """A body that is no JSON is a 4xx."""
    for content in (b"", b"{", b"\xff", b"[" * 5000):
        assert (await shop.http.post("/waiters", content=content)).status_code in (400, 422)


async def test_tour(shop: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the tour is under way, windows may look and change nothing; other clients may."""
    monkeypatch.setattr(shop.app.state.visitors, "tour_is_under_way", True)
    refused = await shop.http.post("/cases", headers=WINDOW)
    assert (refused.status_code, refused.json()["detail"]) == (
        503,
        "The tour is under way; the buttons work when it has ended.",
    )
    assert (await shop.http.get("/products", headers=WINDOW)).status_code == 200
    assert (await shop.http.post("/cases")).status_code == 201
    async with shop.window() as window:
        await window.until("tour", lambda tour: tour["is_under_way"])


async def test_held_till(shop: Served) -> None:
    """One session at a time holds the till, and a closing that times out names it; where it is
    ended, the till is free."""
    async with shop.window() as window:
        holder = (await shop.http.post("/till/holds", json={"seconds": 10})).json()["pid"]
        again = await shop.http.post("/till/holds", json={})
        assert again.status_code == 409
        assert again.json()["detail"].startswith("The till is held for")
        closing = await shop.http.post("/till/closings?patience=0.05")
        assert (closing.status_code, closing.json()["detail"]["blockers"]) == (503, [holder])
        await window.until("till", lambda till: till["held_by"] == holder)
        await shop.database.execute("SELECT pg_terminate_backend($1)", holder)
        await window.until("till", lambda till: till["held_by"] is None)
    assert (await shop.http.post("/till/closings?patience=60")).status_code == 201


async def test_queue_at_the_till(shop: Served) -> None:
    """Some requests of windows wait for the till, and one more is refused in one line; every other
    visitor goes on, for the pool has connections left."""
    async with asyncio.TaskGroup() as group:
        async with shop.database.transaction():
            await shop.database.execute("LOCK TABLE till_sales IN EXCLUSIVE MODE")
            sales = [
                group.create_task(shop.http.post("/till/sales", json={"cents": 1}, headers=WINDOW))
                for _ in range(visitors.MOST_AT_TILL)
            ]
            await until(lambda: shop.app.state.visitors.at_till == visitors.MOST_AT_TILL)
            refused = await shop.http.post("/till/sales", json={"cents": 1}, headers=WINDOW)
            assert (refused.status_code, refused.json()["detail"]) == (
                429,
                "3 requests of the page are at the till; wait for one to end.",
            )
            order = await shop.case()
            assert (await shop.http.post("/orders", json=order, headers=WINDOW)).status_code == 201
    assert [sale.result().status_code for sale in sales] == [201] * visitors.MOST_AT_TILL
    await until(lambda: shop.app.state.visitors.at_till == shop.app.state.visitors.writes == 0)


async def test_till_in_use(shop: Served) -> None:
    """A session that cannot have the till says who has it, and none holds it afterwards."""
    async with shop.database.transaction():
        await shop.database.execute("INSERT INTO till_sales (cents) VALUES (1)")
        refused = await shop.http.post("/till/holds", json={})
        pid = shop.database.get_server_pid()
        assert refused.status_code == 503 and f"pid {pid}" in refused.json()["detail"]
    assert not shop.app.state.holds.is_held


async def test_flood(
    shop: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows have so many writes at once, and one more is refused."""
    monkeypatch.setattr(visitors, "MOST_WRITES", 0)
    refused = await shop.http.post("/cases", headers=WINDOW)
    assert refused.status_code == 429 and refused.headers["retry-after"]


async def test_away() -> None:
    """A database that cannot be reached is 503 in one line; any other error stays an error."""
    request = Request({"type": "http"})
    response = await report_lost_connection(request, ConnectionRefusedError())
    assert response.status_code == 503 and b"cannot be reached" in bytes(response.body)
    with pytest.raises(ValueError):
        await report_lost_connection(request, ValueError())
