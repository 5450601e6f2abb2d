"""The page itself: its files, which a browser may keep and must ask for again, and its events."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from examples.shop.page.live import Live

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).with_name("static")

#: Windows that can be open at the same time.
MOST_WINDOWS = 50

#: Nothing from elsewhere, and nothing inline.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """The files of the page. A browser asks with the ETag, and gets 304 for what it has."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response

    async def index(self, request: Request) -> Response:
        """The page."""
        return await self.get_response("index.html", request.scope)


async def opened(request: Request) -> AsyncIterator[Live]:
    """What a window shows, until it is closed; 429 where too many are open."""
    live: Live = request.app.state.live
    if live.windows >= MOST_WINDOWS:
        raise HTTPException(429, f"{MOST_WINDOWS} windows are open already; close one.")
    with live.window():
        yield live


@router.get("/live")
async def events(live: Annotated[Live, Depends(opened)]) -> StreamingResponse:
    """The events of one window."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(live.events(), media_type="text/event-stream", headers=headers)
