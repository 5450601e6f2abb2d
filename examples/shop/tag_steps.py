"""The step of the tour that tags orders."""

import asyncio

from examples.shop.client import Shop, Witness
from examples.shop.console import Console, expect


async def tagged_orders(shop: Shop, witness: Witness, console: Console) -> None:
    customer = await shop.register("Margaret")
    order = await shop.post(
        "/orders", {"customer_id": customer["id"], "lines": [{"sku": "cup", "quantity": 1}]}
    )
    path = f"/orders/{order['id']}/tags"
    await shop.post("/tags", {"tags": ["fragile", "gift", "late", "urgent"]})

    console.did(
        "POST /orders/ID/tags with gift, an unknown tag and urgent, each in a nested transaction"
    )
    added = await shop.post(path, {"tags": ["gift", "unknown", "urgent"]}, status=200)
    console.saw(
        f"{added['added']} added, unknown: {' '.join(added['unknown'])}; the order was expired in "
        "between"
    )
    expect("added, unknown", (added["added"], added["unknown"]), (2, ["unknown"]))
    expect("the tags", await shop.get(path), ["gift", "urgent"])

    console.did(
        "PUT other tags; then with an unknown one; then 10 times at once, each time two sets of "
        "tags"
    )
    change = await put(shop, path, ["gift", "late"])
    expect("added, removed", (change["added"], change["removed"]), (1, 1))
    refused = await shop.http.put(path, json={"tags": ["fragile", "unknown"]})
    expect("the status for an unknown tag", refused.status_code, 409)
    expect("the tags", await shop.get(path), ["gift", "late"])
    sets = [["fragile", "gift"], ["late", "urgent"]]
    left: list[str] = []
    for _ in range(10):
        await asyncio.gather(*(put(shop, path, tags) for tags in sets))
        left = await shop.get(path)
        expect("one set or the other", left in sets, True)
    console.saw(
        f"1 added and 1 removed; 409 and nothing changed; {' and '.join(left)}, never a mixture"
    )

    console.did("POST /orders/ID/tags/reset: cleared, and another added, under a table lock")
    reset = await shop.post(f"{path}/reset", {"tags": ["urgent"]}, status=200)
    console.saw(f"{reset['removed']} removed, {reset['added']} added")
    expect(
        "removed, added, left",
        (reset["removed"], reset["added"], await shop.get(path)),
        (2, 1, ["urgent"]),
    )

    many = [f"batch-{number:05}" for number in range(50_000)]
    console.did(f"PUT {len(many):,} tags at once, then none")
    await shop.post("/tags", {"tags": many})
    change = await put(shop, path, many)
    stored = await witness.value(
        "SELECT count(*) FROM order_tags WHERE order_id = :id", id=order["id"]
    )
    console.saw(
        f"{change['added']:,} added and {change['removed']} removed by one statement; {stored:,} "
        "stored"
    )
    expect(
        "added, removed, stored", (change["added"], change["removed"], stored), (50_000, 1, 50_000)
    )
    cleared = await put(shop, path, [])
    expect("cleared", (cleared["removed"], await shop.get(path)), (50_000, []))
    console.proves(
        "associations are added, replaced and cleared without a lazy load, at any size, one set "
        "at a time"
    )


async def put(shop: Shop, path: str, tags: list[str]) -> dict[str, int]:
    response = await shop.http.put(path, json={"tags": tags})
    expect(f"the status of PUT {path}", response.status_code, 200)
    change: dict[str, int] = response.json()
    return change
