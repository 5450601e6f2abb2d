"""The steps of the tour that one client takes alone.

Each raises `NotProved` where it did not see what it claims. What another transaction can see is
asked of the witness, not of the shop.
"""

from examples.shop.client import Shop, Witness
from examples.shop.console import Console, expect


async def readable_at_once(shop: Shop, witness: Witness, console: Console) -> None:
    console.did(
        "POST /orders, 20 times; as soon as the headers of the response were here, before its "
        "body was read, looked "
        "for the row over another connection"
    )
    customer = await shop.register("Ada")
    order = {"customer_id": customer["id"], "lines": [{"sku": "beans", "quantity": 1}]}
    order_ids, found = [], 0
    for _ in range(20):
        async with shop.http.stream("POST", "/orders", json=order) as response:
            # The status line and the headers are here; the body has not been requested yet.
            expect("the status of POST /orders", response.status_code, 201)
            order_ids.append(int(response.headers["location"].rpartition("/")[2]))
            found += await witness.value(
                "SELECT count(*) FROM orders WHERE id = :id", id=order_ids[-1]
            )
    console.saw(f"{found} of {len(order_ids)} orders were there")
    expect("orders found at once", found, len(order_ids))
    expect(
        "the order over HTTP", (await shop.get(f"/orders/{order_ids[-1]}"))["lines"], order["lines"]
    )
    console.proves("Depends(get_db) commits before the response starts")


async def mail_after_commit(shop: Shop, witness: Witness, console: Console) -> None:
    customer = await shop.register("Grace")
    one = {"customer_id": customer["id"], "lines": [{"sku": "cup", "quantity": 1}]}
    both = {**one, "lines": [*one["lines"], {"sku": "roaster", "quantity": 2}]}
    cups = await shop.stock("cup")

    console.did(
        "POST /orders for a cup and 2 roasters, of which there is one; the endpoint had called "
        "on_commit"
    )
    refused = await shop.post("/orders", both, status=409)
    mails = await shop.mails_to(customer)
    console.saw(
        f"409, {refused['detail']}; {await shop.stock('cup')} cups as before; {len(mails)} mails"
    )
    expect("cups", await shop.stock("cup"), cups)
    expect("orders", await witness.orders_of(customer), 0)
    expect("mails", mails, [])

    console.did("POST /orders for the cup alone")
    order = await shop.post("/orders", one)
    mails = await shop.mails_to(customer)
    console.saw(f"201; {await shop.stock('cup')} cups; mails: {', '.join(mails)}")
    expect("cups", await shop.stock("cup"), cups - 1)
    expect("orders", await witness.orders_of(customer), 1)
    expect("mails", mails, [f"Thank you for order {order['id']}"])
    console.proves("on_commit callbacks run after the commit, and a rollback forgets them")


async def nested_step(shop: Shop, witness: Witness, console: Console) -> None:
    console.did(
        "POST /deliveries, 10 each of beans, grinders and kettles; the shelf of the grinders is "
        "too small"
    )
    before = {sku: await shop.stock(sku) for sku in ("beans", "grinder", "kettle")}
    lines = [{"sku": sku, "quantity": 10} for sku in before]
    delivery = await shop.post("/deliveries", {"supplier": "Moka & Sons", "lines": lines})
    after = {sku: await shop.stock(sku) for sku in before}
    recorded = await witness.value(
        "SELECT string_agg(sku, ' ' ORDER BY sku) FROM delivery_lines WHERE delivery_id = :id",
        id=delivery["id"],
    )
    console.saw(
        f"201; accepted: {' '.join(delivery['accepted'])}; refused: {' '.join(delivery['refused'])}"
    )
    console.saw("stock: " + ", ".join(f"{sku} {before[sku]} -> {after[sku]}" for sku in before))
    console.saw(f"delivery lines in the database: {recorded}")
    expect("refused", delivery["refused"], ["grinder"])
    expect(
        "stock",
        after,
        {sku: number if sku == "grinder" else number + 10 for sku, number in before.items()},
    )
    expect("delivery lines", recorded, "beans kettle")
    console.proves(
        "a nested get_transaction is a savepoint: the grinders' delivery line, inserted before "
        "the CHECK failed, is "
        "gone, and what came before and after it is committed"
    )


async def swallowed_error(shop: Shop, witness: Witness, console: Console) -> None:
    customer = await shop.register("Edsger")
    order = {
        "customer_id": customer["id"],
        "lines": [{"sku": "cup", "quantity": 1}],
        "voucher": "WELCOME10",
    }
    first = await shop.post("/orders", order)
    expect("the price with a voucher", first["total_cents"], 405)
    cups = await shop.stock("cup")

    console.did(
        "POST /mistakes/orders with a voucher that has been used; the endpoint catches the "
        "IntegrityError, goes on "
        "and returns 200"
    )
    report = await shop.post("/mistakes/orders", order, status=500)
    console.saw(f"500, sqlstate {report['sqlstate']}: {report['detail']}")
    stored, mails = await witness.orders_of(customer), await shop.mails_to(customer)
    console.saw(
        f"{stored - 1} orders more, {await shop.stock('cup')} cups as before, {len(mails) - 1} "
        "mails more"
    )
    expect("sqlstate", report["sqlstate"], "23505")
    expect("the cause to be named", "IntegrityError" in report["detail"], True)
    expect("orders, cups, mails", (stored, await shop.stock("cup"), len(mails)), (1, cups, 1))

    console.did("POST /orders, the same with the voucher in a nested get_transaction")
    repaired = await shop.post("/orders", order)
    stored, mails = await witness.orders_of(customer), await shop.mails_to(customer)
    console.saw(f"201, {repaired['notes'][0]}; {stored - 1} order more, {len(mails) - 1} mail more")
    expect("orders, cups, mails", (stored, await shop.stock("cup"), len(mails)), (2, cups - 1, 2))
    expect("the price without the voucher", repaired["total_cents"], 450)
    console.proves("get_db never reports success for work that PostgreSQL discarded")
