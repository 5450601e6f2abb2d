"""Limits for the windows of the page, so that no visitor is in the way of another, or of the tour.

A window sends the header `X-Shop-Window` with each request. Other clients have no such limits.
"""

import json

from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = b"x-shop-window"

#: Writes of all windows at the same time, and those at the till, which may have to wait for it:
#: the pool keeps connections for everything else.
MOST_WRITES = 20
MOST_AT_TILL = 3


class Visitors:
    """What the windows are doing, and whether the tour is under way.

    Attributes:
        tour_is_under_way: while it is, windows only look: the tour counts what is in the tables.
    """

    def __init__(self) -> None:
        self.tour_is_under_way = False
        self.writes = 0
        self.at_till = 0

    def refusal(self, path: str) -> tuple[int, str] | None:
        """The status and the text for a write that must not begin now."""
        if self.tour_is_under_way:
            return 503, "The tour is under way; the buttons work when it has ended."
        if self.writes >= MOST_WRITES:
            return 429, f"{MOST_WRITES} requests of the page are under way; try again in a moment."
        if is_at_till(path) and self.at_till >= MOST_AT_TILL:
            return 429, f"{MOST_AT_TILL} requests of the page are at the till; wait for one to end."
        return None


def is_at_till(path: str) -> bool:
    """Whether a request may have to wait for the lock on the till."""
    return path in ("/till/sales", "/till/closings")


class Limiting:
    """Middleware that keeps the limits."""

    def __init__(self, app: ASGIApp, visitors: Visitors) -> None:
        self._app = app
        self._visitors = visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_write_of_window(scope):
            await self._app(scope, receive, send)
            return
        visitors, at_till = self._visitors, is_at_till(scope["path"])
        refusal = visitors.refusal(scope["path"])
        if refusal is not None:
            await refuse(send, *refusal)
            return
        visitors.writes += 1
        visitors.at_till += at_till
        try:
            await self._app(scope, receive, send)
        finally:
            visitors.writes -= 1
            visitors.at_till -= at_till


def is_write_of_window(scope: Scope) -> bool:
    """Whether this is a request of a window that changes something."""
    return (
        scope["type"] == "http"
        and scope["method"] not in ("GET", "HEAD")
        and any(name == HEADER for name, _ in scope["headers"])
    )


async def refuse(send: Send, status: int, detail: str) -> None:
    """Answer with one clear line."""
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
