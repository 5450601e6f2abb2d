"""The live part of the shop's page: every window has the latest, and an idle one costs nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import asyncpg
import pytest
from examples.shop.models import Base
from examples.shop.page import live as live_module
from examples.shop.page import lock_tree, site
from examples.shop.page.live import Live

from pgtoolset import LockWait
from tests.docs.served_shop import (
    ROOM,
    Served,
    Window,
    client,
    opened,
    visited,
)
from tests.support import plain_url, until

pytestmark = ROOM

#: The tables that each part of the page is read from.
READ = {
    "orders": {"orders", "order_lines", "order_tags"},
    "products": {"products", "product_tags"},
    "till": {"till_sales", "till_closings"},
}


async def test_windows(shop: Served) -> None:
    """A new order and its status are in each window, whoever has changed it."""
    async with shop.window() as one, shop.window() as other:
        placed = (await shop.http.post("/orders", json=await shop.case())).json()["id"]
        for window in (one, other):
            await window.until("orders", lambda orders: orders and orders[0]["id"] == placed)
        await shop.http.put(f"/orders/{placed}/status", json={"status": "paid"})
        for window in (one, other):
            await window.until("orders", lambda orders: orders[0]["status"] == "paid")
        await shop.database.execute("UPDATE orders SET status = 'sent' WHERE id = $1", placed)
        for window in (one, other):
            await window.until("orders", lambda orders: orders[0]["status"] == "sent")


async def test_slow_window() -> None:
    """A window that does not read gets the latest value of each section, and none in between."""
    live = Live(*6 * [None])  # type: ignore[arg-type] - nothing is looked at
    events = live.events()
    await anext(events)
    for number in range(100):
        live.publish("till", number)
        live.publish("orders", number // 50)
    assert await anext(events) == "event: till\ndata: 99\n\nevent: orders\ndata: 1\n\n"
    live.publish("till", 99)
    live.publish("orders", 2)
    assert await anext(events) == "event: orders\ndata: 2\n\n"
    live.close()
    assert [event async for event in events] == []


async def test_idle_window(shop: Served) -> None:
    """An open window holds no connection of the pool. The one beside it ends with the last window,
    and so does the watching."""
    async with shop.window() as window:
        await window.until("counters", lambda counters: counters["windows"] == 1)
        assert (await shop.http.get("/pool")).json()["checked_out"] == 0
        assert await shop.sessions(shop.settings.page_name) == 1
    await until(lambda: shop.live.windows == 0)

    async def sessions() -> bool:
        return await shop.sessions(shop.settings.page_name) == 0

    await until(sessions)
    await until(lambda: shop.app.state.counters.waiters == 0)


async def test_lost_connection(shop: Served) -> None:
    """A window whose connection PostgreSQL ends goes on over another one, and says that it was
    away."""
    async with shop.window() as window:
        await window.until("database")
        await shop.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1",
            shop.settings.page_name,
        )
        await window.until("database", lambda database: not database["answers"])
        await window.until("database", lambda database: database["answers"])


async def test_frozen_server(shop: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window says that PostgreSQL does not answer where that hangs and breaks no connection, and
    goes on over another one."""
    monkeypatch.setattr(live_module, "LONGEST_LOOK", 1.0)
    async with shop.window() as window:
        await window.until("database", lambda database: database["answers"])
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = $1"
        frozen = await shop.database.fetchval(query, shop.settings.page_name)
        os.kill(frozen, signal.SIGSTOP)
        try:
            away = await window.until("database", lambda database: not database["answers"])
            assert away["error"] == "TimeoutError"
            await window.until("database", lambda database: database["answers"])
        finally:
            os.kill(frozen, signal.SIGCONT)


#: How the lock tree names the connections over which the page reads.
PAGE = "this page, to read"


def waiting(locks: list[Any]) -> list[Any]:
    """The sessions that wait, in a lock tree."""
    return [node for each in locks for node in each["waiting"]]


def of_page(locks: list[Any]) -> list[Any]:
    """Those of the page among them."""
    return [node for node in waiting(locks) if node["who"] == PAGE]


