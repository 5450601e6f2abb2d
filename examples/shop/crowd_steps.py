"""The steps of the tour that many clients take at once.

Nothing here depends on how fast the machine is: where clients have to be in the middle of
something, the step waits until PostgreSQL, or the client itself, says that they are.
"""

import asyncio

from examples.shop.client import Shop, Witness
from examples.shop.console import Console, eventually, expect
from examples.shop.crowd import Crowd
from examples.shop.db import POOL_SIZE


async def serializable_decrements(shop: Shop, witness: Witness, console: Console) -> None:
    clients = 50
    console.did(
        f"POST /products/kettle/reservations, {clients} at once: each reads the stock, subtracts "
        "1 in Python and "
        "writes the result, in run_transaction(..., isolation_level='SERIALIZABLE')"
    )
    before = await shop.stock("kettle")
    async with asyncio.TaskGroup() as group, witness.holding("kettle"):
        tasks = [
            group.create_task(shop.post("/products/kettle/reservations", {}))
            for _ in range(clients)
        ]
        # As many as the pool lets in have read the stock now and wait to write what they made of
        # it. The witness leaves a newer row behind, so each of them has read in vain: there are
        # retries on every machine.
        await eventually("clients that wait for the row", witness.waiting_for_locks, POOL_SIZE)
    reservations = [task.result() for task in tasks]
    attempts = sum(reservation["attempts"] for reservation in reservations)
    after = await shop.stock("kettle")
    console.saw(
        f"{clients} times 201, after {attempts} attempts in all: {attempts - clients} retries"
    )
    console.saw(f"stock: kettle {before} -> {after}")
    expect("stock", after, before - clients)
    expect(
        "different results", len({reservation["stock"] for reservation in reservations}), clients
    )
    expect(f"at least {POOL_SIZE} retries", attempts - clients >= POOL_SIZE, True)
    console.proves("no decrement is lost, and no client has to know of serialization failures")


async def hang_ups(shop: Shop, witness: Witness, console: Console) -> None:
    size = 50
    console.did(
        f"{4 * size} requests at once: {size} orders of one locked product, {size} exports "
        f"without an end, {size} slow "
        f"reports, {size} short exports"
    )
    customer = await shop.register("Barbara")
    order = {"customer_id": customer["id"], "lines": [{"sku": "beans", "quantity": 1}]}
    orders = Crowd(size, shop.http.base_url, "POST", "/orders", order)
    # So long that no buffers between PostgreSQL and the client can hold it.
    exports = Crowd(size, shop.http.base_url, "GET", "/reports/export?lines=10000000")
    beans = await shop.stock("beans")

    async with asyncio.TaskGroup() as group:
        async with witness.holding("beans"):
            orders.call(group)
            await eventually("orders sent", orders.sent, size)
            await eventually("orders that wait for the row", witness.waiting_for_locks, POOL_SIZE)
            exports.call(group)
            reports = [
                group.create_task(shop.get("/reports/turnover", seconds=0.02)) for _ in range(size)
            ]
            short_exports = [
                group.create_task(shop.lines("/reports/export", lines=300)) for _ in range(size)
            ]
            await orders.hang_up()
        # An export without a reader keeps its connection, so in the end each connection is in the
        # hands of one.
        await eventually("exports sent", exports.sent, size)
        await eventually("exports that began", exports.answered, POOL_SIZE)
        await exports.hang_up()
    console.did(
        f"the clients of the first two hung up, {POOL_SIZE} each in the middle of a statement or "
        "stream, the others "
        "while they waited for a connection"
    )
    expect("whole exports", {len(task.result()) for task in short_exports}, {300})
    console.saw(
        f"{len(reports)} reports and {len(short_exports)} exports for those who stayed, whole"
    )

    async def strays() -> list[str]:
        states = await witness.states()
        return [state for state in states if state != "idle"] + states[POOL_SIZE:]

    async def mails_missing() -> int:
        return await witness.orders_of(customer) - len(await shop.mails_to(customer))

    await eventually("connections checked out", shop.checked_out, 0)
    await eventually(f"connections in a transaction, or beyond {POOL_SIZE}", strays, [])
    console.saw(
        f"GET /pool: 0 checked out; pg_stat_activity: {len(await witness.states())} connections, "
        "all idle"
    )
    await eventually("confirmations missing", mails_missing, 0)
    sold = await witness.value(
        "SELECT CAST(:before AS int) - stock - (SELECT count(*) FROM orders WHERE customer_id = "
        ":id) "
        "FROM products WHERE sku = 'beans'",
        before=beans,
        id=customer["id"],
    )
    expect("beans sold without an order", sold, 0)
    stored = await witness.orders_of(customer)
    console.saw(
        f"{stored} of the {size} abandoned orders are stored, each with its goods and its mail"
    )
    console.proves(
        "whenever a client hangs up, the connection comes back and the transaction is whole or gone"
    )
