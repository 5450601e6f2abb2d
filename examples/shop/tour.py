"""The tour: what the shop promises, tried out as a client would, with PostgreSQL as the witness.

Every step prints what it did, what it saw and what that proves, and raises `NotProved` where it saw something else.
"""

from collections.abc import Awaitable, Callable

from examples.shop.client import Guest
from examples.shop.console import Console, NotProved, eventually, expect
from examples.shop.crowds import hang_ups, serializable_decrements


async def order_is_readable_at_once(guest: Guest, console: Console) -> None:
    customer = await guest.register("Ada")
    orders, found = 20, 0
    for _ in range(orders):
        body = {"customer_id": customer["id"], "lines": [{"sku": "beans", "quantity": 1}]}
        async with guest.shop.http.stream("POST", "/orders", json=body) as response:
            # Only the status line and the headers have been read so far.
            expect("POST /orders", response.status_code, 201)
            order_id = int(response.headers["location"].rpartition("/")[2])
            found += await guest.witness.value("SELECT count(*) FROM orders WHERE id = :id", id=order_id)
