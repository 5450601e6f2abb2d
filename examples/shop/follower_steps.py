"""The step of the tour in which a crowd follows its orders."""

import time

from examples.shop.client import Shop, Witness
from examples.shop.console import Console, eventually, expect
from examples.shop.followers import Followers, affordable

CLIENTS = 1000
ORDERS = 50


async def followed_orders(shop: Shop, witness: Witness, console: Console) -> None:
    clients = affordable(CLIENTS)
    if clients < CLIENTS:
        console.saw(
            f"this process may open too few files for {CLIENTS:,} clients: {clients:,} are taken"
        )
    customer = await shop.register("Radia")
    order = {"customer_id": customer["id"], "lines": [{"sku": "beans", "quantity": 1}]}
    order_ids = [(await shop.post("/orders", order))["id"] for _ in range(ORDERS)]
    missing = await shop.http.get(f"/orders/{2**31 - 1}/events")
    expect("the status of an unknown order's events", missing.status_code, 404)
    followers = Followers(
        shop.http.base_url, (order_ids[number % ORDERS] for number in range(clients))
    )

    async def deaf_to(status: str) -> int:
        return clients - followers.heard(status)

    console.did(
        f"GET /orders/ID/events, {clients:,} clients at once, on {ORDERS} orders; PUT "
        "/orders/ID/status for each"
    )
    async with followers.following():
        await eventually("clients without a first event", lambda: deaf_to("placed"), 0)
        paid = {}
        for order_id in order_ids:
            paid[order_id] = time.perf_counter()
            response = await shop.http.put(f"/orders/{order_id}/status", json={"status": "paid"})
            expect("the status of PUT /orders/ID/status", response.status_code, 200)
        await eventually("clients that have not heard of paid", lambda: deaf_to("paid"), 0)
        connections, checked_out = await witness.watching(), await shop.checked_out()
        console.saw(
            f"pg_stat_activity: {connections} connection watches for {clients:,} clients; GET "
            f"/pool: {checked_out} "
            "checked out"
        )
        console.saw(f"from the PUT to the client: {spread(followers.delays('paid', paid))}")
        expect(
            "connections that watch, connections checked out", (connections, checked_out), (1, 0)
        )

        console.did(f"UPDATE of all {ORDERS} orders in one statement, over another connection")
        sent = dict.fromkeys(order_ids, time.perf_counter())
        await witness.send_orders_of(customer)
        await eventually("clients that have not heard of sent", lambda: deaf_to("sent"), 0)
        console.saw(f"from the UPDATE to the client: {spread(followers.delays('sent', sent))}")
    console.proves(
        "one connection serves any number of waiters, and each receives every change that is "
        "committed"
    )


def spread(delays: list[float]) -> str:
    """The median and the 99th percentile of sorted seconds."""
    p50, p99 = delays[len(delays) // 2], delays[len(delays) * 99 // 100]
    return f"p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms"