@pytest.mark.parametrize(
    ("table", "sections"),
    [
        (table.name, sections)
        for table in Base.metadata.sorted_tables
        for sections in [[name for name, tables in READ.items() if table.name in tables]]
    ],
)
async def test_locked_table(
    shop: Served,
    table: str,
    sections: list[str],
) -> None:
    """While a session has locked a table for itself, the feed goes on and names what it cannot
    read; the lock tree has the page below that session, and what it missed arrives afterwards."""
    async with shop.window() as window:
        await window.until("database", lambda database: database["answers"])
        async with shop.database.transaction():
            await shop.database.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            requests = window.sections["counters"]["requests"]
            await shop.http.get("/pool")
            await window.until("counters", lambda counters: counters["requests"] > requests)
            await window.until("unread", lambda unread: unread == sections)
            tree = await window.until("locks", lambda locks: len(of_page(locks)) == len(sections))
            assert await shop.sessions(shop.settings.page_name) == 1
            if sections:
                assert [each["pid"] for each in tree] == [shop.database.get_server_pid()]
                # The watcher looks at orders over a connection of its own, and may wait as well.
                assert {node["who"] for node in waiting(tree)} <= {PAGE, "the watcher"}
                assert all(f" on {table}: SELECT" in node["what"] for node in of_page(tree))
        await window.until("unread", lambda unread: unread == [])
        await window.until("locks", lambda locks: locks == [])


async def test_what_was_missed(shop: Served) -> None:
    """What was written under the lock is shown when it is free."""
    async with shop.window() as window:
        sales = (await window.until("till"))["sales"]
        async with shop.database.transaction():
            await shop.database.execute("LOCK TABLE till_sales IN ACCESS EXCLUSIVE MODE")
            await window.until("unread", lambda unread: unread == ["till"])
            await shop.database.execute("INSERT INTO till_sales (cents) VALUES (300)")
        await window.until("till", lambda till: till["sales"] == sales + 1)


async def test_locked_when_closed(shop: Served) -> None:
    """A page that waits for a lock leaves no session behind when its last window is closed."""
    async with shop.database.transaction():
        await shop.database.execute("LOCK TABLE till_sales IN ACCESS EXCLUSIVE MODE")
        async with shop.window() as window:
            await window.until("unread", lambda unread: unread == ["till"])

        async def nobody() -> bool:
            names = (shop.settings.page_name, shop.settings.reader_name)
            return sum([await shop.sessions(name) for name in names]) == 0

        await until(nobody)


async def test_queue_of_another_program(shop: Served, database_url: str) -> None:
    """Another program that waits for a table, and makes the page wait, is in the tree below the
    session that it waits for itself."""
    other = await asyncpg.connect(
        plain_url(database_url),
        server_settings={"search_path": shop.settings.schema, "application_name": "psql"},
    )
    try:
        async with shop.window() as window, asyncio.TaskGroup() as group:
            async with shop.database.transaction():
                await shop.database.execute("INSERT INTO till_sales (cents) VALUES (300)")
                group.create_task(other.execute("BEGIN; LOCK TABLE till_sales; COMMIT"))
                tree = await window.until(
                    "locks", lambda locks: locks and locks[0]["waiting"][0]["waiting"]
                )
                assert tree[0]["pid"] == shop.database.get_server_pid()
                below = tree[0]["waiting"][0]
                assert below["pid"] == other.get_server_pid()
                assert below["who"] == "a session of another program"
                assert below["waiting"][0]["who"] == "this page, to read"
            await window.until("locks", lambda locks: locks == [])
    finally:
        await other.close()


