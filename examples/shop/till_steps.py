"""The steps of the tour at the till: locks, and who is in the way of one."""

import asyncio

from examples.shop.client import Shop, Witness
from examples.shop.console import Console, expect


async def closing_the_till(shop: Shop, witness: Witness, console: Console) -> None:
    clients, each = 8, 25
    console.did(
        f"POST /till/sales, {clients * each} by {clients} clients, and meanwhile POST "
        "/till/closings again and again: "
        "lock_tables(..., mode='EXCLUSIVE') around counting the sales and marking them as counted"
    )

    async def sell() -> None:
        for _ in range(each):
            await shop.post("/till/sales", {"cents": 100})

    closings = []
    async with asyncio.TaskGroup() as group:
        sellers = [group.create_task(sell()) for _ in range(clients)]
        while not all(seller.done() for seller in sellers):
            closings.append(await shop.post("/till/closings?patience=30", None))
    closings.append(await shop.post("/till/closings?patience=30", None))
    wrong = await witness.value(
        "SELECT count(*) FROM till_closings c WHERE c.cents <> "
        "(SELECT coalesce(sum(s.cents), 0) FROM till_sales s WHERE s.closing_id = c.id)"
    )
    counted = sum(closing["sales"] for closing in closings)
    console.saw(
        f"{len(closings)} closings counted {counted} sales; {wrong} differ from the sales marked "
        "as theirs"
    )
    expect("sales counted", counted, clients * each)
    expect("closings that differ from their sales", wrong, 0)
    console.proves(
        "while the lock is held no session writes, and every waiter continues afterwards"
    )


async def who_is_in_the_way(shop: Shop, witness: Witness, console: Console) -> None:
    console.did(
        "began a sale over another connection and left it open; POST /till/closings?patience=0.5"
    )
    async with witness.holding_till() as pid:
        refusal = (await shop.post("/till/closings?patience=0.5", None, status=503))["detail"]
        console.saw(f"503: {refusal['message']}")
        expect("the blockers", refusal["blockers"], [pid])
        expect("the pid in the message", f"pid {pid}" in refusal["message"], True)
    await shop.post("/till/closings", None)
    console.saw("201 as soon as that sale was over")
    console.proves(
        "a lock that times out names its holder: pid, application, state, statement, age"
    )
