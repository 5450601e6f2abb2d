"""What the page shows of the tables, read over one connection."""

from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

#: How many orders a window shows, and how many tags of each: the tour gives one of them 50,000.
MOST_ORDERS = 6
MOST_TAGS = 3

ORDERS = text("""
    SELECT o.id, o.status, o.total_cents,
        (SELECT string_agg(quantity || ' ' || sku, ', ' ORDER BY sku)
            FROM order_lines l WHERE l.order_id = o.id) AS lines,
        ARRAY(SELECT tag FROM order_tags t WHERE t.order_id = o.id ORDER BY tag LIMIT :tags) AS tags
    FROM orders o ORDER BY o.id DESC LIMIT :orders
""")
PRODUCTS = text("""
    SELECT p.sku, p.price_cents, p.stock, p.shelf,
        ARRAY(SELECT tag FROM product_tags t WHERE t.sku = p.sku ORDER BY tag) AS tags
    FROM products p ORDER BY p.sku
""")
TILL = text("""
    SELECT count(*) AS sales, coalesce(sum(cents), 0) AS cents,
        (SELECT to_json(c) FROM (SELECT id, sales, cents FROM till_closings
            ORDER BY id DESC LIMIT 1) c) AS last_closing
    FROM till_sales WHERE closing_id IS NULL
""")
WATCHER = text("SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE application_name = :name")


async def orders(connection: AsyncConnection) -> list[dict[str, Any]]:
    """The latest orders, the newest first."""
    parameters = {"orders": MOST_ORDERS, "tags": MOST_TAGS}
    return await rows(connection, ORDERS, parameters)


async def products(connection: AsyncConnection) -> list[dict[str, Any]]:
    """All products, with their tags."""
    return await rows(connection, PRODUCTS)


async def till(connection: AsyncConnection) -> dict[str, Any]:
    """The sales that no closing has counted, and the last closing."""
    [open_sales] = await rows(connection, TILL)
    return open_sales


async def watcher_connections(connection: AsyncConnection, name: str) -> int:
    """How many connections the watcher has, as PostgreSQL sees it."""
    return int(await connection.scalar(WATCHER, {"name": name}) or 0)


async def rows(
    connection: AsyncConnection, query: Any, parameters: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The rows of a query, as JSON can have them."""
    found: list[RowMapping] = list((await connection.execute(query, parameters)).mappings())
    return [dict(row) for row in found]