async def test_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream begins with a heartbeat, which says how often one comes, and has one where nothing
    else happens."""
    monkeypatch.setattr(live_module, "HEARTBEAT", 0.01)
    live = Live(*6 * [None])  # type: ignore[arg-type] - nothing is looked at
    events = live.events()
    heartbeat = 'event: heartbeat\ndata: {"every": 0.01}\n\n'
    assert (await anext(events)).endswith(heartbeat)
    assert await anext(events) == await anext(events) == heartbeat
    live.close()


async def test_end_of_the_shop(database_url: str) -> None:
    """A server that stops ends open windows and followers of orders, whose clients stay, and breaks
    none off."""
    window_is_open, follows = asyncio.Event(), asyncio.Event()

    async def look(address: str) -> None:
        async with client(address) as http, http.stream("GET", "/live") as response:
            window = Window(response.aiter_lines())
            await window.until("orders")
            window_is_open.set()
            await window.to_the_end()

    async def follow(address: str, path: str) -> list[str]:
        async with client(address) as http, http.stream("GET", path) as response:
            lines = response.aiter_lines()
            heard = [await anext(lines)]
            follows.set()
            return heard + [line async for line in lines]

    async with asyncio.TaskGroup() as group:
        async with opened(database_url) as stopping:
            async with visited(stopping) as served:
                placed = await served.http.post("/orders", json=await served.case())
            events = f"/orders/{placed.json()['id']}/events"
            group.create_task(look(stopping.address))
            following = group.create_task(follow(stopping.address, events))
            await window_is_open.wait()
            await follows.wait()
    assert following.result() == ["data: placed", ""]


async def test_too_many_windows(
    shop: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window too many is refused in one line, and a place that is left is free."""
    monkeypatch.setattr(site, "MOST_WINDOWS", 2)
    async with shop.window() as first, shop.window() as second:
        await first.until("orders")
        await second.until("orders")
        refused = await shop.http.get("/live")
        assert (refused.status_code, refused.json()) == (
            429,
            {"detail": "2 windows are open already; close one."},
        )
    await until(lambda: shop.live.windows == 0)
    async with shop.window() as again:
        await again.until("orders")


async def test_lock_tree(shop: Served) -> None:
    """While a session holds the till, a closing waits below it and a sale below the closing; then
    both go on, and the tree is empty."""

    def pids(nodes: list[dict[str, Any]]) -> list[Any]:
        return [[node["pid"], *pids(node["waiting"])] for node in nodes]

    async with shop.window() as window, asyncio.TaskGroup() as group:
        async with shop.database.transaction():
            await shop.database.execute("LOCK TABLE till_sales IN EXCLUSIVE MODE")
            closing = group.create_task(shop.http.post("/till/closings?patience=60"))
            await window.until("locks", lambda locks: pids(locks) and len(pids(locks)[0]) == 2)
            sale = group.create_task(shop.http.post("/till/sales", json={"cents": 300}))
            tree = await window.until(
                "locks", lambda locks: pids(locks) and len(pids(locks)[0][1]) == 2
            )
            assert tree[0]["pid"] == shop.database.get_server_pid()
            assert tree[0]["seconds"] is None
            below = tree[0]["waiting"][0]
            assert below["seconds"] > 0 and below["what"] == "EXCLUSIVE on till_sales"
            assert "INSERT INTO till_sales" in below["waiting"][0]["what"]
        assert (await closing).status_code == (await sale).status_code == 201
        await window.until("locks", lambda locks: locks == [])


@pytest.mark.parametrize(
    ("blocked_by", "grown"),
    [
        ({2: [1]}, {1: {2: {}}}),
        ({2: [1], 3: [1, 2]}, {1: {2: {3: {}}}}),
        ({3: [1, 2]}, {1: {3: {}}, 2: {}}),
        ({4: [1], 5: [2], 6: [1, 2, 4]}, {1: {4: {6: {}}}, 2: {5: {}}}),
        ({1: [2], 2: [1]}, {1: {}, 2: {}}),
        ({1: [2], 2: [3], 3: [1]}, {1: {}, 2: {}, 3: {}}),
    ],
)
def test_every_session_once(blocked_by: dict[int, list[int]], grown: Any) -> None:
    """Each session is in the tree once, below one that it waits for; in a deadlock too."""
    waits = [
        LockWait(pid, behind, None, None, None, None, None) for pid, behind in blocked_by.items()
    ]
    pids = {*blocked_by, *(pid for behind in blocked_by.values() for pid in behind)}
    nodes = {pid: lock_tree.Node(pid, "", "") for pid in sorted(pids)}

    def plain(nodes: list[lock_tree.Node]) -> Any:
        return {node.pid: plain(node.waiting) for node in nodes}

    def flat(tree: Any) -> list[int]:
        return [pid for each, below in tree.items() for pid in [each, *flat(below)]]

    tree = plain(lock_tree.grown(nodes, waits))
    assert sorted(flat(tree)) == sorted(pids)
    assert tree == grown
